"""Experts that are not all on devices: memory of device and host, laws, plan files."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from hwmodels.errors import MappingError, OutOfMemoryError, ShardwiseError
from hwmodels.expertoffload import cpu_expert_s, expert_bytes
from hwmodels.mapping import Mapping, Precision
from hwmodels.yamlfiles import PROFILES
from planner.catalogue import Catalogue, open_catalogue
from planner.errors import PlanError
from planner.export import export
from planner.offloadchoices import largest_cache
from planner.offloading import BUFFERS, Away, host_of
from planner.plan import Plan, Pool
from planner.planfile import check_plan, read_plan, write_plan

EACH = 3 * 4096 * 14336 * 2  # an expert of Mixtral in bf16, bytes
SMALL = Pool(1, max_seqs=8, token_budget=512, max_context_tokens=4096, expert_cache=0.15)


@cache
def shop(model: str = "mixtral-8x7b", hardware: str = "rtx-4090", gpus: int = 1) -> Catalogue:
    return open_catalogue(model, hardware, gpus, "vllm")


def plan(pool: Pool = SMALL, **changes: object) -> Plan:
    return replace(Plan("mixtral-8x7b", "rtx-4090", pool.gpus, (pool,)), **changes)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_the_device_holds_the_cache_and_two_buffers() -> None:
    own = shop()
    whole, part = own.memory(replace(SMALL, expert_cache=None)), own.memory(SMALL)
    assert whole.weights_bytes - part.weights_bytes == pytest.approx(0.85 * 256 * EACH - BUFFERS * EACH)
    assert whole.kv_blocks < 0 < part.kv_blocks
    nearly = own.memory(replace(SMALL, expert_cache=0.999))  # a quarter of an expert is away: no room for two
    assert nearly.weights_bytes == pytest.approx(whole.weights_bytes)


def test_ranks_and_stages_have_their_parts() -> None:
    """Of two stages the fuller one keeps half of the experts, of two ranks each half of every one."""
    whole = shop(gpus=2).memory(Pool(1, pp=2)).weights_bytes
    part = shop(gpus=2).memory(Pool(1, pp=2, expert_cache=0.5)).weights_bytes
    assert whole - part == pytest.approx(0.5 * 128 * EACH - BUFFERS * EACH)
    whole = shop(gpus=2).memory(Pool(1, tp=2, expert_tp=2)).weights_bytes
    part = shop(gpus=2).memory(Pool(1, tp=2, expert_tp=2, expert_cache=0.5)).weights_bytes
    assert whole - part == pytest.approx((0.5 * 256 - BUFFERS) * EACH / 2)


def test_the_largest_cache_fits_and_a_hundredth_more_does_not() -> None:
    found = largest_cache(shop(), SMALL, 4096)
    more = replace(SMALL, expert_cache=found + 0.01)
    assert shop().memory(replace(SMALL, expert_cache=found)).kv_blocks * 16 >= 4096
    assert shop().memory(more).kv_blocks * 16 < 4096


def test_the_host_holds_the_experts_or_disks_do(tmp_path: Path) -> None:
    """Mixtral's 32 layers of 8 experts are 84 GiB, and this host has 64."""
    small = tmp_path / "host.yaml"
    text = (PROFILES / "hardware" / "xeon-8592.yaml").read_text("utf-8")
    small.write_text(text.replace("memory_gib: 1024.0", "memory_gib: 64"), "utf-8")
    own = plan(replace(SMALL, host=str(small)))
    with pytest.raises(OutOfMemoryError, match=r"84 GiB of experts for the 1 device.*has 64.*ssd_gb_per_s"):
        shop().deployment(own)
    models = [shop().deployment(replace(own, ssd_gb_per_s=speed)).replicas[0].model for speed in (3.0, 12.0)]
    slow_s, fast_s, all_s = (one.step_s(1, 1000, []) for one in (*models, shop().replica(SMALL).model))
    assert slow_s > fast_s > all_s


