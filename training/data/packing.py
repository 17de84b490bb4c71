"""Packed documents: texts one after another without padding, in chunks that bound the memory of a forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from modeling_longembed.encoding_longembed import budget_batches


@dataclass(frozen=True)
class PackedTexts:
    """Documents in one row without padding, in the form that transformers' flash-attention models take.

    Args:
        input_ids: `(1, T)` int64, all tokens of all documents.
        cu_seq_lens_q: `(n + 1,)` int32, cumulative lengths in tokens, from 0.
        max_length_q: tokens of the longest document.
    """

    input_ids: Tensor
    cu_seq_lens_q: Tensor
    max_length_q: int

    def to(self, device: torch.device) -> "PackedTexts":
        """Return a copy on a device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            cu_seq_lens_q=self.cu_seq_lens_q.to(device, non_blocking=True),
        )

    def part(self, start: int, stop: int) -> "PackedTexts":
        """Return documents `start` to `stop` alone."""
        ends = self.cu_seq_lens_q[start : stop + 1]
        longest = int(ends.diff().max())
        return PackedTexts(self.input_ids[:, int(ends[0]) : int(ends[-1])], ends - ends[0], longest)


def pack(token_ids: Sequence[Sequence[int] | np.ndarray], batch_tokens: int) -> list[PackedTexts]:
    """Pack documents into chunks, in their order.

    Args:
        token_ids: the token ids of each document.
        batch_tokens: most tokens of a chunk; a longer document is a chunk of its own.

    Returns:
        The chunks.
    """
    chunks = budget_batches([len(document) for document in token_ids], batch_tokens, longest_first=False)
    return [_pack_chunk([token_ids[index] for index in chunk]) for chunk in chunks]


def _pack_chunk(documents: list[Sequence[int] | np.ndarray]) -> PackedTexts:
    lengths = [len(document) for document in documents]
    input_ids = torch.from_numpy(np.concatenate(documents).astype(np.int64))[None]
    return PackedTexts(input_ids, cumulative_lengths(lengths), max(lengths))


def cumulative_lengths(lengths: Sequence[int]) -> Tensor:
    """Return the cumulative lengths of n documents, from 0: `(n + 1,)` int32."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def cut_to_fill(columns: list[list[list[int]]], batch_tokens: int) -> list[list[list[int]]]:
    """Cut off documents where a chunk ends, so that `pack` makes full chunks of them.

    Args:
        columns: for each column the token ids of its documents; they are packed column after column.
        batch_tokens: tokens of a chunk. A document that is longer stays whole: `pack` makes it a chunk of its own.

    Returns:
        The documents, none longer than before.
    """
    room = 0
    filled: list[list[list[int]]] = []
    for documents in columns:
        filled.append([])
        for document in documents:
            document = document[:room] if 0 < room < len(document) <= batch_tokens else document
            filled[-1].append(document)
            room = max(0, (room if len(document) <= room else batch_tokens) - len(document))
    return filled
