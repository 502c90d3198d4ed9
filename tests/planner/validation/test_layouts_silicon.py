"""AIConfigurator's serving rows: ranks, formats, clients and reasons, on rows written here; counts on the real file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels.errors import MeasurementError
from hwmodels.hardware import cluster_names, device_names
from hwmodels.huggingface import model_names
from planner.planfile import check_plan
from planner.validation.case import Case, Unmapped
from planner.validation.layouts import names
from planner.validation.layouts.clients import closed_loop
from planner.validation.layouts.names import model_named
from planner.validation.layouts.rows import Unmappable
from planner.validation.read import read_layout

SILICON = Path(__file__).resolve().parents[4] / "shared" / "reference" / "serving" / "silicon.csv"
ROW = {
    "id": "a",
    "silicon_data_source": "source_file=2026-04-06.csv; silicon_concurrency=16; wip=False",
    "backend": "vllm",
    "backend_version": "0.19.0",
    "model_path": "Qwen/Qwen3-32B",
    "system": "h100_sxm",
    "precision": "bf16",
    "mode": "agg",
    "isl": 1024,
    "osl": 128,
    "gemm_quant_mode": "",
    "batch_size": 16,
    "tp_size": 2,
    "pp_size": 1,
    "attention_dp_size": 1,
    "moe_tp_size": 1,
    "moe_ep_size": 1,
    "silicon_ttft_ms": 154.0,
    "silicon_tpot_ms": 16.5,
}
COLUMNS = list(ROW)
DEEPSEEK = {"model_path": "deepseek-ai/DeepSeek-R1", "precision": "fp8", "backend": "trtllm", "system": "h200_sxm"}


def one(folder: Path, **cells: object) -> Case | Unmapped:
    """What the reader makes of a single row."""
    row = {**ROW, **cells}
    path = folder / "rows.csv"
    path.write_text(",".join(COLUMNS) + "\n" + ",".join(str(row[column]) for column in COLUMNS) + "\n")
    layout = read_layout(path)
    (found,) = (*layout.cases, *layout.unmapped)
    return found


def mapped(folder: Path, **cells: object) -> Case:
    found = one(folder, **cells)
    assert isinstance(found, Case), found
    check_plan(found.plan)
    return found


def reason(folder: Path, **cells: object) -> str:
    found = one(folder, **cells)
    assert isinstance(found, Unmapped), found
    return found.reason


def ranks(case: Case) -> tuple[int, int, int, int]:
    pool = case.plan.pools[0]
    return pool.tp, pool.attention_dp, pool.ep, pool.expert_tp


def test_a_row_is_a_plan_a_client_and_two_metrics(tmp_path: Path) -> None:
    case = mapped(tmp_path)
    assert (case.plan.model, case.plan.hardware, case.plan.gpus, case.plan.engine) == (
        "qwen3-32b",
        "hgx-h100",
        2,
        "vllm",
    )
    assert case.measured == {"ttft": pytest.approx(0.154), "tpot": pytest.approx(0.0165)}
    assert case.labels["layout"] == "TP2"
    assert case.labels["concurrency"] == "16"
    assert case.workload.concurrency == 16


@given(st.integers(1, 40))
def test_the_client_asks_ten_times_its_concurrency_and_at_least_16(concurrency: int) -> None:
    requests = closed_loop(1000, 500, concurrency).requests
    assert len(requests) == max(16, 10 * concurrency)
    assert requests.prompt_tokens.min() >= 800
    assert requests.prompt_tokens.max() <= 1000
    assert requests.output_tokens.min() >= 400
    assert requests.output_tokens.max() <= 500
    assert not requests.arrival_s.any()


def test_the_same_traffic_is_the_same_requests(tmp_path: Path) -> None:
    """Layouts that one could choose between are served the same requests."""
    first, again = (mapped(tmp_path, id=name).workload.requests for name in ("a", "b"))
    other = mapped(tmp_path, id="a", isl=2048).workload.requests
    assert np.array_equal(first.prompt_tokens, again.prompt_tokens)
    assert len(set(first.prompt_tokens)) > 5
    assert not np.array_equal(first.prompt_tokens * 2, other.prompt_tokens)


def test_sglangs_other_client_than_inferencex_asks_for_fixed_lengths(tmp_path: Path) -> None:
    source = "source_file=/Users/x/aic-auto-gap-analysis/data/h100_sxm/sglang/0.5.1/m.csv; silicon_concurrency=16"
    requests = mapped(tmp_path, silicon_data_source=source, backend="sglang").workload.requests
    assert set(requests.prompt_tokens) == {1024}
    assert set(requests.output_tokens) == {128}


def test_without_a_stated_concurrency_it_is_that_of_all_attention_groups(tmp_path: Path) -> None:
    cells = {**DEEPSEEK, "silicon_data_source": "source_file=x", "batch_size": 4, "tp_size": 1, "attention_dp_size": 8}
    assert mapped(tmp_path, **cells, moe_ep_size=8).workload.concurrency == 32


@pytest.mark.parametrize(
    ("tp", "groups", "moe_tp", "moe_ep", "expected"),
    [
        (8, 1, 8, 1, (8, 1, 1, 8)),  # experts cut
        (8, 1, 1, 8, (8, 1, 8, 1)),  # experts whole
        (1, 8, 1, 8, (1, 8, 8, 1)),  # attention groups
        (64, 1, 8, 8, (8, 1, 8, 1)),  # exported with n * n ranks
        (1, 64, 8, 8, (1, 8, 8, 1)),
        (8, "", 8, "", (8, 1, 1, 8)),
    ],
)
def test_ranks(tmp_path: Path, tp: int, groups: int, moe_tp: int, moe_ep: int, expected: tuple[int, ...]) -> None:
    cells = {"tp_size": tp, "attention_dp_size": groups, "moe_tp_size": moe_tp, "moe_ep_size": moe_ep}
    assert ranks(mapped(tmp_path, **DEEPSEEK, **cells)) == expected


def test_vllm_rows_of_n_ranks_n_groups_and_n_squared_experts_are_one_group(tmp_path: Path) -> None:
    cells = {"model_path": "MiniMaxAI/MiniMax-M2.5", "precision": "fp8", "tp_size": 4, "attention_dp_size": 4}
    assert ranks(mapped(tmp_path, **cells, moe_ep_size=16)) == (4, 1, 4, 1)


def test_squares_of_other_sources_are_what_they_say(tmp_path: Path) -> None:
    source = "source_file=/Users/x/aic-auto-gap-analysis/data/h100_sxm/trtllm/1/m.csv; silicon_concurrency=16"
    cells = {"model_path": "Qwen/Qwen3-235B-A22B-FP8", "precision": "fp8", "silicon_data_source": source}
    assert ranks(mapped(tmp_path, **cells, tp_size=4, moe_tp_size=2, moe_ep_size=2)) == (4, 1, 2, 2)


@pytest.mark.parametrize(
    ("model", "precision", "system", "expected"),
    [
        ("deepseek-ai/DeepSeek-V3", "fp8", "h200_sxm", ("fp8_block", "fp8", None)),
        ("deepseek-ai/DeepSeek-V3", "fp4", "b200_sxm", ("fp8", "fp8", "fp4")),
        ("openai/gpt-oss-120b", "fp4", "h100_sxm", ("bf16", "bf16", "mxfp4")),
        ("openai/gpt-oss-120b", "fp4", "b200_sxm", ("bf16", "bf16", "mxfp4_fp8")),
        ("moonshotai/Kimi-K2.5", "int4", "h200_sxm", ("bf16", "bf16", "int4")),
        ("meta-llama/Llama-3.1-70B", "fp8", "h100_sxm", ("fp8", "fp8", None)),
        ("meta-llama/Llama-3.1-70B", "fp4", "b200_sxm", ("fp4", "fp4", None)),
        ("meta-llama/Llama-3.1-70B", "", "h100_sxm", ("bf16", "bf16", None)),
    ],
)
def test_formats(tmp_path: Path, model: str, precision: str, system: str, expected: tuple[str | None, ...]) -> None:
    cells = {"tp_size": 8, "moe_tp_size": 8, "system": system, "precision": precision, "model_path": model}
    pool = mapped(tmp_path, **cells).plan.pools[0]
    assert (pool.weights, pool.activations, pool.experts) == expected


def test_kv_format_follows_the_launch_scripts(tmp_path: Path) -> None:
    minimax = {"model_path": "MiniMaxAI/MiniMax-M2.5", "precision": "fp8", "system": "b200_sxm", "moe_tp_size": 2}
    newer, older = (
        mapped(tmp_path, **minimax, backend_version=version).plan.pools[0] for version in ("0.19.0", "0.17.0")
    )
    assert (newer.kv, newer.token_budget) == ("fp8", 2048)
    assert (older.kv, older.token_budget) == ("bf16", 8192)


def test_whole_prompts_fit_a_step_with_what_they_grew_to(tmp_path: Path) -> None:
    for backend in ("trtllm", "sglang"):
        pool = mapped(tmp_path, backend=backend, isl=8192, osl=1024, model_path="meta-llama/Llama-3.1-8B").plan.pools[0]
        assert pool.policy in {"orca", "prefill-first"}
        assert pool.token_budget >= 8192 + 1024


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ({"mode": "disagg"}, "disaggregated"),
        ({"model_path": "zhipuai/GLM-5"}, "sparse attention"),
        ({"model_path": "Qwen/Qwen3.5-397B-A17B"}, "linear attention"),
        ({"model_path": "nobody/knows"}, "no shipped profile"),
        ({"system": "abacus"}, "no shipped profile"),
        ({"backend": "llama.cpp"}, "engine has no shipped profile"),
        ({"precision": "fp3"}, "number format"),
        ({"precision": "fp4"}, "FP4 arithmetic"),
        ({"tp_size": 3}, "tp divides the attention heads"),
        ({"tp_size": ""}, "tp_size is missing"),
        ({"tp_size": "two"}, "tp_size is not a number"),
        ({"tp_size": 1.5}, "tp_size is not a whole number"),
        ({"silicon_ttft_ms": -1}, "not positive"),
        ({"silicon_ttft_ms": "", "silicon_tpot_ms": ""}, "no measured metric"),
        ({"attention_dp_size": 2}, "attention groups of a dense model"),
        ({**DEEPSEEK, "tp_size": 8, "moe_tp_size": 3}, "do not agree"),
    ],
)
def test_rows_that_cannot_be_mapped_say_why_without_numbers(
    tmp_path: Path, cells: dict[str, object], expected: str
) -> None:
    told = reason(tmp_path, **cells)
    assert expected in told
    assert "1.5" not in told


def test_one_could_choose_between_rows_that_differ_in_layout_only(tmp_path: Path) -> None:
    small, large = mapped(tmp_path, tp_size=2), mapped(tmp_path, tp_size=4)
    assert small.choice == large.choice
    assert small.labels["layout"] != large.labels["layout"]
    assert mapped(tmp_path, isl=2048).choice != small.choice


def test_filters_choose_rows_by_label(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    lines = [",".join(COLUMNS)]
    for name, system in (("a", "h100_sxm"), ("b", "h200_sxm"), ("c", "b200_sxm")):
        lines.append(",".join(str({**ROW, "id": name, "system": system}[column]) for column in COLUMNS))
    path.write_text("\n".join(lines) + "\n")
    assert [case.row for case in read_layout(path, "system=H100_SXM|b200_sxm, mode=agg").cases] == ["a", "c"]
    assert read_layout(path, "mode=disagg").cases == ()
    with pytest.raises(MeasurementError, match=r"filter colour=red: expected a label among .*system"):
        read_layout(path, "colour=red")
    with pytest.raises(MeasurementError, match="expected label=value"):
        read_layout(path, "system")


@pytest.mark.skipif(not SILICON.exists(), reason=f"no reference data at {SILICON.name}")
def test_every_row_of_the_reference_file_is_mapped_or_has_a_reason() -> None:
    layout = read_layout(SILICON)
    assert len(layout.cases) + len(layout.unmapped) == 2459
    assert sum(row.labels["mode"] == "agg" for row in layout.unmapped) < 240
    for case in layout.cases:
        check_plan(case.plan)
        assert case.plan.gpus <= 8
        assert set(case.measured) == {"ttft", "tpot"}


@pytest.mark.parametrize(
    ("published", "profile"),
    [
        ("nvidia/DeepSeek-V3-0324-FP4", "deepseek-v3"),
        ("nvidia/DeepSeek-V3.1-NVFP4", "deepseek-v3"),
        ("deepseek-ai/DeepSeek-R1-0528", "deepseek-r1"),
        ("moonshotai/Kimi-K2-0905", "kimi-k2"),
        ("kimik2.5", "kimi-k2.5"),
        ("LLaMA v3 70B", "llama-3-70b"),
        ("llama3.1-8b", "llama-3.1-8b"),
        ("llama2-70b-99.9", "llama-2-70b"),
        ("GPT-OSS 20B", "gpt-oss-20b"),
    ],
)
def test_names_of_models(published: str, profile: str) -> None:
    assert model_named(published).profile == profile


@pytest.mark.parametrize("published", ["DeepSeek-V3.2", "GLM-5-FP8", "Qwen3.5-397B", "Llama 4 Maverick", "gpt-2"])
def test_models_without_a_shape(published: str) -> None:
    with pytest.raises(Unmappable):
        model_named(published)


def test_every_name_means_a_shipped_profile() -> None:
    models = [model.profile for _, model in names._MODELS if model.profile]
    systems = [system.cluster for _, system in names._SYSTEMS if isinstance(system, names.System)]
    assert set(models) <= set(model_names())
    assert set(systems) <= {*cluster_names(), *device_names()}
