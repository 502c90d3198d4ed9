"""What an execution is asked for, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Mapping as Table
from dataclasses import dataclass, field

import pandas as pd

from hwmodels.mapping import Mapping
from hwmodels.shape import ModelShape
from simulator.log import Log

#: Columns of the log of executed steps, one row a step.
#:
#: replica, lane             as in simulator.result.STEP_COLUMNS
#: start_s, end_s            from forming the batch to knowing its tokens, bookkeeping included, in seconds of the run
#: forward_s                 part of it between the first operator and the sampled ids on the host
#: decode_sequences, decode_context_tokens   sequences that decode, and what they attend to, new tokens included
#: items                     (new tokens, tokens cached before) of every prompt chunk
#: waiting                   requests in the lane's queue
#: laps                      seconds by operator, all launches together; None where they were not measured
EXECUTED_COLUMNS = (
    "replica",
    "lane",
    "start_s",
    "end_s",
    "forward_s",
    "decode_sequences",
    "decode_context_tokens",
    "items",
    "waiting",
    "laps",
)


@dataclass(frozen=True, slots=True)
class Job:
    """What is executed where.

    mapping        tp and pp (and ep, expert_tp) of every replica; attention_dp is not executed
    replicas       copies of it, each with processes of its own (DP)
    device         'cpu' or 'cuda'
    dtype          of weights, activations and cache: 'fp32', 'bf16' or 'fp16'
    threads        that each process computes with on a CPU
    kv_blocks      KV blocks of each of the replica's schedulers (pp of them), of `block_tokens` tokens
    seed           of the weights and prompts
    """

    model: ModelShape
    mapping: Mapping
    replicas: int
    device: str
    dtype: str
    threads: int
    kv_blocks: int
    block_tokens: int
    seed: int = 0

    @property
    def ranks(self) -> int:
        """Processes in all."""
        return self.replicas * self.mapping.gpus


@dataclass(frozen=True, slots=True)
class Composition:
    """A step made up to be measured.

    contexts   tokens each decoding sequence attends to, its new one included
    items      (new tokens, tokens cached before) of every prompt chunk
    """

    contexts: tuple[int, ...] = ()
    items: tuple[tuple[int, int], ...] = ()

    @property
    def tokens(self) -> int:
        """Rows of the step."""
        return len(self.contexts) + sum(new for new, _ in self.items)


@dataclass(frozen=True, slots=True)
class Pass:
    """One composed step as one rank ran it.

    laps       seconds by operator, all launches of the stage together
    forward_s  from the first operator to the sampled ids on the host
    total_s    the same with the preparation of its inputs
    """

    composition: Composition
    replica: int
    stage: int
    shard: int
    laps: Table[str, float]
    forward_s: float
    total_s: float


@dataclass(slots=True)
class Served:
    """What happened to requests on a real clock.

    log       times by request as the simulator notes them
    steps     columns EXECUTED_COLUMNS, those of a replica in the order they started
    answers   ids of every finished request's answer
    broken    why it ended before all requests were served; None if it did not
    """

    log: Log
    steps: pd.DataFrame
    answers: dict[int, list[int]] = field(default_factory=dict)
    broken: str | None = None
