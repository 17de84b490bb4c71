"""Training data and retrieval tasks of experiments/findings.py, made from the user's files."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common.encoders.model_folder import ModelFolder
from common.errors import UserError
from common.files import atomic_folder, sha256_file, write_jsonl
from common.jsonl import read_text_columns
from common.sentences import SENTENCE_END
from eval import questions
from eval.tasks.task_files import write_task_files
from experiments.studies.training_runs import check_stamp, run_script

ROOT = Path(__file__).resolve().parents[2]
MINE = ROOT / "training" / "mine_negatives.py"
SENTENCE_WORDS = range(6, 41)  # words of a sentence that is trained on


@dataclass(kw_only=True)
class DataArguments:
    """Files of the user. A finding needs only the data that its rows and its evaluations name."""

    output_dir: str = field(
        metadata={
            "help": "folder with one sub-folder for each finding, and of plane.png",
            "output": "folder",
        }
    )
    teacher: str | None = field(default=None, metadata={"help": "an encoder that guides and that mines hard negatives"})
    questions: str | None = field(default=None, metadata={"help": "JSON lines {question, long_answer, title}"})
    judge_from: int = field(
        default=2100, metadata={"help": "first row of --questions that is evaluated; those before are trained on"}
    )
    titles: str | None = field(
        default=None,
        metadata={"help": "JSON lines {anchor, positive}: titles and abstracts, from which sentences are drawn too"},
    )
    judged_titles: int = field(default=2000, metadata={"help": "rows at the end of --titles that are evaluated"})
    sentences: int = field(default=8192, metadata={"help": "number of sentences"})
    nli: str | None = field(default=None, metadata={"help": "JSON lines {premise, hypothesis, label}"})
    documents: str | None = field(default=None, metadata={"help": "JSON lines {title, abstract, body}, long documents"})
    document_words: int = field(
        default=900, metadata={"help": "minimum words of a body; shorter documents are left out"}
    )
    judged_documents: int = field(
        default=150, metadata={"help": "number of --documents, drawn at random, that are evaluated and not trained on"}
    )

    @property
    def data(self) -> Path:
        """Folder of the data that is made from the user's files."""
        return Path(self.output_dir, "data")

    def given(self, option: str) -> Path:
        """Return the file of an option.

        Args:
            option: its name.

        Raises:
            UserError: it was not given.
        """
        if getattr(self, option) is None:
            raise UserError(f"--{option} is needed for one of the findings; give it, or choose others with --findings")
        return Path(getattr(self, option))


def write_questions(arguments: DataArguments, path: Path) -> None:
    """Write pairs of questions and long answers with the titles of their pages; the other rows are a task."""
    source = arguments.given("questions")
    questions.write_question_task(
        questions.Arguments(str(source), str(arguments.data / "Questions"), arguments.judge_from)
    )
    rows = [values for _, values in read_text_columns(source, "question", "long_answer", "title")][
        : arguments.judge_from
    ]
    write_jsonl(path, ({"anchor": a, "positive": b, "label": c} for a, b, c in rows))


def write_titles(arguments: DataArguments, path: Path) -> None:
    """Write pairs of titles and abstracts; the task: every fourth of the last titles finds its abstract."""
    rows = [values for _, values in read_text_columns(arguments.given("titles"), "anchor", "positive")]
    held_out = rows[-arguments.judged_titles :]
    write_pair_task(arguments.data / "Titles", held_out, range(0, len(held_out), 4))
    write_training(path, [{"anchor": a, "positive": b} for a, b in rows[: -arguments.judged_titles]], "titles")


def write_sentences(arguments: DataArguments, path: Path) -> None:
    """Write a random sample of the sentences of the abstracts that are not evaluated, each once."""
    rows = [abstract for _, (abstract,) in read_text_columns(arguments.given("titles"), "positive")]
    found: dict[str, None] = {}
    for abstract in rows[: -arguments.judged_titles]:
        found.update(dict.fromkeys(s for s in SENTENCE_END.split(abstract) if len(s.split()) in SENTENCE_WORDS))
    drawn = np.random.default_rng(0).permutation(len(found))[: arguments.sentences]
    sentences = list(found)
    write_training(path, [{"anchor": sentences[number]} for number in drawn], "titles")


