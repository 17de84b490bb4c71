"""Command-line arguments: dataclasses filled from a YAML recipe and from the command line, which takes precedence."""

import argparse
import dataclasses
import difflib
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers.hf_argparser import HfArgumentParser

from common.conditions import Options, conditions_of, words_of
from common.errors import UserError, one_line
from common.files import check_output
from common.ranges import contains, words_of_range

_OURS = ("applies", "within", "output", "word")  # what an option declares beside its help: see `parse`


class _Parser(HfArgumentParser):
    """An `HfArgumentParser` that raises `UserError` instead of exiting, and whose help says when an option applies."""

    @staticmethod
    def _parse_dataclass_field(parser: argparse.ArgumentParser, field: dataclasses.Field) -> None:
        # transformers hands all metadata on to argparse, which does not know ours.
        metadata = {name: value for name, value in field.metadata.items() if name not in _OURS}
        if conditions := conditions_of(field):
            metadata["help"] = f"{metadata['help']} (applies {words_of(conditions)})"
        if interval := field.metadata.get("within"):
            metadata["help"] = f"{metadata['help']} ({words_of_range(interval)})"
        plain: Any = dataclasses.field(default=field.default, default_factory=field.default_factory, metadata=metadata)
        plain.name, plain.type = field.name, field.type
        HfArgumentParser._parse_dataclass_field(parser, plain)
        for action in parser._actions:
            if action.dest == field.name:
                action.type = _checked(action.type, field.metadata.get("within"))

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{one_line(message, most=400)} (--help lists the arguments)")

    def complain_of_unknown(self, names: Sequence[str], where: str, prefix: str = "") -> NoReturn:
        """Raise a `UserError` about unknown arguments that suggests the valid name closest to the first of them."""
        valid = [action.dest for action in self._actions]
        near = difflib.get_close_matches(names[0].lstrip("-").split("=")[0].replace("-", "_"), valid, n=1)
        hint = f"did you mean {prefix}{near[0]}?" if near else "--help lists the arguments"
        raise UserError(f"unknown argument {one_line(' '.join(names), most=400)} {where} ({hint})")


def _checked(kind: Any, interval: str | None) -> Any:
    """Return what reads a word of an option of a type: no option has a use for a NaN or for an empty text."""

    def read(word: str) -> Any:
        if kind is str and not word.strip():
            raise argparse.ArgumentTypeError("is empty; give a value, or leave the argument out")
        value = kind(word)
        if kind is float and not math.isfinite(value) and not (interval and contains(interval, value)):
            raise argparse.ArgumentTypeError(f"{word} is no finite number")
        if kind is int and abs(value) >= 1 << 63:
            raise argparse.ArgumentTypeError(f"{word[:40]} is too large")
        if interval is not None and not contains(interval, value):
            raise argparse.ArgumentTypeError(f"{word}: must be {words_of_range(interval)}")
        return value

    read.__name__ = getattr(kind, "__name__", "value")  # argparse names it in its errors
    return read if kind in (str, int, float) else kind


