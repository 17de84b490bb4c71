"""Command-line arguments: dataclasses filled from a YAML recipe and from the command line, which takes precedence."""

import argparse
import dataclasses
import difflib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers.hf_argparser import HfArgumentParser

from common.conditions import Options, conditions_of, words_of
from common.errors import UserError


class _Parser(HfArgumentParser):
    """An `HfArgumentParser` that raises `UserError` instead of exiting, and whose help says when an option applies."""

    @staticmethod
    def _parse_dataclass_field(parser: argparse.ArgumentParser, field: dataclasses.Field) -> None:
        # transformers hands all metadata on to argparse, which does not know our `applies`.
        metadata = {name: value for name, value in field.metadata.items() if name != "applies"}
        if conditions := conditions_of(field):
            metadata["help"] = f"{metadata['help']} (applies {words_of(conditions)})"
        plain: Any = dataclasses.field(default=field.default, default_factory=field.default_factory, metadata=metadata)
        plain.name, plain.type = field.name, field.type
        HfArgumentParser._parse_dataclass_field(parser, plain)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the arguments)")

    def complain_of_unknown(self, names: Sequence[str], where: str) -> NoReturn:
        """Raise a `UserError` about unknown arguments that suggests the valid name closest to the first of them."""
        valid = [option.lstrip("-") for action in self._actions for option in action.option_strings]
        near = difflib.get_close_matches(names[0].lstrip("-").split("=")[0], valid, n=1)
        hint = f"did you mean {near[0]}?" if near else "--help lists the arguments"
        raise UserError(f"unknown argument {' '.join(names)} {where} ({hint})")


def parse(*dataclass_types: Any, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Fill dataclasses from `--config recipe.yaml` and from the command line, which takes precedence.

    Args:
        *dataclass_types: dataclasses as `transformers.HfArgumentParser` takes them (help texts in `metadata`). Their
            field names are the names of arguments and the keys of recipes; no field may be called `config`.
        argv: the command-line words; None: those of the process.

    Returns:
        One instance per dataclass, in the same order.

    Raises:
        UserError: an argument or a key of the recipe is unknown (the closest valid name is suggested), a value has the
            wrong type, a required argument is missing, the recipe cannot be read, or an argument was given that does
            not apply, given the others (`common.conditions`).
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _new_parser(dataclass_types)
    recipe, _ = _config_parser().parse_known_args(argv)
    defaults = _recipe_argv(Path(recipe.config), dataclass_types) if recipe.config else []
    *instances, _, rest = parser.parse_args_into_dataclasses(
        defaults + argv, return_remaining_strings=True, look_for_args_file=False
    )
    if rest:
        parser.complain_of_unknown(rest, "on the command line")
    given = dict.fromkeys(_given(defaults, dataclass_types), f" in the recipe {recipe.config}")
    Options(instances).check(given | dict.fromkeys(_given(argv, dataclass_types), ""))
    return tuple(instances)


def _config_parser() -> _Parser:
    """Return a parser of `--config` alone: the recipe must be known before the rest can be read."""
    parser = _Parser([], add_help=False, allow_abbrev=False)
    parser.add_argument("--config", metavar="RECIPE", help="YAML file whose keys are names of arguments")
    return parser


def _new_parser(dataclass_types: Iterable[Any]) -> _Parser:
    return _Parser(dataclass_types, parents=[_config_parser()], allow_abbrev=False)


def _given(words: Sequence[str], dataclass_types: Iterable[Any]) -> set[str]:
    """Return the names of the arguments that command-line words set."""
    parser = _new_parser(dataclass_types)
    for action in parser._actions:
        action.default, action.required = argparse.SUPPRESS, False
    return set(vars(parser.parse_known_args(list(words))[0]))


def _recipe_argv(path: Path, dataclass_types: Iterable[Any]) -> list[str]:
    """Return a recipe as command-line words, checked key by key so that an error can name the file and the key."""
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the recipe {path}: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"the recipe {path} is not valid YAML: {' '.join(str(error).split())}") from None
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
