"""Plans and numbers in words: the examples in the docstrings, and what they promise."""

import doctest

import ui.words
from planner.plan import Plan, Pool
from ui.words import cut, in_short, in_words, kept, percent, seconds


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


def test_what_does_not_exist_is_a_dash():
    assert {seconds(float("nan")), seconds(float("inf")), percent(None)} == {"-"}
