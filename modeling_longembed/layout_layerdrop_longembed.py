"""The layout axis, LayerDrop (Fan et al. 2020, arXiv:1909.11556): drop random layers in training, then prune layers.

A dropped sublayer is the identity: only the residual connection remains, and nothing is rescaled. In evaluation all
sublayers are used.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .layout_registry_longembed import layers_of


def draw_layers(sublayer_pattern: str, rate: float, unit: str) -> list[bool]:
    """Draw which sublayers are used in one forward pass of training.

    The random numbers come from torch's CPU generator, outside of what gradient checkpointing recomputes. A batch that
    is read in several forward passes has one draw: see `layers_drawn_once`.

    Args:
        sublayer_pattern: the layout, one letter per sublayer.
        rate: probability of dropping a unit, 0 to 1.
        unit: `layer` drops whole layers (an `s` and the `f`s after it), `sublayer` drops single sublayers.

    Returns:
        For each sublayer, whether it is used.
    """
    layers = layers_of(sublayer_pattern)
    group_of = {index: number for number, layer in enumerate(layers) for index in layer}
    draws = torch.rand(len(layers) if unit == "layer" else len(sublayer_pattern)) >= rate
    kept = draws.tolist()
    return [kept[group_of[index] if unit == "layer" else index] for index in range(len(sublayer_pattern))]


@contextmanager
def layers_drawn_once(model: nn.Module) -> Iterator[None]:
    """Draw the layers of LayerDrop once for all forward passes inside the block, which read the parts of one batch.

    With a draw for each part, texts that are compared with each other would come from different layers, depending on
    how the batch is divided.

    Args:
        model: the model in training, maybe wrapped. Models without LayerDrop and models in evaluation draw nothing.
    """
    # Not `hasattr`: a wrapper such as that of LoRA passes on the attributes of the model inside.
    encoders: list[Any] = [module for module in model.modules() if "layers_of_batch" in vars(module)]
    for encoder in encoders:
        encoder.layers_of_batch = encoder.draw_layers()
    try:
        yield
    finally:
        for encoder in encoders:
            encoder.layers_of_batch = None


def no_contribution(layer: nn.Module) -> Tensor:
    """Return zero as a function of the parameters of a dropped layer, so that their gradient is zero, not missing.

    Data parallelism waits for the gradient of every parameter. Where several forward passes share one all-reduce
    (gradient accumulation, gradient caching), it would not average the gradients of layers that the last pass dropped.
    """
    trained = [parameter.sum() for parameter in layer.parameters() if parameter.requires_grad]
    return 0.0 * torch.stack(trained).sum() if trained else torch.zeros(())


def skip_layer(layer: nn.Module, hidden_states: Tensor) -> Tensor:
    """Return the residual stream `(T, d)` past a dropped layer, whose gradient in training is zero, not missing."""
    if not torch.is_grad_enabled():
        return hidden_states
    return hidden_states + no_contribution(layer).to(hidden_states.dtype)


def every_other(num_layers: int, rate: float) -> list[int]:
    """Return the layers to keep at a pruning rate: layer l is pruned if `l mod floor(1 / rate) = 0` (section 3.3).

    Raises:
        ValueError: `rate` is not between 0 (all layers are kept) and 1/2.
    """
    if not 0 <= rate <= 0.5:
        raise ValueError(f"rate={rate}: 'every other' prunes between none and half of the layers; give 0 to 0.5")
    step = int(1 / rate) if rate else num_layers + 1
    # l counts from 1, so that the first layer is kept: 1/2 prunes every second layer, 1/3 every third.
    return [layer for layer in range(num_layers) if (layer + 1) % step]


def prune_to_layers(model: PreTrainedModel, layers: list[int]):
    """Prune a model to some of its layers (an `s` and the `f`s after it) in place, and return the model.

    Args:
        model: the model.
        layers: numbers of the layers to keep.

    Raises:
        ValueError: there is no such layer, or no attention is left.
    """
    groups = layers_of(model.config.sublayer_pattern)
    if unknown := sorted(set(layers) - set(range(len(groups)))):
        raise ValueError(f"keep_layers: there is no layer {unknown[0]}; this model has 0 to {len(groups) - 1}")
    return prune_to_sublayers(model, [index for layer in sorted(set(layers)) for index in groups[layer]])


def prune_to_sublayers(model: PreTrainedModel, sublayers: list[int]):
    """Prune a model to some of its sublayers in place; the kept ones keep their weights and their order.

    Args:
        model: the model.
        sublayers: numbers of the sublayers to keep, indices of letters in `config.sublayer_pattern`.

    Returns:
        The same model, whose config describes the layout that is left.

    Raises:
        ValueError: there is no such sublayer, or no attention is left.
    """
    config, kept = model.config, sorted(set(sublayers))
    if unknown := [index for index in kept if not 0 <= index < len(config.sublayer_pattern)]:
        raise ValueError(
            f"keep_sublayers: there is no sublayer {unknown[0]}; this model has 0 to {len(config.sublayer_pattern) - 1}"
        )
    pattern = "".join(config.sublayer_pattern[index] for index in kept)
    if "s" not in pattern:
        raise ValueError("keep_sublayers: no attention sublayer is left; keep at least one")
    attention = [index for index, kind in enumerate(config.sublayer_pattern) if kind == "s"]
    places = [place for place, index in enumerate(attention) if index in kept]
    for name in ("attention_patterns", "training_attention_patterns", "layer_types"):
        if (entries := getattr(config, name)) is not None:
            setattr(config, name, [entries[place] for place in places])
    if kept[0] != 0:  # the new first sublayer has a norm, even if the old first sublayer had none
        config.first_attention_norm = True
    config.sublayer_pattern, config.num_hidden_layers = pattern, len(places)
    encoder: Any = model.base_model
    encoder.layers = nn.ModuleList(encoder.layers[index] for index in kept)
    return model
