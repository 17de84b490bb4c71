"""The optimiser of every training: AdamW, its parameter groups and the schedule of the learning rate."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import get_scheduler

from common.errors import UserError


@dataclass(kw_only=True)
class OptimizerArguments:
    """The optimiser and the schedule of its learning rate.

    Raises:
        UserError: the learning rate is not positive.
    """

    learning_rate: float = field(default=2e-5, metadata={"help": "peak learning rate of AdamW"})
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
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = field(
        default="linear", metadata={"help": "schedule of the learning rate after the warm-up"}
    )
    warmup_ratio: float = field(
        default=0.0, metadata={"help": "fraction of the steps that the warm-up takes", "within": "[0, 1]"}
    )
    warmup_steps: int = field(
        default=0, metadata={"help": "steps of the warm-up; overrides --warmup_ratio", "within": "[0, inf)"}
    )

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise UserError(f"--learning_rate {self.learning_rate}: must be more than 0")


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


def make_scheduler(optimizer: torch.optim.Optimizer, arguments: OptimizerArguments, total_steps: int) -> LRScheduler:
    """Return the schedule of the learning rate.

    Args:
        optimizer: its groups keep the proportions of their learning rates.
        arguments: parsed command-line options.
        total_steps: number of steps of the whole run.
    """
    return get_scheduler(
        arguments.lr_scheduler_type,
        optimizer,
        num_warmup_steps=arguments.warmup_steps or round(arguments.warmup_ratio * total_steps),
        num_training_steps=total_steps,
    )


def restore_schedule(scheduler: LRScheduler, optimizer: torch.optim.Optimizer, stored: dict[str, Any]) -> None:
    """Go on with the schedule of a checkpoint, at the learning rates of the options of now.

    A schedule that is a function of the step alone goes to its step. Loading its state would bring back the learning
    rate of the run that was resumed, whatever the options say.

    Args:
        scheduler: as `make_scheduler` returned it.
        optimizer: its groups have the initial learning rates of the options.
        stored: the `optimizer` and the `scheduler` of a checkpoint, as their `state_dict` returned them.
    """
    assert isinstance(scheduler, LambdaLR)
    steps = {name: stored["scheduler"][name] for name in ("last_epoch", "_step_count")}
    scheduler.load_state_dict(scheduler.state_dict() | steps)
    rates = [base * at(scheduler.last_epoch) for base, at in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
