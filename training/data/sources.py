"""Rows of texts from JSON lines, Parquet or the Hub, checked before training; errors name the file, row and column."""

import hashlib
import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import datasets
import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet
from datasets.packaged_modules.parquet.parquet import Parquet
from transformers import PreTrainedTokenizerBase

from common.data_files import JSON_SUFFIXES, PARQUET_SUFFIX, is_hub_id, load_hub_dataset
from common.errors import UserError, one_line
from common.jsonl import read_jsonl
from common.provenance import code_hash, content_hashes
from training.data.document import Document, PairStrategy


@dataclass(frozen=True)
class Columns:
    """The columns that are read.

    Args:
        required: columns of texts that must be there, in this order.
        prefix: columns of texts whose names begin with it are read as well; None: no others.
        rows: plural noun for the rows in errors, such as `pairs`.
        classes: required columns whose integers or texts name the class of a row.
        numbers: required columns of lists of numbers.
        refused: columns that no row may have, because what they say would be lost.
    """

    required: tuple[str, ...]
    prefix: str | None
    rows: str
    classes: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()

    @property
    def every(self) -> tuple[str, ...]:
        """All required columns."""
        return self.required + self.classes + self.numbers

    def refuse(self, place: str, present: Collection[str]) -> None:
        """Refuse columns of which nothing would be read.

        Args:
            place: the file, or the file and the row, for errors.
            present: the columns that are there.

        Raises:
            UserError: one of them is in `refused`.
        """
        for column in self.refused:
            if column in present:
                raise UserError(f"{place}: the column {column} is not read; put it in front of the text")

    def __str__(self) -> str:
        return " and ".join(self.every)


PAIRS = Columns(("anchor", "positive"), "negative", "pairs")
TEXTS = Columns(("text",), None, "texts")
# Of a document: the characters at which its tokens start and stop, and the numbers of their words.
OFFSET_COLUMNS = ("token_starts", "token_stops", "token_words")


