"""TensorRT-LLM throughputs, Splitwise, APEX+ and vLLM request files: rows written here, counts on the real files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from planner.planfile import check_plan
from planner.validation.case import Layout
from planner.validation.read import read_layout

REFERENCE = Path(__file__).resolve().parents[4] / "shared" / "reference" / "serving"

TRTLLM = {
    "model": "LLaMA v3.1 70B", "quant": "FP8", "gpu": "H100 80GB HBM3", "tp": 4, "pp": 1, "ep": 1, "attn_dp": 0,
    "n_gpus": 4, "isl": 128, "osl": 2048, "batch_size": "", "tokens_per_s_total": 9000.0, "engine": "TensorRT-LLM",
    "version": "0.17",
}  # fmt: skip
SPLITWISE = {
    "model": "llama2-70b", "hardware": "a100-80gb", "prompt_size": 512, "batch_size": 4, "token_size": 128,
    "prompt_time": 300.0, "token_time": 50.0, "e2e_time": 6650.0, "tensor_parallel": 4,
}  # fmt: skip
APEX = {
    "engine": "vllm", "model": "Llama-3.1-70B", "quant": "bf16/fp16", "workload": "lmsys", "arrival_rate_per_s": 0.25,
    "parallelism": "2DP4TP_1", "prompt_tokens_sum": 37849, "output_tokens_sum": 41156, "ttft_mean_s": 0.035,
    "tpot_mean_s": 0.02,
}  # fmt: skip
REQUEST = {
    "hardware": "RTXPRO6000", "model": "Llama-3.1-8B", "vllm_version": "0.19.0", "tp": 1, "dp": 1, "enable_ep": False,
    "max_num_seqs": 128, "max_num_batched_tokens": 2048, "request_id": "a", "input_toks": 100, "output_toks": 11,
    "arrival_s": 0.0, "ttft_ms": 50.0, "tpot_ms": 30.0, "e2e_ms": 350.0,
}  # fmt: skip


def written(folder: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    path = folder / "rows.csv"
    lines = [",".join(rows[0]), *(",".join(str(value) for value in row.values()) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def layout(folder: Path, row: Mapping[str, object], **cells: object) -> Layout:
    found = read_layout(written(folder, [{**row, **cells}]))
    for case in found.cases:
        check_plan(case.plan)
    return found


def reason(found: Layout) -> str:
    assert not found.cases
    return found.unmapped[0].reason


def test_throughput_is_measured_with_a_queue_that_is_full_from_the_start(tmp_path: Path) -> None:
    (case,) = layout(tmp_path, TRTLLM).cases
    assert case.measured == {"throughput": 9000.0}
    assert case.workload.concurrency is None
    assert len(case.workload.requests) == 3000
    assert set(case.workload.requests.arrival_s) == {0.0}
    assert (case.plan.gpus, case.plan.pools[0].policy, case.plan.pools[0].kv) == (4, "orca", "fp8")


def test_static_batches_are_served_once(tmp_path: Path) -> None:
    (case,) = layout(tmp_path, TRTLLM, batch_size=64, version="0.9").cases
    assert len(case.workload.requests) == case.plan.pools[0].max_seqs == 64


def test_attention_groups_of_throughput_rows(tmp_path: Path) -> None:
    cells = {"model": "DeepSeek R1 0528", "quant": "FP4", "gpu": "B200", "ep": 4, "attn_dp": 1}
    (case,) = layout(tmp_path, TRTLLM, **cells).cases
    pool = case.plan.pools[0]
    assert (pool.tp, pool.attention_dp, pool.ep, pool.expert_tp) == (1, 4, 4, 1)


def test_experts_are_cut_where_the_release_did_so_and_unmapped_where_nobody_says(tmp_path: Path) -> None:
    mixtral = {"model": "Mixtral 8x7B", "ep": ""}
    (case,) = layout(tmp_path, TRTLLM, **mixtral).cases
    assert (case.plan.pools[0].ep, case.plan.pools[0].expert_tp) == (1, 4)
    assert "experts is not stated" in reason(layout(tmp_path, TRTLLM, **mixtral, attn_dp=""))


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ({"model": "Llama 4 Scout"}, "chunked local attention"),
        ({"gpu": "GH200 480GB"}, "GH200"),
        ({"n_gpus": 8}, "not those of the devices"),
        ({"tokens_per_s_total": ""}, "no measured metric"),
        ({"model": "Mixtral 8x7B", "ep": 3}, "do not agree"),
    ],
)
def test_throughput_rows_that_cannot_be_mapped(tmp_path: Path, cells: Mapping[str, object], expected: str) -> None:
    assert expected in reason(layout(tmp_path, TRTLLM, **cells))


def test_splitwise_is_one_static_batch(tmp_path: Path) -> None:
    (case,) = layout(tmp_path, SPLITWISE).cases
    assert case.measured == {"ttft": 0.3, "tpot": 0.05, "e2e": 6.65}
    assert (len(case.workload.requests), case.plan.pools[0].policy, case.plan.gpus) == (4, "static", 4)


def test_splitwise_totals_of_generations_that_stopped_early_do_not_count(tmp_path: Path) -> None:
    (case,) = layout(tmp_path, SPLITWISE, e2e_time=2000.0).cases
    assert case.measured == {"ttft": 0.3, "tpot": 0.05}


def test_splitwise_rows_that_cannot_be_mapped(tmp_path: Path) -> None:
    assert "power-capped" in reason(layout(tmp_path, SPLITWISE, hardware="h100-80gb-pcap"))
    assert "known to be bad" in reason(layout(tmp_path, SPLITWISE, batch_size=64, tensor_parallel=2))


def test_replicas_of_an_apex_plan_share_the_arrivals(tmp_path: Path) -> None:
    rows = [{**APEX, "parallelism": name} for name in ("8TP", "2DP4TP_0", "2DP4TP_1")]
    whole, first, second = (case.workload.requests.arrival_s for case in read_layout(written(tmp_path, rows)).cases)
    assert len(whole) == len(first) + len(second)
    assert np.allclose(first, whole[0::2] - whole[0])
    assert np.allclose(second, whole[1::2] - whole[1])


def test_apex_rows(tmp_path: Path) -> None:
    (case,) = layout(tmp_path, APEX).cases
    assert case.labels["layout"] == "2 x TP4"
    assert case.plan.gpus == 4
    assert case.workload.requests.total_prompt_tokens == pytest.approx(37849, rel=0.01)
    assert "lone replica" in reason(layout(tmp_path, APEX, parallelism="4TP"))
    assert "no measured metric" in reason(layout(tmp_path, APEX, ttft_mean_s="", tpot_mean_s=""))
    assert "more replicas" in reason(layout(tmp_path, APEX, parallelism="2DP4TP_5"))


def test_a_file_of_requests_is_one_case(tmp_path: Path) -> None:
    rows = [REQUEST, {**REQUEST, "arrival_s": 2.0, "ttft_ms": 70.0, "tpot_ms": "", "e2e_ms": 370.0, "output_toks": 1}]
    (case,) = read_layout(written(tmp_path, rows)).cases
    assert case.row == "rows.csv"
    assert case.measured == {"ttft": pytest.approx(0.06), "tpot": pytest.approx(0.03), "e2e": pytest.approx(0.36)}
    assert case.workload.requests.arrival_s.tolist() == [0.0, 2.0]
    assert (case.plan.pools[0].max_seqs, case.plan.pools[0].token_budget) == (128, 2048)
    assert case.labels["mode"] == "eager"


def test_requests_of_two_runs_are_not_one(tmp_path: Path) -> None:
    assert "max_num_seqs differs" in reason(read_layout(written(tmp_path, [REQUEST, {**REQUEST, "max_num_seqs": 64}])))
    assert "ttft_ms is missing" in reason(layout(tmp_path, REQUEST, ttft_ms=""))
    assert "cannot be read" in reason(layout(tmp_path, REQUEST, arrival_s=-1))


@pytest.mark.parametrize(
    ("name", "rows", "unmapped"),
    [
        ("trtllm_throughput", 894, 150),
        ("splitwise_perf_model", 1260, 430),
        ("apex_plus", 48, 7),
        ("vllm_requests_rtxpro6000_llama-3.1-8b", 1, 0),
    ],
)
def test_every_row_of_the_reference_files_is_mapped_or_has_a_reason(name: str, rows: int, unmapped: int) -> None:
    path = REFERENCE / f"{name}.csv"
    if not path.exists():
        pytest.skip(f"no reference data at {path.name}")
    found = read_layout(path)
    assert len(found.cases) + len(found.unmapped) == rows
    assert len(found.unmapped) <= unmapped
    for case in found.cases:
        check_plan(case.plan)
