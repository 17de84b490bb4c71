"""FSDP2: every process keeps its share of the weights, gradients and moments, and gathers a sublayer when it needs it.

Zhao et al. 2023, "PyTorch FSDP" (arXiv:2304.11277), with `torch.distributed.fsdp.fully_shard`. The launcher's
configuration asks for it (training/accelerate/fsdp2.yaml), but the loop shards the model itself, in the same way on
CPUs and GPUs, because Accelerate silently leaves the model whole if the processes run on CPUs.

Gathering is a collective. Wherever processes may run the model a different number of times, they must agree on a number
first (`training.engine.processes.distributed.passes_together`), or hold all weights (`whole_weights`).
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
from training.engine.processes.distributed import broadcast

# What a launcher's configuration may ask for and this loop does not support. Accelerate would do something else, and
# would not say so if the processes run on CPUs.
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
        reshard_after_forward: whether a sublayer's gathered weights are freed between the forward and the backward
            pass: less memory, one more gather.
    """

    reshard_after_forward: bool = True

    def shard(self, model: nn.Module, device: torch.device) -> dict[nn.Parameter, nn.Parameter]:
        """Shard a model in place over all processes; each sublayer is a unit, and so is the rest.

        Args:
            model: the model, on its device.
            device: of this process.

        Returns:
            The sharded parameter for each original one.

        Raises:
            UserError: something in the model cannot be sharded.
        """
        _check(model)
        broadcast(model)  # new heads and LoRA weights, which each process has drawn for itself
        before = dict(model.named_parameters())
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for module in _sublayers(model):
            fully_shard(module, mesh=mesh, reshard_after_forward=self.reshard_after_forward)
        fully_shard(model, mesh=mesh)
        # The warning is about in-place operations on the model's output; there are none.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        return {before[name]: parameter for name, parameter in model.named_parameters()}

    @contextmanager
    def whole_weights(self, model: nn.Module) -> Iterator[None]:
        """Let every process hold all weights inside the block: forward passes without gradient need no collective."""
        units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        yield
        for unit in units:
            # `fully_shard` keeps the root, which is needed again as soon as the backward pass begins.
            unit.set_reshard_after_forward(self.reshard_after_forward and unit is not model, recurse=False)
            unit.reshard()


def launched_sharding() -> Sharding | None:
    """Return how the launcher asks for the model to be sharded, and remove the request from the environment.

    Without that, Accelerate would shard the model as well; see the top of the file.

    Raises:
        UserError: the launcher asks for FSDP 1, a setting that is not supported, or another kind of parallelism.
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
    """Clip gradients to a common norm, of sharded and of whole parameters together; a collective.

    Args:
        parameters: all parameters that train.
        max_norm: the norm above which gradients are scaled down.

    Returns:
        The norm before clipping, as `nn.utils.clip_grad_norm_`.
    """
    shared = [parameter for parameter in parameters if isinstance(parameter, DTensor)]
    if len(shared) in (0, len(parameters)):
        return whole(nn.utils.clip_grad_norm_(parameters, max_norm))
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.stack([whole(gradient.norm()).cpu() for gradient in gradients]).norm()
    for gradient in gradients:
        gradient.mul_(min(1.0, max_norm / (norm.item() + 1e-6)))  # the 1e-6 of torch
    return norm


def whole(tensor: Tensor) -> Tensor:
    """Return a whole tensor without its graph; a sharded one is gathered on the CPU, which is a collective."""
    return tensor.full_tensor().detach().cpu() if isinstance(tensor, DTensor) else tensor.detach()


def share(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this process's share of a whole tensor, sharded as `like` is; all processes have the tensor."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def whole_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return `optimizer.state_dict()` with whole tensors, which does not depend on the sharding; a collective."""
    state = optimizer.state_dict()
    moments = {
        number: {name: whole(value) if isinstance(value, Tensor) else value for name, value in of_one.items()}
        for number, of_one in state["state"].items()
    }
    return state | {"state": moments}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load what `whole_optimizer_state` returned, sharded as the parameters are now."""
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
    """Return the modules that transformers does not split over devices: the sublayers of the encoder."""
    names = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or []}
    return [module for module in model.modules() if type(module).__name__ in names]


def _check(model: nn.Module) -> None:
    """Raise a `UserError` about a model for which FSDP would give wrong results or hang."""
    reasons = {
        "layerdrop: processes that leave out different layers wait for each other": any(
            getattr(getattr(module, "config", None), "layerdrop", 0) for module in model.modules()
        ),
        "adaptive spans: their penalty reads them where they are split": bool(getattr(model, "adaptive_spans", list)()),
        # torch replaces the parameter by a sharded one, without the hook that masks its gradient.
        "--tuning positions: the rows that do not train cannot be kept as they are": any(
            parameter._backward_hooks for parameter in model.parameters()
        ),
    }
    for reason, found in reasons.items():
        if found:
            raise UserError(f"{reason} under FSDP; launch with training/accelerate/ddp.yaml")
