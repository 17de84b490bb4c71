"""ALiBi (Press et al. 2022, arXiv:2108.12409): a penalty on the scores that grows with the distance."""

import math
from typing import Any

import torch
from torch import Tensor

from .packing_longembed import PackedDocuments
from .position_base_longembed import DistanceOnlyBias, Positions, PositionScheme, register_scheme


def alibi_slopes(num_heads: int) -> list[float]:
    """Return the slopes of Press et al. 2022: `2^(-8h / H)` for H a power of two.

    For other H, those of the next lower power are followed by every second one of the next higher power.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * h / power) for h in range(1, power + 1)]
    return slopes + [2.0 ** (-4.0 * h / power) for h in range(1, 2 * (num_heads - power), 2)]


class AlibiBias(DistanceOnlyBias):
    """`-slope_h |i - j|`: the symmetric form, because an encoder attends in both directions. `slopes` is `(H,)`."""

    def __init__(self, slopes: Tensor):
        self.slopes, self.num_heads = slopes, len(slopes)

    def heads(self, heads):
        return AlibiBias(self.slopes[heads])

    def values(self, relative_position: Tensor, head: Tensor) -> Tensor:
        return -relative_position.abs() * self.slopes[head]


@register_scheme
class AlibiPositions(PositionScheme):
    """A bias of `-slope_h |i - j|` in every sublayer; it has no parameters and no trained length."""

    type = "alibi"
    adds_bias = True

    def prepare(self, config: Any, documents: PackedDocuments, token_index: Tensor, hidden_states: Tensor) -> Positions:
        """Compute the slopes."""
        slopes = torch.tensor(alibi_slopes(config.num_attention_heads), device=hidden_states.device)
        return Positions(bias=AlibiBias(slopes))
