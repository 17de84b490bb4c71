"""The precision in which a model computes vectors: the values of `--precision`."""

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
