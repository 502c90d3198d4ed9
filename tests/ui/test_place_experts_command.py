"""`shardwise place-experts`, run in this process on made-up counts for Mixtral and DeepSeek-V3."""

import json

import numpy as np
import pytest

from hwmodels.huggingface import load_model
from hwmodels.routingfiles import read_routing
from planner.placement import Problem, objective_of
from planner.placementfiles import NAMES, SGLANG, VLLM, VLLM_ASCEND
from ui.cli import main
from ui.placingexperts import BASELINES, PICTURE

MIXTRAL = ("--model", "mixtral-8x7b", "--hardware", "h100-sxm")


@pytest.fixture
def counts(tmp_path):
    made = np.random.default_rng(0).integers(50, 1000, (32, 8))
    path = tmp_path / "counts.json"
    path.write_text(json.dumps({"logical_count": made.tolist()}))
    return path


def run(capsys, *words):
    code = main(["place-experts", *map(str, words)])
    streams = capsys.readouterr()
    return code, streams.out, streams.err


def test_the_table_has_the_solver_and_the_baselines(counts, capsys):
    code, out, _ = run(capsys, counts, *MIXTRAL, "--gpus", 4, "--solver", "exact")
    assert code == 0
    first = [line.split()[0] for line in out.split("A step of")[0].splitlines() if line.split()]
    assert [word for word in first if word in (*BASELINES, "exact")] == [*BASELINES, "exact"]
    assert "load alone" in out


def test_json_tells_what_the_placement_costs_and_what_none_undercuts(counts, capsys):
    code, out, _ = run(capsys, counts, *MIXTRAL, "--gpus", 4, "--solver", "exact", "--concentration", 0.5, "--json")
    answer = json.loads(out)
    assert code == 0
    assert set(answer["baselines"]) == set(BASELINES)
    assert answer["gap"] == pytest.approx(0, abs=1e-9)
    assert answer["traffic_term"] > 0
    for entry in (answer, *answer["baselines"].values()):
        assert {"busiest_over_mean", "objective", "bound", "gap", "wall_s"} <= set(entry)
        assert answer["objective"] <= entry["objective"] * (1 + 1e-9)
        assert entry["bound"] == answer["bound"] <= entry["objective"]
        assert entry["gap"] == pytest.approx(1 - entry["bound"] / entry["objective"])
        assert entry["objective"] == pytest.approx(entry["load_term"] + entry["traffic_term"])
        assert entry["busiest_over_mean"] == pytest.approx(np.mean(entry["busiest_over_mean_layers"]))
        # The load term is choices on the busiest rank, layer by layer, at the price of a choice.
        per_rank = answer["tokens"] * 2 / 4 * answer["seconds_per_choice"]
        assert entry["load_term"] == pytest.approx(sum(entry["busiest_over_mean_layers"]) * per_rank)


def test_the_busiest_rank_of_single_steps_before_and_after(counts, capsys):
    words = ("--gpus", 4, "--replicas", 4, "--seconds", 2, "--tokens", 100_000)
    code, out, _ = run(capsys, counts, *MIXTRAL, *words, "--json")
    answer = json.loads(out)
    assert code == 0
    before, after = answer["distribution"]["before"], answer["distribution"]["after"]
    assert (before["solver"], after["solver"], before["tokens"]) == ("contiguous", "large", 100_000)
    for one in (before, after):
        assert 1 <= one["p50"] <= one["p90"] <= one["p99"]
    # So many tokens leave little to chance.
    layers = answer["baselines"]["contiguous"]["busiest_over_mean_layers"]
    assert [before[name] for name in ("p50", "p90")] == pytest.approx(np.quantile(layers, [0.5, 0.9]), rel=0.03)
    assert before["mean"] == pytest.approx(np.mean(layers), rel=0.01)
    assert after["mean"] == pytest.approx(answer["busiest_over_mean"], rel=0.02)
    code, out, _ = run(capsys, counts, *MIXTRAL, *words)
    assert code == 0
    assert f"contiguous p50 {before['p50']:.2f}, p90 {before['p90']:.2f}, p99 {before['p99']:.2f}" in " ".join(
        out.split()
    )


