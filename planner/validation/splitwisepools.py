"""Which machines does Splitwise's cluster scheduler choose for a request, and when does one change its pool?

The rules are those of the published simulator (arXiv:2311.18677, section IV-A), on the simulator's own pools. A request
gets both machines when it arrives: for its prompt the one with the fewest pending prompt tokens, for its tokens the
one with the least KV. Where even the shortest queue would exceed LONGEST_QUEUE a machine of the mixed pool takes the
prompt, else a token machine joins the mixed pool; the same where no token machine has memory. A mixed machine that has
run empty returns to its own pool. Without pools, and where none is left, the machine with the fewest pending tokens
serves the whole request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np
import simpy

from planner.validation.splitwisemachines import WholePrompts
from simulator.deployment import Deployment
from simulator.log import Log
from simulator.pools import Pools
from simulator.simulate import Overrun
from simulator.workload import Requests, Workload

#: Pending prompt tokens of a machine, as configured in the published simulator.
LONGEST_QUEUE = 8192


def serve(deployment: Deployment, requests: Requests, stop: Callable[[Log], bool] = lambda log: False) -> Log:
    """Serve the requests; the replicas' schedulers must be WholePrompts.

    stop   asked now and then whether the rest is pointless; the log then ends there
    """
    log = Log(len(requests), record=False)
    log.arrival_s = requests.arrival_s
    prompts, outputs = requests.prompt_tokens.tolist(), requests.output_tokens.tolist()
    replicas = [spec.start(prompts, list(outputs), log, index) for index, spec in enumerate(deployment.replicas)]
    env = simpy.Environment()

    def look(events: int) -> None:
        if stop(log):
            raise Overrun(log)

    arrival_s = requests.arrival_s.tolist()
    pools = SplitwisePools(
        env, deployment, replicas, Workload(requests), arrival_s, np.random.default_rng(0), log, look
    )
    pools.start()
    with suppress(Overrun):
        env.run()
    log.extremes(scheduler for replica in replicas for scheduler in replica.schedulers)
    return log


class SplitwisePools(Pools):
    """Pools with Splitwise's choice of machines."""

    def _places(self, request: int) -> tuple[int, int] | None:
        prompt = self.prompts[request]
        if self.roles[0] == "aggregated":
            index = self._shortest(range(len(self.replicas)))
            return index, index
        self._return_empty()
        first, second = self._prompt_machine(prompt), self._token_machine(prompt)
        if first is None and (others := self._of("decode")):
            first = self._shortest(others)
            self.roles[first] = "mixed"
        if second is None and (others := self._of("prefill")):
            second = self._emptiest(others)
            self.roles[second] = "mixed"
        if first is None or second is None:
            first = second = self._shortest(range(len(self.replicas)))
        return first, second

    def _return_empty(self) -> None:
        """Machines of the mixed pool that have nothing to do go home."""
        if "mixed" in self.roles:
            for index in self._of("mixed"):
                if not self.loads[index].outstanding_tokens:
                    self.roles[index] = self.deployment.replicas[index].role

    def _scheduler(self, index: int) -> WholePrompts:
        scheduler = self.replicas[index].schedulers[0]
        assert isinstance(scheduler, WholePrompts)
        return scheduler

    def _shortest(self, candidates: Sequence[int]) -> int:
        """The machine with the fewest prompt tokens not computed yet, and decoding sequences, a token each."""
        replicas = self.replicas
        queues = []
        for index in candidates:
            scheduler = replicas[index].schedulers[0]
            queues.append(scheduler.pending_tokens + scheduler.running)  # type: ignore[attr-defined]
        return candidates[queues.index(min(queues))]

    def _emptiest(self, candidates: Sequence[int]) -> int:
        """The machine with the fewest tokens of prompts that are or will be in its memory."""
        loads = self.loads
        tokens = [loads[index].outstanding_tokens for index in candidates]
        return candidates[tokens.index(min(tokens))]

    def _prompt_machine(self, prompt: int) -> int | None:
        """Of the prompt pool or else of the mixed pool; None where the queues are too long."""
        for role in ("prefill", "mixed"):
            pool = self._of(role)
            if pool:
                best = self._shortest(pool)
                pending = self._scheduler(best).pending_tokens
                if not pending or pending + prompt <= LONGEST_QUEUE:
                    return best
        return None

    def _token_machine(self, prompt: int) -> int | None:
        """Of the token pool or else of the mixed pool; None where no memory is left."""
        for role in ("decode", "mixed"):
            pool = self._of(role)
            if pool:
                best = self._emptiest(pool)
                scheduler = self._scheduler(best)
                tokens = self.loads[best].outstanding_tokens + prompt
                if tokens < scheduler.kv_blocks * scheduler.config.block_tokens:
                    return best
        return None
