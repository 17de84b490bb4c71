"""Build the folder of a released model for the Hub, from its base and from what the repository keeps of it.

python -m model_cards.build longembed-minilm --output_dir runs/longembed-minilm

It takes seconds and no training. The weights are those that were judged, bit by bit, or nothing is written.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.arguments import parse
from common.errors import run
from model_cards.release import Release, base_folder


@dataclass
class BuildArguments:
    """What is built, from which base, and where."""

    name: str = field(metadata={"help": "name of the model: a folder of model_cards/", "word": True})
    output_dir: str = field(metadata={"help": "the folder to write, which is replaced", "output": "folder"})
    base: str | None = field(
        default=None,
        metadata={"help": "the encoder that the model was made from: a folder, or a package; that of the recipe"},
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Build with the command-line options `argv`; None: those of the process."""
    (arguments,) = parse(BuildArguments, argv=argv)
    release = Release.named(arguments.name)
    base = base_folder(arguments.base or release.recipe["base_package"])
    changed = release.build(base, Path(arguments.output_dir))
    print(f"{arguments.output_dir}: the weights are those that were judged; sha256sum -c SHA256SUMS checks them again")
    if changed:
        print(
            f"{len(changed)} other files have changed since, such as {changed[0]}: the code of this checkout, or the "
            "release of transformers that wrote them"
        )


if __name__ == "__main__":
    run(main)
