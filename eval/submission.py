"""Prepare a model's entry in MTEB's leaderboard: the two pull requests, checked by MTEB's own code; nothing is sent.

python eval/submission.py --model runs/longembed-minilm --hub_model_id longembed/longembed-minilm \\
    --hub_revision COMMIT --release_date 2026-11-28 --results_dir runs/eval --output_dir runs/submission

The first pull request adds a module to `mteb/models/model_implementations/`, with a loader for the one vector and one
for late interaction; both load the folder and run MTEB's mock tasks. The second adds the results to the repository of
results. `model.diff` and `results.diff` in the output folder show them. Results on local files are never sent.
"""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import mteb
from mteb.models.model_meta import ModelMeta
from mteb.results.task_result import TaskError

from common.arguments import parse
from common.encoders.model_folder import ModelFolder
from common.errors import UserError, run
from common.files import atomic_write
from eval.report.hub_results import read_task_scores
from eval.report.submission import accepted, commit_results, module_source, read_module

IMPLEMENTATIONS = Path("mteb", "models", "model_implementations")


@dataclass
class SubmissionArguments:
    """The model, its name on the Hub, its results, and where the two pull requests are prepared.

    Raises:
        UserError: the name or the commit cannot be right.
    """

    model: str = field(metadata={"help": "folder of the model, as it is on the Hub"})
    hub_model_id: str = field(metadata={"help": "its name on the Hub: org/name"})
    hub_revision: str = field(metadata={"help": "its commit there, 40 hexadecimal digits"})
    release_date: str = field(metadata={"help": "YYYY-MM-DD"})
    results_dir: str = field(metadata={"help": "output_dir of the evaluation of the folder"})
    output_dir: str = field(
        metadata={
            "help": "folder of the module, the results and the differences; its remote/ may be a clone of MTEB's "
            "repository of results, and is an empty one otherwise",
            "output": "folder",
        }
    )
    training_datasets: list[str] = field(
        default_factory=list,
        metadata={"help": "MTEB's names of tasks whose training data was used, beside those of the base: NQ"},
    )
    mock_run: bool = field(
        default=True, metadata={"help": "run MTEB's mock tasks with both outputs, which takes a minute or two"}
    )

    def __post_init__(self) -> None:
        if len(self.hub_revision) != 40 or set(self.hub_revision) - {*"0123456789abcdef"}:
            raise UserError(f"--hub_revision {self.hub_revision}: is no commit of 40 hexadecimal digits")
        if self.hub_model_id.count("/") != 1:
            raise UserError(f"--hub_model_id {self.hub_model_id}: write org/name")


def check_loading(meta: ModelMeta, folder: Path) -> None:
    """Load a model from a folder by its description, and run MTEB's mock tasks with it.

    Args:
        meta: the description.
        folder: what stands for the repository on the Hub.

    Raises:
        UserError: a mock task fails.
    """
    suffix = "-tokens" if str(meta.name).endswith("-tokens") else ""
    local = meta.model_copy(update={"name": f"{folder.resolve()}{suffix}", "revision": None})
    found = mteb.mock_run(local.load_model(device="cpu"))
    failed = {name: status for name, status in found.items() if isinstance(status, TaskError)}
    if not found.all_passed:
        name, status = next(iter(failed.items()))
        raise UserError(f"{meta.name}: {len(failed)} of MTEB's mock tasks fail, such as {name}: {status.exception}")
    print(f"{meta.name}: loads, and passes {sum(status is not None for _, status in found.items())} mock tasks")


def main(argv: Sequence[str] | None = None) -> None:
    """Prepare with the command-line options `argv`; None: those of the process.

    Raises:
        UserError: there are no results of the model, or MTEB's checks fail.
    """
    (arguments,) = parse(SubmissionArguments, argv=argv)
    logging.getLogger("mteb").setLevel(logging.ERROR)
    model, output = ModelFolder.find(arguments.model), Path(arguments.output_dir)
    own = [one for one in read_task_scores(arguments.results_dir) if one.model == model.name.rpartition("/")[2]]
    if not own:
        raise UserError(f"--results_dir {arguments.results_dir}: has no results of {model.name}; evaluate the folder")
    config = json.loads(Path(arguments.model, "config.json").read_text(encoding="utf-8"))
    source = module_source(
        config,
        model.parameters,
        arguments.hub_model_id,
        arguments.hub_revision,
        arguments.release_date,
        arguments.training_datasets,
    )
    name = arguments.hub_model_id.rpartition("/")[2].replace("-", "_").replace(".", "_")
    path = output / IMPLEMENTATIONS / f"{name}_models.py"
    atomic_write(path, source)
    _, metas = read_module(path)
    if arguments.mock_run:
        for meta in metas:
            check_loading(meta, Path(arguments.model))
    added = "".join(f"+{line}" for line in source.splitlines(keepends=True))
    heading = (
        f"--- {os.devnull}\n+++ b/{(IMPLEMENTATIONS / path.name).as_posix()}\n@@ -0,0 +1,{source.count(chr(10))} @@\n"
    )
    atomic_write(output / "model.diff", heading + added)
    kept, left = accepted(own, metas)
    atomic_write(output / "results.diff", commit_results(kept, output))
    for sentence in left:
        print(f"left out: {sentence}")
    print(f"{output / 'model.diff'}: adds {path.name}; {output / 'results.diff'}: adds {len(kept)} results")


if __name__ == "__main__":
    run(main)
