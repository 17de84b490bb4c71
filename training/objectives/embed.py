"""A model's vectors of packed texts, with whatever graph the caller wants."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from training.data.packing import PackedTexts


def pool(model: Callable[..., Any], chunk: PackedTexts) -> Tensor:
    """Vectors of packed texts as the model pools them, `(n, d)`, not normalised."""
    return model(
        input_ids=chunk.input_ids, cu_seq_lens_q=chunk.cu_seq_lens_q, max_length_q=chunk.max_length_q
    ).pooler_output


def embed(model: Callable[..., Any], chunk: PackedTexts) -> Tensor:
    """Unit vectors of packed texts, `(n, d)`."""
    return F.normalize(pool(model, chunk), dim=-1)
