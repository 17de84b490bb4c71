"""`common.arguments.parse`: the command line takes precedence over the recipe, and errors name the place."""

import math
from dataclasses import dataclass, field
from typing import Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from common.arguments import parse
from common.errors import UserError
from common.ranges import words_of_range
from training.objectives.contrastive.arguments import ObjectiveArguments


@dataclass
class Model:
    model_name_or_path: str = field(metadata={"help": "the encoder"})
    tuning: Literal["full", "lora"] = "full"


@dataclass
class Training:
    learning_rate: float = 1e-3
    max_steps: int | None = None
    train_data: list[str] = field(default_factory=list)
    bf16: bool = False
    symmetric: bool = True


@pytest.fixture
def recipe(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def refusal(*argv: str) -> str:
    with pytest.raises(UserError) as error:
        parse(Model, Training, argv=argv)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_command_line_wins_over_recipe_and_recipe_over_defaults(recipe):
    path = recipe("model_name_or_path: a\nlearning_rate: 1e-4\ntrain_data: [x, y:2]\nbf16: true\nmax_steps:\n")
    model, training = parse(Model, Training, argv=["--config", path, "--learning_rate", "0.5", "--no_symmetric"])
    assert model == Model("a")
    assert training == Training(learning_rate=0.5, train_data=["x", "y:2"], bf16=True, symmetric=False)


# Whatever PyYAML writes for a value, `parse` reads the same value back.
@given(
    name=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(str.strip),
    rate=st.floats(allow_nan=False, allow_infinity=False),
    steps=st.none() | st.integers(-(2**63) + 1, 2**63 - 1),
    data=st.lists(st.text("abc:/.0123456789", min_size=1), min_size=1),
    flags=st.tuples(st.booleans(), st.booleans()),
)
def test_every_value_survives_the_recipe(tmp_path_factory, name, rate, steps, data, flags):
    expected = Training(rate, steps, data, *flags)
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model_name_or_path": name, **vars(expected)}), encoding="utf-8")
    assert parse(Model, Training, argv=["--config", str(path)]) == (Model(name), expected)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--learning_rte", "1"], ["--learning_rte", "learning_rate"]),
        (["--learning_r=1"], ["--learning_r=1", "learning_rate"]),  # no guessing from a prefix
        (["stray"], ["stray"]),
        (["--max_steps", "many"], ["max_steps", "many"]),
        (["--tuning", "all"], ["tuning", "all", "full", "lora"]),
        (["--train_data"], ["train_data"]),
        (["--config"], ["config"]),
    ],
)
def test_mistakes_on_the_command_line(argv, words):
    message = refusal("--model_name_or_path", "a", *argv)
    assert all(word in message for word in words), message


def test_missing_required_argument():
    assert "model_name_or_path" in refusal()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rte: 1", ["learning_rte", "learning_rate"]),
        ("learning-rate: 1", ["unknown argument learning-rate", "did you mean learning_rate?"]),
        ("learning_rate: nan", ["learning_rate", "nan is no finite number"]),  # a text in YAML
        ("learning_rate: .nan", ["learning_rate", "nan is no finite number"]),
        ("learning_rate: -.inf", ["learning_rate", "-inf is no finite number"]),
        ("no_symmetric: true", ["no_symmetric", "symmetric"]),  # an option of the command line, not a field
        ("config: other.yaml", ["unknown argument config"]),
        ("max_steps: many", ["max_steps", "many"]),
        ("max_steps: 1.5", ["max_steps", "1.5"]),
        ("tuning: all", ["tuning", "all"]),
        ("learning_rate: [1, 2]", ["learning_rate", "one value"]),
        ("learning_rate: {a: 1}", ["learning_rate", "one value"]),
        ("train_data: []", ["train_data"]),
        ("bf16: perhaps", ["bf16", "perhaps"]),
        ("bf16: [", ["YAML", "line"]),
        ("- bf16", ["argument: value"]),
        ("", ["argument: value"]),
    ],
)
def test_mistakes_in_the_recipe_name_it(recipe, text, words):
    path = recipe(text)
    message = refusal("--model_name_or_path", "a", "--config", path)
    assert all(word in message for word in [path, *words]), message


def test_mistake_in_the_recipe_is_not_hidden_by_the_command_line(recipe):
    path = recipe("max_steps: many")
    assert path in refusal("--model_name_or_path", "a", "--config", path, "--max_steps", "3")


def test_recipe_that_cannot_be_read(tmp_path):
    assert "absent.yaml" in refusal("--config", str(tmp_path / "absent.yaml"))
    assert str(tmp_path) in refusal("--config", str(tmp_path))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "binary.yaml" in refusal("--config", str(tmp_path / "binary.yaml"))


@pytest.mark.parametrize("word", ["nan", "inf"])
def test_minus_infinity_is_a_number_where_a_range_includes_it(word):
    (arguments,) = parse(ObjectiveArguments, argv=["--negative_weight=-inf"])
    assert arguments.negative_weight == -math.inf
    with pytest.raises(UserError, match=f"{word} is no finite number"):
        parse(ObjectiveArguments, argv=[f"--negative_weight={word}"])


def test_a_range_that_holds_all_numbers_has_words_too():
    assert words_of_range("[-inf, inf)") == "less than infinity"


@dataclass
class Search:
    index: str = field(metadata={"help": "folder"})
    pattern: str | None = field(default=None, metadata={"help": "what is searched", "word": True})
    k: int = 10
    parts: list[str] = field(default_factory=list)


@pytest.mark.parametrize("words", [["who?"], ["--pattern", "who?"], ["--pattern=who?"]])
@pytest.mark.parametrize("before", [[], ["--k", "3"], ["--parts", "a", "b", "--k", "3"]])
def test_the_name_of_an_option_may_be_left_out(before, words):
    index = ["--index", "who?"]  # the same word as that of the other option
    for argv in (before + index + words, words + before + index, index + words + before):
        (arguments,) = parse(Search, argv=argv)
        assert (arguments.index, arguments.pattern) == ("who?", "who?")
        assert arguments.k == (3 if before else 10)


@pytest.mark.parametrize("argv", [["one", "two"], ["-x"], ["one", "--pattern", "two", "three"], ["--k", "one"]])
def test_other_words_without_an_option_are_refused(argv):
    with pytest.raises(UserError):
        parse(Search, argv=["--index", "i", *argv])
