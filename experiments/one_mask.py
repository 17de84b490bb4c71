"""Train with one dropout mask for both texts of a pair: a row of the table of docs/reports/dropout.md.

    python experiments/one_mask.py --objective simcse --dropout 0.1 --attention_dropout 0 ...

This is training/contrastive.py with a patch of dropout, for experiments/findings.py; SimCSE (Gao et al. 2021) shows
that one mask does harm. It needs `--pairs twins` and `--batch_tokens` that hold a whole batch: a packed batch is then
all texts followed by all of them again, and the mask that is drawn for the first half is used for the second.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError, run
from training import contrastive
from training.data.packing import PackedTexts
from training.objectives import embed
from training.objectives.embed import pool


def pool_twins(model: Any, chunk: PackedTexts) -> Tensor:
    """Pool packed texts of which the second half repeats the first.

    Args:
        model: the encoder.
        chunk: 2n packed texts.

    Returns:
        Vectors `(2n, d)`.

    Raises:
        UserError: the second half is not the first one again.
    """
    first, second = chunk.input_ids.tensor_split(2, dim=1)
    if not torch.equal(first, second):
        raise UserError("one mask for two texts: needs --pairs twins, and --batch_tokens that hold a whole batch")
    return pool(model, chunk)


def drop_twins(layer: nn.Dropout, hidden: Tensor) -> Tensor:
    """Apply dropout to `(..., 2T, d)` with one mask for both halves of the tokens."""
    if not layer.training:
        return hidden
    first, second = hidden.chunk(2, dim=-2)
    mask = F.dropout(torch.ones_like(first), layer.p)
    return torch.cat([first * mask, second * mask], dim=-2)


def main() -> None:
    """Run training/contrastive.py with the patch."""
    nn.Dropout.forward = drop_twins  # type: ignore[assignment, method-assign]  # a patch on purpose
    embed.pool = pool_twins  # `outputs` looks it up there
    contrastive.main()


if __name__ == "__main__":
    run(main)
