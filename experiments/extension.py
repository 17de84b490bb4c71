"""Ways to a longer context side by side: perplexity, retrieval and cost of each, from one encoder and real documents.

    python experiments/extension.py --model_name_or_path sentence-transformers/all-MiniLM-L6-v2 \\
        --train_data papers.jsonl --eval_data held-out.jsonl --task_data_dir my_tasks --output_dir runs/extension

The rows of the table, and what each is made from:

- `base`: the encoder with a masked-language-model head, trained at its own length, as most encoders come without one;
- rows without training, from `base`: `repeat`, `interpolate`, `group`, `block`, and `rope_start` and `alibi_start`,
  whose positions have just been switched;
- rows that are trained, from `base`, by training/pretraining.py with the recipe of their name in
  experiments/extension.

What is finished is not done again; a killed run goes on. docs/reports/extension.md says what the numbers mean.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a script draws into a file; it needs no display
import matplotlib.pyplot as plt
import yaml
from rich.console import Console
from rich.markdown import Markdown

from common.arguments import parse
from common.errors import UserError, run
from common.files import atomic_folder, atomic_write
from common.model_folder import ModelFolder
from common.precision import resolve_precision
from eval import mteb_long, perplexity
from eval.plot import save
from eval.report.records import Records
from eval.synthetic import read_texts
from eval.throughput import parse_lengths
from experiments import training_runs
from experiments.training_runs import check_stamp, training_cost
from modeling_longembed import LongEmbedConfig, LongEmbedForMaskedLM

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "training" / "pretraining.py"
RECIPES = ROOT / "experiments" / "extension"
SWITCH = ("position_embedding_type", "max_position_embeddings", "rope_theta")
BEGINNING = 2000  # characters of a held-out document whose loss is followed in training: less than 512 tokens


@dataclass(frozen=True)
class Row:
    """A way to a longer context.

    Attributes:
        title: what the table calls it.
        recipe: of a row that is trained, or, with `steps` False, whose positions are switched as that recipe says.
        steps: whether it is trained.
        method: of `extend_context`, of a row without a recipe; `restart` goes with blocks that are read one by one.
    """

    title: str
    recipe: str | None = None
    steps: bool = True
    method: str | None = None

    @property
    def is_trained(self) -> bool:
        return self.recipe is not None and self.steps


ROWS = {
    "base": Row("base, at its own length", "base"),
    "repeat": Row("repeat", method="repeat"),
    "interpolate": Row("interpolate", method="interpolate"),
    "group": Row("group", method="group"),
    "block": Row("blocks, positions restarted", method="restart"),
    "positions": Row("interpolate, new positions tuned", "positions"),
    "rope_start": Row("switched to RoPE", "rope", steps=False),
    "rope": Row("switched to RoPE, tuned", "rope"),
    "alibi_start": Row("switched to ALiBi", "alibi", steps=False),
    "alibi": Row("switched to ALiBi, tuned at 512", "alibi"),
    "longlora": Row("repeat, LongLoRA", "longlora"),
    "longlora_no_shift": Row("repeat, LongLoRA without shift", "longlora_no_shift"),
}


@dataclass
class Arguments:
    """From what, on what, and where everything goes."""

    model_name_or_path: str = field(metadata={"help": "folder or Hub id of the encoder"})
    train_data: list[str] = field(
        metadata={"help": "documents to train on, as training/pretraining.py reads them; long ones among them"}
    )
    eval_data: str = field(
        metadata={"help": "held-out documents, as eval/perplexity.py reads them: .jsonl(.gz) with text fields, or .txt"}
    )
    output_dir: str = field(metadata={"help": "folder of rows/, results.json, table.md and plot.png"})
    text_column: str = field(default="text", metadata={"help": "the column that holds the documents of --train_data"})
    task_data_dir: str | None = field(
        default=None, metadata={"help": "folder with one folder a retrieval task; without it retrieval is left out"}
    )
    tasks: list[str] = field(default_factory=list, metadata={"help": "tasks of --task_data_dir; default: all"})
    rows: list[str] = field(
        default_factory=lambda: list(ROWS), metadata={"help": f"rows to make beside base: {' '.join(ROWS)}"}
    )
    retrieval_rows: list[str] = field(
        default_factory=lambda: list(ROWS),
        metadata={
            "help": "rows that retrieval is measured of; without a GPU those of ALiBi are five times slower than the "
            "others at 8,192 tokens"
        },
    )
    recipes: str = field(default=str(RECIPES), metadata={"help": "folder of the recipes"})
    lengths: list[str] = field(
        default_factory=lambda: ["512,2048,8192"],
        metadata={"help": "tokens that perplexity is measured at; the longest is the context of the extended models"},
    )
    documents: int = field(default=20, metadata={"help": "the first held-out documents of the longest length"})
    draws: int = field(default=1, metadata={"help": "sets of masked tokens of a document, for the estimate"})
    tokens_scored: int = field(
        default=0, metadata={"help": "tokens of a document whose pseudo-perplexity is exact; a forward pass each"}
    )
    precision: str = field(default="auto", metadata={"help": "of perplexity and retrieval: float32, bfloat16 or auto"})
    batch_tokens: int = field(default=8192, metadata={"help": "tokens in one forward pass of these"})

    @property
    def context(self) -> int:
        """Of the extended models, in tokens."""
        return max(parse_lengths(self.lengths))

    def model(self, name: str) -> Path:
        """The folder of a row's model."""
        return Path(self.output_dir, "rows", name, "final")


