"""Every option of every script applies always, or declares when it does; recipes set what applies."""

import dataclasses
import importlib
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints
from unittest.mock import patch

import pytest
import yaml

from common import arguments
from common.conditions import GIVEN, NOT_GIVEN, Not, Options, conditions_of, default_of
from common.errors import UserError
from experiments.findings import Finding

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))
from make_reference import scripts  # noqa: E402

SCRIPTS = [path for path in scripts() if "import parse" in (ROOT / path).read_text()]
RECIPES = sorted((ROOT / "training" / "recipes").glob("*/*.yaml"))
# What the comments of recipes ask the user for.
GIVEN_BY_THE_USER = {
    "model_name_or_path": "model",
    "train_data": "data.jsonl",
    "output_dir": "out",
    "feature_data": "features.jsonl",
    "structural_teacher": "teacher",
    "contextual_teacher": "teacher",
    "score_teacher": "teacher",
    "masked_teachers": "teacher",
    "student_name_or_path": "student",
}


class _Parsed(BaseException):
    """Leaves a script's `main` where it would parse its options."""


def dataclasses_of(script: Path) -> tuple[type, ...]:
    found: list[type] = []

    def stop(*types: type, argv: Any = None) -> None:
        found.extend(types)
        raise _Parsed

    module = importlib.import_module(".".join(script.with_suffix("").parts))
    with patch.object(module, "parse", stop), patch.object(sys, "argv", [str(script)]), pytest.raises(_Parsed):
        module.main()
    return tuple(found)


class Case(Options):
    """The options of a script at their defaults, to be set one by one without the checks of the dataclasses."""

    def __init__(self, types: tuple[type, ...]) -> None:
        super().__init__([])
        self.kinds: dict[str, Any] = {}
        for one in types:
            own = {option.name: option for option in dataclasses.fields(one) if option.init}
            self.fields |= own
            self.values |= {name: default_of(option) for name, option in own.items()}
            self.kinds |= {name: kind for name, kind in get_type_hints(one).items() if name in own}

    def other(self, name: str, values: tuple[Any, ...]) -> Any:
        """A value of the option's type that is none of `values`."""
        kind = self.kinds[name]
        kind = next((part for part in get_args(kind) if get_origin(part) is Literal), kind)
        choices = get_args(kind) if get_origin(kind) is Literal else (True, False) if kind is bool else ()
        candidates = (*choices, "another", 7.5, ["another"]) if choices else (["another"], "another", 7.5)
        return next(value for value in candidates if value not in values)

    def satisfy(self, name: str) -> None:
        """Set others so that the option applies."""
        if self.applies(name):
            return
        condition = next(c for c in conditions_of(self.fields[name]) if all(other in self.fields for other in c))
        for other, required in condition.items():
            default = default_of(self.fields[other])
            if required is GIVEN:
                self.values[other] = True if self.kinds[other] is bool else self.other(other, (default,))
            elif required is NOT_GIVEN:
                self.values[other] = default
            elif isinstance(required, Not):
                self.values[other] = self.other(other, required.values)
            else:
                self.values[other] = required[0] if isinstance(required, tuple) else required
            if required is not NOT_GIVEN and not isinstance(required, Not):
                self.satisfy(other)

    def violate(self, name: str) -> None:
        """Set others so that the option does not apply: one option of each of its conditions."""
        for condition in conditions_of(self.fields[name]):
            other, required = next(iter(condition.items()))
            if other not in self.fields:
                continue
            default = default_of(self.fields[other])
            if required is GIVEN:
                self.values[other] = default
            elif required is NOT_GIVEN:
                self.values[other] = self.other(other, (default,))
            elif isinstance(required, Not):
                self.values[other] = required.values[0]
            else:
                self.values[other] = self.other(other, required if isinstance(required, tuple) else (required,))


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_an_option_is_refused_outside_its_condition_and_taken_inside(script):
    types = dataclasses_of(script)
    for name, option in Case(types).fields.items():
        case = Case(types)
        if not conditions_of(option):
            case.check({name: ""})
            continue
        case.satisfy(name)
        case.check({name: ""})
        case.violate(name)
        with pytest.raises(UserError, match=rf"^--{name}: applies only .*; change that, or leave --{name} out$") as e:
            case.check({name: ""})
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_conditions_name_options_and_values_that_exist(script):
    case = Case(dataclasses_of(script))
    for name, option in case.fields.items():
        found = [c for c in conditions_of(option) if c.keys() <= case.fields.keys()]
        assert found or not conditions_of(option), f"{name}: no condition is about options of this script"
        for condition in found:
            for other, required in condition.items():
                values = required.values if isinstance(required, Not) else required
                kind = next(
                    (k for k in (case.kinds[other], *get_args(case.kinds[other])) if get_origin(k) is Literal), None
                )
                if kind is not None and values not in (GIVEN, NOT_GIVEN):
                    assert set(values if isinstance(values, tuple) else (values,)) <= set(get_args(kind)), name


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_recipe_sets_what_applies(recipe):
    types = dataclasses_of(Path("training", f"{recipe.parent.name}.py"))
    text = recipe.read_text()
    names = {option.name for one in types for option in dataclasses.fields(one)}
    required = ("model_name_or_path", "train_data", "output_dir")
    argv = ["--config", str(recipe)]
    for name in names & GIVEN_BY_THE_USER.keys():
        if name in required or (f"--{name}" in text and f"\n{name}:" not in text):
            argv += [f"--{name}", GIVEN_BY_THE_USER[name]]
    if recipe.parent.name == "distillation" and not any("_teacher" in word for word in argv) and "score_" not in text:
        argv += ["--structural_teacher", "teacher"]
    arguments.parse(*types, argv=argv)