def parse(*dataclass_types: Any, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Fill dataclasses from `--config recipe.yaml` and from the command line, which takes precedence.

    Beside its help text the metadata of a field may declare when it applies (`applies`, see `common.conditions`), the
    range of its number (`within`, see `common.ranges`), that it names what the script writes (`output`: `folder` or
    `file`), which is tried before the script begins, and that its name may be left out (`word`: `grep PATTERN`).

    Args:
        *dataclass_types: dataclasses as `transformers.HfArgumentParser` takes them (help texts in `metadata`). Their
            field names are the names of arguments and the keys of recipes; no field may be called `config`.
        argv: the command-line words; None: those of the process.

    Returns:
        One instance per dataclass, in the same order.

    Raises:
        UserError: an argument or a key of the recipe is unknown (the closest valid name is suggested), a value has the
            wrong type, is empty, NaN or infinite, or outside its range, a required argument is missing, the recipe
            cannot be read, an output cannot be written, or an argument was given that does not apply, given the others.
    """
    argv = _with_names(list(sys.argv[1:] if argv is None else argv), dataclass_types)
    parser = _new_parser(dataclass_types)
    recipe, _ = _config_parser().parse_known_args(argv)
    defaults = _recipe_argv(Path(recipe.config), dataclass_types) if recipe.config else []
    *instances, _, rest = parser.parse_args_into_dataclasses(
        defaults + argv, return_remaining_strings=True, look_for_args_file=False
    )
    if rest:
        parser.complain_of_unknown(rest, "on the command line", prefix="--")
    given = dict.fromkeys(_given(defaults, dataclass_types), f" in the recipe {recipe.config}")
    Options(instances).check(given | dict.fromkeys(_given(argv, dataclass_types), ""))
    _check_outputs(instances)
    return tuple(instances)


def _with_names(argv: list[str], dataclass_types: Iterable[Any]) -> list[str]:
    """Return command-line words in which the option whose name may be left out has it."""
    options = [option for one in dataclass_types for option in dataclasses.fields(one)]
    name = next((option.name for option in options if option.metadata.get("word")), None)
    if name is None or {"-h", "--help"} & set(argv):
        return argv
    rest = _rest(argv, dataclass_types)
    if rest is None or len(rest) != 1 or rest[0].startswith("-"):
        return argv
    # The same word may be the value of another option.
    for place in (place for place, word in enumerate(argv) if word == rest[0]):
        others = argv[:place] + argv[place + 1 :]
        if _rest(others, dataclass_types) == []:
            return [*others, f"--{name}={rest[0]}"]
    return argv


def _rest(words: Sequence[str], dataclass_types: Iterable[Any]) -> list[str] | None:
    """Return the words that no option takes; None if an option has no value or a wrong one."""
    try:
        return _lenient_parser(dataclass_types).parse_known_args(list(words))[1]
    except UserError:
        return None


def _check_outputs(instances: Iterable[Any]) -> None:
    """Check that the script will be able to write the files and folders that its options name."""
    for instance in instances:
        for option in dataclasses.fields(instance):
            kind, value = option.metadata.get("output"), getattr(instance, option.name)
            if kind is not None and value is not None:
                check_output(value, option.name, kind)


def _config_parser() -> _Parser:
    """Return a parser of `--config` alone: the recipe must be known before the rest can be read."""
    parser = _Parser([], add_help=False, allow_abbrev=False)
    parser.add_argument("--config", metavar="RECIPE", help="YAML file whose keys are names of arguments")
    return parser


def _new_parser(dataclass_types: Iterable[Any]) -> _Parser:
    return _Parser(dataclass_types, parents=[_config_parser()], allow_abbrev=False)


def _lenient_parser(dataclass_types: Iterable[Any]) -> _Parser:
    """Return a parser that requires nothing and sets nothing by default."""
    parser = _new_parser(dataclass_types)
    for action in parser._actions:
        action.default, action.required = argparse.SUPPRESS, False
    return parser


def _given(words: Sequence[str], dataclass_types: Iterable[Any]) -> set[str]:
    """Return the names of the arguments that command-line words set."""
    return set(vars(_lenient_parser(dataclass_types).parse_known_args(list(words))[0]))


def _recipe_argv(path: Path, dataclass_types: Iterable[Any]) -> list[str]:
    """Return a recipe as command-line words, checked key by key so that an error can name the file and the key."""
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the recipe {path}: {error.strerror}") from None
    except RecursionError:
        raise UserError(f"the recipe {path} is nested too deep; write 'argument: value' lines") from None
    except (ValueError, yaml.YAMLError) as error:  # also bytes that are not UTF-8, and integers of thousands of digits
        raise UserError(f"the recipe {path} is not valid YAML: {one_line(error)}") from None
    if not isinstance(recipe, dict):
        raise UserError(f"the recipe {path} holds no 'argument: value' lines")
    parser = _new_parser(dataclass_types)
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    for action in actions.values():
        action.required = False  # one key is checked at a time
    argv = []
    for key, value in recipe.items():
        if key not in actions:
            parser.complain_of_unknown([str(key)], f"in the recipe {path}")
        if value is None:
            continue  # `key:` without a value leaves the default
        if isinstance(value, dict) or (isinstance(value, list) and actions[key].nargs != "+"):
            raise UserError(f"in the recipe {path}, {key} takes one value, not a {type(value).__name__}")
        # Words, not Python values: YAML reads 1e-4 as a string, and the command line's own conversion gets it right.
        words = [f"--{key}", *map(str, value)] if isinstance(value, list) else [f"--{key}={value}"]
        try:
            parser.parse_known_args(words)
        except UserError as error:
            raise UserError(f"in the recipe {path}, {error}") from None
        argv += words
    return argv
