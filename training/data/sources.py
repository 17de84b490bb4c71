"""Pairs or texts from JSONL, Parquet or the Hub, checked before the first step: file, row and column are named."""

import hashlib
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import datasets
import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet
from transformers import PreTrainedTokenizerBase

from common.errors import UserError, one_line
from common.jsonl import read_jsonl
from training.data.pair_makers import Document, Positives, longest_pairs

JSON_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".ndjson")
PARQUET_SUFFIX = ".parquet"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?")


@dataclass(frozen=True)
class Columns:
    """Which columns are read.

    Args:
        required: these, in this order.
        prefix: and any number that begin with it; none if None.
        rows: what a row is, in words.
        classes: and these, which hold an integer or a text that names the row's class.
        numbers: and these, which hold a list of numbers.
    """

    required: tuple[str, ...]
    prefix: str | None
    rows: str
    classes: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " and ".join(self.required + self.classes + self.numbers)


# Of a document: the characters at which its tokens start and end, and the numbers of their words.
TOKENS = ("token_starts", "token_stops", "token_words")

PAIRS = Columns(("anchor", "positive"), "negative", "pairs")
TEXTS = Columns(("text",), None, "texts")


@dataclass(frozen=True)
class Source:
    """Rows that share their columns.

    Args:
        name: as the user gave it, without the weight.
        rows: the texts, memory-mapped.
        columns: of pairs `anchor`, `positive`, and any number that begin with `negative`, in that order.
        weight: how many times an epoch goes through the rows.
        classes: columns that name a row's class.
        make: if the rows are documents, how pairs are made of them; `rows` may have the columns of `TOKENS` then.
        anchor_kind: what the model reads anchors as, `query` or `document`.
    """

    name: str
    rows: datasets.Dataset
    columns: tuple[str, ...]
    weight: float = 1.0
    classes: tuple[str, ...] = ()
    make: Positives | None = None
    anchor_kind: str = "query"

    def select(self, rows: np.ndarray) -> "Source":
        """Some of the rows alone, by their number in this source, in their order."""
        return self if len(rows) == len(self.rows) else replace(self, rows=self.rows.select(rows))

    def numbers(self, rows: list[int]) -> tuple[int, ...]:
        """The numbers of rows as a user counts them: from 1, with those that are left out."""
        indices = self.rows._indices
        places = rows if indices is None else indices.column(0).take(rows).to_pylist()
        return tuple(place + 1 for place in places)

    def texts(self, rows: list[int]) -> list[list[str]]:
        """The texts of some rows, one list a column."""
        selected = self.rows.select_columns(list(dict.fromkeys(self.columns)))[rows]
        return [selected[column] for column in self.columns]

    def documents(self, rows: list[int], tokenizer: PreTrainedTokenizerBase) -> list[Document]:
        """Some rows of which pairs are made; they are tokenised here if they were not before."""
        selected = self.rows[rows]
        if TOKENS[0] not in selected:
            return [Document.read(text, tokenizer) for text in selected[self.columns[0]]]
        return [
            Document(text, np.array([starts, stops]).T, np.array(words))
            for text, starts, stops, words in zip(*(selected[name] for name in (*self.columns, *TOKENS)), strict=True)
        ]

    def classes_of(self, rows: list[int]) -> dict[str, list[str]]:
        """What the class columns of some rows hold, by column."""
        selected = self.rows.select_columns(list(self.classes))[rows] if self.classes else {}
        return {column: [str(name) for name in selected[column]] for column in self.classes}

    def text_ids(self, columns: Collection[str]) -> np.ndarray:
        """`(rows, columns)` int64, equal where the texts are equal."""
        texts, portions = self.rows.select_columns(list(dict.fromkeys(columns))), []
        for start in range(0, len(texts), 1000):
            selected = texts[start : start + 1000]
            portions.append(np.array([[text_id(str(text)) for text in selected[column]] for column in columns]).T)
        return np.concatenate(portions)

    def longest_texts(self, count: int, tokenizer: PreTrainedTokenizerBase) -> list[list[str]]:
        """For each column its `count` texts of the most characters, the longest first; of documents their pieces."""
        columns = []
        for column in self.columns:
            lengths = pyarrow.compute.utf8_length(self.rows.data.column(column))
            if self.rows._indices is not None:
                lengths = lengths.take(self.rows._indices.column(0))
            rows = pyarrow.compute.array_sort_indices(lengths, order="descending")[:count].to_pylist()
            if self.make is not None:
                return longest_pairs(self.make, self.documents(rows, tokenizer))
            columns.append(self.rows[rows][column])
        return columns


