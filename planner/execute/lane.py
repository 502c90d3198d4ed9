"""What runs next, and what became of it? The simulator's own scheduler, with real tokens behind its numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from planner.execute.batch import Batch, Span
from planner.execute.kvcache import BlockTables
from simulator.scheduler import Scheduler, SchedulerConfig

#: The ids of a request's prompt.
Prompt = Callable[[int], list[int]]


class Lane:
    """One scheduler and its sequences: `form` a batch, compute it elsewhere, `advance` with the sampled ids.

    prompt_ids   ids of a request's prompt; where ids do not matter, any as many
    answers      ids of every finished request's answer
    """

    def __init__(
        self,
        config: SchedulerConfig,
        kv_blocks: int,
        prompts: list[int],
        outputs: list[int],
        prompt_ids: Prompt,
        tables: BlockTables,
    ) -> None:
        self.scheduler = Scheduler(config, kv_blocks, prompts, outputs)
        self.tables = tables
        self.answers: dict[int, list[int]] = {}
        self._prompt_ids = prompt_ids
        self._ids: dict[int, list[int]] = {}
        self._decoding: dict[int, None] = {}  # in order of admission
        self._batch: tuple[list[int], list[int]] = ([], [])  # requests of the decodes and of the chunks

    def offer(self, request: int) -> bool:
        """Queue a request; False if it could never run."""
        if not self.scheduler.offer(request):
            return False
        self._ids[request] = self._prompt_ids(request)
        return True

    def form(self) -> Batch | None:
        """The next step, its blocks taken; None if there is nothing to do."""
        scheduler, tables, ids = self.scheduler, self.tables, self._ids
        works = scheduler.form()
        for request in scheduler.preempted:
            self._decoding.pop(request, None)
            tables.drop(request)
        if not works:
            return None
        decoding = list(self._decoding) if scheduler.decode_runs else []
        chunked = [request for request, _, _ in scheduler.chunks]
        self._batch = decoding, chunked
        return Batch(
            [Span(ids[r][-1:], len(ids[r]) - 1, tables.grow(r, len(ids[r]))) for r in decoding],
            [
                Span(ids[r][before : before + new], before, tables.grow(r, len(ids[r])))
                for r, new, before in scheduler.chunks
            ],
            tables.block_tokens,
        )

    def advance(self, sampled: Sequence[int]) -> list[int]:
        """Take the formed step, at whose spans' ends these ids were sampled; the requests that finished."""
        scheduler, ids = self.scheduler, self._ids
        decoding, chunked = self._batch
        longest = scheduler.config.max_context_tokens
        for request, token in zip(decoding, sampled, strict=False):
            # The padding of a static batch goes on too, as far as its blocks reach.
            if request not in self.answers or len(ids[request]) < longest:
                ids[request].append(token)
        prefills = bool(scheduler.chunks)
        finished = scheduler.advance(1)
        if prefills:
            completed = set(scheduler.prefilled)
            for request, token in zip(chunked, sampled[len(decoding) :], strict=True):
                if request in completed:
                    ids[request].append(token)
                    self._decoding[request] = None
        for request in finished:
            self.answers[request] = ids[request][scheduler.prompts[request] :]
        static = scheduler.config.policy == "static"
        over = finished if not static else list(self._decoding) if not scheduler.running else []
        for request in over:
            self._decoding.pop(request, None)
            self.tables.drop(request)
            del ids[request]
        return finished
