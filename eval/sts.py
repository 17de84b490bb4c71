"""Judge models on semantic textual similarity: do their cosines order pairs of sentences as people do?

    python eval/sts.py --model runs/my/final sentence-transformers/all-MiniLM-L6-v2 --data_dir sts --output_dir runs/sts

Spearman's correlation of cosine and human score, times 100, over all pairs of a task at once, as SimCSE (Gao et al.
2021) and MTEB have it; MTEB computes it, and its files lie under `<output_dir>/results/`. The table also has what a
contrastive loss does taken apart, alignment and uniformity. docs/guides/measure.md says what the numbers mean.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import mteb
import numpy as np
import torch
from datasets import Dataset
from mteb._create_dataloaders import create_dataloader
from mteb.abstasks import AbsTask
from mteb.abstasks.sts import AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.types import PromptType
from rich.console import Console
from rich.markdown import Markdown
from scipy.stats import spearmanr
from torch.nn.functional import normalize

from common.alignment import alignment, uniformity
from common.arguments import parse
from common.errors import UserError, run
from common.files import atomic_write
from common.jsonl import read_jsonl, text_or_id
from eval import mteb_long

# SimCSE's seven. https://arxiv.org/abs/2104.08821, table 5
TASKS = ("STS12", "STS13", "STS14", "STS15", "STS16", "STSBenchmark", "SICK-R")
SENTENCES = ("sentence1", "sentence2")
CLOSE = 4  # of 5: pairs with a higher score count as positives of the alignment, as in SimCSE's analysis
METRICS = {"all": "cosine_spearman", "mean": "subset_mean_spearman"}


@dataclass
class Arguments(mteb_long.ModelArguments):
    """And on what."""

    tasks: list[str] = field(
        default_factory=list,
        metadata={"help": f"{' '.join(TASKS)}, or names of files of data_dir; default: all that are there"},
    )
    data_dir: str | None = field(
        default=None,
        metadata={"help": "folder of <task>.jsonl or .jsonl.gz {sentence1, sentence2, score}; default: the Hub's data"},
    )
    aggregation: Literal["all", "mean"] = field(
        default="all",
        metadata={"help": "all: the correlation over all pairs of a task; mean: its mean over the values of `subset`"},
    )


class SimilarityTask(AbsTaskSTS):
    """MTEB's task, whose results also say what MTEB leaves out.

    `subset_mean_spearman`, `alignment` (of the pairs scored above 4) and `uniformity` (of all sentences). Sentences are
    read as documents: both sides alike.
    """

    input1_prompt_type = input2_prompt_type = PromptType("document")

    def _evaluate_subset(self, model: Any, data_split: Dataset, *, encode_kwargs: Any, **kwargs: Any) -> Any:
        first, second = (self._unit_vectors(model, data_split[column], encode_kwargs) for column in SENTENCES)
        cosines = (first * second).sum(dim=1).numpy()
        name, model_name = self.metadata.name, model.mteb_model_meta.name
        if not np.isfinite(cosines).all():
            raise UserError(f"{model_name} gives vectors on {name} that are zero, NaN or infinite: it has no cosines")
        if np.ptp(cosines) < 1e-6:
            raise UserError(
                f"{model_name} gives all pairs of {name} one similarity, so that they have no order: it has collapsed"
            )
        # The vectors are in the cache by now: nothing is encoded twice.
        scores = dict(super()._evaluate_subset(model, data_split, encode_kwargs=encode_kwargs, **kwargs))
        gold = np.asarray(data_split["score"])
        # A task without subsets is its only one.
        subsets = np.asarray(data_split["subset"] if "subset" in data_split.column_names else [""] * len(gold))
        parts = [subsets == subset for subset in np.unique(subsets)]
        scores["subset_mean_spearman"] = mean(float(spearmanr(gold[part], cosines[part])[0]) for part in parts)
        close = torch.from_numpy(gold > CLOSE)
        scores["alignment"] = float(alignment(first[close], second[close]))  # NaN without such pairs
        scores["uniformity"] = float(uniformity(torch.cat([first, second]).unique(dim=0)))
        return scores

    def _unit_vectors(self, model: Any, texts: Sequence[str], encode_kwargs: Any) -> torch.Tensor:
        inputs: Any = create_dataloader(
            Dataset.from_dict({"text": list(texts)}), task_metadata=self.metadata, **encode_kwargs
        )
        vectors = model.encode(inputs, task_metadata=self.metadata, prompt_type=PromptType.document, **encode_kwargs)
        return normalize(torch.from_numpy(vectors), dim=1)


def get_tasks(names: Sequence[str], data_dir: str | None) -> list[AbsTask]:
    """The tasks of these names.

    Args:
        names: MTEB's names, or of files of `data_dir` without their suffix; case and hyphens do not matter. Empty: all.
        data_dir: the folder of files; None: the Hub's data.

    Raises:
        UserError: a task that is not there, or a file that is not as it must be.
    """
    if data_dir is None:
        return [_hub_task(name) for name in names or TASKS]
    folder = Path(data_dir)
    files = {_task_name(path): path for path in sorted(folder.glob("*.jsonl*")) if path.suffix in (".jsonl", ".gz")}
    if not files:
        raise UserError(f"--data_dir {data_dir} holds no .jsonl or .jsonl.gz file; give the folder of the pairs")
    chosen = [_canonical(name) for name in names] or list(files)
    for name in chosen:
        if name not in files:
            raise UserError(f"{folder} has no task {name}; it has {', '.join(files)}")
    return [local_task(name, files[name]) for name in chosen]


def local_task(name: str, path: Path) -> AbsTask:
    """A file of pairs as an MTEB task; the hash of its rows is the revision, so that nobody takes it for official.

    Raises:
        UserError: naming file and line of what is missing or malformed, or scores of which there is no order.
    """
    rows = [_row(row, f"{path}, row {number}") for number, row in read_jsonl(path, *SENTENCES, "score")]
    if len({row["score"] for row in rows}) < 2:
        raise UserError(f"{path}: its {len(rows)} pairs have no two different scores, so that they have no order")
    revision = f"local-{hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:40]}"
    changes: dict[str, Any] = {"dataset": {"path": f"local/{path.name}", "revision": revision}, "eval_splits": ["test"]}
    try:
        metadata = mteb.get_task(name).metadata.model_copy(update=changes)
    except KeyError:
        metadata = TaskMetadata(
            name=name,
            description=f"The pairs of the local file {path.name}.",
            type="STS",
            category="t2t",
            eval_langs=["eng-Latn"],
            main_score="cosine_spearman",
            **changes,
        )

    def load_data(self: AbsTask, **kwargs: Any) -> None:
        columns = [column for column in rows[0] if all(column in row for row in rows)]
        self.dataset = {"default": {"test": Dataset.from_list([{c: row[c] for c in columns} for row in rows])}}
        self.data_loaded = True

    return type(name, (SimilarityTask,), {"metadata": metadata, "load_data": load_data})()


def _row(row: dict[str, Any], where: str) -> dict[str, Any]:
    score = row["score"]
    if isinstance(score, bool) or not isinstance(score, int | float) or not np.isfinite(score):
        raise UserError(f"{where}: score is {json.dumps(score)[:40]}, not a number")
    columns = (*SENTENCES, *(["subset"] if "subset" in row else []))
    texts = {column: text_or_id(row[column], column, where) for column in columns}
    return texts | {"score": float(score)}


def _hub_task(name: str) -> AbsTask:
    name = _canonical(name)
    if name not in TASKS:
        raise UserError(f"{name} is none of {', '.join(TASKS)}; for your own pairs give --data_dir")
    official = type(mteb.get_task(name))
    return type(name, (SimilarityTask, official), {"metadata": official.metadata})()


def _task_name(path: Path) -> str:
    return _canonical(path.name.split(".jsonl")[0])


def _canonical(name: str) -> str:
    """MTEB's spelling of a task's name; a name that it does not know stays as it is."""
    spelled = {task.replace("-", "").lower(): task for task in TASKS}
    return spelled.get(name.replace("-", "").lower(), name)


def judge(arguments: Arguments) -> str:
    """The table in Markdown: correlations times 100 and their mean over the tasks, mean alignment and uniformity.

    Raises:
        UserError: a model that has no vectors, and whatever `eval.mteb_long.run_tasks` refuses.
    """
    for name in arguments.model:
        if name == "bm25" or name.startswith("chunk-max:"):
            raise UserError(f"--model {name}: has no single vector of a text, and so no cosines; leave it out")
    tasks = get_tasks(arguments.tasks, arguments.data_dir)
    metrics = [METRICS[arguments.aggregation], "alignment", "uniformity"]
    scores = mteb_long.run_tasks(arguments, tasks, metrics)
    names = [task.metadata.name for task in tasks]
    lines = [["model", *names, "mean", "alignment", "uniformity"], ["---"] + ["---:"] * (len(names) + 3)]
    for model in dict.fromkeys(score.model for score in scores):
        spearman, aligned, uniform = (
            [score.value for score in scores if (score.model, score.metric) == (model, metric)] for metric in metrics
        )
        correlations = [f"{value:.2f}" for value in (*spearman, mean(spearman))]
        lines.append([model, *correlations, *(f"{mean(values) / 100:.3f}" for values in (aligned, uniform))])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    """The script."""
    (arguments,) = parse(Arguments)
    table = judge(arguments)
    atomic_write(Path(arguments.output_dir, "table.md"), table)
    Console().print(Markdown(table))


if __name__ == "__main__":
    run(main)
