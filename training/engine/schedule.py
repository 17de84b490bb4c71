"""The schedule of the learning rate: by the step, or by what evaluations find."""

import inspect
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from accelerate.utils import gather_object
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau
from transformers import SchedulerType, get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from common.conditions import Not
from common.errors import UserError, one_line
from training.engine.held_out import Evaluation

PLATEAU = "reduce_lr_on_plateau"
LOWER_IS_BETTER = ("loss", "perplexity", "alignment", "uniformity")  # words of names of metrics
WARMS_UP = {"lr_scheduler_type": Not("constant", PLATEAU)}
SEEN_ON_PLATEAU = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")
MANY = 10**9  # steps of the run that settings are tried on: more than any warm-up or decay takes


@dataclass(kw_only=True)
class ScheduleArguments:
    """The learning rate, and how it changes over a run.

    Raises:
        UserError: the settings of the schedule are wrong.
    """

    learning_rate: float = field(default=2e-5, metadata={"help": "peak learning rate of AdamW", "within": "(0, inf)"})
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
            "help": "metric of the evaluations that has to improve, with /SOURCE behind it if there are several "
            "held-out sources: to fall if it is a loss, a perplexity, alignment or uniformity, and otherwise to rise, "
            "unless --lr_scheduler_kwargs has mode=min or mode=max",
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
        metric = self.lr_scheduler_metric.partition("/")[0]  # behind it is the name of a held-out source
        if on_plateau and "mode" not in settings:
            settings["mode"] = "min" if any(word in metric for word in LOWER_IS_BETTER) else "max"
        try:  # the library knows which values it takes
            trial = torch.optim.SGD([torch.zeros(1)], lr=self.learning_rate)
            scheduler = get_scheduler(kind, trial, 1, MANY, settings)
            for step in (1, 2, MANY // 2, MANY - 1, MANY):  # of the warm-up, after it, and at the end
                for factor in getattr(scheduler, "lr_lambdas", ()):
                    factor(step)
        except (ValueError, TypeError, ArithmeticError) as error:
            raise UserError(f"{option} {' '.join(self.lr_scheduler_kwargs)}: {kind}: {one_line(error)}") from None
        return settings


def make_scheduler(optimizer: torch.optim.Optimizer, arguments: ScheduleArguments, total_steps: int) -> LRScheduler:
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


class Schedule:
    """The schedule of a run.

    Args:
        optimizer: whose learning rates change; its groups keep the proportions of theirs.
        arguments: parsed command-line options.
        total_steps: number of steps of the whole run.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, arguments: ScheduleArguments, total_steps: int) -> None:
        self.optimizer, self.metric = optimizer, arguments.lr_scheduler_metric
        self.scheduler = make_scheduler(optimizer, arguments, total_steps)

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step, of the first group."""
        return self.optimizer.param_groups[0]["lr"]

    def step(self) -> None:
        """Go to the next step."""
        if not isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step()

    def evaluated(self, values: dict[str, float]) -> None:
        """Take note of the metrics of an evaluation; a collective.

        Raises:
            UserError: they have not the one that the schedule waits for.
        """
        if not isinstance(self.scheduler, ReduceLROnPlateau):
            return
        if self.metric not in values:
            raise UserError(f"--lr_scheduler_metric {self.metric}: the evaluations have {', '.join(values)}")
        self.scheduler.step(gather_object([values[self.metric]])[0])  # all processes take that of the first one

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds."""
        return self.scheduler.state_dict()

    def restore(self, stored: dict[str, Any]) -> None:
        """Go on with the schedule of a checkpoint, at the learning rates of the options of now.

        A schedule that is a function of the step alone goes to its step. Loading its state would bring back the
        learning rate of the run that was resumed, whatever the options say. One on a plateau goes on with what it has
        seen, at the same fraction of the initial learning rate.

        Args:
            stored: the `optimizer` and the `scheduler` of a checkpoint, as their `state_dict` returned them.

        Raises:
            UserError: one of the two schedules waits for evaluations, and the other does not.
        """
        state, groups = stored["scheduler"], self.optimizer.param_groups
        if isinstance(self.scheduler, ReduceLROnPlateau) != ("best" in state):
            raise UserError(
                f"--lr_scheduler_type: {PLATEAU} counts evaluations and the others count steps, so that none can go "
                "on with the other; use the one of the checkpoint, or start anew in another --output_dir"
            )
        if isinstance(self.scheduler, ReduceLROnPlateau):
            vars(self.scheduler).update({name: state[name] for name in SEEN_ON_PLATEAU})
            befores = stored["optimizer"]["param_groups"]
            rates = [
                before["lr"] * (group["lr"] / before["initial_lr"])
                for group, before in zip(groups, befores, strict=True)
            ]
        else:
            assert isinstance(self.scheduler, LambdaLR)
            vars(self.scheduler).update({name: state[name] for name in ("last_epoch", "_step_count")})
            at = self.scheduler.last_epoch
            bases = zip(self.scheduler.base_lrs, self.scheduler.lr_lambdas, strict=True)
            rates = [base * factor(at) for base, factor in bases]
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
        self.scheduler._last_lr = rates


def check_metric(arguments: ScheduleArguments, evaluation: Evaluation, eval_steps: int) -> None:
    """Check before the first step that a schedule gets evaluations, and metrics named as their sources require.

    Which metrics there are is known after the first evaluation, where `Schedule.evaluated` checks the name itself.

    Args:
        arguments: parsed command-line options.
        evaluation: of the run.
        eval_steps: steps between two evaluations; 0: there is only one, at the end.

    Raises:
        UserError: there are no evaluations, or their metrics have other names: those of one of several sources end in
            `/source`.
    """
    if arguments.lr_scheduler_type != PLATEAU:
        return
    if not evaluation or not eval_steps:
        raise UserError(
            f"--lr_scheduler_type {PLATEAU}: waits for a metric of evaluations; give --eval_steps and held-out data"
        )
    given = arguments.lr_scheduler_metric
    metric, _, source = given.partition("/")
    if len(evaluation.sources) == 1 and source:
        raise UserError(f"--lr_scheduler_metric {given}: there is one held-out source; write {metric}")
    if len(evaluation.sources) > 1 and source not in evaluation.sources:
        names = " or ".join(f"{metric}/{name}" for name in evaluation.sources)
        raise UserError(f"--lr_scheduler_metric {given}: there are several held-out sources; write {names}")


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
