"""Quantization of weights to 8 bits, for models that serve on a CPU."""

import warnings
from typing import Any

import torch
from torch import nn

from common.errors import UserError


def int8_weights(model: nn.Module) -> nn.Module:
    """Quantize the weights of all linear layers to 8 bits, in place, with torch's dynamic quantization.

    A weight is a whole number from -128 to 127 times a scale of its row. The inputs of a layer are quantized as they
    come, with one scale for the batch. Embeddings and norms keep their precision. The result runs on CPUs only and
    cannot be saved: a model is quantized each time it is loaded.

    Args:
        model: the model, on the CPU.

    Returns:
        The same model.

    Raises:
        UserError: torch has no kernels for this on this machine.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.ao.quantization.*", category=DeprecationWarning)
        from torch.ao.nn.quantized.dynamic import Linear as Int8Linear
        from torch.ao.quantization import per_channel_dynamic_qconfig

        if torch.backends.quantized.engine == "none":
            raise UserError("int8: this build of torch has no kernels for it; use float32 or bfloat16")
        for module in [*model.modules()]:
            for name, child in module.named_children():
                if isinstance(child, nn.Linear):
                    # torch quantizes `nn.Linear` itself only, not its subclasses.
                    plain: Any = nn.Linear(child.in_features, child.out_features, child.bias is not None, device="meta")
                    plain.weight, plain.bias = child.weight, child.bias
                    plain.qconfig = per_channel_dynamic_qconfig
                    setattr(module, name, Int8Linear.from_float(plain))
    return model
