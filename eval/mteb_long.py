"""Evaluate models and baselines on long-document retrieval with MTEB, on data from the Hub or from a local folder.

    python eval/mteb_long.py --model runs/my/final chunk-mean:BAAI/bge-small-en-v1.5:512 bm25 \\
        --data_dir my_tasks --output_dir runs/eval

The results are MTEB's own files under `<output_dir>/results/`; the table is printed and written to
`<output_dir>/table.md`. The same command again repeats nothing that is finished; a killed one goes on.
docs/guides/evaluate.md says what the numbers mean.
"""

from pathlib import Path

from rich.console import Console

from common.arguments import parse
from common.errors import run
from common.files import atomic_write
from eval.report.results import as_markdown, as_table
from eval.tasks.evaluation import RetrievalArguments, evaluate_retrieval


def main() -> None:
    """Run the script."""
    (arguments,) = parse(RetrievalArguments)
    scores = evaluate_retrieval(arguments)
    atomic_write(Path(arguments.output_dir, "table.md"), as_markdown(scores))
    Console().print(as_table(scores))


if __name__ == "__main__":
    run(main)
