"""Checkpoints that are whole or absent, and the choice of the one to resume from."""

import importlib.metadata
import json
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.errors import UserError
from common.files import atomic_folder, sha256_file

COMPLETE = "COMPLETE.json"
WEIGHTS = "model.safetensors"
STATE = "training_state.pt"
PACKAGES = ("torch", "transformers", "accelerate", "peft", "datasets", "numpy", "safetensors")


@dataclass
class Progress:
    """Where a run is.

    Args:
        step: optimiser steps done.
        epoch: epochs of data done, whole.
        offset: batches of the current epoch done.
        world_size: processes.
        data: what a resumed run must agree in: `describe()` of the batches, and settings of the script.
        window: metrics of the steps since the last logged one.
        ended: the script has ended the run here, before the last step that its arguments name.
        bookmark: where the next batch is, of data that is read as it comes.
    """

    step: int
    epoch: int
    offset: int
    world_size: int
    data: dict[str, Any]
    window: list[dict[str, float]] = field(default_factory=list)
    ended: bool = False
    bookmark: dict[str, Any] | None = None


@dataclass
class Checkpoint:
    """A complete checkpoint: `path` and what its COMPLETE.json says."""

    path: Path
    progress: Progress

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The trained parameters and buffers by name, and the rest of the state as `save_checkpoint` got it."""
        state = torch.load(self.path / STATE, map_location="cpu", weights_only=True)
        return load_file(self.path / WEIGHTS), state


def save_checkpoint(
    folder: Path, progress: Progress, tensors: Mapping[str, Tensor], state: dict[str, Any], keep: int | None
) -> None:
    """Write `folder/step-N`, and only when it is whole under its name remove older ones.

    Args:
        folder: where the checkpoints are.
        progress: where the run is.
        tensors: the parameters that train and the buffers, by name.
        state: optimiser, schedule and random states; tensors, numbers and containers of them (no pickled classes).
        keep: how many checkpoints stay; all if None.
    """
    with atomic_folder(folder / f"step-{progress.step}") as temporary:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, temporary / WEIGHTS)
        torch.save(state, temporary / STATE)
        complete = {
            **asdict(progress),
            "sha256": {name: sha256_file(temporary / name) for name in (WEIGHTS, STATE)},
            "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
        }
        # Last: without it the folder is no checkpoint, whatever a copy or a full disk leaves of it.
        (temporary / COMPLETE).write_text(json.dumps(complete, indent=2))
    if keep is not None:
        for path in _step_folders(folder)[keep:]:
            shutil.rmtree(path)


def has_checkpoints(folder: Path) -> bool:
    """Whether an earlier run left checkpoints here, whole or damaged."""
    return bool(_step_folders(folder))


def find_checkpoint(folder: Path, wanted: str) -> Checkpoint | None:
    """The checkpoint to resume from.

    Args:
        folder: where the run's checkpoints are.
        wanted: `last`, or the path of one.

    Returns:
        With `last` the newest whole one; a damaged one is skipped with a sentence on stderr. None if there is none.

    Raises:
        UserError: the one at a path is missing or damaged.
    """
    if wanted != "last":
        return _open(Path(wanted))
    for path in _step_folders(folder):
        try:
            return _open(path)
        except UserError as error:
            print(f"skipped a checkpoint: {error}", file=sys.stderr)
    return None


def _step_folders(folder: Path) -> list[Path]:
    """Newest first."""
    found = [
        (int(match[1]), path) for path in folder.glob("step-*") if (match := re.fullmatch(r"step-(\d+)", path.name))
    ]
    return [path for _, path in sorted(found, reverse=True)]


def _open(path: Path) -> Checkpoint:
    try:
        complete = json.loads((path / COMPLETE).read_text())
        damaged = [name for name, digest in complete.pop("sha256").items() if sha256_file(path / name) != digest]
        complete.pop("versions")
        progress = Progress(**complete)
    except FileNotFoundError as error:
        raise UserError(f"{path}: is no complete checkpoint, {Path(error.filename).name} is missing") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is damaged, {COMPLETE} cannot be read: {error}") from None
    if damaged:
        raise UserError(f"{path}: is damaged, {' and '.join(damaged)} differs from its sha256 in {COMPLETE}")
    return Checkpoint(path, progress)
