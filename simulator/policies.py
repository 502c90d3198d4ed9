"""Who joins a step: the policies of continuous batching, each a function that fills a scheduler's next step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from simulator.scheduler import Scheduler

Policy = Literal["chunked", "prefill-first", "orca", "static", "layered"]


def chunked(s: Scheduler) -> None:
    """All decodes, the prompt in progress, new prompts, up to the token budget (Sarathi-Serve, arXiv:2403.02310)."""
    shortage = s.grow_decodes()
    partial = s.partial
    if partial < 0 and not s.waiting:
        return
    left = s.config.token_budget - s.running
    if s.config.chunk_tokens is not None:
        left = min(left, s.config.chunk_tokens)
    if partial >= 0 and left > 0:
        done = s.partial_done
        target = s.prompts[partial] + s.generated.get(partial, 0)
        new = min(target - done, left)
        s.chunks.append((partial, new, done))
        s.items.append((new, done))
        left -= new
        if done + new < target:
            return
        partial = -1
    if shortage or partial >= 0 or not s.waiting:
        return
    room = s.config.max_seqs - s.running - s.expected - len(s.chunks)
    while s.waiting:
        if left <= 0:
            s.limited.add("tokens")
            return
        head = s.waiting[0]
        if room <= 0:
            s.limited.add("seqs")
            if not s.make_way(head):
                return
            room += 1
        target = s.prompts[head] + (s.generated.get(head, 0) if s.generated else 0)
        if not s.admit_head(head, target):
            if not s.make_way(head):
                return
            continue
        before = s.before
        if before < 0:
            continue
        new = target - before
        if new > left:
            s.limited.add("tokens")
            new = left
        s.chunks.append((head, new, before))
        s.items.append((new, before))
        left -= new
        room -= 1


def whole_prompts(s: Scheduler, left: int) -> None:
    """Admit whole prompts, first come first served, while tokens, sequences and blocks last."""
    room = s.config.max_seqs - s.running - s.expected
    while s.waiting:
        head = s.waiting[0]
        target = s.prompts[head] + (s.generated.get(head, 0) if s.generated else 0)
        if target - s.find(head, target) > left:
            s.limited.add("tokens")
            return
        if room <= 0:
            s.limited.add("seqs")
            if not s.make_way(head):
                return
            room += 1
        if not s.admit_head(head, target):
            if not s.make_way(head):
                return
            continue
        before = s.before
        if before < 0:
            continue
        s.chunks.append((head, target - before, before))
        s.items.append((target - before, before))
        left -= target - before
        room -= 1


def prefill_first(s: Scheduler) -> None:
    """Whole prompts alone in a step as long as one can be admitted, decodes otherwise (vLLM V0)."""
    s.decode_runs = False
    whole_prompts(s, s.config.token_budget)
    if not s.chunks:
        s.grow_decodes()


def orca(s: Scheduler) -> None:
    """Whole prompts in the same step as the decodes (Orca, OSDI 2022)."""
    if not s.grow_decodes():
        whole_prompts(s, s.config.token_budget - s.running)


def layered(s: Scheduler) -> None:
    """A cohort of whole prompts passes one group of layers a step, beside decodes that pass all of them.

    The next cohort starts when this one has left the last group (Layered Prefill, arXiv:2510.08055).
    """
    shortage = s.grow_decodes()
    if s.cohort:
        s.chunks, s.cohort = s.cohort, []
        s.items = [(new, before) for _, new, before in s.chunks]
        s.partial = -1
        s.group += 1
        return
    s.group, s.groups = 0, 1
    if shortage:
        return
    whole_prompts(s, s.config.token_budget - s.running)
    s.groups = layer_groups(sum(new for _, new, _ in s.chunks), s.config.group_tokens, s.config.max_groups)


def layer_groups(tokens: int, group_tokens: int, most: int) -> int:
    """Groups of layers that a cohort of so many prompt tokens passes: one for every `group_tokens`, 1 to `most`.

    >>> layer_groups(512, 512, 16), layer_groups(513, 512, 16), layer_groups(100_000, 512, 16)
    (1, 2, 16)
    """
    return min(most, max(1, -(-tokens // group_tokens)))


def static(s: Scheduler) -> None:
    """A batch is admitted together, reserves its longest context, and runs until its last sequence ends."""
    s.decode_runs = s.running > 0
    if not s.decode_runs:
        whole_prompts(s, s.config.token_budget)


POLICIES: dict[str, Callable[[Scheduler], None]] = {
    "chunked": chunked,
    "prefill-first": prefill_first,
    "orca": orca,
    "static": static,
    "layered": layered,
}
