"""What a simulation returns: one flat frame of requests, the log of what ran, and the totals of the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from simulator.encode import EncodeUse
from simulator.reuse import CacheUse

Floats = NDArray[np.float64]

#: Columns of the step log; one row is `steps` consecutive steps of one lane with the same set of sequences.
#:
#: replica, lane            where it ran (a lane is one scheduler: a pipeline slot or an attention-DP rank)
#: start_s, end_s           from the first step's start to the last step's end
#: steps, slope_s           step j of the row lasts first + j slope, first = (end - start)/steps - slope (steps - 1)/2
#: decode_sequences         sequences that emit one token at the end of every step; 0 in a prefill-only step
#: decode_context_tokens    tokens attended by all of them together in the first step
#: prefill_tokens, prefill_pairs, prefill_sequences   prompt tokens, query-key pairs and prompts; 0 unless steps == 1
#: waiting, kv_blocks       requests in the lane's queue, and KV blocks it holds
STEP_COLUMNS = (
    "replica",
    "lane",
    "start_s",
    "end_s",
    "steps",
    "slope_s",
    "decode_sequences",
    "decode_context_tokens",
    "prefill_tokens",
    "prefill_pairs",
    "prefill_sequences",
    "waiting",
    "kv_blocks",
)

#: One row per request whose KV went to another replica: its bytes, when its prompt had been computed, when blocks were
#: set aside for it at the target, and when all of it had come.
TRANSFER_COLUMNS = ("request", "source", "target", "nbytes", "ready_s", "reserved_s", "landed_s")

_STEP_FLOATS = frozenset({"start_s", "end_s", "slope_s"})


@dataclass(frozen=True, slots=True)
class RunTotals:
    """Sums over a whole run.

    gpus, replicas       devices that hold replicas, and model copies on them
    makespan_s           last finish - first arrival
    model_flops          arithmetic the model asked for, recomputation after a preemption included
    hbm_bytes            device memory traffic
    energy_j             of the devices that hold replicas, their idle time included
    price_usd_per_h      of the same devices; None when not known
    peak_flops_per_s, memory_bytes_per_s   of the devices that hold replicas together, in the formats used
    lanes, kv_blocks     schedulers of each replica, and the KV pool of each of these
    seed, events         what the run was drawn from, and scheduling decisions taken
    requeued, lost_kv_blocks   requests that started anew because their replica failed, and KV blocks lost with them
    role_switches        replicas that went from prefill to decode or back
    roles                what each replica did when the run began, see simulator.deployment.Role; () where not known
    """

    gpus: int
    replicas: int
    makespan_s: float
    model_flops: float
    hbm_bytes: float
    energy_j: float
    price_usd_per_h: float | None
    peak_flops_per_s: float
    memory_bytes_per_s: float
    lanes: tuple[int, ...]
    kv_blocks: tuple[int, ...]
    seed: int
    events: int
    requeued: int = 0
    lost_kv_blocks: int = 0
    role_switches: int = 0
    roles: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Result:
    """One run.

    requests   one row per request, see `request_frame`
    steps      the step log, columns STEP_COLUMNS; None when it was not recorded
    spans      request, replica, lane, first_token_s, tokens, joined_s: a stretch of tokens emitted without
               interruption, for every request that was interrupted (by a preemption) or whose prompt another replica
               computed; the tokens after the first come from the decode steps that start at joined_s or later. Other
               requests have one implicit span from first_token_s on. None when nothing was recorded
    totals     sums over the run
    transfers  KV that went from replica to replica, columns TRANSFER_COLUMNS; empty where replicas share no requests
    links      name, bytes_per_s and carried_bytes of every link between replicas
    encode     what encoding took; None where requests had no images
    caching    what keeping KV for prompts that begin alike saved; None where it was off or nothing known of prompts
    """

    requests: pd.DataFrame
    steps: pd.DataFrame | None
    spans: pd.DataFrame | None
    totals: RunTotals
    transfers: pd.DataFrame = field(default_factory=lambda: transfer_frame([]))
    links: pd.DataFrame = field(default_factory=lambda: link_frame([], [], []))
    encode: EncodeUse | None = None
    caching: CacheUse | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the SLO classes, also of those without a request."""
        return tuple(str(name) for name in self.requests["slo_class"].cat.categories)


def latencies(
    arrival_s: ArrayLike, first_token_s: ArrayLike, finish_s: ArrayLike, output_tokens: ArrayLike
) -> tuple[Floats, Floats, Floats]:
    """TTFT, TPOT and E2E of each request, in seconds; NaN where something never happened.

    TPOT is the mean gap after the first token, (finish - first token) / (output - 1), NaN for one-token answers.

    >>> ttft, tpot, e2e = latencies([1.0], [3.0], [7.0], [5])
    >>> float(ttft[0]), float(tpot[0]), float(e2e[0])
    (2.0, 1.0, 6.0)
    """
    arrival, first, finish = (np.asarray(values, dtype=float) for values in (arrival_s, first_token_s, finish_s))
    gaps = np.asarray(output_tokens, dtype=float) - 1.0
    tpot = np.full(finish.shape, np.nan)
    np.divide(finish - first, gaps, out=tpot, where=gaps > 0)
    return first - arrival, tpot, finish - arrival


