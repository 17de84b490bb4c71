"""Documents from folders of files, JSON lines, Parquet and data sets of the Hub, one at a time."""

import datetime
import logging
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.data_files import JSON_SUFFIXES, PARQUET_SUFFIX, is_hub_id, load_hub_dataset
from common.errors import UserError, one_line
from common.jsonl import read_jsonl, text_or_id
from retrieval.documents.document import Document, Value
from retrieval.documents.formats import FORMATS, Text, UnreadableFile, read_file
from retrieval.documents.storage import Storage, is_url

logger = logging.getLogger(__name__)

ROW_SUFFIXES = (*JSON_SUFFIXES, PARQUET_SUFFIX)
ID_COLUMNS = ("id", "doc_id", "_id")


@dataclass(frozen=True)
class Skipped:
    """A document that could not be read.

    Args:
        name: its file, or its file and row.
        reason: the end of a sentence about it.
    """

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} {self.reason}"


@dataclass(frozen=True)
class Columns:
    """What the columns of rows are.

    Args:
        text: those that are the text of a document, a blank line between one and the next.
        id: the one that names the document; None: `id`, `doc_id` or `_id`, or the file and the number of the row. All
            others with a text, a number, true, false or a date are metadata.
    """

    text: tuple[str, ...] = ("text",)
    id: str | None = None


def read_documents(
    sources: Sequence[str | Path],
    columns: Columns = Columns(),
    *,
    split: str = "train",
    skipped: list[Skipped] | None = None,
) -> Iterator[Document]:
    """Read documents.

    A file that cannot be read, or a document without text, is skipped and named in a warning; nothing else is. A row
    that is damaged or lacks a column is an error, because all rows of a file are made alike.

    Args:
        sources: each a folder (files of `FORMATS` and of rows, in all folders below it), a file, `org/name[@config]` on
            the Hub, or the URL of a Parquet file or of a folder of them (`s3://bucket/folder`, and all that fsspec
            knows).
        columns: what is read of rows.
        split: the split of a data set on the Hub.
        skipped: a list that what is skipped is added to.

    Yields:
        The documents: those of a folder in the order of their paths, which are their ids, relative to the folder.

    Raises:
        UserError: a source does not exist, has no documents, or holds a row that cannot be read.
    """
    log: list[Skipped] = [] if skipped is None else skipped
    for source in sources:
        name, path = os.fspath(source), Path(source)
        if is_url(name):
            yield from _read_url(name, columns, log)
        elif path.is_dir():
            yield from _read_folder(path, columns, log)
        elif path.exists() and name.endswith(ROW_SUFFIXES):
            yield from _read_rows(path, path.name, columns, log)
        elif path.exists():
            if path.suffix.lower() not in FORMATS:
                raise UserError(f"{path}: is none of the files that are read: {_kinds()}")
            yield from _read_file(path, path.name, log)
        elif is_hub_id(name):
            for number, row in enumerate(load_hub_dataset(name, split), start=1):
                yield from document_of_row(f"{name}, row {number}", f"{name}:{number}", row, columns, log)
        else:
            raise UserError(f"{name}: no such file or folder, and not the id of a Hub dataset (org/name)")


def _kinds() -> str:
    return ", ".join((*FORMATS, ".jsonl", ".jsonl.gz", ".parquet"))


