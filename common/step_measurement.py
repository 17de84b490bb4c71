"""The time and memory of a call that is repeated, in a process that does nothing else."""

import os
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from common.memory import resident_memory

AT_LEAST = 1.0


def measure_calls(call: Callable[[], object], cuda: bool) -> dict:
    """Measure the time and memory of a call, which is repeated until `AT_LEAST` seconds have passed.

    Args:
        call: the function that is measured.
        cuda: whether it runs on a GPU; memory is then that of torch's allocator, otherwise that of the process.

    Returns:
        `seconds`, the median over the calls; `base`, the bytes in use before the first call; `peak`, the most bytes in
        use from then on; `pid`, the id of this process.
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


def synchronize(cuda: bool) -> None:
    """Wait for the GPU, whose calls return before they are done."""
    if cuda:
        torch.cuda.synchronize()


def reset_peak(cuda: bool) -> int:
    """Start counting for `peak_memory`, and return the memory in use at this moment, in bytes."""
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with suppress(OSError):  # not Linux: the peak may then be that of loading the model
        Path("/proc/self/clear_refs").write_text("5")
    return resident_memory()


def peak_memory(cuda: bool) -> int:
    """Return the most memory in use since `reset_peak`, in bytes."""
    return torch.cuda.max_memory_allocated() if cuda else resident_memory("VmHWM")
