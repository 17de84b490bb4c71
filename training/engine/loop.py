"""The loop that all trainings share: devices, precision, accumulation, logging, checkpoints, exact resume.

`Training` says what is trained; `Loop` trains it. `Loop.train_step` is one step of the optimiser; `Loop.run` is
everything around the steps. Scripts call `training.engine.run.run_training`, which adds what precedes and follows them.
"""

import copy
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar, runtime_checkable

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
from accelerate.utils import gather_object, set_seed
from peft import PeftModel
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedModel

from common.conditions import GIVEN, NOT_GIVEN
from common.errors import UserError
from training.engine.checkpoints import (
    Checkpoint,
    Progress,
    find_checkpoint,
    has_checkpoints,
    remove_later,
    remove_old,
    save_checkpoint,
)
from training.engine.distributed import average_gradients, broadcast, mean_over_processes, settle
from training.engine.held_out import Evaluate
from training.engine.optimizer import (
    PLATEAU,
    OptimizerArguments,
    make_optimizer,
    make_scheduler,
    parameter_groups,
    restore_schedule,
)
from training.engine.random_state import get_random_state, set_random_state
from training.engine.resuming import Settings
from training.engine.run_log import MetricsLog, Throughput
from training.engine.sharding import (
    clip_gradients,
    launched_sharding,
    load_optimizer_state,
    share,
    whole,
    whole_optimizer_state,
)


