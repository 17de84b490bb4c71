"""Losses that are means over the tokens of a batch, for batches that are read chunk by chunk: gradient and evaluation.

A model under such a loss returns sums from its forward pass. They are divided here by counts over the whole batch of
all processes, so neither the packing into chunks nor the number of processes changes the loss.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from training.engine.chunks import parts_of_batch
from training.engine.processes.distributed import (
    mean_over_processes,
    own_share,
    passes_together,
    synchronizing,
    world_size,
)
from training.objectives.contrastive.blocks import Metrics
from training.objectives.span_penalty import Penalty

Chunk = TypeVar("Chunk")
TEXTS_AT_ONCE = 64  # of an evaluation: the token ids of more texts are not held


class LossModule(nn.Module):
    """A model in a module whose forward pass returns sums of losses.

    Args:
        model: the model in training, maybe wrapped for LoRA.
    """

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        super().__init__()
        self.model = model

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the model, such as its switch for gradient checkpointing."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)


def weighted_sum(parts: Metrics, weights: Mapping[str, float]) -> Tensor:
    """Add up the losses among `parts`, whose names end in `_loss`; a loss without a weight has weight 1."""
    losses = (weights.get(name, 1.0) * value for name, value in parts.items() if name.endswith("_loss"))
    return sum(losses, torch.tensor(0.0))


def backward_over_chunks(
    model: nn.Module,
    chunks: Sequence[Chunk],
    parts_of: Callable[[Chunk], Metrics],
    weights: Mapping[str, float],
    *,
    scale: float,
    synchronize: bool,
    penalty: Penalty | None = None,
) -> Metrics:
    """Run a forward and a backward pass for each chunk of a batch.

    Args:
        model: the model in training, wrapped by DDP or FSDP in a distributed run.
        chunks: the packed chunks of this process.
        parts_of: the losses and metrics of a chunk, as shares of their means over the batch.
        weights: weights of the losses by name; 1 where there is none.
        scale: factor of the loss, for gradient accumulation.
        synchronize: whether the last pass reduces gradients over the processes.
        penalty: a term of the loss that depends on parameters only; it is added once.

    Returns:
        The detached means over the batch, and `loss`, their weighted sum.

    Raises:
        UserError: the batch has several chunks, and texts see each other in training.
    """
    metrics: Metrics = {}
    passes = passes_together(model, len(chunks))
    with parts_of_batch(model, len(chunks)):
        for number in range(passes):
            last = number == passes - 1
            with synchronizing(model, synchronize and last):
                parts = parts_of(chunks[min(number, len(chunks) - 1)])
                if number >= len(chunks):  # the last chunk again, so that all processes make the same number of passes
                    parts = {name: value * 0.0 for name, value in parts.items()}
                loss = weighted_sum(parts, weights)
                metrics = add_detached(metrics, parts | {"loss": loss})
                if last and penalty is not None:
                    term, measures = penalty()
                    loss, metrics = loss + term, metrics | measures
                (loss * scale).backward()
    return metrics


def sums_over_processes(
    texts: int, sums_of: Callable[[range], Metrics], names: Iterable[str], device: torch.device
) -> Metrics:
    """Add up sums over the texts of an evaluation, which the processes share.

    Args:
        texts: number of texts of all processes together.
        sums_of: the sums over the texts of some numbers; at least those of `names`.
        names: the sums that are needed; a process without any text counts 0 for them.
        device: device of the collective operation.

    Returns:
        By name the sum divided by the number of processes, float64 on the CPU. The division cancels in the quotient of
        two sums.
    """
    own, totals = own_share(texts), {name: torch.zeros((), dtype=torch.float64) for name in names}
    for start in tqdm(range(own.start, own.stop, TEXTS_AT_ONCE), desc="evaluating", disable=own.start > 0, leave=False):
        found = sums_of(range(start, min(start + TEXTS_AT_ONCE, own.stop)))
        totals = {name: total + found[name] for name, total in totals.items()}
    means = mean_over_processes(torch.stack(list(totals.values())).to(device)).cpu()
    return dict(zip(totals, means, strict=True))


def denominator(mean_count: Tensor) -> Tensor:
    """Bound a count that was averaged over processes from below by one on one process: a mean over nothing is 0."""
    return mean_count.clamp(min=1 / world_size())


def add_detached(sums: Metrics, more: Metrics) -> Metrics:
    """Add `more` to `sums`, without graph; the result has the names of `more`."""
    return {name: sums.get(name, 0) + value.detach() for name, value in more.items()}