def test_devices_share_their_host() -> None:
    """Eight at hand: an eighth of the memory each, so that one replica alone must hold all experts in that."""
    with pytest.raises(OutOfMemoryError, match=r"4872 GiB of experts for the 8 device"):
        shop("deepseek-v3", "h200-sxm", 8).check(Mapping(), Precision("fp8", "fp8"), Away(0.1))
    host = host_of(shop(gpus=4).cluster, Mapping(tp=2, expert_tp=2), Away(0.5, None, 8))
    alone = host_of(shop(gpus=1).cluster, Mapping(), Away(0.5, None, 16))
    assert (host.threads, host.memory_bytes) == (16, alone.memory_bytes / 4)
    both_s = [float(cpu_expert_s(shop().model, "bf16", np.array([1.0]), one)[0]) for one in (host, alone)]
    assert both_s[0] == pytest.approx(2 * both_s[1] * (16 * 10.8e9) / (0.85 * 358e9), rel=0.01)


# --- laws -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "mapping", "away", "told"),
    [
        ("llama-3-8b", Mapping(), Away(0.5), "has none"),
        ("mixtral-8x7b", Mapping(tp=2, ep=2), Away(0.5), "ep=2.*expected all 1"),
        ("mixtral-8x7b", Mapping(), Away(0.5, ("fp8", "int4")), "expected bf16, the experts' format"),
        ("mixtral-8x7b", Mapping(), Away(0.5, None, 9), "at most 8, xeon-8592 has 64 cores"),
        ("mixtral-8x7b", Mapping(), Away(0.5, None, 0, "l4"), "profile of a processor"),
    ],
)
def test_what_cannot_be_served_is_told(model: str, mapping: Mapping, away: Away, told: str) -> None:
    with pytest.raises(PlanError, match=told):
        shop(model, gpus=8).check(mapping, Precision(), away)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"expert_cache": 0.0}, "expert_cache is 0.0, expected a part of the experts above 0 and at most 1"),
        ({"expert_cache": 1.5}, "expert_cache is 1.5"),
        ({"expert_cache": None, "cpu_threads": 4}, "cpu_threads is 4, expected 0 without expert_cache"),
        ({"expert_cache": None, "expert_ladder": ("bf16", "int4")}, "expected None without expert_cache"),
        ({"expert_ladder": ("bf16",)}, "expected two of fp32"),
        ({"expert_ladder": ("bf16", "int3")}, "expected two of fp32"),
        ({"expert_ladder": ("int4", "bf16")}, "expected bf16, the experts' format, and then a narrower one"),
        ({"experts": "fp8", "expert_ladder": ("bf16", "int4")}, "expected fp8"),
        ({"cpu_threads": -1}, "cpu_threads is -1"),
        ({"host": ""}, "host is ''"),
        ({"tp": 2, "ep": 2}, "ep is 2, expected 1 with expert_cache"),
        ({"attention_dp": 2, "expert_tp": 2}, "attention_dp is 2, expected 1"),
        ({"sharing": "static", "shares": (0.5, 0.5)}, "sharing is 'static'"),
    ],
)
def test_plans_that_contradict_themselves_are_told(changes: dict[str, object], told: str) -> None:
    with pytest.raises(PlanError, match=told):
        check_plan(plan(replace(SMALL, **changes)))


def test_plan_files_keep_the_fields(tmp_path) -> None:
    own = plan(replace(SMALL, expert_ladder=("bf16", "int4"), cpu_threads=8, host="xeon-8592"))
    write_plan(own, tmp_path / "plan.yaml")
    assert read_plan(tmp_path / "plan.yaml") == own
    (tmp_path / "bad.yaml").write_text(
        "{model: mixtral-8x7b, hardware: rtx-4090, gpus: 1, pools: [{replicas: 1, expert_ladder: bf16}]}"
    )
    with pytest.raises(PlanError, match=r"expert_ladder is 'bf16', expected two weight formats such as \[bf16, int4\]"):
        read_plan(tmp_path / "bad.yaml")


@pytest.mark.parametrize("engine", ["vllm", "sglang", "tensorrt-llm", "dynamo"])
def test_engines_without_such_a_cache_are_told_apart(engine: str) -> None:
    with pytest.raises(PlanError, match=r"expert_cache is 0.15, expected null: .*MoE-Infinity.*KTransformers"):
        export(plan(), engine)


def test_sharing_a_device_leaves_no_experts_away() -> None:
    pool = replace(SMALL, sharing="static", shares=(0.5, 0.5))
    with pytest.raises(ShardwiseError, match="with expert_cache: expected one of them"):
        shop().replica(pool)
    with pytest.raises(MappingError):
        shop().check(Mapping(tp=3), Precision(), Away(0.5))
    assert expert_bytes(shop().model, "bf16") == EACH
