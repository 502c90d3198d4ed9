"""Attention and expert mappings over the same ranks: laws of the groups, closed forms, and what folding moves where."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.dispatch import Routed
from hwmodels.errors import MappingError
from hwmodels.folding import (
    Fold,
    all_to_all_bytes,
    expert_tp_elements,
    layer_exchange_s,
    layer_traffic,
    legal_folds,
    train,
    training_flops,
    training_memory,
)
from hwmodels.hardware import load_cluster
from hwmodels.huggingface import load_model
from hwmodels.shape import ModelShape

NAMES = ("tp", "cp", "dp", "pp", "etp", "ep", "edp", "dp-cp")


@cache
def model(name: str = "mixtral-8x7b") -> ModelShape:
    return load_model(name)


@cache
def folds(gpus: int, folded: bool) -> list[Fold]:
    return list(legal_folds(model(), gpus, folded=folded, max_cp=2))


any_fold = st.tuples(st.sampled_from((8, 16, 32, 64)), st.booleans(), st.integers(0, 10**6)).map(
    lambda drawn: folds(drawn[0], drawn[1])[drawn[2] % len(folds(drawn[0], drawn[1]))]
)


@given(any_fold, st.sampled_from(NAMES))
def test_law_groups_part_the_ranks(fold: Fold, name: str) -> None:
    """Every rank is in one group of each degree, and both mappings cover the same ranks of a stage."""
    groups = fold.groups(name)
    assert sorted(groups.ravel().tolist()) == list(range(fold.gpus))
    assert groups.shape[1] == (fold.dp * fold.cp if name == "dp-cp" else getattr(fold, name))
    if name != "pp":
        stage = groups // (fold.gpus // fold.pp)
        assert (stage == stage[:, :1]).all()


@given(any_fold)
def test_law_expert_groups_are_a_grid(fold: Fold) -> None:
    """Ranks that share experts and ranks that share parts of one meet in one rank at most."""
    etp, ep, edp = (fold.groups(name) for name in ("etp", "ep", "edp"))
    where = {name: {int(r): i for i, row in enumerate(rows) for r in row} for name, rows in
             (("etp", etp), ("ep", ep), ("edp", edp))}  # fmt: skip
    keys = {(where["etp"][r], where["ep"][r], where["edp"][r]) for r in range(fold.gpus)}
    assert len(keys) == fold.gpus
    for row in ep:
        assert len({where["etp"][int(r)] for r in row}) == fold.ep


@pytest.mark.parametrize("gpus", [8, 16, 64])
def test_law_every_coupled_mapping_is_legal_folded(gpus: int) -> None:
    """Folding only adds: every degree of a coupled mapping may be folded too."""
    folded = set(folds(gpus, True))
    assert {replace(fold, folded=True) for fold in folds(gpus, False)} <= folded
    assert len(folds(gpus, True)) == len(folded) > len(folds(gpus, False))


@settings(max_examples=40, deadline=None)
@given(any_fold, st.integers(1, 4096))
def test_theory_traffic_is_the_closed_form(fold: Fold, tokens: int) -> None:
    """Inside and between nodes together: 2 top_k tokens h bytes (EP - 1) / EP."""
    cluster, routed = load_cluster("h100-sxm", fold.gpus), Routed(4096, 2, 8, dispatch="bf16")
    found = layer_traffic(cluster, fold, tokens, routed)
    closed = all_to_all_bytes(tokens, 4096, 2, 2.0, fold.ep)
    assert found.inside_bytes + found.between_bytes == pytest.approx(closed)


def test_folding_brings_the_exchange_into_the_node() -> None:
    """TP 4, EP 8 on 64 devices: coupled expert ranks are four apart and meet in one node by twos only."""
    cluster, routed = load_cluster("h100-sxm", 64), Routed(6144, 2, 8, dispatch="bf16")
    coupled = Fold(tp=4, dp=16, etp=4, ep=8, edp=2, folded=False)
    folded = Fold(tp=4, dp=16, etp=1, ep=8, edp=8)
    assert coupled.groups("ep")[0].tolist() == [0, 4, 8, 12, 16, 20, 24, 28]
    assert folded.groups("ep")[0].tolist() == list(range(8))
    apart, together = (layer_traffic(cluster, fold, 1024, routed) for fold in (coupled, folded))
    assert together.between_bytes == 0
    assert apart.between_bytes == pytest.approx(6 / 7 * (apart.between_bytes + apart.inside_bytes))
    slow, gathered = layer_exchange_s(cluster, coupled, 1024, routed)
    fast, none = layer_exchange_s(cluster, folded, 1024, routed)
    assert none == 0 < gathered
    assert fast.total_s < slow.total_s / 2


def test_closed_forms() -> None:
    assert all_to_all_bytes(10, 100, 2, 2.0, 4) == 2 * 2 * 10 * 100 * 2 * 3 / 4
    assert all_to_all_bytes(10, 100, 2, 2.0, 1) == 0
    assert expert_tp_elements(10, 100, 4) == 3000


def test_training_flops_are_six_per_parameter_and_token() -> None:
    """And attention: 12 s h per token and layer halved by the mask (PaLM, arXiv:2204.02311, appendix B)."""
    shape, sequence = model(), 4096
    weights = shape.active_parameters - shape.vocab * shape.hidden
    attention = 6.0 * len(shape.layers) * (sequence + 1) * 32 * 128
    assert training_flops(shape, sequence, 3) == pytest.approx(3 * sequence * (6 * weights + attention))


def test_memory_of_states_without_activations() -> None:
    """18 bytes a parameter over all ranks; a short sequence leaves hardly anything else."""
    shape = model()
    fold = Fold(dp=64, ep=8, edp=8)
    found = training_memory(shape, fold, 16, recompute=True, sharded=True)
    assert found == pytest.approx(18 * shape.parameters / 64, rel=0.25)
    alone = training_memory(shape, Fold(), 16, recompute=True, sharded=False)
    assert alone == pytest.approx(18 * shape.parameters, rel=0.01)


@settings(max_examples=30, deadline=None)
@given(any_fold, st.sampled_from((64, 128)))
def test_law_training_is_never_faster_than_its_arithmetic(fold: Fold, batch: int) -> None:
    cluster = load_cluster("h100-sxm", fold.gpus)
    found = train(model(), cluster, fold, sequence=4096, batch=batch)
    if found is None:
        assert training_memory(model(), fold, 4096, recompute=True, sharded=False) > 0.9 * cluster.device.memory_bytes
        return
    assert 0 < found.mfu < 1
    assert min(found.parts.values()) >= 0
    assert found.step_s == pytest.approx(sum(found.parts.values()))
    assert found.memory_bytes <= 0.9 * cluster.device.memory_bytes


def test_law_interleaving_shrinks_the_bubble() -> None:
    cluster, fold = load_cluster("h100-sxm", 64), Fold(tp=2, dp=8, pp=4, ep=8, edp=2)
    plain, cut = (train(model(), cluster, fold, sequence=4096, batch=128, interleave=v) for v in (1, 4))
    assert plain is not None
    assert cut is not None
    assert cut.parts["bubble"] == pytest.approx(plain.parts["bubble"] / 4)
    assert cut.parts["stage transfer"] > plain.parts["stage transfer"]


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        ({"tp": 2}, "expected equal products"),
        ({"tp": 0}, "expected each at least 1"),
        ({"tp": 2, "ep": 2, "folded": False}, "expected etp = tp"),
        ({"tp": 2, "etp": 2, "dp": 2, "ep": 2, "edp": 2, "folded": False}, "expected equal products"),
    ],
)
def test_bad_folds_are_told(degrees: dict[str, int], message: str) -> None:
    with pytest.raises(MappingError, match=message):
        Fold(**degrees)  # type: ignore[arg-type]


def test_bad_questions_are_told() -> None:
    with pytest.raises(MappingError, match="rank group 'xp'"):
        Fold().groups("xp")
    with pytest.raises(MappingError, match="has no experts"):
        list(legal_folds(load_model("llama-3-8b"), 8))
    with pytest.raises(MappingError, match="expected multiples"):
        train(model(), load_cluster("h100-sxm", 8), Fold(dp=8, edp=8), sequence=4096, batch=12)
    with pytest.raises(MappingError, match="expected no more"):
        train(model(), load_cluster("h100-sxm", 4), Fold(dp=8, edp=8), sequence=4096, batch=16)


def test_groups_of_a_small_case() -> None:
    """TP 2, CP 1, DP 4: coupled EP 2 takes every second rank of neighbouring pairs, folded ETP 1 EP 4 the next four."""
    coupled = Fold(tp=2, dp=4, etp=2, ep=2, edp=2, folded=False)
    assert coupled.groups("ep").tolist() == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert coupled.groups("edp").tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    folded = Fold(tp=2, dp=4, ep=4, edp=2)
    assert folded.groups("ep").tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert np.array_equal(folded.groups("tp"), coupled.groups("tp"))