def text_id(text: str) -> int:
    """63 bits of a hash: the same for the same text in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def read_sources(specifications: list[str], columns: Columns = PAIRS, *, split: str = "train") -> list[Source]:
    """Open training or evaluation data.

    Args:
        specifications: each `path_or_id[:weight]`: a .jsonl, .jsonl.gz or .parquet file, a folder of such files, or
            `org/name[@config]` on the Hub.
        columns: what to read of them.
        split: which split of a Hub dataset.

    Returns:
        One source each.

    Raises:
        UserError: what cannot be read or does not have these columns, by file, row and column.
    """
    return [_read_source(*split_weight(specification), columns, split) for specification in specifications]


def is_hub_id(name: str) -> bool:
    """Whether what is no path may be a dataset on the Hub."""
    return HUB_ID.fullmatch(name) is not None and not name.endswith((*JSON_SUFFIXES, PARQUET_SUFFIX))


def split_weight(specification: str) -> tuple[str, float]:
    """The name and the weight of `path_or_id[:weight]`."""
    name, _, weight = specification.rpartition(":")
    if name and re.fullmatch(r"\d+(\.\d*)?|\.\d+", weight):
        if float(weight) == 0:
            raise UserError(f"{specification}: a weight of 0 leaves nothing to read; leave the source out")
        return name, float(weight)
    return specification, 1.0


def _read_source(name: str, weight: float, wanted: Columns, split: str) -> Source:
    path = Path(name)
    if path.exists():
        rows = _read_files(name, data_files(path), wanted)
    elif is_hub_id(name):
        rows = _read_hub(name, split)
    else:
        raise UserError(f"{name}: no such file or folder, and not the id of a Hub dataset (org/name)")
    columns = present_columns(name, rows.column_names, wanted)
    rows = rows.select_columns(list(dict.fromkeys((*columns, *wanted.classes, *wanted.numbers))))
    if not len(rows):
        raise UserError(f"{name}: holds no {wanted.rows}; give at least one row with {wanted}")
    _check_columns(name, rows.select_columns(list(dict.fromkeys(columns))))
    _check_classes(name, rows, wanted.classes)
    return Source(name, rows, columns, weight, wanted.classes)


def data_files(path: Path) -> list[Path]:
    """The file, or those of the folder, all Parquet or all JSON lines; a `UserError` if there are none."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    readable = [file for file in files if file.name.endswith((*JSON_SUFFIXES, PARQUET_SUFFIX))]
    if not readable:
        raise UserError(f"{path}: no .jsonl, .jsonl.gz or .parquet file")
    if len({file.name.endswith(PARQUET_SUFFIX) for file in readable}) > 1:
        raise UserError(f"{path}: mixes Parquet and JSON lines; name the files one by one")
    return readable


