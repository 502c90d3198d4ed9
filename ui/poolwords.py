"""What happened between pools: KV that went from replica to replica, roles that changed, replicas that failed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ui.questions import OptionError
from ui.words import number, percent, scaled, seconds

if TYPE_CHECKING:
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
            f"KV of {found['transfers']:,} requests went to another replica, {scaled(found['nbytes'], 'B')}: waiting "
            f"for room {seconds(room['mean'])} (at most {seconds(room['max'])}), not hidden behind the prompt "
            f"{seconds(exposed['mean'])} (at most {seconds(exposed['max'])}); busiest link {link['name']}, "
            f"{percent(link['use'])} of {scaled(link['bytes_per_s'], 'B/s')}."
        )
    totals = result.totals
    if totals.role_switches:
        told.append(f"{totals.role_switches:,} changes of role between prefill and decode.")
    if totals.requeued or totals.lost_kv_blocks:
        told.append(
            f"{totals.requeued:,} requests started anew on other replicas; {number(totals.lost_kv_blocks)} KV blocks "
            "were lost."
        )
    return told
