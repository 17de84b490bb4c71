"""FSDP2: every process keeps its share of the weights, gradients and moments, and gathers a sublayer when it needs it.

Zhao et al. 2023, "PyTorch FSDP" (arXiv:2304.11277), in the form of `torch.distributed.fsdp.fully_shard`. The launcher's
configuration asks for it (training/accelerate/fsdp2.yaml), and the loop does it by itself, in one way on CPUs and GPUs:
Accelerate leaves the model whole, without a word, where the processes run on CPUs.

Gathering is a collective. Wherever processes may run the model a different number of times they must agree on a number
first (`training.engine.distributed.passes_together`), or hold all weights (`whole_weights`).
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from common.errors import UserError
from training.engine.distributed import broadcast

# What a launcher's configuration may ask for and this loop does not do. Accelerate would do something else, without a
# word where the processes run on CPUs.
REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed is not supported, its engine makes the backward pass that gradient caching "
    "has to make; launch with training/accelerate/fsdp2.yaml",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM is not supported; launch with training/accelerate/fsdp2.yaml",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config is not supported, training has no tensor or context "
    "parallelism; launch with training/accelerate/fsdp2.yaml",
    "FSDP_OFFLOAD_PARAMS": "fsdp_offload_params is not supported, weights stay on their device; set it to false",
    "FSDP_ACTIVATION_CHECKPOINTING": "fsdp_activation_checkpointing is not supported; set it to false and use "
    "--gradient_checkpointing",
}


@dataclass(frozen=True)
class Sharding:
    """How a run is sharded.

    Args:
        reshard_after_forward: whether a sublayer's weights are given back between the forward and the backward pass:
            less memory, one gather more.
    """

    reshard_after_forward: bool = True

    def shard(self, model: nn.Module, device: torch.device) -> dict[nn.Parameter, nn.Parameter]:
        """Shard a model in place, over all processes, each of its sublayers and the rest as a unit.

        Returns:
            For each parameter of before, the one that is there now.

        Raises:
            UserError: something in the model cannot be sharded.
        """
        _check(model)
        broadcast(model)  # what each process has drawn for itself, of a new head or of LoRA
        before = dict(model.named_parameters())
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for module in _sublayers(model):
            fully_shard(module, mesh=mesh, reshard_after_forward=self.reshard_after_forward)
        fully_shard(model, mesh=mesh)
        # It fears for operations in place on what a model returns; there are none.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        return {before[name]: parameter for name, parameter in model.named_parameters()}

    @contextmanager
    def whole_weights(self, model: nn.Module) -> Iterator[None]:
        """Inside, every process has all weights, and forward passes without gradient are no collectives."""
        units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        yield
        for unit in units:
            # The root is needed again at once when the backward pass begins: `fully_shard` keeps it.
            unit.set_reshard_after_forward(self.reshard_after_forward and unit is not model, recurse=False)
            unit.reshard()


def launched_sharding() -> Sharding | None:
    """What the launcher's configuration asks for, which is then taken out of the environment: see the top of the file.

    Raises:
        UserError: FSDP of version 1, a setting that is not for this loop, or another kind of parallelism.
    """
    asked = os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true"
    for name, sentence in REFUSED.items():
        if os.environ.get(name, "false").lower() == "true":
            raise UserError(f"{sentence} (docs/guides/devices.md)")
    if not asked or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise UserError(
            f"fsdp_version: {version} is not supported; set it to 2, as training/accelerate/fsdp2.yaml does"
        )
    return Sharding(os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true")


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """`nn.utils.clip_grad_norm_` of whole parameters and shares together; the norm before, a collective."""
    shared = [parameter for parameter in parameters if isinstance(parameter, DTensor)]
    if len(shared) in (0, len(parameters)):
        return whole(nn.utils.clip_grad_norm_(parameters, max_norm))
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.stack([whole(gradient.norm()).cpu() for gradient in gradients]).norm()
    for gradient in gradients:
        gradient.mul_(min(1.0, max_norm / (norm.item() + 1e-6)))  # torch's own 1e-6
    return norm


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor, on the CPU if this process has a share of it: then a collective."""
    return tensor.full_tensor().detach().cpu() if isinstance(tensor, DTensor) else tensor.detach()


def share(tensor: Tensor, like: Tensor) -> Tensor:
    """Of a whole tensor, which all processes have, this process's share, split as `like` is."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def whole_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """`optimizer.state_dict()` with whole tensors: the same whatever they were split over. A collective."""
    state = optimizer.state_dict()
    moments = {
        number: {name: whole(value) if isinstance(value, Tensor) else value for name, value in of_one.items()}
        for number, of_one in state["state"].items()
    }
    return state | {"state": moments}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load what `whole_optimizer_state` gave, split as the parameters are now."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        number: {
            name: share(value, parameters[number]) if isinstance(value, Tensor) and value.ndim else value
            for name, value in of_one.items()
        }
        for number, of_one in state["state"].items()
    }
    optimizer.load_state_dict(state | {"state": moments})


def _sublayers(model: nn.Module) -> list[nn.Module]:
    """What transformers would not split over devices: the sublayers of the encoder."""
    names = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or []}
    return [module for module in model.modules() if type(module).__name__ in names]


def _check(model: nn.Module) -> None:
    """Raises `UserError` for what FSDP cannot do, and would get wrong or wait for without end."""
    reasons = {
        "layerdrop: processes that leave out different layers wait for each other": any(
            getattr(getattr(module, "config", None), "layerdrop", 0) for module in model.modules()
        ),
        "adaptive spans: their penalty reads them where they are split": bool(getattr(model, "adaptive_spans", list)()),
        # torch puts another parameter in its place, without what changes its gradient.
        "--tuning positions: the rows that do not train cannot be kept as they are": any(
            parameter._backward_hooks for parameter in model.parameters()
        ),
    }
    for reason, found in reasons.items():
        if found:
            raise UserError(f"{reason} under FSDP; launch with training/accelerate/ddp.yaml")
