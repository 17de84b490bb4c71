"""What a run reports: one JSON line a logged step, the same to the trackers, no step twice after a kill."""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from common.files import atomic_write
from common.memory import resident_memory


class MetricsLog:
    """`metrics.jsonl` in the output folder, and the trackers of `--report_to` (TensorBoard)."""

    def __init__(self, accelerator: Accelerator, output_dir: Path, step: int) -> None:
        """Args:
        step: the step that the run goes on from; later ones, of a run that was killed, are forgotten.
        """
        self.accelerator, self.path = accelerator, output_dir / "metrics.jsonl"
        if not accelerator.is_main_process:
            return
        kept = [line for line in self._lines() if _step(line) in range(step + 1)]
        atomic_write(self.path, "".join(kept))
        # purge_step: TensorBoard then hides what the killed run had written of later steps.
        accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": step + 1}})

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Report the values of one step."""
        if self.accelerator.is_main_process:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
            self.accelerator.log(values, step=step)

    def _lines(self) -> list[str]:
        return self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.exists() else []


def peak_memory_gib(device: torch.device) -> float:
    """The most memory that this process has held: of the GPU on a GPU, resident memory otherwise. GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resident_memory("VmHWM") / 2**30


def _step(line: str) -> int:
    """The step of a line; -1 for the half line that a kill left."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else -1
    except ValueError:
        return -1
