"""Imports point one way, from experiments down to the model, and no file of a script folder hides a library."""

import ast
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAY_IMPORT = {
    "common": {"common", "modeling_longembed"},
    "modeling_longembed": {"modeling_longembed"},
    "training": {"training", "common", "modeling_longembed"},
    "eval": {"eval", "common", "modeling_longembed"},
    "experiments": {"experiments", "eval", "training", "common", "modeling_longembed"},
}


def imported_packages(path: Path) -> set[str]:
    """Top-level packages that a file imports absolutely, at any depth of its code."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_point_one_way(folder):
    forbidden = {*MAY_IMPORT, "tests"} - MAY_IMPORT[folder]
    wrong = {
        str(path.relative_to(ROOT)): found
        for path in (ROOT / folder).rglob("*.py")
        if (found := imported_packages(path) & forbidden)
    }
    assert not wrong


@pytest.mark.parametrize("folder", ["training", "eval", "experiments"])
def test_no_script_folder_hides_a_library(folder):
    # `python training/x.py` puts training/ first on sys.path: training/logging.py would then be everybody's `logging`.
    # A folder without __init__.py (training/accelerate/) hides nothing: Python takes the library that comes later.
    modules = [*(ROOT / folder).glob("*.py"), *(path.parent for path in (ROOT / folder).glob("*/__init__.py"))]
    ours = {path.stem for path in modules} - {"__init__"}
    assert not ours & {*sys.stdlib_module_names, *packages_distributions()}
