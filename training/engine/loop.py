"""The loop that all trainings share: devices, precision, accumulation, logging, checkpoints, exact resume.

`Training` (training/engine/training.py) says what is trained; `Loop` trains it. `Loop.train_step` is one step of the
optimiser; `Loop.run` is everything around the steps. Scripts call `training.engine.run.run_training`, which adds what
precedes and follows them.
"""

import math
import os
import sys
from collections.abc import Callable, Iterator, Sized
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
from accelerate.utils import gather_object, set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from common.conditions import Options, default_of
from common.errors import UserError
from training.engine.checkpoints.folders import Progress, has_checkpoints, remove_later, remove_old, save_checkpoint
from training.engine.checkpoints.random_state import set_random_state
from training.engine.checkpoints.resuming import Settings, change_settings, choose_checkpoint
from training.engine.held_out import Evaluation
from training.engine.loop_arguments import LoopArguments
from training.engine.processes.distributed import average_gradients, mean_over_processes, settle
from training.engine.processes.sharding import clip_gradients, launched_sharding
from training.engine.run_log import MetricsLog, Throughput
from training.engine.schedule import PLATEAU, check_metric
from training.engine.state import State, prepare
from training.engine.training import AccumulateGradient, AnyBatch, AnyModel, Batches, Stream, Training


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
        self.checkpoint = choose_checkpoint(
            self.output_dir / "checkpoints", arguments.resume_from_checkpoint, self.is_main
        )
        progress = self.checkpoint.progress if self.checkpoint else None
        self.done = (
            (progress.step, progress.batches_done(arguments.gradient_accumulation_steps)) if progress else (0, 0)
        )
        self.saved = self.done[0]
        self._options: list[Any] = [arguments]

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
        self._options.extend(training.options)
        total = self.total_steps(batches)
        check_metric(arguments, training.evaluate, arguments.eval_steps)
        state = prepare(training, arguments, self.accelerator, self.sharding, total)
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
                learning_rate = state.schedule.learning_rate
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
                        state.schedule.evaluated(evaluation)
                if step % arguments.save_steps == 0 or is_last:
                    with throughput.paused():
                        self._save(state, progress)
                if is_last:
                    break
        if self.is_main:  # once more: the process may have been killed between its last checkpoint and this
            remove_old(self.output_dir / "checkpoints", progress.step, arguments.save_total_limit)
        if state.final is None:
            trained = self.accelerator.unwrap_model(state.model, keep_fp32_wrapper=False)
        else:
            trained = state.whole_model(training.model)
        self.accelerator.end_training()
        return trained

    def train_step(
        self, step: int, state: State, gradient: AccumulateGradient[AnyBatch], stream: Iterator[AnyBatch]
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
        self._check_finite(step, metrics, places)
        state.optimizer.step()
        state.schedule.step()
        state.optimizer.zero_grad()
        return metrics, getattr(batch, "bookmark", None)

    def _check_finite(self, step: int, metrics: dict[str, float], places: list[str]) -> None:
        """Raise on all processes, before the optimiser makes a step of it, if loss or gradient is not finite."""
        for name, words in (("loss", "loss"), ("grad_norm", "norm of the gradient")):
            if not math.isfinite(metrics[name]):
                rows = "; ".join(filter(None, gather_object(places)))
                where = f", whose batch is {rows}" if rows else ""
                raise UserError(f"the {words} is {metrics[name]} at step {step}{where}; {self._after_divergence()}")

    def _after_divergence(self) -> str:
        """Return what to do after a loss that is not finite: words that can be appended to the same command."""
        known = Options(self._options)
        rates = {
            name: value
            for name, value in known.values.items()
            if name == "learning_rate"
            or (name.endswith("_learning_rate") and value not in (None, default_of(known.fields[name])))
        }
        lower = " ".join(f"--{name} {value / 2:g}" for name, value in rates.items())
        if not has_checkpoints(self.output_dir / "checkpoints"):
            return f"there is no checkpoint yet: start anew with {lower}, or with more --warmup_steps"
        permission = change_settings(self.arguments.change_settings, list(rates))
        return (
            f"go on from the last checkpoint with a lower learning rate, the same command and --resume_from_checkpoint "
            f"last {permission} {lower}, or start anew in another --output_dir"
        )

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

    def _evaluate(self, model: nn.Module, evaluate: Evaluation) -> dict[str, float]:
        model.eval()
        with self.sharding.whole_weights(model) if self.sharding else nullcontext():
            values = evaluate(model)
        model.train()
        return values

    def _resume(self, state: State, training: Training[AnyModel, AnyBatch]) -> Progress:
        """Restore what the checkpoint holds, if there is one, and return where the run is."""
        arguments, world_size = self.arguments, self.accelerator.num_processes
        settings = Settings(training.options, *self._described(training))
        settings.check_names(arguments.change_settings)
        if self.checkpoint is None:
            return Progress(step=0, batches=0, world_size=world_size, settings=settings.values)
        path, progress = self.checkpoint.path, self.checkpoint.progress
        changed = settings.changes(progress, path, arguments.change_settings)
        if progress.settings is None and self.is_main:
            print(
                f"{path}: an earlier version made it and recorded no settings: they are not compared", file=sys.stderr
            )
        if not arguments.allow_reshard and world_size != progress.world_size:
            raise UserError(
                f"{path}: was made by {progress.world_size} processes, now there are {world_size}; launch as before, "
                "or add --allow_reshard (the same batches, but other dropout masks)"
            )
        tensors, stored = self.checkpoint.load()
        state.restore(tensors, stored, path)
        if progress.world_size == world_size and "seed" not in changed:
            set_random_state(stored["random"][self.accelerator.process_index])
        else:
            set_seed(arguments.seed + progress.step, device_specific=True)
        progress.world_size, progress.settings = world_size, settings.values
        if progress.bookmark is not None:
            assert isinstance(training.batches, Stream)
            training.batches.go_to(progress.bookmark)
        return progress

    def _described(self, training: Training[AnyModel, AnyBatch]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what options stand for, and those of the batches; the main process alone computes it; a collective."""
        others, of_batches = dict(training.settings), dict[str, Any]()
        if self.is_main:
            of_batches = training.batches.describe()
            if training.evaluate and self.arguments.lr_scheduler_type == PLATEAU:  # what is held out matters
                others["eval_data"] = list(training.evaluate.contents())
        return gather_object([(others, of_batches)])[0]

    def _save(self, state: State, progress: Progress) -> None:
        tensors, stored = state.stored()
        if self.is_main:
            folder = self.output_dir / "checkpoints"
            remove_later(folder, self.saved)
            save_checkpoint(folder, progress, tensors, stored)
            remove_old(folder, progress.step, self.arguments.save_total_limit)
        self.saved = progress.step
        self.accelerator.wait_for_everyone()

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


def _mean(window: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(step[name] for step in window) / len(window) for name in window[0]}


def _start_worker(worker: int) -> None:
    # The worker processes are the parallelism, and the threads of tokenizers do not survive the fork that made them.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
