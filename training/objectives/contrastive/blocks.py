"""The gathered batch that contrastive objectives read, and losses over blocks of its rows."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from training.objectives.losses.similarity import Texts
from training.objectives.losses.token_vectors import TokenVectors

Metrics = dict[str, Tensor]
Loss = Callable[..., tuple[Tensor, Metrics]]
ROWS_AT_ONCE = 512  # rows of the score matrix at a time: 17 MB for 4,096 pairs with one hard negative each


@dataclass(frozen=True)
class GatheredBatch:
    """A batch of N rows, gathered from all processes in the order of the processes.

    Args:
        embeddings: `(N, columns, d)`, pooled but not normalised; differentiable on every process.
        text_ids: `(N, text columns)` integers, equal where the texts are equal.
        rows: the slice of the N rows that belongs to this process.
        classes: for each class column `(N,)` integers, equal where the classes are equal.
        guide: `(N, columns, g)`, unit vectors of the same texts from a guide model.
        key: `(N, d)`, unit vectors of the second column from the momentum encoder.
        tokens: the same texts as token vectors, `(N, columns)`, if texts are compared by them.
        words: BM25 scores of the queries with all documents, `(N, (columns - 1) N)`, one column after the other.
    """

    embeddings: Tensor
    text_ids: Tensor
    rows: slice
    classes: dict[str, Tensor] = field(default_factory=dict)
    guide: Tensor | None = None
    key: Tensor | None = None
    tokens: TokenVectors | None = None
    words: Tensor | None = None


def in_blocks(loss: Loss, rows: slice, count: int) -> Loss:
    """Compute a loss that is a mean over rows in blocks of `ROWS_AT_ONCE` rows.

    The scores of a block are dropped after the forward pass and computed again in the backward pass, so memory grows
    with the number of rows and not with its square.

    Args:
        loss: a function of embeddings and of the keyword `rows`, a slice.
        rows: the rows that the loss is averaged over.
        count: the number of all rows.

    Returns:
        The loss as a function of embeddings alone.
    """
    start, stop, _ = rows.indices(count)
    blocks = [slice(first, min(first + ROWS_AT_ONCE, stop)) for first in range(start, stop, ROWS_AT_ONCE)]

    def mean_over_blocks(*embeddings: Texts) -> tuple[Tensor, Metrics]:
        if len(blocks) == 1:
            return loss(*embeddings, rows=rows)
        total, means = torch.zeros(()), dict[str, Tensor]()
        for block in blocks:
            value, metrics = checkpoint(loss, *embeddings, rows=block, use_reentrant=False, preserve_rng_state=False)
            share = (block.stop - block.start) / (stop - start)
            total = total + share * value
            means = {name: means.get(name, 0.0) + share * metric for name, metric in metrics.items()}
        return total, means

    return mean_over_blocks
