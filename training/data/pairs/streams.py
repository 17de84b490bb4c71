"""Pairs from data that is read during training: nothing is copied or counted before the first step.

A stream is a list of shards: byte ranges of JSON-lines files, compressed files, row groups of Parquet, or the shards of
a dataset on the Hub. Each epoch goes through them in another order. Rows come in blocks, and the rows of a block are
shuffled like a whole source (`PairBatches`). A run that is resumed only has to know where its block began, and reads
the block again: the contents of the shuffle buffer of `datasets` would be lost.
"""

import gzip
import hashlib
import os
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

from common.data_files import PARQUET_SUFFIX, is_hub_id, load_hub_dataset
from common.errors import UserError, one_line
from common.jsonl import parse_row
from training.data.document import Document, PairStrategy
from training.data.pairs.batches import PairBatch, PairBatches, PairTokenizer
from training.data.sources import Columns, Source, checked_row, data_files, split_weight, text_columns

SHARD_BYTES = 2**24  # of JSON lines; a resumed run reads at most a shard and a block again
BEGINNING = 2**12  # characters that are enough to see of most documents that they are long enough


@dataclass(frozen=True)
class Shard:
    """A part of a file.

    Args:
        path: the file.
        start: the first byte of JSON lines; of Parquet the number of the row group.
        stop: the byte after the last of JSON lines. A shard has the lines that begin in this range.
    """

    path: str
    start: int = 0
    stop: int = 0

    def __str__(self) -> str:
        unit = "row group" if self.path.endswith(PARQUET_SUFFIX) else "from byte"
        return f"{self.path} {unit} {self.start}" if self.start else self.path

    def rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Read the rows.

        Yields:
            The number of the row in the shard, from 1, and its columns.

        Raises:
            UserError: they cannot be read.
        """
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
                file.readline()  # the rest of a line that belongs to the shard before
            while file.tell() < self.stop and (line := file.readline()):
                yield line


def shards_of(path: Path) -> list[Shard]:
    """Divide the data files of a path into shards.

    Args:
        path: a file or a folder.

    Returns:
        The shards, in the order of the files.

    Raises:
        UserError: there are no data files, or they cannot be read.
    """
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
    """A source of rows that are read during training.

    Args:
        name: as the user gave it, without the weight.
        shards: rows as `_read_shards` or the Hub yields them.
        read_columns: the columns that are read of a row.
        columns: those of them that are texts, in the order in which they are read.
        content: what tells its data from other data: the size of its files and a hash of samples of them, the
            beginning of every 16 MiB and the end; or on the Hub its name and its number of shards.
        weight: share of the batches, in proportion to the weights of the other streams.
        strategy: how pairs are made, if the rows are documents.
        anchor_kind: whether anchors are read as `query` or as `document`.
    """

    name: str
    shards: datasets.IterableDataset
    read_columns: Columns
    columns: tuple[str, ...]
    content: str
    weight: float = 1.0
    strategy: PairStrategy | None = None
    anchor_kind: str = "query"

    def read(self, row: dict[str, Any], number: int) -> dict[str, str]:
        """Return the checked columns of a row that `shards` yielded, row `number` of a shard on the Hub."""
        if row.keys() >= {"place", "number", "row"}:
            return checked_row(row["place"], row["number"], row["row"], self.columns, self.read_columns)
        return checked_row(f"{self.name}, a shard", number, row, self.columns, self.read_columns)

    def block(self, rows: list[dict[str, str]]) -> Source:
        """Return rows that were read as a source."""
        texts = datasets.Dataset.from_list(rows)
        return Source(self.name, texts, self.columns, 1.0, self.read_columns.classes, self.strategy, self.anchor_kind)


def open_streams(specifications: list[str], columns: Columns) -> list[Stream]:
    """Open training data as streams, and read the first row of each.

    Args:
        specifications: the sources, in the format of `read_sources`.
        columns: the columns to read.

    Returns:
        One stream per specification.

    Raises:
        UserError: a source cannot be read, or does not have these columns.
    """
    streams = []
    for specification in specifications:
        name, weight = split_weight(specification)
        shards = _open_shards(name)
        first = next_row(name, iter(shards))
        if first is None:
            raise UserError(f"{name}: holds no {columns.rows}; give at least one row with {columns}")
        texts, content = text_columns(name, first.get("row", first), columns), _content(name, shards)
        stream = Stream(name, shards, columns, texts, content, weight)
        stream.read(first, 1)
        streams.append(stream)
    return streams


def next_row(name: str, rows: Iterator[dict[str, Any]]) -> dict[str, Any] | None:
    """Read the next row of a stream.

    Args:
        name: of the stream, for errors.
        rows: what is read.

    Returns:
        The row; None after the last.

    Raises:
        UserError: it cannot be read: the network fails, or the files of a dataset differ in their columns.
    """
    try:
        return next(rows, None)
    except (OSError, ValueError, datasets.exceptions.DatasetsError, pyarrow.ArrowException) as error:
        raise UserError(f"{name}: the next row cannot be read: {one_line(error)}") from None


def _open_shards(name: str) -> Any:
    if Path(name).exists():
        shards = shards_of(Path(name))
        return datasets.IterableDataset.from_generator(_read_shards, gen_kwargs={"shards": shards})
    if not is_hub_id(name):
        raise UserError(f"{name}: no such file or folder, and not the id of a Hub dataset (org/name)")
    return load_hub_dataset(name, "train", streaming=True)


def _content(name: str, shards: datasets.IterableDataset) -> str:
    """Return what tells the data of a stream from other data without reading all of it."""
    if not Path(name).exists():
        return f"{name} in {shards.num_shards} shards"
    digest, size = hashlib.blake2b(digest_size=8), 0
    for file in data_files(Path(name)):
        with open(file, "rb") as opened:
            end = opened.seek(0, os.SEEK_END)
            for start in range(0, end, SHARD_BYTES):
                opened.seek(start)
                digest.update(opened.read(BEGINNING))
            opened.seek(max(0, end - BEGINNING))
            digest.update(opened.read())
        digest.update(str(end).encode())
        size += end
    return f"{size} bytes with the hash {digest.hexdigest()} of samples"


class Reader:
    """The endless rows of a stream, from the start or from any position that was reached before.

    Args:
        stream: what is read.
        seed: random seed of the order of the shards.
    """

    def __init__(self, stream: Stream, *seed: int) -> None:
        self.stream, self.seed = stream, seed
        self.go_to({"pass": 0, "shard": 0, "row": 0})

    def go_to(self, position: dict[str, int]) -> None:
        """Continue at a position."""
        self.epoch, self.shard, self.row = position["pass"], position["shard"], position["row"]
        count = self.stream.shards.num_shards
        order = np.random.default_rng((*self.seed, self.epoch)).permutation(count)
        shard = self.stream.shards.shard(count, int(order[self.shard])).skip(self.row)
        # Not iter(shard): in a worker of a data loader, datasets would divide the rows among the workers.
        self.rows = shard.iter(batch_size=1)

    def position(self) -> dict[str, int]:
        """Return where the next row is."""
        return {"pass": self.epoch, "shard": self.shard, "row": self.row}

    def __next__(self) -> dict[str, str]:
        while (row := next_row(self.stream.name, self.rows)) is None:
            more, shard = divmod(self.shard + 1, self.stream.shards.num_shards)
            self.go_to({"pass": self.epoch + more, "shard": shard, "row": 0})
        self.row += 1
        return self.stream.read({name: value for name, (value,) in row.items()}, self.row)


class _Blocks:
    """The batches of a stream, in order.

    Args:
        reader: reads its rows.
        batches: number of batches in a block.
        tokenize: tokenizer of the pairs.
        options: options of the `PairBatches` of a block.
    """

    def __init__(self, reader: Reader, batches: int, tokenize: PairTokenizer, options: dict[str, Any]) -> None:
        self.reader, self.batches, self.tokenize, self.options = reader, batches, tokenize, options
        self.go_to({"start": reader.position(), "block": 0, "used": 0})

    def go_to(self, position: dict[str, Any]) -> None:
        """Continue with batch `used` of the block that starts at a position of the reader."""
        self.start, self.block, self.used = position["start"], position["block"], position["used"]
        self.loaded: PairBatches | None = None
        self.too_short_share = 0.0  # of the rows that were read for the loaded block

    def position(self) -> dict[str, Any]:
        """Return where the next batch is."""
        return {"start": self.start, "block": self.block, "used": self.used}

    def load(self) -> PairBatches:
        """Return the block; it is read unless it was read before."""
        if self.loaded is None:
            self.reader.go_to(self.start)
            size = self.batches * self.options["batch_size"] * self.options["world_size"]
            rows, too_short, first_epoch = list[dict[str, str]](), 0, self.reader.epoch
            strategy = self.reader.stream.strategy
            while len(rows) < size:
                row = next(self.reader)
                if strategy is None or self._is_long_enough(row, strategy):
                    rows.append(row)
                    continue
                too_short += 1
                if not rows and self.reader.epoch > first_epoch + 1:
                    raise UserError(
                        f"{self.reader.stream.name}: no document is long enough for a pair, which needs "
                        f"{strategy.needs}; give longer ones, or other --pairs"
                    )
            self.too_short_share = too_short / (too_short + size)
            seed = int(np.random.default_rng((*self.reader.seed, self.block, 1)).integers(2**31))
            self.loaded = PairBatches([self.reader.stream.block(rows)], self.tokenize, seed=seed, **self.options)
        return self.loaded

    def skip(self) -> None:
        """Go to the next batch."""
        if self.used + 1 < self.batches:
            self.used += 1
        else:
            self.load()
            self.go_to({"start": self.reader.position(), "block": self.block + 1, "used": 0})

    def _is_long_enough(self, row: dict[str, str], strategy: PairStrategy) -> bool:
        text, generator = row[self.reader.stream.columns[0]], np.random.default_rng(0)
        parts = (text[:BEGINNING], text) if len(text) > BEGINNING else (text,)
        documents = (Document.read(part, self.tokenize.tokenizer) for part in parts)
        return any(strategy(document, generator) is not None for document in documents)


class StreamedBatches(Dataset):
    """Batch number `index` of streams, for one process; a pure function of `index`, like `PairBatches`.

    The stream of each batch is drawn by the weights. Every process reads all rows, and takes its share of each batch,
    so that the batches are the same whatever the number of processes. Batches are reached one after another; but the
    one after a bookmark is reached at once, and every batch has the bookmark of the next.

    Args:
        streams: the data.
        tokenize: tokenizer of the pairs.
        length: number of batches of the run.
        buffer: least number of rows that are shuffled together; a block has whole batches.
        batch_size: pairs per batch and process.
        batch_tokens: tokens of a packed chunk.
        seed: random seed.
        rank: number of this process.
        world_size: number of processes.
        keep_texts: keep the texts of a batch beside their tokens.
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
        """Return what options stand for, by option; a place in the stream has a meaning under the same ones only."""
        return {
            "train_data": [f"{stream.content} and weight {stream.weight:g}" for stream in self.streams],
            "per_device_train_batch_size": f"{self.global_batch_size} over all processes",
            "shuffle_buffer": self.block_batches * self.global_batch_size,
            "seed": self.seed,
        }

    def go_to(self, bookmark: dict[str, Any]) -> None:
        """Continue at a batch that was reached before."""
        self.start, self.index = bookmark, bookmark["index"]
        for blocks, position in zip(self.blocks, bookmark["streams"], strict=True):
            blocks.go_to(position)

    def stream_of(self, index: int) -> int:
        """Return the number of the stream of batch `index`."""
        weights = np.array([stream.weight for stream in self.streams])
        return int(np.random.default_rng((self.seed, 0, index)).choice(len(weights), p=weights / weights.sum()))

    def __getitem__(self, index: int) -> PairBatch:
        try:
            if index < self.index:
                self.go_to(self.start)
            while self.index < index:
                self._skip()
            blocks = self.blocks[self.stream_of(index)]
            batch = blocks.load()[blocks.used]
            if blocks.reader.stream.strategy is not None:
                batch = replace(batch, too_short_share=blocks.too_short_share)
            self._skip()
        except UserError as error:
            return Refusal(str(error))  # type: ignore[return-value] # raises where the batch is moved to its device
        positions = [blocks.position() for blocks in self.blocks]
        return replace(batch, bookmark={"index": self.index, "streams": positions})

    def _skip(self) -> None:
        self.blocks[self.stream_of(self.index)].skip()
        self.index += 1

    def heaviest(self) -> PairBatch:
        """Return a batch that takes at least as much memory as any of the run: texts at the limit, in full chunks."""
        tokenizer, batches = self.tokenize.tokenizer, []
        limit = max(self.tokenize.max_length, self.tokenize.query_max_length)
        for stream, blocks in zip(self.streams, self.blocks, strict=True):
            block = blocks.load()
            (text, *_), *_ = block.sources[0].texts([0])
            document = Document.read(text, tokenizer)
            document = Document.read(" ".join([text] * -(-limit // max(1, len(document)))), tokenizer)
            tokens = limit if stream.strategy is None else stream.strategy.longest(limit)
            longest = [document.span(0, min(tokens, len(document)))] * self.batch_size
            columns = [longest] * (len(stream.columns) if stream.strategy is None else 2)
            batches.append(block.collate(block.sources[0], list(range(self.batch_size)), columns, cut=True))
        return max(batches, key=lambda batch: (batch.largest_chunk().input_ids.numel(), batch.tokens))


@dataclass(frozen=True)
class Refusal:
    """Stands for a batch that cannot be read, because an exception in a worker would arrive as a traceback.

    Args:
        message: of the error.
    """

    message: str

    def to(self, device: Any) -> None:
        """Fail where the batch is used.

        Raises:
            UserError: always.
        """
        raise UserError(self.message)
