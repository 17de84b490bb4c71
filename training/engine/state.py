"""What a run changes from step to step: model, optimiser and schedule, and how checkpoints hold them."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from common.errors import UserError
from training.engine.checkpoints.random_state import get_random_state
from training.engine.loop_arguments import LoopArguments
from training.engine.optimizer import make_optimizer, parameter_groups
from training.engine.processes.distributed import broadcast
from training.engine.processes.sharding import Sharding, load_optimizer_state, share, whole, whole_optimizer_state
from training.engine.schedule import Schedule
from training.engine.training import AnyBatch, AnyModel, Training


@dataclass
class State:
    """What a run changes from step to step.

    Attributes:
        model: the model as DDP or FSDP wraps it.
        auxiliary: see `Training`.
        optimizer, schedule: of both.
        tensors: what a checkpoint holds, by name: the parameters that train and all buffers.
        parameters: those that train.
        final: under FSDP an unsharded copy of the model, which receives the weights at the end.
    """

    model: nn.Module
    auxiliary: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    tensors: dict[str, Tensor]
    parameters: list[nn.Parameter]
    final: nn.Module | None

    def stored(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what a checkpoint holds, whole, so that it does not depend on how the run was sharded; a collective.

        Returns:
            The tensors by name, and the state of optimiser, schedule and random generators.
        """
        tensors = {name: whole(tensor) for name, tensor in self.tensors.items()}
        return tensors, {
            "optimizer": whole_optimizer_state(self.optimizer),
            "scheduler": self.schedule.state_dict(),
            "random": gather_object([get_random_state()]),
        }

    def restore(self, tensors: dict[str, Tensor], stored: dict[str, Any], path: Path) -> None:
        """Go on with what a checkpoint holds, but for the random generators.

        Args:
            tensors: see `stored`.
            stored: see `stored`.
            path: the checkpoint.

        Raises:
            UserError: other parameters train now, or the schedule is of another kind.
        """
        _check_tensors(self.tensors, tensors, path)
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                tensor.copy_(share(tensors[name], tensor))
        # The moments are the checkpoint's; learning rates, decay and betas are those of the options.
        own = [{name: group[name] for name in group if name != "params"} for group in self.optimizer.param_groups]
        load_optimizer_state(self.optimizer, stored["optimizer"])
        for group, values in zip(self.optimizer.param_groups, own, strict=True):
            group.update(values)
        self.schedule.restore(stored)

    def whole_model(self, model: Any) -> Any:
        """Copy the weights of `model`, which is sharded, into `final`, whole on the main process; a collective.

        Returns:
            `final`; on the other processes, whose `final` it is, `model` as it was.
        """
        assert self.final is not None
        own = dict([*self.final.named_parameters(), *self.final.named_buffers()])
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            value = whole(tensor)
            if self.final is not model:
                own[name].data.copy_(value)
        return self.final


def prepare(
    training: Training[AnyModel, AnyBatch],
    arguments: LoopArguments,
    accelerator: Accelerator,
    sharding: Sharding | None,
    total_steps: int,
) -> State:
    """Distribute the model, and make the optimiser and the schedule.

    Args:
        training: what is trained.
        arguments: parsed command-line options.
        accelerator: of the run.
        sharding: how the model is sharded; None: every process has all of it.
        total_steps: number of steps of the whole run.

    Returns:
        The state before the first step.

    Raises:
        UserError: the model has no gradient checkpointing, or the schedule does not fit the number of steps.
    """
    model, auxiliary = training.model, training.auxiliary.to(accelerator.device)
    if arguments.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    groups = training.groups
    if groups is None:
        groups = parameter_groups(model, arguments.weight_decay)
    final: nn.Module | None = None
    if sharding is None:
        wrapped = accelerator.prepare(model)
    else:
        final = copy.deepcopy(model) if accelerator.is_main_process else model
        wrapped = accelerator.prepare_model(model, evaluation_mode=True)  # device and precision alone
        sharded = sharding.shard(wrapped, accelerator.device)
        groups = [group | {"params": [sharded.get(p, p) for p in group["params"]]} for group in groups]
    optimizer = make_optimizer(groups, arguments)
    broadcast(auxiliary)
    tensors = _training_tensors(model)
    # Checkpoints of earlier versions call it the objective.
    tensors |= {f"objective.{name}": tensor for name, tensor in _training_tensors(auxiliary).items()}
    parameters = [p for module in (model, auxiliary) for p in module.parameters() if p.requires_grad]
    schedule = Schedule(optimizer, arguments, total_steps)
    return State(wrapped, auxiliary, optimizer, schedule, tensors, parameters, final)


def _training_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what changes in training, by name: the parameters that train, and the buffers."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return trained | dict(model.named_buffers())


def _check_tensors(own: dict[str, Tensor], stored: dict[str, Tensor], path: Path) -> None:
    """Raise a `UserError` if what a checkpoint holds is not what trains now."""
    for name in sorted(own.keys() | stored.keys()):
        shapes = [tuple(tensors[name].shape) if name in tensors else None for tensors in (stored, own)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{path}: trains other parameters than now ({name}); use the same model, --tuning and --objective"
            )


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Let a model recompute its activations in the backward pass.

    Raises:
        UserError: it cannot.
    """
    # transformers is renaming the method; the first argument is the same under both names.
    enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})  # a reentrant one loses the gradient where no input needs one, as under LoRA
    except ValueError as error:
        raise UserError(f"--gradient_checkpointing: {error}") from None
