"""Trainings in float64, for tests that compare runs after several steps, which amplify rounding errors of float32."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import PreTrainedModel


def _match_weights(module: nn.Module, inputs: tuple) -> tuple | None:
    """Give a projection its input in the type of its weights: a teacher's vectors are stored in float32."""
    if not isinstance(module, nn.Linear):
        return None
    return tuple(x.to(module.weight.dtype) if isinstance(x, Tensor) else x for x in inputs)


@contextmanager
def double_precision() -> Iterator[None]:
    """Make float64 the type of every weight in this process, whether it is read from a file or new."""
    load, default = PreTrainedModel.__dict__["from_pretrained"], torch.get_default_dtype()

    def from_pretrained(cls, *arguments, **options):
        return load.__func__(cls, *arguments, **options | {"dtype": torch.float64})

    PreTrainedModel.from_pretrained = classmethod(from_pretrained)
    torch.set_default_dtype(torch.float64)
    hook = register_module_forward_pre_hook(_match_weights)
    try:
        yield
    finally:
        hook.remove()
        torch.set_default_dtype(default)
        PreTrainedModel.from_pretrained = load
