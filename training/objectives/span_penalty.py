"""Adaptive attention spans in training: the penalty that shortens them, and their own learning rate."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from training.engine.optimizer import parameter_groups


@dataclass
class SpanArguments:
    """The spans of a model whose attention_patterns are 'adaptive'."""

    span_penalty_weight: float = field(
        default=0.0,
        metadata={
            "help": "what a token of span costs: this times the mean span of the heads of each attention sublayer, in "
            "tokens, is added to the loss (2e-6 in the paper, whose loss is that of language modelling)"
        },
    )
    span_learning_rate: float = field(
        default=1e-3,
        metadata={"help": "peak learning rate of the spans, in shares of max_span a step; follows --lr_scheduler_type"},
    )

    def __post_init__(self) -> None:
        if self.span_penalty_weight < 0:
            raise UserError(f"--span_penalty_weight {self.span_penalty_weight}: must be at least 0")
        if self.span_learning_rate <= 0:
            raise UserError(f"--span_learning_rate {self.span_learning_rate}: must be more than 0")


# A term of the loss that depends on the parameters alone, and its metrics.
Penalty = Callable[[], tuple[Tensor, dict[str, Tensor]]]


def span_penalty(model: Any, arguments: SpanArguments) -> Penalty | None:
    """The auxiliary loss of adaptive spans (Sukhbaatar et al. 2019, arXiv:1905.07799), section 3; None without spans.

    It is a term of the loss over all embeddings of a batch, not of each chunk's: gradient caching is exact for a loss
    that has parameters of its own, and what is the same on all processes survives the mean over them.

    Args:
        model: a `LongEmbedModel`, of our code or of its folder's, after `select_parameters`; the wrappers of LoRA and
            of distributed training share its parameters.

    Raises:
        UserError: there is a weight, and no span that it could shorten.
    """
    weight, spans = arguments.span_penalty_weight, model.adaptive_spans()
    if weight and not spans:
        raise UserError(
            f"--span_penalty_weight {weight}: no attention pattern of this model is 'adaptive'; convert it with "
            "attention_patterns='adaptive', or leave the weight out"
        )
    if weight and not all(span.fraction.requires_grad for span in spans):
        raise UserError(f"--span_penalty_weight {weight}: the spans do not train; use --tuning full")
    if not spans:
        return None

    def penalty() -> tuple[Tensor, dict[str, Tensor]]:
        mean = torch.stack([span() for span in spans]).detach().mean()
        return weight * model.span_penalty(), {"mean_span": mean}

    return penalty


def span_groups(model: Any, arguments: SpanArguments, weight_decay: float) -> list[dict[str, Any]]:
    """The optimiser groups of `parameter_groups`, and one of the spans.

    A span is a fraction of `max_span`, and AdamW moves a number by about its learning rate: at that of the weights a
    span would not get anywhere.
    """
    spans = [span.fraction for span in model.adaptive_spans() if span.fraction.requires_grad]
    of_spans = {id(fraction) for fraction in spans}
    groups = parameter_groups(model, weight_decay)
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in of_spans]
    own = {"params": spans, "lr": arguments.span_learning_rate, "weight_decay": 0.0}
    return [*groups, own] if spans else groups
