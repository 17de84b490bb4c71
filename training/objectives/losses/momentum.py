"""Momentum contrast: negatives from earlier batches, embedded by a moving average of the encoder."""

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
    """Compute the loss of MoCo: classify the own key of a query among the keys of a queue.

        L = -1/|rows| sum_{i in rows} log( exp(q_i.k_i / t) / (exp(q_i.k_i / t) + sum_j exp(q_i.u_j / t)) )

    The negatives are the keys u of the queue, not the other keys of the batch. With an empty queue L = 0.

    Source: He et al. 2020 (arXiv:1911.05722, equation 1), as in Contriever (Izacard et al. 2022, arXiv:2112.09118:
    131,072 keys, momentum 0.9995, temperature 0.05).

    When to use it: many more negatives than fit into a batch, for small batches and long training runs. Not for short
    runs: the queue must fill first and the momentum encoder must follow. With a batch of some thousand rows `info_nce`
    with cached gradients is simpler and trains both sides.

    Related losses: `info_nce`, whose negatives are the documents of the batch, with a gradient.

    Args:
        query: `(N, d)`, unit length, from the encoder in training.
        key: `(N, d)`, unit length, from the momentum encoder, without gradient; row i belongs to query i.
        queue: `(K, d)`, unit length, keys of earlier batches: `MomentumQueue.filled()`.
        temperature: t; a scalar tensor that requires a gradient is learned.
        key_id: `(N,)` integers that are equal where the documents are equal. With `queue_id`, an earlier key of the
            same document is not a negative: a queue longer than the data holds every document.
        queue_id: `(K,)`, from the same numbering of documents.
        rows: the rows that the loss is averaged over. Rows do not interact here, so a process may also pass its own
            rows without gathering.

    Returns:
        The loss, and `accuracy`: the share of `rows` whose own key has the highest score.

    Examples:
        >>> import torch
        >>> vectors = torch.eye(4)
        >>> loss, _ = momentum_contrast(vectors[:2], vectors[:2], queue=vectors[2:], temperature=1.0)
        >>> round(loss.item(), 4)  # ln(1 + 2 / e)
        0.5514
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

    Every process enqueues the gathered keys, so all processes have the same queue.

    Args:
        size: number of keys that it holds.
        dim: width of a key.

    Examples:
        >>> import torch
        >>> queue = MomentumQueue(size=3, dim=1)
        >>> queue.enqueue(torch.tensor([[1.0], [2.0]]), torch.tensor([10, 20]))
        >>> queue.enqueue(torch.tensor([[3.0], [4.0]]), torch.tensor([30, 40]))
        >>> queue.filled()[1].sort().values  # 10 has left
        tensor([20, 30, 40])
    """

    keys: Tensor
    ids: Tensor
    count: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(size, dim))
        self.register_buffer("ids", torch.zeros(size, dtype=torch.long))
        self.register_buffer("count", torch.tensor(0))  # of all keys so far; modulo the size, the place of the next

    @torch.no_grad()
    def enqueue(self, key: Tensor, key_id: Tensor | None = None) -> None:
        """Add keys in place of the oldest ones.

        Args:
            key: `(n, d)`; n need not divide the size.
            key_id: `(n,)` integers that are equal where the documents are equal.
        """
        size = len(self.keys)
        place = (self.count + torch.arange(len(key), device=key.device)) % size
        # If two keys had the same place, the kernel would decide which one stays: only the last `size` are written.
        kept = slice(max(0, len(key) - size), None)
        self.keys[place[kept]] = key[kept].to(self.keys.dtype)
        if key_id is not None:
            self.ids[place[kept]] = key_id[kept]
        self.count += len(key)

    def filled(self) -> tuple[Tensor, Tensor]:
        """Return the keys so far, `(k, d)`, and their ids, `(k,)`.

        Contriever fills the queue with random vectors instead, which are the negatives of its first steps.
        """
        count = min(int(self.count), len(self.keys))  # the queue is filled from place 0 on
        return self.keys[:count], self.ids[:count]


@torch.no_grad()
def exponential_moving_average(target: Iterable[Tensor], source: Iterable[Tensor], momentum: float) -> None:
    """Update a moving average in place: target = momentum * target + (1 - momentum) * source.

    Source: MoCo (He et al. 2020, arXiv:1911.05722, equation 2). Call it before the keys of a batch are computed.

    Args:
        target: the weights of the momentum encoder.
        source: the weights of the encoder in training, in the same order.
        momentum: share of the target that is kept; 1 leaves it as it is, 0 copies the source.

    Examples:
        >>> import torch
        >>> average = torch.zeros(2)
        >>> exponential_moving_average([average], [torch.ones(2)], momentum=0.75)
        >>> average
        tensor([0.2500, 0.2500])
    """
    for followed, weight in zip(target, source, strict=True):
        followed.lerp_(weight, 1 - momentum)
