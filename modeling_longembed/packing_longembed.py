"""Packed documents: the tokens of a batch in one sequence, without padding.

Shapes in this package: B documents, S tokens in the longest document of a padded batch, T tokens in all documents, H
heads, D head size, d = H * D model width. A packed tensor is `(T, ...)`; document n has the rows from `cu_seqlens[n]`
to `cu_seqlens[n + 1]`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def computed_once(method: Callable) -> property:
    """Make a property that is computed once per `PackedDocuments`.

    `functools.cached_property` has a lock in Python < 3.12, which breaks the graph of a compiled model.
    """

    @wraps(method)
    def get(self):
        return self.once(method.__name__, lambda: method(self))

    return property(get)


@dataclass
class PackedDocuments:
    """The documents of a packed batch: which rows belong to which of them.

    Args:
        cu_seqlens: `(B + 1,)` int32, cumulative document lengths, starting at 0.
        max_seqlen: length of the longest document in tokens.
        is_global: `(T,)` bool, tokens that see and are seen by all tokens of their document; None: no token is.
        padded_index: `(T,)` int64, place of each token in the flattened `(B * S)` batch; None if the caller packed.
        batch_shape: `(B, S)` of the padded batch; None if the caller packed.
        past: `(B,)` int64, number of earlier tokens of each document in previous chunks; None: no previous chunks.
        num_tokens: T; if None for packed input, T is read from the device, which breaks a compiled graph.
        cache: values that are derived from these lengths, such as block masks; see `once`.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    is_global: Tensor | None = None
    padded_index: Tensor | None = None
    batch_shape: tuple[int, int] | None = None
    past: Tensor | None = None
    num_tokens: int | None = None
    cache: dict = field(default_factory=dict)

    @classmethod
    def from_attention_mask(cls, attention_mask: Tensor) -> "PackedDocuments":
        """Read the documents off a `(B, S)` mask that is non-zero on real tokens, on whichever side the padding is."""
        attention_mask = attention_mask != 0
        lengths = attention_mask.sum(dim=1, dtype=torch.int32)
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        padded_index = attention_mask.flatten().nonzero(as_tuple=True)[0]
        if torch.compiler.is_exporting():  # an exported graph must not depend on the lengths
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

    @classmethod
    def from_inputs(
        cls,
        inputs: Tensor,
        attention_mask: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        cu_seq_lens: Tensor | None = None,
        max_length: int | None = None,
    ) -> "PackedDocuments":
        """Return the documents of a padded batch, or of a row that the caller packed.

        Args:
            inputs: `(B, S)` or `(B, S, d)`; packed: `(1, T)` or `(1, T, d)`.
            attention_mask: `(B, S)`, non-zero on real tokens; None: there is no padding.
            global_attention_mask: `(B, S)` or `(1, T)`, non-zero on global tokens; None: there are none.
            cu_seq_lens: `(B + 1,)`, cumulative lengths of a packed row; None: the batch is padded.
            max_length: longest document of a packed row in tokens; counted if None.

        Returns:
            The documents.

        Raises:
            ValueError: the shapes contradict each other.
        """
        shape = inputs.shape[:2]
        if cu_seq_lens is not None:
            if shape[0] != 1 or attention_mask is not None:
                raise ValueError(
                    "packed input (cu_seq_lens_q) is one row of tokens, shape (1, T), without attention_mask"
                )
            # Checked only on CPU: on other devices it would synchronise, and it would break a compiled graph.
            if cu_seq_lens.device.type == "cpu" and not torch.compiler.is_compiling() and cu_seq_lens[-1] != shape[1]:
                raise ValueError(
                    f"cu_seq_lens_q ends at {int(cu_seq_lens[-1])} and the input has {shape[1]} tokens; they must agree"
                )
            longest = int(cu_seq_lens.diff().max()) if max_length is None else max_length
            documents = cls(cu_seq_lens.to(torch.int32), longest, num_tokens=shape[1])
        else:
            mask = torch.ones(shape, device=inputs.device) if attention_mask is None else attention_mask
            if mask.shape != shape:
                raise ValueError(
                    f"attention_mask has shape {tuple(mask.shape)}, the input {tuple(shape)}; they must agree"
                )
            documents = cls.from_attention_mask(mask)
        if global_attention_mask is not None:
            documents.is_global = documents.pack(global_attention_mask) != 0
        return documents

    @computed_once
    def lengths(self) -> list[int]:
        """The lengths of the documents in tokens, as Python integers.

        This synchronizes with the device, once per forward pass. It is for computations that process the documents
        one by one on any device: token weights, dynamic RoPE, recurrence.
        """
        return self.cu_seqlens.diff().tolist()

    @computed_once
    def bounds(self) -> list[tuple[int, int]]:
        """The first packed row, and the one after the last, of each document that has tokens."""
        return [(start, end) for start, end in pairwise(self.cu_seqlens.tolist()) if end > start]

    @computed_once
    def document_ids(self) -> Tensor:
        """The number of the document of each packed token, int64 `(T,)`."""
        tokens = int(self.cu_seqlens[-1]) if self.num_tokens is None else self.num_tokens
        return segment_numbers(self.cu_seqlens, tokens)

    @computed_once
    def token_index(self) -> Tensor:
        """The place of each packed token in its document, int64 `(T,)`, counted from 0, or from the end of the past."""
        starts = self.cu_seqlens[:-1].long()
        starts = (starts if self.past is None else starts - self.past)[self.document_ids]
        return torch.arange(starts.shape[0], device=starts.device) - starts

    @computed_once
    def document_lengths(self) -> Tensor:
        """The length of the document of each packed token, int64 `(T,)`."""
        return self.cu_seqlens.diff().long()[self.document_ids]

    def once(self, key: Any, compute: Callable[[], Any]) -> Any:
        """Return the result of `compute`, which is called once per forward pass and key, for all layers."""
        if key not in self.cache:
            self.cache[key] = compute()
        return self.cache[key]

    def pack(self, padded: Tensor) -> Tensor:
        """Pack `(B, S, ...)`, or `(1, T, ...)` if the caller packed, to `(T, ...)`."""
        flat = padded.flatten(0, 1)
        return flat if self.padded_index is None else flat[self.padded_index]

    def unpack(self, packed: Tensor) -> Tensor:
        """Unpack `(T, ...)` to `(B, S, ...)` with zeros at padding, or to `(1, T, ...)` if the caller packed."""
        if self.padded_index is None or self.batch_shape is None:
            return packed.unsqueeze(0)
        batch, length = self.batch_shape
        padded = packed.new_zeros(batch * length, *packed.shape[1:])
        return padded.index_copy(0, self.padded_index, packed).view(batch, length, *packed.shape[1:])

    def unpack_weights(self, weights: list[Tensor]) -> Tensor:
        """Pad the attention weights of each document that has tokens.

        Args:
            weights: `(H, L, L)` of each document.

        Returns:
            `(B, H, S, S)` with zeros at padding; `(1, H, T, T)`, documents on the diagonal, for a caller that packed.
        """
        if self.padded_index is None or self.batch_shape is None:
            batch, length = 1, len(self.token_index)
            places = torch.arange(length, device=weights[0].device)
            rows = torch.zeros(len(self.lengths), dtype=torch.long)
        else:
            batch, length = self.batch_shape
            places, rows = self.padded_index % length, torch.arange(batch)
        padded = weights[0].new_zeros(batch, weights[0].shape[0], length, length)
        filled = [number for number, tokens in enumerate(self.lengths) if tokens]
        for number, (start, end), part in zip(filled, self.bounds, weights, strict=True):
            at = places[start:end]
            padded[rows[number]][:, at[:, None], at[None, :]] = part
        return padded


