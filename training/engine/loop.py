"""The loop that every kind of training shares: devices, precision, accumulation, schedule, logging, exact resume."""

import copy
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
from accelerate.utils import gather_object, set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import get_scheduler

from common.errors import UserError
from training.engine.checkpoints import Checkpoint, Progress, find_checkpoint, has_checkpoints, save_checkpoint
from training.engine.distributed import average_gradients, broadcast, mean_over_processes, settle
from training.engine.run_log import MetricsLog, peak_memory_gib
from training.engine.sharding import (
    clip_gradients,
    launched_sharding,
    load_optimizer_state,
    share,
    whole,
    whole_optimizer_state,
)
from training.models.tuning import parameter_groups

# What the scripts answer Ctrl-C with.
HOW_TO_RESUME = "with --resume_from_checkpoint last the same command goes on from the newest checkpoint"


@dataclass
class LoopArguments:
    """How long, how fast, how often."""

    output_dir: str = field(metadata={"help": "folder for checkpoints/, metrics.jsonl, tensorboard/ and final/"})
    learning_rate: float = field(default=2e-5, metadata={"help": "peak learning rate of AdamW"})
    weight_decay: float = field(
        default=0.01, metadata={"help": "decay of matrices; biases, norms and tables have none"}
    )
    adam_beta1: float = field(default=0.9, metadata={"help": "AdamW's first beta"})
    adam_beta2: float = field(default=0.999, metadata={"help": "AdamW's second beta"})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "AdamW's epsilon"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradients are clipped to this norm; 0: never"})
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = field(
        default="linear", metadata={"help": "course of the learning rate after the warm-up"}
    )
    warmup_ratio: float = field(default=0.0, metadata={"help": "share of the steps in which the learning rate rises"})
    warmup_steps: int = field(default=0, metadata={"help": "the same in steps; wins over --warmup_ratio"})
    num_train_epochs: float = field(default=1.0, metadata={"help": "times through the data"})
    max_steps: int = field(default=-1, metadata={"help": "optimiser steps; wins over --num_train_epochs if positive"})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "batches a step"})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "recompute activations: less memory, slower"})
    bf16: bool = field(default=False, metadata={"help": "compute in bfloat16 (weights stay float32)"})
    seed: int = field(default=42, metadata={"help": "of everything that is random"})
    dataloader_num_workers: int = field(default=1, metadata={"help": "processes that tokenise ahead; 0: none"})
    logging_steps: int = field(default=10, metadata={"help": "steps between two lines of metrics.jsonl"})
    report_to: Literal["tensorboard", "none"] = field(
        default="tensorboard", metadata={"help": "tracker beside metrics.jsonl"}
    )
    eval_steps: int = field(default=0, metadata={"help": "steps between two evaluations; 0: at the end only"})
    save_steps: int = field(default=500, metadata={"help": "steps between two checkpoints; there is one at the end"})
    save_total_limit: int | None = field(default=2, metadata={"help": "checkpoints that are kept"})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "'last' (from the start if there is none) or the path of a checkpoint"}
    )
    allow_reshard: bool = field(default=False, metadata={"help": "resume with another number of processes"})

    def __post_init__(self) -> None:
        for name in ("learning_rate", "logging_steps", "save_steps", "gradient_accumulation_steps"):
            if getattr(self, name) <= 0:
                raise UserError(f"--{name} {getattr(self, name)}: must be more than 0")
        if self.max_steps <= 0 and self.num_train_epochs <= 0:
            raise UserError("nothing to train: give --max_steps or --num_train_epochs more than 0")
        if self.save_total_limit is not None and self.save_total_limit < 1:
            raise UserError(f"--save_total_limit {self.save_total_limit}: must be at least 1")


Model = TypeVar("Model", bound=nn.Module)


