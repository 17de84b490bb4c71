"""Write the results of an evaluation into the card of a released model, and into files for the Hub's benchmarks.

python eval/mteb_long.py --model runs/longembed-minilm runs/longembed-minilm@tokens bm25 --data_dir tasks \\
    --output_dir runs/eval
python -m model_cards.card longembed-minilm --results_dir runs/eval

In `README.md`, the metadata get a `model-index`, and the lines between `<!-- results -->` and `<!-- /results -->` the
table of all that was evaluated. `.eval_results/` gets a file for each task whose data is on the Hub.
"""

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from huggingface_hub import ModelCard, eval_result_entries_to_yaml

from common.arguments import parse
from common.errors import UserError, run
from common.files import atomic_write
from eval.report.hub_results import TaskScores, as_scores, benchmark_entries, model_index, read_task_scores
from eval.report.results import as_markdown
from model_cards.release import CARD, Release

RESULTS = ".eval_results"
BETWEEN = re.compile(r"(?<=<!-- results -->\n).*?(?=<!-- /results -->)", re.DOTALL)


@dataclass
class CardArguments:
    """Which card, and the results that go into it."""

    name: str = field(metadata={"help": "name of the model: a folder of model_cards/", "word": True})
    results_dir: str = field(
        metadata={"help": "output_dir of the evaluation of the model and of what it is compared with"}
    )
    model: str | None = field(
        default=None,
        metadata={"help": "name of the model in the results, where that is the folder's name; the name if not given"},
    )


def card_with_results(content: str, repository: str, model: str, scores: Sequence[TaskScores]) -> str:
    """Return a model card with results in its metadata and in its text.

    Args:
        content: of the card.
        repository: id of the model on the Hub.
        model: its name in the results.
        scores: of the model and of those that it is compared with.

    Raises:
        UserError: the card has no place for the table.
    """
    if not BETWEEN.search(content):
        raise UserError(f"the card of {repository} has no lines <!-- results --> and <!-- /results -->; add them")
    card: Any = ModelCard(BETWEEN.sub(lambda _: f"\n{as_markdown(as_scores(scores))}\n", content))
    card.data.model_name = repository
    card.data.eval_results = model_index([one for one in scores if one.model == model])
    return f"---\n{card.data.to_yaml()}\n---\n{card.text}"


def main(argv: Sequence[str] | None = None) -> None:
    """Write with the command-line options `argv`; None: those of the process.

    Raises:
        UserError: there are no results of the model.
    """
    (arguments,) = parse(CardArguments, argv=argv)
    release = Release.named(arguments.name)
    scores, model = read_task_scores(arguments.results_dir), arguments.model or arguments.name
    own = [one for one in scores if one.model == model]
    if not own:
        there = ", ".join(sorted({one.model for one in scores}))
        raise UserError(f"--results_dir {arguments.results_dir} has no results of {model}; it has those of {there}")
    path = release.folder / CARD
    content = path.read_text(encoding="utf-8")
    atomic_write(path, card_with_results(content, release.recipe["repository"], model, scores))
    shutil.rmtree(release.folder / RESULTS, ignore_errors=True)
    for task, entries in benchmark_entries(own).items():
        text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
        atomic_write(release.folder / RESULTS / f"{task}.yaml", text)
    local = ", ".join(sorted({one.result.task_name for one in own if one.is_local}))
    print(f"{path}: {len(own)} results of {model}, {len(scores)} in the table")
    print(f"{release.folder / RESULTS}: all but those of local files ({local or 'none'}), which the Hub does not have")


if __name__ == "__main__":
    run(main)
