"""JSON lines: one JSON object per line, plain or gzipped, with errors that name the file and the row."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from common.errors import UserError, one_line


def read_jsonl(
    path: str | Path, *columns: str, open_file: Callable[[], BinaryIO] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read the rows of a file of JSON lines; blank lines are skipped, but counted.

    Args:
        path: the file; it is decompressed if its name ends in `.gz`.
        columns: names that every row must have. Their values are not checked.
        open_file: opens it, if it is not a file of this machine.

    Yields:
        The number of the line, from 1, and its object.

    Raises:
        UserError: the file cannot be read, or a row is not an object with these columns.
    """
    try:
        with (
            open(path, "rb") if open_file is None else open_file() as file,
            gzip.open(file) if str(path).endswith(".gz") else file as lines,
        ):
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, parse_row(f"{path}, row {number}", line, *columns)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {one_line(error)}") from None


def read_text_columns(path: str | Path, *columns: str) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Read some columns of a file of JSON lines as texts.

    Args:
        path: the file, as in `read_jsonl`.
        columns: what is read of each row.

    Yields:
        The number of the line, from 1, and the values of the columns.

    Raises:
        UserError: as `read_jsonl`, or a value is neither a text nor an integer that serves as an identifier.
    """
    for number, row in read_jsonl(path, *columns):
        yield number, tuple(text_or_id(row[column], column, f"{path}, row {number}") for column in columns)


def parse_row(place: str, line: bytes, *columns: str) -> dict[str, Any]:
    """Parse one line.

    Args:
        place: the file and the row, for errors.
        line: the JSON of one object.
        columns: names that it must have.

    Returns:
        The object.

    Raises:
        UserError: it is not an object with these columns.
    """
    try:
        row = json.loads(line)
    except RecursionError:
        raise UserError(f"{place}: is nested too deep; write one JSON object per line") from None
    except ValueError as error:  # also bytes that are not UTF-8, and integers of thousands of digits
        raise UserError(f"{place}: is not JSON: {error}; write one JSON object per line") from None
    if not isinstance(row, dict):
        raise UserError(f"{place}: is a JSON {json_kind(row)}; write an object whose keys are the columns")
    for column in columns:
        if column not in row:
            raise UserError(f"{place}: the column {column} is missing; it has {', '.join(row) or 'none'}")
    return row


def json_kind(value: Any) -> str:
    """Return what JSON calls the type of a value."""
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def text_or_id(value: Any, column: str, place: str) -> str:
    """Return a value of a row as a text. An identifier may be an integer in the file; a column named `text` may not.

    Args:
        value: what the row holds.
        column: its name.
        place: the file and the row, for errors.

    Raises:
        UserError: the value is something else, or a text that cannot be encoded.
    """
    if not isinstance(value, str) and not (column != "text" and isinstance(value, int)):
        raise UserError(f"{place}: {column} is {json.dumps(value)[:40]}, not a string")
    try:
        str(value).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: {column} has half a surrogate pair at character {error.start}") from None
    return str(value)
