"""Routing statistics and their readers: laws of shares, every format of a recording, and bad input in one line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels.huggingface import load_model
from hwmodels.routing import RoutingError, RoutingStats, mixed, mixture_of, rank_shares, uniform
from hwmodels.routingfiles import read_routing, read_windows

DEEPSEEK, MIXTRAL = load_model("deepseek-v3"), load_model("mixtral-8x7b")
MOE = list(range(3, 61))


def counts(layers: int, experts: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(50, 100, size=(layers, experts)).astype(float)


def deepseek_counts(seed: int = 0) -> np.ndarray:
    """All 61 layers, the dense three zero."""
    table = counts(61, 256, seed)
    table[:3] = 0
    return table


def written(path: Path, content: object) -> Path:
    text = json.dumps(content).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def stats(loads: object, **changes: object) -> RoutingStats:
    values: dict = {"model": "m", "layers": (1, 2), "loads": loads, "top_k": 1, "source": "here"} | changes
    return RoutingStats(**values)


# Statistics


@given(st.integers(1, 5), st.integers(2, 12), st.integers(0, 1000))
def test_shares_sum_to_one_and_inclusion_to_top_k(layers: int, experts: int, seed: int) -> None:
    loads = counts(layers, experts, seed)
    some = RoutingStats("m", tuple(range(layers)), loads, 1, "drawn")
    assert some.shares.sum(axis=1) == pytest.approx(1, rel=1e-12)
    assert some.inclusion.sum(axis=1) == pytest.approx(1, rel=1e-12)
    scaled = RoutingStats("m", tuple(range(layers)), loads * 7, 1, "drawn")
    assert scaled.shares == pytest.approx(some.shares, rel=1e-12)


def test_mixture_layers_are_those_of_the_models() -> None:
    assert mixture_of(DEEPSEEK) == (tuple(MOE), 256, 8)
    assert mixture_of(MIXTRAL) == (tuple(range(32)), 8, 2)
    with pytest.raises(RoutingError, match="llama-3-8b is dense"):
        mixture_of(load_model("llama-3-8b"))


def test_arrays_are_read_only_copies() -> None:
    loads = counts(2, 4)
    some = stats(loads)
    loads[0, 0] = -1
    assert some.loads[0, 0] > 0
    with pytest.raises(ValueError, match="read-only"):
        some.loads[0, 0] = 1


def test_uniform_fits_its_model_and_no_other() -> None:
    even = uniform(DEEPSEEK)
    even.check(DEEPSEEK)
    assert even.row(3) == 0 and even.row(60) == 57
    with pytest.raises(RoutingError, match="layer 2: no routing is known"):
        even.row(2)
    with pytest.raises(RoutingError, match="layer 32: routing is given, but it is beyond mixtral-8x7b"):
        even.check(MIXTRAL)


@pytest.mark.parametrize(
    ("layers", "experts", "top_k", "message"),
    [
        (tuple(range(2, 61)), 256, 8, "layer 2: routing is given, but it is a dense layer of deepseek-v3"),
        (tuple(range(4, 61)), 256, 8, "layer 3: no routing is given, but it is a mixture layer"),
        (tuple(MOE), 128, 8, "128 experts a layer: expected the 256"),
        (tuple(MOE), 256, 6, "top_k 6: expected the 8"),
    ],
)
def test_statistics_of_another_model_say_what_differs(layers: tuple, experts: int, top_k: int, message: str) -> None:
    other = RoutingStats("m", layers, counts(len(layers), experts), top_k, "here")
    with pytest.raises(RoutingError, match=message):
        other.check(DEEPSEEK)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loads": [[1, 2], [3, 0]]}, r"layer 2, expert 1: load 0: expected a number above 0"),
        ({"loads": [[1, -2], [3, 0]]}, r"layer 1, expert 1: load -2 \(1 more such\)"),
        ({"loads": [[1, 2], [float("nan"), 1]]}, "layer 2, expert 0: load nan"),
        ({"loads": [[1, 2], [float("inf"), 1]]}, "layer 2, expert 0: load inf"),
        ({"loads": [[1, 2], [3]]}, "loads: expected a full table"),
        ({"loads": [[1, 2]]}, r"loads of shape \(1, 2\): expected \(2 mixture layers"),
        ({"loads": [[1, 2], [3, 4]], "layers": (2, 1)}, r"layers \[2, 1\]: expected ascending"),
        ({"loads": [[1, 2], [3, 4]], "top_k": 3}, "top_k 3: expected 1 to the 2 experts"),
        ({"loads": [[1, 1, 1, 1], [1, 1, 1, 9]], "top_k": 2}, "layer 2, expert 3: picked 1.5 times per token"),
        ({"loads": [[1, 2], [3, 4]], "transitions": np.ones((1, 3, 2))}, r"transitions of shape \(1, 3, 2\)"),
        ({"loads": [[1, 2], [3, 4]], "transitions": [[[1, 0], [2, -1]]]}, "expert 1: transition -1 to expert 1"),
        ({"loads": [[1, 2], [3, 4]], "transitions": [[[1, 0], [0.5, 0.4]]]}, "expert 1: transitions sum to 0.9"),
    ],
)
def test_bad_statistics_are_refused_in_one_line(values: dict, message: str) -> None:
    with pytest.raises(RoutingError, match=message) as caught:
        stats(values.pop("loads"), **values)
    assert "\n" not in str(caught.value)


def test_a_mixture_of_classes_keeps_marginals() -> None:
    rng = np.random.default_rng(0)
    parts = []
    for _ in range(2):
        joint = rng.random((4, 4))
        joint /= joint.sum()
        loads = np.stack([joint.sum(axis=1), joint.sum(axis=0)])
        parts.append(stats(loads, transitions=(joint / joint.sum(axis=1, keepdims=True))[None]))
    both = mixed(parts, [1, 3], "both")
    assert both.shares == pytest.approx(0.25 * parts[0].shares + 0.75 * parts[1].shares, rel=1e-12)
    assert both.marginal_error() < 1e-12
    assert mixed([parts[0], stats(counts(2, 4))], [1, 1], "one aggregate").transitions is None
    with pytest.raises(RoutingError, match="expected positive numbers"):
        mixed(parts, [1, 0], "none of the second")
    with pytest.raises(RoutingError, match="expected one positive weight each"):
        mixed(parts, [1], "too few")


def test_replicas_share_the_tokens_of_an_expert() -> None:
    shares = rank_shares(np.ones(3) / 3, [[0], [1, 0], [1, 1, 0]], 2)
    assert shares.sum(axis=0) == pytest.approx(1)
    assert shares[1, 2] == pytest.approx(2 / 3)
    with pytest.raises(RoutingError, match="expert 1: it is on no rank"):
        rank_shares(np.ones(2) / 2, [[0], []], 2)
    with pytest.raises(RoutingError, match="expert 1: rank 2 is not there"):
        rank_shares(np.ones(2) / 2, [[0], [2]], 2)


# Readers


def test_logical_counts_of_all_layers_or_of_mixture_layers(tmp_path: Path) -> None:
    table = deepseek_counts()
    every = read_routing(written(tmp_path / "a.json", {"logical_count": table.tolist()}), DEEPSEEK)
    every.check(DEEPSEEK)
    assert every.loads.tolist() == table[3:].tolist()
    bare = read_routing(written(tmp_path / "b.json.gz", table[3:].tolist()), DEEPSEEK)
    assert bare.loads.tolist() == every.loads.tolist()
    assert bare.source == "b.json.gz" and bare.transitions is None


def test_steps_of_a_ring_buffer_are_summed_or_cut_into_windows(tmp_path: Path) -> None:
    steps = np.stack([counts(32, 8, seed) for seed in range(6)] + [np.zeros((32, 8))] * 2)
    path = written(tmp_path / "steps.json", {"rank": 0, "logical_count": steps.tolist()})
    assert read_routing(path, MIXTRAL).loads == pytest.approx(steps.sum(axis=0))
    windows = read_windows(path, MIXTRAL, 3)
    assert [window.loads[0, 0] for window in windows] == [steps[i : i + 2, 0, 0].sum() for i in (0, 2, 4)]
    assert windows[1].source == "steps.json, window 2 of 3"
    with pytest.raises(RoutingError, match="7 windows of 6 steps"):
        read_windows(path, MIXTRAL, 7)
    empty = written(tmp_path / "empty.json", {"logical_count": np.zeros((2, 32, 8)).tolist()})
    with pytest.raises(RoutingError, match="every step is empty"):
        read_routing(empty, MIXTRAL)


def test_replicas_of_a_load_balancer_are_summed_into_experts(tmp_path: Path) -> None:
    loads, places = counts(32, 10), [[*range(8), 3, -1]] * 32
    content = {"expert_load_window": [loads.tolist()] * 2, "physical_to_logical_map": places}
    some = read_routing(written(tmp_path / "eplb.json", content), MIXTRAL)
    assert some.loads[:, 3] == pytest.approx(2 * (loads[:, 3] + loads[:, 8]))
    assert some.loads[:, 4] == pytest.approx(2 * loads[:, 4])
    content["physical_to_logical_map"] = [[*range(8), 9, -1]] * 32
    with pytest.raises(RoutingError, match="layer 0, replica 8: expert 9"):
        read_routing(written(tmp_path / "eplb.json", content), MIXTRAL)


def test_numbered_dictionaries_of_counts(tmp_path: Path) -> None:
    table = deepseek_counts()
    keyed = {str(layer): {str(e): c for e, c in enumerate(table[layer])} for layer in MOE}
    assert read_routing(written(tmp_path / "k.json", keyed), DEEPSEEK).loads == pytest.approx(table[3:])
    among = {str(i): row for i, row in enumerate(keyed.values())}
    assert read_routing(written(tmp_path / "k.json", among), DEEPSEEK).loads == pytest.approx(table[3:])
    keyed["5"]["256"] = 1
    with pytest.raises(RoutingError, match="layer 5, expert 256: expected an expert 0 to 255"):
        read_routing(written(tmp_path / "k.json", keyed), DEEPSEEK)


def drawn_choices(tokens: int, layers: int, experts: int, top_k: int) -> np.ndarray:
    """[tokens, layers, top_k]; the next layer's first choice follows the present one's."""
    rng = np.random.default_rng(1)
    ids = rng.random((tokens, layers, experts)).argsort(axis=2)[..., :top_k]
    ids[:, 1::2, 0] = ids[:, ::2, 0]
    ids[:, 1::2, 1] = (ids[:, 1::2, 0] + 1) % experts
    return ids


def test_choices_of_tokens_give_loads_and_transitions(tmp_path: Path) -> None:
    ids = drawn_choices(400, 32, 8, 2)
    some = read_routing(written(tmp_path / "r.json", {"routed_experts": ids.tolist()}), MIXTRAL)
    wanted = np.zeros((8, 8))
    for token in ids:
        for one in token[4]:
            for two in token[5]:
                wanted[one, two] += 1
    assert some.loads[5] == pytest.approx(np.bincount(ids[:, 5].ravel(), minlength=8))
    assert some.transitions is not None
    assert some.transitions[4] == pytest.approx(wanted / wanted.sum(axis=1, keepdims=True))
    assert some.marginal_error() < 1e-12
    short = {"routed_experts": ids[:3].tolist()}
    with pytest.raises(RoutingError, match=r"r.json: layer \d+, expert \d: count 0"):
        read_routing(written(tmp_path / "r.json", short), MIXTRAL)
    added = read_routing(tmp_path / "r.json", MIXTRAL, add_count=1)
    assert added.marginal_error() < 1e-12 and added.loads.min() == 1


def test_torch_files_of_every_recording_mode(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    ids = torch.from_numpy(drawn_choices(300, 32, 8, 2).swapaxes(0, 1).copy()).int()
    places = torch.arange(8).repeat(32, 1)[:, [*range(8), 0]]
    ids[:, ::2][ids[:, ::2] == 0] = 8  # half of expert 0's tokens go to its second replica
    detailed = {"records": [{"forward_pass_id": 1, "topk_ids_of_layer": ids}], "last_physical_to_logical_map": places}
    torch.save(detailed, tmp_path / "token.pt")
    by_token = read_routing(tmp_path / "token.pt", MIXTRAL)
    flat = np.where(ids.numpy() == 8, 0, ids.numpy())
    wanted = np.stack([np.bincount(row.ravel(), minlength=8) for row in flat])
    assert by_token.loads == pytest.approx(wanted)
    assert by_token.transitions is not None
    physical = torch.from_numpy(np.stack([np.bincount(row.ravel(), minlength=9) for row in ids.numpy()]))
    passes = [{"global_physical_count": physical}] * 2
    torch.save({"records": passes, "last_physical_to_logical_map": places}, tmp_path / "pass.pt")
    assert read_routing(tmp_path / "pass.pt", MIXTRAL).loads == pytest.approx(2 * wanted)
    # Every rank writes a file of its own: half of the replicas each.
    for name, kept in (("0.pt", slice(0, 5)), ("1.pt", slice(5, 9))):
        part = torch.zeros_like(physical)
        part[:, kept] = physical[:, kept]
        records = [{"global_physical_count": part}]
        torch.save({"records": records, "last_physical_to_logical_map": places}, tmp_path / name)
    both = read_routing([tmp_path / "0.pt", tmp_path / "1.pt"], MIXTRAL)
    assert both.loads == pytest.approx(wanted) and both.source == "0.pt, 1.pt"
    torch.save({"logical_count": torch.from_numpy(wanted)[None], "rank": 0}, tmp_path / "stat.pt")
    assert read_routing(tmp_path / "stat.pt", MIXTRAL).loads == pytest.approx(wanted)


def test_torch_files_run_no_code(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"logical_count": Path("x")}, tmp_path / "code.pt")
    with pytest.raises(RoutingError, match=r"code.pt: not a torch file of tensors"):
        read_routing(tmp_path / "code.pt", MIXTRAL)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"logical_count": counts(60, 256).tolist()}, "60 layers: expected rows for its 58 mixture layers or all 61"),
        ({"logical_count": counts(61, 256).tolist()}, "layer 0: experts were counted, but it is a dense layer"),
        ({"logical_count": counts(58, 255).tolist()}, "255 experts a layer: expected the 256"),
        ({"logical_count": [[1] * 256, [1] * 255]}, "layer 1: 255 entries: expected 256"),
        ({"logical_count": [[1, 2], [1, "2"]]}, "layer 1, expert 1: '2': expected a number"),
        ({"logical_count": [[1, None], [1, 2]]}, "layer 0, expert 1: None: expected a number"),
        ({"logical_count": [[True, True], [True, True]]}, "layer 0, expert 0: True: expected a number"),
        ({"logical_count": []}, "expected a full table"),
        ({"logical_count": 3}, r"counts of shape \(\): expected"),
        ({"loads": [[1]]}, "keys loads: expected one of logical_count"),
        ([1, 2], r"counts of shape \(2,\): expected"),
        ("text", "str: expected a table"),
        ({"records": []}, "records: expected a list of at least one forward pass"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path: Path, content: object, message: str) -> None:
    path = written(tmp_path / "bad.json", content)
    with pytest.raises(RoutingError, match=message) as caught:
        read_routing(path, DEEPSEEK)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_bad_counts_name_layer_and_expert_of_the_model(tmp_path: Path) -> None:
    for value, message in ((0.0, "layer 7, expert 9: count 0"), (-3.0, "layer 7, expert 9: count -3")):
        table = deepseek_counts()
        table[7, 9] = value
        for rows in (table, table[3:]):
            with pytest.raises(RoutingError, match=message):
                read_routing(written(tmp_path / "c.json", rows.tolist()), DEEPSEEK)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(RoutingError, match=r"gone\.json: there is no such file"):
        read_routing(tmp_path / "gone.json", DEEPSEEK)
    (tmp_path / "half.json").write_text('{"logical_count": [[1, ')
    with pytest.raises(RoutingError, match=r"half\.json: not JSON"):
        read_routing(tmp_path / "half.json", DEEPSEEK)
    whole = gzip.compress(b"[[1, 2]]")
    for broken in (b"[]", whole[:-9], whole[:12] + b"\xff" * 8 + whole[20:]):
        (tmp_path / "not.json.gz").write_bytes(broken)
        with pytest.raises(RoutingError, match="not JSON"):
            read_routing(tmp_path / "not.json.gz", DEEPSEEK)
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(RoutingError, match="nested too deep"):
        read_routing(tmp_path / "deep.json", DEEPSEEK)
    with pytest.raises(RoutingError, match="no file of routing"):
        read_routing([], DEEPSEEK)
