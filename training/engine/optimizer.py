"""The optimiser of every training: AdamW, its parameter groups and the schedule of the learning rate."""

import inspect
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau
from transformers import SchedulerType, get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from common.conditions import Not
from common.errors import UserError, one_line

PLATEAU = "reduce_lr_on_plateau"
LOWER_IS_BETTER = ("loss", "perplexity", "alignment", "uniformity")  # words of names of metrics
WARMS_UP = {"lr_scheduler_type": Not("constant", PLATEAU)}


@dataclass(kw_only=True)
class OptimizerArguments:
    """The optimiser and the schedule of its learning rate.

    Raises:
        UserError: the learning rate is not positive, or the settings of the schedule are wrong.
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
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
        "reduce_lr_on_plateau",
        "cosine_with_min_lr",
        "cosine_warmup_with_min_lr",
        "warmup_stable_decay",
    ] = field(
        default="linear",
        metadata={
            "help": "schedule of the learning rate, by its name in transformers; reduce_lr_on_plateau lowers it when "
            "--lr_scheduler_metric stops improving"
        },
    )
    lr_scheduler_kwargs: list[str] = field(
        default_factory=list,
        metadata={
            "help": "settings of the schedule, name=value ..., as transformers names them: min_lr=1e-6 (or "
            "min_lr_rate=0.1) of cosine_with_min_lr, num_decay_steps=1000 of warmup_stable_decay, factor=0.5 "
            "patience=20 cooldown=2 min_lr=1e-7 of reduce_lr_on_plateau, whose numbers count evaluations"
        },
    )
    lr_scheduler_metric: str = field(
        default="eval_loss",
        metadata={
            "help": "metric of the evaluations that has to improve: to fall if it is a loss, a perplexity, alignment "
            "or uniformity, and otherwise to rise, unless --lr_scheduler_kwargs has mode=min or mode=max",
            "applies": {"lr_scheduler_type": "reduce_lr_on_plateau"},
        },
    )
    warmup_ratio: float = field(
        default=0.0,
        metadata={"help": "fraction of the steps that the warm-up takes", "within": "[0, 1]", "applies": WARMS_UP},
    )
    warmup_steps: int = field(
        default=0,
        metadata={"help": "steps of the warm-up; overrides --warmup_ratio", "within": "[0, inf)", "applies": WARMS_UP},
    )

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise UserError(f"--learning_rate {self.learning_rate}: must be more than 0")
        self.scheduler_settings()

    def scheduler_settings(self) -> dict[str, Any]:
        """Return `--lr_scheduler_kwargs` as keyword arguments.

        Returns:
            What `transformers.get_scheduler` takes as `scheduler_specific_kwargs`.

        Raises:
            UserError: the schedule has no such setting, needs one that is not given, or does not take its value.
        """
        option, kind = "--lr_scheduler_kwargs", self.lr_scheduler_type
        on_plateau = kind == PLATEAU
        function: Any = ReduceLROnPlateau if on_plateau else TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(kind)]
        known = {
            name: parameter.default
            for name, parameter in inspect.signature(function).parameters.items()
            if name not in ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")
        }
        settings = dict(map(_setting, self.lr_scheduler_kwargs))
        for name in settings:
            if name not in known:
                raise UserError(f"{option} {name}: {kind} takes {', '.join(known) or 'no settings'}")
        missing = [name for name, default in known.items() if default is inspect.Parameter.empty]
        if missing := [name for name in missing if name not in settings]:
            raise UserError(f"{option}: {kind} needs {', '.join(missing)}, such as {missing[0]}=1000")
        if on_plateau and "mode" not in settings:
            settings["mode"] = "min" if any(word in self.lr_scheduler_metric for word in LOWER_IS_BETTER) else "max"
        try:  # the library knows which values it takes
            trial = torch.optim.SGD([torch.zeros(1)], lr=self.learning_rate)
            get_scheduler(kind, trial, 1, 10**9, settings)
        except (ValueError, TypeError) as error:
            raise UserError(f"{option} {' '.join(self.lr_scheduler_kwargs)}: {kind}: {one_line(error)}") from None
        return settings


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

    Raises:
        UserError: warm-up and decay take more steps than the run has.
    """
    settings = arguments.scheduler_settings()
    warmup_steps = arguments.warmup_steps or round(arguments.warmup_ratio * total_steps)
    decay_steps = settings.get("num_decay_steps", 0) + settings.get("num_stable_steps", 0)
    if decay_steps and warmup_steps + decay_steps > total_steps:
        raise UserError(
            f"--lr_scheduler_type {arguments.lr_scheduler_type}: {warmup_steps} steps of warm-up and {decay_steps} "
            f"after it are more than the {total_steps} of the run"
        )
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]  # as most schedules do, but not the one on a plateau
    return get_scheduler(arguments.lr_scheduler_type, optimizer, warmup_steps, total_steps, settings)


def restore_schedule(scheduler: LRScheduler, optimizer: torch.optim.Optimizer, stored: dict[str, Any]) -> None:
    """Go on with the schedule of a checkpoint, at the learning rates of the options of now.

    A schedule that is a function of the step alone goes to its step. Loading its state would bring back the learning
    rate of the run that was resumed, whatever the options say. One on a plateau goes on with what it has seen, at the
    same fraction of the initial learning rate.

    Args:
        scheduler: as `make_scheduler` returned it.
        optimizer: its groups have the initial learning rates of the options.
        stored: the `optimizer` and the `scheduler` of a checkpoint, as their `state_dict` returned them.

    Raises:
        UserError: one of the two schedules waits for evaluations, and the other does not.
    """
    if isinstance(scheduler, ReduceLROnPlateau) != ("best" in stored["scheduler"]):
        raise UserError(
            f"--change_settings lr_scheduler_type: {PLATEAU} counts evaluations and the others count steps, so that "
            "none can go on with the other; start anew in another --output_dir"
        )
    if isinstance(scheduler, ReduceLROnPlateau):
        seen = {
            name: stored["scheduler"][name] for name in ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")
        }
        scheduler.load_state_dict(scheduler.state_dict() | seen)
        for group, before in zip(optimizer.param_groups, stored["optimizer"]["param_groups"], strict=True):
            begun = before["initial_lr"]
            group["lr"] = before["lr"] if group["lr"] == begun else before["lr"] * (group["lr"] / begun)
        scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
        return
    assert isinstance(scheduler, LambdaLR)
    steps = {name: stored["scheduler"][name] for name in ("last_epoch", "_step_count")}
    scheduler.load_state_dict(scheduler.state_dict() | steps)
    rates = [base * at(scheduler.last_epoch) for base, at in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def _setting(text: str) -> tuple[str, Any]:
    """Read `name=value`, a number if it is one."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise UserError(f"--lr_scheduler_kwargs {text}: write name=value, such as min_lr=1e-6")
    for convert in (int, float):
        try:
            number = convert(value)
        except ValueError:
            continue
        if not math.isfinite(number):
            raise UserError(f"--lr_scheduler_kwargs {text}: must be a finite number")
        return name, number
    return name, value
