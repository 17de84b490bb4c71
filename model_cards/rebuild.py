"""Make a released model again from its recipe: convert, fit, train, average, and keep the difference from the base.

python -m model_cards.rebuild longembed-minilm --data_dir data --output_dir runs/model    # or: make model DATA_DIR=data

The recipe (`recipe.yaml` in the folder of the release) lists the steps: modules that are run as scripts, with their
options, in which `{data}` stands for `--data_dir` and `{runs}` for `--output_dir`. A step writes into a folder of its
name there. What is finished is not repeated, and a training that was killed goes on at its last checkpoint.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.arguments import parse
from common.errors import UserError, run
from common.files import atomic_folder, atomic_write, sha256_file
from model_cards.release import RECIPE, SUMS, WEIGHTS, Release, base_folder, sums
from modeling_longembed import LongEmbedModel
from training.models.encoder import ModelArguments, load_encoder


@dataclass
class RebuildArguments:
    """Which model is made, from which base and data, and where.

    Raises:
        UserError: there is no folder of documents.
    """

    name: str = field(metadata={"help": "name of the model: a folder of model_cards/", "word": True})
    data_dir: str = field(metadata={"help": "folder of the documents that the recipe and the card name"})
    output_dir: str = field(metadata={"help": "folder of what each step writes, and of final/", "output": "folder"})
    base: str | None = field(
        default=None,
        metadata={"help": "the encoder that the model is made from: a folder, or a package; that of the recipe"},
    )

    def __post_init__(self) -> None:
        if not Path(self.data_dir).is_dir():
            raise UserError(
                f"--data_dir {self.data_dir}: is no folder; the card of {self.name} lists what belongs there"
            )


def command_of(step: dict[str, Any], places: dict[str, str]) -> list[str]:
    """Return the command of a step.

    Args:
        step: of the recipe, with `name`, `module` and `options`.
        places: what stands for each name in braces in an option.
    """
    words = [sys.executable, "-m", step["module"]]
    for option, value in step["options"].items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{option}", *(str(one).format(**places) for one in values)]
    return [*words, "--output_dir", str(Path(places["runs"], step["name"]))]


def run_step(step: dict[str, Any], places: dict[str, str]) -> None:
    """Run a step that has not been finished.

    Args:
        step: of the recipe.
        places: what stands for each name in braces in an option.

    Raises:
        UserError: the step failed, or was finished with other options.
    """
    command, name = command_of(step, places), step["name"]
    config = step["options"].get("config")
    finished = Path(places["runs"], "finished", f"{name}.json")
    content = json.dumps({"command": command[1:], "config": config and sha256_file(config)}, indent=1)
    if finished.exists():
        if finished.read_text() != content:
            raise UserError(f"{finished}: {name} was made with other options; remove {places['runs']}, or name another")
        print(f"{name}: done before")
        return
    print(f"{name}: {' '.join(command[2:])}", flush=True)
    begin = time.monotonic()
    code = subprocess.run(command, check=False).returncode
    if code:
        raise UserError(f"{name} ended with exit code {code}; its message is above, and the same command goes on")
    print(f"{name}: {time.monotonic() - begin:.0f} s", flush=True)
    atomic_write(finished, content)


def convert(base: Path, folder: Path, recipe: dict[str, Any]) -> None:
    """Convert the base as the recipe says.

    Args:
        base: folder of the encoder.
        folder: the folder to write, which is left alone if it exists.
        recipe: of the release.
    """
    if not folder.exists():
        model: Any = LongEmbedModel.from_encoder(str(base), original_model=recipe["base"], **recipe["conversion"])
        with atomic_folder(folder) as temporary:
            model.save_pretrained(temporary, title="start")


def main(argv: Sequence[str] | None = None) -> None:
    """Make the model with the command-line options `argv`; None: those of the process."""
    (arguments,) = parse(RebuildArguments, argv=argv)
    release, runs = Release.named(arguments.name), Path(arguments.output_dir)
    recipe = release.recipe
    base = base_folder(arguments.base or recipe["base_package"])
    convert(base, runs / "start", recipe)
    places = {"data": arguments.data_dir, "runs": str(runs)}
    for step in recipe["steps"]:
        run_step(step, places)
    made = Release(runs / "kept")
    made.folder.mkdir(exist_ok=True)
    atomic_write(made.folder / RECIPE, (release.folder / RECIPE).read_bytes())
    last = runs / recipe["steps"][-1]["name"] / "final"
    model: Any = load_encoder(ModelArguments(model_name_or_path=str(last)))[0]
    made.keep(model.eval(), base)
    made.build(base, runs / "final")
    released = sums(release.folder / SUMS).get(WEIGHTS) if (release.folder / SUMS).is_file() else None
    if sums(made.folder / SUMS)[WEIGHTS] == released:
        print(f"{runs / 'final'}: bit by bit the released weights")
    else:
        print(
            f"{runs / 'final'}: not bit by bit the released weights, because another machine rounds differently, or "
            f"the recipe is newer; python -m model_cards.keep {arguments.name} --model {last} would release these"
        )


if __name__ == "__main__":
    run(main)
