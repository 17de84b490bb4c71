"""Packed documents: every real token of a batch in one row, no padding.

Shapes in this package: B documents, S longest document in a padded batch, T tokens in all documents together,
H heads, D head size, d = H * D model width. A packed tensor is `(T, ...)`; document n owns the rows
`cu_seqlens[n]` to `cu_seqlens[n + 1]`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def computed_once(method: Callable) -> property:
    """A property that is computed once: `functools.cached_property` without the lock of Python < 3.12, which breaks
    the graph of a compiled model.
    """

    @wraps(method)
    def get(self):
        return self.once(method.__name__, lambda: method(self))

    return property(get)


@dataclass
class PackedDocuments:
    """Which packed rows belong to which document.

    Args:
        cu_seqlens: `(B + 1,)` int32, cumulative document lengths, starting at 0.
        max_seqlen: length of the longest document in tokens.
        is_global: `(T,)` bool, tokens that attend everywhere and are seen from everywhere in their document, or None.
        padded_index: `(T,)` int64, place of each token in the flattened `(B * S)` batch; None if the caller packed.
        batch_shape: `(B, S)` of the padded batch; None if the caller packed.
        past: `(B,)` int64, tokens of each document that came before those here, or None: these are its beginning.
        num_tokens: T; if None and the caller packed, the device is asked for it, which breaks a compiled graph.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    is_global: Tensor | None = None
    padded_index: Tensor | None = None
    batch_shape: tuple[int, int] | None = None
    past: Tensor | None = None
    num_tokens: int | None = None
    # What kernels derive from these lengths (e.g. a block mask), see `once`.
    cache: dict = field(default_factory=dict)

    @classmethod
    def from_attention_mask(cls, attention_mask: Tensor) -> "PackedDocuments":
        """From a `(B, S)` mask that is non-zero on real tokens, wherever the padding is."""
        attention_mask = attention_mask != 0
        lengths = attention_mask.sum(dim=1, dtype=torch.int32)
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        padded_index = attention_mask.flatten().nonzero(as_tuple=True)[0]
        if torch.compiler.is_exporting():  # a graph for all inputs knows no lengths, only what bounds them
            torch._check(padded_index.shape[0] > 0)
            max_seqlen = attention_mask.shape[1]
        else:
            max_seqlen = int(lengths.max()) if len(lengths) else 0
        return cls(
            cu_seqlens,
            max_seqlen,
            padded_index=padded_index,
            batch_shape=(attention_mask.shape[0], attention_mask.shape[1]),
            num_tokens=padded_index.shape[0],
        )

    @computed_once
    def lengths(self) -> list[int]:
        """Tokens in each document, as Python integers: a device synchronisation, once a forward pass.

        For what goes through the documents one by one, on any device: token weights, dynamic RoPE, recurrence.
        """
        return self.cu_seqlens.diff().tolist()

    @computed_once
    def bounds(self) -> list[tuple[int, int]]:
        """First and one-past-last packed row of each document that has tokens."""
        return [(start, end) for start, end in pairwise(self.cu_seqlens.tolist()) if end > start]

    @computed_once
    def document_ids(self) -> Tensor:
        """`(T,)` int64, number of the document of each packed token."""
        tokens = int(self.cu_seqlens[-1]) if self.num_tokens is None else self.num_tokens
        return segment_numbers(self.cu_seqlens, tokens)

    @computed_once
    def token_index(self) -> Tensor:
        """`(T,)` int64, place of each packed token in its own document, from 0, or from where the past ends."""
        starts = self.cu_seqlens[:-1].long()
        starts = (starts if self.past is None else starts - self.past)[self.document_ids]
        return torch.arange(starts.shape[0], device=starts.device) - starts

    @computed_once
    def document_lengths(self) -> Tensor:
        """`(T,)` int64, length of the document of each packed token."""
        return self.cu_seqlens.diff().long()[self.document_ids]

    def once(self, key: Any, compute: Callable[[], Any]) -> Any:
        """What `compute` returns, computed once per forward pass under `key`, for all layers."""
        if key not in self.cache:
            self.cache[key] = compute()
        return self.cache[key]

    def pack(self, padded: Tensor) -> Tensor:
        """`(B, S, ...)` to `(T, ...)`; `(1, T, ...)` of a caller that packed to `(T, ...)`."""
        flat = padded.flatten(0, 1)
        return flat if self.padded_index is None else flat[self.padded_index]

    def unpack(self, packed: Tensor) -> Tensor:
        """`(T, ...)` to `(B, S, ...)` with zeros at padding; to `(1, T, ...)` for a caller that packed."""
        if self.padded_index is None:
            return packed.unsqueeze(0)
        batch, length = self.batch_shape
        padded = packed.new_zeros(batch * length, *packed.shape[1:])
        return padded.index_copy(0, self.padded_index, packed).view(batch, length, *packed.shape[1:])


def segment_numbers(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """`(tokens,)` int64, number of the segment of each packed row, given cumulative lengths `(N + 1,)`."""
    # `repeat_interleave` would ask the device how long its result is. The last place is for segments without rows.
    inner = cu_seqlens[1:-1].long()
    steps = torch.zeros(tokens + 1, dtype=torch.long, device=cu_seqlens.device)
    return steps.index_add(0, inner, torch.ones_like(inner)).cumsum(0)[:tokens]


def split_documents(cu_seqlens: Tensor, size: int, first: int | None = None) -> Tensor:
    """Cuts every document into pieces of `size` tokens, the last one shorter.

    Args:
        cu_seqlens: `(B + 1,)` int32 cumulative lengths.
        size: tokens a piece.
        first: tokens in the first piece of a document that has more than `size`; `size` if None.

    Returns:
        `(P + 1,)` int32 cumulative lengths of the pieces. Pieces never cross a document; an empty document has none.
    """
    lengths = cu_seqlens.diff()
    # Tokens that the first piece lacks: as if the document began so much earlier.
    lead = torch.where(lengths > size, size - (size if first is None else first), 0)
    pieces = (lengths + lead + size - 1) // size
    starts = torch.repeat_interleave(cu_seqlens[:-1], pieces)
    number = torch.arange(len(starts), device=lengths.device) - torch.repeat_interleave(
        pieces.cumsum(0) - pieces, pieces
    )
    offset = (number * size - torch.repeat_interleave(lead, pieces)).clamp(min=0)
    return torch.cat([starts + offset, cu_seqlens[-1:]]).to(torch.int32)