@dataclass(frozen=True)
class Source:
    """Rows with the same columns.

    Args:
        name: as the user gave it, without the weight.
        rows: the texts, memory-mapped.
        columns: columns of texts in the order in which they are read: of pairs `anchor`, `positive`, then negatives.
        weight: how many times an epoch goes through the rows.
        classes: columns that name the class of a row.
        strategy: how pairs are made, if the rows are documents; `rows` then may have the `OFFSET_COLUMNS`.
        anchor_kind: whether anchors are read as `query` or as `document`.
        ids: the `text_ids` that were asked for so far, by the fingerprint of their rows and the column.
    """

    name: str
    rows: datasets.Dataset
    columns: tuple[str, ...]
    weight: float = 1.0
    classes: tuple[str, ...] = ()
    strategy: PairStrategy | None = None
    anchor_kind: str = "query"
    ids: dict[tuple[str, str], np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    def select(self, rows: np.ndarray) -> "Source":
        """Return the source with some of its rows only, given by their places in it, in that order."""
        if len(rows) == len(self.rows):
            return self
        chosen = self.rows.select(rows)
        known = {column: ids for (of, column), ids in self.ids.items() if of == self.rows._fingerprint}
        ids = {(chosen._fingerprint, column): own[rows] for column, own in known.items()}
        return replace(self, rows=chosen, ids=ids)

    def numbers(self, rows: list[int]) -> tuple[int, ...]:
        """Return the numbers of rows as a user counts them: from 1, with the rows that were left out."""
        indices = self.rows._indices
        places = rows if indices is None else indices.column(0).take(rows).to_pylist()
        return tuple(place + 1 for place in places)

    def texts(self, rows: list[int]) -> list[list[str]]:
        """Return the texts of some rows, one list per column."""
        selected = self.rows.select_columns(list(dict.fromkeys(self.columns)))[rows]
        return [selected[column] for column in self.columns]

    def documents(self, rows: list[int], tokenizer: PreTrainedTokenizerBase) -> list[Document]:
        """Return some rows as documents, and tokenise them if they were not tokenised before."""
        selected = self.rows[rows]
        if OFFSET_COLUMNS[0] not in selected:
            return [Document.read(text, tokenizer) for text in selected[self.columns[0]]]
        columns = (selected[name] for name in (*self.columns, *OFFSET_COLUMNS))
        return [
            Document(text, np.array([starts, stops]).T, np.array(words))
            for text, starts, stops, words in zip(*columns, strict=True)
        ]

    def classes_of(self, rows: list[int]) -> dict[str, list[str]]:
        """Return the names of the classes of some rows, by column."""
        selected = self.rows.select_columns(list(self.classes))[rows] if self.classes else {}
        return {column: [str(name) for name in selected[column]] for column in self.classes}

    def text_ids(self, columns: Collection[str]) -> np.ndarray:
        """Return a number for each text, equal where the texts are equal: `(rows, columns)` int64.

        The texts are read once: the numbers stay with the source, and with what is selected from it.
        """
        of = self.rows._fingerprint
        for column in columns:
            if (of, column) not in self.ids:
                batches = self.rows.select_columns([column]).iter(1000)
                numbers = (text_id(str(text)) for batch in batches for text in batch[column])
                self.ids[of, column] = np.fromiter(numbers, np.int64, len(self.rows))
        return np.stack([self.ids[of, column] for column in columns], axis=1)

    def content(self, text_ids: np.ndarray) -> str:
        """Return a hash of all that is read of the rows, and their number.

        Args:
            text_ids: `text_ids(columns)` of the columns of texts, which takes time.
        """
        digest = hashlib.blake2b(text_ids.tobytes(), digest_size=8)
        for column in sorted({*self.rows.column_names} - {*self.columns, *OFFSET_COLUMNS}):
            values = self.rows.select_columns([column])
            for start in range(0, len(values), 1000):
                digest.update(json.dumps(values[start : start + 1000][column]).encode())
        return f"{len(self.rows)} rows with the hash {digest.hexdigest()}"

    def longest_texts(self, count: int, tokenizer: PreTrainedTokenizerBase) -> list[list[str]]:
        """Return the texts with the most characters.

        Args:
            count: number of texts per column.
            tokenizer: the model's, for documents from which pairs are made.

        Returns:
            For each column its texts, the longest first; of documents the longest spans that pairs can be made of.
        """
        columns = []
        for column in self.columns:
            lengths = pyarrow.compute.utf8_length(self.rows.data.column(column))
            if self.rows._indices is not None:
                lengths = lengths.take(self.rows._indices.column(0))
            rows = pyarrow.compute.array_sort_indices(lengths, order="descending")[:count].to_pylist()
            if self.strategy is not None:
                documents = self.documents(rows, tokenizer)
                spans = [document.span(0, self.strategy.longest(len(document))) for document in documents]
                return [spans, spans]
            columns.append(self.rows[rows][column])
        return columns


def text_id(text: str) -> int:
    """Return a hash of 63 bits, the same for the same text in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def fingerprint(*parts: str) -> str:
    """Return the name under which `datasets` caches data.

    Its own would not do: it knows files by their times, and its hash of a tokenizer changes from run to run.

    Args:
        parts: everything that the data depend on.
    """
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def read_sources(specifications: list[str], columns: Columns = PAIRS, *, split: str = "train") -> list[Source]:
    """Open training or evaluation data.

    Args:
        specifications: each `path_or_id[:weight]`: a .jsonl, .jsonl.gz or .parquet file, a folder of such files, or
            `org/name[@config]` on the Hub.
        columns: the columns to read.
        split: the split of a Hub dataset.

    Returns:
        One source per specification.

    Raises:
        UserError: a source cannot be read or does not have these columns; names the file, row and column.
    """
    return [_read_source(*split_weight(specification), columns, split) for specification in specifications]


def split_weight(specification: str) -> tuple[str, float]:
    """Split `path_or_id[:weight]` into its name and its weight.

    Args:
        specification: as the user gave it.

    Returns:
        The name, and the weight, 1 by default.

    Raises:
        UserError: the weight is 0.
    """
    name, _, weight = specification.rpartition(":")
    if name and re.fullmatch(r"\d+(\.\d*)?|\.\d+", weight):
        if float(weight) == 0:
            raise UserError(f"{specification}: a weight of 0 leaves nothing to read; leave the source out")
        return name, float(weight)
    return specification, 1.0


def _read_source(name: str, weight: float, columns: Columns, split: str) -> Source:
    path = Path(name)
    if path.exists():
        rows = _read_files(name, data_files(path), columns)
    elif is_hub_id(name):
        rows = load_hub_dataset(name, split)
    else:
        raise UserError(f"{name}: no such file or folder, and not the id of a Hub dataset (org/name)")
    texts = text_columns(name, rows.column_names, columns)
    rows = rows.select_columns(list(dict.fromkeys((*texts, *columns.classes, *columns.numbers))))
    for column, kind in rows.features.items():
        if kind == datasets.Value("string_view"):  # as newer writers keep texts; few functions of pyarrow read it
            rows = rows.cast_column(column, datasets.Value("large_string"))
    if not len(rows):
        raise UserError(f"{name}: holds no {columns.rows}; give at least one row with {columns}")
    _check_texts(name, rows.select_columns(list(dict.fromkeys(texts))))
    _check_classes(name, rows, columns.classes)
    return Source(name, rows, texts, weight, columns.classes)


def data_files(path: Path) -> list[Path]:
    """List the data files of a path.

    Args:
        path: a file, or a folder of files.

    Returns:
        The file, or the files of the folder: all Parquet or all JSON lines.

    Raises:
        UserError: there are none, or of both formats.
    """
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    readable = [file for file in files if file.name.endswith((*JSON_SUFFIXES, PARQUET_SUFFIX))]
    if not readable:
        raise UserError(f"{path}: no .jsonl, .jsonl.gz or .parquet file")
    if len({file.name.endswith(PARQUET_SUFFIX) for file in readable}) > 1:
        raise UserError(f"{path}: mixes Parquet and JSON lines; name the files one by one")
    return readable


def _read_files(name: str, files: list[Path], columns: Columns) -> datasets.Dataset:
    for file in files:
        try:
            with open(file, "rb") as opened:
                empty = not opened.read(1)
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {error.strerror}") from None
        if empty:
            raise UserError(f"{file}: is empty; give JSON lines with {columns}")
    if files[0].name.endswith(PARQUET_SUFFIX):
        return _read_parquet(name, [str(file.absolute()) for file in files], columns)
    return _read_json(files, columns)


def _read_parquet(name: str, paths: list[str], columns: Columns) -> datasets.Dataset:
    try:
        count = sum(pyarrow.parquet.read_metadata(path).num_rows for path in paths)
        present = {path: pyarrow.parquet.read_schema(path).names for path in paths}
        # The columns of all files together; each file has to have them.
        texts = text_columns(name, list(dict.fromkeys(chain.from_iterable(present.values()))), columns)
        for path in paths:
            text_columns(path, present[path], replace(columns, required=texts, prefix=None))
        if not count:  # datasets cannot make a table of nothing
            raise UserError(f"{name}: holds no {columns.rows}; give at least one row with {columns}")
        names = list(dict.fromkeys((*texts, *columns.classes, *columns.numbers)))
        # `load_dataset` would know the files by their times alone, and another hash is what a builder is told apart by.
        builder = Parquet(data_files=paths, columns=names, hash=fingerprint(*content_hashes(paths)))
        builder.download_and_prepare()
        return builder.as_dataset(split="train")
    except (pyarrow.ArrowException, OSError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{name}: is not readable Parquet: {one_line(error.__cause__ or error)}") from None


def _read_json(files: list[Path], columns: Columns) -> datasets.Dataset:
    # datasets' own JSON reader turns strings that look like dates into timestamps and reports errors by block;
    # reading line by line costs one pass, whose result is cached until the content of a file or this code changes. The
    # first row says which columns there are, because a row with others is refused.
    texts = text_columns(str(files[0]), next(json_rows(files[0], columns))[1], columns)
    features = {column: datasets.Value("large_string") for column in (*texts, *columns.classes)}
    features |= {column: datasets.Sequence(datasets.Value("float64")) for column in columns.numbers}
    try:
        return datasets.Dataset.from_generator(
            _json_texts,
            features=datasets.Features(features),
            gen_kwargs={
                "paths": [str(file.absolute()) for file in files],
                "columns": columns,
                "texts": texts,
                "versions": (code_hash(__name__, "common.jsonl"), *content_hashes(files)),
            },
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


def _json_texts(
    paths: list[str], columns: Columns, texts: tuple[str, ...], versions: object
) -> Iterator[dict[str, Any]]:
    """Yield the rows of files of JSON lines; `versions` only is a part of the key of the cache."""
    for path in paths:
        for number, row in json_rows(Path(path), columns):
            yield checked_row(path, number, row, texts, columns)


def checked_row(
    path: str, number: int, row: dict[str, Any], texts: tuple[str, ...], columns: Columns
) -> dict[str, Any]:
    """Check a row, which has to have the same columns as the first one: no text may be dropped, and none is made up.

    Args:
        path: its file, for errors.
        number: its number, for errors.
        row: what the file has.
        texts: the columns of texts to read, which are those of the first row.
        columns: the other columns to read.

    Returns:
        The columns that are read; classes as texts.

    Raises:
        UserError: a column is missing, refused, only begins in this row, or has a value of the wrong type.
    """
    columns.refuse(f"{path}, row {number}", row)
    for column in texts:
        if column not in row:
            remedy = "" if column in columns.required else f", which the first row has; {_same_columns(columns)}"
            raise UserError(f"{path}, row {number}: the column {column} is missing{remedy}")
        _check_text(path, number, column, row[column])
    for column in row:
        if columns.prefix is not None and column.startswith(columns.prefix) and column not in texts:
            raise UserError(
                f"{path}, row {number}: has the column {column}, which the first row lacks; {_same_columns(columns)}"
            )
    for column in columns.classes:
        check_class(path, number, column, row.get(column))
    for column in columns.numbers:
        check_numbers(path, number, column, row.get(column))
    read = {column: row[column] for column in texts} | {column: str(row[column]) for column in columns.classes}
    return read | {column: row[column] for column in columns.numbers}


def _same_columns(columns: Columns) -> str:
    return f"every row must have the same columns {columns.prefix}..., and a text in each"


def json_rows(path: Path, columns: Columns) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read the rows of a file of JSON lines, of which there has to be one.

    Args:
        path: the file.
        columns: what is to be read, for errors.

    Yields:
        The number of the line, from 1, and its object.

    Raises:
        UserError: the file cannot be read, or has no rows.
    """
    empty = True
    for number, row in read_jsonl(path):
        empty = False
        yield number, row
    if empty:
        raise UserError(f"{path}: holds no rows; give JSON lines with {columns}")


def text_columns(name: str, present: Collection[str], columns: Columns) -> tuple[str, ...]:
    """Find the columns of texts to read.

    Args:
        name: the file, for errors.
        present: the columns that it has.
        columns: those that are asked for.

    Returns:
        The required columns and those with the prefix.

    Raises:
        UserError: a required column is missing, or a refused one is there.
    """
    for column in columns.every:
        if column not in present:
            raise UserError(f"{name}: the column {column} is missing; it has {', '.join(present) or 'none'}")
    columns.refuse(name, present)
    more = () if columns.prefix is None else (column for column in present if column.startswith(columns.prefix))
    return (*columns.required, *more)


def _check_texts(name: str, rows: datasets.Dataset) -> None:
    """Check types, missing values and blank texts, in one pass over memory-mapped columns."""
    for column in rows.column_names:
        kind = rows.features[column]
        if not (isinstance(kind, datasets.Value) and kind.dtype in ("string", "large_string")):
            first = next(iter(rows.select_columns(column)))[column]
            _refuse(name, 1, column, f"is {'null' if first is None else type(first).__name__} instead of text")
        start = 0
        for chunk in rows.data.column(column).chunks:
            blank = pyarrow.compute.equal(pyarrow.compute.utf8_trim_whitespace(chunk), "")
            wrong = pyarrow.compute.fill_null(blank, True)
            place = pyarrow.compute.index(wrong, True).as_py()
            if place >= 0:
                _check_text(name, start + place + 1, column, chunk[place].as_py())
            start += len(chunk)


def _check_classes(name: str, rows: datasets.Dataset, columns: tuple[str, ...]) -> None:
    for column in columns:
        kind = rows.data.column(column).type
        named = pyarrow.types.is_integer(kind) or pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)
        missing = pyarrow.compute.index(pyarrow.compute.is_null(rows.data.column(column)), True).as_py()
        if missing >= 0 or not named:
            row = max(0, missing)
            check_class(name, row + 1, column, rows[row][column])


