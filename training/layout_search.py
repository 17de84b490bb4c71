"""Search for a layout: which sublayer of an encoder should be attention, which feed-forward, which none at all.

accelerate launch training/layout_search.py --config training/recipes/layout_search/default.yaml \\
    --model_name_or_path MODEL --train_data pairs.jsonl --output_dir runs/layout

The supernet of Mandava et al. 2020, "Pay Attention when Required" (arXiv:2009.04534): every position of the model's
layout is a Gumbel-softmax mixture of attention, feed-forward and identity (training/models/supernet.py), here under the
contrastive objective of training/contrastive.py. training/objectives/layout_search_step.py describes the schedule,
which is the paper's.

The result is the likeliest kind of each position without the identities: the `sublayer_pattern`. If attention is the
likeliest kind nowhere, the position where it is most likely becomes attention, because without any attention no token
sees another. `layout.json` in the output folder holds the pattern and the probabilities; `final/` holds the model of
this layout with the weights of the supernet. They were trained in mixtures: train the model before use.
"""

from collections.abc import Sequence
from pathlib import Path

from common.arguments import parse
from common.errors import UserError, run
from modeling_longembed import LongEmbedModel
from training.engine.loop import Loop
from training.engine.run import HOW_TO_RESUME, RunArguments, find_batch_tokens, run_training
from training.engine.training import Training
from training.models.encoder import ModelArguments, load_encoder
from training.models.identity import model_identity
from training.models.supernet import Supernet
from training.models.tuning import TuningArguments, select_parameters
from training.objectives.contrastive.arguments import ObjectiveArguments
from training.objectives.contrastive.registry import build_objective, objective_groups
from training.objectives.contrastive.words import load_words
from training.objectives.guide import load_guide
from training.objectives.layout_search_step import SearchArguments, alternate, cycle_end, search_groups, write_layout
from training.objectives.pair_data import ContrastiveArguments, pair_batches, pair_retrieval, pair_tokenizer
from training.objectives.pair_step import pair_gradient


def main(argv: Sequence[str] | None = None) -> None:
    """Search with the command-line options `argv`; None: those of the process.

    Raises:
        UserError: a mistake in the options, the data or the model.
    """
    options = parse(ModelArguments, ContrastiveArguments, ObjectiveArguments, SearchArguments, RunArguments, argv=argv)
    model_args, data_args, objective_args, search_args, run_args = options
    data_args.batch_tokens = find_batch_tokens(run_args, data_args.batch_tokens, __file__, argv)
    loop = Loop(run_args)
    if loop.sharding:
        raise UserError(
            "the layout search draws from weights that FSDP splits; launch with training/accelerate/ddp.yaml"
        )

    # The encoder, the pairs that it reads, and the supernet that starts from it.
    encoder, tokenizer = load_encoder(model_args)
    settings = {"model_name_or_path": model_identity(encoder, tokenizer)} if loop.is_main else {}
    if not isinstance(encoder, LongEmbedModel):
        raise UserError("--trust_remote_code: the sublayers that are tried are of our own code; leave it out")
    tokenize = pair_tokenizer(data_args, encoder, tokenizer)
    batches, held_out = pair_batches(data_args, objective_args, tokenize, loop)
    search_args.check_steps(loop.total_steps(batches))
    supernet = Supernet(encoder, search_args.gumbel_temperature)
    select_parameters(supernet, TuningArguments(), token_output=objective_args.by_tokens)

    def derive(supernet: Supernet) -> LongEmbedModel:
        found = supernet.derive()
        found.tokenizer = encoder.tokenizer
        return found

    # What is minimised, by the weights and by the architecture in turn.
    objective = build_objective(objective_args, supernet, batches.global_batch_size)
    guide = load_guide(objective_args.guide_model, data_args.batch_tokens)
    if guide:
        settings["guide_model"] = guide.encoder.identity
    words = load_words(objective_args.teach_bm25_weight, batches)
    training = Training(
        model=supernet,
        batches=batches,
        gradient=alternate(supernet, search_args, pair_gradient(objective, guide, words=words)),
        evaluate=pair_retrieval(data_args, objective, batches, held_out, loop),
        groups=[
            *objective_args.groups(supernet, search_groups(supernet, search_args, run_args.weight_decay)),
            *objective_groups(objective, run_args.weight_decay),
        ],
        auxiliary=objective,
        options=options,
        settings=settings,
        ends_after=cycle_end(supernet, search_args, report=loop.is_main),
        export=derive,
    )
    supernet = run_training(training, loop, run_args)
    if loop.is_main:
        pattern = write_layout(supernet, Path(run_args.output_dir).absolute())
        print(f"sublayer_pattern: {pattern}")


if __name__ == "__main__":
    run(main, after_interrupt=HOW_TO_RESUME)
