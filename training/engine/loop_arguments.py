"""How long a run is, how it computes, and when it logs, evaluates and saves."""

from dataclasses import dataclass, field
from typing import Literal

from common.conditions import GIVEN, NOT_GIVEN
from common.errors import UserError
from training.engine.optimizer import OptimizerArguments


@dataclass(kw_only=True)
class LoopArguments(OptimizerArguments):
    """How long a run is, how it computes, and when it logs, evaluates and saves.

    Raises:
        UserError: nothing is to be trained.
    """

    output_dir: str = field(
        metadata={"help": "folder for checkpoints/, metrics.jsonl, tensorboard/ and final/", "output": "folder"}
    )
    num_train_epochs: float = field(
        default=1.0, metadata={"help": "passes through the training data", "applies": {"max_steps": NOT_GIVEN}}
    )
    max_steps: int = field(default=-1, metadata={"help": "optimiser steps; overrides --num_train_epochs if positive"})
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "batches per optimiser step", "within": "[1, inf)"}
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "recompute activations in the backward pass: less memory, slower"}
    )
    bf16: bool = field(default=False, metadata={"help": "compute in bfloat16 (weights stay float32)"})
    seed: int = field(default=42, metadata={"help": "random seed", "within": "[0, 4294967295]"})
    dataloader_num_workers: int = field(
        default=1,
        metadata={"help": "processes that tokenize ahead; 0: tokenize in the training process", "within": "[0, inf)"},
    )
    logging_steps: int = field(
        default=10, metadata={"help": "steps between two lines of metrics.jsonl", "within": "[1, inf)"}
    )
    report_to: Literal["tensorboard", "none"] = field(
        default="tensorboard", metadata={"help": "tracker that metrics go to, in addition to metrics.jsonl"}
    )
    eval_steps: int = field(
        default=0,
        metadata={
            "help": "steps between two evaluations; 0: only after the last step",
            "within": "[0, inf)",
            "applies": [{"eval_data": GIVEN}, {"eval_split": GIVEN}],
        },
    )
    save_steps: int = field(
        default=500, metadata={"help": "steps between two checkpoints; the last step makes one", "within": "[1, inf)"}
    )
    save_total_limit: int | None = field(
        default=2, metadata={"help": "number of checkpoints to keep", "within": "[1, inf)"}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "'last' (the newest checkpoint; if there is none, start anew) or the path of a checkpoint"},
    )
    allow_reshard: bool = field(
        default=False,
        metadata={
            "help": "allow a resumed run to have another number of processes",
            "applies": {"resume_from_checkpoint": GIVEN},
        },
    )
    change_settings: list[str] = field(
        default_factory=list,
        metadata={
            "help": "names of options that a resumed run may have other values of, such as learning_rate; the new "
            "values count from the checkpoint on. Without it a resumed run must have all settings that change its "
            "numbers in common with the run that it goes on with",
            "applies": {"resume_from_checkpoint": GIVEN},
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_steps <= 0 and self.num_train_epochs <= 0:
            raise UserError("nothing to train: give --max_steps or --num_train_epochs more than 0")
