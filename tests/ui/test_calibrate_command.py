"""`shardwise calibrate`, run in this process on a small table that follows the analytic model."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import typer

from hwmodels.calibration.forms import FORMS
from hwmodels.efficiency import GemmCoefficients
from hwmodels.errors import MeasurementError, ProfileError
from hwmodels.hardware import load_device
from hwmodels.kernels.table import FAMILIES, write_table
from ui.calibrating import calibrate

TRUE = GemmCoefficients(6e-6, 0.7, 0.8, 1.5e11, 6e-7, 4e-6)

app = typer.Typer()
app.command("calibrate")(calibrate)


@app.callback()
def _main() -> None:
    """So that the command keeps its name."""


def run(*words: object) -> None:
    app(["calibrate", *map(str, words)], standalone_mode=False)


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    sizes = [(m, n, k) for m in (1, 16, 256, 1024, 8192) for n in (1024, 4096, 8192, 14336) for k in (1024, 4096, 8192)]
    frame = pd.DataFrame(sizes, columns=["m", "n", "k"]).assign(
        dtype="bf16", device="h100-pcie", software="made 1.0", kernel="made", spread=np.nan, source="equation"
    )
    frame["seconds"] = FORMS["gemm"].predict(frame, "bf16", load_device("h100-pcie"))(TRUE)
    return frame[list(FAMILIES["gemm"].columns)]


@pytest.fixture
def folder(tmp_path, rows) -> Path:
    write_table(rows, "gemm", tmp_path / "tables" / "gemm.parquet")
    return tmp_path / "tables"


def test_a_table_says_how_far_the_coefficients_are(folder, capsys):
    run(folder)
    out = capsys.readouterr().out
    assert "h100-pcie" in out
    lines = [line.split() for line in out.splitlines() if line.split()[:2] == ["gemm", "bf16"]]
    assert [line[2] for line in lines] == ["all", "made"]
    assert all(float(line[4].rstrip("%")) < 2 for line in lines)


def test_json_has_the_same(folder, capsys):
    run(folder, "--json")
    answer = json.loads(capsys.readouterr().out)
    assert {"device", "families", "fits", "left_out"} <= answer.keys()
    assert answer["families"]["gemm"]["timings"] == 60
    (pooled, own) = answer["fits"]
    assert (pooled["engine"], own["engine"]) == (None, "made")
    assert pooled["coefficients"]["start_s"] == pytest.approx(6e-6, rel=0.05)
    assert pooled["held_out_median_ape"] < 0.02


def test_a_saved_profile_is_used_as_any_other(folder, tmp_path, capsys):
    run(folder, "--save", tmp_path / "mine.yaml")
    assert "mine.yaml" in capsys.readouterr().out
    device, shipped = load_device(str(tmp_path / "mine.yaml")), load_device("h100-pcie")
    assert device.calibrated("gemm")
    assert (device.tdp_w, device.source, device.memory_bytes) == (shipped.tdp_w, shipped.source, shipped.memory_bytes)
    run(folder, "--save", tmp_path / "again.yaml")
    assert (tmp_path / "again.yaml").read_text() == (tmp_path / "mine.yaml").read_text()


def test_other_shapes_are_fitted_to_with_another_seed(folder, capsys):
    answers = []
    for seed in (0, 0, 1):
        run(folder, "--json", "--seed", seed)
        answers.append(json.loads(capsys.readouterr().out)["fits"][0]["coefficients"])
    assert answers[0] == answers[1] != answers[2]


def test_what_cannot_be_calibrated(folder, tmp_path, rows):
    with pytest.raises(MeasurementError, match="does not exist"):
        run(tmp_path / "missing")
    with pytest.raises(ProfileError, match=r"--save .*yaml"):
        run(folder, "--save", tmp_path / "profile.txt")
    with pytest.raises(MeasurementError, match=r"l40s"):
        run(folder, "--hardware", "l40s")
    with pytest.raises(ProfileError, match="unknown device 'h1000'"):
        run(folder, "--like", "h1000")
    write_table(rows.head(8), "gemm", folder / "gemm.parquet")
    with pytest.raises(MeasurementError, match="expected 20 rows"):
        run(folder)
    assert not (tmp_path / "profile.txt").exists()
