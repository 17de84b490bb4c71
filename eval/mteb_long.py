"""Evaluate models and baselines on long-document retrieval with MTEB, on data from the Hub or from a local folder.

    python eval/mteb_long.py --model runs/my/final chunk-mean:BAAI/bge-small-en-v1.5:512 bm25 \\
        --data_dir my_tasks --output_dir runs/eval

The results are MTEB's own files under `<output_dir>/results/`; the table is printed and written to
`<output_dir>/table.md`. With `--intervals` a second one says how far the scores may be chance. The same command again
repeats nothing that is finished; a killed one goes on. docs/guides/evaluate.md says what the numbers mean.
"""

from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from common.arguments import parse
from common.errors import run
from common.files import atomic_write
from eval.report.intervals import interval_markdown
from eval.report.results import as_markdown, as_table
from eval.tasks.evaluation import RetrievalArguments, evaluate_retrieval


@dataclass
class Arguments(RetrievalArguments):
    """Options of the script."""

    intervals: bool = field(
        default=False,
        metadata={
            "help": "a second table: intervals (95 percent) of the scores, and of each model's difference from the "
            "first one, by the bootstrap over queries"
        },
    )


def main() -> None:
    """Run the script."""
    (arguments,) = parse(Arguments)
    scores = evaluate_retrieval(arguments)
    intervals = interval_markdown(scores) if arguments.intervals else ""
    atomic_write(Path(arguments.output_dir, "table.md"), "\n".join(filter(None, [as_markdown(scores), intervals])))
    Console().print(as_table(scores))
    if intervals:
        Console().print(Markdown(intervals))


if __name__ == "__main__":
    run(main)
