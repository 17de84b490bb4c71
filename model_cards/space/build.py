"""Put together the folder of the Space: the page, the code that it runs, and a model if one is named.

python -m model_cards.space.build --model runs/longembed-minilm --output_dir runs/space

`python app.py` runs it in that folder; `hf upload you/your-space runs/space --repo-type space` publishes it.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from common.arguments import parse
from common.errors import UserError, run
from common.files import atomic_folder

HERE = Path(__file__).resolve().parent
OWN = ("app.py", "README.md", "requirements.txt")
CODE = ("common", "modeling_longembed", "retrieval")


@dataclass
class Arguments:
    """Options of the script."""

    output_dir: str = field(metadata={"help": "the folder to write, which must not exist", "output": "folder"})
    model: str | None = field(
        default=None,
        metadata={"help": "folder of a model that goes along; without it the Space loads the one in its README"},
    )


def build_space(output: Path, model: Path | None = None) -> None:
    """Write the folder of the Space.

    Args:
        output: a folder that does not exist.
        model: folder of a model that goes along.

    Raises:
        UserError: there is such a folder, or no such model.
    """
    if output.exists():
        raise UserError(f"{output} exists; name another folder")
    if model is not None and not (model / "config.json").exists():
        raise UserError(f"{model}: there is no model (config.json is missing)")
    with atomic_folder(output) as folder:
        for name in OWN:
            shutil.copy(HERE / name, folder / name)
        for name in CODE:
            shutil.copytree(HERE.parents[1] / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        if model is not None:
            shutil.copytree(model, folder / "model")


def main() -> None:
    """Run the script."""
    (arguments,) = parse(Arguments)
    build_space(Path(arguments.output_dir), None if arguments.model is None else Path(arguments.model))
    print(f"{arguments.output_dir}: python app.py runs it there")


if __name__ == "__main__":
    run(main)