def segment_numbers(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Return the number of the segment of each packed row, int64 `(tokens,)`, given cumulative lengths `(N + 1,)`."""
    # `repeat_interleave` would read the length of its result from the device. The last entry is for empty segments.
    inner = cu_seqlens[1:-1].long()
    steps = torch.zeros(tokens + 1, dtype=torch.long, device=cu_seqlens.device)
    return steps.index_add(0, inner, torch.ones_like(inner)).cumsum(0)[:tokens]


def split_documents(cu_seqlens: Tensor, size: int, first: int | None = None) -> Tensor:
    """Cut every document into chunks of `size` tokens, of which the last may be shorter.

    Args:
        cu_seqlens: `(B + 1,)` int32, cumulative lengths of the documents.
        size: number of tokens per chunk.
        first: number of tokens in the first chunk of a document of more than `size`; None: `size`.

    Returns:
        The cumulative lengths of the N chunks, int32 `(N + 1,)`. No chunk crosses the end of a document, and an empty
        document has no chunk.
    """
    lengths = cu_seqlens.diff()
    # Number of tokens missing from the first chunk: the document is cut as if it began that much earlier.
    lead = torch.where(lengths > size, size - (size if first is None else first), 0)
    chunks = (lengths + lead + size - 1) // size
    starts = torch.repeat_interleave(cu_seqlens[:-1], chunks)
    number = torch.arange(len(starts), device=lengths.device) - torch.repeat_interleave(
        chunks.cumsum(0) - chunks, chunks
    )
    offset = (number * size - torch.repeat_interleave(lead, chunks)).clamp(min=0)
    return torch.cat([starts + offset, cu_seqlens[-1:]]).to(torch.int32)
