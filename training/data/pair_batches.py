"""Batches of pairs: their order is a pure function of (seed, index), so any position is reached at once."""

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
from training.data.packing import PackedTexts, cut_to_fill, pack
from training.data.pair_makers import make_pairs
from training.data.row_order import RowOrder
from training.data.sources import Source, text_id


@dataclass
class PairTokenizer:
    """Texts of pairs to token ids: the first column is the query, the others are documents.

    Args:
        tokenizer: the model's.
        max_length, query_max_length: tokens, special tokens included, at which a document and a query are cut off.
        prompts: `query` and `document`: what is put before a text.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    query_max_length: int
    prompts: dict[str, str]

    def __call__(self, texts: list[str], kind: str) -> list[list[int]]:
        """Token ids of texts of one kind, `query` or `document`."""
        prompt = self.prompts.get(kind, "")
        encoded = self.tokenizer(
            [prompt + text for text in texts], truncation=True, max_length=self.limit(kind), return_attention_mask=False
        )
        return encoded["input_ids"]

    def limit(self, kind: str) -> int:
        """Tokens at which texts of a kind are cut off."""
        return self.query_max_length if kind == "query" else self.max_length

    def room(self) -> int:
        """Tokens that a text of either kind may have so that nothing is cut off."""
        return min(
            self.limit(kind) - len(self.tokenizer(self.prompts.get(kind, ""))["input_ids"])
            for kind in ("query", "document")
        )


@dataclass(frozen=True)
class PairBatch:
    """One process's share of a batch.

    Args:
        chunks: the texts, packed; in the order of `text_ids`, all anchors, then all positives, then all negatives.
        text_ids: `(n * columns,)` int64, equal where the texts are equal.
        pairs: n.
        tokens: in all chunks together.
        longest: for each column its longest text, in tokens: what a padded batch would be padded to.
        cut_off: texts that fill the limit of their kind.
        classes: for each class column the class of each pair, `(n,)` int64, equal where the classes are equal.
        texts: the columns of texts, if something beside the model reads them.
        source: where the pairs come from.
        rows: of the source, from 1.
        bookmark: of a stream, where the next batch begins.
    """

    chunks: list[PackedTexts]
    text_ids: Tensor
    pairs: int
    tokens: int
    longest: tuple[int, ...]
    cut_off: int
    classes: dict[str, Tensor] = field(default_factory=dict)
    texts: list[list[str]] | None = None
    source: str = ""
    rows: tuple[int, ...] = ()
    bookmark: dict[str, Any] | None = None

    def to(self, device: torch.device) -> "PairBatch":
        return replace(
            self,
            chunks=[chunk.to(device) for chunk in self.chunks],
            text_ids=self.text_ids.to(device, non_blocking=True),
            classes={name: ids.to(device, non_blocking=True) for name, ids in self.classes.items()},
        )

    def locate(self) -> str:
        """Where the pairs come from."""
        return f"{self.source}, rows {', '.join(map(str, sorted(self.rows)))}"

    def column_chunks(self, column: int) -> list[PackedTexts]:
        """The texts of one column alone, in chunks no larger than `chunks`."""
        wanted, parts, first = range(column * self.pairs, (column + 1) * self.pairs), [], 0
        for chunk in self.chunks:
            count = len(chunk.cu_seq_lens_q) - 1
            start, stop = max(0, wanted.start - first), min(count, wanted.stop - first)
            if start < stop:
                parts.append(chunk.part(start, stop))
            first += count
        return parts

    def largest_chunk(self) -> PackedTexts:
        """The texts that take the most memory at once."""
        return max(self.chunks, key=lambda chunk: chunk.input_ids.numel())

    def measures(self) -> dict[str, Tensor]:
        """What a run reports of its data, as scalars.

        `padding_share` is the share of what the model computes that is no token of a text; `padding_share_if_padded`
        what it would be with every column padded to its longest text; `cut_off_share` the share of texts that fill the
        limit.
        """
        computed = sum(chunk.input_ids.numel() for chunk in self.chunks)
        values = {
            "token_count": self.tokens,
            "pair_count": self.pairs,
            "padding_share": 1 - self.tokens / computed,
            "padding_share_if_padded": 1 - self.tokens / (self.pairs * sum(self.longest)),
            "cut_off_share": self.cut_off / len(self.text_ids),
        }
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


class PairBatches(Dataset):
    """Batch number `index` of an endless run, for one process; `len` is the number of batches in an epoch.

    All pairs of a batch, on all processes, come from one source: between sources a negative is too easy. An epoch holds
    `weight * rows` of each source, in whole batches; a source's rows form an endless stream of shuffled passes (see
    `RowOrder`), so rows that do not fill an epoch's last batch come first in the next epoch, and no batch is ever short
    (a short one would hang the gather of negatives). Pairs of documents are made anew each time.
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
        """Args:
        batch_size: pairs of one process; all processes together take `batch_size * world_size` pairs a batch.
        batch_tokens: tokens of one packed chunk.
        keep_texts: a batch holds its texts as well, for another model than the one that trains.

        Raises:
            UserError: a source has fewer pairs than a batch.
        """
        self.sources, self.tokenize, self.batch_tokens, self.seed = sources, tokenize, batch_tokens, seed
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
        self.orders = [
            RowOrder(source.text_ids(source.columns), self.global_batch_size, seed, 1 + number)
            for number, source in enumerate(sources)
        ]

    def __len__(self) -> int:
        return int(self.first_batch_of_source[-1])

    def describe(self) -> dict[str, Any]:
        """All that the order depends on, and a resumed run must agree in; the number of processes is not in it."""
        return {
            "seed": self.seed,
            "pairs a batch": self.global_batch_size,
            "sources": [[source.name, len(source.rows), source.weight] for source in self.sources],
            "pairs": [str(source.make) for source in self.sources],
        }

    def global_rows(self, index: int) -> tuple[int, list[int]]:
        """The number of the source and the rows of all processes of batch `index`."""
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
        if source.make is not None:
            generators = [np.random.default_rng((self.seed, number, index, n)) for n in range(len(rows))[own]]
            texts = make_pairs(source.make, source.documents(rows[own], self.tokenize.tokenizer), generators)
            ids = ids * 2  # two pieces of one document are not each other's negatives
        return self.collate(source, rows[own], texts, ids)

    def collate(
        self,
        source: Source,
        rows: list[int],
        texts: list[list[str]],
        ids: list[list[int]] | None = None,
        cut: bool = False,
    ) -> PairBatch:
        """Texts of some rows of a source, one list a column, as a batch; see `collate_pairs`."""
        classes = source.classes_of(rows)
        return replace(
            collate_pairs(texts, self.tokenize, self.batch_tokens, ids=ids, anchor_kind=source.anchor_kind, cut=cut),
            classes={name: torch.tensor([text_id(value) for value in classes[name]]) for name in classes},
            texts=texts if self.keep_texts else None,
            source=source.name,
            rows=source.numbers(rows),
        )

    def heaviest(self) -> PairBatch:
        """A batch that takes at least as much memory as any of the run: the longest texts, in chunks that are full.

        A text that does not fit into what is left of a chunk is cut off there instead of starting the next one: shorter
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
    """Texts of a batch, one list a column with the anchors first, packed.

    Args:
        columns: the texts.
        tokenize: the model's.
        batch_tokens: tokens of one packed chunk.
        ids: of the texts, if not their own.
        anchor_kind: what the first column is read as.
        cut: texts are cut off so that all chunks are full.
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
