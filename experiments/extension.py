"""Compare methods of context extension by perplexity, retrieval and cost: the table of docs/reports/extension.md.

    python experiments/extension.py --model_name_or_path sentence-transformers/all-MiniLM-L6-v2 \\
        --train_data papers.jsonl --eval_data held-out.jsonl --task_data_dir my_tasks --output_dir runs/extension

The rows of the table, and what their models are made from:

- `base`: the encoder with a masked-language-model head, which is trained first because most encoders come without one;
- rows without training, from `base`: `repeat`, `interpolate`, `group`, `block`, and `rope_start` and `alibi_start`,
  whose position scheme has just been switched;
- trained rows, from `base`, by training/pretraining.py with the recipe of their name in experiments/extension.

What is finished is not repeated; a killed run goes on.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markdown import Markdown

from common.arguments import parse
from common.conditions import GIVEN
from common.encoders.model_folder import ModelFolder
from common.encoders.precision import resolve_precision
from common.errors import UserError, run
from common.files import atomic_folder, atomic_write
from common.provenance import content_hashes
from common.records import Records
from eval import perplexity
from eval.speed.lengths import parse_lengths
from eval.tasks.evaluation import RetrievalArguments, evaluate_retrieval
from eval.tasks.retrieval import get_tasks
from eval.tasks.texts import read_texts
from experiments.studies import training_runs
from experiments.studies.extension_report import as_markdown, draw
from experiments.studies.training_runs import check_stamp, training_cost
from modeling_longembed import LongEmbedConfig, LongEmbedForMaskedLM
from training.data.sources import data_files, split_weight

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "training" / "pretraining.py"
RECIPES = ROOT / "experiments" / "extension"
SWITCH = ("position_embedding_type", "max_position_embeddings", "rope_theta")
BEGINNING = 2000  # characters of each held-out document that training evaluates: less than 512 tokens


@dataclass(frozen=True)
class Row:
    """A method of context extension.

    Attributes:
        title: of its row in the table.
        recipe: name of the training recipe; without `trains`, only the position scheme is taken from it.
        trains: whether the model is trained.
        method: of `extend_context`, for rows without a recipe; `restart` also switches to attention in blocks.
    """

    title: str
    recipe: str | None = None
    trains: bool = True
    method: str | None = None

    @property
    def is_trained(self) -> bool:
        """Whether its model comes from a training."""
        return self.recipe is not None and self.trains


ROWS = {
    "base": Row("base, at its own length", "base"),
    "repeat": Row("repeat", method="repeat"),
    "interpolate": Row("interpolate", method="interpolate"),
    "group": Row("group", method="group"),
    "block": Row("blocks, positions restarted", method="restart"),
    "positions": Row("interpolate, new positions tuned", "positions"),
    "rope_start": Row("switched to RoPE", "rope", trains=False),
    "rope": Row("switched to RoPE, tuned", "rope"),
    "alibi_start": Row("switched to ALiBi", "alibi", trains=False),
    "alibi": Row("switched to ALiBi, tuned at 512", "alibi"),
    "longlora": Row("repeat, LongLoRA", "longlora"),
    "longlora_no_shift": Row("repeat, LongLoRA without shift", "longlora_no_shift"),
}


@dataclass
class Arguments:
    """Options of the script."""

    model_name_or_path: str = field(metadata={"help": "folder or Hub id of the encoder"})
    train_data: list[str] = field(
        metadata={"help": "training documents, as training/pretraining.py reads them; some must be long"}
    )
    eval_data: str = field(
        metadata={"help": "held-out documents, as eval/perplexity.py reads them: .jsonl(.gz) with text fields, or .txt"}
    )
    output_dir: str = field(
        metadata={
            "help": "folder of rows/, results.json, table.md and plot.png",
            "output": "folder",
        }
    )
    text_column: str = field(default="text", metadata={"help": "the column that holds the documents of --train_data"})
    task_data_dir: str | None = field(
        default=None, metadata={"help": "folder with one sub-folder for each retrieval task; default: no retrieval"}
    )
    tasks: list[str] = field(
        default_factory=list,
        metadata={"help": "tasks of --task_data_dir; default: all", "applies": {"task_data_dir": GIVEN}},
    )
    rows: list[str] = field(
        default_factory=lambda: list(ROWS),
        metadata={"help": f"rows of the table, with base in any case: {' '.join(ROWS)}"},
    )
    retrieval_rows: list[str] = field(
        default_factory=lambda: list(ROWS),
        metadata={
            "help": "rows whose retrieval is measured; without a GPU those with ALiBi are five times slower than the "
            "others at 8,192 tokens",
            "applies": {"task_data_dir": GIVEN},
        },
    )
    recipes: str = field(default=str(RECIPES), metadata={"help": "folder of the recipes"})
    lengths: list[str] = field(
        default_factory=lambda: ["512,2048,8192"],
        metadata={"help": "context lengths of perplexity in tokens; the longest is the context of the extended models"},
    )
    documents: int = field(
        default=20, metadata={"help": "number of held-out documents: the first that have the longest length"}
    )
    draws: int = field(default=1, metadata={"help": "masked perplexity: sets of masked tokens of each document"})
    tokens_scored: int = field(
        default=0, metadata={"help": "pseudo-perplexity: tokens of each document, each of which takes a forward pass"}
    )
    precision: str = field(
        default="auto", metadata={"help": "precision of perplexity and retrieval: float32, bfloat16 or auto"}
    )
    batch_tokens: int = field(default=8192, metadata={"help": "tokens in one forward pass of perplexity and retrieval"})

    @property
    def context(self) -> int:
        """Context of the extended models, in tokens."""
        return max(parse_lengths(self.lengths))

    def model(self, name: str) -> Path:
        """Return the folder of a row's model."""
        return Path(self.output_dir, "rows", name, "final")


