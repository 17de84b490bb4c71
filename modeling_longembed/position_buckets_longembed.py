"""A learned bias by buckets of distances, shared by all layers (T5, MPNet), in addition to a position scheme.

It has its own config field, `relative_attention_num_buckets`, because MPNet combines it with a position table.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from .position_base_longembed import DistanceOnlyBias


def relative_position_bucket(relative_position: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """Return the bidirectional buckets of T5 (Raffel et al. 2020) and MPNet.

    Each side has half of the buckets, which are exact for short distances and logarithmic for longer ones.

    Args:
        relative_position: int64, `key - query`.
        num_buckets: number of buckets of both sides.
        max_distance: distance in tokens from which all keys of a side share the last bucket.

    Returns:
        int64 in `[0, num_buckets)`, shape of `relative_position`.
    """
    half = num_buckets // 2
    exact = half // 2
    side = (relative_position > 0).long() * half
    distance = relative_position.abs()
    far = (
        exact
        + (torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (half - exact)).long()
    )
    return side + torch.where(distance < exact, distance, far.clamp(max=half - 1))


class BucketBias(DistanceOnlyBias):
    """A learned number for every head and bucket of distances; shared by all layers."""

    def __init__(self, table: Tensor, max_distance: int):
        self.table, self.max_distance = table, max_distance  # (num_buckets, H)
        self.num_heads = table.shape[1]

    def heads(self, heads):
        return BucketBias(self.table[:, heads], self.max_distance)

    def values(self, relative_position: Tensor, head: Tensor) -> Tensor:
        return self.table[relative_position_bucket(relative_position, len(self.table), self.max_distance), head]


def check_buckets(config: Any) -> None:
    """Check the buckets of a config.

    Raises:
        ValueError: the buckets cannot be computed, or the position scheme has a bias by distance already.
    """
    buckets, furthest = config.relative_attention_num_buckets, config.relative_attention_max_distance
    if buckets % 4:
        raise ValueError(
            f"relative_attention_num_buckets={buckets}; give a multiple of 4: half for each side, half of that for "
            "exact distances"
        )
    if buckets and furthest <= buckets // 4:
        raise ValueError(
            f"relative_attention_max_distance={furthest} is not beyond the exact distances of "
            f"relative_attention_num_buckets={buckets}; give more than a quarter of the buckets"
        )
    if buckets and config.position_scheme.adds_bias:
        raise ValueError(
            f"relative_attention_num_buckets and position_embedding_type={config.position_embedding_type!r} are both "
            "a bias by distance; choose one"
        )


def build_buckets(config: Any) -> nn.Embedding | None:
    """Return the learned table `(num_buckets, H)`, or None if `config` has no buckets."""
    if not config.relative_attention_num_buckets:
        return None
    return nn.Embedding(config.relative_attention_num_buckets, config.num_attention_heads)


def bucket_bias(config: Any, table: nn.Embedding) -> BucketBias:
    """Return the bias of all sublayers, given the table that `build_buckets` returned."""
    # Look the rows up instead of reading the weight, which tensor parallelism splits.
    buckets = torch.arange(config.relative_attention_num_buckets, device=table.weight.device)
    return BucketBias(table(buckets), config.relative_attention_max_distance)
