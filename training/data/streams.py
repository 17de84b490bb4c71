"""Pairs from data that is read as it comes: nothing is copied or counted before the first step.

A stream is a list of shards: stretches of JSON-lines files, compressed files, row groups of Parquet, or those of a
dataset on the Hub. Each pass goes through them in an order of its own. Rows come in blocks, and those of a block are
shuffled as if they were all there is (`PairBatches`). So a run that goes on has to know where its block began, and
reads that again: datasets' own shuffle buffer would have been lost with the run.
"""

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
from torch.utils.data import Dataset

from common.errors import UserError, one_line
from common.jsonl import parse_row
from training.data.pair_batches import PairBatch, PairBatches, PairTokenizer
from training.data.pair_makers import Document, Positives
from training.data.sources import (
    PARQUET_SUFFIX,
    Columns,
    Source,
    checked_row,
    data_files,
    is_hub_id,
    present_columns,
    split_weight,
)

SHARD_BYTES = 2**24  # of JSON lines: a run that goes on reads at most so much anew, and a block
BEGINNING = 2**12  # characters that tell of most documents whether they are long enough


@dataclass(frozen=True)
class Shard:
    """A stretch of a file.

    Args:
        path: of the file.
        start, stop: bytes of JSON lines; a shard has the lines that begin there. Of Parquet the number of a row group.
    """

    path: str
    start: int = 0
    stop: int = 0

    def __str__(self) -> str:
        unit = "row group" if self.path.endswith(PARQUET_SUFFIX) else "from byte"
        return f"{self.path} {unit} {self.start}" if self.start else self.path

    def rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The rows, numbered from 1; a `UserError` if they cannot be read."""
        try:
            if self.path.endswith(PARQUET_SUFFIX):
                table = pyarrow.parquet.ParquetFile(self.path).read_row_group(self.start)
                yield from enumerate(table.to_pylist(), start=1)
            else:
                for number, line in enumerate(self._lines(), start=1):
                    if line.strip():
                        yield number, parse_row(f"{self}, row {number}", line)
        except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as error:
            raise UserError(f"{self}: cannot be read: {one_line(error)}") from None

    def _lines(self) -> Iterator[bytes]:
        if self.path.endswith(".gz"):
            with gzip.open(self.path) as file:
                yield from file
            return
        with open(self.path, "rb") as file:
            if self.start:
                file.seek(self.start - 1)
                file.readline()  # what is left of a line of the shard before
            while file.tell() < self.stop and (line := file.readline()):
                yield line


def shards_of(path: Path) -> list[Shard]:
    """The shards of a file or folder."""
    shards = []
    for file in map(str, data_files(path)):
        if file.endswith(PARQUET_SUFFIX):
            try:
                shards += [Shard(file, group) for group in range(pyarrow.parquet.read_metadata(file).num_row_groups)]
            except (OSError, pyarrow.ArrowException) as error:
                raise UserError(f"{file}: is not readable Parquet: {one_line(error)}") from None
        elif file.endswith(".gz"):
            shards.append(Shard(file))
        else:
            size = Path(file).stat().st_size
            shards += [Shard(file, start, min(start + SHARD_BYTES, size)) for start in range(0, size, SHARD_BYTES)]
    return shards


def _read_shards(shards: list[Shard]) -> Iterator[dict[str, Any]]:
    for shard in shards:
        for number, row in shard.rows():
            yield {"place": f"{shard}", "number": number, "row": row}


@dataclass(frozen=True)
class Stream:
    """A source of rows that are read as they come; arguments as those of `Source`.

    Args:
        shards: rows as `_read_shards` gives them, or as the Hub does.
        wanted: what is read of a row.
    """

    name: str
    shards: datasets.IterableDataset
    wanted: Columns
    columns: tuple[str, ...]
    weight: float = 1.0
    make: Positives | None = None
    anchor_kind: str = "query"

    def read(self, row: dict[str, Any]) -> dict[str, str]:
        """A row as the shards give it, to its texts."""
        if row.keys() >= {"place", "number", "row"}:
            return checked_row(row["place"], row["number"], row["row"], self.columns, self.wanted)
        return checked_row(self.name, 0, row, self.columns, self.wanted)

    def block(self, rows: list[dict[str, str]]) -> Source:
        """Rows that were read, as a source of their own."""
        texts = datasets.Dataset.from_list(rows)
        return Source(self.name, texts, self.columns, 1.0, self.wanted.classes, self.make, self.anchor_kind)


def open_streams(specifications: list[str], wanted: Columns) -> list[Stream]:
    """Sources, as `read_sources` takes them, as streams. Of each its first row is read.

    Raises:
        UserError: what cannot be read, or has not these columns.
    """
    streams = []
    for specification in specifications:
        name, weight = split_weight(specification)
        if Path(name).exists():
            shards: Any = datasets.IterableDataset.from_generator(
                _read_shards, gen_kwargs={"shards": shards_of(Path(name))}
            )
        elif is_hub_id(name):
            repository, _, config = name.partition("@")
            try:
                shards = datasets.load_dataset(repository, config or None, split="train", streaming=True)
            except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
                raise UserError(f"{name}: is not loadable from the Hub: {one_line(error)}") from None
        else:
            raise UserError(f"{name}: no such file or folder, and not the id of a Hub dataset (org/name)")
        first = next(iter(shards), None)
        if first is None:
            raise UserError(f"{name}: holds no {wanted.rows}; give at least one row with {wanted}")
        stream = Stream(name, shards, wanted, present_columns(name, first.get("row", first), wanted), weight)
        stream.read(first)
        streams.append(stream)
    return streams


class Reader:
    """The endless rows of a stream, from any position that it has had."""

    def __init__(self, stream: Stream, *seed: int) -> None:
        self.stream, self.seed = stream, seed
        self.go_to({"pass": 0, "shard": 0, "row": 0})

    def go_to(self, position: dict[str, int]) -> None:
        """Read on from a position."""
        self.turn, self.shard, self.row = position["pass"], position["shard"], position["row"]
        count = self.stream.shards.num_shards
        order = np.random.default_rng((*self.seed, self.turn)).permutation(count)
        shard = self.stream.shards.shard(count, int(order[self.shard])).skip(self.row)
        # Not iter(shard): in a process that loads, datasets would share the rows out over these processes.
        self.rows = shard.iter(batch_size=1)

    def position(self) -> dict[str, int]:
        """Where the next row is."""
        return {"pass": self.turn, "shard": self.shard, "row": self.row}

    def __next__(self) -> dict[str, str]:
        while (row := next(self.rows, None)) is None:
            turn, shard = divmod(self.shard + 1, self.stream.shards.num_shards)
            self.go_to({"pass": self.turn + turn, "shard": shard, "row": 0})
        self.row += 1
        return self.stream.read({name: value for name, (value,) in row.items()})


class _Blocks:
    """The batches of a stream, in order.

    Args:
        reader: of its rows.
        batches: of a block.
        options: of `PairBatches`.
    """

    def __init__(self, reader: Reader, batches: int, tokenize: PairTokenizer, options: dict[str, Any]) -> None:
        self.reader, self.batches, self.tokenize, self.options = reader, batches, tokenize, options
        self.go_to({"start": reader.position(), "block": 0, "used": 0})

    def go_to(self, position: dict[str, Any]) -> None:
        """Go on with batch `used` of the block that starts at a position of the reader."""
        self.start, self.block, self.used = position["start"], position["block"], position["used"]
        self.loaded: PairBatches | None = None

    def position(self) -> dict[str, Any]:
        return {"start": self.start, "block": self.block, "used": self.used}

    def load(self) -> PairBatches:
        """The block, read if it was not."""
        if self.loaded is None:
            self.reader.go_to(self.start)
            size = self.batches * self.options["batch_size"] * self.options["world_size"]
            rows, passes = list[dict[str, str]](), self.reader.turn
            while len(rows) < size:
                row = next(self.reader)
                if self._is_long_enough(row):
                    rows.append(row)
                elif not rows and self.reader.turn > passes + 1:
                    raise UserError(f"{self.reader.stream.name}: no document is long enough for two pieces")
            seed = int(np.random.default_rng((*self.reader.seed, self.block, 1)).integers(2**31))
            self.loaded = PairBatches([self.reader.stream.block(rows)], self.tokenize, seed=seed, **self.options)
        return self.loaded

    def next(self) -> None:
        """Pass over a batch."""
        if self.used + 1 < self.batches:
            self.used += 1
        else:
            self.load()
            self.go_to({"start": self.reader.position(), "block": self.block + 1, "used": 0})

    def _is_long_enough(self, row: dict[str, str]) -> bool:
        stream, generator = self.reader.stream, np.random.default_rng(0)
        if stream.make is None:
            return True
        text = row[stream.columns[0]]
        parts = (text[:BEGINNING], text) if len(text) > BEGINNING else (text,)
        return any(stream.make(Document.read(part, self.tokenize.tokenizer), generator) is not None for part in parts)


class StreamedBatches(Dataset):
    """Batch number `index` of streams, for one process: a function of `index`, like `PairBatches`.

    Which stream a batch comes from is drawn by the weights. Every process reads all rows, and takes its share of each
    batch: the batches are then the same whatever the number of processes. They are reached one after another, and that
    after a bookmark at once: every batch has the one of the next.
    """

    def __init__(
        self,
        streams: list[Stream],
        tokenize: PairTokenizer,
        *,
        length: int,
        buffer: int,
        batch_size: int,
        batch_tokens: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        keep_texts: bool = False,
    ) -> None:
        """Args:
        length: batches of the run.
        buffer: rows that are shuffled together, at least; a block has whole batches.
        batch_size, batch_tokens, seed, rank, world_size, keep_texts: as in `PairBatches`.
        """
        self.streams, self.tokenize, self.length, self.seed = streams, tokenize, length, seed
        self.batch_size, self.batch_tokens, self.global_batch_size = batch_size, batch_tokens, batch_size * world_size
        self.block_batches = -(-buffer // self.global_batch_size)
        options = {
            "batch_size": batch_size,
            "batch_tokens": batch_tokens,
            "rank": rank,
            "world_size": world_size,
            "keep_texts": keep_texts,
        }
        self.blocks = [
            _Blocks(Reader(stream, seed, 1 + number), self.block_batches, tokenize, options)
            for number, stream in enumerate(streams)
        ]
        self.go_to({"index": 0, "streams": [blocks.position() for blocks in self.blocks]})

    def __len__(self) -> int:
        return self.length

    def describe(self) -> dict[str, Any]:
        """All that the order depends on, and a resumed run must agree in; the number of processes is not in it."""
        return {
            "seed": self.seed,
            "pairs a batch": self.global_batch_size,
            "batches a block": self.block_batches,
            "sources": [[stream.name, stream.shards.num_shards, stream.weight] for stream in self.streams],
            "pairs": [str(stream.make) for stream in self.streams],
        }

    def go_to(self, bookmark: dict[str, Any]) -> None:
        """Start from a batch that has been reached before."""
        self.start, self.index = bookmark, bookmark["index"]
        for blocks, position in zip(self.blocks, bookmark["streams"], strict=True):
            blocks.go_to(position)

    def stream_of(self, index: int) -> int:
        """The number of the stream that batch `index` comes from."""
        weights = np.array([stream.weight for stream in self.streams])
        return int(np.random.default_rng((self.seed, 0, index)).choice(len(weights), p=weights / weights.sum()))

    def __getitem__(self, index: int) -> PairBatch:
        try:
            if index < self.index:
                self.go_to(self.start)
            while self.index < index:
                self._pass()
            blocks = self.blocks[self.stream_of(index)]
            batch = blocks.load()[blocks.used]
            self._pass()
        except UserError as error:
            return Refusal(str(error))  # type: ignore[return-value] # raises where the batch is moved to its device
        positions = [blocks.position() for blocks in self.blocks]
        return replace(batch, bookmark={"index": self.index, "streams": positions})

    def _pass(self) -> None:
        self.blocks[self.stream_of(self.index)].next()
        self.index += 1

    def heaviest(self) -> PairBatch:
        """A batch that takes at least as much memory as any of the run: texts that fill the limit, in full chunks."""
        tokenizer, batches = self.tokenize.tokenizer, []
        for stream, blocks in zip(self.streams, self.blocks, strict=True):
            block = blocks.load()
            (text, *_), *_ = block.sources[0].texts([0])
            document = Document.read(text, tokenizer)
            limit = max(self.tokenize.max_length, self.tokenize.query_max_length)
            document = Document.read(" ".join([text] * -(-limit // max(1, len(document)))), tokenizer)
            wanted = limit if stream.make is None else stream.make.longest(limit)
            longest = [document.piece(0, min(wanted, len(document)))] * self.batch_size
            columns = [longest] * (len(stream.columns) if stream.make is None else 2)
            batches.append(block.collate(block.sources[0], list(range(self.batch_size)), columns, cut=True))
        return max(batches, key=lambda batch: (batch.largest_chunk().input_ids.numel(), batch.tokens))


@dataclass(frozen=True)
class Refusal:
    """What a batch is that cannot be read: an exception in a process that loads would arrive as a traceback."""

    message: str

    def to(self, device: Any) -> None:
        """Raise it where the batch is used."""
        raise UserError(self.message)
