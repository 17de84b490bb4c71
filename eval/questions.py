"""Questions with long answers as a retrieval task: does a model find the passage that answers a question?

    python eval/questions.py --data questions.jsonl.gz --judge_from 2100 --output_dir my_tasks/Questions
    python eval/mteb_long.py --model runs/my/final bm25 --data_dir my_tasks --tasks Questions \\
        --metrics hit_rate_at_1 hit_rate_at_5 mrr_at_10 --output_dir runs/questions

The rows are {question, long_answer}, one JSON object a line. The documents are the long answers of all rows, each text
once; the questions are those of the rows from `--judge_from` on, so that the rows before it may be trained on.
docs/guides/measure.md says what the numbers mean.
"""

from dataclasses import dataclass, field
from pathlib import Path

from common.arguments import parse
from common.errors import UserError, run
from common.files import atomic_folder, write_jsonl
from common.jsonl import read_text_columns


@dataclass
class Arguments:
    """Which questions, and where the task goes."""

    data: str = field(metadata={"help": ".jsonl or .jsonl.gz with the fields question and long_answer"})
    output_dir: str = field(metadata={"help": "folder of the task, such as my_tasks/Questions; replaced if there"})
    judge_from: int = field(
        default=0, metadata={"help": "the first row, counted from 0, whose question is judged; those before may train"}
    )


def write_task(arguments: Arguments) -> tuple[int, int]:
    """Write corpus, queries and qrels, all or none of them.

    A question that is there twice is one query, and each of its long answers is relevant.

    Returns:
        How many queries and how many documents there are.

    Raises:
        UserError: naming file and line of what is malformed, an empty text, or that no row is left to judge.
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
    queries = {question: f"q{number}" for number, question in enumerate(relevant)}
    with atomic_folder(arguments.output_dir) as folder:
        write_jsonl(folder / "corpus.jsonl.gz", ({"doc_id": key, "text": text} for text, key in documents.items()))
        write_jsonl(folder / "queries.jsonl.gz", ({"qid": key, "text": text} for text, key in queries.items()))
        write_jsonl(
            folder / "qrels.jsonl.gz",
            ({"qid": queries[question], "doc_id": key} for question, keys in relevant.items() for key in keys),
        )
    return len(queries), len(documents)


def main() -> None:
    """The script."""
    (arguments,) = parse(Arguments)
    queries, documents = write_task(arguments)
    print(f"{arguments.output_dir}: {queries} questions, {documents} documents")


if __name__ == "__main__":
    run(main)
