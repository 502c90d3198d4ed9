"""What is said of pools: how many of what, and why requests were rejected."""

from __future__ import annotations

import numpy as np
import pytest

from simulator.result import Result, RunTotals, link_frame, request_frame, transfer_frame
from ui.poolwords import handed_over, sentences

NAN = float("nan")
#: Replica, prompt tokens, first step and finish of a request; one without a finish was rejected.
Row = tuple[int, int, float, float]


def result(rows: list[Row], sent: int = 0, **counts: int) -> Result:
    """A run of two replicas in which the rows happened."""
    replica, prompts, scheduled_s, finish_s = (np.array(column) for column in zip(*rows, strict=True))
    totals = RunTotals(
        gpus=2, replicas=2, makespan_s=10.0, model_flops=0.0, hbm_bytes=0.0, energy_j=0.0, price_usd_per_h=None,
        peak_flops_per_s=1.0, memory_bytes_per_s=1.0, lanes=(1, 1), kv_blocks=(100, 100), seed=0, events=0,
        roles=("prefill", "decode"), **counts,
    )  # fmt: skip
    requests = request_frame(
        arrival_s=np.zeros(len(rows)), first_schedule_s=scheduled_s, first_token_s=finish_s, finish_s=finish_s,
        prompt_tokens=prompts, output_tokens=np.full(len(rows), 10), rejected=np.isnan(finish_s), replica=replica,
    )  # fmt: skip
    moved = transfer_frame([(0, 0, 1, 1e9, 1.0, 2.0, 2.5)] * sent)
    return Result(requests, None, None, totals, moved, link_frame(["wire"], [1e9], [1e9 * sent]))


SERVED: Row = (1, 100, 0.0, 1.0)


def test_nothing_is_said_where_nothing_happened() -> None:
    quiet = result([SERVED])
    assert sentences(quiet) == [] and handed_over(quiet) is None


@pytest.mark.parametrize("count, words", [(1, "1 transfer of KV"), (1227, "1,227 transfers of KV")])
def test_transfers_are_counted(count: int, words: str) -> None:
    (said,) = sentences(result([SERVED], sent=count))
    assert said.startswith(f"{words} to another replica") and "waiting for room 1 s" in said


def test_one_is_singular() -> None:
    said = sentences(result([SERVED], requeued=1, lost_kv_blocks=1, role_switches=1))
    assert said == [
        "1 change of role between prefill and decode.",
        "1 request had to start anew because a replica failed; 1 KV block was lost.",
    ]
    said = sentences(result([SERVED], requeued=2, lost_kv_blocks=1234, role_switches=3))
    assert said == [
        "3 changes of role between prefill and decode.",
        "2 requests had to start anew because a replica failed; 1,234 KV blocks were lost.",
    ]


def test_why_requests_were_rejected() -> None:
    homeless: Row = (-1, 50, NAN, NAN)
    too_long: Row = (1, 5000, NAN, NAN)
    begun: Row = (1, 5000, 0.5, NAN)
    waited: Row = (1, 60, NAN, NAN)  # shorter than what the replica served, so that it would have fitted
    (said,) = sentences(result([SERVED, too_long]))
    assert said.startswith("1 request was rejected: 1 of 5,010 tokens that the replica it was sent to cannot hold")
    assert "max_context_tokens" in said
    (said,) = sentences(result([SERVED, homeless, homeless]))
    assert said.startswith("2 requests were rejected: 2 because no replica was left in a role they need")
    rows = [SERVED, homeless, begun, waited, too_long, too_long]
    (said,) = sentences(result(rows))
    assert said.startswith("5 requests were rejected: 1 because no replica was left in a role it needs")
    assert "; 4 of up to 5,010 tokens that no replica they were sent to can hold" in said
    _, said = sentences(result(rows, requeued=2))
    assert said.startswith("5 requests were rejected: 3 because no replica was left in a role they need")
    assert "; 2 of up to 5,010 tokens that no replica they were sent to can hold" in said


def test_a_prompt_that_waited_for_a_failed_prefill_replica_did_fit() -> None:
    rows: list[Row] = [SERVED, (0, 90, NAN, NAN), (0, 101, NAN, NAN)]
    _, _, said = sentences(result(rows, sent=1, requeued=1))
    assert said.startswith("2 requests were rejected: 1 because no replica was left in a role it needs")
    assert "; 1 of 111 tokens that the replica it was sent to cannot hold" in said
