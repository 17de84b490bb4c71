"""What a stored result was computed by, which is a part of the key of every cache.

A cache keeps vectors, tokens, scores or measurements from one run to the next, and may return one only if computing it
again would give the same. Its key is therefore all that decides the result: the input by its content, the model by its
files, the settings, and what this module describes: the source code that runs, the versions of the libraries that
compute, and the kind of device.
"""

import hashlib
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

from common.files import sha256_file

# Libraries whose versions change what a model computes; one that is not installed computes nothing.
MODEL_LIBRARIES = ("torch", "transformers", "tokenizers", "sentence-transformers", "peft", "flash-attn")


def computed_by(
    *code: str | Path, libraries: Iterable[str] = MODEL_LIBRARIES, device: str | None = None
) -> dict[str, str]:
    """Describe what computes a result, besides its input, its model and its settings.

    Args:
        code: names of modules or packages whose source code decides the result; or source files.
        libraries: names of the distributions whose versions decide it.
        device: kind of the device, `cpu` or `cuda`; None: it does not matter.

    Returns:
        `code`, a hash of the source code; the version of each library that is installed; and `device`, if it matters.
    """
    versions = {library: found for library in libraries if (found := _version(library)) is not None}
    return {"code": code_hash(*code), **versions, **({} if device is None else {"device": device})}


def code_hash(*code: str | Path) -> str:
    """Return a hash of source code, as 16 hexadecimal digits.

    Args:
        code: names of modules or packages, with all that is in them; or source files.
    """
    digest = hashlib.sha256()
    for part in code:
        if isinstance(part, Path):
            digest.update(f"{part.name}:{sha256_file(part)}\n".encode())
        else:
            digest.update(f"{part}:{_module_hash(part)}\n".encode())
    return digest.hexdigest()[:16]


def content_hashes(files: Iterable[str | Path]) -> tuple[str, ...]:
    """Return the SHA-256 of each file, by which a cache knows data: neither size nor time tells that they are the same.

    A gigabyte takes about a second.
    """
    return tuple(map(sha256_file, files))


def device_kind() -> str:
    """Return the kind of device on which models run if nobody chooses another: that of the accelerator, or `cpu`."""
    device = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if device is None else device.type


@cache  # a process goes on with the code that it has imported, whatever happens to the files
def _module_hash(name: str) -> str:
    spec = find_spec(name)
    if spec is None:
        raise ModuleNotFoundError(f"there is no module {name}")
    if spec.submodule_search_locations is None:
        assert spec.origin is not None
        return sha256_file(spec.origin)
    folders = [Path(folder) for folder in spec.submodule_search_locations]
    files = {path.relative_to(folder).as_posix(): path for folder in folders for path in folder.rglob("*.py")}
    return hashlib.sha256(repr([(name, sha256_file(files[name])) for name in sorted(files)]).encode()).hexdigest()


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None
