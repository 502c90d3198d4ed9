"""Which rates are max-min fair once a flow has come onto its links or left them, without working out all of them?

At any time every flow has a bottleneck: its own peak, or a full link on which no flow of its priority has more per
stream and none of a lower priority anything. That characterises the weighted max-min fair rates (Bertsekas and
Gallager, Data Networks, section 6.5.2), so that it is enough to restore it where a change has broken it: rates are
worked out for the flows on links that have become short, or that held others up, while all other flows keep theirs;
flows whose bottleneck is thereby none any more, or that now have more than their part, are taken in, until there are
no more.
"""

from __future__ import annotations

from collections.abc import Collection
from heapq import heappush
from math import inf

from simulator.flowlinks import ROUNDING, Flow, Link


class MaxMin:
    """Keeps the rates of flows max-min fair, and in the heap `due` a time for each of them that is not after its end.

    An entry of `due` is (time, number, flow); it counts while it is the flow's `due`, and is checked against its `end`
    when it comes up: a flow that has slowed down is not entered again.
    """

    def __init__(self) -> None:
        self.due: list[tuple[float, int, Flow]] = []
        self._sharing = self._round = 0
        self._classes = False

    def enter(self, flow: Flow, at: float) -> None:
        """Put a flow on its links."""
        if flow.priority:
            self._classes = True
        flow.level = peak = flow.peak
        flow.end = flow.due = end = at + flow.left / peak
        heappush(self.due, (end, flow.number, flow))
        short = False
        for link, streams in flow.watched:
            link.flows[flow] = streams
            link.room = room = link.room - streams * peak
            if room < link.least:
                short = True
        if short:
            self._make_room(flow, at)

    def leave(self, flow: Flow, at: float) -> None:
        """Take a flow off its links; those that it held up there move on faster."""
        flow.due = -1.0
        level = flow.level
        if flow.neck is not None:
            flow.neck.necks -= 1
        held: dict[Flow, None] = {}
        for link, streams in flow.watched:
            flows = link.flows
            del flows[flow]
            if flows:
                link.room += streams * level
                if link.necks:
                    for other in flows:
                        if other.neck is link:
                            held[other] = None
            else:
                link.room = link.capacity
        if held and (self._classes or not self._release(held, at)):
            self._sharing += 1
            self._share(held, at)

    def _release(self, held: dict[Flow, None], at: float) -> bool:
        """Let flows that one link held up rise together; False, and nothing done, if something else stops them.

        Nothing does where their part of the link is below all their peaks, or a single one's peak is below it, and
        every other link has room for them.
        """
        neck = next(iter(held)).neck
        assert neck is not None
        left, streams = neck.room, 0.0
        peak = inf
        for flow in held:
            if flow.neck is not neck:
                return False
            each = neck.flows[flow]
            left += each * flow.level
            streams += each
            if flow.peak < peak:
                peak = flow.peak
        level = left / streams
        free = peak <= level
        if free:
            if len(held) > 1:
                return False
            level = peak
        more = level - flow.level
        for flow in held:
            for link, each in flow.watched:
                if link.room < each * more * len(held) and link is not neck:
                    return False
        for flow in held:
            old = flow.level
            more = level - old
            for link, each in flow.watched:
                link.room -= each * more
            if free:
                flow.neck = None
                neck.necks -= 1
            flow.left = left = flow.left - old * (at - flow.since)
            flow.since = at
            flow.level = level
            flow.end = end = at + left / level
            if end < flow.due:
                flow.due = end
                heappush(self.due, (end, flow.number, flow))
        return True

    def _make_room(self, flow: Flow, at: float) -> None:
        """Make room on its links for a flow that has just come onto them at its peak."""
        short = [link for link, _ in flow.watched if link.room < link.least]
        if len(short) == 1 and not self._classes and self._divide(short[0], at):
            return
        self._sharing += 1
        chosen: dict[Flow, None] = {flow: None}
        for link in short:
            self._shorten(link, chosen)
        self._share(chosen, at)

    def _divide(self, link: Link, at: float) -> bool:
        """Slow the fastest flows of a link that is short down to the rate that fills it; False if that is not all.

        It is unless one of them holds up, or is held up with, others elsewhere.
        """
        flows: Collection[Flow] = link.flows
        streams = link.flows
        left, each = link.capacity, sum(streams.values())
        level = left / each
        while True:
            faster = []
            for flow in flows:
                if flow.level > level:
                    faster.append(flow)
                else:
                    left -= streams[flow] * flow.level
                    each -= streams[flow]
            if len(faster) == len(flows):
                break
            if not faster:
                return False
            flows = faster
            level = left / each
        for flow in flows:
            for other, _ in flow.watched:
                if other.necks and other is not link:
                    return False
        for flow in flows:
            less = flow.level - level
            for other, part in flow.watched:
                other.room += part * less
            if flow.neck is None:
                flow.neck = link
                link.necks += 1
            flow.left = left = flow.left - flow.level * (at - flow.since)
            flow.since = at
            flow.level = level
            flow.end = at + left / level
        return True

    def _shorten(self, link: Link, chosen: dict[Flow, None]) -> None:
        """Share a link that is short; those with more than an even part or that it holds up cannot keep their rate."""
        link.short = self._sharing
        even = link.capacity / sum(link.flows.values())
        for other in link.flows:
            if other.level > even or other.neck is link:
                chosen[other] = None

    def _share(self, chosen: dict[Flow, None], at: float) -> None:
        """New rates for the chosen flows, and for all whose rates these change."""
        for flow in list(chosen):
            for link, _ in flow.watched:
                if link.necks and len(link.flows) > 1:
                    for other in link.flows:
                        if other.neck is link:
                            chosen[other] = None
        while True:
            links = self._open(chosen)
            if self._classes and self._take_in_lower(links, chosen):
                continue
            before = len(chosen)
            if self._classes:
                self._fill_by_class(links)
            else:
                self._fill(links)
            for link in links:
                if len(link.flows) > len(link.members):
                    self._take_in_unsettled(link, chosen)
            if len(chosen) > before:
                continue
            touched = self._rooms(chosen)
            for link in touched:
                if link.after < link.least:
                    self._shorten(link, chosen)
                    before = -1
            if before >= 0:
                break
        for link in links:
            link.room = link.left
        for link in touched:
            link.room = link.after
        due = self.due
        for flow in chosen:
            neck = flow.next
            if neck is not flow.neck:
                if flow.neck is not None:
                    flow.neck.necks -= 1
                if neck is not None:
                    neck.necks += 1
                flow.neck = neck
            level = flow.fair
            old = flow.level
            if level != old:
                flow.left = left = flow.left - old * (at - flow.since)
                flow.since = at
                flow.level = level
                flow.end = end = at + left / level if level else inf
                if end < flow.due:
                    flow.due = end
                    heappush(due, (end, flow.number, flow))

    def _open(self, chosen: dict[Flow, None]) -> list[Link]:
        """The full and short links of the chosen flows, with what the others leave of them."""
        sharing = self._sharing
        self._round = mark = self._round + 1
        links: list[Link] = []
        for flow in chosen:
            flow.fair = -1.0
            level = flow.level
            for link, streams in flow.watched:
                if link.necks or link.short == sharing:
                    if link.mark == mark:
                        link.left += streams * level
                        link.streams += streams
                        link.members.append(flow)
                    else:
                        link.mark = mark
                        link.left = link.room + streams * level
                        link.streams = streams
                        link.level = inf
                        link.members = [flow]
                        links.append(link)
        for link in links:
            link.count = len(link.members)
        return links

    def _fill(self, links: list[Link]) -> None:
        """Progressive filling: the link that gives least per stream fixes the flows on it, over and over."""
        mark = self._round
        while links:
            least = inf
            for link in links:
                level = link.left / link.streams
                if level < least:
                    least, neck = level, link
            if neck.left <= -neck.least:
                least = 0.0
            alone = len(links) == 1
            capped = False
            for flow in neck.members:
                if flow.fair < 0.0 and flow.peak <= least:
                    capped = True
                    flow.fair = level = flow.peak
                    flow.next = None
                    for link, streams in flow.watched:
                        if link.mark == mark:
                            link.left -= streams * level
                            link.streams -= streams
                            link.count -= 1
            if not capped:
                neck.level = least
                for flow in neck.members:
                    if flow.fair < 0.0:
                        flow.fair = least
                        flow.next = neck
                        if not alone:
                            for link, streams in flow.watched:
                                if link.mark == mark:
                                    link.left -= streams * least
                                    link.streams -= streams
                                    link.count -= 1
                if alone:
                    neck.left -= neck.streams * least
                    return
            links = [link for link in links if link.count]

    def _rooms(self, chosen: dict[Flow, None]) -> list[Link]:
        """Links of the chosen flows that were not shared, with the room their new rates leave."""
        mark = self._round
        touched: list[Link] = []
        for flow in chosen:
            if flow.fair < 0.0:
                flow.fair = flow.peak
                flow.next = None
            more = flow.fair - flow.level
            if more:
                for link, streams in flow.watched:
                    if link.mark != mark:
                        if link.touched == mark:
                            link.after -= streams * more
                        else:
                            link.touched = mark
                            link.after = link.room - streams * more
                            touched.append(link)
        return touched

    def _take_in_unsettled(self, link: Link, chosen: dict[Flow, None]) -> None:
        """Choose the flows on a link that kept their rate and thereby lost their bottleneck, or now have too much."""
        if self._classes:
            self._take_in_unsettled_by_class(link, chosen)
            return
        most = link.level * (1.0 + ROUNDING)
        top = -1.0
        for flow in link.flows:
            if flow not in chosen:
                if flow.level > most:
                    chosen[flow] = None
                elif flow.neck is link:
                    if top < 0.0:
                        top = inf if link.left > -link.least else max([member.fair for member in link.members])
                    if top > flow.level * (1.0 + ROUNDING):
                        chosen[flow] = None

    def _take_in_lower(self, links: list[Link], chosen: dict[Flow, None]) -> bool:
        """Choose the flows that must wait for a chosen one on any of the links; whether there are more."""
        before = len(chosen)
        for link in links:
            highest = max([member.priority for member in link.members])
            chosen.update((flow, None) for flow in link.flows if flow.priority < highest)
        return len(chosen) > before

    def _fill_by_class(self, links: list[Link]) -> None:
        """Progressive filling of one priority after the other."""
        everyone = [(link, link.members) for link in links]
        for priority in sorted({member.priority for link in links for member in link.members}, reverse=True):
            for link, members in everyone:
                link.members = [member for member in members if member.priority == priority]
                link.count = len(link.members)
                link.streams = sum([link.flows[member] for member in link.members])
            self._fill([link for link in links if link.count])
        for link, members in everyone:
            link.members = members

    def _take_in_unsettled_by_class(self, link: Link, chosen: dict[Flow, None]) -> None:
        """As _take_in_unsettled, where a flow has too much only beside those of its own priority."""
        slack = link.left > -link.least
        for flow in link.flows:
            if flow in chosen:
                continue
            most = flow.level * (1.0 + ROUNDING)
            for member in link.members:
                lower = member.priority < flow.priority
                same = member.priority == flow.priority
                if (same and member.next is link and flow.level > member.fair * (1.0 + ROUNDING)) or (
                    flow.neck is link and (slack or (same and member.fair > most) or (lower and member.fair > 0.0))
                ):
                    chosen[flow] = None
                    break