def write_documents(arguments: DataArguments, path: Path) -> None:
    """Write long documents; the task: the abstracts of a random sample find their bodies."""
    rows = [values for _, values in read_text_columns(arguments.given("documents"), "title", "abstract", "body")]
    rows = [row for row in rows if row[0] and row[1].strip() and len(row[2].split()) >= arguments.document_words]
    rows = [rows[number] for number in np.random.default_rng(0).permutation(len(rows))]
    held_out, trained = rows[: arguments.judged_documents], rows[arguments.judged_documents :]
    write_pair_task(arguments.data / "Documents", [row[1:] for row in held_out], range(len(held_out)))
    write_training(path, [{"title": t, "abstract": a, "body": b} for t, a, b in trained], "documents")


def write_training(path: Path, rows: Sequence[dict[str, str]], option: str) -> None:
    """Write training data.

    Args:
        path: the file.
        rows: what is left after the evaluated rows have been taken out.
        option: with which the user gave the file.

    Raises:
        UserError: there is no row.
    """
    if not rows:
        raise UserError(
            f"--{option} has no row to train on, because all are evaluated; give more, or evaluate fewer "
            f"(--judged_{option})"
        )
    write_jsonl(path, rows)


def write_pair_task(folder: Path, pairs: Sequence[tuple[str, ...]], queries: Sequence[int]) -> None:
    """Write a retrieval task of pairs.

    Args:
        folder: of the task.
        pairs: (anchor, positive); the positives are the documents.
        queries: indices of the pairs whose anchors are queries.
    """
    with atomic_folder(folder) as temporary:
        write_task_files(
            temporary,
            {f"d{number}": pair[1] for number, pair in enumerate(pairs)},
            {f"q{number}": pairs[number][0] for number in queries},
            ((f"q{number}", f"d{number}") for number in queries),
        )


def write_mined(model: str | None, arguments: DataArguments, path: Path) -> None:
    """Write the questions with a hard negative: the nearest passage that scores clearly below the right one.

    Args:
        model: that scores; None: the teacher.
        arguments: parsed command-line options.
        path: the file.
    """
    teacher = model or str(arguments.given("teacher"))
    options = ["--model", teacher, "--data", str(data_file("questions", arguments)), "--output", str(path)]
    options += ["--num_negatives", "1", "--relative_margin", "0.05"]
    run_script(MINE, options)


DATA: dict[str, Callable[[DataArguments, Path], None]] = {
    "questions": write_questions,
    "titles": write_titles,
    "sentences": write_sentences,
    "documents": write_documents,
    "mined_by_teacher": lambda arguments, path: write_mined(None, arguments, path),
    "mined_by_bm25": lambda arguments, path: write_mined("bm25", arguments, path),
}

# The options that the data depend on.
MADE_FROM = {
    "questions": ("questions", "judge_from"),
    "titles": ("titles", "judged_titles"),
    "sentences": ("titles", "judged_titles", "sentences"),
    "documents": ("documents", "document_words", "judged_documents"),
    "mined_by_teacher": ("questions", "judge_from", "teacher"),
    "mined_by_bm25": ("questions", "judge_from"),
}


def data_file(name: str, arguments: DataArguments) -> Path:
    """Return a file of training data, which is made if it does not exist.

    Args:
        name: a name of `DATA`, or an option with a file that is trained on as it is.
        arguments: parsed command-line options.

    Raises:
        UserError: an option is missing, its file is malformed or too short, or an existing file was made from others.
    """
    if name not in DATA:
        return arguments.given(name)
    path = arguments.data / f"{name}.jsonl"
    stamp = path.with_suffix(".made_by.json")
    made_from = {option: _content(arguments, option) for option in MADE_FROM[name]}
    if not (path.exists() and stamp.exists()):
        path.unlink(missing_ok=True)
        stamp.unlink(missing_ok=True)
        check_stamp(stamp, made_from, path)  # before the file, which a kill would leave without one
        DATA[name](arguments, path)
    check_stamp(stamp, made_from, path)
    return path


def _content(arguments: DataArguments, option: str) -> Any:
    """Return the value of an option; of a file the hash of its content, of the teacher its revision."""
    value = getattr(arguments, option)
    if not isinstance(value, str) and value is not None:
        return value
    given = arguments.given(option)
    if option == "teacher":
        return ModelFolder.find(str(given)).revision
    if not given.is_file():
        raise UserError(f"--{option} {given}: there is no such file")
    return sha256_file(given)