def test_the_rows_of_the_findings_set_what_applies(tmp_path):
    types = dataclasses_of(Path("training/contrastive.py"))
    names = {option.name for one in types for option in dataclasses.fields(one)}
    start = ["--model_name_or_path", "model", "--train_data", "data.jsonl", "--output_dir", "out"]
    for file in sorted((ROOT / "experiments" / "findings").glob("*.yaml")):
        for row in Finding.read(file).rows:
            recipe = tmp_path / f"{file.stem}-{row.name}.yaml"
            recipe.write_text(yaml.safe_dump({name: row.recipe[name] for name in row.recipe.keys() & names}))
            arguments.parse(*types, argv=["--config", str(recipe), *start])


def test_options_that_were_ignored_are_refused():
    """A selection, as commands: what was taken and ignored before."""
    start = "--model_name_or_path m --train_data d --output_dir o "
    for script, options, name in (
        ("distillation", "--structural_teacher t --structural_gamma 2", "structural_gamma"),
        ("distillation", "--contextual_teacher t --contextual_loss dcca --sdl_weight 1", "sdl_weight"),
        ("distillation", "--contextual_teacher t --structural_mask", "structural_mask"),
        ("distillation", "--score_teacher t --score_loss margin_mse --score_temperature 2", "score_temperature"),
        ("compression", "--relation_objective minilm --relation_heads 4", "relation_heads"),
        ("compression", "--relation_objective minilm --query_weight 2", "query_weight"),
        ("compression", "--attention_weight 2", "attention_weight"),
        ("contrastive", "--lora_r 4", "lora_r"),
        ("contrastive", "--feature_weight 1", "feature_weight"),
        ("contrastive", "--crop_ratio 0.1 0.2", "crop_ratio"),
        ("contrastive", "--pairs twins --query_max_length 9", "query_max_length"),
        ("contrastive", "--objective simcse --query_max_length 9", "query_max_length"),
        ("pretraining", "--soft_weight 1", "soft_weight"),
        ("layout_search", "--queue_size 4", "queue_size"),
    ):
        types = dataclasses_of(Path("training", f"{script}.py"))
        with pytest.raises(UserError, match=f"^--{name}: applies only with "):
            arguments.parse(*types, argv=(start + options).split())
