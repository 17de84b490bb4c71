"""Search for a layout: which sublayer of an encoder should be attention, which feed-forward, which none at all.

accelerate launch training/layout_search.py --config training/recipes/layout_search/default.yaml \\
    --model_name_or_path MODEL --train_data pairs.jsonl --output_dir runs/layout

The supernet of Mandava et al. 2020, "Pay Attention when Required" (arXiv:2009.04534): every position of the model's
layout is a Gumbel-softmax mixture of attention, feed-forward and identity (training/models/supernet.py), here under the
contrastive objective of training/contrastive.py. The schedule is the paper's, read as follows:

1. For `--weight_steps` steps the weights train alone, and the architecture (the logits of the mixtures) stays bitwise.
2. Then come cycles of `--cycle_steps` steps (the paper's epochs). In the last `--architecture_share` (20 %) of a
   cycle's steps the architecture trains and the weights stay bitwise; in the others it is the other way round. Each has
   its own learning rate and weight decay.
3. At the end of a cycle the likeliest kind of each position is compared with that at the end of the cycle before. If
   fewer than `--changed_share` (75 %) of the positions have changed, the search is over; at the latest after the last
   step of the run. The first comparison is at the end of the second cycle.

It ends with the likeliest kind of each position, identities left out: the `sublayer_pattern`. If attention is nowhere
the likeliest, the position where it is likelier than anywhere else is made attention: in an encoder without any, no
token sees another. `layout.json` in the output folder holds the pattern and what it was chosen from; `final/` holds the
model of this layout with the supernet's weights, which were trained in mixtures: train it before use.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedConfig

from common.arguments import parse
from common.errors import UserError, run
from common.files import atomic_write
from modeling_longembed import LongEmbedModel
from training.data.pair_batches import PairBatch
from training.engine.loop import AccumulateGradient, Loop, Training
from training.engine.optimizer import parameter_groups
from training.engine.run import HOW_TO_RESUME, RunArguments, find_batch_tokens, run_training
from training.models.encoder import ModelArguments, load_encoder
from training.models.supernet import KINDS, Supernet
from training.objectives.arguments import ObjectiveArguments
from training.objectives.contrastive import build_objective, objective_groups
from training.objectives.pair_step import (
    ContrastiveArguments,
    load_guide,
    pair_batches,
    pair_gradient,
    pair_retrieval,
    pair_tokenizer,
)


@dataclass
class SearchArguments:
    """The schedule of the search."""

    weight_steps: int = field(default=1000, metadata={"help": "steps at the start in which the weights train alone"})
    cycle_steps: int = field(default=500, metadata={"help": "steps of a cycle of weights, then architecture"})
    architecture_share: float = field(
        default=0.2, metadata={"help": "share of a cycle's steps in which the architecture trains"}
    )
    architecture_learning_rate: float = field(
        default=1e-2, metadata={"help": "peak learning rate of the architecture; follows --lr_scheduler_type"}
    )
    architecture_weight_decay: float = field(default=5e-4, metadata={"help": "weight decay of the architecture"})
    gumbel_temperature: float = field(
        default=1.0, metadata={"help": "of the mixtures: towards 0 each draw is nearly one kind alone"}
    )
    changed_share: float = field(
        default=0.75,
        metadata={
            "help": "the search is over once a cycle has changed the kind of fewer than this share of the positions; "
            "less is stricter"
        },
    )

    def __post_init__(self) -> None:
        for name in ("cycle_steps", "architecture_learning_rate", "gumbel_temperature"):
            if getattr(self, name) <= 0:
                raise UserError(f"--{name} {getattr(self, name)}: must be more than 0")
        for name in ("weight_steps", "architecture_weight_decay", "changed_share"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least 0")
        if not 0 < self.architecture_steps < self.cycle_steps:
            raise UserError(
                f"--architecture_share {self.architecture_share} of --cycle_steps {self.cycle_steps}: makes "
                f"{self.architecture_steps} steps; leave at least one to the architecture and one to the weights"
            )

    def check_steps(self, steps: int) -> None:
        """Check that a run is long enough for the search.

        Args:
            steps: number of steps of the run.

        Raises:
            UserError: it ends before the first cycle does.
        """
        least = self.weight_steps + self.cycle_steps
        if steps < least:
            raise UserError(
                f"the run has {steps} steps, fewer than --weight_steps {self.weight_steps} and one cycle of "
                f"--cycle_steps {self.cycle_steps}; give --max_steps of at least {least}"
            )

    @property
    def architecture_steps(self) -> int:
        """Steps of a cycle in which the architecture trains."""
        return round(self.architecture_share * self.cycle_steps)

    def trains_architecture(self, step: int) -> bool:
        """Whether step number `step`, counted from 1, trains the architecture (otherwise the weights)."""
        place = (step - self.weight_steps - 1) % self.cycle_steps
        return step > self.weight_steps and place >= self.cycle_steps - self.architecture_steps

    def ends_cycle(self, step: int) -> bool:
        """Whether step number `step` is the last one of a cycle."""
        return step > self.weight_steps and (step - self.weight_steps) % self.cycle_steps == 0


def main(argv: Sequence[str] | None = None) -> None:
    """Search with the command-line options `argv`; None: those of the process."""
    model_args, data_args, objective_args, search_args, run_args = parse(
        ModelArguments, ContrastiveArguments, ObjectiveArguments, SearchArguments, RunArguments, argv=argv
    )
    data_args.batch_tokens = find_batch_tokens(run_args, data_args.batch_tokens, __file__, argv)
    loop = Loop(run_args)
    if loop.sharding:
        raise UserError(
            "the layout search draws from weights that FSDP splits; launch with training/accelerate/ddp.yaml"
        )

    # The encoder, the pairs that it reads, and the supernet that starts from it.
    encoder, tokenizer = load_encoder(model_args)
    if not isinstance(encoder, LongEmbedModel):
        raise UserError("--trust_remote_code: the sublayers that are tried are of our own code; leave it out")
    batches = pair_batches(data_args, objective_args, pair_tokenizer(data_args, encoder, tokenizer), loop)
    search_args.check_steps(loop.total_steps(batches))
    supernet = Supernet(encoder, search_args.gumbel_temperature)

    def derive(supernet: Supernet) -> LongEmbedModel:
        found = supernet.derive()
        found.tokenizer = encoder.tokenizer
        return found

    # What is minimised, by the weights and by the architecture in turn.
    objective = build_objective(objective_args, supernet, batches.global_batch_size)
    training = Training(
        model=supernet,
        batches=batches,
        gradient=alternate(supernet, search_args, pair_gradient(objective, load_guide(data_args, objective_args))),
        evaluate=pair_retrieval(data_args, objective, batches, loop),
        groups=[
            *search_groups(supernet, search_args, run_args.weight_decay),
            *objective_groups(objective, run_args.weight_decay),
        ],
        auxiliary=objective,
        ends_after=cycle_end(supernet, search_args, report=loop.is_main),
        export=derive,
    )
    supernet = run_training(training, loop, run_args)
    if loop.is_main:
        config = supernet.derive().config
        file = Path(run_args.output_dir).absolute() / "layout.json"
        atomic_write(file, json.dumps(describe(supernet, config), indent=2) + "\n")
        print(f"sublayer_pattern: {config.sublayer_pattern}")


def search_groups(supernet: Supernet, search: SearchArguments, weight_decay: float) -> list[dict[str, Any]]:
    """Optimiser groups: the weights as in every training, and the architecture with what is its own."""
    architecture = set(supernet.logits())
    groups = parameter_groups(supernet, weight_decay)
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if parameter not in architecture]
    own = {"lr": search.architecture_learning_rate, "weight_decay": search.architecture_weight_decay}
    return [*groups, {"params": supernet.logits(), **own}]


def alternate(
    supernet: Supernet, search: SearchArguments, objective: AccumulateGradient[PairBatch]
) -> AccumulateGradient[PairBatch]:
    """The objective of a mixture drawn anew for every batch, whose gradient reaches what trains in this step alone."""
    architecture = set(supernet.logits())

    def accumulate_gradient(model: nn.Module, batch: PairBatch, scale: float, synchronize: bool) -> dict[str, Tensor]:
        supernet.draw()
        metrics = objective(model, batch, scale, synchronize)
        if synchronize:  # the last batch of the step
            trains_architecture = search.trains_architecture(int(supernet.step) + 1)
            for parameter in supernet.parameters():
                if (parameter in architecture) != trains_architecture:
                    # None, not zero: AdamW leaves a parameter without a gradient bitwise alone, and moves one whose
                    # gradient is zero by decay and momentum. And not requires_grad, which DDP does not take back.
                    parameter.grad = None
        return metrics | {"layout_entropy": torch.special.entr(supernet.probabilities()).sum(dim=1).mean()}

    return accumulate_gradient


def cycle_end(supernet: Supernet, search: SearchArguments, report: bool) -> Callable[[int], bool]:
    """What happens after each step: count it; at the end of a cycle compare the layout with that of the last cycle."""

    def ends_after(step: int) -> bool:
        supernet.step.fill_(step)
        if not search.ends_cycle(step):
            return False
        choice = supernet.probabilities().argmax(dim=1)
        changed = (choice != supernet.choice).double().mean().item()
        supernet.choice.copy_(choice)
        if report:
            layout = "".join(KINDS[kind] for kind in choice.tolist())
            tqdm.write(f"step {step}: {layout}, {changed:.0%} of the positions have changed")
        return changed < search.changed_share

    return ends_after


def describe(supernet: Supernet, config: PreTrainedConfig) -> dict[str, Any]:
    """What layout.json says: fields for a LongEmbedConfig, and under `search` where they come from."""
    names = ("sublayer_pattern", "attention_patterns", "training_attention_patterns")
    probabilities = [dict(zip(KINDS, row, strict=True)) for row in supernet.probabilities().tolist()]
    search = {"positions": supernet.kinds(), "probabilities": probabilities, "steps": int(supernet.step)}
    return {name: getattr(config, name) for name in names} | {"search": search}


if __name__ == "__main__":
    run(main, after_interrupt=HOW_TO_RESUME)
