"""Perplexity against context length: what a masked or a causal language model makes of more context.

    python eval/perplexity.py --model runs/before runs/after --data books.jsonl --lengths 512,2048,8192 \\
        --output_dir runs/perplexity

But for `window` the tokens that are scored are the same at every length, so that nothing but their context differs: a
document gives a stretch of the longest length, and at a shorter length each token is scored in that part of the stretch
that it falls in. Documents without so many tokens are left out. Perplexity is exp(mean loss), over all tokens scored.

Masked models, whose pieces begin and end with their special tokens:

- `pseudo`: pseudo-perplexity (Salazar et al. 2020, equations 1 and 3). Each scored token is masked alone, with all
  others of its piece in sight. Exact for the `--tokens_scored` tokens of each document that are drawn; all of them
  would take as many forward passes as there are tokens.
- `masked`: an estimate from fewer passes, with `--share` of all tokens masked at once and scored, `--draws` times. It
  is as a rule above the pseudo-perplexity, as neighbours are masked too: a number of its own.

Causal models, in windows that move on by `--stride` tokens, of which the first `--windows` of each document are scored:

- `last`: the last `stride` tokens of each window (Press et al. 2022, appendix B): each has nearly the whole length
  before it. Windows end at the same places at every length.
- `window`: all tokens of each window, as in the script of LongLoRA (Chen et al. 2024): most have less before them.

Every number stands in `<output_dir>/results.json` at once, document by document, beside `table.md` and `plot.png`.
"""

import hashlib
import math
import random
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a script draws into a file; it needs no display
import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.markdown import Markdown
from torch import Tensor
from tqdm.auto import tqdm

from common.arguments import parse
from common.errors import UserError, run
from common.files import atomic_write
from common.precision import resolve_precision
from eval.models.language_models import LanguageModel
from eval.models.token_losses import masked_losses, window_losses
from eval.plot import save
from eval.report.records import Records
from eval.synthetic import read_texts
from eval.throughput import parse_lengths