def make(name: str, arguments: Arguments) -> None:
    """Make the model of a row unless it exists; a training that was killed goes on.

    Args:
        name: of the row.
        arguments: parsed command-line options.

    Raises:
        UserError: an existing model was made by another recipe or from another model, or the training failed.
    """
    row = ROWS[name]
    start = arguments.model_name_or_path if name == "base" else str(arguments.model("base"))
    recipe = read_recipe(row.recipe, arguments) if row.recipe else {}
    if not row.trains:  # only the options of `switch_positions` matter
        recipe = {option: recipe.get(option) for option in SWITCH}
    made_by: dict[str, Any] = {"start": ModelFolder.find(start).revision, "recipe": recipe}
    if row.is_trained:
        made_by |= {"train_data": _contents(arguments.train_data), "text_column": arguments.text_column}
    elif not row.recipe:
        made_by |= {"context": arguments.context}
    check_stamp(arguments.model(name).parent / "made_by.json", made_by)
    if arguments.model(name).exists():
        return
    if row.recipe and row.trains:
        train(row.recipe, start, arguments.model(name).parent, arguments)
        return
    if row.recipe:
        model = LongEmbedForMaskedLM.from_pretrained(start)
        model.switch_positions(*recipe.values())
    elif row.method == "restart":
        # A block has as much text as the context of the encoder: without the two special tokens.
        size = LongEmbedConfig.from_pretrained(start).max_position_embeddings - 2
        model = LongEmbedForMaskedLM.from_pretrained(start, attention_patterns={"type": "block", "size": size})
        model.extend_context(arguments.context, "restart", period=size)
    else:
        model = LongEmbedForMaskedLM.from_pretrained(start)
        model.extend_context(arguments.context, row.method)
    with atomic_folder(arguments.model(name)) as temporary:
        model.eval().save_pretrained(temporary, title=name)


def read_recipe(name: str, arguments: Arguments) -> dict[str, Any]:
    """Read a recipe; the training checks its options.

    Raises:
        UserError: the file cannot be read.
    """
    path = Path(arguments.recipes, f"{name}.yaml")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--recipes {arguments.recipes}: {path.name} cannot be read: {error.strerror}") from None


def train(recipe: str, start: str, output_dir: Path, arguments: Arguments) -> None:
    """Run training/pretraining.py.

    Args:
        recipe: name of the recipe.
        start: model to start from.
        output_dir: of the training.
        arguments: parsed command-line options.
    """
    options = ["--config", str(Path(arguments.recipes, f"{recipe}.yaml")), "--model_name_or_path", start]
    options += ["--train_data", *arguments.train_data, "--text_column", arguments.text_column]
    training_runs.train(SCRIPT, output_dir, [*options, "--eval_data", str(beginnings(arguments))])


def beginnings(arguments: Arguments) -> Path:
    """Write the first characters of the held-out documents to a file, which training evaluates often.

    Returns:
        The file.
    """
    path = Path(arguments.output_dir, "beginnings.jsonl")
    texts = read_texts(arguments.eval_data, "--eval_data")[: arguments.documents]
    rows = [json.dumps({arguments.text_column: text[:BEGINNING]}) + "\n" for text in texts]
    if not path.exists() or path.read_text() != "".join(rows):
        atomic_write(path, "".join(rows))
    return path