def test_simulated_steps_beside_the_objective(counts, capsys):
    words = ("--gpus", 4, "--solver", "greedy", "--simulate")
    code, out, _ = run(capsys, counts, *MIXTRAL, *words, "--json")
    told = json.loads(out)["simulation"]
    assert code == 0
    assert set(told["traffic"]) == {"prefill-heavy", "decode-heavy"}
    for check in told["traffic"].values():
        assert set(check["placements"]) == set(BASELINES)
        assert check["placements"]["contiguous"]["saved_s"] == 0
    prefill = told["traffic"]["prefill-heavy"]["placements"]
    assert prefill["greedy"]["makespan_s"] < prefill["contiguous"]["makespan_s"]
    assert told["savings"][-1]["experts_s"] > told["savings"][0]["experts_s"]
    code, out, _ = run(capsys, counts, *MIXTRAL, *words)
    assert code == 0
    assert "Simulated: decode-heavy" in out and "Rank correlation" in out


def test_kernels_that_read_more_weights_are_told(counts, capsys):
    """In steps of few tokens three experts on a GPU take longer than two, which the objective does not know."""
    words = ("--gpus", 4, "--replicas", 4, "--solver", "eplb", "--tokens", 64)
    code, out, _ = run(capsys, counts, *MIXTRAL, *words, "--json")
    answer = json.loads(out)
    assert code == 0
    plain = answer["baselines"]["contiguous"]
    assert answer["objective"] < plain["objective"] and answer["experts_s"] > plain["experts_s"]
    assert "weights to read" in run(capsys, counts, *MIXTRAL, *words)[1]
    assert "weights to read" not in run(capsys, counts, *MIXTRAL, *words[:-1], 100_000)[1]


def test_exact_with_copies_is_milp_says_so_and_is_no_worse_than_the_baselines(counts, capsys):
    words = ("--gpus", 8, "--replicas", 8, "--solver", "exact", "--seconds", 0.5)
    code, out, _ = run(capsys, counts, *MIXTRAL, *words)
    assert code == 0
    told = " ".join(out.split())
    assert "With copies --solver exact is milp" in told
    assert "Stopped by --seconds (500 ms)" in told
    code, out, _ = run(capsys, counts, *MIXTRAL, *words, "--json")
    answer = json.loads(out)
    assert (code, answer["solver"], answer["asked_solver"], answer["stopped"]) == (0, "milp", "exact", True)
    for entry in answer["baselines"].values():
        assert answer["bound"] <= answer["objective"] <= entry["objective"] * (1 + 1e-9)


def test_a_baseline_is_taken_where_the_solver_found_none_as_good(counts, capsys):
    """MoETuner's programs know no copies, so that EPLB's take less time."""
    words = ("--gpus", 4, "--replicas", 4, "--solver", "tuner", "--seconds", 0.2)
    code, out, _ = run(capsys, counts, *MIXTRAL, *words, "--json")
    answer = json.loads(out)
    assert (code, answer["solver"], answer["instead"]) == (0, "tuner", "eplb")
    assert answer["objective"] == answer["baselines"]["eplb"]["objective"]
    assert answer["bound"] <= answer["objective"]
    assert "tuner found none as good as eplb's" in " ".join(run(capsys, counts, *MIXTRAL, *words)[1].split())
    # A baseline that was asked for is told as it is.
    code, out, _ = run(capsys, counts, *MIXTRAL, *words[:4], "--solver", "contiguous", "--json")
    answer = json.loads(out)
    assert answer["instead"] is None
    assert answer["objective"] > answer["baselines"]["eplb"]["objective"]


def test_slots_without_replicas_may_all_hold_copies(counts, capsys):
    code, out, _ = run(capsys, counts, *MIXTRAL, "--gpus", 4, "--slots", 3, "--solver", "eplb", "--tokens", 1)
    assert code == 0
    told = " ".join(out.split())
    assert "3 slots a GPU, up to 4 replicas" in told
    assert "A step of 1 token;" in told and "(vllm's fp8 kernels, the arithmetic's rate)" in told
    without = json.loads(
        run(capsys, counts, *MIXTRAL, "--gpus", 4, "--slots", 3, "--replicas", 0, "--solver", "eplb", "--json")[1]
    )
    assert without["replicas"] == 0
    assert without["objective"] > without["baselines"]["greedy"]["objective"] * (1 - 1e-9)


