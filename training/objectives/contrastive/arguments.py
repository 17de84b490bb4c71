"""Command-line options of the contrastive objectives, and which objective takes which option."""

import math
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal

from common.errors import UserError

GROUP_COLUMN = "group"  # of the data, for the debiasing term

# The objectives that take an option. An option that is not listed here is taken by all of them.
TAKEN_BY: dict[str, tuple[str, ...]] = {
    "temperature": ("info_nce", "simcse", "nt_xent", "sup_con", "momentum"),
    "learnable_temperature": ("info_nce", "simcse", "nt_xent", "sup_con", "momentum"),
    "symmetric": ("info_nce", "simcse"),
    "negative_weight": ("info_nce",),
    "guide_model": ("info_nce", "simcse"),
    "false_negative_margin": ("info_nce", "simcse"),
    "false_negative_relative": ("info_nce", "simcse"),
    "head_dims": ("nt_xent", "vicreg"),
    "vicreg_invariance_weight": ("vicreg",),
    "vicreg_variance_weight": ("vicreg",),
    "vicreg_covariance_weight": ("vicreg",),
    "queue_size": ("momentum",),
    "momentum": ("momentum",),
}


@dataclass
class ObjectiveArguments:
    """The training objective and its options; `TAKEN_BY` says which objective takes which.

    Raises:
        UserError: an option is out of range, or is not taken by the objective.
    """

    objective: Literal["info_nce", "simcse", "nt_xent", "sup_con", "vicreg", "momentum"] = field(
        default="info_nce",
        metadata={
            "help": "training objective. info_nce: classify the positive among all documents of the batch; simcse: "
            "the same for two dropout views of one text; nt_xent: classify the other view among all views of the "
            "batch, behind a projection head (SimCLR); sup_con: pull texts with the same label together; vicreg: "
            "make two views agree and keep dimensions varied and uncorrelated, behind an expander; momentum: "
            "classify the positive among a queue of earlier keys (MoCo, Contriever)"
        },
    )
    temperature: float | None = field(
        default=None,
        metadata={
            "help": "similarities are divided by the temperature; default 0.05, for nt_xent 0.1, for sup_con 0.07"
        },
    )
    learnable_temperature: bool = field(
        default=False, metadata={"help": "train the temperature; --temperature is its initial value"}
    )
    symmetric: bool = field(
        default=False, metadata={"help": "also classify the query of each document among all queries of the batch"}
    )
    negative_weight: float = field(
        default=0.0,
        metadata={
            "help": "logarithm of the weight of a row's own hard negatives, added to their scores; 0 is neutral, "
            "--negative_weight=-inf leaves them out",
            "within": "[0, inf)",
        },
    )
    guide_model: str | None = field(
        default=None,
        metadata={
            "help": "folder or Hub id of a model that detects false negatives (GISTEmbed): a document that it scores "
            "higher than the positive is not used as a negative"
        },
    )
    false_negative_margin: float | None = field(
        default=None,
        metadata={
            "help": "a document counts as a false negative if its cosine exceeds the positive's by more than this "
            "margin. Cosines come from --guide_model (default margin 0), or without one from the model in training "
            "(by default no false negatives are detected)"
        },
    )
    false_negative_relative: bool = field(
        default=False,
        metadata={"help": "interpret --false_negative_margin as a fraction of the positive's cosine"},
    )
    head_dims: list[int] = field(
        default_factory=list,
        metadata={
            "help": "layer widths of the projection head of nt_xent (default: the model's width, then 128) or of the "
            "expander of vicreg (default: 8192 8192 8192); 0: no head"
        },
    )
    vicreg_invariance_weight: float = field(
        default=25.0, metadata={"help": "weight of the squared distance between the two views"}
    )
    vicreg_variance_weight: float = field(
        default=25.0, metadata={"help": "weight of the hinge that keeps each dimension's standard deviation above 1"}
    )
    vicreg_covariance_weight: float = field(
        default=1.0, metadata={"help": "weight of the squared covariances between dimensions"}
    )
    queue_size: int = field(default=131072, metadata={"help": "number of keys in the queue of negatives"})
    momentum: float = field(
        default=0.9995, metadata={"help": "share of the momentum encoder's weights that is kept at each update"}
    )
    matryoshka_dims: list[int] = field(
        default_factory=list,
        metadata={
            "help": "embedding sizes to train: the first dimensions of an embedding, such as 384 256 128, become "
            "embeddings of their own"
        },
    )
    matryoshka_weights: list[float] = field(
        default_factory=list, metadata={"help": "loss weights of --matryoshka_dims; default 1 each"}
    )
    spread_out_weight: float = field(
        default=0.0, metadata={"help": "weight of the regulariser that spreads embeddings over the unit sphere"}
    )
    debias_weight: float = field(
        default=0.0,
        metadata={"help": f"weight of the regulariser that hides the column {GROUP_COLUMN!r} from a linear probe"},
    )
    objective_learning_rate: float | None = field(
        default=None,
        metadata={"help": "peak learning rate of the temperature or the projection head; default --learning_rate"},
    )

    def __post_init__(self) -> None:
        check_range(self, "temperature", "queue_size", "objective_learning_rate", positive=True)
        check_range(self, "spread_out_weight", "debias_weight")
        if not 0 <= self.momentum <= 1:
            raise UserError(f"--momentum {self.momentum}: must be from 0 to 1")
        if self.matryoshka_weights and len(self.matryoshka_weights) != len(self.matryoshka_dims):
            raise UserError(
                f"--matryoshka_weights: {len(self.matryoshka_weights)} weights for {len(self.matryoshka_dims)} "
                "--matryoshka_dims; give one each"
            )
        if self.false_negative_relative and self.guide_model is None and self.false_negative_margin is None:
            raise UserError("--false_negative_relative: give --guide_model or --false_negative_margin as well")
        for option in fields(self):
            takers = TAKEN_BY.get(option.name, (self.objective,))
            if self.objective not in takers and getattr(self, option.name) != _default(option):
                raise UserError(
                    f"--{option.name}: --objective {self.objective} does not take it, but {' and '.join(takers)}"
                )


def check_range(arguments: Any, *names: str, positive: bool = False) -> None:
    """Check that options are finite and not negative.

    Args:
        arguments: parsed command-line options.
        *names: names of the options; an option that is None is not checked.
        positive: whether 0 is refused, too.

    Raises:
        UserError: an option is out of range.
    """
    for name in names:
        value = getattr(arguments, name)
        if value is None:
            continue
        if not math.isfinite(value):
            raise UserError(f"--{name} {value}: must be a finite number")
        if value < 0 or (positive and value == 0):
            raise UserError(f"--{name} {value}: must be {'more than' if positive else 'at least'} 0")


def _default(option: Field) -> Any:
    return option.default if option.default_factory is MISSING else option.default_factory()
