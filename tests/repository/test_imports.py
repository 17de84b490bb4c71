"""Imports point one way, from experiments down to the model, and no file of a script folder hides a library."""

import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.repository.import_arrows import folder_of, import_arrows, imported_modules

ROOT = Path(__file__).parents[2]
MAY_IMPORT = {
    "common": {"common", "modeling_longembed"},
    "modeling_longembed": {"modeling_longembed"},
    "training": {"training", "common", "modeling_longembed"},
    "eval": {"eval", "common", "modeling_longembed"},
    "retrieval": {"retrieval", "common", "modeling_longembed"},
    "model_cards": {"model_cards", "retrieval", "eval", "training", "common", "modeling_longembed"},
    "experiments": {"experiments", "model_cards", "retrieval", "eval", "training", "common", "modeling_longembed"},
}


def imported_packages(path: Path) -> set[str]:
    """Top-level packages that a file imports absolutely, at any depth of its code."""
    return {name.split(".")[0] for name in imported_modules(path)}


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_point_one_way(folder):
    forbidden = {*MAY_IMPORT, "tests"} - MAY_IMPORT[folder]
    wrong = {
        str(path.relative_to(ROOT)): found
        for path in (ROOT / folder).rglob("*.py")
        if (found := imported_packages(path) & forbidden)
    }
    assert not wrong


def test_imports_inside_training_point_down():
    """From a script at the top to the engine: a folder imports itself and the folders that are listed after it."""
    order = [
        ".",
        "teachers",
        "objectives",
        "objectives/losses",
        "data/pairs",
        "data/documents",
        "data",
        "models",
        "engine",
        "engine/processes",
    ]
    shares = {
        "objectives/contrastive": "objectives",  # it uses heads.py and embed.py, and pair_step.py uses it
        "engine/checkpoints": "engine",  # what a resumed run may change depends on schedule.py, and loop.py asks it
    }
    arrows = [
        tuple(shares.get(folder_of(file), folder_of(file)) for file in arrow)
        for arrow in import_arrows(ROOT / "training")
        if "__init__" not in arrow[1]
    ]
    assert {folder for arrow in arrows for folder in arrow} == {*order}
    assert not [arrow for arrow in arrows if order.index(arrow[0]) > order.index(arrow[1])]
    assert (".", ".") not in arrows  # a script is started, not imported


def test_a_chain_of_imports_is_counted(tmp_path):
    (tmp_path / "package" / "inner").mkdir(parents=True)
    (tmp_path / "package" / "one.py").write_text("from package.inner import two\nimport package.inner.three, os")
    (tmp_path / "package" / "inner" / "two.py").write_text("def f():\n    from package.inner.three import g")
    (tmp_path / "package" / "inner" / "three.py").write_text("from package.inner.three import g")
    expected = {("one", "inner/two"), ("one", "inner/three"), ("inner/two", "inner/three")}
    assert import_arrows(tmp_path / "package") == expected


def test_what_is_in_common_is_shared():
    """A module of common serves at least two of the folders above it, some through other modules of common."""
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in (ROOT / "common").rglob("*.py")
        if path.stem != "__init__"
    }
    used_by: dict[str, set[str]] = {module: set() for module in files}
    for folder in ("training", "eval", "retrieval", "experiments"):
        queue = [name for path in (ROOT / folder).rglob("*.py") for name in imported_modules(path)]
        while queue:
            name = queue.pop()
            module = name if name in files else name.rpartition(".")[0]
            if folder not in used_by.get(module, {folder}):
                used_by[module].add(folder)
                queue += imported_modules(files[module])
    assert not {module: folders for module, folders in used_by.items() if len(folders) < 2}


def test_nothing_in_eval_imports_a_script():
    """What scripts share is in the folders behind them; experiments/ may import a script."""
    arrows = {arrow for arrow in import_arrows(ROOT / "eval") if "__init__" not in arrow[1]}
    assert len(arrows) > 50
    assert not {arrow for arrow in arrows if folder_of(arrow[1]) == "."}


def test_nothing_in_retrieval_imports_a_script_and_documents_know_nothing_of_the_index():
    arrows = {arrow for arrow in import_arrows(ROOT / "retrieval") if "__init__" not in arrow[1]}
    assert not {arrow for arrow in arrows if arrow[1] in ("build", "search", "serve", "tune", "embed")}
    assert not {arrow for arrow in arrows if folder_of(arrow[0]) == "documents" != folder_of(arrow[1])}


@pytest.mark.parametrize("folder", ["training", "eval", "retrieval", "model_cards", "experiments"])
def test_no_script_folder_hides_a_library(folder):
    # `python training/x.py` puts training/ first on sys.path: training/logging.py would then be everybody's `logging`.
    # A folder without __init__.py (training/accelerate/) hides nothing: Python takes the library that comes later.
    modules = [*(ROOT / folder).glob("*.py"), *(path.parent for path in (ROOT / folder).glob("*/__init__.py"))]
    ours = {path.stem for path in modules} - {"__init__"}
    # `build` makes wheels, and no library that a script runs with imports it.
    assert not ours & {*sys.stdlib_module_names, *packages_distributions()} - {"build"}