@dataclass
class Arguments:
    """What is compared on what, and where the results go."""

    model: list[str] = field(
        metadata={"help": "folders or Hub ids of masked or causal language models, or .gguf files"}
    )
    data: str = field(metadata={"help": ".txt, .jsonl or .jsonl.gz with text fields, or a folder of such"})
    output_dir: str = field(metadata={"help": "folder of results.json, table.md and plot.png"})
    lengths: list[str] = field(
        default_factory=lambda: ["512,2048,8192"], metadata={"help": "tokens that are read, special ones included"}
    )
    labels: list[str] = field(
        default_factory=list, metadata={"help": "what tables and plots call the models; default: as --model does"}
    )
    documents: int = field(default=20, metadata={"help": "the first so many that are long enough"})
    tokens_scored: int = field(default=32, metadata={"help": "pseudo: tokens of a document; 0: leave it out"})
    draws: int = field(default=4, metadata={"help": "masked: sets of masked tokens of a document; 0: leave it out"})
    share: float = field(default=0.15, metadata={"help": "masked: how many tokens are masked at once"})
    stride: int = field(default=256, metadata={"help": "last, window: tokens from one window to the next"})
    windows: int = field(default=8, metadata={"help": "last, window: windows of a document"})
    seed: int = field(default=0, metadata={"help": "decides which tokens are masked"})
    batch_tokens: int = field(default=16384, metadata={"help": "tokens in one forward pass"})
    precision: str = field(default="float32", metadata={"help": "float32, bfloat16 or auto"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run code that comes with a model"})


@dataclass(frozen=True)
class Point:
    """One number of the table: a model at a length.

    Attributes:
        model: its label.
        score: `pseudo`, `masked`, `last` or `window`.
        length: tokens that are read.
        losses: of each document the sum of its losses and the number of tokens scored.
    """

    model: str
    score: str
    length: int
    losses: list[tuple[float, int]]

    @property
    def perplexity(self) -> float:
        """exp(mean loss) over all scored tokens."""
        return math.exp(sum(loss for loss, _ in self.losses) / sum(tokens for _, tokens in self.losses))

    @property
    def error(self) -> float | None:
        """Standard error over the documents, to first order; None for a single one."""
        if len(self.losses) < 2:
            return None
        mean, tokens = math.log(self.perplexity), sum(tokens for _, tokens in self.losses)
        deviations = [(loss - mean * own) * len(self.losses) / tokens for loss, own in self.losses]
        return self.perplexity * statistics.stdev(deviations, xbar=0.0) / math.sqrt(len(self.losses))


def judge(arguments: Arguments) -> list[Point]:
    """Measure what is missing.

    Args:
        arguments: as on the command line.

    Returns:
        A point for each model, score and length, in the order asked for.

    Raises:
        UserError: numbers, data or models that cannot be; told before anything is measured.
    """
    lengths, labels = parse_lengths(arguments.lengths), arguments.labels or arguments.model
    check(arguments, labels)
    precision = resolve_precision(arguments.precision)
    texts = read_texts(arguments.data, "--data")
    contexts = {}
    for name in arguments.model:  # what is wrong with the last one is told before the first is measured
        model = load(name, arguments, precision)
        contexts[name] = model.context
    if max(contexts.values()) < max(lengths):
        raise UserError(
            f"--lengths: {max(lengths)} tokens are more than the context of {', '.join(contexts)}; give at most "
            f"{max(contexts.values())}"
        )
    records, points = Records(Path(arguments.output_dir, "results.json")), []
    for name, label in zip(arguments.model, labels, strict=True):
        if len(contexts) > 1:
            model = load(name, arguments, precision)
        readable = [length for length in lengths if length <= model.context]
        points += measure(model, label, texts, readable, max(lengths), records, arguments)
    return points


def check(arguments: Arguments, labels: Sequence[str]) -> None:
    """Refuses numbers that make no sense."""
    if len(set(labels)) != len(arguments.model):
        raise UserError("--labels: give a different one for each --model")
    if min(arguments.documents, arguments.stride, arguments.windows, arguments.batch_tokens) < 1:
        raise UserError("--documents, --stride, --windows and --batch_tokens must be positive")
    if min(arguments.tokens_scored, arguments.draws) < 0 or arguments.tokens_scored + arguments.draws == 0:
        raise UserError("--tokens_scored and --draws must not be negative, nor both 0")
    if not 0 < arguments.share < 1:
        raise UserError(f"--share {arguments.share} must lie between 0 and 1")


def load(name: str, arguments: Arguments, precision: str) -> LanguageModel:
    """The model; refuses one that cannot be scored as asked."""
    model = LanguageModel(name, precision, arguments.trust_remote_code)
    shortest = parse_lengths(arguments.lengths)[0]
    if model.is_causal and shortest - len(model.lead) < arguments.stride + (not model.lead):
        raise UserError(
            f"--stride {arguments.stride} leaves a window of {shortest} tokens no context for the first of its last "
            f"{arguments.stride} tokens; give a smaller one"
        )
    if not model.is_causal and shortest <= len(model.lead) + len(model.closing):
        raise UserError(f"--lengths: {shortest} tokens have no room for any beside the special ones")
    if not model.is_causal and model.tokenizer.mask_token_id is None:
        raise UserError(f"the tokenizer of {name} has no mask token, which a masked language model is scored with")
    return model


def measure(
    model: LanguageModel,
    label: str,
    texts: Sequence[str],
    lengths: Sequence[int],
    longest: int,
    records: Records,
    arguments: Arguments,
) -> list[Point]:
    """The points of one model; what is in `records` is not measured again."""
    stretch = longest - len(model.lead) - (0 if model.is_causal else len(model.closing))
    documents = long_documents(model, texts, stretch, arguments)
    found: dict[tuple[str, int], list[tuple[float, int]]] = defaultdict(list)
    todo = [(name, settings, length) for name, settings in passes(model, arguments).items() for length in lengths]
    with tqdm(total=len(todo) * len(documents), desc=label, unit="document") as progress:
        for name, settings, length in todo:
            for digest, ids in documents.items():
                case = {"model": model.folder.revision, "precision": model.precision, "pass": name, **settings}
                case |= {"length": length, "longest": longest, "document": digest}
                row = records.find(case)
                if row is None:
                    generator = random.Random(f"{name}-{arguments.seed}-{digest}")
                    losses = score(model, name, ids, stretch, length, arguments, generator)
                    sums = {key: (float(torch.cat(of).sum()), sum(map(len, of))) for key, of in losses.items()}
                    row = records.add(case, label=label, losses=sums)
                for key, (loss, tokens) in row["losses"].items():
                    found[key, length].append((loss, tokens))
                progress.update()
    return [Point(label, key, length, losses) for (key, length), losses in found.items()]


def long_documents(model: LanguageModel, texts: Iterable[str], stretch: int, arguments: Arguments) -> dict[str, Tensor]:
    """Hash -> ids of the first documents of at least `stretch` tokens, and no more of them than is scored."""
    most = stretch + arguments.stride * (arguments.windows - 1)
    documents: dict[str, Tensor] = {}
    longest = 0
    for text in texts:
        ids = torch.tensor(model.tokenize(text), dtype=torch.long)
        longest = max(longest, len(ids))
        if len(ids) >= stretch:
            documents[hashlib.sha256(text.encode()).hexdigest()[:16]] = ids[:most]
        if len(documents) == arguments.documents:
            break
    if not documents:
        raise UserError(
            f"--data {arguments.data}: the longest text has {longest} tokens, and {stretch} are needed for the "
            "longest of --lengths; give longer texts or shorter lengths"
        )
    return documents


def passes(model: LanguageModel, arguments: Arguments) -> dict[str, dict[str, Any]]:
    """What is done with each document, and the arguments that its numbers depend on."""
    if model.is_causal:
        return {"windows": {"stride": arguments.stride, "windows": arguments.windows}}
    both: dict[str, dict[str, Any]] = {
        "pseudo": {"tokens_scored": arguments.tokens_scored, "seed": arguments.seed},
        "masked": {"draws": arguments.draws, "share": arguments.share, "seed": arguments.seed},
    }
    return {name: settings for name, settings in both.items() if settings.get("tokens_scored", arguments.draws)}


def score(
    model: LanguageModel,
    name: str,
    ids: Tensor,
    stretch: int,
    length: int,
    arguments: Arguments,
    generator: random.Random,
) -> dict[str, list[Tensor]]:
    """Losses `(n,)` under the name of each perplexity that a pass gives."""
    if name == "windows":
        ends = range(stretch, len(ids) + 1, arguments.stride)[: arguments.windows]
        losses = window_losses(model, ids, ends, length, arguments.batch_tokens)
        return {"last": [of[-arguments.stride :] for of in losses], "window": losses}
    places = range(stretch)
    if name == "pseudo":
        masks = [{place} for place in generator.sample(places, min(arguments.tokens_scored, stretch))]
    else:
        count = max(1, round(arguments.share * stretch))
        masks = [set(generator.sample(places, count)) for _ in range(arguments.draws)]
    return {name: [masked_losses(model, ids[:stretch], masks, length, arguments.batch_tokens)]}


# Report ---------------------------------------------------------------------------------------------------------------


def titles(arguments: Arguments) -> dict[str, str]:
    """What each number is, in a line."""
    return {
        "pseudo": f"Pseudo-perplexity: {arguments.tokens_scored} tokens a document, each masked alone",
        "masked": f"Masked perplexity, an estimate: {arguments.share:.0%} of the tokens masked at once",
        "last": f"Perplexity of the last {arguments.stride} tokens of each window",
        "window": "Perplexity of all tokens of each window",
    }


def as_markdown(points: Sequence[Point], lengths: Sequence[int], title_of: dict[str, str]) -> str:
    """A table for each kind of perplexity: a row a model, a column a length."""
    tables = []
    for name in (name for name in title_of if name in {point.score for point in points}):
        of_name = [point for point in points if point.score == name]
        cells: dict[str, dict[int, str]] = defaultdict(dict)
        for point in of_name:
            digits = 2 if point.perplexity < 100 else 0
            error = "" if point.error is None else f" ± {point.error:,.{digits}f}"
            cells[point.model][point.length] = f"{point.perplexity:,.{digits}f}{error}"
        table = [["model", *(f"{n:,}" for n in lengths)], ["---", *["---:"] * len(lengths)]]
        table += [[model, *(row.get(n, "beyond context") for n in lengths)] for model, row in cells.items()]
        counts = {(len(point.losses), sum(tokens for _, tokens in point.losses)) for point in of_name}
        scored = ", ".join(f"{tokens:,} tokens of {documents} documents" for documents, tokens in sorted(counts))
        tables.append(f"{title_of[name]} ({scored})\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in table))
    return "\n".join(tables)


def draw(points: Sequence[Point], path: Path, title_of: dict[str, str]) -> None:
    """A panel for each kind of perplexity: perplexity against length, a line a model."""
    names = [name for name in title_of if name in {point.score for point in points}]
    models = list(dict.fromkeys(point.model for point in points))
    figure, axes = plt.subplots(1, len(names), figsize=(5.5 * len(names), 4.2), squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], names, strict=True):
        for i, model in enumerate(models):
            line = sorted(
                (p.length, p.perplexity, p.error or 0.0) for p in points if (p.model, p.score) == (model, name)
            )
            if line:
                axis.errorbar(*zip(*line, strict=True), marker="o", capsize=3, color=f"C{i}")
        lengths = sorted({point.length for point in points if point.score == name})
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
        axis.set_xlabel("tokens that are read")
        axis.set_title(title_of[name].replace(": ", ":\n"), fontsize=9)
        axis.grid(alpha=0.3)
    handles = [plt.Rectangle((0, 0), 1, 1, color=f"C{i}") for i in range(len(models))]
    figure.legend(handles, models, loc="outside lower center", ncols=3, frameon=False)
    save(figure, path)


def main() -> None:
    """The script."""
    (arguments,) = parse(Arguments)
    points = judge(arguments)
    table = as_markdown(points, parse_lengths(arguments.lengths), titles(arguments))
    atomic_write(Path(arguments.output_dir, "table.md"), table)
    draw(points, Path(arguments.output_dir, "plot.png"), titles(arguments))
    Console(width=None if sys.stdout.isatty() else 120).print(Markdown(table))


if __name__ == "__main__":
    run(main)