def request_frame(
    *,
    arrival_s: ArrayLike,
    first_schedule_s: ArrayLike,
    first_token_s: ArrayLike,
    finish_s: ArrayLike,
    prompt_tokens: ArrayLike,
    output_tokens: ArrayLike,
    rejected: ArrayLike,
    replica: ArrayLike = 0,
    lane: ArrayLike = 0,
    preemptions: ArrayLike = 0,
    cached_tokens: ArrayLike = 0,
    class_codes: ArrayLike = 0,
    class_names: Sequence[str] = ("default",),
) -> pd.DataFrame:
    """One row per request, in the order given; times in seconds, NaN where something never happened.

    rejected      true for requests that can never fit: counted, never scheduled
    cached_tokens prompt tokens that were found cached and not computed
    class_codes   position of each request's SLO class in class_names

    Adds `request` (the position), `slo_class`, and the latencies `ttft_s`, `tpot_s`, `e2e_s` and `queue_s` (arrival to
    first schedule).
    """
    arrival = np.asarray(arrival_s, dtype=float)
    schedule = np.asarray(first_schedule_s, dtype=float)
    first = np.asarray(first_token_s, dtype=float)
    finish = np.asarray(finish_s, dtype=float)
    ttft, tpot, e2e = latencies(arrival, first, finish, output_tokens)

    def ints(values: ArrayLike) -> NDArray[np.int32]:
        return np.broadcast_to(np.asarray(values, dtype=np.int32), arrival.shape)

    return pd.DataFrame(
        {
            "request": np.arange(len(arrival), dtype=np.int64),
            "slo_class": pd.Categorical.from_codes(ints(class_codes), categories=pd.Index(class_names)),
            "replica": ints(replica),
            "lane": ints(lane),
            "arrival_s": arrival,
            "first_schedule_s": schedule,
            "first_token_s": first,
            "finish_s": finish,
            "prompt_tokens": ints(prompt_tokens),
            "output_tokens": ints(output_tokens),
            "preemptions": ints(preemptions),
            "cached_tokens": ints(cached_tokens),
            "rejected": np.broadcast_to(np.asarray(rejected, dtype=bool), arrival.shape),
            "ttft_s": ttft,
            "tpot_s": tpot,
            "e2e_s": e2e,
            "queue_s": schedule - arrival,
        }
    )


def step_frame(values: ArrayLike) -> pd.DataFrame:
    """The step log from rows of STEP_COLUMNS, flat (`array('d')`) or as a table."""
    table = np.asarray(values, dtype=float).reshape(-1, len(STEP_COLUMNS))
    return pd.DataFrame(
        {
            name: table[:, position].copy() if name in _STEP_FLOATS else table[:, position].astype(np.int64)
            for position, name in enumerate(STEP_COLUMNS)
        }
    )


def span_frame(rows: Sequence[tuple[int, int, int, float, int, float]]) -> pd.DataFrame:
    """The spans from rows (request, replica, lane, first_token_s, tokens, joined_s)."""
    columns = list(zip(*rows, strict=True)) if rows else [()] * 6
    return pd.DataFrame(
        {
            "request": np.array(columns[0], dtype=np.int64),
            "replica": np.array(columns[1], dtype=np.int32),
            "lane": np.array(columns[2], dtype=np.int32),
            "first_token_s": np.array(columns[3], dtype=float),
            "tokens": np.array(columns[4], dtype=np.int64),
            "joined_s": np.array(columns[5], dtype=float),
        }
    )


def transfer_frame(rows: Sequence[tuple[int, int, int, float, float, float, float]]) -> pd.DataFrame:
    """The transfers from rows of TRANSFER_COLUMNS."""
    frame = pd.DataFrame(list(rows), columns=list(TRANSFER_COLUMNS))
    kinds = ("int64", "int32", "int32", "float64", "float64", "float64", "float64")
    return frame.astype(dict(zip(TRANSFER_COLUMNS, kinds, strict=True)))


def link_frame(names: Sequence[str], bytes_per_s: ArrayLike, carried_bytes: ArrayLike) -> pd.DataFrame:
    """The links, see Result."""
    return pd.DataFrame(
        {
            "name": pd.Series(list(names), dtype=object),
            "bytes_per_s": np.asarray(bytes_per_s, dtype=float),
            "carried_bytes": np.asarray(carried_bytes, dtype=float),
        }
    )
