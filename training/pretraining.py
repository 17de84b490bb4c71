"""Continued masked-language-model training of an encoder on long documents: what new positions and patterns mean.

accelerate launch training/pretraining.py --config training/recipes/pretraining/default.yaml \\
    --model_name_or_path MODEL --train_data documents.jsonl --output_dir runs/adapted
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedTokenizerBase

from common.arguments import parse
from common.errors import UserError, run
from training.data.curriculum import Course, RateSchedule
from training.data.document_arguments import DocumentArguments, documents, sequence_lengths
from training.data.masked_batches import MaskedBatches, PieceReader, SpecialTokens, epoch_batches
from training.data.masking import Masking, MaskingArguments
from training.data.next_sentence import NextSentenceHead
from training.engine.held_out import Evaluate, by_source
from training.engine.loop import HOW_TO_RESUME, Loop, LoopArguments
from training.engine.rehearsal import Budget, BudgetArguments, chosen_batch_tokens
from training.models.adaptation import AdaptationArguments, load_masked_lm, train_new_head
from training.models.layer_choice import LayerArguments
from training.models.load_save import HubArguments, ModelArguments, save_and_push
from training.models.tuning import TuningArguments, select_parameters
from training.objectives.masked_lm import MaskedEvaluation, MaskedLanguageModel, masked_gradient
from training.objectives.span_penalty import SpanArguments, span_groups, span_penalty
from training.teachers.masked_teachers import MaskedTeacherArguments, load_masked_teachers


@dataclass(kw_only=True)
class PretrainingArguments(DocumentArguments):
    """The data and the objective."""

    next_sentence: bool = field(
        default=False, metadata={"help": "pieces become pairs of segments, and a head tells which belong together"}
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Train; `argv` is the process's own if None."""
    model_arguments, adaptation, layers, arguments, masking, teaching, tuning, spans, loop_arguments, *rest = parse(
        ModelArguments,
        AdaptationArguments,
        LayerArguments,
        PretrainingArguments,
        MaskingArguments,
        MaskedTeacherArguments,
        TuningArguments,
        SpanArguments,
        LoopArguments,
        BudgetArguments,
        HubArguments,
        argv=argv,
    )
    budget_arguments, hub = rest
    if loop_arguments.gradient_accumulation_steps > 1:
        raise UserError(
            "--gradient_accumulation_steps: give more --per_device_train_tokens instead; --batch_tokens of them are "
            "held at once"
        )
    arguments.batch_tokens = chosen_batch_tokens(
        budget_arguments, arguments.batch_tokens, __file__, argv, loop_arguments
    )
    loop = Loop(loop_arguments)
    model, head_is_new = load_masked_lm(model_arguments, adaptation)
    layers.apply(model)
    read = piece_reader(arguments, masking, model.tokenizer)
    lengths = sequence_lengths(
        arguments, model.config.max_position_embeddings, "give a longer --max_position_embeddings"
    )
    train = documents(arguments.train_data, arguments, model.tokenizer, loop)
    processes = loop.accelerator.num_processes
    steps = loop.total_steps(range(epoch_batches(train, arguments.per_device_train_tokens * processes)))
    course = Course(lengths, RateSchedule.parse(masking.mask_rate), steps)
    batches = MaskedBatches(
        train,
        read,
        course,
        batch_size=arguments.per_device_train_tokens,
        batch_tokens=arguments.batch_tokens,
        seed=loop_arguments.seed,
        rank=loop.accelerator.process_index,
        world_size=processes,
    )
    evaluate = evaluation(arguments, read, course, model.tokenizer, loop)
    selected = select_parameters(model, tuning)
    if head_is_new:
        counts = [source.token_counts(model.config.vocab_size) for source in train]
        train_new_head(model, torch.stack(counts).sum(0))
        if loop.is_main:
            print(f"{model_arguments.model_name_or_path} has no masked-language-model head: a new one is trained")
    head = None
    if arguments.next_sentence:
        head = NextSentenceHead(model.config.hidden_size, model.config.initializer_range)
    teachers = load_masked_teachers(teaching, model, model.tokenizer, max(lengths.lengths))
    with_heads = MaskedLanguageModel(selected, head, teachers)
    groups = span_groups(with_heads, spans, loop_arguments.weight_decay)
    gradient = masked_gradient(span_penalty(model, spans), teaching.weights)
    rates = course.mask_rates
    budget = Budget(
        budget_arguments,
        loop,
        with_heads,
        batches,
        arguments.batch_tokens,
        predicted_share=max(rates.first, rates.last),
        length_option="sequence_length",
    )
    with budget.answering():
        trained = loop.run(
            with_heads,
            batches,
            gradient,
            evaluate,
            groups,
            rehearse=budget.rehearsal(gradient),
            settings=teaching.describe(teachers),
        )
    if loop.is_main:
        save_and_push(trained.model, tuning, loop_arguments.output_dir, hub)


def piece_reader(
    arguments: PretrainingArguments, masking: MaskingArguments, tokenizer: PreTrainedTokenizerBase
) -> PieceReader:
    """How pieces of documents become masked texts.

    Raises:
        UserError: the tokenizer has no mask token, or none to mark a pair of segments with.
    """
    special = SpecialTokens.of(tokenizer)
    if arguments.next_sentence and not (special.before and special.after):
        raise UserError(
            "--next_sentence: the tokenizer has no special tokens before and after a text, a pair needs them"
        )
    return PieceReader(special, Masking.of(tokenizer, masking), arguments.next_sentence)


def evaluation(
    arguments: PretrainingArguments, read: PieceReader, course: Course, tokenizer: PreTrainedTokenizerBase, loop: Loop
) -> Evaluate | None:
    """The evaluation of a model on each source of `--eval_data`; None if there is none."""
    evaluations = {
        source.name: MaskedEvaluation(
            source,
            read,
            length=arguments.eval_sequence_length or course.lengths.lengths[-1],
            mask_rate=course.mask_rates.last,
            batch_tokens=arguments.batch_tokens,
        )
        for source in documents(arguments.eval_data, arguments, tokenizer, loop)
    }
    return by_source(evaluations, lambda of_source, model: of_source(model, loop.accelerator.device))


if __name__ == "__main__":
    run(main, after_interrupt=HOW_TO_RESUME)
