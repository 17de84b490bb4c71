"""Contrastive training of a LongEmbed model on pairs of texts.

accelerate launch training/contrastive.py --config training/recipes/contrastive/default.yaml \\
    --model_name_or_path MODEL --train_data pairs.jsonl --output_dir runs/mine
"""

from collections.abc import Sequence

from common.arguments import parse
from common.errors import run
from training.engine.loop import Loop
from training.engine.run import HOW_TO_RESUME, RunArguments, find_batch_tokens, run_training
from training.engine.training import Training
from training.models.encoder import ModelArguments, load_encoder
from training.models.identity import model_identity
from training.models.tuning import TuningArguments, select_parameters
from training.objectives.contrastive.arguments import ObjectiveArguments
from training.objectives.contrastive.registry import build_objective, objective_groups
from training.objectives.contrastive.words import load_words
from training.objectives.guide import load_guide
from training.objectives.pair_data import ContrastiveArguments, pair_batches, pair_retrieval, pair_tokenizer
from training.objectives.pair_step import pair_gradient
from training.objectives.second_modality import FeatureArguments, add_feature_task
from training.objectives.span_penalty import SpanArguments, span_groups, span_penalty


def main(argv: Sequence[str] | None = None) -> None:
    """Train with the command-line options `argv`; None: those of the process."""
    options = parse(
        ModelArguments,
        ContrastiveArguments,
        ObjectiveArguments,
        FeatureArguments,
        TuningArguments,
        SpanArguments,
        RunArguments,
        argv=argv,
    )
    model_args, data_args, objective_args, feature_args, tuning_args, span_args, run_args = options
    data_args.batch_tokens = find_batch_tokens(run_args, data_args.batch_tokens, __file__, argv)
    loop = Loop(run_args)

    # The encoder, the pairs that it reads, and which of its parameters train.
    encoder, tokenizer = load_encoder(model_args)
    settings = {"model_name_or_path": model_identity(encoder, tokenizer)} if loop.is_main else {}
    tokenize = pair_tokenizer(data_args, encoder, tokenizer)
    batches, held_out = pair_batches(data_args, objective_args, tokenize, loop)
    model = select_parameters(encoder, tuning_args, token_output=objective_args.by_tokens)
    if loop.is_main:
        objective_args.report_frozen(encoder)

    # What is minimised.
    objective = build_objective(objective_args, model, batches.global_batch_size)
    guide = load_guide(objective_args.guide_model, data_args.batch_tokens)
    if guide:
        settings["guide_model"] = guide.encoder.identity
    words = load_words(objective_args.teach_bm25_weight, batches)
    decay = run_args.weight_decay
    training = Training(
        model=model,
        batches=batches,
        evaluate=pair_retrieval(data_args, objective, batches, held_out, loop),
        gradient=pair_gradient(objective, guide, span_penalty(encoder, span_args), words),
        groups=[
            *objective_args.groups(encoder, span_groups(encoder, span_args, decay)),
            *objective_groups(objective, decay),
        ],
        auxiliary=objective,
        options=options,
        settings=settings,
        tuning=tuning_args.tuning,
    )
    run_training(add_feature_task(training, feature_args, loop), loop, run_args)


if __name__ == "__main__":
    run(main, after_interrupt=HOW_TO_RESUME)
