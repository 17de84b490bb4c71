"""training/contrastive.py, whose two texts of a pair share one dropout mask: what SimCSE (Gao et al. 2021) warns of.

    python experiments/one_mask.py --objective simcse --dropout 0.1 --attention_dropout 0 ...

For experiments/findings.py alone. It takes twins, and a batch whose tokens are held at once: all texts stand in one
row, then all of them again, and what is drawn for the first half holds for the second.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError, run
from training import contrastive
from training.data.packing import PackedTexts
from training.objectives import pair_step
from training.objectives.embed import pool


def pool_twins(model: Any, chunk: PackedTexts) -> Tensor:
    """Vectors of packed texts, `(2n, d)`, of which the second n are the first again.

    Raises:
        UserError: they are not.
    """
    first, second = chunk.input_ids.tensor_split(2, dim=1)
    if not torch.equal(first, second):
        raise UserError("one mask for two texts: needs --pairs twins, and --batch_tokens that hold a whole batch")
    return pool(model, chunk)


def drop_twins(layer: nn.Dropout, hidden: Tensor) -> Tensor:
    """Dropout of `(..., 2T, d)` with one mask for both halves of the tokens."""
    if not layer.training:
        return hidden
    first, second = hidden.chunk(2, dim=-2)
    mask = F.dropout(torch.ones_like(first), layer.p)
    return torch.cat([first * mask, second * mask], dim=-2)


def main() -> None:
    """The script."""
    nn.Dropout.forward = drop_twins  # type: ignore[assignment, method-assign]
    pair_step.pool = pool_twins
    contrastive.main()


if __name__ == "__main__":
    run(main)
