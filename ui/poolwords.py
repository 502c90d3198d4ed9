"""What happened between pools: KV that went from replica to replica, roles that changed, requests that were lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ui.questions import OptionError
from ui.words import percent, scaled, seconds

if TYPE_CHECKING:
    import pandas as pd

    from simulator.deployment import Removal
    from simulator.result import Result


def removals(texts: Sequence[str]) -> tuple[Removal, ...]:
    """Failures typed as REPLICA@SECONDS, such as 2@60; replicas are numbered through the plan's pools from 0."""
    from simulator.deployment import Removal

    found = []
    for text in texts:
        replica, _, at_s = text.partition("@")
        try:
            failure = Removal(float(at_s), int(replica))
        except ValueError:
            failure = Removal(-1.0, -1)
        if not (0 <= failure.at_s < float("inf") and failure.replica >= 0):
            raise OptionError(f"--fail {text}: expected a replica's number and a time in seconds, such as 2@60")
        found.append(failure)
    return tuple(found)


def handed_over(result: Result) -> dict[str, Any] | None:
    """Transfers of KV in numbers; None where there were none."""
    sent, links = result.transfers, result.links
    if sent.empty:
        return None
    room_s = (sent["reserved_s"] - sent["ready_s"]).clip(lower=0.0)
    exposed_s = sent["landed_s"] - sent[["ready_s", "reserved_s"]].max(axis=1)
    use = links["carried_bytes"] / (links["bytes_per_s"] * max(result.totals.makespan_s, 1e-12))
    busiest = int(use.to_numpy().argmax())
    return {
        "transfers": len(sent),
        "nbytes": float(sent["nbytes"].sum()),
        "waiting_for_room_s": {"mean": float(room_s.mean()), "max": float(room_s.max())},
        "exposed_s": {"mean": float(exposed_s.mean()), "max": float(exposed_s.max())},
        "busiest_link": {
            "name": str(links["name"].iloc[busiest]),
            "bytes_per_s": float(links["bytes_per_s"].iloc[busiest]),
            "use": float(use.iloc[busiest]),
        },
    }


def sentences(result: Result) -> list[str]:
    """The same in words, with what else happened to the pools."""
    told = []
    found = handed_over(result)
    if found is not None:
        link, room, exposed = found["busiest_link"], found["waiting_for_room_s"], found["exposed_s"]
        told.append(
            f"{_counted(found['transfers'], 'transfer')} of KV to another replica, {scaled(found['nbytes'], 'B')}: "
            f"waiting for room {seconds(room['mean'])} (at most {seconds(room['max'])}), not hidden behind the prompt "
            f"{seconds(exposed['mean'])} (at most {seconds(exposed['max'])}); busiest link {link['name']}, "
            f"{percent(link['use'])} of {scaled(link['bytes_per_s'], 'B/s')}."
        )
    totals = result.totals
    if totals.role_switches:
        told.append(f"{_counted(totals.role_switches, 'change')} of role between prefill and decode.")
    if totals.requeued or totals.lost_kv_blocks:
        lost = totals.lost_kv_blocks
        told.append(
            f"{_counted(totals.requeued, 'request')} had to start anew because a replica failed; "
            f"{_counted(lost, 'KV block')} {_was(lost)} lost."
        )
    refused = _refused(result)
    return [*told, refused] if refused else told


def _refused(result: Result) -> str:
    """How many requests were rejected and why, with the way out; nothing where none was.

    Requests without a replica found none in a role they need, and neither did those whose replica failed; the others
    do not fit the one they were offered to.
    """
    frame = result.requests
    rejected = frame[frame["rejected"]]
    if rejected.empty:
        return ""
    tokens = frame["prompt_tokens"] + frame["output_tokens"]
    nobody = (rejected["replica"] < 0) | _fitted(result, rejected)
    parts = []
    if nobody.any():
        count = int(nobody.sum())
        parts.append(
            f"{count:,} because no replica was left in a role {'it needs' if count == 1 else 'they need'} (plan more "
            "replicas of it, or mixed ones)"
        )
    long = tokens[rejected.index][~nobody]
    if len(long):
        parts.append(
            f"{len(long):,} of up to {int(long.max()):,} tokens that no replica they were sent to can hold (raise "
            "max_context_tokens, without chunks token_budget, or the devices of a replica for more KV)"
            if len(long) > 1
            else f"1 of {int(long.max()):,} tokens that the replica it was sent to cannot hold (raise "
            "max_context_tokens, without chunks token_budget, or the devices of a replica for more KV)"
        )
    return f"{_counted(len(rejected), 'request')} {_was(len(rejected))} rejected: {'; '.join(parts)}."


def _fitted(result: Result, rejected: pd.DataFrame) -> pd.Series[bool]:
    """Which of them had been accepted until their replica failed: those that had begun or that fit as others did.

    A replica has room for what it served and, where it hands KV over, for prompts as long as it did that with.
    """
    import pandas as pd

    if not result.totals.requeued:
        return pd.Series(False, index=rejected.index)
    frame = result.requests
    tokens = frame["prompt_tokens"] + frame["output_tokens"]
    served = tokens[frame["finish_s"].notna()].groupby(frame["replica"]).max()
    sent = frame["prompt_tokens"].reindex(result.transfers["request"]).to_numpy()
    handed = pd.Series(sent, dtype=float).groupby(result.transfers["source"].to_numpy()).max()
    whole = tokens[rejected.index] <= rejected["replica"].map(served).fillna(0)
    prompt = rejected["prompt_tokens"] <= rejected["replica"].map(handed).fillna(0)
    return rejected["first_schedule_s"].notna() | whole | prompt


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _was(count: int) -> str:
    return "was" if count == 1 else "were"
