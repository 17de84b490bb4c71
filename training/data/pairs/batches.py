"""Batches of pairs; which pairs is a pure function of (seed, index), so any position is reached at once."""

from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from common.errors import UserError
from modeling_longembed.encoding_tokens_longembed import cut_off, special_tokens_around, tokenize_beginnings
from training.data.packing import PackedTexts, cut_to_fill, pack
from training.data.pairs.makers import make_pairs
from training.data.row_order import RowOrder
from training.data.sources import Source, text_id


@dataclass
class PairTokenizer:
    """Tokenises the texts of pairs: queries and documents.

    Args:
        tokenizer: the model's.
        max_length: tokens, with special tokens, at which a document is cut off.
        query_max_length: the same for a query.
        prompts: text that is put before a `query` and before a `document`.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    query_max_length: int
    prompts: dict[str, str]

    def __call__(self, texts: list[str], kind: str) -> list[list[int]]:
        """Return the token ids of texts of one kind, `query` or `document`."""
        limit, (_, closing) = self.limit(kind), special_tokens_around(self.tokenizer)
        beginnings = tokenize_beginnings(self.tokenizer, texts, limit, self.prompts.get(kind, ""))
        return [cut_off(ids, limit, closing).tolist() for ids in beginnings]

    def limit(self, kind: str) -> int:
        """Return the number of tokens at which texts of a kind are cut off."""
        return self.query_max_length if kind == "query" else self.max_length

    def room(self) -> int:
        """Return the most tokens of a text, without special tokens and prompt, that is not cut off as either kind."""
        return min(
            self.limit(kind) - len(self.tokenizer(self.prompts.get(kind, ""))["input_ids"])
            for kind in ("query", "document")
        )


@dataclass(frozen=True)
class PairBatch:
    """One process's share of a batch.

    Args:
        chunks: the packed texts, in the order of `text_ids`: all anchors, then all positives, then all negatives.
        text_ids: `(n * columns,)` int64, equal where the texts are equal.
        pairs: number of pairs on this process, n.
        tokens: number of tokens in all chunks together.
        longest: for each column its longest text, in tokens, to which a padded batch would be padded.
        cut_off: number of texts that fill the limit of their kind.
        classes: for each class column the class of each pair, `(n,)` int64, equal where the classes are equal.
        texts: the columns of texts, if another model reads them as well.
        chunk_texts: for each text of the first column the texts of its late chunks, if a teacher reads them; empty
            where a chunk has none.
        source: name of the source.
        rows: numbers of the rows in the source, from 1.
        bookmark: of a stream, where the next batch begins.
        too_short_share: of a stream of documents, the fraction of them that are skipped because no pair fits in.
    """

    chunks: list[PackedTexts]
    text_ids: Tensor
    pairs: int
    tokens: int
    longest: tuple[int, ...]
    cut_off: int
    classes: dict[str, Tensor] = field(default_factory=dict)
    texts: list[list[str]] | None = None
    chunk_texts: list[list[str]] | None = None
    source: str = ""
    rows: tuple[int, ...] = ()
    bookmark: dict[str, Any] | None = None
    too_short_share: float | None = None

    def to(self, device: torch.device) -> "PairBatch":
        """Return a copy on a device."""
        return replace(
            self,
            chunks=[chunk.to(device) for chunk in self.chunks],
            text_ids=self.text_ids.to(device, non_blocking=True),
            classes={name: ids.to(device, non_blocking=True) for name, ids in self.classes.items()},
        )

    def locate(self) -> str:
        """Return the source and the rows of the pairs, for errors."""
        return f"{self.source}, rows {', '.join(map(str, sorted(self.rows)))}"

    def column_chunks(self, column: int) -> list[PackedTexts]:
        """Return the texts of one column only, in chunks no larger than `chunks`."""
        own, parts, first = range(column * self.pairs, (column + 1) * self.pairs), [], 0
        for chunk in self.chunks:
            count = len(chunk.cu_seq_lens_q) - 1
            start, stop = max(0, own.start - first), min(count, own.stop - first)
            if start < stop:
                parts.append(chunk.part(start, stop))
            first += count
        return parts

    def largest_chunk(self) -> PackedTexts:
        """Return the chunk that takes the most memory."""
        return max(self.chunks, key=lambda chunk: chunk.input_ids.numel())

    def measures(self) -> dict[str, Tensor]:
        """Return what a run logs about its data.

        Returns:
            Scalars, float64, by name. `padding_share` is the fraction of the computed positions that are no tokens of a
            text; `padding_share_if_padded` what it would be with every column padded to its longest text;
            `cut_off_share` the fraction of texts that fill the limit; `too_short_share` as above, of streams.
        """
        computed = sum(chunk.input_ids.numel() for chunk in self.chunks)
        values = {
            "token_count": self.tokens,
            "pair_count": self.pairs,
            "padding_share": 1 - self.tokens / computed,
            "padding_share_if_padded": 1 - self.tokens / (self.pairs * sum(self.longest)),
            "cut_off_share": self.cut_off / len(self.text_ids),
        }
        if self.too_short_share is not None:
            values["too_short_share"] = self.too_short_share
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


class PairBatches(Dataset):
    """Batch number `index` of an endless run, for one process; `len` is the number of batches in an epoch.

    All pairs of a batch, on all processes, come from one source: a negative from another source is too easy. An epoch
    has `weight * rows` pairs of each source, in whole batches. The rows of a source are an endless stream of shuffled
    epochs (see `RowOrder`), so that rows that do not fill the last batch come first in the next epoch, and no batch is
    ever short (a short one would make the gather of negatives hang). Pairs of documents are made anew each time.

    Args:
        sources: the data.
        tokenize: tokenizer of the pairs.
        batch_size: pairs per batch and process; all processes together take `batch_size * world_size` pairs a batch.
        batch_tokens: tokens of a packed chunk.
        seed: random seed.
        rank: number of this process.
        world_size: number of processes.
        keep_texts: keep the texts of a batch beside their tokens, for another model than the one that trains.

    Raises:
        UserError: a source has fewer pairs than a batch.
    """

    def __init__(
        self,
        sources: list[Source],
        tokenize: PairTokenizer,
        *,
        batch_size: int,
        batch_tokens: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        keep_texts: bool = False,
    ) -> None:
        self.tokenize, self.batch_tokens, self.seed = tokenize, batch_tokens, seed
        self.batch_size, self.rank, self.global_batch_size = batch_size, rank, batch_size * world_size
        self.keep_texts = keep_texts
        for source in sources:
            if len(source.rows) < self.global_batch_size:
                raise UserError(
                    f"{source.name}: has {len(source.rows)} pairs, fewer than a batch of {self.global_batch_size} "
                    "over all processes; give more data or a smaller --per_device_train_batch_size"
                )
        self.batches_of_source = [
            max(1, int(source.weight * len(source.rows) / self.global_batch_size)) for source in sources
        ]
        self.first_batch_of_source = np.concatenate([[0], np.cumsum(self.batches_of_source)])
        text_ids = [source.text_ids(source.columns) for source in sources]
        self.orders = [RowOrder(ids, self.global_batch_size, seed, 1 + number) for number, ids in enumerate(text_ids)]
        self.contents = [source.content(ids) for source, ids in zip(sources, text_ids, strict=True)]
        # The numbers of all texts are not needed any more, and every worker would have a copy of them.
        self.sources = [replace(source, ids={}) for source in sources]

    def __len__(self) -> int:
        return int(self.first_batch_of_source[-1])

    def describe(self) -> dict[str, Any]:
        """Return what options stand for, by option: the content of the data, and the batch of all processes."""
        return {
            "train_data": [
                f"{content} and weight {source.weight:g}"
                for content, source in zip(self.contents, self.sources, strict=True)
            ],
            "per_device_train_batch_size": f"{self.global_batch_size} over all processes",
        }

    def global_rows(self, index: int) -> tuple[int, list[int]]:
        """Return the number of the source of batch `index`, and the rows of all processes."""
        epoch, place = divmod(index, len(self))
        batch = _permutation(len(self), self.seed, 0, epoch)[place]
        source = int(np.searchsorted(self.first_batch_of_source, batch, side="right")) - 1
        number = epoch * self.batches_of_source[source] + int(batch - self.first_batch_of_source[source])
        return source, self.orders[source].batch(number)

    def __getitem__(self, index: int) -> PairBatch:
        number, rows = self.global_rows(index)
        source, own = self.sources[number], slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        texts = source.texts(rows[own])
        ids = [[text_id(text) for text in column] for column in texts]
        if source.strategy is not None:
            generators = [np.random.default_rng((self.seed, number, index, n)) for n in range(len(rows))[own]]
            texts = make_pairs(source.strategy, source.documents(rows[own], self.tokenize.tokenizer), generators)
            ids = ids * 2  # two spans of one document are not each other's negatives
        return self.collate(source, rows[own], texts, ids)

    def collate(
        self,
        source: Source,
        rows: list[int],
        texts: list[list[str]],
        ids: list[list[int]] | None = None,
        cut: bool = False,
    ) -> PairBatch:
        """Collate pairs of a source.

        Args:
            source: the source.
            rows: their rows.
            texts: their texts, one list per column.
            ids: see `collate_pairs`.
            cut: see `collate_pairs`.

        Returns:
            The batch, with classes and texts.
        """
        classes = source.classes_of(rows)
        return replace(
            collate_pairs(texts, self.tokenize, self.batch_tokens, ids=ids, anchor_kind=source.anchor_kind, cut=cut),
            classes={name: torch.tensor([text_id(value) for value in classes[name]]) for name in classes},
            texts=texts if self.keep_texts else None,
            source=source.name,
            rows=source.numbers(rows),
        )

    def heaviest(self) -> PairBatch:
        """Return a batch that takes at least as much memory as any of the run: the longest texts, in full chunks.

        A text that does not fit into the rest of a chunk is cut off there instead of starting the next one: shorter
        texts of another batch could fill that chunk to the last token.
        """
        batches = [
            self.collate(
                source,
                list(range(self.batch_size)),
                source.longest_texts(self.batch_size, self.tokenize.tokenizer),
                cut=True,
            )
            for source in self.sources
        ]
        return max(
            batches, key=lambda batch: (batch.largest_chunk().input_ids.numel(), max(batch.longest), batch.tokens)
        )


def collate_pairs(
    columns: list[list[str]],
    tokenize: PairTokenizer,
    batch_tokens: int,
    *,
    ids: list[list[int]] | None = None,
    anchor_kind: str = "query",
    cut: bool = False,
) -> PairBatch:
    """Tokenise and pack pairs.

    Args:
        columns: the texts, one list per column with the anchors first.
        tokenize: tokenizer of the pairs.
        batch_tokens: tokens of a packed chunk.
        ids: numbers of the texts, equal where texts are not each other's negatives; None: hashes of the texts.
        anchor_kind: whether the first column is read as `query` or as `document`.
        cut: cut texts off so that all chunks are full.

    Returns:
        The batch.
    """
    kinds = [anchor_kind] + ["document"] * (len(columns) - 1)
    token_ids = [tokenize(texts, kind) for texts, kind in zip(columns, kinds, strict=True)]
    if cut:
        token_ids = cut_to_fill(token_ids, batch_tokens)
    lengths = [[len(ids) for ids in column] for column in token_ids]
    limits = [tokenize.limit(kind) for kind in kinds]
    ids = ids or [[text_id(text) for text in column] for column in columns]
    return PairBatch(
        chunks=pack(list(chain.from_iterable(token_ids)), batch_tokens),
        text_ids=torch.tensor(list(chain.from_iterable(ids))),
        pairs=len(columns[0]),
        tokens=sum(map(sum, lengths)),
        longest=tuple(map(max, lengths)),
        cut_off=sum(length >= limit for column, limit in zip(lengths, limits, strict=True) for length in column),
    )


@lru_cache(maxsize=16)
def _permutation(count: int, *seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(count)