def test_saved_maps_cost_what_the_answer_says(counts, capsys, tmp_path):
    folder = tmp_path / "maps"
    words = ("--gpus", 4, "--replicas", 4, "--seconds", 2, "--save", folder, "--json")
    code, out, _ = run(capsys, counts, *MIXTRAL, *words)
    assert code == 0
    answer = json.loads(out)
    assert answer["slots_per_gpu"] == 3
    assert answer["saved"]["redundant_experts"] == 4
    names = sorted((*NAMES, PICTURE))
    assert sorted(path.name for path in folder.iterdir()) == names == sorted(answer["saved"]["files"])
    maps = np.array(json.loads((folder / SGLANG).read_text())["physical_to_logical_map"])
    assert maps.tolist() == json.loads((folder / VLLM).read_text())
    devices = [layer["device_list"] for layer in json.loads((folder / VLLM_ASCEND).read_text())["layer_list"]]
    assert [[e for device in row for e in device["device_expert"]] for row in devices] == maps.tolist()
    holds = (maps.reshape(32, 4, 3)[..., None] == np.arange(8)).any(axis=2).transpose(0, 2, 1)
    loads = read_routing(counts, load_model("mixtral-8x7b")).loads
    judged = objective_of(Problem(loads, None, 4, 3, 4), holds).objective / 32 * 4
    assert judged == pytest.approx(answer["saved"]["busiest_over_mean"])
    if not answer["saved"]["filled_slots"]:
        assert judged == pytest.approx(answer["busiest_over_mean"])


def test_dense_layers_have_rows_for_sglang_only(tmp_path, capsys):
    made = np.random.default_rng(1).integers(50, 1000, (58, 256))
    path = tmp_path / "counts.json"
    path.write_text(json.dumps(made.tolist()))
    words = ("--gpus", 16, "--replicas", 16, "--solver", "greedy", "--save", tmp_path / "maps", "--json")
    code, out, _ = run(capsys, path, *words)
    assert code == 0
    assert json.loads(out)["saved"]["filled_slots"] == 16 * 58
    maps = json.loads((tmp_path / "maps" / SGLANG).read_text())["physical_to_logical_map"]
    assert len(maps) == 61
    assert {len(row) for row in maps} == {272}
    assert maps[0] == [*range(256), *range(16)]
    assert maps[3:] == json.loads((tmp_path / "maps" / VLLM).read_text())


