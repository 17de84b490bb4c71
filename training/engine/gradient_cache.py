"""Gradient caching: the exact gradient of a large contrastive batch in the memory of a small one."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from training.engine.chunks import parts_of_batch
from training.engine.processes.distributed import passes_together, synchronizing

Chunk = TypeVar("Chunk")
Metrics = dict[str, Tensor]


class RandomState:
    """The state of the random number generators that dropout draws from, captured to be replayed.

    Args:
        device: whose generator is captured beside that of the CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.devices = [device] if device.type == "cuda" else []
        self.cpu_state = torch.get_rng_state()
        self.device_states = [torch.cuda.get_rng_state(device) for device in self.devices]

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Repeat the random numbers from this state inside the block, and leave the generators unchanged after it."""
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self.cpu_state)
            for device, state in zip(self.devices, self.device_states, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield


def cached_backward(
    model: nn.Module,
    chunks: Sequence[Chunk],
    embed: Callable[[Chunk], Tensor | tuple[Tensor, ...]],
    loss: Callable[..., tuple[Tensor, Metrics]],
    *,
    synchronize: bool = True,
) -> Metrics:
    """Accumulate the exact gradient of `loss(embeddings of all chunks)` with the activations of one chunk in memory.

    Gao et al. 2021 (arXiv:2101.06983), section 3: (1) embed every chunk without a graph; (2) compute the loss of the
    detached embeddings, in float32 whatever the model computes in, and its gradient with respect to them; (3) embed
    every chunk again with the same random numbers and continue the backward pass from the cached gradient. It costs a
    second forward pass; a batch of one chunk is computed directly.

    The result is exact because texts do not see each other: a model in which they do is refused, and the random draws
    that all texts of a batch share are made once (see `parts_of_batch`).

    Args:
        model: the module that `embed` calls. The gradients of a DDP or FSDP module are reduced once, in the last chunk.
        chunks: the parts of the batch.
        embed: maps a chunk to its embeddings `(n_i, d)`, or to several tensors of rows, such as one vector a text, one
            vector a token, and how many tokens each text has.
        loss: maps the rows of all chunks, `(sum n_i, d)`, an argument for each tensor of `embed`, to a scalar and
            detached metrics. It may gather over processes; its own parameters receive their gradient in step 2.
        synchronize: whether gradients are reduced over the processes at all; False while they are accumulated.

    Returns:
        The metrics of `loss`.

    Raises:
        UserError: the batch has several chunks, and texts see each other in training.
    """
    with parts_of_batch(model, len(chunks)):
        passes = passes_together(model, len(chunks))
        if passes == 1:
            with synchronizing(model, synchronize):
                value, metrics = loss(*map(_in_full_precision, _tensors(embed(chunks[0]))))
                value.backward()
            return metrics

        device = next(model.parameters()).device
        padded = [*chunks, *[chunks[-1]] * (passes - len(chunks))]
        states, outputs = [], []
        with torch.no_grad():
            for chunk in padded:
                states.append(RandomState(device))
                outputs.append(_tensors(embed(chunk)))

        cached = [_in_full_precision(torch.cat(parts)) for parts in zip(*outputs, strict=True)]
        for rows in cached:
            rows.requires_grad_(rows.is_floating_point())
        counts = [[len(part) for part in parts] for parts in zip(*outputs, strict=True)]
        own = [rows[: sum(count[: len(chunks)])] for rows, count in zip(cached, counts, strict=True)]
        value, metrics = loss(*own)
        value.backward()  # not autograd.grad: parameters of the loss, such as a temperature, get their gradient here
        gradients: list[Any] = [
            [None] * passes if rows.grad is None else rows.grad.split(count)
            for rows, count in zip(cached, counts, strict=True)
        ]

        for index, (chunk, state) in enumerate(zip(padded, states, strict=True)):
            last = index == passes - 1
            with state.replay(), synchronizing(model, synchronize and last):
                rows_and_gradients = [
                    (rows, gradient[index].to(rows.dtype))
                    for rows, gradient in zip(_tensors(embed(chunk)), gradients, strict=True)
                    if gradient[index] is not None
                ]
                tensors, theirs = zip(*rows_and_gradients, strict=True)
                torch.autograd.backward(tensors, theirs)
        return metrics


def _tensors(embedded: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return embedded if isinstance(embedded, tuple) else (embedded,)


def _in_full_precision(rows: Tensor) -> Tensor:
    """Return numbers in float32 or better, which exponentials of similarities at a low temperature need."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32)) if rows.is_floating_point() else rows
