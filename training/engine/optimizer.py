"""The optimiser of every training: AdamW and its parameter groups."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from training.engine.schedule import ScheduleArguments


@dataclass(kw_only=True)
class OptimizerArguments(ScheduleArguments):
    """The optimiser and the schedule of its learning rate."""

    weight_decay: float = field(
        default=0.01,
        metadata={
            "help": "weight decay of matrices; biases, norms and embedding tables have none",
            "within": "[0, inf)",
        },
    )
    adam_beta1: float = field(default=0.9, metadata={"help": "AdamW's first beta", "within": "[0, 1)"})
    adam_beta2: float = field(default=0.999, metadata={"help": "AdamW's second beta", "within": "[0, 1)"})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "AdamW's epsilon", "within": "[0, inf)"})
    max_grad_norm: float = field(
        default=1.0, metadata={"help": "maximum norm of the gradient; 0: no clipping", "within": "[0, inf)"}
    )


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the optimiser's groups of a model: matrices decay; biases, norms and embedding tables do not.

    Tables do not, because AdamW's decay also pulls rows to zero that no text uses, or that are frozen.

    Args:
        model: parameters that do not require a gradient are left out.
        weight_decay: of the group that decays.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decayed = [parameter for name, parameter in trained if parameter.ndim > 1 and "embed" not in name.lower()]
    plain = [parameter for name, parameter in trained if parameter.ndim <= 1 or "embed" in name.lower()]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_optimizer(groups: list[dict[str, Any]], arguments: OptimizerArguments) -> torch.optim.AdamW:
    """Return AdamW over parameter groups; a group's own `lr` or `weight_decay` has precedence."""
    return torch.optim.AdamW(
        groups,
        lr=arguments.learning_rate,
        betas=(arguments.adam_beta1, arguments.adam_beta2),
        eps=arguments.adam_epsilon,
        fused=True,
    )
