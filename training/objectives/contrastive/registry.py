"""The registry of contrastive objectives, and what scripts build with it."""

from typing import Any

from torch import nn

from common.errors import UserError
from training.data.sources import Columns
from training.engine.optimizer import parameter_groups
from training.objectives.contrastive.arguments import GROUP_COLUMN, ObjectiveArguments
from training.objectives.contrastive.info_nce import InfoNCE, SimCSE
from training.objectives.contrastive.momentum import MomentumContrast
from training.objectives.contrastive.objective import Objective
from training.objectives.contrastive.sup_con import SupCon
from training.objectives.contrastive.views import NTXent, VICReg

OBJECTIVES: dict[str, type[Objective]] = {
    "info_nce": InfoNCE,
    "simcse": SimCSE,
    "nt_xent": NTXent,
    "sup_con": SupCon,
    "vicreg": VICReg,
    "momentum": MomentumContrast,
}


def objective_columns(arguments: ObjectiveArguments) -> Columns:
    """Return the columns of the data that an objective reads, those of its auxiliary terms included."""
    columns = OBJECTIVES[arguments.objective].columns
    classes = (*columns.classes, GROUP_COLUMN) if arguments.debias_weight else columns.classes
    return Columns(columns.required, columns.prefix, columns.rows, classes)


def build_objective(arguments: ObjectiveArguments, encoder: nn.Module, rows: int) -> Objective:
    """Build the objective of `--objective`.

    Args:
        arguments: parsed command-line options.
        encoder: the encoder; its trainable parameters have been selected already.
        rows: number of rows of a batch, over all processes.

    Returns:
        The objective, in training mode.

    Raises:
        UserError: the objective cannot train this encoder, or has too few rows to compare.
    """
    objective = OBJECTIVES[arguments.objective](arguments, encoder)
    if rows < objective.smallest_batch:
        raise UserError(
            f"--objective {arguments.objective}: compares the rows of a batch, which has {rows}; give a larger "
            "--per_device_train_batch_size"
        )
    return objective


def objective_groups(objective: Objective, weight_decay: float) -> list[dict[str, Any]]:
    """Return the optimiser's parameter groups of an objective, with `--objective_learning_rate` if that is given."""
    groups = parameter_groups(objective, weight_decay)
    learning_rate = objective.arguments.objective_learning_rate
    return groups if learning_rate is None else [group | {"lr": learning_rate} for group in groups]
