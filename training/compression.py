"""Compression of a LongEmbed model: a smaller student learns the self-attention of its teacher (MiniLM, MiniLMv2).

accelerate launch training/compression.py --config training/recipes/compression/default.yaml \\
    --model_name_or_path TEACHER --train_data documents.jsonl --output_dir runs/small
"""

from collections.abc import Sequence
from typing import Any

from common.arguments import parse
from common.errors import UserError, run
from training.data.documents.curriculum import RateSchedule
from training.data.documents.masking import NoMasking
from training.data.documents.reading import DocumentArguments, sequence_lengths
from training.data.documents.sequences import SequenceReader, Sequences, SpecialTokens
from training.engine.held_out import Evaluation
from training.engine.loop import Loop
from training.engine.run import HOW_TO_RESUME, RunArguments, find_batch_tokens, run_training
from training.engine.training import Training
from training.models.encoder import ModelArguments, load_encoder
from training.models.identity import model_identity
from training.models.students import StudentArguments, make_student
from training.models.tuning import TuningArguments, select_parameters
from training.objectives.document_data import document_batches
from training.teachers.relations import (
    RelationArguments,
    RelationEvaluation,
    RelationStudent,
    RelationTeacher,
    relation_gradient,
)


def main(argv: Sequence[str] | None = None) -> None:
    """Train with the command-line options `argv`; None: those of the process.

    Raises:
        UserError: a mistake in the options, the data or the models.
    """
    options = parse(
        ModelArguments,
        StudentArguments,
        DocumentArguments,
        RelationArguments,
        TuningArguments,
        RunArguments,
        argv=argv,
    )
    model_args, student_args, data_args, relation_args, tuning_args, run_args = options
    if model_args.layerdrop:
        raise UserError(f"--layerdrop {model_args.layerdrop}: the layer that learns must not be left out")
    data_args.batch_tokens = find_batch_tokens(run_args, data_args.batch_tokens, __file__, argv)
    loop = Loop(run_args)

    # Teacher and student. Hidden states are compared as they are, so neither weights its tokens in training; the
    # config, which is saved, keeps the weighting.
    model, tokenizer = load_encoder(model_args)
    student = make_student(student_args, model_args, model, tokenizer)
    relation_args.check(model.config, student.config)
    settings = {}
    if loop.is_main:
        settings["model_name_or_path"] = model_identity(model, tokenizer)
        if student_args.student_name_or_path is not None:
            settings["student_name_or_path"] = model_identity(student, tokenizer)
    student.config.layerdrop = 0.0  # the teacher may have been trained with it
    encoders: tuple[Any, Any] = (model, student)
    for encoder in encoders:
        encoder.weighs_tokens = False
    teacher = RelationTeacher(model, relation_args.teacher_layer, loop.device, loop.accelerator.autocast)

    # The documents, in sequences.
    context = min(model.config.max_position_embeddings, student.config.max_position_embeddings)
    lengths = sequence_lengths(data_args, context, "teacher and student must both read it: give a shorter one")
    reader = SequenceReader(SpecialTokens.of(tokenizer), NoMasking())
    batches, held_out = document_batches(data_args, tokenizer, reader, lengths, RateSchedule(0.0, 0.0), loop)
    evaluations = {
        source.name: RelationEvaluation(
            Sequences(source, data_args.eval_sequence_length or lengths.lengths[-1], reader),
            reader.special,
            teacher,
            relation_args,
            data_args.batch_tokens,
        )
        for source in held_out
    }
    training = Training(
        model=RelationStudent(select_parameters(student, tuning_args), relation_args),
        batches=batches,
        gradient=relation_gradient(teacher, relation_args),
        evaluate=Evaluation(
            evaluations,
            lambda of_source, model: of_source(model, loop.device),
            lambda: [source.content() for source in held_out],
        ),
        options=options,
        settings=settings,
        export=lambda trained: trained.model,
        tuning=tuning_args.tuning,
        length_option="sequence_length",
    )
    run_training(training, loop, run_args)


if __name__ == "__main__":
    run(main, after_interrupt=HOW_TO_RESUME)
