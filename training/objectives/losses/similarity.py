"""The score matrix of the softmax losses."""

import torch
from torch import Tensor


def similarity(rows: Tensor, columns: Tensor, temperature: float | Tensor) -> Tensor:
    """Return dot products divided by a temperature, in at least float32.

    In half precision, or under autocast, a score of 20 is off by 0.06 and its exponential by 6 %.

    Args:
        rows: `(n, d)`.
        columns: `(m, d)`.
        temperature: a number, or a scalar tensor that is trained.

    Returns:
        `(n, m)` scores.

    Examples:
        >>> import torch
        >>> similarity(torch.eye(2), torch.tensor([[1.0, 0.0], [0.6, 0.8]]), temperature=0.5)
        tensor([[2.0000, 1.2000],
                [0.0000, 1.6000]])
    """
    dtype = torch.promote_types(rows.dtype, torch.float32)
    with torch.autocast(rows.device.type, enabled=False):
        return rows.to(dtype) @ columns.to(dtype).T / temperature
