"""Transformer-XL's relative positions (Dai et al. 2019, section 3.3), in both directions for an encoder.

The score of query i and key j is `(q_i + u) . k_j + (q_i + v) . (W_r R_{i - j})` with sinusoids R and learned u and v
per head. Every attention sublayer has its own W_r, u and v (XLNet's form).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .packing_longembed import PackedDocuments
from .position_base_longembed import Positions, PositionScheme, ScoreBias, check_even_width, register_scheme
from .position_table_longembed import sinusoidal_embeddings
from .tensor_parallel_longembed import heads_here, read_by_heads


class DistanceEmbeddings(NamedTuple):
    """Sinusoids of all distances `query - key` that a forward pass may need."""

    table: Tensor  # (2 * reach + 1, d), for the distances -reach to reach
    reach: int

    @classmethod
    def up_to(cls, reach: int, width: int, like: Tensor) -> "DistanceEmbeddings":
        """Compute the sinusoids of the distances -reach to reach.

        Args:
            reach: the largest distance in tokens.
            width: d.
            like: a tensor with the device and data type of the result.

        Returns:
            The sinusoids.
        """
        distances = torch.arange(-reach, reach + 1, device=like.device)
        return cls(sinusoidal_embeddings(distances, width).to(like.dtype), reach)


class DistanceAttention(nn.Module):
    """The parameters W_r, u and v of one attention sublayer."""

    def __init__(self, config):
        super().__init__()
        heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.scaling = self.head_dim**-0.5
        self.r_proj = nn.Linear(config.hidden_size, heads * self.head_dim, bias=False)
        self.content_bias = nn.Parameter(torch.zeros(heads, self.head_dim))  # u
        self.distance_bias = nn.Parameter(torch.zeros(heads, self.head_dim))  # v

    def forward(self, query: Tensor, distances: DistanceEmbeddings, reach: int) -> tuple[Tensor, "DistanceBias"]:
        """Return the query with u added `(T, H, D)`, and the bias for distances up to `reach` that goes with it."""
        near = slice(distances.reach - reach, distances.reach + reach + 1)
        keys = self.r_proj(distances.table[near]).unflatten(-1, (-1, self.head_dim))  # (2 * reach + 1, H, D)
        here = heads_here(self.r_proj, keys.shape[1], len(self.content_bias))
        u, v = (read_by_heads(x, self.r_proj)[here] for x in (self.content_bias, self.distance_bias))
        return query + u, DistanceBias(keys.transpose(0, 1), v - u, self.scaling)


class DistanceBias(ScoreBias):
    """`(q_i + v) . (W_r R_{i - j})`, scaled, for queries to which u was added instead of v.

    Args:
        keys: `(H, 2 * reach + 1, D)`, W_r R for the distances -reach to reach.
        shift: `(H, D)`, v - u.
        scaling: factor of the scores.
    """

    reads_query = True

    def __init__(self, keys: Tensor, shift: Tensor, scaling: float):
        self.keys, self.shift, self.scaling = keys, shift, scaling

    def heads(self, heads):
        return DistanceBias(self.keys[heads], self.shift[heads], self.scaling)

    def dense(self, query, query_index, key_index):
        reach = self.keys.shape[1] // 2
        distance = query_index[:, None] - key_index[None, :]  # (Q, K)
        # Pairs beyond the reach are masked by the pattern, so that any finite number is correct.
        low, high = int(distance.min().clamp(min=-reach)), int(distance.max().clamp(max=reach))
        if low > high:  # all pairs are beyond the reach
            low = high = reach if low > reach else -reach
        scores = (query + self.shift[:, None]) @ self.keys[:, reach + low : reach + high + 1].transpose(1, 2)
        column = (distance.clamp(low, high) - low).expand(*scores.shape[:-1], -1)
        return scores.gather(-1, column) * self.scaling


@dataclass
class RelativePositionsOfPass(Positions):
    """The sinusoids of all distances, from which every sublayer computes a bias with its own weights."""

    distances: DistanceEmbeddings | None = None

    def apply(self, attention, query, key, pattern, documents):
        """Add u to the query and compute the sublayer's bias."""
        query, bias = attention.distance(query, self.distances, pattern.reach(documents))
        return query, key, bias, None


@register_scheme
class RelativePositions(PositionScheme):
    """Sinusoids of the distance, projected by each sublayer, in the scores (Dai et al. 2019, arXiv:1901.02860)."""

    type = "relative"
    adds_bias = True
    bias_reads_query = True

    def check(self, config: Any) -> None:
        """Raise ValueError for an odd width."""
        check_even_width(config)

    def build(self, config: Any) -> DistanceAttention:
        """Return W_r, u and v of one attention sublayer."""
        return DistanceAttention(config)

    def initialize(self, module: nn.Module, std: float) -> None:
        """Draw u and v from a normal distribution."""
        if isinstance(module, DistanceAttention):
            init.normal_(module.content_bias, std=std)
            init.normal_(module.distance_bias, std=std)

    def prepare(self, config: Any, documents: PackedDocuments, token_index: Tensor, hidden_states: Tensor) -> Positions:
        """Compute the sinusoids of all distances that a sublayer may see."""
        reach = max(pattern.reach(documents) for pattern in (*config.get_patterns(), *config.get_training_patterns()))
        return RelativePositionsOfPass(distances=DistanceEmbeddings.up_to(reach, config.hidden_size, hidden_states))

    def tensor_parallel_plan(self) -> dict[str, str]:
        """Split W_r by heads; u and v are small and replicated."""
        return {"distance.r_proj": "colwise"}

    def check_graph(self, config: Any) -> None:
        """Reject the export, because the bias gathers by distances that depend on the input.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "to_onnx: position_embedding_type='relative' (Transformer-XL) has no ONNX form; use 'rope' or 'alibi'"
        )
