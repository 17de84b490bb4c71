"""Extension of the context of an existing model: `model.extend_context(32768, method="yarn")`."""

from typing import Any

import torch
from torch import nn

from .attention_longembed import check_kernel
from .hub_longembed import HubModel
from .pattern_registry_longembed import build_pattern
from .position_schemes_longembed import get_scheme
from .position_table_longembed import extend_position_table, extended_position_table, position_table_rows


def default_method(scheme: str, attention_patterns: list) -> str | None:
    """Return the extension method that works best without training; None for a scheme without a trained length.

    Args:
        scheme: `config.position_embedding_type`.
        attention_patterns: entries of `config.attention_patterns`.
    """
    return get_scheme(scheme).default_extension([build_pattern(entry) for entry in attention_patterns])


@torch.no_grad()
def extend_model_context(model: HubModel, max_position_embeddings: int, method: str | None = None, **parameters):
    """Extend the context in place; the model can then be trained or saved like any other.

    A model that is already extended can be extended again by the same method: `linear`, `dynamic`, `ntk`, `yarn`,
    `theta` and `group` extend from the original context, `restart` continues, and `repeat` repeats the whole trained
    table. After `interpolate` it can be extended by `repeat`, which keeps every trained row at its position.

    Args:
        model: the model.
        max_position_embeddings: the new context in tokens.
        method: an extension method of the position scheme, see `LongEmbedConfig.position_extension`. None: that of the
            last extension; without one, `restart` if all patterns are blocks of one size, `repeat` for other tables and
            sinusoids, and `dynamic` for rope. Schemes without a trained length (alibi, relative, none) have no methods.
        **parameters: parameters of the method (`factor`, `period`, `rope_theta`, `neighbours`, `keep_short`, ...).

    Returns:
        The model.

    Raises:
        ValueError: the new context is not longer, or the method cannot be applied; the model is unchanged.
    """
    config, current = model.config, model.config.position_extension
    if type(max_position_embeddings) is not int or max_position_embeddings <= config.max_position_embeddings:
        raise ValueError(
            f"extend_context: max_position_embeddings={max_position_embeddings!r} must be a whole number above "
            f"the context of {config.max_position_embeddings} tokens that the model has"
        )
    extension = next_extension(config, method, parameters)
    extended = type(config)(
        **config.to_dict() | {"max_position_embeddings": max_position_embeddings, "position_extension": extension}
    )  # the complete config is validated before anything changes
    check_kernel(config._attn_implementation, extended)
    encoder: Any = model.base_model
    old_table = encoder.embeddings.position_embeddings
    config.max_position_embeddings = extended.max_position_embeddings
    config.position_extension = extended.position_extension
    if old_table is not None:
        rows = extended_position_table(old_table.weight, config)
        if current is not None:  # the trained rows keep their positions
            rows = extend_position_table(old_table.weight, position_table_rows(config), "repeat")
        table = nn.Embedding(len(rows), config.hidden_size, device=rows.device, dtype=rows.dtype)
        table.weight.copy_(rows).requires_grad_(old_table.weight.requires_grad)
        encoder.embeddings.position_embeddings = table
    model.set_tokenizer_length(max_position_embeddings)
    return model


def next_extension(config: Any, method: str | None, parameters: dict) -> dict | None:
    """Return the new `position_extension`, without the context length; None if the scheme needs none.

    Args:
        config: the current config of the model.
        method: the extension method, or None for the default.
        parameters: parameters of the method.
    """
    current = config.position_extension
    if current is None:
        method = method or config.position_scheme.default_extension(config.get_patterns())
        if method is None and not parameters:
            return None
        return {"method": method, "original_max_position_embeddings": config.max_position_embeddings} | parameters
    return config.position_scheme.extend_again(config, method or current["method"], parameters)
