"""Every example in a docstring of the four packages gives what it says."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def module_names() -> list[str]:
    """Modules whose text has an example."""
    paths = [path for package in ("hwmodels", "simulator", "planner", "ui") for path in (ROOT / package).rglob("*.py")]
    names = [path.relative_to(ROOT).with_suffix("").parts for path in paths if ">>> " in path.read_text("utf-8")]
    return sorted(".".join(parts).removesuffix(".__init__") for parts in names)


def test_there_are_examples():
    assert len(module_names()) >= 3


@pytest.mark.parametrize("name", module_names())
def test_examples_give_what_they_say(name):
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried
    assert not failed
