"""Make a retrieval task of questions and long answers, to see whether a model finds the answer to a question.

    python eval/questions.py --data questions.jsonl.gz --judge_from 2100 --output_dir my_tasks/Questions
    python eval/mteb_long.py --model runs/my/final bm25 --data_dir my_tasks --tasks Questions \\
        --metrics hit_rate_at_1 hit_rate_at_5 mrr_at_10 --output_dir runs/questions

The rows are {question, long_answer}, one JSON object per line. The documents are the long answers of all rows, each
text once; the queries are the questions of the rows from `--judge_from` on, so that the rows before may be trained on.
docs/guides/measure.md says what the numbers mean.
"""

from dataclasses import dataclass, field
from pathlib import Path

from common.arguments import parse
from common.errors import UserError, run
from common.files import atomic_folder
from common.jsonl import read_text_columns
from eval.tasks.task_files import write_task_files


@dataclass
class Arguments:
    """Options of the script."""

    data: str = field(metadata={"help": ".jsonl or .jsonl.gz file with the fields question and long_answer"})
    output_dir: str = field(
        metadata={"help": "folder of the task, such as my_tasks/Questions; it is replaced", "output": "folder"}
    )
    judge_from: int = field(
        default=0,
        metadata={
            "help": "first row, counted from 0, whose question is a query; those before may train",
            "within": "[0, inf)",
        },
    )


def write_question_task(arguments: Arguments) -> tuple[int, int]:
    """Write corpus, queries and qrels, all or none of them.

    A question that occurs twice is one query, and each of its long answers is relevant.

    Args:
        arguments: parsed command-line options.

    Returns:
        The number of queries and the number of documents.

    Raises:
        UserError: a row is malformed or has an empty text (file and line are named), or there is no query.
    """
    documents: dict[str, str] = {}  # long answer -> its id
    relevant: dict[str, list[str]] = {}  # question -> ids
    rows = 0
    for rows, (line, (question, answer)) in enumerate(
        read_text_columns(Path(arguments.data), "question", "long_answer"), 1
    ):
        if not question.strip() or not answer.strip():
            raise UserError(
                f"{arguments.data}, row {line}: the question or its long answer is empty; leave the row out"
            )
        identifier = documents.setdefault(answer, f"d{len(documents)}")
        if rows > arguments.judge_from and identifier not in relevant.setdefault(question, []):
            relevant[question].append(identifier)
    if not relevant:
        raise UserError(f"--judge_from {arguments.judge_from}: {arguments.data} has {rows} rows; give fewer than that")
    with atomic_folder(arguments.output_dir) as folder:
        write_task_files(
            folder,
            {identifier: answer for answer, identifier in documents.items()},
            {f"q{number}": question for number, question in enumerate(relevant)},
            ((f"q{number}", answer) for number, answers in enumerate(relevant.values()) for answer in answers),
        )
    return len(relevant), len(documents)


def main() -> None:
    """Run the script."""
    (arguments,) = parse(Arguments)
    queries, documents = write_question_task(arguments)
    print(f"{arguments.output_dir}: {queries} questions, {documents} documents")


if __name__ == "__main__":
    run(main)
