"""Memory of this process and of this machine, in bytes."""

import os
import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # version 2, version 1


def resident_memory(name: str = "VmRSS", process: int | str = "self") -> int:
    """Return the resident memory of a process in bytes.

    On Linux `getrusage(...).ru_maxrss` is of no use: a process inherits it from the process that started it.

    Args:
        name: `VmRSS` for the memory at this moment, `VmHWM` for the peak.
        process: its number; other processes than this one on Linux alone.
    """
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:  # not Linux
        if process != "self":
            raise
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def machine_memory() -> int:
    """Return the memory of the machine, or the limit of this process's control group (container) if that is less."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in CGROUP_LIMITS:
        with suppress(OSError, ValueError):  # absent, or "max"
            limits.append(int(Path(path).read_text()))
    return min(limits)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception of torch means that a GPU or the CPU ran out of memory."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
