"""Texts as a vector a token, of ragged lengths, as the objectives of late interaction compare them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling_longembed.output_token_pooling_longembed import pool_packed_tokens
from modeling_longembed.output_tokens_longembed import truncate_tokens


@dataclass(frozen=True)
class TokenVectors:
    """Texts as the vectors of their tokens. An index selects texts and copies no vector.

    Args:
        vectors: `(T, k)`, the tokens of all texts; selected texts share them.
        first: `(...)` int64, where the tokens of each text begin in `vectors`.
        count: `(...)` int64, the number of tokens of each text.

    Examples:
        >>> import torch
        >>> texts = TokenVectors(torch.eye(3), first=torch.tensor([0, 1]), count=torch.tensor([1, 2]))
        >>> texts[1:].packed()
        (tensor([[0., 1., 0.],
                [0., 0., 1.]]), tensor([0, 2], dtype=torch.int32))
    """

    vectors: Tensor
    first: Tensor
    count: Tensor

    def __len__(self) -> int:
        return len(self.first)

    @property
    def shape(self) -> torch.Size:
        """The number of texts along each dimension."""
        return self.first.shape

    def __getitem__(self, index: Any) -> "TokenVectors":
        return replace(self, first=self.first[index], count=self.count[index])

    def packed(self) -> tuple[Tensor, Tensor]:
        """Return the tokens of the texts, one text after another: vectors `(t, k)`, cumulative lengths `(n + 1,)`."""
        ends = F.pad(self.count.flatten().cumsum(0), (1, 0))
        offset = (self.first.flatten() - ends[:-1]).repeat_interleave(self.count.flatten())
        place = torch.arange(int(ends[-1]), device=ends.device) + offset
        return self.vectors[place], ends.to(torch.int32)

    def shortened(self, dim: int) -> "TokenVectors":
        """Return the first dimensions, scaled to the length of the whole vectors: 1, or a query token's weight."""
        if dim == self.vectors.shape[1]:
            return self
        return replace(self, vectors=truncate_tokens(self.vectors, dim))

    def detach(self) -> "TokenVectors":
        """Return the same texts without gradient."""
        return replace(self, vectors=self.vectors.detach())

    def by_row(self, rows: int) -> "TokenVectors":
        """Return texts that are given one column after the other as rows: `(columns * rows,)` as `(rows, columns)`."""
        return replace(self, first=self.first.view(-1, rows).T, count=self.count.view(-1, rows).T)

    def float(self) -> "TokenVectors":
        """Return the texts in float32."""
        return replace(self, vectors=self.vectors.float())

    def cpu(self) -> "TokenVectors":
        """Return the texts in the memory of the CPU."""
        return TokenVectors(self.vectors.cpu(), self.first.cpu(), self.count.cpu())


def concatenate(texts: Sequence[TokenVectors]) -> TokenVectors:
    """Return texts of several values, one after another.

    Examples:
        >>> import torch
        >>> text = TokenVectors(torch.eye(2), first=torch.tensor([0]), count=torch.tensor([2]))
        >>> other = TokenVectors(torch.ones(1, 2), first=torch.tensor([0]), count=torch.tensor([1]))
        >>> concatenate([text, other]).count
        tensor([2, 1])
    """
    if all(part.vectors is texts[0].vectors for part in texts):
        vectors, offsets = texts[0].vectors, [0] * len(texts)
    else:
        sizes = [len(part.vectors) for part in texts]
        vectors, offsets = torch.cat([part.vectors for part in texts]), [sum(sizes[:n]) for n in range(len(sizes))]
    first = torch.cat([part.first + offset for part, offset in zip(texts, offsets, strict=True)])
    return TokenVectors(vectors, first, torch.cat([part.count for part in texts]))


def for_scoring(vectors: Tensor, count: Tensor, queries: int, *, mean: bool, pooling: int) -> TokenVectors:
    """Prepare token vectors so that plain MaxSim is the score: queries are scaled and documents pooled.

    Args:
        vectors: `(T, k)`, the tokens of all texts: of queries times their weights, of documents of unit length.
        count: `(n,)`, the number of tokens of each text.
        queries: how many of the n texts, which come first, are queries.
        mean: whether a score is the mean over the query's tokens and not the sum.
        pooling: average number of tokens of a document that share one vector. Which tokens share one is found without
            gradient; the mean of a group has one.

    Returns:
        The n texts.

    Examples:
        >>> import torch
        >>> texts = for_scoring(torch.eye(3), torch.tensor([2, 1]), queries=1, mean=True, pooling=1)
        >>> texts.vectors
        tensor([[0.5000, 0.0000, 0.0000],
                [0.0000, 0.5000, 0.0000],
                [0.0000, 0.0000, 1.0000]])
    """
    of_queries = int(count[:queries].sum())
    query, document = vectors[:of_queries], vectors[of_queries:]
    if mean:
        query = query / count[:queries].repeat_interleave(count[:queries])[:, None]
    if pooling > 1 and queries < len(count):
        ends = F.pad(count[queries:].cumsum(0), (1, 0))
        document, _, ends = pool_packed_tokens(document, ends, pooling)
        count = torch.cat([count[:queries], ends.diff().long()])
    vectors = torch.cat([query, document]) if mean or pooling > 1 else vectors
    return TokenVectors(vectors, count.cumsum(0) - count, count)
