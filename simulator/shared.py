"""One model replica whose prefill and decode run at once, on shares of the compute units and over one KV pool.

Two streams of steps. A step's speed is constant until the other stream starts, ends or changes a step, or the shares
change; then what is left of it goes on at its new speed. Prompts that are done join the decodes at their next step,
without their KV moving. While nothing changes, decode steps are taken together, as in simulator.replica.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf

from hwmodels.shares import SharedSteps, crowding
from hwmodels.step_model import Item
from simulator.deployment import ReplicaSpec
from simulator.errors import SchedulerError
from simulator.log import Log
from simulator.replica import steps_until
from simulator.scheduler import Chunk, Scheduler, SchedulerConfig
from simulator.shares import Controller, Policy, State

#: Lanes of the step log.
PREFILL, DECODE = 0, 1
#: Events taken in one go when nobody else can be affected by them.
STRIDE = 256


class SharedScheduler(Scheduler):
    """A scheduler whose prompts are in flight while its decodes run.

    ageing   None: first come, first served; else the shortest prompt first, one that has waited for t seconds counting
             as `ageing` * t tokens shorter (Nexus, arXiv:2507.06608v2, Algorithm 2, with 15)
    flight   chunks of the prefill step under way; flight_items: the same without the requests
    """

    __slots__ = ("ageing", "flight", "flight_items")

    def __init__(
        self, config: SchedulerConfig, kv_blocks: int, prompts: list[int], outputs: list[int], ageing: float | None
    ) -> None:
        if ageing is not None:
            config = replace(config, order="shortest", ageing_tokens_per_s=ageing)
        super().__init__(config, kv_blocks, prompts, outputs)
        self.ageing = ageing
        self.flight: list[Chunk] = []
        self.flight_items: list[Item] = []

    def form_prefill(self) -> bool:
        """Decide the next prefill step: prompts in their order, up to the token budget; sets `flight`.

        One prompt at a time is computed in parts. It goes first unless shorter ones go before it.
        """
        if self.loaded:
            self._loaded_first()
        left, room = self.config.token_budget, self.config.max_seqs - self.running
        chunks: list[Chunk] = []
        partial = self.partial
        if partial >= 0:
            room -= 1
            rest = self._prompt(partial) - self.partial_done
            if self.ageing is None:
                chunks.append((partial, min(rest, left), self.partial_done))
                left -= rest
            else:
                before = self.rank[partial][1] - self.partial_done
                self._admit_prompts(chunks, left, room, whole=True, before=before)
                left -= sum(new for _, new, _ in chunks)
                if left > 0:
                    chunks.append((partial, min(rest, left), self.partial_done))
                    left -= rest
            if chunks and chunks[-1][0] == partial:
                self.partial = -1  # a prompt in flight is not preempted
            room = self.config.max_seqs - self.running - len(chunks)
        if left > 0:
            self._admit_prompts(chunks, left, room)
        elif left < 0 or self.waiting:
            self.limited.add("tokens")
        self.flight = chunks
        self.flight_items = [(new, before) for _, new, before in chunks]
        return bool(chunks)

    def _admit_prompts(
        self, chunks: list[Chunk], left: int, room: int, *, whole: bool = False, before: float = inf
    ) -> None:
        """Add prompts from the head of the queue, `room` at most, the last one cut to the tokens that are left.

        whole    whether to stop rather than to cut one
        before   rank at which to stop
        """
        waiting, rank = self.waiting, self.rank
        while waiting:
            head = waiting[0]
            target = self._prompt(head)
            if left <= 0 or (whole and target > left):
                self.limited.add("tokens")
                return
            if room <= 0:
                self.limited.add("seqs")
                return
            if before < inf and rank[head][1] >= before:
                return
            if not self.admit_head(head, target):
                return
            if self.before < 0:
                continue
            rest = target - self.before
            if rest > left:
                self.limited.add("tokens")
            chunks.append((head, min(rest, left), self.before))
            left -= rest
            room -= 1

    def land_prefill(self, ahead: bool) -> list[int]:
        """Take the prefill step; the requests that finished with it.

        ahead   whether a decode step is under way: sequences that join take part in the one after it
        """
        runs = self.decode_runs
        self.chunks, self.items, self.decode_runs = self.flight, self.flight_items, False
        overtaken = self.partial
        self.steps += ahead
        finished = self.advance(1)
        self.steps -= ahead
        if overtaken >= 0:
            self.partial = overtaken
        self.decode_runs = runs
        self.flight, self.flight_items = [], []
        return finished

    def form_decode(self) -> int:
        """Form the next decode step; how many run before a completion or shortage, 0 if there is nothing to run."""
        if self.preempted:
            self.preempted = []
        self.settled = True
        self.grow_decodes()
        if not self.decode_runs:
            return 0
        return self.settled_steps() if self.settled else 1


class SharedReplica:
    """Two streams of steps on one device; the same interface as Replica, `end` being the next change of either.

    schedulers   the one scheduler of both streams
    """

    __slots__ = (
        "_apply_s", "_arrived", "_blocked", "_controller", "_d_context", "_d_end", "_d_first", "_d_left", "_d_mark",
        "_d_models", "_d_nominal", "_d_running", "_d_share", "_d_slope", "_d_start", "_d_steps", "_joining", "_next",
        "_p_blocks", "_p_end", "_p_left", "_p_mark", "_p_nominal", "_p_quote", "_p_share", "_p_start", "_p_whole",
        "_shares", "_stale", "_switch_s", "end", "index", "log", "now", "scheduler", "schedulers", "steps",
    )  # fmt: skip

    def __init__(self, steps: SharedSteps, scheduler: SharedScheduler, policy: Policy, log: Log, index: int) -> None:
        self.steps = steps
        self.scheduler = scheduler
        self.schedulers: Sequence[Scheduler] = (scheduler,)
        self.log = log
        self.index = index
        self.now = 0.0
        self.end = inf
        self._controller: Controller | None = policy.start()
        self._shares = self._next = policy.shares
        self._switch_s = policy.switch_s
        self._apply_s = inf  # when _next holds
        self._arrived: dict[int, float] = {}
        self._blocked = False  # whether the head of the queue waits for memory or a place
        self._stale = False  # whether speeds have to be found anew
        self._joining: list[int] = []  # requests that take part from the step after the one under way
        # The prefill step: the part of it that is left, how long all of it takes, since when.
        self._p_start = self._p_mark = self._p_left = self._p_whole = 0.0
        self._p_end = inf
        self._p_nominal = self._p_share = 0.0
        self._p_quote = (0.0, 0.0, 0.0)
        self._p_blocks = 0
        # The decode steps: as in Replica; of a lone one, the part that is left, since when.
        self._d_start = self._d_mark = self._d_left = self._d_first = self._d_slope = 0.0
        self._d_end = inf
        self._d_nominal = self._d_share = 0.0
        self._d_models = steps.at(1.0)
        self._d_steps = self._d_running = self._d_context = 0

    def enqueue(self, request: int, at_s: float) -> None:
        """A request arrives: its prefill can start at once if none is under way, whatever decode does."""
        log, scheduler = self.log, self.scheduler
        log.replica[request] = self.index
        if not scheduler.offer(request, at_s):
            log.rejected.append(request)
            return
        log.lane[request] = DECODE
        if self._controller is not None:
            self._arrived[request] = at_s
        if self.end == inf:
            self.now = max(self.now, at_s)
        elif self._p_end == inf:
            if scheduler.ageing is not None:
                self._blocked = False  # a shorter prompt may fit
            if not self._blocked and at_s < self.end:
                self.end = max(at_s, self.now)

    def load_ended(self, request: int, lane: int, at_s: float) -> None:
        """The KV that an admitted request waited for has been loaded."""
        self.schedulers[lane].load_ended(request)
        self.disturb(lane, at_s)

    def disturb(self, lane: int, at_s: float) -> None:
        """A prompt that was waited for can be computed: a prefill step begins unless one is under way."""
        self._blocked = False
        if self.end == inf:
            self.now = max(self.now, at_s)
        elif self._p_end == inf and at_s < self.end:
            self.end = max(at_s, self.now)

    def coast(self, until_s: float) -> None:
        """Take the changes of either stream that come before `until_s`, some of them."""
        for _ in range(STRIDE):
            if self.plan(until_s) >= until_s:
                return
            self.commit()

    def plan(self, horizon_s: float) -> float:
        """Let every idle stream that can begin a step now; when the next change comes, inf if nothing runs."""
        scheduler, now = self.scheduler, self.now
        begun = 0
        if self._d_end == inf and scheduler.running:
            begun = self._form_decode()
        prefills = False
        if self._p_end == inf and not self._blocked and (scheduler.waiting or scheduler.partial >= 0):
            if self._d_end < inf and not begun:
                self._cut(now)
            prefills = scheduler.form_prefill()
            self._blocked = not prefills and bool(scheduler.waiting)
            if begun > 1 and scheduler.reserved > scheduler.kv_blocks:
                begun = self._d_steps = scheduler.settled_steps()  # the prompts have taken blocks
        if prefills or begun:
            if self._controller is not None:
                self._control(now)
            if prefills:
                self._begin_prefill(now)
            self._stale = True
        if self._stale:
            self._reprice(now, begun)
        end = self.end = self._p_end if self._p_end < self._d_end else self._d_end
        return end

    def commit(self) -> Sequence[int]:
        """Take the steps that end now; the requests that finished."""
        now = self.now = self.end
        self.log.events += 1
        finished: list[int] = []
        if self._d_end <= now:
            finished = self._end_decode(now)
        if self._p_end <= now:
            if self._d_end < inf:
                self._cut(now)
            finished = finished + self._end_prefill(now)
        return finished

    def halt(self, at_s: float) -> Sequence[int]:
        """Stop for good, after the decode steps that have ended by now; the requests left without a replica."""
        scheduler, log = self.scheduler, self.log
        if self._d_end < inf:
            self._cut(at_s)
        scheduler.waiting.extend(request for request, _, _ in scheduler.flight)
        scheduler.flight, scheduler.flight_items = [], []
        self.end = self._p_end = self._d_end = inf
        log.lost_kv_blocks += scheduler.blocks_held()
        forgotten = scheduler.evict()
        log.preempted(scheduler, self.index, DECODE)
        return forgotten

    def _form_decode(self) -> int:
        """Let the decodes form a step; the steps until the batch changes by itself."""
        scheduler = self.scheduler
        steps = scheduler.form_decode()
        if scheduler.preempted:
            self.log.preempted(scheduler, self.index, DECODE)
            self._blocked = False
        if steps:
            running = self._d_running = scheduler.running
            self._d_context = scheduler.context_offset + running * (scheduler.steps + 1)
            self._d_steps = steps
            self._d_nominal = self._shares.decode
        return steps

    def _begin_prefill(self, now: float) -> None:
        scheduler, log = self.scheduler, self.log
        self._p_start = self._p_mark = now
        self._p_left = self._p_whole = 1.0
        self._p_end = now
        self._p_share = 0.0
        self._p_nominal = self._shares.prefill
        first_schedule_s = log.first_schedule_s
        for request, _, _ in scheduler.flight:
            if first_schedule_s[request] != first_schedule_s[request]:
                first_schedule_s[request] = now
        if log.segments is not None:
            block = scheduler.config.block_tokens
            self._p_blocks = sum(-(-scheduler._prompt(request) // block) for request, _, _ in scheduler.flight)

    def _control(self, now: float) -> None:
        """Ask for the shares of the steps that begin now."""
        scheduler = self.scheduler
        assert self._controller is not None
        decodes = self._d_steps > 0
        state = State(
            now,
            self.steps,
            scheduler.flight_items,
            self._d_running if decodes else 0,
            self._d_context if decodes else 0,
            scheduler.blocks_held() / scheduler.kv_blocks,
        )
        wanted = self._controller.decide(state)
        if wanted != self._next:
            self._next, self._apply_s = wanted, now + self._switch_s
        if now >= self._apply_s:
            self._shares, self._apply_s = self._next, inf
            self._d_nominal = self._shares.decode if self._d_end == inf else self._d_nominal

    def _effective(self, prefills: bool, decodes: bool) -> tuple[float, float]:
        """What the streams have of the units, by the shares at the start of their steps."""
        x, y = self._p_nominal, self._d_nominal
        if prefills and decodes:
            total = x + y
            return (x / total, y / total) if total > 1.0 else (x, y)
        return (1.0, 1.0) if self._shares.lend else (x, y)

    def _reprice(self, now: float, begun: int) -> None:
        """Find the speeds of both streams from now on.

        begun   decode steps that begin now; 0 where one is under way, or none
        """
        self._stale = False
        steps, decodes, prefills = self.steps, self._d_steps > 0, self._p_end < inf
        x, y = self._effective(prefills, decodes)
        slower = first = slope = 0.0
        if prefills:
            self._p_left -= (now - self._p_mark) / self._p_whole
            self._p_mark = now
            if x != self._p_share:
                self._p_share = x
                self._p_quote = steps.prefill(x, self.scheduler.flight_items)
        if decodes:
            running, context = self._d_running, self._d_context
            if y != self._d_share:
                self._d_share, self._d_models = y, steps.at(y)
            full, half = self._d_models
            first, slope, limit = full.decode_run(running, context)
            if prefills:
                slow_first, slow_slope, slow_limit = half.decode_run(running, context)
                moved = steps.traffic.decode_run(running, context)[0]
                other = first, slow_first - first, moved
                slower, u = crowding(self._p_quote, other, steps.ceiling_bytes_per_s)
                first += u * (slow_first - first)
                slope += u * (slow_slope - slope)
                limit = min(limit, slow_limit)
            self._d_first, self._d_slope = first, slope
            if begun:
                count = self._d_steps = int(min(begun, limit))
                self._d_start = self._d_mark = now
                self._d_left = 1.0
                self._d_end = now + count * (first + slope * (count - 1) / 2)
            else:
                self._d_end = now + self._d_left * first
        if prefills:
            alone, memory, _ = self._p_quote
            whole = self._p_whole = alone + memory * slower
            self._p_end = now + max(0.0, self._p_left) * whole

    def _cut(self, now: float) -> None:
        """Take the decode steps that have ended by now; what is left of the one under way can change its speed."""
        steps = self._d_steps
        if steps > 1:
            first, slope = self._d_first, self._d_slope
            passed = now - self._d_start
            done = steps_until(first, slope, passed, steps) - 1
            if done:
                end = self._d_start + done * (first + slope * (done - 1) / 2)
                self._record_decode(end, done, slope)
                self.scheduler.advance(done)
                if self._controller is not None:
                    self._controller.stepped(0.0, done)
                self._d_start = end
                self._d_context += self._d_running * done
                self._d_first = first = first + slope * done
            self._d_steps = 1
            self._d_left = max(0.0, 1.0 - (now - self._d_start) / first)
            self._d_end = now + self._d_left * first
        else:
            self._d_left = max(0.0, self._d_left - (now - self._d_mark) / self._d_first)
        self._d_mark = now
        self._stale = True

    def _end_decode(self, now: float) -> list[int]:
        scheduler, log, steps = self.scheduler, self.log, self._d_steps
        self._record_decode(now, steps, self._d_slope if steps > 1 else 0.0)
        finished = scheduler.advance(steps)
        scheduler.decode_runs = False
        self._d_steps, self._d_end = 0, inf
        self._stale = True
        if finished:
            self._blocked = False
            finish_s = log.finish_s
            for request in finished:
                finish_s[request] = now
        if self._joining:
            scheduler.joined = self._joining
            log.joined(scheduler, now)
            self._joining = []
        controller = self._controller
        if controller is not None:
            controller.stepped(0.0, steps)
            for request in finished:
                gaps = scheduler.outputs[request] - 1
                controller.finished((now - log.first_token_s[request]) / gaps)
        return finished

    def _end_prefill(self, now: float) -> list[int]:
        scheduler, log = self.scheduler, self.log
        ahead = self._d_end < inf
        if log.segments is not None:
            flight = scheduler.flight
            scheduler.chunks = flight
            log.record(self.index, PREFILL, self._p_start, now, 1, 0.0, 0, 0, scheduler)
            log.segments[-1] = min(log.segments[-1], self._p_blocks)
            self._p_blocks = 0
        finished = scheduler.land_prefill(ahead)
        log.prefilled(scheduler, now)
        for request in finished:
            log.finish_s[request] = now
        if ahead and log.segments is not None:
            self._joining += [request for request in scheduler.prefilled if request not in finished]
        controller = self._controller
        if controller is not None:
            controller.stepped((now - self._p_start) * self._p_share, 1)
            for request in scheduler.prefilled:
                if log.first_token_s[request] == now:
                    controller.first_token(now - self._arrived.pop(request))
        self._p_end = inf
        self._blocked = False
        self._stale = True
        return finished

    def _record_decode(self, end_s: float, steps: int, slope_s: float) -> None:
        log = self.log
        if log.segments is None:
            return
        scheduler = self.scheduler
        log.record(
            self.index, DECODE, self._d_start, end_s, steps, slope_s, self._d_running, self._d_context, scheduler
        )
        log.segments[-1] = max(0.0, log.segments[-1] - self._p_blocks)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class SharedSpec(ReplicaSpec):
    """A replica whose prefill and decode share the device; `model` prices steps on all of it.

    steps    step models at any share
    policy   who gets which share: Static, SemiPD or Nexus of simulator.shares
    ageing   see SharedScheduler
    """

    steps: SharedSteps
    policy: Policy
    ageing: float | None = None

    def start(self, prompts: list[int], outputs: list[int], log: Log, index: int) -> SharedReplica:  # type: ignore[override]
        """A fresh replica that serves requests from the given lists and writes to `log`."""
        if self.scheduler.policy != "chunked":
            raise SchedulerError(
                f"policy={self.scheduler.policy!r}: phases that share a device are not batched together; use 'chunked'"
            )
        if self.role != "aggregated":
            raise SchedulerError(
                f"role={self.role!r}: a device that both phases share serves whole requests; leave it out"
            )
        scheduler = SharedScheduler(self.scheduler, self.kv_blocks, prompts, outputs, self.ageing)
        return SharedReplica(self.steps, scheduler, self.policy, log, index)
