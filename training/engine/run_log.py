"""What a run reports: a JSON line for each logged step, the same to the trackers, and no step twice after a kill."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from common.files import atomic_write
from common.memory import resident_memory

METRICS = "metrics.jsonl"


class MetricsLog:
    """`metrics.jsonl` in the output folder, and the tracker of `--report_to` (TensorBoard).

    Args:
        accelerator: of the run; its main process alone writes.
        output_dir: folder of the run.
        step: the step that the run resumes from; lines of later steps, which a killed run left, are removed.
    """

    def __init__(self, accelerator: Accelerator, output_dir: Path, step: int) -> None:
        self.accelerator, self.path = accelerator, output_dir / METRICS
        if not accelerator.is_main_process:
            return
        kept = [line for line in self._lines() if _step(line) in range(step + 1)]
        atomic_write(self.path, "".join(kept))
        # purge_step makes TensorBoard hide what the killed run wrote about later steps.
        accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": step + 1}})

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append the values of one step."""
        if self.accelerator.is_main_process:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
            self.accelerator.log(values, step=step)

    def _lines(self) -> list[str]:
        return self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.exists() else []


class Throughput:
    """Tokens, pairs and whatever else a step counts, per second, since the last reading.

    Args:
        device: whose peak memory is read along with the throughput.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._restart()

    def _restart(self) -> None:
        self.start, self.sums = time.perf_counter(), dict[str, float]()

    def add(self, metrics: dict[str, float]) -> None:
        """Add the counts of a step: its metrics named `*_count`."""
        for name, value in metrics.items():
            if name.endswith("_count"):
                self.sums[name] = self.sums.get(name, 0.0) + value

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of the block, in which nothing trains, out of the throughput."""
        begin = time.perf_counter()
        yield
        self.start += time.perf_counter() - begin

    def read(self) -> dict[str, float]:
        """Return `*s_per_second` and `peak_memory_gib`, and restart."""
        seconds = time.perf_counter() - self.start
        speeds = {f"{name.removesuffix('_count')}s_per_second": value / seconds for name, value in self.sums.items()}
        self._restart()
        return speeds | {"peak_memory_gib": peak_memory_gib(self.device)}


def peak_memory_gib(device: torch.device) -> float:
    """Return the most memory that this process has held, in GiB: of the GPU, or resident memory on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resident_memory("VmHWM") / 2**30


def _step(line: str) -> int:
    """Return the step of a line; -1 for the half line that a kill left."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else -1
    except ValueError:
        return -1