def _read_files(name: str, files: list[Path], wanted: Columns) -> datasets.Dataset:
    for file in files:
        try:
            with open(file, "rb") as opened:
                empty = not opened.read(1)
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {error.strerror}") from None
        if empty:
            raise UserError(f"{file}: is empty; give JSON lines with {wanted}")
    paths = [str(file.absolute()) for file in files]
    if paths[0].endswith(PARQUET_SUFFIX):
        try:
            count = sum(pyarrow.parquet.read_metadata(path).num_rows for path in paths)
            present = {path: pyarrow.parquet.read_schema(path).names for path in paths}
            columns = present_columns(paths[0], present[paths[0]], wanted)
            for path in paths[1:]:
                present_columns(path, present[path], replace(wanted, required=columns, prefix=None))
            if not count:  # datasets cannot make a table of nothing
                raise UserError(f"{name}: holds no {wanted.rows}; give at least one row with {wanted}")
            wanted_columns = list(dict.fromkeys((*columns, *wanted.classes, *wanted.numbers)))
            return datasets.load_dataset("parquet", data_files=paths, columns=wanted_columns, split="train")
        except (pyarrow.ArrowException, OSError, datasets.exceptions.DatasetsError) as error:
            raise UserError(f"{name}: is not readable Parquet: {one_line(error.__cause__ or error)}") from None

    # datasets' own JSON reader turns strings that look like dates into timestamps and reports errors by block;
    # reading line by line costs one pass, whose result is cached until a file changes.
    columns = present_columns(str(files[0]), next(json_rows(files[0], wanted))[1], wanted)
    try:
        return datasets.Dataset.from_generator(
            _json_texts,
            features=datasets.Features(
                {column: datasets.Value("large_string") for column in (*columns, *wanted.classes)}
                | {column: datasets.Sequence(datasets.Value("float64")) for column in wanted.numbers}
            ),
            gen_kwargs={
                "paths": paths,
                "wanted": wanted,
                "columns": columns,
                "versions": tuple((file.stat().st_size, file.stat().st_mtime_ns) for file in files),
            },
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


def _json_texts(
    paths: list[str], wanted: Columns, columns: tuple[str, ...], versions: object
) -> Iterator[dict[str, Any]]:
    """Rows of JSON-lines files; `versions` is there for the cache's key alone."""
    for path in paths:
        for number, row in json_rows(Path(path), wanted):
            yield checked_row(path, number, row, columns, wanted)


def checked_row(
    path: str, number: int, row: dict[str, Any], columns: tuple[str, ...], wanted: Columns
) -> dict[str, Any]:
    """What is read of a row; a `UserError` if it is not as it should be."""
    for column in columns:
        if column not in row:
            raise UserError(f"{path}, row {number}: the column {column} is missing")
        _check_text(path, number, column, row[column])
    for column in wanted.classes:
        check_class(path, number, column, row.get(column))
    for column in wanted.numbers:
        check_numbers(path, number, column, row.get(column))
    texts = {column: row[column] for column in columns} | {column: str(row[column]) for column in wanted.classes}
    return texts | {column: row[column] for column in wanted.numbers}


def json_rows(path: Path, wanted: Columns) -> Iterator[tuple[int, dict]]:
    """Line numbers, from 1, and objects of one file; a `UserError` if there are none."""
    empty = True
    for number, row in read_jsonl(path):
        empty = False
        yield number, row
    if empty:
        raise UserError(f"{path}: holds no rows; give JSON lines with {wanted}")


def _read_hub(name: str, split: str) -> datasets.Dataset:
    repository, _, config = name.partition("@")
    try:
        return datasets.load_dataset(repository, config or None, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{name}: is neither a local file nor loadable from the Hub: {one_line(error)}") from None


def present_columns(name: str, present: Collection[str], wanted: Columns) -> tuple[str, ...]:
    """The columns that are read; a `UserError` if one is missing."""
    for column in (*wanted.required, *wanted.classes, *wanted.numbers):
        if column not in present:
            raise UserError(f"{name}: the column {column} is missing; it has {', '.join(present) or 'none'}")
    more = () if wanted.prefix is None else (column for column in present if column.startswith(wanted.prefix))
    return (*wanted.required, *more)


def _check_columns(name: str, rows: datasets.Dataset) -> None:
    """Types, missing values and blank texts; one pass over memory-mapped columns."""
    for column in rows.column_names:
        kind = rows.features[column]
        if not (isinstance(kind, datasets.Value) and kind.dtype in ("string", "large_string")):
            first = next(iter(rows.select_columns(column)))[column]
            _refuse(name, 1, column, f"is {type(first).__name__} instead of text")
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
    """A `UserError` unless a value can name a class."""
    if not isinstance(value, int | str) or isinstance(value, bool):
        kind = "null" if value is None else type(value).__name__
        raise UserError(
            f"{name}, row {number}: {column} is {kind}; it names the class of a row, by an integer or a text"
        )


def check_numbers(name: str, number: int, column: str, value: object) -> None:
    """A `UserError` unless a value is a list of numbers."""
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
