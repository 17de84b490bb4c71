"""Keep a trained model in the repository: as a difference from its base, with its config and the sums of its files.

python -m model_cards.keep longembed-minilm --model runs/model/small/final

`difference.safetensors`, `config.json` and `SHA256SUMS` in the folder of the release are replaced. A byte a number is
kept, so that the weights change a little: judge what model_cards/build.py makes of them, not the trained model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from common.arguments import parse
from common.errors import run
from common.files import sha256_file
from model_cards.release import CONFIG, DIFFERENCE, SUMS, Release, base_folder
from training.models.encoder import ModelArguments, load_encoder


@dataclass
class KeepArguments:
    """What is kept, and beside which base."""

    name: str = field(metadata={"help": "name of the model: a folder of model_cards/ with a recipe", "word": True})
    model: str = field(metadata={"help": "folder of the trained model"})
    base: str | None = field(
        default=None,
        metadata={"help": "the encoder that the model was made from: a folder, or a package; that of the recipe"},
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Keep with the command-line options `argv`; None: those of the process."""
    (arguments,) = parse(KeepArguments, argv=argv)
    release = Release.named(arguments.name)
    base = base_folder(arguments.base or release.recipe["base_package"])
    model: Any = load_encoder(ModelArguments(model_name_or_path=arguments.model))[0]
    release.keep(model.eval(), base)
    for name in (DIFFERENCE, CONFIG, SUMS):
        path = release.folder / name
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB, sha256 {sha256_file(path)[:16]}")


if __name__ == "__main__":
    run(main)