def measure(name: str, arguments: Arguments) -> dict[str, Any]:
    """Measure a row; what has been measured before is read from the results.

    Returns:
        An entry of results.json.
    """
    row = ROWS[name]
    return {
        "row": name,
        "title": row.title,
        "perplexity": measure_perplexity(name, arguments),
        "retrieval": measure_retrieval(name, arguments),
        "training": training_cost(arguments.model(name).parent / "metrics.jsonl") if row.is_trained else None,
    }


def measure_perplexity(name: str, arguments: Arguments) -> dict[str, dict[str, Any]]:
    """Measure the perplexity of a row.

    Returns:
        Kind of perplexity -> length within the model's context -> `value`, and `error`, its standard error over
        documents.
    """
    settings = perplexity.Arguments(
        model=[str(arguments.model(name))],
        data=arguments.eval_data,
        output_dir=arguments.output_dir,
        lengths=arguments.lengths,
        documents=arguments.documents,
        tokens_scored=arguments.tokens_scored,
        draws=arguments.draws,
        batch_tokens=arguments.batch_tokens,
    )
    perplexity.check(settings, settings.model)
    model = perplexity.load(settings.model[0], settings, resolve_precision(arguments.precision))
    texts = read_texts(arguments.eval_data, "--eval_data")
    lengths = [length for length in parse_lengths(arguments.lengths) if length <= model.context]
    records = Records(Path(arguments.output_dir, "perplexity.json"))
    # For every row the scored tokens are those of a span of the longest length, even if its context is shorter.
    points = perplexity.measure(model, name, texts, lengths, arguments.context, records, settings)
    found: dict[str, dict[str, Any]] = {}
    for point in points:
        found.setdefault(point.score, {})[str(point.length)] = {"value": point.perplexity, "error": point.error}
    return found


def measure_retrieval(name: str, arguments: Arguments) -> dict[str, float]:
    """Evaluate the retrieval of a row.

    Returns:
        Task -> main score, 0 to 100; empty if it was not requested.
    """
    if arguments.task_data_dir is None or name not in arguments.retrieval_rows:
        return {}
    scores = evaluate_retrieval(
        RetrievalArguments(
            model=[str(arguments.model(name))],
            output_dir=arguments.output_dir,
            data_dir=arguments.task_data_dir,
            tasks=arguments.tasks,
            precision=arguments.precision,
            batch_tokens=arguments.batch_tokens,
        )
    )
    return {score.column: score.value for score in scores}


def compare(arguments: Arguments) -> list[dict[str, Any]]:
    """Make and measure the rows; results.json, table.md and plot.png are written after each of them.

    Args:
        arguments: parsed command-line options.

    Returns:
        The entries of results.json.

    Raises:
        UserError: there is no such row, or data cannot be read; raised before anything is trained.
    """
    for option in ("rows", "retrieval_rows"):
        if unknown := [name for name in getattr(arguments, option) if name not in ROWS]:
            raise UserError(f"--{option}: there is no {unknown[0]}; choose of {' '.join(ROWS)}")
    names = [name for name in ROWS if name == "base" or name in arguments.rows]
    for recipe in filter(None, (ROWS[name].recipe for name in names)):
        read_recipe(recipe, arguments)
    read_texts(arguments.eval_data, "--eval_data")
    if arguments.task_data_dir is not None:
        get_tasks(arguments.tasks, arguments.task_data_dir)
    results: list[dict[str, Any]] = []
    for name in names:
        print(f"{name}: {ROWS[name].title}", flush=True)
        make(name, arguments)
        results.append(measure(name, arguments))
        atomic_write(Path(arguments.output_dir, "results.json"), json.dumps(results, indent=1))
        atomic_write(Path(arguments.output_dir, "table.md"), as_markdown(results, parse_lengths(arguments.lengths)))
        draw(results, Path(arguments.output_dir, "plot.png"))
    return results


def _contents(specifications: list[str]) -> list[list[str]]:
    """Return the training data as a stamp knows them: the names as given, and the hashes of what local files hold."""
    paths = [Path(split_weight(specification)[0]) for specification in specifications]
    return [
        [specification, *(content_hashes(data_files(path)) if path.exists() else ())]
        for specification, path in zip(specifications, paths, strict=True)
    ]


def main() -> None:
    """Run the script."""
    (arguments,) = parse(Arguments)
    results = compare(arguments)
    table = as_markdown(results, parse_lengths(arguments.lengths))
    Console(width=None if sys.stdout.isatty() else 160).print(Markdown(table))


if __name__ == "__main__":
    run(main)
