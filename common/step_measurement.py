"""Seconds and memory of a call that is repeated, in a process that does nothing else.

- seconds: the median over calls, until `AT_LEAST` seconds have passed; one call if it takes longer.
- base: memory of the process before the first of them.
- peak: most memory of the process from there on. On CUDA both are those of torch's allocator.
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from common.memory import resident_memory

AT_LEAST = 1.0
SHORT = 16  # tokens of the texts that warm up


def measure_calls(call: Callable[[], object], cuda: bool) -> dict:
    """What the top of the file names, and the `pid` of the process; bytes and seconds.

    Args:
        call: what is measured.
        cuda: whether it runs on a GPU.
    """
    base = reset_peak(cuda)
    seconds: list[float] = []
    while sum(seconds) < AT_LEAST:
        synchronize(cuda)
        begin = time.perf_counter()
        call()
        synchronize(cuda)
        seconds.append(time.perf_counter() - begin)
    return {"seconds": statistics.median(seconds), "peak": peak_memory(cuda), "base": base, "pid": os.getpid()}


def measure_step(
    job: dict[str, Any], model: nn.Module, gradient: Callable[[list[list[list[int]]]], float], encoder: nn.Module
) -> dict[str, Any]:
    """A contrastive step on a CPU, for the two processes that eval/throughput.py --training compares.

    Args:
        job: `texts`, a JSON file of two lists of token ids, queries and their documents; and `gradients`, a file for
            the gradients of the first step, after which there is no other, or null: then steps of AdamW are measured.
        model: what trains.
        gradient: adds the gradient of such columns to the parameters, and returns the loss.
        encoder: the part of the model whose gradients are written.

    Returns:
        `loss` alone, or what `measure_calls` returns.
    """
    columns = json.loads(Path(job["texts"]).read_text())
    if job["gradients"]:
        loss = gradient(columns)
        save_file({name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}, job["gradients"])
        return {"loss": loss}
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step(columns: list[list[list[int]]]) -> None:
        gradient(columns)
        optimizer.step()
        optimizer.zero_grad()

    step([[text[:SHORT] for text in column] for column in columns])
    return measure_calls(lambda: step(columns), cuda=False)


def synchronize(cuda: bool) -> None:
    """Waits for the GPU, whose calls return before they are done."""
    if cuda:
        torch.cuda.synchronize()


def reset_peak(cuda: bool) -> int:
    """Memory in bytes at this moment, from which on `peak_memory` counts."""
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with suppress(OSError):  # not Linux: the peak may then be that of loading the model
        Path("/proc/self/clear_refs").write_text("5")
    return resident_memory()


def peak_memory(cuda: bool) -> int:
    """Most memory in bytes since `reset_peak`."""
    return torch.cuda.max_memory_allocated() if cuda else resident_memory("VmHWM")