@dataclass(kw_only=True)
class LoopArguments(OptimizerArguments):
    """How long a run is, how it computes, and when it logs, evaluates and saves.

    Raises:
        UserError: a number of steps is not positive, or nothing is to be trained.
    """

    output_dir: str = field(
        metadata={"help": "folder for checkpoints/, metrics.jsonl, tensorboard/ and final/", "output": "folder"}
    )
    num_train_epochs: float = field(
        default=1.0, metadata={"help": "passes through the training data", "applies": {"max_steps": NOT_GIVEN}}
    )
    max_steps: int = field(default=-1, metadata={"help": "optimiser steps; overrides --num_train_epochs if positive"})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "batches per optimiser step"})
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "recompute activations in the backward pass: less memory, slower"}
    )
    bf16: bool = field(default=False, metadata={"help": "compute in bfloat16 (weights stay float32)"})
    seed: int = field(default=42, metadata={"help": "random seed", "within": "[0, 4294967295]"})
    dataloader_num_workers: int = field(
        default=1,
        metadata={"help": "processes that tokenize ahead; 0: tokenize in the training process", "within": "[0, inf)"},
    )
    logging_steps: int = field(default=10, metadata={"help": "steps between two lines of metrics.jsonl"})
    report_to: Literal["tensorboard", "none"] = field(
        default="tensorboard", metadata={"help": "tracker that metrics go to, in addition to metrics.jsonl"}
    )
    eval_steps: int = field(
        default=0,
        metadata={
            "help": "steps between two evaluations; 0: only after the last step",
            "within": "[0, inf)",
            "applies": [{"eval_data": GIVEN}, {"eval_split": GIVEN}],
        },
    )
    save_steps: int = field(default=500, metadata={"help": "steps between two checkpoints; the last step makes one"})
    save_total_limit: int | None = field(default=2, metadata={"help": "number of checkpoints to keep"})
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "'last' (the newest checkpoint; if there is none, start anew) or the path of a checkpoint"},
    )
    allow_reshard: bool = field(
        default=False,
        metadata={
            "help": "allow a resumed run to have another number of processes",
            "applies": {"resume_from_checkpoint": GIVEN},
        },
    )
    change_settings: list[str] = field(
        default_factory=list,
        metadata={
            "help": "names of options that a resumed run may have other values of, such as learning_rate; the new "
            "values count from the checkpoint on. Without it a resumed run must have all settings that change its "
            "numbers in common with the run that it goes on with",
            "applies": {"resume_from_checkpoint": GIVEN},
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("logging_steps", "save_steps", "gradient_accumulation_steps"):
            if getattr(self, name) <= 0:
                raise UserError(f"--{name} {getattr(self, name)}: must be more than 0")
        if self.max_steps <= 0 and self.num_train_epochs <= 0:
            raise UserError("nothing to train: give --max_steps or --num_train_epochs more than 0")
        if self.save_total_limit is not None and self.save_total_limit < 1:
            raise UserError(f"--save_total_limit {self.save_total_limit}: must be at least 1")


class PackedTokens(Protocol):
    """Texts that are computed at once, their tokens in one row."""

    @property
    def input_ids(self) -> Tensor:
        """`(1, T)`."""

    @property
    def max_length_q(self) -> int:
        """Tokens of the longest text."""


class Batch(Protocol):
    """What one process computes between two optimiser steps, or between two accumulations."""

    def to(self, device: torch.device) -> Any:
        """Return the batch on a device."""

    def largest_chunk(self) -> PackedTokens:
        """Return the texts of the chunk that takes the most memory."""


AnyBatch = TypeVar("AnyBatch", bound=Batch)
Batched = TypeVar("Batched", bound=Batch, covariant=True)


class Batches(Protocol[Batched]):
    """The batches of an endless run by their number; each is a pure function of it.

    Attributes:
        batch_tokens: the most tokens whose activations are held at once.
    """

    batch_tokens: int

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""

    def __getitem__(self, index: int) -> Batched:
        """Return batch number `index`, counted from 0."""

    def describe(self) -> dict[str, Any]:
        """Return what options of the data stand for, by option: values of JSON types, whatever the processes."""

    def heaviest(self) -> Batched:
        """Return a batch that takes as much memory as any that the data can make."""


@runtime_checkable
class Stream(Protocol):
    """Batches of data that is read once, front to back, such as a stream from the Hub."""

    def go_to(self, bookmark: dict[str, Any]) -> None:
        """Continue at the place that the `bookmark` of the last batch names."""


# Adds the gradient of one batch to the parameters, and returns metrics of this process: scalars without gradient, of
# which those named `*_count` are summed over processes and batches, and all others averaged. The arguments are the
# model, the batch, a factor of the loss, and whether gradients are reduced over the processes after this batch.
AccumulateGradient = Callable[[nn.Module, AnyBatch, float, bool], dict[str, Tensor]]
AnyModel = TypeVar("AnyModel", bound=nn.Module)


@dataclass(kw_only=True)
class Training(Generic[AnyModel, AnyBatch]):
    """All that a training is, as a script builds it.

    Attributes:
        model: what trains is what requires a gradient. A checkpoint holds that, and the model's buffers.
        batches: the data.
        gradient: the objective: adds the gradient of one batch to the parameters.
        evaluate: returns metrics of the model in evaluation mode; it is called on all processes.
        groups: parameter groups of the optimiser, the first at `--learning_rate`; None: `parameter_groups(model)`.
        auxiliary: a module that trains, or remembers, beside the model, such as a learnable temperature or a queue. It
            is part of the optimiser's groups and of checkpoints, but not of the final model.
        options: the parsed dataclasses of the script, all of them, which checkpoints record.
        settings: what an option that names a model or data stands for, by option, beside what the batches describe:
            values of JSON types, which a resumed run must have in common with this one.
        ends_after: called with the number of each step after it, on all processes; True ends the run. What it has to
            remember of earlier steps belongs into buffers of the model, which checkpoints hold.
        export: returns what is saved of the trained model, such as the encoder without its heads; None: the model.
        tuning: the `--tuning` that chose the parameters, if the script has the option.
        length_option: name of the option that says where texts are truncated, for the answer to memory that runs out.
    """

    model: AnyModel
    batches: Batches[AnyBatch]
    gradient: AccumulateGradient[AnyBatch]
    evaluate: Evaluate | None = None
    groups: list[dict[str, Any]] | None = None
    auxiliary: nn.Module = field(default_factory=nn.Module)
    options: Sequence[Any] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    ends_after: Callable[[int], bool] | None = None
    export: Callable[[AnyModel], PreTrainedModel | PeftModel] | None = None
    tuning: str | None = None
    length_option: str = "max_length"


@dataclass
class _State:
    """What a run changes from step to step.

    Attributes:
        model: the model as DDP or FSDP wraps it.
        auxiliary: see `Training`.
        optimizer, scheduler: of both.
        tensors: what a checkpoint holds, by name: the parameters that train and all buffers.
        parameters: those that train.
        final: under FSDP an unsharded copy of the model, which receives the weights at the end.
    """

    model: nn.Module
    auxiliary: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    tensors: dict[str, Tensor]
    parameters: list[nn.Parameter]
    final: nn.Module | None


class Loop:
    """Trains what a `Training` describes, on one process or on many.

    Args:
        arguments: parsed command-line options.

    Attributes:
        checkpoint: what the run goes on from; None: from the start.
        done: numbers of steps and of batches that it has made.
        saved: the step of the run's newest checkpoint.

    Raises:
        UserError: the output folder holds checkpoints of another run, or the launcher asks for what the loop cannot do.
    """

    def __init__(self, arguments: LoopArguments) -> None:
        self.arguments = arguments
        self.output_dir = Path(arguments.output_dir)
        self.sharding = launched_sharding()  # before Accelerate reads the same settings
        self.accelerator = Accelerator(
            # Without it Accelerate takes the processes of a machine without accelerators for independent runs.
            cpu=not torch.accelerator.is_available(),
            mixed_precision="bf16" if arguments.bf16 else None,
            log_with=None if arguments.report_to == "none" else arguments.report_to,
            project_dir=arguments.output_dir,
            # No buffer is trained, and broadcasting them in every forward pass would be a second collective.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        supported = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
        if self.accelerator.distributed_type not in supported:
            raise UserError(
                f"{self.accelerator.distributed_type} is not supported here; launch with one of training/accelerate/"
            )
        if self.accelerator.mixed_precision not in ("no", "bf16"):
            raise UserError(f"mixed precision {self.accelerator.mixed_precision} is not supported; use --bf16 or none")
        set_seed(arguments.seed, device_specific=True)  # each process draws its own dropout masks
        self.checkpoint = self._choose_checkpoint()
        progress = self.checkpoint.progress if self.checkpoint else None
        self.done = (
            (progress.step, progress.batches_done(arguments.gradient_accumulation_steps)) if progress else (0, 0)
        )
        self.saved = self.done[0]

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.accelerator.is_main_process

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self.accelerator.device

    def total_steps(self, batches: Sized) -> int:
        """Return the number of optimiser steps of the whole run; `len(batches)` are the batches of an epoch."""
        arguments, accumulation = self.arguments, self.arguments.gradient_accumulation_steps
        if arguments.max_steps > 0:
            return arguments.max_steps
        step, done = self.done
        # A checkpoint's steps may have taken another number of batches each.
        return max(1, round((arguments.num_train_epochs * len(batches) + step * accumulation - done) / accumulation))

    def total_batches(self, total_steps: int) -> int:
        """Return the number of batches of a run of `total_steps` steps, with those of the run that it goes on with."""
        step, done = self.done
        return done + (total_steps - step) * self.arguments.gradient_accumulation_steps

    def run(
        self,
        training: Training[AnyModel, AnyBatch],
        rehearse: Callable[[nn.Module, torch.optim.Optimizer], None] | None = None,
    ) -> AnyModel:
        """Train to the last step, from the start or from the checkpoint that the options name.

        Args:
            training: what is trained.
            rehearse: called with model and optimiser before anything is written. It has to leave both unchanged. The
                model is in training mode then, the auxiliary module in evaluation mode.

        Returns:
            The trained model without the wrappers of distributed training. Under FSDP only the main process has it
            whole; the others return their share.

        Raises:
            UserError: the run cannot be resumed from its checkpoint, or the loss diverges.
        """
        arguments, batches = self.arguments, training.batches
        total = self.total_steps(batches)
        if arguments.lr_scheduler_type == PLATEAU and not (training.evaluate and arguments.eval_steps):
            raise UserError(
                f"--lr_scheduler_type {PLATEAU}: waits for a metric of evaluations; give --eval_steps and held-out data"
            )
        state = self._prepare(training, total)
        progress = self._resume(state, training)
        if progress.ended:
            total = progress.step
        if progress.step > total:
            raise UserError(
                f"the run ends after {total} steps, and the checkpoint has made {progress.step}; give more --max_steps "
                "or --num_train_epochs"
            )
        state.model.train()
        if rehearse is not None:
            state.auxiliary.eval()
            rehearse(state.model, state.optimizer)
        state.auxiliary.train()

        log = MetricsLog(self.accelerator, self.output_dir, progress.step)
        throughput = Throughput(self.device)
        stream = self._stream(batches, self.done[1], self.total_batches(total))
        bar = tqdm(total=total, initial=progress.step, desc="training", unit="step", disable=not self.is_main)
        with bar:  # closed before an error is told
            for step in range(progress.step + 1, total + 1):
                learning_rate = state.scheduler.get_last_lr()[0]
                metrics, progress.bookmark = self.train_step(step, state, training.gradient, stream)
                throughput.add(metrics)
                progress.window.append(metrics)
                progress.step, progress.batches = step, self.total_batches(step)
                progress.ended = training.ends_after is not None and training.ends_after(step)
                is_last = step == total or progress.ended
                bar.update()
                bar.set_postfix(loss=f"{metrics['loss']:.4f}")
                if step % arguments.logging_steps == 0 or is_last:
                    values = {"epoch": progress.batches / len(batches), "learning_rate": learning_rate}
                    log.write(step, values | _mean(progress.window) | throughput.read())
                    progress.window.clear()
                if training.evaluate and (is_last or (arguments.eval_steps and step % arguments.eval_steps == 0)):
                    with throughput.paused():
                        evaluation = self._evaluate(state.model, training.evaluate)
                        log.write(step, evaluation)
                        self._adapt(state.scheduler, evaluation)
                if step % arguments.save_steps == 0 or is_last:
                    with throughput.paused():
                        self._save(state, progress)
                if is_last:
                    break
        if self.is_main:  # once more: the process may have been killed between its last checkpoint and this
            remove_old(self.output_dir / "checkpoints", progress.step, arguments.save_total_limit)
        trained = self._final_model(state, training)
        self.accelerator.end_training()
        return trained

    def train_step(
        self, step: int, state: _State, gradient: AccumulateGradient[AnyBatch], stream: Iterator[AnyBatch]
    ) -> tuple[dict[str, float], dict[str, Any] | None]:
        """Make one step of the optimiser: the gradient of the next batches, clipping, the update, the schedule.

        Args:
            step: its number, for the error message.
            state: model, optimiser and schedule.
            gradient: the objective.
            stream: the batches to come.

        Returns:
            The metrics of the step over all processes, and the bookmark of the last batch, if the data is a stream.

        Raises:
            UserError: the loss or the gradient is not finite; the model is then as before the step.
        """
        accumulation = self.arguments.gradient_accumulation_steps
        found, places = [], []
        for number in range(accumulation):
            batch = next(stream).to(self.device)
            places.append(batch.locate() if hasattr(batch, "locate") else "")
            found.append(gradient(state.model, batch, 1 / accumulation, number == accumulation - 1))
        settle(state.model)
        average_gradients(state.auxiliary)
        norm = clip_gradients(state.parameters, self.arguments.max_grad_norm or float("inf"))
        metrics = self._reduce(found) | {"grad_norm": norm.item()}
        _check_finite(step, metrics, places, self._after_divergence())
        state.optimizer.step()
        if not isinstance(state.scheduler, ReduceLROnPlateau):
            state.scheduler.step()
        state.optimizer.zero_grad()
        return metrics, getattr(batch, "bookmark", None)

    def _after_divergence(self) -> str:
        """Return what to do after a loss that is not finite: words that can be appended to the same command."""
        lower = f"--learning_rate {self.arguments.learning_rate / 2:g}"
        if not has_checkpoints(self.output_dir / "checkpoints"):
            return f"there is no checkpoint yet: start anew with {lower}, or with more --warmup_steps"
        return (
            f"go on from the last checkpoint with a lower learning rate, the same command and --resume_from_checkpoint "
            f"last --change_settings learning_rate {lower}, or start anew in another --output_dir"
        )

    def _prepare(self, training: Training[AnyModel, AnyBatch], total_steps: int) -> _State:
        """Distribute the model, and make the optimiser and the schedule."""
        arguments, model, auxiliary = self.arguments, training.model, training.auxiliary.to(self.device)
        if arguments.gradient_checkpointing:
            _enable_gradient_checkpointing(model)
        groups = training.groups
        if groups is None:
            groups = parameter_groups(model, arguments.weight_decay)
        final: nn.Module | None = None
        if self.sharding is None:
            wrapped = self.accelerator.prepare(model)
        else:
            final = copy.deepcopy(model) if self.is_main else model
            wrapped = self.accelerator.prepare_model(model, evaluation_mode=True)  # device and precision alone
            sharded = self.sharding.shard(wrapped, self.device)
            groups = [group | {"params": [sharded.get(p, p) for p in group["params"]]} for group in groups]
        optimizer = make_optimizer(groups, arguments)
        broadcast(auxiliary)
        tensors = _training_tensors(model)
        # Checkpoints of earlier versions call it the objective.
        tensors |= {f"objective.{name}": tensor for name, tensor in _training_tensors(auxiliary).items()}
        parameters = [p for module in (model, auxiliary) for p in module.parameters() if p.requires_grad]
        scheduler = make_scheduler(optimizer, arguments, total_steps)
        return _State(wrapped, auxiliary, optimizer, scheduler, tensors, parameters, final)

    def _stream(self, batches: Batches[AnyBatch], first: int, end: int) -> Iterator[AnyBatch]:
        """Return the batches number `first` to `end - 1`, tokenized ahead by worker processes."""
        loader: DataLoader = DataLoader(
            batches,  # type: ignore[arg-type]  # has what a loader uses of a Dataset
            batch_size=None,
            sampler=range(first, end),
            num_workers=self.arguments.dataloader_num_workers,
            pin_memory=self.device.type == "cuda",
            # Its own generator: a loader draws a seed for its workers when it starts, and a resumed run would draw it
            # from the global generator at another point.
            generator=torch.Generator(),
            worker_init_fn=_start_worker,
        )
        return iter(loader)

    def _evaluate(self, model: nn.Module, evaluate: Evaluate) -> dict[str, float]:
        model.eval()
        with self.sharding.whole_weights(model) if self.sharding else nullcontext():
            values = evaluate(model)
        model.train()
        return values

    def _adapt(self, scheduler: LRScheduler, values: dict[str, float]) -> None:
        """Tell a schedule that waits for it the metric of an evaluation."""
        if not isinstance(scheduler, ReduceLROnPlateau):
            return
        metric = self.arguments.lr_scheduler_metric
        if metric not in values:
            raise UserError(f"--lr_scheduler_metric {metric}: the evaluations have {', '.join(values)}")
        scheduler.step(gather_object([values[metric]])[0])  # all processes take that of the first one

    def _choose_checkpoint(self) -> Checkpoint | None:
        folder, chosen = self.output_dir / "checkpoints", self.arguments.resume_from_checkpoint
        if chosen is None:
            if has_checkpoints(folder):
                raise UserError(
                    f"{folder} holds checkpoints of an earlier run; go on with --resume_from_checkpoint last, or "
                    "choose another --output_dir"
                )
            return None
        # The main process alone checks hashes, and all others use what it found.
        found = [find_checkpoint(folder, chosen)] if self.is_main else [None]
        checkpoint = gather_object(found)[0]
        if self.is_main:
            if checkpoint:
                print(f"going on from {checkpoint.path}", file=sys.stderr)
            else:
                print(f"no checkpoint in {folder} yet: from the start", file=sys.stderr)
        return checkpoint

    def _resume(self, state: _State, training: Training[AnyModel, AnyBatch]) -> Progress:
        """Restore what the checkpoint holds, if there is one, and return where the run is."""
        arguments, world_size = self.arguments, self.accelerator.num_processes
        settings = Settings(training.options, training.batches.describe() | training.settings)
        # Those of the main process: a new head of another one, before it is distributed, has other random weights.
        settings.values = gather_object([settings.values])[0]
        settings.check_names(arguments.change_settings)
        if self.checkpoint is None:
            return Progress(step=0, batches=0, world_size=world_size, settings=settings.values)
        path, progress = self.checkpoint.path, self.checkpoint.progress
        changed = settings.changes(progress.settings, path, arguments.change_settings)
        if progress.settings is None and self.is_main:
            print(
                f"{path}: an earlier version made it and recorded no settings: they are not compared", file=sys.stderr
            )
        if not arguments.allow_reshard and world_size != progress.world_size:
            raise UserError(
                f"{path}: was made by {progress.world_size} processes, now there are {world_size}; launch as before, "
                "or add --allow_reshard (the same batches, but other dropout masks)"
            )
        if progress.bookmark is not None and (moved := sorted(changed & training.batches.describe().keys())):
            raise UserError(
                f"--change_settings {' '.join(moved)}: the place in a stream where {path} stopped would be another; "
                "start anew in another --output_dir"
            )
        tensors, stored = self.checkpoint.load()
        _check_tensors(state.tensors, tensors, path)
        with torch.no_grad():
            for name, tensor in state.tensors.items():
                tensor.copy_(share(tensors[name], tensor))
        # The moments are the checkpoint's; learning rates, decay and betas are those of the options.
        own = [{name: group[name] for name in group if name != "params"} for group in state.optimizer.param_groups]
        load_optimizer_state(state.optimizer, stored["optimizer"])
        for group, values in zip(state.optimizer.param_groups, own, strict=True):
            group.update(values)
        restore_schedule(state.scheduler, state.optimizer, stored)
        if progress.world_size == world_size and "seed" not in changed:
            set_random_state(stored["random"][self.accelerator.process_index])
        else:
            set_seed(arguments.seed + progress.step, device_specific=True)
        progress.world_size, progress.settings = world_size, settings.values
        if progress.bookmark is not None:
            assert isinstance(training.batches, Stream)
            training.batches.go_to(progress.bookmark)
        return progress

    def _save(self, state: _State, progress: Progress) -> None:
        # Whole tensors, so that a checkpoint does not depend on how the run was sharded.
        tensors = {name: whole(tensor) for name, tensor in state.tensors.items()}
        stored = {
            "optimizer": whole_optimizer_state(state.optimizer),
            "scheduler": state.scheduler.state_dict(),
            "random": gather_object([get_random_state()]),
        }
        if self.is_main:
            folder = self.output_dir / "checkpoints"
            remove_later(folder, self.saved)
            save_checkpoint(folder, progress, tensors, stored)
            remove_old(folder, progress.step, self.arguments.save_total_limit)
        self.saved = progress.step
        self.accelerator.wait_for_everyone()

    def _final_model(self, state: _State, training: Training[AnyModel, AnyBatch]) -> AnyModel:
        """Return the trained model without wrappers; under FSDP, a collective, whole on the main process."""
        if state.final is None:
            return self.accelerator.unwrap_model(state.model, keep_fp32_wrapper=False)
        return _copy_whole(training.model, state.final)

    def _reduce(self, batches: list[dict[str, Tensor]]) -> dict[str, float]:
        """Return the metrics of a step: means over its batches and processes, sums of the counts."""
        names = list(batches[0])
        rows = torch.stack([torch.stack([batch[name].double().cpu() for name in names]) for batch in batches])
        values = mean_over_processes(rows.mean(0).to(self.device)).tolist()
        terms = len(batches) * self.accelerator.num_processes
        return {
            name: round(value * terms) if name.endswith("_count") else value
            for name, value in zip(names, values, strict=True)
        }


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


def _mean(window: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(step[name] for step in window) / len(window) for name in window[0]}


def _check_finite(step: int, metrics: dict[str, float], places: list[str], remedy: str) -> None:
    """Raise on all processes, before the optimiser makes a step of it, if loss or gradient is not finite."""
    for name, words in (("loss", "loss"), ("grad_norm", "norm of the gradient")):
        if not math.isfinite(metrics[name]):
            rows = "; ".join(filter(None, gather_object(places)))
            where = f", whose batch is {rows}" if rows else ""
            raise UserError(f"the {words} is {metrics[name]} at step {step}{where}; {remedy}")


def _copy_whole(sharded: nn.Module, model: Any) -> Any:
    """Copy the whole tensors of a sharded model into `model`, unless that is the same object; a collective."""
    own = dict([*model.named_parameters(), *model.named_buffers()])
    for name, tensor in [*sharded.named_parameters(), *sharded.named_buffers()]:
        value = whole(tensor)
        if model is not sharded:
            own[name].data.copy_(value)
    return model


def _enable_gradient_checkpointing(model: nn.Module) -> None:
    # transformers is renaming the method; the first argument is the same under both names.
    enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})  # a reentrant one loses the gradient where no input needs one, as under LoRA
    except ValueError as error:
        raise UserError(f"--gradient_checkpointing: {error}") from None


def _start_worker(worker: int) -> None:
    # The worker processes are the parallelism, and the threads of tokenizers do not survive the fork that made them.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
