"""Options that apply under a condition: set outside of it they are refused, in one sentence that names it."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from common.arguments import parse
from common.conditions import GIVEN, NOT_GIVEN, Not
from common.errors import UserError


@dataclass
class Loss:
    teacher: str | None = None
    loss: Literal["mse", "margin"] = field(default="mse", metadata={"help": "the loss", "applies": {"teacher": GIVEN}})
    gamma: float = field(default=1.0, metadata={"help": "of margin", "applies": {"loss": "margin"}})
    cut: bool = field(default=True, metadata={"help": "cut", "applies": {"loss": ("mse", "other")}})
    margin: float | None = None
    relative: bool = field(
        default=False, metadata={"help": "of either", "applies": [{"teacher": GIVEN}, {"margin": GIVEN}]}
    )


@dataclass
class Run:
    max_steps: int = -1
    epochs: float = field(default=1.0, metadata={"help": "passes", "applies": {"max_steps": NOT_GIVEN}})
    schedule: Literal["linear", "constant"] = "linear"
    warmup: int = field(default=0, metadata={"help": "steps", "applies": {"schedule": Not("constant")}})
    temperature: float = field(default=1.0, metadata={"help": "of a script with --tau", "applies": {"tau": GIVEN}})


@pytest.fixture
def accepted(tmp_path):
    def parsed(options: str, recipe: str | None = None) -> None:
        argv = options.split()
        if recipe is not None:
            (tmp_path / "recipe.yaml").write_text(recipe)
            argv = ["--config", str(tmp_path / "recipe.yaml"), *argv]
        parse(Loss, Run, argv=argv)

    return parsed


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--teacher t --loss margin --gamma 2",
        "--teacher t --no_cut",
        "--relative --margin 0.1",
        "--relative --teacher t",
        "--epochs 2 --warmup 3",
        "--max_steps 4",
    ],
)
def test_an_option_that_applies_is_taken(accepted, options):
    accepted(options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--loss mse", "--loss: applies only with --teacher; change that, or leave --loss out"),
        (
            "--gamma 1 --teacher t",  # also its default, if it was written
            "--gamma: applies only with --loss margin, and --loss is mse; change that, or leave --gamma out",
        ),
        (
            "--gamma=2",
            "--gamma: applies only with --loss margin, and that only with --teacher; change that, or leave --gamma out",
        ),
        (
            "--no_cut --teacher t --loss margin",
            "--cut: applies only with --loss mse or other, and --loss is margin; change that, or leave --cut out",
        ),
        (
            "--relative",
            "--relative: applies only with --teacher, or with --margin; change that, or leave --relative out",
        ),
        ("--epochs 2 --max_steps 3", "--epochs: applies only without --max_steps; change that, or leave --epochs out"),
        (
            "--schedule constant --warmup 3",
            "--warmup: applies only with another --schedule than constant; change that, or leave --warmup out",
        ),
        ("--temperature 2", "--temperature: applies only with --tau; change that, or leave --temperature out"),
    ],
)
def test_an_option_that_does_not_apply_is_refused_in_one_sentence(accepted, options, sentence):
    with pytest.raises(UserError) as caught:
        accepted(options)
    assert str(caught.value) == sentence


def test_an_option_of_a_recipe_is_refused_by_file_but_gives_way_to_what_replaces_it(accepted, tmp_path):
    accepted("--max_steps 3", "epochs: 2")
    with pytest.raises(UserError, match=f"--epochs in the recipe {tmp_path}/recipe.yaml: applies only without"):
        accepted("", "epochs: 2\nmax_steps: 3")
    with pytest.raises(UserError, match=r"--gamma in the recipe .*: applies only with --loss margin"):
        accepted("--teacher t", "gamma: 2")
    with pytest.raises(UserError, match="--gamma: applies only"):
        accepted("--teacher t --gamma 3", "loss: mse")


def test_help_says_when_an_option_applies(capsys):
    with pytest.raises(SystemExit):
        parse(Loss, Run, argv=["--help"])
    assert "of margin (applies with --loss margin)" in " ".join(capsys.readouterr().out.split())
