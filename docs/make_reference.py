"""Write the option tables of docs/reference/ from the scripts' own argument dataclasses.

python docs/make_reference.py          # write them
python docs/make_reference.py --check  # exit with 1 if one of them is not current, and name it
"""

import argparse
import dataclasses
import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

from transformers.hf_argparser import HfArgumentParser

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))  # where the scripts are imported from
FOLDERS = ("training", "eval", "retrieval", "model_cards", "experiments")


class _Parsed(BaseException):
    """Leaves a script's `main` once its command line has been parsed; no `except Exception` stops it."""


def scripts() -> list[Path]:
    """Return the scripts that take options, relative to the repository."""
    found = []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).glob("*.py")):
            text = path.read_text(encoding="utf-8")
            if 'if __name__ == "__main__"' in text and "def main(" in text and "import parse" in text:
                found.append(path.relative_to(ROOT))
    return found


def parse_command(script: Path, argv: list[str]) -> tuple[HfArgumentParser, list[Any]]:
    """Parse a command line as the script itself would, and run nothing after that.

    Args:
        script: path relative to the repository.
        argv: the words after the script's name; `--config` is read too.

    Returns:
        The script's parser, and its dataclasses filled.

    Raises:
        UserError: as the script would raise it.
    """
    original = HfArgumentParser.parse_args_into_dataclasses
    result: list[Any] = []

    def stop(parser: HfArgumentParser, args: Any = None, **options: Any) -> None:
        *instances, _, rest = original(parser, args, **options)
        if rest:
            return [*instances, None, rest]  # `common.arguments.parse` complains of these
        result.extend((parser, instances))
        raise _Parsed

    main = importlib.import_module(".".join(script.with_suffix("").parts)).main
    with (
        patch.object(HfArgumentParser, "parse_args_into_dataclasses", stop),
        patch.object(sys, "argv", [str(script), *argv]),
    ):
        try:
            main()
        except _Parsed:
            return result[0], result[1]
    raise RuntimeError(f"{script} has not parsed its command line")


def parser_of(script: Path) -> HfArgumentParser:
    """Return the parser of a script."""
    found: list[HfArgumentParser] = []

    def stop(parser: HfArgumentParser, *_: Any, **__: Any) -> None:
        found.append(parser)
        raise _Parsed

    main = importlib.import_module(".".join(script.with_suffix("").parts)).main
    with (
        patch.object(HfArgumentParser, "parse_args_into_dataclasses", stop),
        patch.object(sys, "argv", [str(script)]),
    ):
        try:
            main()
        except _Parsed:
            return found[0]
    raise RuntimeError(f"{script} has not parsed its command line")


def page(script: Path) -> str:
    """Return the Markdown page of a script: what it does, and a table of options for each of its dataclasses."""
    parser = parser_of(script)
    module = importlib.import_module(".".join(script.with_suffix("").parts))
    actions = {action.dest: action for action in parser._actions if not action.option_strings[0].startswith("--no_")}
    lines = [f"# {script}", ""]
    lines += ["<!-- Made by docs/make_reference.py from the script's own options: do not edit. -->", ""]
    lines += [_plain((module.__doc__ or "").strip().split("\n\n")[0]), ""]
    lines += ["`--config FILE` reads options from a YAML recipe; the command line overrides it.", ""]
    for dataclass_type in parser.dataclass_types:
        lines += [f"## {_title(dataclass_type.__name__)}", ""]
        if (dataclass_type.__doc__ or "").strip() and not dataclass_type.__doc__.startswith(dataclass_type.__name__):
            lines += [_plain(inspect.cleandoc(dataclass_type.__doc__).split("\n\n")[0]), ""]
        lines += ["| option | default | meaning |", "|---|---|---|"]
        for field in dataclasses.fields(dataclass_type):
            if field.init and field.name in actions:
                lines.append(_row(actions[field.name]))
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _row(action: argparse.Action) -> str:
    """Return one row of an option table."""
    help_text = _plain((action.help or "").replace("%%", "%"))
    if action.choices:
        help_text += f" (one of {', '.join(f'`{choice}`' for choice in action.choices)})"
    return f"| `{action.option_strings[0]}` | {_default(action)} | {help_text.replace('|', chr(92) + '|')} |"


def _default(action: argparse.Action) -> str:
    """Return the default as one would type it on a command line."""
    default = action.default
    if action.required:
        return "required"
    if default is None or default is dataclasses.MISSING or default in ("", []):
        return ""
    if isinstance(default, list):
        return f"`{' '.join(map(str, default))}`"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    value = str(getattr(default, "value", default)).replace(f"{ROOT}/", "")
    return f"`{value}`"


def _plain(text: str) -> str:
    """Return text in one line, with nothing that Markdown takes for HTML."""
    return " ".join(text.split()).replace("<", "&lt;")


def _title(name: str) -> str:
    """Return `Objective` for `ObjectiveArguments`."""
    words = re.findall(r"[A-Z][a-z0-9]*|[A-Z]+(?![a-z])", name.removesuffix("Arguments"))
    return " ".join([words[0], *(word.lower() for word in words[1:])]) if words else "Options"


def pages() -> dict[Path, str]:
    """Return all pages, by their path."""
    return {DOCS / "reference" / script.with_suffix(".md"): page(script) for script in scripts()}


def main() -> None:
    """Write or check the pages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is not current")
    check = parser.parse_args().check
    made = pages()
    there = {path for folder in FOLDERS for path in (DOCS / "reference" / folder).glob("*.md")}
    stale = [path for path, text in made.items() if path not in there or path.read_text(encoding="utf-8") != text]
    stale += sorted(there - made.keys())
    if check:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is not current: run `make reference`", file=sys.stderr)
        raise SystemExit(bool(stale))
    for path in there - made.keys():
        path.unlink()
    for path, text in made.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    print(f"{len(made)} pages in {DOCS.relative_to(ROOT)}/reference")


if __name__ == "__main__":
    main()
