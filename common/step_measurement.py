"""Seconds and memory of a call that is repeated, in a process that does nothing else.

- seconds: the median over calls, until `AT_LEAST` seconds have passed; one call if it takes longer.
- base: memory of the process before the first of them.
- peak: most memory of the process from there on. On CUDA both are those of torch's allocator.
"""

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
