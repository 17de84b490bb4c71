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
        batches: number of batches done, whose gradients may have been accumulated over other numbers of them; None: an
            earlier version has written the checkpoint, which accumulated over one number from the first step on.
        world_size: number of processes.
        settings: `Settings.values` of the run; None: an earlier version has written the checkpoint.
        window: metrics of the steps since the last logged one.
        ended: whether the training ended itself here, before the last step that the options name.
        bookmark: where the next batch begins, if the data is a stream.
    """

    step: int
    batches: int | None
    world_size: int
    settings: dict[str, Any] | None
    window: list[dict[str, float]] = field(default_factory=list)
    ended: bool = False
    bookmark: dict[str, Any] | None = None

    def batches_done(self, accumulation: int) -> int:
        """Return `batches`, or what it was in the run of an earlier version.

        Args:
            accumulation: batches per step, if the checkpoint does not record them.
        """
        if self.batches is not None:
            return self.batches
        return self.step * (self.settings or {}).get("gradient_accumulation_steps", accumulation)


@dataclass
class Checkpoint:
    """A complete checkpoint: its folder, and what its COMPLETE.json says."""

    path: Path
    progress: Progress

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the trained parameters and buffers by name, and the `state` that `save_checkpoint` was given."""
        state = torch.load(self.path / STATE, map_location="cpu", weights_only=True)
        return load_file(self.path / WEIGHTS), state


def save_checkpoint(folder: Path, progress: Progress, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> None:
    """Write the checkpoint `folder/step-N` atomically.

    Args:
        folder: where the checkpoints are.
        progress: where the run is.
        tensors: the parameters that train and the buffers, by name.
        state: state of optimiser, schedule and random generators: tensors, numbers and containers of these, because
            no class is unpickled on loading.
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


def remove_later(folder: Path, step: int) -> None:
    """Remove the checkpoints of later steps, before a run that has come from `step` writes its next one.

    They are damaged, or of a course that the run has not taken. Counted among those to keep they would displace those
    of the run, and one of them would be taken for the last.

    Args:
        folder: where the checkpoints are.
        step: the step of the run's newest checkpoint.
    """
    for number, path in _step_folders(folder).items():
        if number > step:
            shutil.rmtree(path)


def remove_old(folder: Path, step: int, keep: int | None) -> None:
    """Remove the oldest checkpoints, and what is left of one that a killed process was removing.

    Args:
        folder: where the checkpoints are.
        step: the step of the run's newest checkpoint. Later ones, which the run has not read, are not counted.
        keep: number of checkpoints to keep; None: all.
    """
    own = [path for number, path in _step_folders(folder).items() if number <= step]
    for path in own[keep:] if keep is not None else ():
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
    for path in _step_folders(folder).values():
        try:
            return _open(path)
        except UserError as error:
            print(f"skipped a checkpoint: {error}", file=sys.stderr)
    return None


def _step_folders(folder: Path) -> dict[int, Path]:
    """Return the folders of checkpoints by step, the newest first."""
    found = [
        (int(match[1]), path) for path in folder.glob("step-*") if (match := re.fullmatch(r"step-(\d+)", path.name))
    ]
    return dict(sorted(found, reverse=True))


def _open(path: Path) -> Checkpoint:
    try:
        complete = json.loads((path / COMPLETE).read_text())
        damaged = [name for name, digest in complete.pop("sha256").items() if sha256_file(path / name) != digest]
        complete.pop("versions")
        complete.pop("data", None)  # earlier versions: some of the settings, under other names
        complete.setdefault("settings", None)
        for name in ("epoch", "offset"):  # earlier versions: the batches done, by the length of an epoch
            complete.pop(name, None)
        complete.setdefault("batches", None)
        progress = Progress(**complete)
    except FileNotFoundError as error:
        raise UserError(f"{path}: is no complete checkpoint, {Path(error.filename).name} is missing") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is damaged, {COMPLETE} cannot be read: {error}") from None
    if damaged:
        raise UserError(f"{path}: is damaged, {' and '.join(damaged)} differs from its sha256 in {COMPLETE}")
    return Checkpoint(path, progress)
