"""A function in a process of its own that starts in a moment: forked off one that has imported the libraries."""

import contextlib
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tqdm


@dataclass(frozen=True)
class Ended:
    """How the process of a function ended.

    Attributes:
        code: its exit code, or minus the number of the signal that ended it.
        stderr: what it wrote there.
        killed: whether it was killed because its time was up.
        seconds: how long it ran.
    """

    code: int
    stderr: str
    killed: bool
    seconds: float


def run_forked(work: Callable[[], None], seconds: float, log: Path, memory: int | None = None) -> Ended:
    """Run a function in a forked process, and kill it with all its children if its time is up.

    The process leads a process group of its own. Nothing of what it leaves running outlives this call.

    Args:
        work: the function; `SystemExit` is its exit code, and any other exception a traceback and exit code 1.
        seconds: the time after which it is killed with SIGKILL.
        log: the file for its output; stderr goes to the file with the suffix `.err`.
        memory: bytes of address space that it may take beside what this process has; None: no limit.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    for file in (log, log.with_suffix(".err")):
        file.write_bytes(b"")  # here, because the process may be killed before it opens them
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        _be_child(work, log, memory)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.setpgid(child, child)  # in both processes, so that the group is there whichever runs first
    killed = False
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if not killed and time.monotonic() - start >= seconds:
            os.killpg(child, signal.SIGKILL)
            killed = True
        time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(status)
    errors = log.with_suffix(".err").read_text(encoding="utf-8", errors="replace")
    return Ended(code, errors, killed and code == -signal.SIGKILL, time.monotonic() - start)


def _be_child(work: Callable[[], None], log: Path, memory: int | None) -> None:
    code = 1
    try:
        for name, descriptors in ((log, (1,)), (log.with_suffix(".err"), (2,))):
            file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for descriptor in descriptors:
                os.dup2(file, descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        # pytest has put its own objects in their places.
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1, errors="backslashreplace")
        # tqdm's own lock is shared with forked processes: one that is killed while it holds it would stop all others.
        tqdm.tqdm.set_lock(threading.RLock())
        if memory is not None:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + memory
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        try:
            work()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)  # without what the parent registered to be done at its end
