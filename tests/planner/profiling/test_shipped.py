"""Measured folders that are shipped: tables of the schema, of the one device that they are named after."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from hwmodels.yamlfiles import PROFILES
from planner.profiling import read_tables

FOLDERS = sorted(path.parent for path in (PROFILES / "measured").glob("*/about.yaml"))


def test_there_is_an_example():
    assert FOLDERS


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_shipped_folder_is_what_it_says(folder: Path):
    about = yaml.safe_load((folder / "about.yaml").read_text(encoding="utf-8"))
    tables = read_tables(folder)
    assert about["device"] == folder.name
    assert {name: len(table) for name, table in tables.items()} == about["rows"]
    assert not set(about["left_out"]) & set(tables)
    for table in tables.values():
        assert set(table["device"]) == {folder.name}
        assert set(table["software"]) == {about["software"]}
