"""Contrastive training of a LongEmbed model on pairs of texts.

accelerate launch training/contrastive.py --config training/recipes/contrastive/default.yaml \\
    --model_name_or_path MODEL --train_data pairs.jsonl --output_dir runs/mine
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from common.arguments import parse
from common.errors import run
from training.engine.loop import HOW_TO_RESUME, Loop, LoopArguments
from training.engine.rehearsal import Budget, BudgetArguments, chosen_batch_tokens
from training.models.load_save import HubArguments, ModelArguments, load_encoder, save_and_push
from training.models.tuning import TuningArguments, select_parameters
from training.objectives.contrastive import ObjectiveArguments, build_objective, objective_groups
from training.objectives.pair_step import (
    ContrastiveArguments,
    load_guide,
    pair_batches,
    pair_gradient,
    pair_retrieval,
    pair_tokenizer,
)
from training.objectives.second_modality import FeatureArguments, feature_task
from training.objectives.span_penalty import SpanArguments, span_groups, span_penalty


def main(argv: Sequence[str] | None = None) -> None:
    """Train; `argv` is the process's own if None."""
    model_arguments, arguments, wanted, features, tuning, spans, loop_arguments, budget_arguments, hub = parse(
        ModelArguments,
        ContrastiveArguments,
        ObjectiveArguments,
        FeatureArguments,
        TuningArguments,
        SpanArguments,
        LoopArguments,
        BudgetArguments,
        HubArguments,
        argv=argv,
    )
    arguments.batch_tokens = chosen_batch_tokens(
        budget_arguments, arguments.batch_tokens, __file__, argv, loop_arguments
    )
    loop = Loop(loop_arguments)
    model, tokenizer = load_encoder(model_arguments)
    batches = pair_batches(arguments, wanted, pair_tokenizer(arguments, model, tokenizer), loop)
    selected = select_parameters(model, tuning)
    objective = build_objective(wanted, selected, batches.global_batch_size)
    evaluate = pair_retrieval(arguments, objective, batches, loop)
    gradient = pair_gradient(objective, load_guide(arguments, wanted), span_penalty(model, spans))
    decay = loop_arguments.weight_decay
    groups = [*span_groups(model, spans, decay), *objective_groups(objective, decay)]
    data: Any = batches
    beside: nn.Module = objective
    second_task = feature_task(features, selected)
    if second_task is not None:
        data, gradient = second_task.batches(batches, loop), second_task.before(gradient)
        beside = nn.ModuleDict({"texts": objective, "features": second_task})
        groups += second_task.groups(decay)
    budget = Budget(budget_arguments, loop, selected, data, arguments.batch_tokens)
    with budget.answering():
        trained = loop.run(
            selected, data, gradient, evaluate, groups, rehearse=budget.rehearsal(gradient), objective=beside
        )
    if loop.is_main:
        save_and_push(trained, tuning, loop_arguments.output_dir, hub)


if __name__ == "__main__":
    run(main, after_interrupt=HOW_TO_RESUME)
