"""The search for a layout with a supernet: its schedule, what trains in each step, and when it ends.

The schedule is that of Mandava et al. 2020, "Pay Attention when Required" (arXiv:2009.04534), read as follows:

1. For `--weight_steps` steps only the weights train; the architecture (the logits of the mixtures) does not change.
2. Then come cycles of `--cycle_steps` steps (the paper's epochs). In the last `--architecture_share` (20 %) of the
   steps of a cycle only the architecture trains, in the others only the weights. Each has its own learning rate and
   weight decay.
3. At the end of a cycle the likeliest kind of each position is compared with that at the end of the cycle before. If
   fewer than `--changed_share` (75 %) of the positions have changed, the search ends; otherwise it ends with the last
   step of the run. The first comparison is at the end of the second cycle.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common.errors import UserError
from common.files import atomic_write
from training.data.pairs.batches import PairBatch
from training.engine.optimizer import parameter_groups
from training.engine.training import AccumulateGradient
from training.models.supernet import KINDS, Supernet


@dataclass
class SearchArguments:
    """The schedule of the search.

    Raises:
        UserError: a cycle leaves no step to the architecture or to the weights.
    """

    weight_steps: int = field(
        default=1000, metadata={"help": "steps at the start in which only the weights train", "within": "[0, inf)"}
    )
    cycle_steps: int = field(
        default=500,
        metadata={"help": "steps of a cycle: first the weights train, then the architecture", "within": "[1, inf)"},
    )
    architecture_share: float = field(
        default=0.2, metadata={"help": "fraction of the steps of a cycle in which the architecture trains"}
    )
    architecture_learning_rate: float = field(
        default=1e-2,
        metadata={"help": "peak learning rate of the architecture; follows --lr_scheduler_type", "within": "(0, inf)"},
    )
    architecture_weight_decay: float = field(
        default=5e-4, metadata={"help": "weight decay of the architecture", "within": "[0, inf)"}
    )
    gumbel_temperature: float = field(
        default=1.0,
        metadata={
            "help": "temperature of the mixtures; towards 0 each draw is nearly one kind alone",
            "within": "(0, inf)",
        },
    )
    changed_share: float = field(
        default=0.75,
        metadata={
            "help": "the search ends when a cycle changes the kind of fewer than this fraction of the positions; a "
            "smaller value is stricter",
            "within": "[0, inf)",
        },
    )

    def __post_init__(self) -> None:
        if not 0 < self.architecture_steps < self.cycle_steps:
            raise UserError(
                f"--architecture_share {self.architecture_share} of --cycle_steps {self.cycle_steps}: makes "
                f"{self.architecture_steps} steps; leave at least one to the architecture and one to the weights"
            )

    def check_steps(self, steps: int) -> None:
        """Check that a run is long enough for the search.

        Args:
            steps: number of steps of the run.

        Raises:
            UserError: it ends before the first cycle does.
        """
        least = self.weight_steps + self.cycle_steps
        if steps < least:
            raise UserError(
                f"the run has {steps} steps, fewer than --weight_steps {self.weight_steps} and one cycle of "
                f"--cycle_steps {self.cycle_steps}; give --max_steps of at least {least}"
            )

    @property
    def architecture_steps(self) -> int:
        """Number of steps of a cycle in which the architecture trains."""
        return round(self.architecture_share * self.cycle_steps)

    def trains_architecture(self, step: int) -> bool:
        """Return whether step number `step`, counted from 1, trains the architecture and not the weights."""
        place = (step - self.weight_steps - 1) % self.cycle_steps
        return step > self.weight_steps and place >= self.cycle_steps - self.architecture_steps

    def ends_cycle(self, step: int) -> bool:
        """Return whether step number `step` is the last one of a cycle."""
        return step > self.weight_steps and (step - self.weight_steps) % self.cycle_steps == 0


def search_groups(supernet: Supernet, search: SearchArguments, weight_decay: float) -> list[dict[str, Any]]:
    """Return the optimiser's groups: the weights as in every training, and the architecture with its own settings.

    Args:
        supernet: the model.
        search: learning rate and weight decay of the architecture.
        weight_decay: weight decay of the weights.
    """
    architecture = set(supernet.logits())
    groups = parameter_groups(supernet, weight_decay)
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if parameter not in architecture]
    own = {"lr": search.architecture_learning_rate, "weight_decay": search.architecture_weight_decay}
    return [*groups, {"params": supernet.logits(), **own}]


def alternate(
    supernet: Supernet, search: SearchArguments, objective: AccumulateGradient[PairBatch]
) -> AccumulateGradient[PairBatch]:
    """Return an objective that draws the mixtures for each batch, and trains weights or architecture as scheduled.

    Args:
        supernet: the model.
        search: the schedule.
        objective: the objective of the supernet.
    """
    architecture = set(supernet.logits())

    def accumulate_gradient(model: nn.Module, batch: PairBatch, scale: float, synchronize: bool) -> dict[str, Tensor]:
        supernet.draw()
        metrics = objective(model, batch, scale, synchronize)
        if synchronize:  # the last batch of the step
            trains_architecture = search.trains_architecture(int(supernet.step) + 1)
            for parameter in supernet.parameters():
                if (parameter in architecture) != trains_architecture:
                    # None, not zero: AdamW does not touch a parameter without a gradient, but moves one whose gradient
                    # is zero by decay and momentum. requires_grad is no alternative, because DDP reads it only once.
                    parameter.grad = None
        return metrics | {"layout_entropy": torch.special.entr(supernet.probabilities()).sum(dim=1).mean()}

    return accumulate_gradient


def cycle_end(supernet: Supernet, search: SearchArguments, report: bool) -> Callable[[int], bool]:
    """Return a function that counts the steps and ends the search when a cycle changes few positions.

    Args:
        supernet: the model, whose buffers hold the number of steps and the layout of the last cycle.
        search: the schedule.
        report: whether the layout is printed at the end of each cycle.
    """

    def ends_after(step: int) -> bool:
        supernet.step.fill_(step)
        if not search.ends_cycle(step):
            return False
        choice = supernet.probabilities().argmax(dim=1)
        changed = (choice != supernet.choice).double().mean().item()
        supernet.choice.copy_(choice)
        if report:
            layout = "".join(KINDS[kind] for kind in choice.tolist())
            tqdm.write(f"step {step}: {layout}, {changed:.0%} of the positions have changed")
        return changed < search.changed_share

    return ends_after


def write_layout(supernet: Supernet, folder: Path) -> str:
    """Write `layout.json`: fields for a `LongEmbedConfig`, and the probabilities that they were chosen from.

    Args:
        supernet: the model at the end of the search.
        folder: the output folder of the run.

    Returns:
        The `sublayer_pattern` that was found.
    """
    config = supernet.derive().config
    names = ("sublayer_pattern", "attention_patterns", "training_attention_patterns")
    probabilities = [dict(zip(KINDS, row, strict=True)) for row in supernet.probabilities().tolist()]
    search = {"positions": supernet.kinds(), "probabilities": probabilities, "steps": int(supernet.step)}
    layout = {name: getattr(config, name) for name in names} | {"search": search}
    atomic_write(folder / "layout.json", json.dumps(layout, indent=2) + "\n")
    return config.sublayer_pattern
