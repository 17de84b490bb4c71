"""Attention pattern with adaptive spans (Sukhbaatar et al. 2019, arXiv:1905.07799): every head learns its window."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .attention_kernels_longembed import window_attention
from .pattern_base_longembed import AttentionInputs, AttentionPattern, parameter, register_pattern
from .pattern_local_longembed import SlidingAttention
from .position_base_longembed import ScoreBias
from .tensor_parallel_longembed import read_by_heads


class AdaptiveSpan(nn.Module):
    """The spans z of the H heads of one attention sublayer, learned as fractions of `max_span`.

    Args:
        num_heads: H.
        max_span: the longest span in tokens.
    """

    def __init__(self, num_heads: int, max_span: int):
        super().__init__()
        self.max_span = max_span
        self.fraction = nn.Parameter(torch.ones(num_heads))

    def forward(self) -> Tensor:
        """Return the spans in tokens, `(H,)`, fp32 or wider, between 0 and `max_span`.

        The gradient ignores the clamp (straight-through), because otherwise a span below 0 could never grow again. The
        parameter itself is not clamped, so that several forward passes may come before one backward pass.
        """
        fraction = self.wide_fraction()
        clamped = fraction + (fraction.clamp(0.0, 1.0) - fraction).detach()
        return self.max_span * clamped

    def penalty(self) -> Tensor:
        """Return the mean span of the heads in tokens, a term of the loss.

        A span below 0 counts as 0 and has no gradient. A span above `max_span` has one, because nothing else makes it
        shorter.
        """
        return self.max_span * self.wide_fraction().clamp(min=0.0).mean()

    def wide_fraction(self) -> Tensor:
        """Return the fractions in fp32 or wider: bf16 would round differences of one token away."""
        return self.fraction.to(torch.promote_types(self.fraction.dtype, torch.float32))


def find_adaptive_spans(model: nn.Module) -> list[AdaptiveSpan]:
    """Return the modules with the learned spans, one for each attention sublayer that has them."""
    return [module for module in model.modules() if isinstance(module, AdaptiveSpan)]


def total_span_penalty(model: nn.Module) -> Tensor:
    """Compute the penalty on long spans: 1/M sum z_i in tokens, with M heads in each attention sublayer.

    The paper adds it to the loss with the weight lambda = 2e-6. It is the mean over the heads of a sublayer, summed
    over the sublayers, as in the authors' code. It is a function of the parameters only, so that it is added once per
    optimizer step, however many batches that has.

    Returns:
        A scalar.

    Raises:
        ValueError: no attention sublayer has adaptive spans.
    """
    spans = find_adaptive_spans(model)
    if not spans:
        raise ValueError("span_penalty: no entry of attention_patterns is 'adaptive', so there are no spans to learn")
    return torch.stack([span.penalty() for span in spans]).sum()


class SpanBias(ScoreBias):
    """The soft mask of the spans as a bias of the scores, added to the bias of the position scheme.

        log m_z(|i - j|)    with    m_z(d) = clamp((R + z - d) / R, 0, 1)

    softmax(s + log m) is m exp(s) divided by its sum, so that no second normalization is needed.

    Args:
        spans: `(H,)`, z in tokens.
        ramp: R in tokens.
        scheme: the bias of the position scheme, or None.
    """

    def __init__(self, spans: Tensor, ramp: int, scheme: ScoreBias | None):
        self.spans, self.ramp, self.scheme = spans, ramp, scheme

    def dense(self, query, query_index, key_index):
        distance = (query_index[:, None] - key_index[None, :]).abs()  # (Q, K)
        ratio = (self.ramp + self.spans[:, None, None] - distance) / self.ramp  # (H, Q, K)
        # Where the clamp is active there is a constant without a gradient, because that of log(0) would be 0 times
        # infinity. A ratio of exactly 1 counts as clamped: else the furthest key would push a span beyond its maximum.
        on_ramp = (ratio > 0) & (ratio < 1)
        log_mask = torch.where(on_ramp, ratio, 1.0).log().masked_fill(ratio <= 0, float("-inf"))
        return log_mask if self.scheme is None else log_mask + self.scheme.dense(query, query_index, key_index)


@register_pattern
class AdaptiveAttention(AttentionPattern):
    """A sliding window whose width every head learns: at most `max_span` tokens on EACH side, with a soft edge.

    A head with the span z multiplies the weight of a key at distance d by clamp((ramp + z - d) / ramp, 0, 1) before the
    weights are normalized. A span never closes entirely: at z = 0 distances below `ramp` still count, because otherwise
    it could not learn. Keys that no head of the sublayer reaches are not read, so that short spans save time. At
    `max_span` the pattern equals `sliding` with that window.

    Spans start at `initial_span` tokens, by default `max_span`: a converted model then starts as a sliding window, and
    its spans shrink under the penalty (`span_penalty`, `--span_penalty_weight`) where that does little harm. The
    authors train from scratch and start at 0. Use the pattern to find out how far each layer has to look.

    Cost: L x (longest span + ramp) in time, L in memory.

    Raises:
        ValueError: `initial_span` is more than `max_span`.
    """

    type = "adaptive"
    layer_type = "sliding_attention"
    max_span: int = parameter(256)
    ramp: int = parameter(32)
    initial_span: int = parameter(None, least=0)

    def __post_init__(self):
        if self.initial_span is None:
            object.__setattr__(self, "initial_span", self.max_span)
        super().__post_init__()
        if self.initial_span > self.max_span:
            raise ValueError(
                f"attention_patterns: initial_span={self.initial_span} of 'adaptive' is more than "
                f"max_span={self.max_span}; give a smaller one, or leave it out"
            )

    def check(self, config):
        if self.max_span > config.max_position_embeddings:
            raise ValueError(
                f"attention_patterns: max_span={self.max_span} of 'adaptive' is more than "
                f"max_position_embeddings={config.max_position_embeddings}; use a smaller one"
            )
        neighbours = (config.position_extension or {}).get("neighbours", 0)
        if config.extends_by_groups and self.max_span >= neighbours:
            raise ValueError(
                f"position_extension: Self-Extend with neighbours={neighbours} cannot be computed under 'adaptive' "
                f"with max_span={self.max_span}; use neighbours > max_span, or 'yarn'"
            )

    @property
    def is_mask(self):
        return False

    @property
    def own_weights(self):
        return True

    @property
    def at_start(self):
        return SlidingAttention(window=self.max_span) if self.initial_span == self.max_span else self

    def visible(self, query, key, head, num_heads):
        return (query.index - key.index).abs() <= self.max_span

    def sees_all(self, length):
        return length <= 1  # the span is learned

    def reach(self, documents):
        return max(0, min(documents.max_seqlen - 1, self.max_span))

    def build(self, config):
        return AdaptiveSpan(config.num_attention_heads, self.max_span)

    def initialize(self, attention):
        init.constant_(attention.own.fraction, self.initial_span / self.max_span)

    def prepare(self, attention, states, context) -> Any:
        """Return the spans in tokens, `(H,)`."""
        return read_by_heads(attention.own(), attention.q_proj)

    def bias(self, inputs: AttentionInputs) -> SpanBias:
        """Return the bias of those heads that are in `inputs`."""
        first = inputs.first_head
        return SpanBias(inputs.own[first : first + inputs.query.shape[1]], self.ramp, inputs.bias)

    def dense(self, inputs, rows):
        return super().dense(inputs._replace(bias=self.bias(inputs)), rows)

    def attend(self, inputs: AttentionInputs) -> Tensor:
        bias = self.bias(inputs)
        # The largest distance with a weight, as a Python number because shapes depend on it: this synchronizes.
        furthest = min(self.max_span, math.ceil(bias.spans.max().item()) + self.ramp - 1)
        contexts = [
            window_attention(
                inputs.query[start:end],
                inputs.key[start:end],
                inputs.value[start:end],
                min(furthest, end - start - 1),
                inputs.scaling,
                inputs.dropout,
                bias,
                inputs.causal,
            )
            for start, end in inputs.documents.bounds
        ]
        return torch.cat(contexts) if contexts else torch.zeros_like(inputs.query)
