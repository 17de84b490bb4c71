"""What processes give each other: rows, through an all-gather that gradients flow back through, and means."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel


class _GatherWithGradient(torch.autograd.Function):
    """All-gather whose backward is the sum of all processes' gradients with respect to the own rows.

    `torch.distributed.all_gather` cuts the graph: with the loss over local rows the queries' gradient would still be
    right, but the keys would miss what the other processes' queries ask of them.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.count = len(rows)
        gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # gloo has no reduce-scatter; the embeddings of a batch are small, so the sum of all rows is no burden.
        gradient = gradients[0].contiguous().clone()
        dist.all_reduce(gradient)
        start = dist.get_rank() * ctx.count
        return gradient[start : start + ctx.count]


def world_size() -> int:
    """Processes of this run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of all processes, in the order of the processes, differentiable with respect to every process's rows.

    With a loss that is the mean over the *own* rows against gathered columns, the mean of the processes' parameter
    gradients (what DDP computes) is the gradient of the global loss: no factor of the number of processes anywhere.

    Args:
        rows: `(n, ...)`; the same shape on every process, or the collective hangs.

    Returns:
        `(world_size * n, ...)`; `rows` itself in a run of one process.
    """
    return rows if world_size() == 1 else _GatherWithGradient.apply(rows)


def own_rows(count: int) -> slice:
    """Where this process's `count` rows are in the result of `gather_rows`."""
    start = dist.get_rank() * count if world_size() > 1 else 0
    return slice(start, start + count)


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean of a tensor over the processes, without gradient."""
    values = values.detach().clone()
    if world_size() > 1:
        dist.all_reduce(values)
    return values / world_size()


def own_share(count: int) -> range:
    """This process's contiguous share of `count` things; the shares of all processes, in order, are all of them."""
    processes, rank = world_size(), dist.get_rank() if world_size() > 1 else 0
    return range(count * rank // processes, count * (rank + 1) // processes)


def synchronizing(model: nn.Module, synchronize: bool) -> AbstractContextManager[None]:
    """Whether a forward and backward pass inside ends in the reduction of gradients, of DDP or of FSDP."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(synchronize)
    elif isinstance(model, DistributedDataParallel) and not synchronize:
        return model.no_sync()
    return nullcontext()


def passes_together(model: nn.Module, count: int) -> int:
    """Forward passes that this process makes of a batch in `count` chunks.

    Under FSDP, where a forward pass is a collective, as many as the process with the most chunks: the surplus repeats a
    chunk, with a gradient of zero.
    """
    if not isinstance(model, FSDPModule):
        return count
    most = torch.tensor(count, device=next(model.parameters()).device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


def settle(model: nn.Module) -> None:
    """Let DDP do now, on all processes at once, what it does once in the first forward pass after a synchronised step.

    It orders its buckets anew, which is a collective. Processes whose batches have more or fewer chunks come to their
    next forward pass with gradients at another place, before or after the gather of the embeddings, and would wait for
    each other for ever.
    """
    if isinstance(model, DistributedDataParallel):
        model.reducer._rebuild_buckets()


def broadcast(module: nn.Module) -> None:
    """Let every process begin with the parameters and buffers of the first, as DDP does with those of the model."""
    if world_size() > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.detach(), 0)


def average_gradients(module: nn.Module) -> None:
    """The mean over the processes of the gradients of what is in no DDP module, such as an objective's parameters.

    Once a step, on all processes, whose gradients are there or not there alike.
    """
    for parameter in module.parameters():
        if parameter.grad is not None:
            parameter.grad = mean_over_processes(parameter.grad)
