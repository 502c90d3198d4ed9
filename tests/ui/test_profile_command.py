"""`shardwise profile` as a user runs it: for real on this CPU, for a few seconds."""

from __future__ import annotations

import json

import pytest
import typer
import yaml

pytest.importorskip("torch", reason="torch (extra 'profile') is not installed")

from hwmodels.kernels.table import read_table
from ui import cli
from ui.profiling import profile

WORDS = ["profile", "--device", "cpu", "--threads", "1", "--minutes", "0.03", "--name", "my-cpu"]
FAMILIES = ["--families", "gemm,attention_decode,copy"]


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    app = typer.Typer()
    app.command("profile")(profile)
    app.callback()(lambda: None)
    monkeypatch.setattr(cli, "app", app)


def run(capsys, *words: str) -> tuple[int, str, str]:
    code = cli.main(list(words))
    out, err = capsys.readouterr()
    return code, out, err


def test_a_run_saves_tables_and_a_second_one_refines_them(capsys, tmp_path):
    folder = tmp_path / "new"
    code, out, err = run(capsys, *WORDS, *FAMILIES, "--save", str(folder), "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    about = yaml.safe_load((folder / "about.yaml").read_text())
    rows = {path.stem: len(read_table(path, path.stem)) for path in folder.glob("*.parquet")}
    assert rows == about["rows"]
    assert found["new"] == sum(rows.values()) > 0
    assert about["left_out"]["moe"] == "not asked for"
    code, out, err = run(capsys, *WORDS, *FAMILIES, "--save", str(folder))
    assert (code, err) == (0, "")
    assert "my-cpu" in out
    assert "about.yaml" in out
    for name, before in rows.items():
        assert len(read_table(folder / f"{name}.parquet", name)) >= before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--families", "gemm,nonsense"), "nonsense"),
        (("--families", "mla_decode"), "mla_decode"),
        (("--device", "tpu"), "expected cuda or cpu"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(capsys, tmp_path, words, message):
    code, out, err = run(capsys, *WORDS, *words, "--save", str(tmp_path))
    assert (code, out) == (9, "")
    assert err.count("\n") == 1
    assert message in err
    assert not list(tmp_path.iterdir())


def test_minutes_are_above_zero(capsys, tmp_path):
    assert run(capsys, *WORDS, "--minutes", "0", "--save", str(tmp_path))[0] == 2


def test_a_folder_of_another_device_is_refused(capsys, tmp_path):
    (tmp_path / "about.yaml").write_text("source: elsewhere\ndevice: h100\n")
    code, _, err = run(capsys, *WORDS, *FAMILIES, "--save", str(tmp_path))
    assert code == 9
    assert "choose another folder" in err
