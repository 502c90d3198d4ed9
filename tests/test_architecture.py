"""The shape of the project: imports go one way, facts are data with a source, and every module says what it is for."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
#: Each package may import those before it and itself.
ORDER = ["hwmodels", "simulator", "planner", "ui"]
MODULES = sorted(path.relative_to(ROOT) for package in ORDER for path in (ROOT / package).rglob("*.py"))
PROFILES = sorted(path.relative_to(ROOT) for path in (ROOT / "profiles").rglob("*.yaml"))


def imported(path: Path) -> set[str]:
    """Names of the top-level packages a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; expected the full path, as everywhere else"
            found.add(str(node.module).split(".")[0])
    return found


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_go_one_way(path):
    later = ORDER[ORDER.index(path.parts[0]) + 1 :]
    assert not imported(path) & {*later, "tests"}


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_every_module_says_what_it_is_for(path):
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.name == "__init__.py" and not text.strip():
        return
    docstring = ast.get_docstring(ast.parse(text))
    assert docstring, f"{path} has no docstring"
    assert docstring.splitlines()[0].endswith((".", "?"))


@pytest.mark.parametrize("path", [p for p in MODULES if p.parts[0] == "hwmodels"], ids=str)
def test_models_of_hardware_have_no_clock_and_no_dice_of_their_own(path):
    """What draws rows to leave out is handed the generator it draws from."""
    assert not imported(path) & {"simpy", "random", "time", "datetime"}
    assert "np.random" not in (ROOT / path).read_text(encoding="utf-8").replace("np.random.Generator", "")


def test_profiles_are_data_only():
    suffixes = {p.suffix for p in (ROOT / "profiles").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert ".py" not in suffixes
    assert PROFILES


@pytest.mark.parametrize("path", PROFILES, ids=str)
def test_every_profile_has_a_source_and_its_own_name(path):
    profile = yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))
    assert len(profile["source"].strip()) > 10
    assert profile.get("name", path.stem) == path.stem


def test_no_file_of_the_user_interface_bears_a_packages_name():
    """`streamlit run` puts ui/ first on sys.path, where such a file would hide the package."""
    taken = {*ORDER, "profiles", "tests", "streamlit", "plotly", "typer", "rich", "numpy", "pandas", "yaml"}
    assert not taken & {path.stem for path in (ROOT / "ui").iterdir()}


def test_tests_are_no_package():
    assert not list((ROOT / "tests").rglob("__init__.py"))
