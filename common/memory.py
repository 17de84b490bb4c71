"""Memory of this process and of the machine, in bytes."""

import os
import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # version 2, version 1


def resident_memory(name: str = "VmRSS") -> int:
    """Resident bytes of this process: `VmRSS` at this moment, `VmHWM` at most.

    `getrusage(...).ru_maxrss` would not do on Linux: a process inherits it from the one that started it, however small
    it is itself.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def machine_memory() -> int:
    """Bytes that the machine has, or less if the control group of this process (a container) may use less."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in CGROUP_LIMITS:
        with suppress(OSError, ValueError):  # absent, or "max"
            limits.append(int(Path(path).read_text()))
    return min(limits)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch says, on a GPU or on the CPU, that memory did not suffice."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
