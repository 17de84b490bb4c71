"""The files of a model, in a local folder or in a snapshot from the Hub."""

import hashlib
import json
import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open

from common.errors import UserError, one_line
from common.files import sha256_file
from common.provenance import computed_by, device_kind
from modeling_longembed.hub_files_longembed import CLIENT_ERROR, find_file

# What a model is loaded from: a dense layer may be a .bin, a vocabulary a .tiktoken.
FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.tiktoken", "*/pytorch_model.bin", "*.py"]
# Files without which sentence-transformers builds another model from the same weights.
SETTINGS = ("modules.json", "config_sentence_transformers.json")

# Documents, and weights for other frameworks: no vector depends on them.
_WITHOUT_INFLUENCE = (".md", ".png", ".jpg", ".svg", ".pdf", ".onnx", ".h5", ".msgpack", ".ot")


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
            snapshot = Path(snapshot_download(name_or_path, allow_patterns=FILES))
            for file in SETTINGS:  # offline, a snapshot may be a part of the repository: what else it has is not known
                if not (snapshot / file).exists():
                    find_file(name_or_path, file, revision=snapshot.name)
        except (OSError, HFValidationError, CLIENT_ERROR) as error:
            reason = re.sub(r"\s+", " ", str(error))[:300]
            raise UserError(
                f"unknown model {name_or_path}: there is no such folder, and the Hub or its cache has none ({reason})"
            ) from None
        return cls(snapshot, name_or_path, snapshot.name)

    @classmethod
    def _local(cls, path: Path) -> "ModelFolder":
        if not (path / "config.json").is_file() or not list(path.glob("*.safetensors")):
            raise UserError(f"the folder {path} is not a model: it needs config.json and *.safetensors weights")
        if broken := [file for file in sorted(path.rglob("*")) if file.is_symlink() and not file.exists()]:
            raise UserError(f"{broken[0]} is a link to a file that is not there; copy the model again")
        digest = hashlib.sha256()
        for file in sorted(path.rglob("*")):
            relative = file.relative_to(path)
            hidden = any(part.startswith(".") for part in relative.parts)
            # All files but those without influence: a dense layer may be a .bin, a vocabulary a .tiktoken.
            ignored = hidden or file.suffix in _WITHOUT_INFLUENCE or "__pycache__" in relative.parts
            if file.is_file() and not ignored:
                digest.update(f"{relative.as_posix()}:{sha256_file(file)}\n".encode())
        return cls(path, f"local/{path.resolve().name}", digest.hexdigest()[:40])

    def computed_by(
        self, *code: str, precision: str = "float32", trust_remote_code: bool = False, device: str | None = None
    ) -> dict[str, str]:
        """Describe what computes with the model, beside its files and settings.

        Args:
            code: names of modules of ours that take part, beside the code of the model.
            precision: `int8` computes on the CPU, whatever there is.
            trust_remote_code: whether the code of the folder may run.
            device: kind of the device; None: the one on which an encoder of this precision is loaded.

        Returns:
            As `common.provenance.computed_by`.

        Raises:
            UserError: the model's code is in another repository, which cannot be read.
        """
        device = device or ("cpu" if precision == "int8" else device_kind())
        return computed_by(*code, *self._code(trust_remote_code), device=device)

    def _code(self, trust_remote_code: bool) -> list[str | Path]:
        """Return what is imported for the model, unless it is a part of a library or, as a file, of the revision."""
        if self.model_type == "longembed":
            # transformers prefers classes that are registered, as ours are, to the code in a folder.
            return ["modeling_longembed"]
        if not trust_remote_code:
            return []
        classes = [self._json("config.json").get("auto_map"), self._json("tokenizer_config.json").get("auto_map")]
        named = re.findall(r"\"([\w.-]+/[\w.-]+)--", json.dumps(classes))  # code that lies in another repository
        files: list[str | Path] = []
        for repository in sorted(set(named)):
            try:
                files += sorted(Path(snapshot_download(repository, allow_patterns=["*.py"])).rglob("*.py"))
            except (OSError, HFValidationError) as error:
                raise UserError(f"{self.name}: its code in {repository} cannot be read: {one_line(error)}") from None
        return files

    @property
    def model_type(self) -> str | None:
        """The `model_type` of config.json, `longembed` for our models."""
        return self._json("config.json").get("model_type")

    @property
    def is_late_interaction(self) -> bool:
        """Whether the folder was saved as a late-interaction model of others, which has no other output.

        By sentence-transformers, PyLate or ColBERT. Models of ours, which bear ColBERT's mark, have one vector too.
        """
        if self.model_type == "longembed":
            return False
        saved_as = self._json("config_sentence_transformers.json").get("model_type")
        architectures = self._json("config.json").get("architectures") or []
        return saved_as in ("MultiVectorEncoder", "ColBERT") or "HF_ColBERT" in architectures

    def _json(self, name: str) -> dict[str, Any]:
        """Return the content of a file; empty if it is missing or malformed, which is reported where it is loaded."""
        try:
            content = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

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
