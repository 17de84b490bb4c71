"""What one attention sublayer of a model computes, kept while the model runs: its queries, keys and values."""

from typing import Any, NamedTuple

from torch import Tensor, nn

from common.errors import UserError
from modeling_longembed.attention_longembed import LayerContext, LongEmbedAttention
from modeling_longembed.pattern_base_longembed import AttentionInputs
from modeling_longembed.pattern_landmark_longembed import landmark_size


class Projections(NamedTuple):
    """Of T packed tokens, H heads of size D.

    Args:
        query, key, value: `(T, H, D)`, as projected: no rotation yet.
        attention: what attention makes its distribution of: rotated queries and keys, pattern, biases, documents.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attention: AttentionInputs


class ProjectionTap:
    """Keeps the projections of one attention sublayer of a model, from a forward pass until they are taken.

    A hook on the sublayer, so that the model is run, sharded and checkpointed as ever. The projections are computed a
    second time: they are a small part of one of many sublayers.
    """

    def __init__(self, model: nn.Module, number: int | None = None) -> None:
        """Args:
        model: a LongEmbed model, maybe wrapped for LoRA.
        number: of the attention sublayer, counted from 1; the last if None.

        Raises:
            UserError: there is no such sublayer, or it reads more than the tokens of the text.
        """
        sublayers = [module for module in model.modules() if isinstance(module, LongEmbedAttention)]
        number = len(sublayers) if number is None else number
        if not 1 <= number <= len(sublayers):
            raise UserError(f"there is no attention layer {number}; this model has 1 to {len(sublayers)}")
        if landmark_size(sublayers[0].config) is not None:
            raise UserError("a model with landmarks reads tokens that the other does not have; use another pattern")
        self.sublayer, self._kept = sublayers[number - 1], list[Projections]()
        self.sublayer.register_forward_hook(self._keep)

    def take(self) -> Projections:
        """Those of the last forward pass."""
        projections = self._kept[-1]
        self._kept.clear()
        return projections

    def _keep(self, sublayer: LongEmbedAttention, inputs: tuple[Tensor, LayerContext], output: Any) -> None:
        # Gradient checkpointing runs the sublayer again in the backward pass, and nobody takes those.
        self._kept[:] = [project(sublayer, *inputs)]


def project(sublayer: LongEmbedAttention, states: Tensor, context: LayerContext) -> Projections:
    """The projections of a sublayer; its distribution under the pattern that serves, without dropout.

    Args:
        sublayer: of a model.
        states: `(T, d)`, what it reads.
        context: of this forward pass.
    """
    query, key, value = sublayer.project(states)
    turned_query, turned_key, bias, grouped = query, key, context.bias, None
    if context.rope:
        turned_query, turned_key, grouped = context.rope[sublayer.layer_type](query, key)
    if sublayer.distance is not None:
        reach = sublayer.pattern.reach(context.documents)
        turned_query, bias = sublayer.distance(turned_query, context.distances, reach)
    attention = AttentionInputs(
        turned_query,
        turned_key,
        value,
        sublayer.pattern,
        context.documents,
        sublayer.head_dim**-0.5,
        dropout=0.0,
        bias=bias,
        grouped=grouped,
        causal=sublayer.config.is_causal,
    )
    return Projections(query, key, value, attention)
