"""Timings that say nothing of experts at work are found by what they show, and no others."""

import numpy as np
import pandas as pd
import pytest

from hwmodels.hardware import load_device
from hwmodels.kernels.moe_sound import doubtful, sound

DEVICE = load_device("h200-sxm")
BLOCK = {"hidden": 4096, "intermediate": 2048, "experts": 256, "top_k": 8, "gated": 1}
TOKENS = (8, 32, 64, 128, 512, 4096, 16384)
EPS = (1, 2, 4, 8, 32)
UNTUNED = "slower than 16-bit experts"
LIMITED = "called balanced but on half of the experts"
UNCUT = "called one rank but not cut"


def timed(dtype="bf16", software="vllm 0.24.0", kernel="grouped", *, slower=1.0, share=lambda ep: 1 / ep, half=False):
    """Rows of a perfect kernel: reading or computing, whichever takes longer, and a launch.

    share   of all routed rows that the rank of an ep gets under balanced routing
    half    whether only half of the experts are ever chosen
    """
    width = {"bf16": 2.0, "fp8": 1.0}[dtype]
    peak, memory = DEVICE.peak_flops_per_s[dtype], DEVICE.memory_bytes_per_s
    matrix = 3 * BLOCK["hidden"] * BLOCK["intermediate"]
    rows = []
    for ep in EPS:
        for tokens in TOKENS:
            for distribution in ("balanced", "power_law_1.01"):
                mine = share if distribution == "balanced" else (lambda ep: 1 / ep)
                routed = tokens * BLOCK["top_k"] * mine(ep)
                here = BLOCK["experts"] / ep
                if half and distribution == "balanced":
                    here = min(here, BLOCK["experts"] / 2)
                read_s = min(routed, here) * matrix * width / memory
                seconds = 1e-5 + slower * max(read_s, 2 * routed * matrix / peak)
                rows.append(
                    {**BLOCK, "tp": 1, "ep": ep, "tokens": tokens, "distribution": distribution, "dtype": dtype,
                     "kernel": kernel, "software": software, "seconds": seconds}
                )  # fmt: skip
    return pd.DataFrame(rows)


def limited_share(ep):
    """Of 8 choices one falls on each of the first 4 groups of 32 experts and 4 on the first experts of all."""
    return 1.0 if ep <= 2 else (4 * 2 / ep + 4) / 8


def test_even_kernels_are_all_sound():
    rows = pd.concat([timed(), timed("fp8"), timed(software="sglang 0.5.14"), timed("fp8", "sglang 0.5.14")])
    assert doubtful(rows, DEVICE) == {}
    assert len(sound(rows, DEVICE)) == len(rows)


@pytest.mark.parametrize("slower", [2.5, 4.0])
def test_quantised_experts_slower_than_wide_ones_were_not_tuned(slower):
    # Half the bytes at `slower` the time a byte: slower / 2 of the 16-bit time where reading decides.
    rows = pd.concat([timed(), timed("fp8", slower=slower)], ignore_index=True)
    found = doubtful(rows, DEVICE)
    if slower / 2 > 1.5:
        assert found[UNTUNED].tolist() == (rows["dtype"] == "fp8").tolist()
    else:
        assert UNTUNED not in found


def test_without_wide_experts_of_the_engine_nothing_is_untuned():
    rows = pd.concat([timed(software="sglang 0.5.14"), timed("fp8", slower=5)], ignore_index=True)
    assert UNTUNED not in doubtful(rows, DEVICE)


def test_an_older_kernel_goes_with_the_newest_but_not_before_it():
    older, newest = timed("fp8", "vllm 0.19.0", "triton"), timed("fp8", "vllm 0.24.0", "cutlass", slower=5)
    rows = pd.concat([timed(), older, newest], ignore_index=True)
    assert set(sound(rows, DEVICE)["dtype"]) == {"bf16"}
    older, newest = timed("fp8", "vllm 0.9.2", "triton", slower=5), timed("fp8", "vllm 0.24.0", "cutlass")
    kept = sound(pd.concat([timed(), older, newest], ignore_index=True), DEVICE)
    assert set(kept.loc[kept["dtype"] == "fp8", "kernel"]) == {"cutlass"}


def test_limited_routing_of_ties_is_found_and_its_one_rank_power_law_kept():
    rows = pd.concat(
        [timed(software="sglang 0.5.14", share=limited_share, half=True), timed(software="vllm 0.24.0")],
        ignore_index=True,
    )
    found = doubtful(rows, DEVICE)
    assert set(found) == {LIMITED}
    theirs = (rows["software"] == "sglang 0.5.14") & ((rows["ep"] > 1) | (rows["distribution"] == "balanced"))
    assert np.array_equal(found[LIMITED], theirs)


def test_limited_routing_is_found_across_the_kernels_an_engine_chooses_between():
    rows = timed(share=limited_share, half=True).assign(
        kernel=lambda r: np.where(r["tokens"] > 256, "cutlass", "triton")
    )
    assert doubtful(rows, DEVICE)[LIMITED].any()


def test_a_rank_with_the_rows_of_all_is_found():
    rows = pd.concat([timed(share=lambda ep: 1.0), timed(software="sglang 0.5.14")], ignore_index=True)
    found = doubtful(rows, DEVICE)
    assert set(found) == {UNCUT}
    assert np.array_equal(found[UNCUT], (rows["software"] == "vllm 0.24.0") & (rows["ep"] > 1))


def test_no_row_has_two_reasons():
    rows = pd.concat([timed(), timed("fp8", slower=5, share=lambda ep: 1.0)], ignore_index=True)
    found = list(doubtful(rows, DEVICE).values())
    assert len(found) >= 1
    assert np.sum(found, axis=0).max() == 1


@pytest.mark.parametrize("rows", [timed().iloc[:0], timed("fp8").iloc[:3]])
def test_few_rows_are_no_evidence(rows):
    assert doubtful(rows, DEVICE) == {}


def test_the_wheels_timings_of_deepseeks_block():
    pytest.importorskip("aiconfigurator_core", reason="needs the extra 'silicon'")
    from hwmodels.kernels.aiconfigurator import open_wheel

    rows = open_wheel().read("h200-sxm", "vllm", "moe")
    found = doubtful(rows, DEVICE)
    limited = rows[found[LIMITED]]
    assert set(limited["software"]) == {"vllm 0.24.0"}
    assert set(map(tuple, limited[["hidden", "intermediate", "experts", "top_k"]].to_numpy())) == {(7168, 2048, 256, 8)}
    assert set(rows[found[UNTUNED]]["dtype"]) == {"fp8", "int4"}
    assert not (sound(rows, DEVICE)["dtype"] == "fp8").any()
