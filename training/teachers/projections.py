"""Queries, keys and values of one attention sublayer, recorded while the model runs."""

from typing import Any, NamedTuple

from torch import Tensor, nn

from common.errors import UserError
from modeling_longembed.attention_longembed import LayerContext, LongEmbedAttention
from modeling_longembed.pattern_base_longembed import AttentionInputs


class Projections(NamedTuple):
    """The projections of T packed tokens in H heads of size D.

    Args:
        query: `(T, H, D)`, before any rotation.
        key: `(T, H, D)`, before any rotation.
        value: `(T, H, D)`.
        attention: the inputs of the attention distribution: rotated queries and keys, pattern, biases, documents.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attention: AttentionInputs


class ProjectionTap:
    """Records the projections of one attention sublayer in each forward pass.

    It is a hook on the sublayer, so the model is run, sharded and checkpointed as usual. The projections are computed a
    second time, which costs little: they are a small part of one of many sublayers.

    Args:
        model: a LongEmbed model, maybe wrapped for LoRA.
        number: number of the attention sublayer, from 1; None: the last one.

    Raises:
        UserError: there is no such sublayer, or it also reads landmarks and not only the tokens of the text.
    """

    def __init__(self, model: nn.Module, number: int | None = None) -> None:
        sublayers = [module for module in model.modules() if isinstance(module, LongEmbedAttention)]
        number = len(sublayers) if number is None else number
        if not 1 <= number <= len(sublayers):
            raise UserError(f"there is no attention layer {number}; this model has 1 to {len(sublayers)}")
        if any(pattern.adds_tokens for pattern in sublayers[0].config.get_patterns()):
            raise UserError("a model with landmarks reads tokens that the other does not have; use another pattern")
        self.sublayer, self._kept = sublayers[number - 1], list[Projections]()
        self.sublayer.register_forward_hook(self._keep)

    def take(self) -> Projections:
        """Return the projections of the last forward pass, and forget them."""
        projections = self._kept[-1]
        self._kept.clear()
        return projections

    def _keep(self, sublayer: LongEmbedAttention, inputs: tuple[Tensor, LayerContext], output: Any) -> None:
        # Gradient checkpointing runs the sublayer again in the backward pass; those projections are not taken.
        self._kept[:] = [project(sublayer, *inputs)]


def project(sublayer: LongEmbedAttention, states: Tensor, context: LayerContext) -> Projections:
    """Compute the projections of a sublayer, and the inputs of its attention without dropout.

    Args:
        sublayer: an attention sublayer.
        states: `(T, d)`, its input.
        context: positions, documents and biases of this forward pass.

    Returns:
        The projections.
    """
    query, key, value = sublayer.project(states)
    # As the pattern serves, also while the model trains.
    attention = sublayer.attention_inputs(query, key, value, context, sublayer.pattern)._replace(training=False)
    return Projections(query, key, value, attention)
