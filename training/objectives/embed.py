"""Vectors of packed texts from a model, differentiable unless the caller disables gradients."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from training.data.packing import PackedTexts


def pool(model: Callable[..., Any], chunk: PackedTexts) -> Tensor:
    """Return the model's pooled vectors of n packed texts, `(n, d)`, not normalised."""
    return model(
        input_ids=chunk.input_ids, cu_seq_lens_q=chunk.cu_seq_lens_q, max_length_q=chunk.max_length_q
    ).pooler_output


def embed(model: Callable[..., Any], chunk: PackedTexts) -> Tensor:
    """Return unit vectors of n packed texts, `(n, d)`."""
    return F.normalize(pool(model, chunk), dim=-1)
