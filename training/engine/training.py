"""What a training is, as a script builds it and the loop trains it: a model, batches and the gradient of a loss."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from training.engine.held_out import NO_EVALUATION, Evaluation


class PackedTokens(Protocol):
    """Texts that are computed at once, their tokens in one row."""

    @property
    def input_ids(self) -> Tensor:
        """`(1, T)`."""

    @property
    def max_length_q(self) -> int:
        """Tokens of the longest text."""


class Batch(Protocol):
    """What one process computes between two optimiser steps, or between two accumulations."""

    def to(self, device: torch.device) -> Any:
        """Return the batch on a device."""

    def largest_chunk(self) -> PackedTokens:
        """Return the texts of the chunk that takes the most memory."""


AnyBatch = TypeVar("AnyBatch", bound=Batch)
Batched = TypeVar("Batched", bound=Batch, covariant=True)


class Batches(Protocol[Batched]):
    """The batches of an endless run by their number; each is a pure function of it.

    Attributes:
        batch_tokens: the most tokens whose activations are held at once.
    """

    batch_tokens: int

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""

    def __getitem__(self, index: int) -> Batched:
        """Return batch number `index`, counted from 0."""

    def describe(self) -> dict[str, Any]:
        """Return what options of the data stand for, by option: values of JSON types, whatever the processes."""

    def heaviest(self) -> Batched:
        """Return a batch that takes as much memory as any that the data can make."""


@runtime_checkable
class Stream(Protocol):
    """Batches of data that is read once, front to back, such as a stream from the Hub."""

    def go_to(self, bookmark: dict[str, Any]) -> None:
        """Continue at the place that the `bookmark` of the last batch names."""


# Adds the gradient of one batch to the parameters, and returns metrics of this process: scalars without gradient, of
# which those named `*_count` are summed over processes and batches, and all others averaged. The arguments are the
# model, the batch, a factor of the loss, and whether gradients are reduced over the processes after this batch.
AccumulateGradient = Callable[[nn.Module, AnyBatch, float, bool], dict[str, Tensor]]
AnyModel = TypeVar("AnyModel", bound=nn.Module)


@dataclass(kw_only=True)
class Training(Generic[AnyModel, AnyBatch]):
    """All that a training is, as a script builds it.

    Attributes:
        model: what trains is what requires a gradient. A checkpoint holds that, and the model's buffers.
        batches: the data.
        gradient: the objective: adds the gradient of one batch to the parameters.
        evaluate: returns metrics of the model on held-out data.
        groups: parameter groups of the optimiser, the first at `--learning_rate`; None: `parameter_groups(model)`.
        auxiliary: a module that trains, or remembers, beside the model, such as a learnable temperature or a queue. It
            is part of the optimiser's groups and of checkpoints, but not of the final model.
        options: the parsed dataclasses of the script, all of them, which checkpoints record.
        settings: what an option that names a model or data stands for, by option, beside what the batches describe:
            values of JSON types, which a resumed run must have in common with this one. Those of the main process
            count; the others leave out what takes time.
        ends_after: called with the number of each step after it, on all processes; True ends the run. What it has to
            remember of earlier steps belongs into buffers of the model, which checkpoints hold.
        export: returns what is saved of the trained model, such as the encoder without its heads; None: the model.
        tuning: the `--tuning` that chose the parameters, if the script has the option.
        length_option: name of the option that says where texts are truncated, for the answer to memory that runs out.
    """

    model: AnyModel
    batches: Batches[AnyBatch]
    gradient: AccumulateGradient[AnyBatch]
    evaluate: Evaluation = NO_EVALUATION
    groups: list[dict[str, Any]] | None = None
    auxiliary: nn.Module = field(default_factory=nn.Module)
    options: Sequence[Any] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    ends_after: Callable[[int], bool] | None = None
    export: Callable[[AnyModel], PreTrainedModel | PeftModel] | None = None
    tuning: str | None = None
    length_option: str = "max_length"
