"""Eight bits: weights of a model that serves on a CPU."""

import warnings
from typing import Any

import torch
from torch import nn

from common.errors import UserError


def int8_weights(model: nn.Module) -> nn.Module:
    """Put the weights of all linear layers into 8 bits, in place, by torch's own dynamic quantisation.

    A weight is a number from -128 to 127 times a scale of its row; the inputs of a layer are put into 8 bits as they
    come, with a scale of the batch. Embeddings and norms stay as they are. For CPUs alone, and not to be saved: the
    weights are in no file, they are quantised when the model is loaded.

    Returns:
        the model.

    Raises:
        UserError: torch has no kernels for it on this machine.
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
                    # A plain one: torch takes no subclasses, whatever they add.
                    plain: Any = nn.Linear(child.in_features, child.out_features, child.bias is not None, device="meta")
                    plain.weight, plain.bias = child.weight, child.bias
                    plain.qconfig = per_channel_dynamic_qconfig
                    setattr(module, name, Int8Linear.from_float(plain))
    return model