def test_traffic_is_priced_by_the_links_between_the_gpus(counts, capsys):
    terms = {}
    for name, gpus in (("hgx-h100", 8), ("hgx-h100", 4), ("hgx-h100-ethernet", 8), ("pcie5-node", 4)):
        words = ("--hardware", name, "--gpus", gpus, "--solver", "contiguous", "--concentration", 0.2, "--json")
        code, out, _ = run(capsys, counts, "--model", "mixtral-8x7b", *words)
        assert code == 0
        terms[name, gpus] = json.loads(out)["traffic_term"]
    assert terms["pcie5-node", 4] > 2 * terms["hgx-h100", 4] > 0
    assert terms["hgx-h100-ethernet", 8] == pytest.approx(terms["hgx-h100", 8])  # one node: the network is not used


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("--gpus", 4, "--replicas", 3), 4, "8 experts and 3 replicas do not divide over 4 GPUs"),
        (("--gpus", 4, "--slots", 1), 4, "4 slots are missing"),
        (("--gpus", 4, "--slots", 9), 4, "9 slots on a GPU for 8 experts"),
        (("--gpus", 4, "--slots", 2, "--replicas", 4), 4, "4 replicas beyond the 0 slots"),
        (("--gpus", 4, "--solver", "best"), 2, "--solver 'best': expected one of large"),
        (("--gpus", 4, "--seconds", "nan"), 2, "--seconds nan"),
        (("--gpus", 4, "--weights", "fp5"), 2, "--weights 'fp5'"),
        (("--gpus", 4, "--weights", "fp4"), 2, "does not multiply in fp4"),
        (("--gpus", 4, "--concentration", 1.5), 2, "'--concentration': 1.5"),
        (("--gpus", 4, "--concentration", "nan"), 2, "nan"),
        (("--gpus", 4, "--replicas", -1), 2, "'--replicas': -1"),
        (("--gpus", 4, "--slots", 0), 2, "'--slots': 0"),
        (("--gpus", 4, "--groups", 0), 2, "'--groups': 0"),
        (("--gpus", 4, "--tokens", 0), 2, "'--tokens': 0"),
        (("--gpus", 4, "--seed", -1), 2, "'--seed': -1"),
        (("--gpus", "four"), 2, "'--gpus': four"),
        (("--gpus", 4, "--add-count", "inf"), 2, "error: --add-count inf: expected a finite number"),
        (("--gpus", 4, "--groups", 3), 4, "3 groups"),
        (("--gpus", 4, "--hardware", "h101"), 3, "unknown hardware 'h101'"),
        (("--gpus", 8, "--hardware", "phone"), 3, "phone joins at most 1"),
        (("--gpus", 4, "--model", "llama-3.1-8b"), 3, "llama-3.1-8b is dense"),
        (("--gpus", 4, "--model", "deepseek-v3"), 3, "32 layers"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(counts, capsys, tmp_path, words, code, says):
    folder = tmp_path / "maps"
    found, out, err = run(capsys, counts, *MIXTRAL, "--save", folder, *words)
    assert (found, out) == (code, "")
    assert says in err
    assert err.count("\n") == 1
    assert not folder.exists()


def test_a_folder_that_cannot_be_is_told_before_the_work(counts, capsys):
    code, _, err = run(capsys, counts, *MIXTRAL, "--gpus", 4, "--save", counts)
    assert code == 8
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda rows: rows[:31], "31 layers: expected rows for its 32 mixture layers of mixtral-8x7b"),
        (lambda rows: [row[:7] for row in rows], "7 experts a layer: expected the 8 of mixtral-8x7b"),
        (lambda rows: [[-2, *rows[0][1:]], *rows[1:]], "layer 0, expert 0: count -2"),
        (lambda rows: [*rows[:4], [0] * 8, *rows[5:]], "layer 4: no choice was counted, but it is a mixture layer"),
        (lambda rows: [*rows[:4], [0, 0, *rows[4][2:]], *rows[5:]], "layer 4, expert 0: count 0 (1 more such)"),
        (lambda rows: [[*rows[0][:7], "x"], *rows[1:]], "counts: layer 0, expert 7: 'x'"),
        (lambda rows: 5, "int: expected a table"),
    ],
)
def test_counts_that_cannot_be_are_told_in_one_line(counts, capsys, change, says):
    rows = json.loads(counts.read_text())["logical_count"]
    counts.write_text(json.dumps(change(rows)))
    code, out, err = run(capsys, counts, *MIXTRAL, "--gpus", 4)
    assert (code, out) == (3, "")
    assert f"counts.json: {says}" in err
    assert err.count("\n") == 1


def test_files_are_named_as_typed(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert run(capsys, "folder/gone.json", *MIXTRAL) == (3, "", "error: folder/gone.json: there is no such file\n")
    code, _, err = run(capsys, "folder", *MIXTRAL)
    assert code == 3 and err.startswith("error: folder: is a folder; expected a file of recorded routing")
    (tmp_path / "folder" / "zeros.json").write_text(json.dumps([[0, *[1] * 7]] * 32))
    code, _, err = run(capsys, "folder/zeros.json", *MIXTRAL)
    assert code == 3 and err.startswith("error: folder/zeros.json: layer 0, expert 0: count 0 (31 more such)")


def test_counts_of_dense_layers_are_told(tmp_path, capsys):
    path = tmp_path / "counts.json"
    path.write_text(json.dumps(np.ones((61, 256), int).tolist()))
    code, _, err = run(capsys, path)
    assert code == 3
    assert "layer 0: experts were counted, but it is a dense layer of deepseek-v3" in err
    assert err.count("\n") == 1


def test_a_recording_that_misses_an_expert_says_so(tmp_path, capsys):
    made = np.ones((32, 8), int)
    made[5, 3] = 0
    path = tmp_path / "counts.json"
    path.write_text(json.dumps(made.tolist()))
    code, _, err = run(capsys, path, *MIXTRAL, "--gpus", 4)
    assert code == 3
    assert "layer 5, expert 3: count 0" in err and "--add-count 1" in err
    assert run(capsys, path, *MIXTRAL, "--gpus", 4, "--solver", "greedy", "--add-count", 1)[0] == 0
