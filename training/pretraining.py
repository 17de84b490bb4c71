"""Continued masked-language-model training on long documents, in which an encoder learns new positions and patterns.

accelerate launch training/pretraining.py --config training/recipes/pretraining/default.yaml \\
    --model_name_or_path MODEL --train_data documents.jsonl --output_dir runs/adapted
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from common.arguments import parse
from common.errors import UserError, run
from training.data.documents.curriculum import RateSchedule
from training.data.documents.masking import Masking, MaskingArguments
from training.data.documents.next_sentence import NextSentenceHead
from training.data.documents.reading import DocumentArguments, sequence_lengths
from training.data.documents.sequences import SequenceReader, SpecialTokens
from training.engine.held_out import Evaluation
from training.engine.loop import Loop
from training.engine.run import HOW_TO_RESUME, RunArguments, find_batch_tokens, run_training
from training.engine.training import Training
from training.models.adaptation import AdaptationArguments, load_masked_lm, train_new_head
from training.models.encoder import ModelArguments
from training.models.identity import model_identity
from training.models.layer_choice import LayerArguments
from training.models.tuning import TuningArguments, select_parameters
from training.objectives.document_data import document_batches
from training.objectives.masked_lm import MaskedEvaluation, MaskedLanguageModel, masked_gradient
from training.objectives.span_penalty import SpanArguments, span_groups, span_penalty
from training.teachers.masked_teachers import MaskedTeacherArguments, load_masked_teachers


@dataclass(kw_only=True)
class PretrainingArguments(DocumentArguments):
    """The documents and the objective."""

    next_sentence: bool = field(
        default=False, metadata={"help": "train on pairs of segments, and predict whether the second follows the first"}
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Train with the command-line options `argv`; None: those of the process."""
    options = parse(
        ModelArguments,
        AdaptationArguments,
        LayerArguments,
        PretrainingArguments,
        MaskingArguments,
        MaskedTeacherArguments,
        TuningArguments,
        SpanArguments,
        RunArguments,
        argv=argv,
    )
    model_args, adaptation_args, layer_args, data_args, mask_args, teacher_args, tuning_args, span_args, run_args = (
        options
    )
    data_args.batch_tokens = find_batch_tokens(run_args, data_args.batch_tokens, __file__, argv)
    loop = Loop(run_args)

    # The model, with the positions, the patterns and the layers that it is to have.
    model, head_is_new = load_masked_lm(model_args, adaptation_args)
    settings: dict[str, Any] = {}
    if loop.is_main:
        new = "head." if head_is_new else None  # whose weights are those of the seed
        settings["model_name_or_path"] = model_identity(model, model.tokenizer, without=new)
    layer_args.apply(model)

    # The documents, in sequences, masked.
    read = sequence_reader(data_args, mask_args, model.tokenizer)
    lengths = sequence_lengths(
        data_args, model.config.max_position_embeddings, "give a longer --max_position_embeddings"
    )
    mask_rates = RateSchedule.parse(mask_args.mask_rate)
    batches, held_out = document_batches(data_args, model.tokenizer, read, lengths, mask_rates, loop)
    evaluations = {
        source.name: MaskedEvaluation(
            source,
            read,
            length=data_args.eval_sequence_length or lengths.lengths[-1],
            mask_rate=mask_rates.last,
            batch_tokens=data_args.batch_tokens,
        )
        for source in held_out
    }

    # What trains: parameters of the model, and heads on it.
    selected = select_parameters(model, tuning_args)
    if head_is_new:
        counts = [source.token_counts(model.config.vocab_size) for source in batches.sources]
        train_new_head(model, torch.stack(counts).sum(0))
        if loop.is_main:
            print(f"{model_args.model_name_or_path} has no masked-language-model head: a new one is trained")
    next_sentence = None
    if data_args.next_sentence:
        next_sentence = NextSentenceHead(model.config.hidden_size, model.config.initializer_range)
    teachers = load_masked_teachers(teacher_args, model, model.tokenizer, max(lengths.lengths))
    if teachers is not None and loop.is_main:
        settings["masked_teachers"] = [model_identity(teacher, teacher.tokenizer) for teacher in teachers.models]
    with_heads = MaskedLanguageModel(selected, next_sentence, teachers)

    training = Training(
        model=with_heads,
        batches=batches,
        gradient=masked_gradient(span_penalty(model, span_args), teacher_args.weights, teachers),
        evaluate=Evaluation(
            evaluations,
            lambda of_source, model: of_source(model, loop.device),
            lambda: [source.content() for source in held_out],
        ),
        groups=span_groups(with_heads, span_args, run_args.weight_decay),
        options=options,
        settings=settings,
        export=lambda trained: trained.model,
        tuning=tuning_args.tuning,
        length_option="sequence_length",
    )
    run_training(training, loop, run_args)


def sequence_reader(
    data_args: PretrainingArguments, mask_args: MaskingArguments, tokenizer: PreTrainedTokenizerBase
) -> SequenceReader:
    """Return the reader of masked sequences.

    Args:
        data_args: whether texts are pairs of segments.
        mask_args: what is masked.
        tokenizer: tokenizer of the model.

    Raises:
        UserError: the tokenizer has no mask token, or no special tokens around a pair of segments.
    """
    special = SpecialTokens.of(tokenizer)
    if data_args.next_sentence and not (special.before and special.after):
        raise UserError(
            "--next_sentence: the tokenizer has no special tokens before and after a text, a pair needs them"
        )
    return SequenceReader(special, Masking.of(tokenizer, mask_args), data_args.next_sentence)


if __name__ == "__main__":
    run(main, after_interrupt=HOW_TO_RESUME)
