"""Pools of replicas with roles on one clock: prompts here, answers there, and KV under way on links that many share.

A request gets a replica for its prompt and one for its answer when it arrives, as in Splitwise (arXiv:2311.18677). Its
KV is sent only when the second has set blocks aside for it, and stays with the first until it has come.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from math import inf, nan
from typing import cast

import numpy as np
import simpy
from simpy.events import NORMAL, URGENT

from simulator.deployment import ROLES, AnyReplica, Deployment, Role
from simulator.errors import PoolError
from simulator.flows import Flows
from simulator.handover import Transfer, Way
from simulator.log import Log
from simulator.roleswitch import MONITOR_S, RoleSwitch
from simulator.routers import Shares
from simulator.scheduler import Chunk, Scheduler
from simulator.together import Load, Look, Together
from simulator.workload import Workload


class Pools(Together):
    """Replicas with roles, see Deployment."""

    def __init__(
        self,
        env: simpy.Environment,
        deployment: Deployment,
        replicas: Sequence[AnyReplica],
        workload: Workload,
        arrival_s: list[float],
        rng: np.random.Generator,
        log: Log,
        look: Look,
    ) -> None:
        loads = [Load() for _ in replicas]
        super().__init__(
            env,
            replicas,
            loads,
            lambda: 0,
            workload,
            arrival_s,
            deployment.frontend_s,
            log,
            look,
            deployment=deployment,
        )
        handover = deployment.handover
        self.deployment = deployment
        if handover is not None:
            self.handover = handover
        self.rng = rng
        self.shares: Shares = np.array([spec.share for spec in deployment.replicas], dtype=float)
        self.outputs = workload.requests.output_tokens.tolist()
        self.roles: list[Role | None] = [spec.role for spec in deployment.replicas]  # None: takes nothing new
        self.flows = Flows(handover.bytes_per_s if handover is not None else ())
        self.due_s = inf  # when the flows are looked at next
        self.carried: dict[int, int] = {}  # the request of every flow
        self.transfers: dict[int, Transfer] = {}  # of every request between its arrival and its landing
        self.queues: list[deque[int]] = [deque() for _ in replicas]  # computed, without room at the target
        self.emitted: dict[int, int] = {}  # tokens of requests whose replica was removed
        self.turns: dict[tuple[int, ...], Iterator[int]] = {}
        self.pairs = self.singles = 0.0
        self.entered = 0
        if handover is not None and handover.mode == "layer-wise":
            log.watch = self._computing
        self.lobby: list[int] = []  # requests that wait for a replica to take up a role that nobody has
        self.changing = 0  # replicas on their way from one role to the other
        self.draining: dict[int, Role] = {}  # replicas that finish what they have, and what they will be
        self.switching = RoleSwitch()
        if deployment.switch_s is not None:
            self._at(self.arrival_s[0] + MONITOR_S, NORMAL, partial(self._watch_queues, self.arrival_s[0] + MONITOR_S))
        for removal in deployment.removals:
            self._at(removal.at_s, URGENT, partial(self._remove, removal.replica, removal.at_s))

    # Routing

    def _pick(self, candidates: Sequence[int]) -> int:
        """One of the replicas, by the deployment's router."""
        if len(candidates) == 1:
            return candidates[0]
        router = self.deployment.router
        shares = self.shares[list(candidates)]
        if router.choose is not None:
            return candidates[router.choose([self.loads[i] for i in candidates], shares, self.rng)]
        assert router.assign is not None
        key = tuple(candidates)
        turn = self.turns.get(key)
        position = next(turn, None) if turn is not None else None
        if position is None:
            turn = self.turns[key] = iter(router.assign(len(self.outputs), shares, self.rng).tolist())
            position = next(turn)
        return candidates[position]

    def _of(self, *roles: Role) -> list[int]:
        return [index for index, role in enumerate(self.roles) if role in roles]

    def _places(self, request: int) -> tuple[int, int] | None:
        """Where the prompt is computed and where the answer, None if nobody is left."""
        alone, before, after, both = (self._of(role) for role in ROLES)
        pair = bool((before or both) and (after or both))
        if alone and pair:
            # Turns between the two ways of serving, each as often as the shares of its entrances say.
            share = float(self.shares[alone].sum() / self.shares[alone + (before or both)].sum())
            pair = (self.singles + 1) * (1 - share) > (self.pairs + 1) * share
            self.singles, self.pairs = self.singles + (not pair), self.pairs + pair
        if not pair:
            alone = alone or both
            if not alone:
                return None
            index = self._pick(alone)
            return index, index
        source = self._pick(before or both)
        overflow = self.deployment.overflow_tokens
        if both and before and self.loads[source].outstanding_tokens >= overflow:
            source = self._pick(both)
        if source in both and not after:
            return source, source
        target = self._pick(after or both)
        if both and source not in both and not self._has_room(target, request):
            target = self._pick(both)
        return source, target

    def _has_room(self, index: int, request: int) -> bool:
        """Whether a replica could take the request's KV now."""
        if self.queues[index]:
            return False
        schedulers = self.replicas[index].schedulers
        return any(s.free * s.config.block_tokens >= self.prompts[request] for s in schedulers)

    def _arrive(self, now_s: float) -> None:
        request = next(self.coming, None)
        if request is None:
            return
        self.entered += 1
        self.arrival_s[request] = now_s
        accepted = self._enter(request, now_s)
        if self.closed:
            if not accepted:
                self._arrives(now_s + self.pause_s)
        elif request + 1 < len(self.arrival_s):
            self._arrives(self.arrival_s[request + 1])

    def _enter(self, request: int, now_s: float) -> bool:
        """Send a request to its replicas; False if none can serve it."""
        self._see(request)
        places = self._places(request)
        if places is None and self._may_change():
            self.lobby.append(request)
            return True
        if places is None:
            self.log.rejected.append(request)
            return False
        source, target = places
        emitted = self.emitted.get(request, 0)
        split = source != target and self.outputs[request] > emitted + 1
        for index in places:
            scheduler = self.replicas[index].schedulers[0]
            scheduler.outputs[request] = self.outputs[request]
            if emitted:
                for lane in self.replicas[index].schedulers:
                    lane.generated[request] = emitted
        if split:
            if not self.replicas[target].schedulers[0].fits(request):
                self.log.replica[request] = target
                self.log.rejected.append(request)
                return False
            self.replicas[source].schedulers[0].outputs[request] = emitted + 1
        replica = self.replicas[source]
        before = replica.end
        rejected = len(self.log.rejected)
        replica.enqueue(request, now_s)
        if len(self.log.rejected) > rejected:
            return False
        self.loads[source].outstanding_tokens += self.prompts[request]
        if split:
            self.transfers[request] = Transfer(source, target, self.log.lane[request])
            self.loads[target].outstanding_tokens += self.prompts[request]
        self._stirred(source, before, now_s)
        return True

    # Prompts

    def _computing(self, index: int, lane: int, chunks: Sequence[Chunk], start_s: float, end_s: float) -> None:
        """A step computes prompts: what it will have computed is sent meanwhile, at most as fast as it comes."""
        for request, new, before in chunks:
            transfer = self.transfers.get(request)
            if transfer is None or transfer.done or transfer.source != index:
                continue
            whole = self.prompts[request] + self.emitted.get(request, 0)
            if whole < self.handover.overlap_tokens or before + new <= transfer.covered_tokens:
                continue
            if transfer.lane is None and not self.queues[transfer.target]:
                self._reserve(request, transfer, start_s)
            cached = max(0, before - transfer.covered_tokens)  # found, not computed: all its layers are there already
            fresh = before + new - transfer.covered_tokens - cached
            transfer.covered_tokens = before + new
            # The last layer of the last step is there when the step ends, and goes as if it were tokens of its own.
            tail = fresh / self.handover.layers if before + new == whole else 0.0
            transfer.backlog_tokens += tail
            if transfer.lane is None:
                transfer.backlog_tokens += cached + fresh - tail
            else:
                if cached:
                    self._send(request, transfer, cached, start_s)
                self._send(request, transfer, fresh - tail, start_s, within_s=end_s - start_s)

    def _finished(self, index: int, request: int) -> None:
        transfer = self.transfers.get(request)
        if transfer is not None and transfer.source == index and not transfer.done:
            self.replicas[index].schedulers[transfer.source_lane].hold(request)
        super()._finished(index, request)

    def _leave(self, index: int, request: int, now_s: float) -> None:
        transfer = self.transfers.get(request)
        if transfer is None:
            super()._leave(index, request, now_s)
            if self.queues[index]:
                self._admit(index, now_s)
            if self.draining:
                self._drained(now_s)
            return
        if transfer.source != index or transfer.done:  # its replica was removed while it left the stages
            return
        self.loads[index].outstanding_tokens -= self.prompts[request]
        self.log.finish_s[request] = nan
        transfer.done = True
        transfer.ready_s = now_s
        transfer.backlog_tokens += self.prompts[request] + self.emitted.get(request, 0) - transfer.covered_tokens
        if transfer.lane is None:
            self.queues[transfer.target].append(request)
            self._admit(transfer.target, now_s)
        else:
            self._send_backlog(request, transfer, now_s)

    # Transfers

    def _reserve(self, request: int, transfer: Transfer, now_s: float) -> bool:
        transfer.lane = self.replicas[transfer.target].expect(request)
        transfer.reserved_s = now_s
        return transfer.lane is not None

    def _admit(self, index: int, now_s: float) -> None:
        """Send what waits for room at a replica, first come first served, while there is some."""
        queue = self.queues[index]
        while queue:
            request = queue[0]
            transfer = self.transfers[request]
            if not self._reserve(request, transfer, now_s):
                return
            queue.popleft()
            self._send_backlog(request, transfer, now_s)

    def _send_backlog(self, request: int, transfer: Transfer, now_s: float) -> None:
        self._flow_until(now_s)  # while the backlog says that something is still to come
        tokens, transfer.backlog_tokens = transfer.backlog_tokens, 0.0
        self._send(request, transfer, tokens, now_s)

    def _way(self, transfer: Transfer) -> Way:
        assert transfer.lane is not None
        return self.handover.route(transfer.source, transfer.source_lane, transfer.target, transfer.lane)

    def _send(self, request: int, transfer: Transfer, tokens: float, now_s: float, *, within_s: float = 0.0) -> None:
        """Start a flow of the KV of so many tokens; it is computed in `within_s` and goes no faster than that."""
        way = self._way(transfer)
        nbytes = tokens * way.bytes_per_token
        limit = min(way.limit_bytes_per_s, nbytes / within_s if within_s else inf)
        self._flow_until(now_s)
        flow = self.flows.start(
            max(now_s, self.flows.now_s),
            tuple(way.links),
            nbytes,
            shares=tuple(way.shares),
            weight=way.weight,
            limit_bytes_per_s=limit,
        )
        transfer.flying += 1
        transfer.sent_bytes += nbytes
        self.carried[flow] = request
        self._tick()

    def _tick(self) -> None:
        """Be there when the next flow ends."""
        next_s = self.flows.next_s()
        if next_s < self.due_s:
            self.due_s = next_s
            self._at(next_s, URGENT, partial(self._flow_on, next_s))

    def _flow_on(self, due_s: float) -> None:
        if due_s == self.due_s:
            self.due_s = inf
            self._flow_until(due_s)
            self._tick()

    def _flow_until(self, now_s: float) -> None:
        # Times that SimPy has added up may differ from ours in the last bit.
        for flow, end_s in self.flows.advance(max(now_s, self.flows.now_s)):
            request = self.carried.pop(flow)
            transfer = self.transfers[request]
            transfer.flying -= 1
            if transfer.done and not transfer.flying and not transfer.backlog_tokens:
                landing_s = end_s + self._way(transfer).latency_s
                self._at(landing_s, URGENT, partial(self._land, request, transfer, landing_s))

    def _land(self, request: int, transfer: Transfer, now_s: float) -> None:
        """All KV of a request has come."""
        if self.transfers.get(request) is not transfer:  # a replica was removed meanwhile
            return
        assert transfer.lane is not None
        del self.transfers[request]
        log, source, target = self.log, self.replicas[transfer.source], self.replicas[transfer.target]
        if self.handover.first_token == "decode":
            log.first_shown(request, now_s)
        times_s = transfer.ready_s, transfer.reserved_s, now_s
        log.transfers.append((request, transfer.source, transfer.target, transfer.sent_bytes, *times_s))
        source.schedulers[transfer.source_lane].release(request)
        self._stir(transfer.source, transfer.source_lane, now_s)
        if self.draining:
            self._drained(now_s)
        before = target.end
        target.land(request, transfer.lane, now_s)
        self._stirred(transfer.target, before, now_s)

    def _stir(self, index: int, lane: int, now_s: float) -> None:
        """A replica has got blocks back: a prompt that waited for them may run."""
        replica = self.replicas[index]
        if replica.schedulers[lane].waiting:
            before = replica.end
            replica.disturb(lane, now_s)
            self._stirred(index, before, now_s)
        if self.queues[index]:
            self._admit(index, now_s)

    # Replicas that change roles

    def _watch_queues(self, now_s: float) -> None:
        """Look at the queues before the prefill and decode pools, and let a replica change sides where they differ."""
        engines = {"prefill": self._of("prefill"), "decode": self._of("decode")}
        queues = {
            "prefill": sum(len(lane.waiting) for i in engines["prefill"] for lane in self.replicas[i].schedulers),
            "decode": sum(len(self.queues[i]) for i in engines["decode"]),
        }
        queues["decode" if engines["prefill"] else "prefill"] += len(self.lobby)
        self.switching.look(queues, {role: len(members) for role, members in engines.items()})
        move = self.switching.decide(now_s)
        if move is not None and not self.draining:
            index = min(engines[move[0]], key=lambda i: self.loads[i].outstanding_tokens)
            self.roles[index] = None
            self.draining[index] = cast(Role, move[1])
            self._drained(now_s)
        if self.lobby and not self._may_change():
            for request in self.lobby:
                self.log.rejected.append(request)
            self.lobby.clear()
        if (
            self.lobby
            or self.entered < len(self.outputs)
            or self.transfers
            or any(lane.unfinished for lane in self._lanes())
        ):
            self._at(now_s + MONITOR_S, NORMAL, partial(self._watch_queues, now_s + MONITOR_S))

    def _lanes(self) -> Iterator[Scheduler]:
        return (lane for replica in self.replicas for lane in replica.schedulers)

    def _drained(self, now_s: float) -> None:
        """Let replicas that have finished what they had take up their new roles, after the time that takes."""
        for index, role in list(self.draining.items()):
            busy = any(lane.unfinished for lane in self.replicas[index].schedulers)
            if not busy and not any(index in (t.source, t.target) for t in self.transfers.values()):
                del self.draining[index]
                self.log.role_switches += 1
                again_s = now_s + (self.deployment.switch_s or 0.0)
                self.changing += 1
                self._at(again_s, URGENT, partial(self._take_up, index, role, again_s))

    def _take_up(self, index: int, role: Role, now_s: float) -> None:
        """A replica is there in its new role, and those that waited for one come in."""
        self.changing -= 1
        self.roles[index] = role
        waiting, self.lobby = self.lobby, []
        for request in waiting:
            self._enter(request, now_s)

    def _may_change(self) -> bool:
        """Whether a replica is about to take up another role, or may be told to."""
        if self.deployment.switch_s is None:
            return False
        return bool(self.changing or self.draining) or max(len(self._of("prefill")), len(self._of("decode"))) > 1

    # Replicas that go away

    def _remove(self, index: int, now_s: float) -> None:
        """A replica fails: its requests start anew elsewhere with the tokens they have, and what it cached is lost."""
        if self.roles[index] is None and index not in self.draining:
            return
        self.draining.pop(index, None)
        replica = self.replicas[index]
        if replica.end <= now_s and not self.pending[index]:
            self._commit(index, self.version[index])
        self.roles[index] = None
        self.version[index] += 1
        self.pending[index] = False
        self._flow_until(now_s)
        self.queues[index].clear()
        again: list[int] = []
        for request, transfer in list(self.transfers.items()):
            if index == transfer.source:
                self._lose(request, transfer, now_s)
                again.append(request)
            elif index == transfer.target:
                self._stop_flows(request, transfer, now_s)
                self._aim(request, transfer, now_s)
        for request in replica.halt(now_s):
            if request not in again:
                again.append(request)
                emitted = [lane.generated[request] for lane in replica.schedulers if request in lane.generated]
                if emitted:
                    self.emitted[request] = max(emitted)
        for request in sorted(again):
            self.log.requeued.append(request)
            self._enter(request, now_s)
        self._tick()

    def _lose(self, request: int, transfer: Transfer, now_s: float) -> None:
        """The replica that computed or computes a prompt is gone."""
        self._stop_flows(request, transfer, now_s)
        del self.transfers[request]
        self.loads[transfer.target].outstanding_tokens -= self.prompts[request]
        if transfer.lane is not None:
            self.replicas[transfer.target].schedulers[transfer.lane].unexpect(request)
        elif request in self.queues[transfer.target]:
            self.queues[transfer.target].remove(request)
        if transfer.done and self.handover.first_token == "prefill":
            emitted = self.emitted.get(request, 0) + 1
            self.log.interrupted(request, transfer.source, transfer.source_lane, emitted)
            self.emitted[request] = emitted
        elif transfer.done and not self.emitted.get(request, 0):
            self.log.first_token_s[request] = nan
        self._admit(transfer.target, now_s)

    def _stop_flows(self, request: int, transfer: Transfer, now_s: float) -> None:
        for flow in [flow for flow, owner in self.carried.items() if owner == request]:
            self.flows.cancel(flow, max(now_s, self.flows.now_s))
            del self.carried[flow]
        transfer.flying = 0

    def _aim(self, request: int, transfer: Transfer, now_s: float) -> None:
        """Choose another replica for the answer; what has been sent is sent again."""
        self.loads[transfer.target].outstanding_tokens -= self.prompts[request]
        others = self._of("decode") or self._of("mixed")
        others = [index for index in others if index != transfer.source]
        if not others:
            raise PoolError(
                f"replica {transfer.target} removed at {now_s:g} s: no replica is left that decodes; expected one more "
                "in the pool, or a mixed one"
            )
        self._see(request)
        transfer.target = self._pick(others)
        transfer.lane = None
        self.loads[transfer.target].outstanding_tokens += self.prompts[request]
        transfer.backlog_tokens = transfer.covered_tokens
        for lane in self.replicas[transfer.target].schedulers:
            lane.outputs[request] = self.outputs[request]
            if request in self.emitted:
                lane.generated[request] = self.emitted[request]
        if transfer.done:
            self.queues[transfer.target].append(request)
            self._admit(transfer.target, now_s)