def _read_folder(folder: Path, columns: Columns, skipped: list[Skipped]) -> Iterator[Document]:
    others: Counter[str] = Counter()
    found = 0
    for file in _files(folder):
        name = file.relative_to(folder).as_posix()
        # What is called .json among other files is seldom rows; such a file is read if it is named itself.
        if name.endswith(ROW_SUFFIXES) and not name.endswith((".json", ".json.gz")):
            yield from _read_rows(file, name, columns, skipped)
        elif file.suffix.lower() in FORMATS:
            yield from _read_file(file, name, skipped)
        else:
            others[file.suffix.lower() or "no suffix"] += 1
            continue
        found += 1
    if others:
        kinds = ", ".join(f"{count} with {suffix}" for suffix, count in sorted(others.items()))
        logger.warning(f"{folder}: files of other kinds are left out: {kinds}")
    if not found:
        raise UserError(f"{folder}: holds none of the files that are read: {_kinds()}")


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder in the order of their paths, but hidden ones and linked folders."""
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            if not entry.is_symlink():
                yield from _files(entry)
        else:
            yield entry


def _read_file(file: Path, name: str, skipped: list[Skipped]) -> Iterator[Document]:
    try:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UnreadableFile("has a name that is not UTF-8; rename it") from None
        yield to_document(name, file.suffix.lower(), read_file(file))
    except UnreadableFile as error:
        _skip(str(file), str(error), skipped)


def to_document(name: str, suffix: str, text: Text) -> Document:
    """Return what was read of a file as a document.

    Args:
        name: what the document is called.
        suffix: one of `FORMATS`.
        text: what was read.
    """
    return Document(name, str(text), {"type": suffix[1:], **text.metadata}, text.marks_in_order())


def _skip(name: str, reason: str, skipped: list[Skipped]) -> None:
    name = name.encode(errors="backslashreplace").decode()  # which can be printed
    skipped.append(Skipped(name, reason))
    logger.warning(f"skipped: {skipped[-1]}")


def _read_rows(file: Path, name: str, columns: Columns, skipped: list[Skipped]) -> Iterator[Document]:
    rows = _parquet_rows(file, file) if file.name.endswith(PARQUET_SUFFIX) else read_jsonl(file)
    for number, row in rows:
        yield from document_of_row(f"{file}, row {number}", f"{name}:{number}", row, columns, skipped)


def _read_url(url: str, columns: Columns, skipped: list[Skipped]) -> Iterator[Document]:
    storage = Storage(url)
    names = list(storage.sizes(ending=PARQUET_SUFFIX))
    if not names:
        raise UserError(f"{url}: no such Parquet file, and no folder with one; of URLs nothing else is read")
    for name in names:
        place = f"{url.rstrip('/')}/{name}" if name else url
        with storage.open(name) as file:
            for number, row in _parquet_rows(file, place):
                title = f"{name or url.rpartition('/')[2]}:{number}"
                yield from document_of_row(f"{place}, row {number}", title, row, columns, skipped)


def _parquet_rows(opened_or_path: Any, file: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{file}: reading Parquet needs the extra 'files' (pyarrow is missing)") from None
    try:
        with pyarrow.parquet.ParquetFile(opened_or_path) as opened:
            number = 0
            for batch in opened.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: is not readable Parquet: {one_line(error)}") from None


def document_of_row(
    place: str, name: str, row: dict[str, Any], columns: Columns, skipped: list[Skipped]
) -> Iterator[Document]:
    """Yield the document of a row, or nothing if it has no text.

    Args:
        place: file and row, for errors.
        name: the id, if no column is one.
        row: values by column.
        columns: what the columns are.
        skipped: a list that a row without text is added to.

    Raises:
        UserError: a column is missing, or is no text.
    """
    id_column = columns.id or next((column for column in ID_COLUMNS if column in row), None)
    for column in (*columns.text, *([id_column] if id_column else [])):
        if column not in row:
            raise UserError(f"{place}: the column {column} is missing; it has {', '.join(row) or 'none'}")
    texts = []
    for column in columns.text:
        if not isinstance(row[column], str):
            kind = "null" if row[column] is None else type(row[column]).__name__
            raise UserError(f"{place}: {column} is {kind} instead of text")
        texts.append(text_or_id(row[column], column, place))
    text = "\n\n".join(part for part in texts if part)
    if not text.strip():
        _skip(place, "has no text", skipped)
        return
    metadata = {
        column: value
        for column, given in row.items()
        if column not in columns.text and column != id_column and (value := _value(given)) is not None
    }
    yield Document(text_or_id(row[id_column], id_column, place) if id_column else name, text, metadata)


def _value(given: Any) -> Value | None:
    """Return a value as metadata; None for those that cannot be."""
    if isinstance(given, datetime.date | datetime.time):
        return given.isoformat()
    if not isinstance(given, Value) or (isinstance(given, float) and not math.isfinite(given)):
        return None
    return given
