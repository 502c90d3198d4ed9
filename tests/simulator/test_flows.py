"""Flows on shared links: rates are max-min fair after any history, no link is overrun, no byte is lost."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.flowlinks import FlowError
from simulator.flows import Flows

CLOSE = 1e-9


@dataclass(frozen=True)
class Asked:
    """A flow as the oracle sees it."""

    shares: dict[int, float]
    weight: float
    priority: int
    limit: float
    nbytes: float
    start_s: float


def progressive_filling(capacities: list[float], flows: dict[int, Asked]) -> dict[int, float]:
    """Weighted max-min fair rates, by the textbook: all rates per stream rise together until something stops them.

    Bertsekas and Gallager, Data Networks, section 6.5.2; priorities one after the other on what is left.
    """
    left = np.array(capacities)
    rates: dict[int, float] = {}
    for priority in sorted({flow.priority for flow in flows.values()}, reverse=True):
        rising = {number: flow for number, flow in flows.items() if flow.priority == priority}
        level = 0.0
        while rising:
            use = np.zeros(len(left))
            for flow in rising.values():
                for link, share in flow.shares.items():
                    use[link] += share * flow.weight
            used = use > 0
            step = min((np.maximum(left, 0)[used] / use[used]).min(initial=inf), inf)
            step = min([step, *(flow.limit / flow.weight - level for flow in rising.values())])
            level += step
            left -= step * use
            full = left <= 1e-12 * np.array(capacities)
            for number, flow in list(rising.items()):
                if any(full[link] for link in flow.shares) or level >= flow.limit / flow.weight * (1 - 1e-13):
                    rates[number] = level * flow.weight
                    del rising[number]
    return rates


class History:
    """Runs Flows and remembers what it was asked, so that laws can be checked at any time."""

    def __init__(self, capacities: list[float]) -> None:
        self.capacities = capacities
        self.flows = Flows(capacities, record=True)
        self.live: dict[int, Asked] = {}
        self.all: dict[int, Asked] = {}
        self.ends: dict[int, float] = {}
        self.cancelled: dict[int, float] = {}

    def collect(self, to_s: float) -> None:
        for number, end_s in self.flows.advance(to_s):
            assert number not in self.ends
            self.ends[number] = end_s
            self.live.pop(number, None)

    def check_rates(self) -> None:
        wanted = progressive_filling(self.capacities, self.live)
        for number, rate in wanted.items():
            assert self.flows.rate(number) == pytest.approx(rate, rel=CLOSE, abs=1e-9)
        self.check_bottlenecks()

    def check_bottlenecks(self) -> None:
        """No link overrun; everyone at its limit, or on a full link where none of its priority has more per stream."""
        rate = {number: self.flows.rate(number) for number in self.live}
        load = np.zeros(len(self.capacities))
        for number, flow in self.live.items():
            for link, share in flow.shares.items():
                load[link] += share * rate[number]
        assert (load <= np.array(self.capacities) * (1 + CLOSE)).all()
        for number, flow in self.live.items():
            if rate[number] >= flow.limit * (1 - CLOSE):
                continue
            assert any(
                load[link] >= self.capacities[link] * (1 - CLOSE)
                and all(
                    rate[other] / asked.weight <= rate[number] / flow.weight + CLOSE
                    for other, asked in self.live.items()
                    if link in asked.shares
                    and asked.priority <= flow.priority
                    and (asked.priority == flow.priority or rate[other] > CLOSE)
                )
                for link in flow.shares
            )

    def finish(self) -> None:
        self.collect(inf)
        assert not self.live
        assert self.flows.next_s() == inf
        records = {record.flow: record for record in self.flows.records or ()}
        carried = np.zeros(len(self.capacities))
        for number, flow in self.all.items():
            moved = self.cancelled.get(number, flow.nbytes)
            assert records[number].nbytes == pytest.approx(moved)
            for link, share in flow.shares.items():
                carried[link] += share * moved
            if number in self.ends:
                slowest = min([flow.limit, *(self.capacities[a] / share for a, share in flow.shares.items())])
                taken_s = self.ends[number] - flow.start_s
                assert taken_s >= flow.nbytes / slowest * (1 - CLOSE) - CLOSE
        np.testing.assert_allclose(self.flows.carried_bytes(), carried, rtol=1e-9, atol=1e-9)
        last_s = max(self.ends.values(), default=0.0)
        if not self.cancelled:
            assert (self.flows.busy_s() <= last_s * (1 + CLOSE) + CLOSE).all()


def play(data: st.DataObject, *, priorities: bool) -> History:
    """Some sequence of starts, ends, cancellations and postponed starts; checked after each."""
    count = data.draw(st.integers(1, 6), "links")
    capacities = data.draw(st.lists(st.sampled_from([1.0, 2.0, 3.0, 8.5]), min_size=count, max_size=count))
    history = History(capacities)
    now = 0.0
    for _ in range(data.draw(st.integers(1, 25), "steps")):
        now += data.draw(st.sampled_from([0.0, 0.1, 0.7, 3.0]), "wait")
        history.collect(now)
        if history.live and data.draw(st.integers(0, 5), "cancel") == 0:
            number = data.draw(st.sampled_from(sorted(history.live)))
            moved = history.flows.cancel(number, now)
            assert 0 <= moved <= history.live[number].nbytes
            history.cancelled[number] = moved
            del history.live[number]
        else:
            links = tuple(data.draw(st.lists(st.integers(0, count - 1), min_size=1, unique=True), "links"))
            shares = tuple(data.draw(st.sampled_from([1.0, 1.0, 0.5, 0.125])) for _ in links)
            asked = Asked(
                dict(zip(links, shares, strict=True)),
                data.draw(st.sampled_from([1.0, 1.0, 2.0, 8.0]), "weight"),
                data.draw(st.integers(0, 2), "priority") if priorities else 0,
                data.draw(st.sampled_from([inf, inf, 0.3, 2.0]), "limit"),
                data.draw(st.sampled_from([0.5, 1.0, 7.3]), "bytes"),
                now,
            )
            number = history.flows.start(
                now,
                links,
                asked.nbytes,
                shares=shares,
                weight=asked.weight,
                priority=asked.priority,
                limit_bytes_per_s=asked.limit,
            )
            history.live[number] = history.all[number] = asked
        history.collect(now)
        history.check_rates()
        assert history.flows.next_s() > now or history.flows.next_s() == inf
    history.finish()
    return history


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_law_rates_are_max_min_fair_after_any_history(data: st.DataObject) -> None:
    play(data, priorities=False)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_law_higher_priorities_come_first_after_any_history(data: st.DataObject) -> None:
    play(data, priorities=True)


@pytest.mark.parametrize("priorities", [False, True])
def test_law_rates_stay_exact_on_a_crowded_fabric(priorities: bool) -> None:
    """A thousand flows between 16 devices over cards and an oversubscribed spine, dozens at once."""
    rng = np.random.default_rng(3)
    history = History([1.0] * 16 + [1.0] * 16 + [2.0] * 8)
    now = 0.0
    for _ in range(1000):
        now += rng.exponential(0.12)
        history.collect(now)
        a, b = (int(end) for end in rng.choice(16, 2, replace=False))
        links = (a, 16 + b) if a // 4 == b // 4 else (a, 32 + a // 4, 36 + b // 4, 16 + b)
        asked = Asked(
            dict.fromkeys(links, 1.0), 1.0, int(rng.integers(3)) if priorities else 0, inf, rng.exponential(1.0), now
        )
        number = history.flows.start(now, links, asked.nbytes, priority=asked.priority)
        history.live[number] = history.all[number] = asked
        if number % 10 == 0:
            history.check_rates()
    assert len(history.live) > 10
    history.finish()


@given(st.integers(1, 30), st.floats(1.0, 1e12))
def test_theory_one_link_is_shared_evenly(flows: int, capacity: float) -> None:
    shared = Flows([capacity])
    numbers = [shared.start(0.0, (0,), capacity) for _ in range(flows)]
    assert [shared.rate(number) for number in numbers] == pytest.approx([capacity / flows] * flows)
    assert [end for _, end in shared.advance(inf)] == pytest.approx([float(flows)] * flows)


@given(st.integers(1, 12), st.integers(1, 12))
def test_theory_parking_lot(links: int, locals_: int) -> None:
    """One flow over all links and some on each: C / (1 + n) for all; with one link narrower, what it leaves."""
    shared = Flows([1.0] * links + [1.0])
    through = shared.start(0.0, tuple(range(links)), 1e9)
    each = [shared.start(0.0, (link,), 1e9) for link in range(links) for _ in range(locals_)]
    assert shared.rate(through) == pytest.approx(1 / (1 + locals_))
    assert [shared.rate(number) for number in each] == pytest.approx([1 / (1 + locals_)] * len(each))
    shared.start(0.0, (0,), 1e9)
    assert shared.rate(through) == pytest.approx(1 / (2 + locals_))
    if links > 1:
        assert shared.rate(each[-1]) == pytest.approx((1 - 1 / (2 + locals_)) / locals_)


def test_theory_two_levels() -> None:
    """Four senders with cards of 1 below an uplink of 2: even parts; with two of them done, their own cards."""
    shared = Flows([1.0] * 4 + [2.0])
    numbers = [shared.start(0.0, (card, 4), 1.0 if card < 2 else 10.0) for card in range(4)]
    assert [shared.rate(number) for number in numbers] == [0.5] * 4
    assert shared.next_s() == 2.0
    assert shared.advance(2.0) == [(0, 2.0), (1, 2.0)]
    assert [shared.rate(number) for number in numbers[2:]] == [1.0] * 2
    assert shared.advance(inf) == [(2, 11.0), (3, 11.0)]
    assert shared.carried_bytes().tolist() == [1.0, 1.0, 10.0, 10.0, 22.0]
    assert shared.busy_s()[4] == 11.0


def test_shares_and_weights_make_parallel_pairs_one_flow() -> None:
    """Eight pairs over eight cards each move as fast as a single flow over one of them, and share like one."""
    shared = Flows([1.0] * 8)
    group = shared.start(0.0, tuple(range(8)), 80.0, shares=(1 / 8,) * 8, weight=8.0)
    assert shared.rate(group) == 8.0
    single = shared.start(0.0, (3,), 1.0)
    assert (shared.rate(group), shared.rate(single)) == (4.0, 0.5)
    assert shared.advance(2.0) == [(single, 2.0)]
    assert shared.moved(group, 2.0) == pytest.approx(8.0)
    assert shared.advance(inf) == [(group, 11.0)]


def test_a_flow_without_links_or_bytes_takes_no_time() -> None:
    shared = Flows([1.0])
    nothing = [shared.start(1.0, (), 5.0), shared.start(1.0, (0,), 0.0), shared.start(1.0, (0,), 5.0, shares=(0.0,))]
    assert shared.next_s() == 1.0
    assert shared.advance(1.0) == [(number, 1.0) for number in nothing]
    limited = shared.start(1.0, (), 6.0, limit_bytes_per_s=2.0)
    assert shared.advance(inf) == [(limited, 4.0)]


def test_postponed_starts_and_cancellations() -> None:
    shared = Flows([1.0], record=True)
    first = shared.start(0.0, (0,), 4.0)
    later = shared.start(0.0, (0,), 4.0, earliest_s=2.0)
    never = shared.start(0.0, (0,), 4.0, earliest_s=3.0)
    assert shared.next_s() == 2.0
    assert shared.advance(2.0) == []
    assert (shared.rate(first), shared.rate(later)) == (0.5, 0.5)
    assert shared.cancel(never, 2.5) == 0.0
    assert shared.cancel(later, 4.0) == 1.0
    assert shared.advance(inf) == [(first, 5.0)]
    assert [(record.flow, record.start_s, record.end_s, record.nbytes) for record in shared.records or ()] == [
        (later, 2.0, 4.0, 1.0),
        (first, 0.0, 5.0, 4.0),
    ]


def test_starting_collects_what_has_ended_before() -> None:
    shared = Flows([1.0])
    first = shared.start(0.0, (0,), 1.0)
    second = shared.start(3.0, (0,), 1.0)
    assert shared.rate(second) == 1.0
    assert shared.next_s() == 1.0
    assert shared.advance(inf) == [(first, 1.0), (second, 4.0)]


def test_law_same_calls_same_times() -> None:
    def run() -> list[tuple[int, float]]:
        rng = np.random.default_rng(1)
        shared = Flows(rng.uniform(1, 2, 12))
        ended: list[tuple[int, float]] = []
        for at in np.sort(rng.uniform(0, 50, 300)).tolist():
            ended += shared.advance(at)
            shared.start(at, tuple(rng.choice(12, 3, replace=False).tolist()), rng.exponential(1.0))
        return ended + shared.advance(inf)

    once = run()
    assert once == run()
    assert [end for _, end in once] == sorted(end for _, end in once)


def test_calls_that_make_no_sense() -> None:
    shared = Flows([1.0, 2.0])
    with pytest.raises(FlowError, match="link 2: expected one of 0 to 1"):
        shared.start(0.0, (2,), 1.0)
    with pytest.raises(FlowError, match="1 shares of 2 links"):
        shared.start(0.0, (0, 1), 1.0, shares=(1.0,))
    with pytest.raises(FlowError, match=r"share -1.0 of link 0"):
        shared.start(0.0, (0,), 1.0, shares=(-1.0,))
    with pytest.raises(FlowError, match=r"weight 0.0"):
        shared.start(0.0, (0,), 1.0, weight=0.0)
    with pytest.raises(FlowError, match=r"flow of -1.0 bytes"):
        shared.start(0.0, (0,), -1.0)
    with pytest.raises(FlowError, match=r"at most 0.0 bytes/s"):
        shared.start(0.0, (0,), 1.0, limit_bytes_per_s=0.0)
    shared.advance(5.0)
    with pytest.raises(FlowError, match=r"flow at 4.0 s: expected no earlier than 5.0 s"):
        shared.start(4.0, (0,), 1.0)
    with pytest.raises(FlowError, match=r"advance to 4.0 s"):
        shared.advance(4.0)
    with pytest.raises(FlowError, match=r"cancel at 4.0 s"):
        shared.cancel(0, 4.0)
    with pytest.raises(FlowError, match="flow 7: expected one that is on its way"):
        shared.moved(7, 5.0)
    with pytest.raises(FlowError, match="capacities of links"):
        Flows([1.0, 0.0])