# Models ---------------------------------------------------------------------------------------------------------------


def make(name: str, arguments: Arguments) -> None:
    """The model of a row, unless it is there; a training that was stopped goes on.

    Raises:
        UserError: what is there was made by another recipe, or from something else; or a training that failed.
    """
    row = ROWS[name]
    start = arguments.model_name_or_path if name == "base" else str(arguments.model("base"))
    recipe = read_recipe(row.recipe, arguments) if row.recipe else {}
    if not row.steps:  # what `switch_positions` takes: the rest of the recipe is of the training
        recipe = {option: recipe.get(option) for option in SWITCH}
    made_by: dict[str, Any] = {"start": ModelFolder.find(start).revision, "recipe": recipe}
    if row.is_trained:
        made_by |= {"train_data": arguments.train_data, "text_column": arguments.text_column}
    elif not row.recipe:
        made_by |= {"context": arguments.context}
    check_stamp(arguments.model(name).parent / "made_by.json", made_by)
    if arguments.model(name).exists():
        return
    if row.recipe and row.steps:
        train(row.recipe, start, arguments.model(name).parent, arguments)
        return
    if row.recipe:
        model = LongEmbedForMaskedLM.from_pretrained(start)
        model.switch_positions(*recipe.values())
    elif row.method == "restart":
        # A block holds as much text as the encoder read at once: its context but for the two special tokens.
        size = LongEmbedConfig.from_pretrained(start).max_position_embeddings - 2
        model = LongEmbedForMaskedLM.from_pretrained(start, attention_patterns={"type": "block", "size": size})
        model.extend_context(arguments.context, "restart", period=size)
    else:
        model = LongEmbedForMaskedLM.from_pretrained(start)
        model.extend_context(arguments.context, row.method)
    with atomic_folder(arguments.model(name)) as temporary:
        model.eval().save_pretrained(temporary, title=name)


def read_recipe(name: str, arguments: Arguments) -> dict[str, Any]:
    """What a recipe says; that it makes sense is for the training to check."""
    path = Path(arguments.recipes, f"{name}.yaml")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--recipes {arguments.recipes}: {path.name} cannot be read: {error.strerror}") from None


def train(recipe: str, start: str, output_dir: Path, arguments: Arguments) -> None:
    """training/pretraining.py with a recipe."""
    options = ["--config", str(Path(arguments.recipes, f"{recipe}.yaml")), "--model_name_or_path", start]
    options += ["--train_data", *arguments.train_data, "--text_column", arguments.text_column]
    training_runs.train(SCRIPT, output_dir, [*options, "--eval_data", str(beginnings(arguments))])


def beginnings(arguments: Arguments) -> Path:
    """A file with the beginnings of the held-out documents: few tokens, so that training can ask often."""
    path = Path(arguments.output_dir, "beginnings.jsonl")
    texts = read_texts(arguments.eval_data, "--eval_data")[: arguments.documents]
    rows = [json.dumps({arguments.text_column: text[:BEGINNING]}) + "\n" for text in texts]
    if not path.exists() or path.read_text() != "".join(rows):
        atomic_write(path, "".join(rows))
    return path


# Measurements ---------------------------------------------------------------------------------------------------------


def measure(name: str, arguments: Arguments) -> dict[str, Any]:
    """All numbers of a row; what was measured before is read."""
    row = ROWS[name]
    return {
        "row": name,
        "title": row.title,
        "perplexity": measure_perplexity(name, arguments),
        "retrieval": measure_retrieval(name, arguments),
        "training": training_cost(arguments.model(name).parent / "metrics.jsonl") if row.is_trained else None,
    }


def measure_perplexity(name: str, arguments: Arguments) -> dict[str, dict[str, Any]]:
    """Of each score, at each length that the model reads: the perplexity and its standard error over documents."""
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
    # The tokens scored are those of a stretch of the longest length for every row, also for one that reads less of it.
    points = perplexity.measure(model, name, texts, lengths, arguments.context, records, settings)
    found: dict[str, dict[str, Any]] = {}
    for point in points:
        found.setdefault(point.score, {})[str(point.length)] = {"value": point.perplexity, "error": point.error}
    return found


def measure_retrieval(name: str, arguments: Arguments) -> dict[str, float]:
    """The main score of each task, from 0 to 100; none if it was not asked for."""
    if arguments.task_data_dir is None or name not in arguments.retrieval_rows:
        return {}
    scores = mteb_long.judge(
        mteb_long.Arguments(
            model=[str(arguments.model(name))],
            output_dir=arguments.output_dir,
            data_dir=arguments.task_data_dir,
            tasks=arguments.tasks,
            precision=arguments.precision,
            batch_tokens=arguments.batch_tokens,
        )
    )
    return {score.column: score.value for score in scores}


