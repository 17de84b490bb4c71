"""The precision in which a model computes vectors: the values of `--precision`."""

import contextlib
from collections.abc import Sequence

import torch

from common.errors import UserError
from common.provenance import device_kind
from modeling_longembed.encoding_longembed import is_fast_in_bfloat16

PRECISIONS = ("auto", "float32", "bfloat16")
ENCODER_PRECISIONS = (*PRECISIONS, "int8")


def resolve_precision(precision: str, choices: Sequence[str] = PRECISIONS) -> str:
    """Return the precision, with `auto` replaced: bfloat16 where this machine multiplies it in hardware, else float32.

    Args:
        precision: the value of `--precision`.
        choices: the values that the script accepts.

    Raises:
        UserError: `precision` is not among `choices`.
    """
    if precision not in choices:
        raise UserError(f"--precision {precision} is not one of {', '.join(choices)}")
    if precision != "auto":
        return precision
    return "bfloat16" if is_fast_in_bfloat16(torch.device(device_kind())) else "float32"


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Return the context in which models compute: autocast for `bfloat16`, none for any other precision.

    Args:
        device: of the model.
        precision: `float32`, `bfloat16` or `int8`.
    """
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else contextlib.nullcontext()
