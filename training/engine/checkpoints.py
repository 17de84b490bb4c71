"""Checkpoints: written atomically, verified when they are opened, and chosen for a resumed run."""

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

    Attributes:
        step: number of optimiser steps done.
        epoch: number of whole epochs done.
        offset: number of batches of the current epoch done.
        world_size: number of processes.
        settings: `Settings.values` of the run; None: an earlier version has written the checkpoint.
        window: metrics of the steps since the last logged one.
        ended: whether the training ended itself here, before the last step that the options name.
        bookmark: where the next batch begins, if the data is a stream.
    """

    step: int
    epoch: int
    offset: int
    world_size: int
    settings: dict[str, Any] | None
    window: list[dict[str, float]] = field(default_factory=list)
    ended: bool = False
    bookmark: dict[str, Any] | None = None


@dataclass
class Checkpoint:
    """A complete checkpoint: its folder, and what its COMPLETE.json says."""

    path: Path
    progress: Progress

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the trained parameters and buffers by name, and the `state` that `save_checkpoint` was given."""
        state = torch.load(self.path / STATE, map_location="cpu", weights_only=True)
        return load_file(self.path / WEIGHTS), state


def save_checkpoint(
    folder: Path, progress: Progress, tensors: Mapping[str, Tensor], state: dict[str, Any], keep: int | None
) -> None:
    """Write the checkpoint `folder/step-N` atomically, and then remove the oldest ones.

    Args:
        folder: where the checkpoints are.
        progress: where the run is.
        tensors: the parameters that train and the buffers, by name.
        state: state of optimiser, schedule and random generators: tensors, numbers and containers of these, because
            no class is unpickled on loading.
        keep: number of checkpoints to keep; None: all.
    """
    with atomic_folder(folder / f"step-{progress.step}") as temporary:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, temporary / WEIGHTS)
        with open(temporary / STATE, "wb") as file:  # by name, torch would not say why it cannot be written
            torch.save(state, file)
        complete = {
            **asdict(progress),
            "sha256": {name: sha256_file(temporary / name) for name in (WEIGHTS, STATE)},
            "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
        }
        # Written last: a folder without it, such as a half-made copy, is not taken for a checkpoint.
        (temporary / COMPLETE).write_text(json.dumps(complete, indent=2))
    remove_old(folder, keep)


def remove_old(folder: Path, keep: int | None) -> None:
    """Remove the oldest checkpoints, and what is left of one that a killed process was removing.

    Args:
        folder: where the checkpoints are.
        keep: number of checkpoints to keep; None: all.
    """
    if keep is not None:
        for path in _step_folders(folder)[keep:]:
            shutil.rmtree(path)


def has_checkpoints(folder: Path) -> bool:
    """Return whether a folder has checkpoints of an earlier run, complete or damaged."""
    return bool(_step_folders(folder))


def find_checkpoint(folder: Path, choice: str) -> Checkpoint | None:
    """Return the checkpoint to resume from.

    Args:
        folder: where the run's checkpoints are.
        choice: `last`, or the path of a checkpoint.

    Returns:
        With `last` the newest complete one, after a warning on stderr for each damaged one; None if there is none.

    Raises:
        UserError: the checkpoint at the path is missing or damaged.
    """
    if choice != "last":
        return _open(Path(choice))
    for path in _step_folders(folder):
        try:
            return _open(path)
        except UserError as error:
            print(f"skipped a checkpoint: {error}", file=sys.stderr)
    return None


def _step_folders(folder: Path) -> list[Path]:
    """Return the folders of checkpoints, the newest first."""
    found = [
        (int(match[1]), path) for path in folder.glob("step-*") if (match := re.fullmatch(r"step-(\d+)", path.name))
    ]
    return [path for _, path in sorted(found, reverse=True)]


def _open(path: Path) -> Checkpoint:
    try:
        complete = json.loads((path / COMPLETE).read_text())
        damaged = [name for name, digest in complete.pop("sha256").items() if sha256_file(path / name) != digest]
        complete.pop("versions")
        complete.pop("data", None)  # earlier versions: some of the settings, under other names
        complete.setdefault("settings", None)
        progress = Progress(**complete)
    except FileNotFoundError as error:
        raise UserError(f"{path}: is no complete checkpoint, {Path(error.filename).name} is missing") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is damaged, {COMPLETE} cannot be read: {error}") from None
    if damaged:
        raise UserError(f"{path}: is damaged, {' and '.join(damaged)} differs from its sha256 in {COMPLETE}")
    return Checkpoint(path, progress)
