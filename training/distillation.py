"""Distillation: a long-document embedding model learns the vectors or scores of other models.

accelerate launch training/distillation.py --config training/recipes/distillation/chunks.yaml \\
    --model_name_or_path MODEL --train_data documents.jsonl --structural_teacher chunk-mean:TEACHER:256 \\
    --output_dir runs/student
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from common.arguments import parse
from common.errors import UserError, run
from training.data.pairs.batches import PairTokenizer
from training.data.sources import Columns, Source, read_sources
from training.engine.held_out import Evaluation
from training.engine.loop import Loop
from training.engine.optimizer import parameter_groups
from training.engine.run import HOW_TO_RESUME, RunArguments, find_batch_tokens, run_training
from training.engine.training import Training
from training.models.encoder import ModelArguments, load_encoder, text_length
from training.models.identity import model_identity
from training.models.layer_choice import LayerArguments
from training.models.tuning import TuningArguments, select_parameters
from training.teachers.arguments import TeachingArguments
from training.teachers.embedding_teachers import Teacher
from training.teachers.late_chunks import LateChunks
from training.teachers.loading import load_teachers, report_mask
from training.teachers.objective import Teaching
from training.teachers.step import TaughtBatches, TeachingEvaluation, teaching_gradient


@dataclass
class DistillationArguments:
    """The texts, and the size of the batches."""

    train_data: list[str] = field(
        metadata={
            "help": "path_or_id[:weight] ...: .jsonl, .jsonl.gz, .parquet, a folder of these, or org/name[@config] on "
            "the Hub, with one text per row; the weight is the number of passes per epoch"
        }
    )
    eval_data: list[str] = field(default_factory=list, metadata={"help": "held-out texts, given in the same way"})
    text_columns: list[str] = field(
        default_factory=lambda: ["text"],
        metadata={
            "help": "the column of the texts that teachers and student read. Texts of further columns, such as "
            "translations, are read by the student only, which learns to give them the vector of the first column's "
            "text. For scores: the query and its candidates, anchor positive negative_1"
        },
    )
    max_length: int | None = field(
        default=None, metadata={"help": "tokens at which the student truncates texts; its context if not given"}
    )
    per_device_train_batch_size: int = field(
        default=64, metadata={"help": "rows per batch on one process", "within": "[1, inf)"}
    )
    batch_tokens: int = field(
        default=16384, metadata={"help": "tokens whose activations are in memory at once", "within": "[1, inf)"}
    )

    def sources(self, data: list[str], teaching: TeachingArguments) -> list[Source]:
        """Open the data as teachers and student read it.

        Args:
            data: `train_data` or `eval_data`.
            teaching: whether vectors or scores are learned.

        Returns:
            A source for each entry of `data`.

        Raises:
            UserError: the data cannot be read, or has too few columns for scores.
        """
        if teaching.scores and len(self.text_columns) < 3:
            raise UserError(
                "--text_columns: scores are of a query and at least two candidates; name three columns, such as anchor "
                "positive negative"
            )
        numbers = (teaching.score_column,) if teaching.score_column else ()
        kind = "query" if teaching.scores else "document"
        columns = Columns(tuple(self.text_columns), None, "texts", numbers=numbers)
        return [replace(source, anchor_kind=kind) for source in read_sources(data, columns)]


def main(argv: Sequence[str] | None = None) -> None:
    """Train with the command-line options `argv`; None: those of the process."""
    options = parse(
        ModelArguments,
        LayerArguments,
        DistillationArguments,
        TeachingArguments,
        TuningArguments,
        RunArguments,
        argv=argv,
    )
    model_args, layer_args, data_args, teaching_args, tuning_args, run_args = options
    data_args.batch_tokens = find_batch_tokens(run_args, data_args.batch_tokens, __file__, argv)
    loop = Loop(run_args)

    # The student, and the texts that it reads.
    encoder, tokenizer = load_encoder(model_args)
    settings = {"model_name_or_path": model_identity(encoder, tokenizer)} if loop.is_main else {}
    layer_args.apply(encoder)
    length = text_length("max_length", data_args.max_length, encoder, tokenizer)
    tokenize = PairTokenizer(tokenizer, length, length, encoder.config.prompts)
    with loop.accelerator.main_process_first():
        train = data_args.sources(data_args.train_data, teaching_args)
        held_out = data_args.sources(data_args.eval_data, teaching_args)
    size = teaching_args.late_chunk_tokens
    late_chunks = LateChunks(tokenize, size) if size is not None else None
    batches = TaughtBatches(
        train,
        tokenize,
        batch_size=data_args.per_device_train_batch_size,
        batch_tokens=data_args.batch_tokens,
        seed=run_args.seed,
        rank=loop.accelerator.process_index,
        world_size=loop.accelerator.num_processes,
        late_chunks=late_chunks,
    )

    # The teachers, and what the student learns of them.
    candidates = len(data_args.text_columns) - 1
    teachers = load_teachers(teaching_args, candidates, data_args.batch_tokens, loop.output_dir, late_chunks)
    student = select_parameters(encoder, tuning_args, token_output=teaching_args.by_tokens)
    if loop.is_main:
        teaching_args.report_frozen(encoder)
    objective = Teaching(teaching_args, student, {role: teacher.width for role, teacher in teachers.items()})
    objective.check_rows("--per_device_train_batch_size", batches.global_batch_size)
    for source in held_out:
        objective.check_rows(f"--eval_data {source.name}", min(len(source.rows), batches.global_batch_size))
    for teacher in teachers.values():
        teacher.read_all([*train, *held_out])
    if teaching_args.structural_mask and isinstance(structural := teachers.get("structural"), Teacher):
        report_mask(structural, train, loop.is_main)
    evaluations = {
        source.name: TeachingEvaluation(
            source,
            tokenize,
            objective,
            teachers,
            batch_size=batches.global_batch_size,
            batch_tokens=data_args.batch_tokens,
            late_chunks=late_chunks,
        )
        for source in held_out
    }
    for role, teacher in teachers.items():
        if role == "chunk":  # the structural teacher
            continue
        # The scores of the data have no teacher.
        settings["score_column" if teaching_args.score_column else f"{role}_teacher"] = teacher.identity
    decay = run_args.weight_decay
    training = Training(
        model=student,
        batches=batches,
        gradient=teaching_gradient(objective, teachers),
        evaluate=Evaluation(
            evaluations,
            lambda of_source, model: of_source(model, loop.device),
            lambda: [source.content(source.text_ids(source.columns)) for source in held_out],
        ),
        groups=[*teaching_args.groups(encoder, parameter_groups(student, decay)), *parameter_groups(objective, decay)],
        auxiliary=objective,
        options=options,
        settings=settings,
        tuning=tuning_args.tuning,
    )
    run_training(training, loop, run_args)


if __name__ == "__main__":
    run(main, after_interrupt=HOW_TO_RESUME)
