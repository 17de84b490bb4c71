"""The momentum encoder: the weights that train, followed slowly."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from common.errors import UserError
from training.data.packing import PackedTexts
from training.objectives.embed import pool
from training.objectives.losses.momentum import exponential_moving_average


class MomentumEncoder(nn.Module):
    """An exponential moving average of an encoder's weights (He et al. 2020, arXiv:1911.05722, equation 2).

    It holds what trains alone, as buffers: they take no gradient, and a checkpoint has them. All else, the structure
    and what is frozen (the base of a LoRA model), is the encoder's own.
    """

    def __init__(self, encoder: nn.Module, momentum: float) -> None:
        """Args:
        encoder: what trains of it is what requires a gradient.
        momentum: share of the average that stays at an update.
        """
        super().__init__()
        self.momentum = momentum
        self.names = [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]
        for name in self.names:
            # A buffer's name holds no dots.
            self.register_buffer(name.replace(".", "/"), encoder.get_parameter(name).detach().clone())

    def weights(self) -> dict[str, Tensor]:
        """By their names in the encoder."""
        return {name: self.get_buffer(name.replace(".", "/")) for name in self.names}

    def update(self, encoder: nn.Module) -> None:
        """Follow the encoder by one step."""
        encoder = _unwrapped(encoder)
        source = [encoder.get_parameter(name) for name in self.names]
        exponential_moving_average(self.weights().values(), source, self.momentum)

    @torch.no_grad()
    def forward(self, encoder: nn.Module, chunks: Sequence[PackedTexts]) -> Tensor:
        """Unit vectors of packed texts, `(n, d)`, without gradient; dropout is on where the encoder has it on."""
        encoder, weights = _unwrapped(encoder), self.weights()
        rows = [pool(lambda **inputs: functional_call(encoder, weights, (), inputs), chunk) for chunk in chunks]
        return F.normalize(torch.cat(rows), dim=-1)


def _unwrapped(encoder: nn.Module) -> nn.Module:
    if isinstance(encoder, FSDPModule):
        raise UserError("--objective momentum: the weights of a sharded model are not at hand; launch with ddp.yaml")
    return encoder.module if isinstance(encoder, DistributedDataParallel) else encoder
