"""The teachers that the options of training/distillation.py name, and what their mask leaves of the data."""

from pathlib import Path

from common.errors import UserError
from training.data.sources import Source
from training.teachers.arguments import TeachingArguments
from training.teachers.embedding_teachers import Teacher
from training.teachers.late_chunks import ChunkTeacher, LateChunks
from training.teachers.score_teachers import ColumnScores, CrossEncoderScores
from training.teachers.step import Teachers


def load_teachers(
    teaching: TeachingArguments,
    candidates: int,
    batch_tokens: int,
    output_dir: Path,
    late_chunks: LateChunks | None = None,
) -> Teachers:
    """Return the teachers that the options name, by role: `chunk`, `structural` and `contextual`, or `score`.

    Args:
        teaching: parsed command-line options of the teachers.
        candidates: number of candidates of a query, for scores.
        batch_tokens: number of tokens of a forward pass.
        output_dir: folder of the cache of vectors, if the options name none.
        late_chunks: cuts texts into chunks that the structural teacher reads too; None: it does not.
    """
    cache = Path(teaching.teacher_cache) if teaching.teacher_cache else output_dir / "teachers.sqlite"
    if teaching.score_column is not None:
        return {"score": ColumnScores(teaching.score_column, candidates)}
    if teaching.score_teacher is not None:
        return {"score": CrossEncoderScores(teaching.score_teacher, candidates, cache, batch_tokens)}
    names = {"structural": teaching.structural_teacher, "contextual": teaching.contextual_teacher}
    teachers = {
        role: Teacher(
            f"{role}_teacher",
            name,
            cache,
            batch_tokens=batch_tokens,
            normalize=teaching.normalize_teacher,
            precision=teaching.teacher_precision,
        )
        for role, name in names.items()
        if name is not None
    }
    if late_chunks is None:
        return teachers
    # The chunks come first: a teacher's model is freed when it has read whole texts.
    return {"chunk": ChunkTeacher(teachers["structural"], late_chunks), **teachers}


def report_mask(teacher: Teacher, train: list[Source], is_main: bool) -> None:
    """Print the share of texts that `--structural_mask` keeps.

    Args:
        teacher: the structural teacher, which has read the texts.
        train: the training data.
        is_main: whether this process prints.

    Raises:
        UserError: it keeps none.
    """
    if not any(teacher.shares[source.name] for source in train):
        raise UserError(
            f"--structural_mask: {teacher.name} reads none of the texts to its end (its window is {teacher.window} "
            "tokens), and so would teach nothing; give a teacher that reads more, or leave out the mask"
        )
    if is_main:
        for source in train:
            print(f"{source.name}: --structural_mask leaves {teacher.shares[source.name]:.1%} of the texts")
