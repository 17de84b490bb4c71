"""Evaluate models on semantic textual similarity: whether their cosines order pairs of sentences as people do.

    python eval/sts.py --model runs/my/final sentence-transformers/all-MiniLM-L6-v2 --data_dir sts --output_dir runs/sts

The score is Spearman's correlation of cosines and human scores, times 100, over all pairs of a task at once, as in
SimCSE (Gao et al. 2021) and MTEB. MTEB computes it, and its files lie under `<output_dir>/results/`. The table also has
alignment and uniformity, the two terms of a contrastive loss. docs/guides/measure.md says what the numbers mean.
"""

from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Literal

from rich.console import Console
from rich.markdown import Markdown

from common.arguments import parse
from common.encoders.model_spec import ModelSpec
from common.errors import UserError, run
from common.files import atomic_write
from eval.report.markdown import markdown_table
from eval.tasks.evaluation import EvaluationArguments, evaluate_tasks
from eval.tasks.similarity import TASKS, get_tasks

METRICS = {"all": "cosine_spearman", "mean": "subset_mean_spearman"}  # --aggregation -> name in MTEB's results


@dataclass
class Arguments(EvaluationArguments):
    """Options of the script."""

    model: list[str] = field(
        metadata={"help": "models, as folders or Hub ids; baselines: truncate:PATH:N, chunk-mean:PATH:N"}
    )
    tasks: list[str] = field(
        default_factory=list,
        metadata={"help": f"{' '.join(TASKS)}, or names of files of data_dir; default: all of them"},
    )
    data_dir: str | None = field(
        default=None,
        metadata={
            "help": "folder of <task>.jsonl or .jsonl.gz {sentence1, sentence2, score}; default: data from the Hub"
        },
    )
    aggregation: Literal["all", "mean"] = field(
        default="all",
        metadata={"help": "all: the correlation over all pairs of a task; mean: its mean over the values of `subset`"},
    )


def evaluate_similarity(arguments: Arguments) -> str:
    """Evaluate models; what has been evaluated before is read from the results.

    Args:
        arguments: parsed command-line options.

    Returns:
        The table in Markdown: correlations times 100 and their mean over the tasks, mean alignment and uniformity.

    Raises:
        UserError: a model has no single vector of a text, or `evaluate_tasks` raises.
    """
    for name in arguments.model:
        if not ModelSpec.parse(name).has_one_vector:
            raise UserError(f"--model {name}: has no single vector of a text, and so no cosines; leave it out")
    tasks = get_tasks(arguments.tasks, arguments.data_dir)
    metrics = [METRICS[arguments.aggregation], "alignment", "uniformity"]
    scores = evaluate_tasks(arguments, tasks, metrics)
    rows = []
    for model in dict.fromkeys(score.model for score in scores):
        spearman, aligned, uniform = (
            [score.value for score in scores if (score.model, score.metric) == (model, metric)] for metric in metrics
        )
        correlations = [f"{value:.2f}" for value in (*spearman, mean(spearman))]
        rows.append([model, *correlations, *(f"{mean(values) / 100:.3f}" for values in (aligned, uniform))])
    return markdown_table(["model", *(task.metadata.name for task in tasks), "mean", "alignment", "uniformity"], rows)


def main() -> None:
    """Run the script."""
    (arguments,) = parse(Arguments)
    table = evaluate_similarity(arguments)
    atomic_write(Path(arguments.output_dir, "table.md"), table)
    Console().print(Markdown(table))


if __name__ == "__main__":
    run(main)
