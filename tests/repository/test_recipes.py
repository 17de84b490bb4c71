"""What recipes say of their results: a report's row is the recipe as it stands, or the comment says that it is not."""

import re
import shutil
from pathlib import Path

import pytest
import yaml

from tests.repository.test_documentation import ROOT, blocks, commands

RECIPES = {f"{path.parent.name}/{path.stem}": path for path in sorted((ROOT / "training/recipes").glob("*/*.yaml"))}
REPORTS = ROOT / "docs" / "reports"
MEASURED = yaml.safe_load((REPORTS / "measured_recipes.yaml").read_text(encoding="utf-8"))
# Options that say which data and models a recipe is used with, and where the result goes.
NOT_SETTINGS = {"config", "model_name_or_path", "train_data", "eval_data", "structural_teacher", "teacher_cache"}
NOT_SETTINGS |= {"output_dir", "text_column", "mixing_temperature"}


def results_of(recipe: Path) -> str | None:
    """What the comment of a recipe says about its results; None if it says nothing."""
    found = re.search(r"^# Results: (.*(?:\n# .*)*)", recipe.read_text(encoding="utf-8"), re.MULTILINE)
    return found and found[1].replace("\n# ", " ")


def options_by_recipe(report: Path, folder: Path) -> dict[str, list[set[str]]]:
    """The names of the options of each command of a report that has a recipe, by recipe."""
    found: dict[str, list[set[str]]] = {}
    for block, _ in blocks(report, "bash"):
        for command in commands(block, folder):
            if "--config" in command:
                recipe = Path(command[command.index("--config") + 1])
                options = {word[2:].split("=")[0] for word in command if word.startswith("--")}
                found.setdefault(f"{recipe.parent.name}/{recipe.stem}", []).append(options)
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_a_comment_points_to_a_report_and_repeats_no_figure_of_it(name):
    results = results_of(RECIPES[name])
    if results is None:
        assert name.endswith("/default")  # what to start from, of no experiment
    elif results != "not measured yet.":
        form = r"(as it stands, in|with other settings(?:, those of (\S+))?:) (docs/reports/[\w-]+\.md)\."
        said = re.fullmatch(form, results)
        assert said, results
        for path in filter(None, said.groups()[1:]):
            assert (ROOT / path).is_file()
        assert ("as it stands" in results) == (name in MEASURED)


@pytest.mark.parametrize("name", MEASURED)
def test_the_settings_that_a_report_was_made_with_are_the_recipe(name):
    recipe, entry = RECIPES[name], MEASURED[name]
    assert yaml.safe_load(recipe.read_text(encoding="utf-8")) == entry["settings"]
    assert results_of(recipe) == f"as it stands, in docs/reports/{entry['report']}."


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("name", MEASURED)
def test_the_command_of_the_report_changes_no_setting(name, tmp_path):
    runs = options_by_recipe(REPORTS / MEASURED[name]["report"], tmp_path)[name]
    assert any(options <= NOT_SETTINGS for options in runs), runs


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("name", ["distillation/chunks", "distillation/two_teachers"])
def test_the_command_of_a_run_with_other_settings_shows_them(name, tmp_path):
    runs = options_by_recipe(REPORTS / "distillation.md", tmp_path)[name]
    assert all(options - NOT_SETTINGS for options in runs)


def test_the_rows_of_the_findings_have_other_settings_than_their_recipes():
    rows = yaml.safe_load((ROOT / "experiments/findings/objectives.yaml").read_text(encoding="utf-8"))
    named = {row["recipe"]: row for row in rows["rows"].values()}
    for name, recipe in RECIPES.items():
        results = results_of(recipe)
        if results and "experiments/findings/objectives.yaml" in results:
            own = yaml.safe_load(recipe.read_text(encoding="utf-8"))
            changed = rows["training"] | named[name.split("/")[1]]
            assert any(own.get(option) != value for option, value in changed.items() if option != "recipe")