def check_class(name: str, number: int, column: str, value: object) -> None:
    """Check that a value can name a class.

    Args:
        name: the file, for errors.
        number: of the row, for errors.
        column: of the value, for errors.
        value: what the row has.

    Raises:
        UserError: it is neither an integer nor a text.
    """
    if not isinstance(value, int | str) or isinstance(value, bool):
        kind = "null" if value is None else type(value).__name__
        raise UserError(
            f"{name}, row {number}: {column} is {kind}; it names the class of a row, by an integer or a text"
        )


def check_numbers(name: str, number: int, column: str, value: object) -> None:
    """Check that a value is a list of numbers.

    Args:
        name: the file, for errors.
        number: of the row, for errors.
        column: of the value, for errors.
        value: what the row has.

    Raises:
        UserError: it is something else.
    """
    if not isinstance(value, list) or not all(isinstance(x, int | float) and not isinstance(x, bool) for x in value):
        raise UserError(f"{name}, row {number}: {column} must hold a list of numbers, such as [4.5, -1.25]")


def _check_text(name: str, number: int, column: str, text: object) -> None:
    if not isinstance(text, str):
        _refuse(name, number, column, f"is {'null' if text is None else type(text).__name__} instead of text")
    if not text.strip():
        _refuse(name, number, column, "is empty")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        _refuse(name, number, column, "holds half a character, such as \\ud83d without what follows it")


def _refuse(name: str, number: int, column: str, complaint: str) -> NoReturn:
    raise UserError(f"{name}, row {number}: {column} {complaint}; every column holds one text a row")
