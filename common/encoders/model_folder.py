"""The files of a model, in a local folder or in a snapshot from the Hub."""

import hashlib
import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open

from common.errors import UserError
from common.files import sha256_file


@dataclass(frozen=True)
class ModelFolder:
    """The files of a model: a local folder, or the snapshot of a commit on the Hub.

    Attributes:
        path: the folder.
        name: `org/model`, or `local/<folder name>` for a local folder.
        revision: the commit on the Hub, or a hash of all files in the folder that its vectors depend on.
    """

    path: Path
    name: str
    revision: str

    @classmethod
    def find(cls, name_or_path: str) -> "ModelFolder":
        """Return the files of a model, downloaded from the Hub if they are neither a folder nor in the Hub's cache.

        Args:
            name_or_path: a folder, or the id of a model on the Hub.

        Raises:
            UserError: there is no such folder or model, or the folder holds no model.
        """
        path = Path(name_or_path)
        if path.is_dir():
            return cls._local(path)
        try:
            snapshot = Path(
                snapshot_download(name_or_path, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.py"])
            )
        except (OSError, HFValidationError) as error:
            reason = re.sub(r"\s+", " ", str(error))[:120]
            raise UserError(
                f"unknown model {name_or_path}: there is no such folder, and the Hub or its cache has none ({reason})"
            ) from None
        return cls(snapshot, name_or_path, snapshot.name)

    @classmethod
    def _local(cls, path: Path) -> "ModelFolder":
        if not (path / "config.json").is_file() or not list(path.glob("*.safetensors")):
            raise UserError(f"the folder {path} is not a model: it needs config.json and *.safetensors weights")
        digest = hashlib.sha256()
        for file in sorted(path.rglob("*")):
            relative = file.relative_to(path)
            hidden = any(part.startswith(".") for part in relative.parts)
            if file.suffix in (".safetensors", ".json", ".txt", ".model", ".py") and not hidden:
                digest.update(f"{relative.as_posix()}:{sha256_file(file)}\n".encode())
        return cls(path, f"local/{path.resolve().name}", digest.hexdigest()[:40])

    @cached_property
    def parameters(self) -> int:
        """The number of parameters in the weight files, read from their headers.

        Raises:
            UserError: a file is not a valid safetensors file.
        """
        total = 0
        for file in self.path.glob("*.safetensors"):
            try:
                with safe_open(file, framework="numpy") as weights:
                    total += sum(math.prod(weights.get_slice(key).get_shape()) for key in weights.keys())  # noqa: SIM118
            except SafetensorError as error:
                raise UserError(f"{file} is damaged: {error}; copy or download it again") from None
        return total