# Report ---------------------------------------------------------------------------------------------------------------


def as_markdown(results: Sequence[dict[str, Any]], lengths: Sequence[int]) -> str:
    """A table of the estimate, retrieval and cost, and one of the exact pseudo-perplexity if it was measured."""
    tasks = list(dict.fromkeys(task for result in results for task in result["retrieval"]))
    scores = [score for score in ("masked", "pseudo") if any(score in result["perplexity"] for result in results)]
    tables = []
    for score in scores:
        first = score == scores[0]
        heading = ["", *(f"{length:,}" for length in lengths)]
        heading += [*tasks, "training tokens", "minutes", "peak GiB"] if first else []
        table = [heading, ["---", *["---:"] * (len(heading) - 1)]]
        for result in results:
            cells = [_value(result["perplexity"].get(score, {}).get(str(length))) for length in lengths]
            if first:
                cells += [_number(result["retrieval"].get(task), ".1f") for task in tasks]
                cost = result["training"] or {}
                cells += [_number(cost.get(name), form) for name, form in COST.items()]
            table.append([result["title"], *cells])
        tables.append(f"{TITLES[score]}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in table))
    return "\n".join(tables)


COST = {"tokens": ",d", "minutes": ".1f", "peak_memory_gib": ".1f"}
TITLES = {
    "masked": "Masked perplexity (15% of the tokens masked at once) by tokens read; then retrieval; then training",
    "pseudo": "Pseudo-perplexity (each token masked alone) by tokens read",
}


def _value(point: dict[str, Any] | None) -> str:
    if point is None:
        return "–"
    error = "" if point["error"] is None else f" ± {float(format(point['error'], '.2g')):g}"  # 120, not 1.2e+02
    return f"{point['value']:.4g}{error}"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Left perplexity against length, a line a row; right held-out loss against training tokens, with that of base."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.2), layout="constrained")
    score = next((s for s in ("masked", "pseudo") if any(s in result["perplexity"] for result in results)), "masked")
    handles = []
    for number, result in enumerate(results):
        # Colours repeat after ten; what is trained has a whole line.
        style: dict[str, Any] = {"color": f"C{number % 10}", "marker": "o" if number < 10 else "s", "markersize": 4}
        style["linestyle"] = "-" if result["training"] else "--"
        points = [(int(length), point) for length, point in result["perplexity"].get(score, {}).items()]
        lengths, values = [length for length, _ in points], [point["value"] for _, point in points]
        errors = [point["error"] or 0.0 for _, point in points]
        handles.append(left.errorbar(lengths, values, errors, capsize=3, label=result["title"], **style))
        if result["training"] and result["row"] != "base":
            right.plot(*zip(*result["training"]["curve"], strict=True), **style)
        elif result["training"]:
            right.axhline(result["training"]["curve"][-1][1], linestyle=":", color=style["color"])
    ticks = sorted({int(n) for result in results for n in result["perplexity"].get(score, {})})
    left.set_xscale("log", base=2)
    left.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    left.set_yscale("log")
    for axis in (left.yaxis.set_major_formatter, left.yaxis.set_minor_formatter):
        axis(lambda value, _: f"{value:g}")
    left.set_xlabel("tokens that are read")
    left.set_title(TITLES[score].split(" (")[0])
    right.set_xlabel("tokens trained on")
    right.set_title("loss on the beginnings of held-out documents (dotted: base)")
    for panel in (left, right):
        panel.grid(alpha=0.3)
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    save(figure, path)


def compare(arguments: Arguments) -> list[dict[str, Any]]:
    """Make and measure the rows; results.json, table.md and plot.png hold what there is after each of them.

    Raises:
        UserError: rows that do not exist, or data that cannot be read; told before anything is trained.
    """
    for option in ("rows", "retrieval_rows"):
        if unknown := [name for name in getattr(arguments, option) if name not in ROWS]:
            raise UserError(f"--{option}: there is no {unknown[0]}; choose of {' '.join(ROWS)}")
    names = [name for name in ROWS if name == "base" or name in arguments.rows]
    for recipe in filter(None, (ROWS[name].recipe for name in names)):
        read_recipe(recipe, arguments)
    read_texts(arguments.eval_data, "--eval_data")
    if arguments.task_data_dir is not None:
        mteb_long.get_tasks(arguments.tasks, arguments.task_data_dir)
    results: list[dict[str, Any]] = []
    for name in names:
        print(f"{name}: {ROWS[name].title}", flush=True)
        make(name, arguments)
        results.append(measure(name, arguments))
        atomic_write(Path(arguments.output_dir, "results.json"), json.dumps(results, indent=1))
        atomic_write(Path(arguments.output_dir, "table.md"), as_markdown(results, parse_lengths(arguments.lengths)))
        draw(results, Path(arguments.output_dir, "plot.png"))
    return results


def main() -> None:
    """The script."""
    (arguments,) = parse(Arguments)
    results = compare(arguments)
    table = as_markdown(results, parse_lengths(arguments.lengths))
    Console(width=None if sys.stdout.isatty() else 160).print(Markdown(table))


if __name__ == "__main__":
    run(main)