class Batches(Protocol):
    """Batch number `index` of an endless run, as a pure function of `index`; `len` is the batches of an epoch."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...

    def describe(self) -> dict[str, Any]: ...


# Adds the gradient of one batch, times a scale, to the parameters, with DDP's all-reduce only if told so (model, batch,
# scale, synchronize), and returns metrics of this process: scalars without gradient. Those named `*_count` are summed.
AccumulateGradient = Callable[[nn.Module, Any, float, bool], dict[str, Tensor]]


class Loop:
    """Trains a model; a script says where batches come from, which parameters train, and what the objective is."""

    def __init__(self, arguments: LoopArguments) -> None:
        """Raises:
        UserError: checkpoints of another run in the output folder, or a launcher setting that the loop cannot honour.
        """
        self.arguments = arguments
        self.output_dir = Path(arguments.output_dir)
        self.sharding = launched_sharding()  # before Accelerate reads the same settings
        self.accelerator = Accelerator(
            # Without it Accelerate takes the processes of a machine that has no accelerator for runs of their own.
            cpu=not torch.accelerator.is_available(),
            mixed_precision="bf16" if arguments.bf16 else None,
            log_with=None if arguments.report_to == "none" else arguments.report_to,
            project_dir=arguments.output_dir,
            # Buffers are never trained here, and broadcasting them in every forward pass would be a second collective.
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

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks."""
        return self.accelerator.is_main_process

    def run(
        self,
        model: Model,
        batches: Batches,
        accumulate_gradient: AccumulateGradient,
        evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
        groups: list[dict[str, Any]] | None = None,
        ends_after: Callable[[int], bool] | None = None,
        rehearse: Callable[[nn.Module, torch.optim.Optimizer], None] | None = None,
        objective: nn.Module | None = None,
        settings: dict[str, Any] | None = None,
    ) -> Model:
        """Train `model` to the last step, going on from the checkpoint that the arguments name.

        Args:
            model: what trains is what requires a gradient. A checkpoint holds that and the model's buffers.
            batches: the data.
            accumulate_gradient: the objective, see `AccumulateGradient`.
            evaluate: metrics of the model at hand, called in evaluation mode on all processes.
            groups: parameter groups of the optimiser, the first at `--learning_rate`; `parameter_groups` if None.
            ends_after: called with the number of each step after it, on all processes; True ends the run there. What
                it needs to know of earlier steps belongs in buffers of the model, which come back on resume.
            rehearse: called in training mode before anything is written; it leaves model and optimiser as they are.
            objective: what trains, or is remembered, beside the model: in the groups and in the checkpoints, and not in
                what is returned. It is in evaluation mode while `rehearse` is called.
            settings: what else a resumed run must agree in, beside what `batches` describe, by its name; of JSON's
                types.

        Returns:
            The trained model, without the wrappers of distributed training; of a sharded run on the main process alone,
            the others return their share.
        """
        arguments, accelerator = self.arguments, self.accelerator
        total = self.total_steps(batches)
        if arguments.gradient_checkpointing:
            _enable_gradient_checkpointing(model)
        groups = parameter_groups(model, arguments.weight_decay) if groups is None else groups
        wrapped, groups, unsharded = self._distribute(model, groups)
        optimizer = torch.optim.AdamW(
            groups,
            lr=arguments.learning_rate,
            betas=(arguments.adam_beta1, arguments.adam_beta2),
            eps=arguments.adam_epsilon,
            fused=True,
        )
        scheduler = get_scheduler(
            arguments.lr_scheduler_type,
            optimizer,
            num_warmup_steps=arguments.warmup_steps or round(arguments.warmup_ratio * total),
            num_training_steps=total,
        )
        beside = nn.Module() if objective is None else objective.to(accelerator.device)
        broadcast(beside)
        trained = [parameter for part in (model, beside) for parameter in part.parameters() if parameter.requires_grad]
        tensors = _training_tensors(model) | {f"objective.{n}": t for n, t in _training_tensors(beside).items()}
        progress = self._resume(tensors, optimizer, scheduler, batches, settings or {})
        if progress.ended:
            total = progress.step
        if rehearse is not None:
            wrapped.train()
            beside.eval()
            rehearse(wrapped, optimizer)
        log = MetricsLog(accelerator, self.output_dir, progress.step)
        bar = tqdm(total=total, initial=progress.step, desc="training", unit="step", disable=not self.is_main)

        accumulation = arguments.gradient_accumulation_steps
        loader: DataLoader = DataLoader(
            batches,  # type: ignore[arg-type]
            batch_size=None,
            sampler=range(progress.step * accumulation, total * accumulation),
            num_workers=arguments.dataloader_num_workers,
            pin_memory=accelerator.device.type == "cuda",
            # Its own generator: a loader draws a seed for its workers when it starts, and from the global generator
            # that draw would come at another place in a resumed run.
            generator=torch.Generator(),
            worker_init_fn=_start_worker,
        )
        stream = iter(loader)
        speed = _Speed(accelerator.device)
        wrapped.train()
        beside.train()
        for step in range(progress.step + 1, total + 1):
            metrics, places = [], []
            for number in range(accumulation):
                batch = next(stream).to(accelerator.device)
                places.append(batch.locate() if hasattr(batch, "locate") else "")
                metrics.append(accumulate_gradient(wrapped, batch, 1 / accumulation, number == accumulation - 1))
            settle(wrapped)
            average_gradients(beside)
            norm = clip_gradients(trained, arguments.max_grad_norm or float("inf"))
            learning_rate = scheduler.get_last_lr()[0]
            progress.window.append(self._reduce(metrics) | {"grad_norm": norm.item()})
            self._check_finite(step, progress.window[-1], places)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            speed.add(progress.window[-1])
            progress.step, progress.bookmark = step, getattr(batch, "bookmark", None)
            progress.epoch, progress.offset = divmod(step * accumulation, len(batches))
            progress.ended = ends_after is not None and ends_after(step)
            is_last = step == total or progress.ended
            bar.update()
            bar.set_postfix(loss=f"{progress.window[-1]['loss']:.4f}")
            if step % arguments.logging_steps == 0 or is_last:
                epoch = {"epoch": step * accumulation / len(batches), "learning_rate": learning_rate}
                log.write(step, epoch | _mean(progress.window) | speed.read())
                progress.window.clear()
            if evaluate and (is_last or (arguments.eval_steps and step % arguments.eval_steps == 0)):
                with speed.paused():
                    log.write(step, self._evaluate(wrapped, evaluate))
            if step % arguments.save_steps == 0 or is_last:
                with speed.paused():
                    self._save(progress, tensors, optimizer, scheduler)
            if is_last:
                break
        bar.close()
        if unsharded is None:
            trained_model = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
        else:
            trained_model = _copy_whole(model, unsharded)
        accelerator.end_training()
        return trained_model

    def _distribute(
        self, model: Model, groups: list[dict[str, Any]]
    ) -> tuple[nn.Module, list[dict[str, Any]], Model | None]:
        """The model as DDP or FSDP has it, the groups with its parameters, and of a sharded one a copy for the end."""
        if self.sharding is None:
            return self.accelerator.prepare(model), groups, None
        unsharded = copy.deepcopy(model) if self.is_main else model
        wrapped = self.accelerator.prepare_model(model, evaluation_mode=True)  # device and precision alone
        now = self.sharding.shard(wrapped, self.accelerator.device)
        groups = [group | {"params": [now.get(p, p) for p in group["params"]]} for group in groups]
        return wrapped, groups, unsharded

    def _evaluate(self, model: nn.Module, evaluate: Callable[[nn.Module], dict[str, float]]) -> dict[str, float]:
        model.eval()
        with self.sharding.whole_weights(model) if self.sharding else nullcontext():
            values = evaluate(model)
        model.train()
        return values

    def total_steps(self, batches: Sized) -> int:
        """Optimiser steps of the whole run; `len` of `batches` is what an epoch has."""
        arguments = self.arguments
        if arguments.max_steps > 0:
            return arguments.max_steps
        return max(1, round(arguments.num_train_epochs * len(batches) / arguments.gradient_accumulation_steps))

    def _choose_checkpoint(self) -> Checkpoint | None:
        folder, wanted = self.output_dir / "checkpoints", self.arguments.resume_from_checkpoint
        if wanted is None:
            if has_checkpoints(folder):
                raise UserError(
                    f"{folder} holds checkpoints of an earlier run; go on with --resume_from_checkpoint last, or "
                    "choose another --output_dir"
                )
            return None
        # Hashes are checked on the main process alone, and all others take what it has found.
        found = [find_checkpoint(folder, wanted)] if self.is_main else [None]
        checkpoint = gather_object(found)[0]
        if self.is_main:
            where = (
                f"going on from {checkpoint.path}" if checkpoint else f"no checkpoint in {folder} yet: from the start"
            )
            print(where, file=sys.stderr)
        return checkpoint

    def _resume(
        self, own: dict[str, Tensor], optimizer: Any, scheduler: Any, batches: Batches, settings: dict[str, Any]
    ) -> Progress:
        world_size, data = self.accelerator.num_processes, batches.describe() | settings
        data["batches a step"] = self.arguments.gradient_accumulation_steps
        if self.checkpoint is None:
            return Progress(step=0, epoch=0, offset=0, world_size=world_size, data=data)
        path, progress = self.checkpoint.path, self.checkpoint.progress
        for name in progress.data | data:
            before, now = progress.data.get(name), data.get(name)
            if before != now:
                raise UserError(
                    f"{path}: was made with {name} = {before}, now it is {now}; use the same arguments and data, or "
                    "start anew in another --output_dir"
                )
        if progress.world_size != world_size and not self.arguments.allow_reshard:
            raise UserError(
                f"{path}: was made by {progress.world_size} processes, now there are {world_size}; launch as "
                "before, or add --allow_reshard (the same batches, but other dropout masks)"
            )
        tensors, state = self.checkpoint.load()
        if own.keys() != tensors.keys():
            name = sorted(own.keys() ^ tensors.keys())[0]
            raise UserError(
                f"{path}: trains other parameters than now ({name}); use the same model, --tuning and --objective"
            )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(share(tensors[name], tensor))
        load_optimizer_state(optimizer, state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        if progress.world_size == world_size:
            _set_random_state(state["random"][self.accelerator.process_index])
        else:
            set_seed(self.arguments.seed + progress.step, device_specific=True)
        progress.world_size = world_size
        if progress.bookmark is not None:
            batches.go_to(progress.bookmark)  # type: ignore[attr-defined] # who makes bookmarks reads them
        return progress

    def _save(self, progress: Progress, own: dict[str, Tensor], optimizer: Any, scheduler: Any) -> None:
        # Whole tensors, so that a checkpoint does not know how the run was split.
        tensors = {name: whole(tensor) for name, tensor in own.items()}
        state = {
            "optimizer": whole_optimizer_state(optimizer),
            "scheduler": scheduler.state_dict(),
            "random": gather_object([_random_state()]),
        }
        if self.is_main:
            keep = self.arguments.save_total_limit
            save_checkpoint(self.output_dir / "checkpoints", progress, tensors, state, keep)
        self.accelerator.wait_for_everyone()

    def _check_finite(self, step: int, metrics: dict[str, float], places: list[str]) -> None:
        """Stop all processes, before the optimiser has made a step of it, at a loss or gradient that is no number."""
        for name, words in (("loss", "loss"), ("grad_norm", "norm of the gradient")):
            if not math.isfinite(metrics[name]):
                rows = "; ".join(filter(None, gather_object(places)))
                where = f", whose batch is {rows}" if rows else ""
                raise UserError(
                    f"the {words} is {metrics[name]} at step {step}{where}; the model is as it was before that step: "
                    "lower --learning_rate or raise --warmup_steps and go on from an earlier checkpoint, or start anew"
                )

    def _reduce(self, batches: list[dict[str, Tensor]]) -> dict[str, float]:
        """Metrics of the step: means over its batches and processes, sums of the counts."""
        names = list(batches[0])
        rows = torch.stack([torch.stack([batch[name].double().cpu() for name in names]) for batch in batches])
        values = mean_over_processes(rows.mean(0).to(self.accelerator.device)).tolist()
        whole = len(batches) * self.accelerator.num_processes
        return {
            name: round(value * whole) if name.endswith("_count") else value
            for name, value in zip(names, values, strict=True)
        }


class _Speed:
    """Tokens, pairs and whatever else a step counts, a second, since the last reading."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._restart()

    def _restart(self) -> None:
        self.start, self.sums = time.perf_counter(), dict[str, float]()

    def add(self, step: dict[str, float]) -> None:
        """Add what a step has counted: its metrics `*_count`."""
        for name, value in step.items():
            if name.endswith("_count"):
                self.sums[name] = self.sums.get(name, 0.0) + value

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is not training and does not count."""
        begin = time.perf_counter()
        yield
        self.start += time.perf_counter() - begin

    def read(self) -> dict[str, float]:
        """The speed and peak memory; counting starts anew."""
        seconds = time.perf_counter() - self.start
        speeds = {f"{name.removesuffix('_count')}s_per_second": value / seconds for name, value in self.sums.items()}
        self._restart()
        return speeds | {"peak_memory_gib": peak_memory_gib(self.device)}


def _training_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What changes in training, by name: the parameters that train, and the buffers."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return trained | dict(model.named_buffers())


def _mean(window: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(step[name] for step in window) / len(window) for name in window[0]}


def _copy_whole(sharded: nn.Module, model: Model) -> Model:
    """Write the whole tensors of a sharded model into `model` if it is another one; a collective."""
    own = dict([*model.named_parameters(), *model.named_buffers()])
    for name, tensor in [*sharded.named_parameters(), *sharded.named_buffers()]:
        value = whole(tensor)
        if model is not sharded:
            own[name].data.copy_(value)
    return model


def _enable_gradient_checkpointing(model: nn.Module) -> None:
    # transformers is renaming it; the first argument is the same under both names.
    enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})  # reentrant ones lose the gradient where no input needs one, as under LoRA
    except ValueError as error:
        raise UserError(f"--gradient_checkpointing: {error}") from None


def _start_worker(worker: int) -> None:
    # The processes are the parallelism; tokenizers' threads do not survive the fork that made this one.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


@contextmanager
def restored_random_state() -> Iterator[None]:
    """Random numbers go on after the block as if nothing had been drawn inside."""
    state = _random_state()
    try:
        yield
    finally:
        _set_random_state(state)


def _random_state() -> dict[str, Any]:
    """All random generators of this process, in types that `torch.load(weights_only=True)` reads."""
    kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 (libraries draw from the global generator)
    return {
        "python": random.getstate(),
        "numpy": [kind, [int(key) for key in keys], *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
