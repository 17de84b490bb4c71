"""Two gloo processes on one machine, for tests that compare them with one."""

import gc
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from tests.fresh_processes import fresh_processes

PROCESSES = 2


def in_two_processes(compute: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """What `compute(rank, *arguments)` returns in each of two processes that talk over gloo, in their order.

    Args:
        compute: a function of a module: the processes import it. What it returns is tensors and plain types.
        folder: empty but for what the test has put there.
    """
    method = fresh_processes().get_start_method()
    arguments = (str(folder), compute, arguments)
    torch.multiprocessing.start_processes(_run, args=arguments, nprocs=PROCESSES, start_method=method)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


def _run(rank: int, folder: str, compute: Callable[..., Any], arguments: tuple) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES)}
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(seconds=300),  # a mistake that makes one process wait for the other is to fail
    )
    torch.save(compute(rank, *arguments), f"{folder}/{rank}.pt")
    # DDP goes first: if it held the last reference to the process group, it would wait for gloo's threads with the GIL
    # in its hands, and they, for ever, for the GIL.
    gc.collect()
    dist.destroy_process_group()
