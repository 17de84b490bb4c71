"""Compression of a LongEmbed model: a smaller student learns the self-attention of its teacher (MiniLM, MiniLMv2).

accelerate launch training/compression.py --config training/recipes/compression/default.yaml \\
    --model_name_or_path TEACHER --train_data documents.jsonl --output_dir runs/small
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from common.arguments import parse
from common.errors import UserError, run
from training.data.curriculum import Course, RateSchedule
from training.data.document_arguments import DocumentArguments, documents, sequence_lengths
from training.data.masked_batches import MaskedBatches, PieceReader, Pieces, SpecialTokens, epoch_batches
from training.data.masking import NoMasking
from training.engine.held_out import by_source
from training.engine.loop import HOW_TO_RESUME, Loop, LoopArguments
from training.engine.rehearsal import Budget, BudgetArguments, chosen_batch_tokens
from training.models.load_save import HubArguments, ModelArguments, load_encoder, model_identity, save_and_push
from training.models.students import StudentArguments, make_student
from training.models.tuning import TuningArguments, select_parameters
from training.teachers.relations import (
    RelationArguments,
    RelationEvaluation,
    RelationStudent,
    RelationTeacher,
    relation_gradient,
)


def main(argv: Sequence[str] | None = None) -> None:
    """Train; `argv` is the process's own if None."""
    model_arguments, student_arguments, arguments, relations, tuning, loop_arguments, budget_arguments, hub = parse(
        ModelArguments,
        StudentArguments,
        DocumentArguments,
        RelationArguments,
        TuningArguments,
        LoopArguments,
        BudgetArguments,
        HubArguments,
        argv=argv,
    )
    if model_arguments.layerdrop:
        raise UserError(f"--layerdrop {model_arguments.layerdrop}: the layer that learns must not be left out")
    if loop_arguments.gradient_accumulation_steps > 1:
        raise UserError(
            "--gradient_accumulation_steps: give more --per_device_train_tokens instead; --batch_tokens of them are "
            "held at once"
        )
    arguments.batch_tokens = chosen_batch_tokens(
        budget_arguments, arguments.batch_tokens, __file__, argv, loop_arguments
    )
    loop = Loop(loop_arguments)
    model, tokenizer = load_encoder(model_arguments)
    student = make_student(student_arguments, model_arguments, model, tokenizer)
    relations.check(model.config, student.config)
    student.config.layerdrop = 0.0  # the teacher's own, if it was trained with it
    encoders: tuple[Any, Any] = (model, student)
    for encoder in encoders:
        encoder.token_weighting = "none"  # hidden states are compared as they are; the config, which is saved, keeps it
    teacher = RelationTeacher(model, relations.teacher_layer, loop.accelerator.device, loop.accelerator.autocast)
    context = min(model.config.max_position_embeddings, student.config.max_position_embeddings)
    lengths = sequence_lengths(arguments, context, "teacher and student must both read it: give a shorter one")
    reader = PieceReader(SpecialTokens.of(tokenizer), NoMasking())
    train = documents(arguments.train_data, arguments, tokenizer, loop)
    processes = loop.accelerator.num_processes
    steps = loop.total_steps(range(epoch_batches(train, arguments.per_device_train_tokens * processes)))
    batches = MaskedBatches(
        train,
        reader,
        Course(lengths, RateSchedule(0.0, 0.0), steps),
        batch_size=arguments.per_device_train_tokens,
        batch_tokens=arguments.batch_tokens,
        seed=loop_arguments.seed,
        rank=loop.accelerator.process_index,
        world_size=processes,
    )
    held_out = {
        source.name: RelationEvaluation(
            Pieces(source, arguments.eval_sequence_length or lengths.lengths[-1], reader),
            reader.special,
            teacher,
            relations,
            arguments.batch_tokens,
        )
        for source in documents(arguments.eval_data, arguments, tokenizer, loop)
    }
    learner = RelationStudent(select_parameters(student, tuning), relations)
    evaluate = by_source(held_out, lambda of_source, model: of_source(model, loop.accelerator.device))
    gradient = relation_gradient(teacher, relations)
    budget = Budget(budget_arguments, loop, learner, batches, arguments.batch_tokens, length_option="sequence_length")
    with budget.answering():
        trained = loop.run(
            learner,
            batches,
            gradient,
            evaluate,
            rehearse=budget.rehearsal(gradient),
            settings=asdict(relations) | {"teacher": model_identity(model, tokenizer)},
        )
    if loop.is_main:
        save_and_push(trained.model, tuning, loop_arguments.output_dir, hub)


if __name__ == "__main__":
    run(main, after_interrupt=HOW_TO_RESUME)
