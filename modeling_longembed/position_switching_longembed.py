"""Change of the position scheme of an existing model: `model.switch_positions("rope")`."""

from typing import Any

import torch
from torch import nn

from .attention_longembed import LongEmbedAttention, check_kernel
from .hub_longembed import HubModel
from .position_schemes_longembed import get_scheme

ROPE_THETA = 10_000.0  # Su et al. 2021, section 3.2.2


@torch.no_grad()
def switch_position_scheme(
    model: HubModel,
    scheme: str,
    max_position_embeddings: int | None = None,
    rope_theta: float | None = None,
    keep_mean: bool = True,
):
    """Change the position scheme of the model in place, and keep all other weights.

    The outputs change, and are of little use before the model is trained, because its heads have learned positions from
    the old scheme. The parameters of the old scheme (the table of `absolute`, the projections of `relative`) and its
    extension are dropped.

    Args:
        model: the model.
        scheme: `rope`, `alibi`, `sinusoidal`, `relative` (whose new weights start at random), or, in a causal model,
            `none`.
        max_position_embeddings: the new context length in tokens, shorter or longer; None: unchanged.
        rope_theta: base of the rotation, for `rope`; None: 10,000.
        keep_mean: whether the mean row of a learned table is added to all segment rows, so that the common part of the
            position vectors is kept. A model without segments gets one segment for all tokens.

    Returns:
        The model.

    Raises:
        ValueError: the model has this scheme already, or the scheme cannot be combined with the rest of the config; the
            model is unchanged.
    """
    encoder: Any = model.base_model
    config, embeddings = model.config, encoder.embeddings
    if scheme == config.position_embedding_type:
        raise ValueError(
            f"switch_positions: the positions of this model are {scheme!r} already; use extend_context for a "
            "longer context, or name another scheme"
        )
    new = get_scheme(scheme)
    if new.has_table:
        raise ValueError(
            "switch_positions: a learned table would start untrained; use 'sinusoidal', which needs no training, "
            "or 'rope'"
        )
    if rope_theta is not None and not new.rotates:
        raise ValueError(f"switch_positions: {scheme!r} has no rope_theta={rope_theta!r}; leave it out")
    mean = None
    if keep_mean and embeddings.position_embeddings is not None:
        mean = embeddings.position_embeddings.weight.mean(0)
    context = config.max_position_embeddings if max_position_embeddings is None else max_position_embeddings
    rope = {"rope_type": "default", "rope_theta": ROPE_THETA if rope_theta is None else rope_theta}
    changes = {
        "position_embedding_type": scheme,
        "position_extension": None,
        "rope_parameters": rope if new.rotates else None,
        "max_position_embeddings": context,
        "type_vocab_size": config.type_vocab_size or int(mean is not None),
    }
    switched = type(config)(**config.to_dict() | changes)  # the complete config is validated before anything changes
    check_kernel(config._attn_implementation, switched)
    for name in (*changes, "base_model_tp_plan"):
        setattr(config, name, getattr(switched, name))

    embeddings.position_embeddings = None
    if mean is not None:
        if embeddings.token_type_embeddings is None:
            table = nn.Embedding(config.type_vocab_size, config.hidden_size, device=mean.device, dtype=mean.dtype)
            embeddings.token_type_embeddings = table
            table.weight.zero_()
        embeddings.token_type_embeddings.weight.add_(mean)
    for attention in model.modules():
        if isinstance(attention, LongEmbedAttention):
            attention.distance = new.build(config)
            if attention.distance is not None:
                attention.distance.to(attention.q_proj.weight)
                attention.distance.apply(model._init_weights)
    model.set_tokenizer_length(config.max_position_embeddings)
    return model
