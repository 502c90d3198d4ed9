"""Plans and numbers in words: the examples in the docstrings, and what they promise."""

import doctest
from dataclasses import replace

import ui.words
from planner.expertbalance import Balance
from planner.plan import Plan, Pool
from ui.words import balance, cut, in_short, in_words, kept, maps_of_engine, percent, seconds


def test_examples():
    assert doctest.testmod(ui.words).failed == 0


def test_a_mixture_with_idle_devices():
    pools = (Pool(2, tp=4), Pool(1, attention_dp=2, ep=2, weights="fp8", max_seqs=64))
    plan = Plan("m", "h", 12, pools)
    assert in_short(plan) == "2 x tp=4 + 1 x tp=1 attention_dp=2 ep=2"
    assert in_words(plan).startswith(
        "2 replicas of tp=4 (chunked, up to 256 sequences and 2048 tokens a step, bf16) + 1"
    )
    assert in_words(plan).endswith("on 10 of 12 GPUs; 2 idle")
    assert cut(pools[0]) == "tp=4"
    assert kept(pools[1]) == "fp8 weights, bf16 activations, bf16 KV"


def test_placements_that_the_engine_does_not_start_from():
    placed, ordered = (Balance(0, how, None, 4, 0, 1.5, 1.1) for how in ("placed", "order"))
    for engine in ("vllm", "vllm-0.6"):
        assert "vLLM 0.12 starts with experts in order" in (maps_of_engine([ordered, placed], engine) or "")
        assert maps_of_engine([ordered], engine) is None
        assert maps_of_engine([], engine) is None
    assert maps_of_engine([placed], "sglang") is maps_of_engine([placed], "tensorrt-llm") is None


def test_without_routing_no_gain_is_told():
    found = Balance(0, "map", "map.json", 4, 4, 1.0, 1.25)
    assert balance(found, 1, "counts.json").endswith("busiest rank 1.00x -> 1.25x the mean.")
    halved = replace(found, ranks=16, even_for=8)
    assert balance(halved, 1, "counts.json").endswith("even over 8 ranks, for which it may have been made, not for 16.")
    assert balance(found, 1, "") == (
        "Experts as in map.json, 4 redundant. No routing is recorded (--routing): tokens choose all experts alike, "
        "which gives the busiest rank 1.25x the mean."
    )


def test_what_does_not_exist_is_a_dash():
    assert {seconds(float("nan")), seconds(float("inf")), percent(None)} == {"-"}
