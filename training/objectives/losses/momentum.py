"""Momentum contrast: negatives that a slowly following copy of the encoder has embedded in earlier batches."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.objectives.losses.similarity import similarity


def momentum_contrast(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    *,
    temperature: float | Tensor = 0.05,
    key_id: Tensor | None = None,
    queue_id: Tensor | None = None,
    rows: slice = slice(None),
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of MoCo (He et al. 2020, arXiv:1911.05722, equation 1), as in Contriever (Izacard et al. 2022,
    arXiv:2112.09118).

        L = -1/|rows| sum_{i in rows} log( exp(q_i.k_i / t) / (exp(q_i.k_i / t) + sum_j exp(q_i.u_j / t)) )

    The negatives are the queue's u alone, not the keys of the batch. With an empty queue L = 0.

    Args:
        query: `(N, d)`, unit length, by the encoder that trains.
        key: `(N, d)`, unit length, by the momentum encoder, which gets no gradient; row i belongs to query i.
        queue: `(K, d)`, unit length, keys of earlier batches: `MomentumQueue.filled()`.
        temperature: t; a scalar tensor that requires a gradient is learned.
        key_id: `(N,)` integers that are equal where the documents are equal. With `queue_id`, an earlier key of the
            same document is no negative: a queue longer than the data holds each document.
        queue_id: `(K,)`, from the same numbering of documents.
        rows: the rows that the loss is averaged over. Rows do not meet each other here, so a process may as well pass
            its own rows without gathering.

    Returns:
        The loss, and `accuracy`: the share of `rows` whose own key has the highest score.
    """
    query, key, queue = query[rows], key[rows].detach(), queue.detach()
    dtype = torch.promote_types(query.dtype, torch.float32)
    own = (query.to(dtype) * key.to(dtype)).sum(dim=1, keepdim=True) / temperature
    earlier = similarity(query, queue, temperature)
    if key_id is not None and queue_id is not None:
        earlier = earlier.masked_fill(key_id[rows, None] == queue_id, -torch.inf)
    scores = torch.cat([own, earlier], dim=1)
    target = torch.zeros(len(scores), dtype=torch.long, device=scores.device)
    return F.cross_entropy(scores, target), {"accuracy": (scores.argmax(dim=1) == 0).float().mean()}


class MomentumQueue(nn.Module):
    """The last keys, first in, first out, in buffers that a checkpoint holds.

    Every process puts the gathered keys in, so all have the same queue.
    """

    keys: Tensor
    ids: Tensor
    count: Tensor

    def __init__(self, size: int, dim: int) -> None:
        """Args:
        size: keys that it holds.
        dim: of a key.
        """
        super().__init__()
        self.register_buffer("keys", torch.zeros(size, dim))
        self.register_buffer("ids", torch.zeros(size, dtype=torch.long))
        self.register_buffer("count", torch.tensor(0))  # keys ever put in; modulo the size, where the next one goes

    @torch.no_grad()
    def enqueue(self, key: Tensor, key_id: Tensor | None = None) -> None:
        """Put keys in, the oldest go out.

        Args:
            key: `(n, d)`, any number of them; it need not divide the size.
            key_id: `(n,)` integers that are equal where the documents are equal.
        """
        size = len(self.keys)
        place = (self.count + torch.arange(len(key), device=key.device)) % size
        kept = slice(max(0, len(key) - size), None)  # two at one place: which of them stays would be left to the kernel
        self.keys[place[kept]] = key[kept].to(self.keys.dtype)
        if key_id is not None:
            self.ids[place[kept]] = key_id[kept]
        self.count += len(key)

    def filled(self) -> tuple[Tensor, Tensor]:
        """The keys that are in, `(k, d)`, and their ids, `(k,)`.

        Contriever starts with random vectors instead, which are the negatives of its first steps.
        """
        count = min(int(self.count), len(self.keys))  # until it is full, the places from 0 on are
        return self.keys[:count], self.ids[:count]


@torch.no_grad()
def exponential_moving_average(target: Iterable[Tensor], source: Iterable[Tensor], momentum: float) -> None:
    """Let `target` follow `source`: target = momentum * target + (1 - momentum) * source, in place.

    MoCo, equation 2. It comes before the keys of a batch are computed.

    Args:
        target: the weights of the momentum encoder.
        source: those of the encoder that trains, in the same order.
        momentum: 1 leaves `target` as it is, 0 copies.
    """
    for followed, weight in zip(target, source, strict=True):
        followed.lerp_(weight, 1 - momentum)
