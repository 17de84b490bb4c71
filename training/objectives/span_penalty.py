"""Training of adaptive attention spans: the penalty that shortens them, and their own learning rate."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from training.engine.optimizer import parameter_groups

# A term of the loss that depends on parameters only, and its metrics.
Penalty = Callable[[], tuple[Tensor, dict[str, Tensor]]]


@dataclass
class SpanArguments:
    """Training of a model whose attention patterns are 'adaptive'."""

    span_penalty_weight: float = field(
        default=0.0,
        metadata={
            "help": "weight of the span penalty: the mean span of the heads of each attention sublayer, in tokens, is "
            "multiplied by it and added to the loss (2e-6 in the paper, for a language-model loss)",
            "within": "[0, inf)",
        },
    )
    span_learning_rate: float = field(
        default=1e-3,
        metadata={
            "help": "peak learning rate of the spans, as a fraction of max_span per step; follows --lr_scheduler_type",
            "within": "(0, inf)",
        },
    )


def span_penalty(model: Any, arguments: SpanArguments) -> Penalty | None:
    """Build the auxiliary loss of adaptive spans (Sukhbaatar et al. 2019, arXiv:1905.07799, section 3).

    It is a term of the loss over all embeddings of a batch and not of each chunk's. Gradient caching is exact for a
    loss with parameters of its own, and a term that is equal on all processes survives the mean over them.

    Args:
        model: a `LongEmbedModel`, of our code or of its folder's, whose trainable parameters have been selected; the
            wrappers of LoRA and of distributed training share its parameters.
        arguments: parsed command-line options.

    Returns:
        The penalty; None if the model has no adaptive spans.

    Raises:
        UserError: there is a weight or a learning rate for spans, but no span that trains.
    """
    weight, spans = arguments.span_penalty_weight, model.adaptive_spans()
    for option, value in vars(arguments).items():
        if value == getattr(SpanArguments, option):
            continue  # the default
        if not spans:
            raise UserError(
                f"--{option} {value}: no attention pattern of this model is 'adaptive'; convert it with "
                f"attention_patterns='adaptive', or leave --{option} out"
            )
        if not all(span.fraction.requires_grad for span in spans):
            raise UserError(f"--{option} {value}: the spans do not train; use --tuning full")
    if not spans:
        return None

    def penalty() -> tuple[Tensor, dict[str, Tensor]]:
        mean = torch.stack([span() for span in spans]).detach().mean()
        return weight * model.span_penalty(), {"mean_span": mean}

    return penalty


def span_groups(model: Any, arguments: SpanArguments, weight_decay: float) -> list[dict[str, Any]]:
    """Return the optimiser's parameter groups of a model, with its spans in a group of their own.

    A span is stored as a fraction of `max_span`. AdamW moves a number by about its learning rate at each step, so at
    the learning rate of the weights a span would hardly move.

    Args:
        model: a `LongEmbedModel`, or a module around one.
        arguments: parsed command-line options.
        weight_decay: weight decay of the matrices.

    Returns:
        The groups of `parameter_groups`, and a group of the spans without decay if the model has any that train.
    """
    spans = [span.fraction for span in model.adaptive_spans() if span.fraction.requires_grad]
    span_ids = {id(fraction) for fraction in spans}
    groups = parameter_groups(model, weight_decay)
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in span_ids]
    span_group = {"params": spans, "lr": arguments.span_learning_rate, "weight_decay": 0.0}
    return [*groups, span_group] if spans else groups
