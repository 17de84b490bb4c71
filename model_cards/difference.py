"""The weights of a trained model as a difference from the model that it was trained from, a byte a number.

A trained matrix is `base + step * whole`: `whole` holds integers from -127 to 127, and each row has a `step`. A row is
thereby off by at most half a step, which is 1/254 of the row's largest change. Vectors, and tensors that the base does
not have in the same shape, are kept as they are; what training did not change is left out.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from common.errors import UserError, reading
from common.files import atomic_file

STEP = ":step"  # what is added to the name of a tensor of integers for that of its rows' steps
LEVELS = 127
MOST_BYTES = 30_000_000  # of a file: all that a repository with git should keep


def difference(trained: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what has to be kept of a model beside its base.

    Args:
        trained: weights by name, in float32.
        base: weights of the model that it was trained from; those that the trained model lacks are not used.

    Returns:
        For a matrix that was changed, its integers and, under the name with `:step`, the step of each row; for other
        tensors that were changed or are new, the tensor.
    """
    kept = {}
    for name, tensor in trained.items():
        start = base.get(name)
        if start is not None and torch.equal(tensor, start):
            continue
        if start is None or start.shape != tensor.shape or tensor.dim() != 2:
            kept[name] = tensor.contiguous()
            continue
        change = tensor - start
        step = change.abs().amax(1) / LEVELS
        kept[name] = (change / step.clamp(min=torch.finfo(step.dtype).tiny)[:, None]).round().to(torch.int8)
        kept[name + STEP] = step
    return kept


def applied(kept: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the model that a difference describes; on every machine the same bits.

    Args:
        kept: what `difference` returned.
        base: weights of the model that the difference was made to.

    Returns:
        The weights by name, among them those of the base that the difference does not mention.
    """
    weights = dict(base)
    for name, tensor in kept.items():
        if name + STEP in kept:
            # A product and a sum, each rounded: an instruction that does both at once would give other bits.
            change = tensor.to(torch.float32) * kept[name + STEP][:, None]
            weights[name] = base[name] + change
        elif not name.endswith(STEP):
            weights[name] = tensor
    return weights


def write_difference(path: Path, kept: dict[str, Tensor], base_sha256: str) -> None:
    """Write a difference as safetensors.

    Args:
        path: the file.
        kept: what `difference` returned.
        base_sha256: of the file with the weights of the base.

    Raises:
        UserError: the file would be larger than `MOST_BYTES`.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in kept.values())
    if size > MOST_BYTES:
        raise UserError(
            f"{path}: the difference takes {size / 1e6:.1f} MB, more than {MOST_BYTES / 1e6:.0f}; train fewer weights, "
            "or a smaller model"
        )
    with atomic_file(path) as temporary:
        save_file(kept, temporary, metadata={"base_sha256": base_sha256})


def read_difference(path: Path) -> tuple[dict[str, Tensor], str]:
    """Read what `write_difference` wrote.

    Args:
        path: the file.

    Returns:
        The tensors, and the SHA-256 of the weights of the base.

    Raises:
        UserError: the file is missing or damaged.
    """
    with (
        reading(f"{path} is no difference of weights; take it from the repository again"),
        safe_open(path, "pt") as file,
    ):
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()["base_sha256"]  # noqa: SIM118
