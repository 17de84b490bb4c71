"""Documents from folders of files, JSON lines, Parquet, URLs and data sets of the Hub, one at a time."""

import datetime
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import Any, BinaryIO

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
        sources: each a folder (files of `FORMATS` and of rows, in all folders below it), a file, the URL of either
            (`s3://bucket/folder`, and all that fsspec knows), or `org/name[@config]` on the Hub.
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
            yield from _read_files(name, _files_of_url(name), columns, log)
        elif path.is_dir():
            yield from _read_files(name, _files_of_folder(path), columns, log)
        elif path.exists():
            yield from _read_files(name, [_File(path.name, name, partial(_open, path), is_named=True)], columns, log)
        elif is_hub_id(name):
            for number, row in enumerate(load_hub_dataset(name, split), start=1):
                yield from document_of_row(f"{name}, row {number}", f"{name}:{number}", row, columns, log)
        else:
            raise UserError(f"{name}: no such file or folder, and not the id of a Hub dataset (org/name)")


def _kinds() -> str:
    return ", ".join((*FORMATS, ".jsonl", ".jsonl.gz", ".parquet"))


@dataclass(frozen=True)
class _File:
    """A file that is read.

    Args:
        name: relative to the folder, which is the id of its document.
        place: its path or its URL.
        open: opens it.
        is_named: whether the user names it, and not the folder.
    """

    name: str
    place: str
    open: Callable[[], BinaryIO]
    is_named: bool = False

    @property
    def suffix(self) -> str:
        return PurePath(self.name).suffix.lower()

    @property
    def has_rows(self) -> bool:
        # What is called .json among other files is seldom rows; such a file is read if it is named itself.
        return self.name.endswith(ROW_SUFFIXES) and (self.is_named or not self.name.endswith((".json", ".json.gz")))


def _open(path: Path) -> BinaryIO:
    return open(path, "rb")


def _files_of_folder(folder: Path, parents: str = "") -> Iterator[_File]:
    """Yield the files below a folder in the order of their paths, but hidden ones and linked folders."""
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        name = f"{parents}{entry.name}"
        if not entry.is_dir():
            yield _File(name, str(entry), partial(_open, entry))
        elif not entry.is_symlink():
            yield from _files_of_folder(entry, f"{name}/")


def _files_of_url(url: str) -> Iterator[_File]:
    """Yield the file at a URL, or those below a folder in the order of their names, but hidden ones."""
    storage, url = Storage(url), url.rstrip("/")
    for name in storage.sizes():
        place = f"{url}/{name}" if name else url
        yield _File(name or url.rpartition("/")[2], place, partial(storage.open, name), is_named=not name)


def _read_files(source: str, files: Iterable[_File], columns: Columns, skipped: list[Skipped]) -> Iterator[Document]:
    others: Counter[str] = Counter()
    found = 0
    for file in files:
        if file.has_rows:
            yield from _read_rows(file, columns, skipped)
        elif file.suffix in FORMATS:
            yield from _read_file(file, skipped)
        elif file.is_named:
            raise UserError(f"{source}: is none of the files that are read: {_kinds()}")
        else:
            others[file.suffix or "no suffix"] += 1
            continue
        found += 1
    if others:
        kinds = ", ".join(f"{count} with {suffix}" for suffix, count in sorted(others.items()))
        logger.warning(f"{source}: files of other kinds are left out: {kinds}")
    if not found:
        raise UserError(f"{source}: holds none of the files that are read: {_kinds()}")


def _read_file(file: _File, skipped: list[Skipped]) -> Iterator[Document]:
    try:
        try:
            file.name.encode()
        except UnicodeEncodeError:
            raise UnreadableFile("has a name that is not UTF-8; rename it") from None
        yield to_document(file.name, file.suffix, read_file(file.name, file.open))
    except UnreadableFile as error:
        _skip(file.place, str(error), skipped)


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


def _read_rows(file: _File, columns: Columns, skipped: list[Skipped]) -> Iterator[Document]:
    rows = _parquet_rows(file) if file.suffix == PARQUET_SUFFIX else read_jsonl(file.place, open_file=file.open)
    for number, row in rows:
        yield from document_of_row(f"{file.place}, row {number}", f"{file.name}:{number}", row, columns, skipped)


def _parquet_rows(file: _File) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{file.place}: reading Parquet needs the extra 'files' (pyarrow is missing)") from None
    try:
        with file.open() as opened, pyarrow.parquet.ParquetFile(opened) as table:
            number = 0
            for batch in table.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file.place}: is not readable Parquet: {one_line(error)}") from None


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
