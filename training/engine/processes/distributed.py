"""Collectives: a differentiable all-gather of rows, means over processes, and what DDP and FSDP need around them."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from common.errors import UserError

T = TypeVar("T")


class _GatherWithGradient(torch.autograd.Function):
    """All-gather whose backward pass sums the gradients of all processes with respect to this process's rows.

    `torch.distributed.all_gather` cuts the graph: with a loss over local rows the gradient of the queries would still
    be right, but that of the keys would lack the part that comes from the other processes' queries.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.count = len(rows)
        gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # gloo has no reduce-scatter; the embeddings of a batch are small, so summing all rows is cheap.
        gradient = gradients[0].contiguous().clone()
        dist.all_reduce(gradient)
        start = dist.get_rank() * ctx.count
        return gradient[start : start + ctx.count]


def world_size() -> int:
    """Return the number of processes of this run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def from_main_process(compute: Callable[[], T]) -> T:
    """Compute a value on the main process alone, and return it on all processes.

    Args:
        compute: called on the main process; its value is pickled for the others, so it should be small.

    Returns:
        The value.

    Raises:
        UserError: the one that `compute` raised, on all processes, of which otherwise the others would wait for ever.
    """
    if world_size() == 1:
        return compute()
    sent: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            sent = [compute()]
        except UserError as error:
            sent = [error]
    dist.broadcast_object_list(sent, src=0)
    if isinstance(sent[0], UserError):
        raise sent[0]
    return sent[0]


def gather_values(value: T) -> list[T]:
    """Return the value of each process, in process order.

    Args:
        value: any object; it is pickled for the other processes.

    Returns:
        As many values as there are processes.
    """
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def gather_rows(rows: Tensor) -> Tensor:
    """Return the rows of all processes in process order, differentiable with respect to the rows of each process.

    With a loss that averages over this process's rows against gathered columns, the mean of the processes' parameter
    gradients (which DDP computes) is the gradient of the global loss, without any factor of the number of processes.

    Args:
        rows: `(n, ...)`; the same shape on every process, otherwise the collective hangs.

    Returns:
        `(world_size * n, ...)`; `rows` itself if there is one process.
    """
    return rows if world_size() == 1 else _GatherWithGradient.apply(rows)


def gather_uneven_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of all processes in process order, differentiable, where each process may have another number.

    Args:
        rows: `(n, ...)`; n may differ between the processes.

    Returns:
        `(sum of n, ...)`, and the number of rows of each process, int64.
    """
    counts = gather_rows(torch.tensor([len(rows)], device=rows.device))
    if len(counts) == 1:
        return rows, counts
    padding = rows.new_zeros(int(counts.max()) - len(rows), *rows.shape[1:])
    padded = gather_rows(torch.cat([rows, padding])).unflatten(0, (len(counts), -1))
    return torch.cat([part[:count] for part, count in zip(padded, counts.tolist(), strict=True)]), counts


def own_rows(count: int) -> slice:
    """Return where the `count` rows of this process are in the result of `gather_rows`."""
    start = dist.get_rank() * count if world_size() > 1 else 0
    return slice(start, start + count)


def mean_over_processes(values: Tensor) -> Tensor:
    """Return the mean of a tensor over the processes, without gradient."""
    values = values.detach().clone()
    if world_size() > 1:
        dist.all_reduce(values)
    return values / world_size()


def own_share(count: int) -> range:
    """Return the contiguous share of this process of `count` items; the shares of all processes make up all items."""
    processes, rank = world_size(), dist.get_rank() if world_size() > 1 else 0
    return range(count * rank // processes, count * (rank + 1) // processes)


def synchronizing(model: nn.Module, synchronize: bool) -> AbstractContextManager[None]:
    """Return a context in which a backward pass reduces the gradients of DDP or FSDP, or does not.

    Args:
        model: as DDP or FSDP wraps it; any other model has nothing to reduce.
        synchronize: whether gradients are reduced.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(synchronize)
    elif isinstance(model, DistributedDataParallel) and not synchronize:
        return model.no_sync()
    return nullcontext()


def passes_together(model: nn.Module, count: int) -> int:
    """Return the number of forward passes that this process has to make for a batch in `count` chunks.

    Under FSDP a forward pass is a collective, so every process makes as many as the one with the most chunks. The
    caller repeats a chunk for the surplus passes, with a gradient of zero.
    """
    if not isinstance(model, FSDPModule):
        return count
    most = torch.tensor(count, device=next(model.parameters()).device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


def settle(model: nn.Module) -> None:
    """Make DDP rebuild its buckets now, on all processes at once, instead of in its next forward pass.

    Rebuilding is a collective, which DDP runs once, in the first forward pass with gradients after a synchronised step.
    For processes with different numbers of chunks that pass comes before or after the gather of the embeddings, so
    they would wait for each other forever.
    """
    if isinstance(model, DistributedDataParallel):
        model.reducer._rebuild_buckets()


def broadcast(module: nn.Module) -> None:
    """Copy parameters and buffers of the first process to all others, as DDP does for the model that it wraps."""
    if world_size() > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.detach(), 0)


def average_gradients(module: nn.Module) -> None:
    """Average gradients over the processes, for parameters outside of DDP such as a learnable temperature.

    Call it once per step on all processes; a parameter must have a gradient on all of them or on none.
    """
    for parameter in module.parameters():
        if parameter.grad is not None:
            parameter.grad = mean_over_processes(parameter.grad)
