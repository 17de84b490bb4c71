"""Passkey retrieval against length and depth, as heat maps: how far, and where, a model reads.

    python eval/passkey.py --model runs/my/final truncate:my-encoder:512 --lengths 512,8192 --output_dir runs/passkey
    python eval/passkey.py --model generate:my-language-model --lengths 1024,2048,4096 --output_dir runs/passkey

Embedding models (whatever eval/mteb_long.py judges, but `bm25`) find documents, as in LongEmbed (Zhu et al. 2024): a
cell has `--trials` documents of one length, each with the pass key of another person at the depth of the cell, and
asks for each person's. Its accuracy is how often the right document is nearest; of k that are equally near each counts
1 / k, so that a model that tells nothing apart scores exactly 1 / trials. People and filler are the same at all depths.

Causal language models (`generate:PATH`) complete the prompt of landmark attention (Mohtashami & Jaggi 2023), which
LongLoRA (Chen et al. 2024) uses as well. Accuracy is how many of `--trials` keys greedy decoding gives back whole. It
does so exactly if each token of the key is the likeliest one after all before it, which one forward pass tells.

A depth is where the key lies in the text around it, from 0 (at its start) to 1 (at its end), to the nearest sentence.
Every cell stands in `<output_dir>/results.json` at once, beside `table.md` and `heatmap.png`.
"""

import hashlib
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a script draws into a file; it needs no display
import matplotlib.pyplot as plt
import numpy as np
import torch
from rich.console import Console
from rich.markdown import Markdown
from tqdm.auto import tqdm

from common.arguments import parse
from common.encoders import Encoder
from common.errors import UserError, run
from common.files import atomic_write
from common.precision import resolve_precision
from eval.models.judged import JudgedModel
from eval.models.language_models import LanguageModel
from eval.plot import save
from eval.report.records import Records
from eval.synthetic import FILLER, MOST_DOCUMENTS, Haystack, Needle, passkey_needles, read_haystack
from eval.throughput import parse_lengths

# The prompt of landmark attention, whose wording decides what a model answers.
TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there.\n"
)
GARBAGE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
QUESTION = "\nWhat is the pass key? The pass key is"
KEYS = range(1, 50_001)
REPEATS = 50  # of the filler: it goes round in any case, but its tokens are looked up rather than counted


@dataclass
class Arguments:
    """What is judged, on which lengths and depths, and where the results go."""

    model: list[str] = field(
        metadata={
            "help": "embedding models by folder or Hub id, truncate:PATH:N, chunk-mean:PATH:N, chunk-max:PATH:N; "
            "causal language models as generate:PATH, also of a .gguf file"
        }
    )
    output_dir: str = field(metadata={"help": "folder of results.json, table.md and heatmap.png"})
    lengths: list[str] = field(
        default_factory=lambda: ["256,512,1024,2048,4096,8192"],
        metadata={"help": "tokens of a document, or of prompt and key together"},
    )
    depths: int = field(default=6, metadata={"help": "so many, evenly from 0 to 1"})
    labels: list[str] = field(
        default_factory=list, metadata={"help": "what tables and plots call the models; default: as --model does"}
    )
    trials: int = field(default=20, metadata={"help": "documents and questions of a cell; prompts of a cell"})
    haystack: str | None = field(
        default=None, metadata={"help": ".txt or .jsonl text around the keys; default: sentences that say nothing"}
    )
    seed: int = field(default=0, metadata={"help": "the same seed gives the same documents"})
    precision: str = field(default="float32", metadata={"help": "float32, bfloat16 or auto"})
    batch_tokens: int = field(default=16384, metadata={"help": "tokens in one forward pass of an embedding model"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run code that comes with a model"})


@dataclass(frozen=True)
class Cell:
    """One number: the accuracy of a model at a length and a depth."""

    model: str
    length: int
    depth: float
    accuracy: float


# Embedding models -----------------------------------------------------------------------------------------------------


def passkey_documents(source: Haystack, needles: Sequence[Needle], length: int, depth: float, seed: int) -> list[str]:
    """A document for each needle, at most `length` tokens long; at another depth the same text stands around it."""
    generator = random.Random(f"passkey-{seed}-{length}")
    return [source.document(needle, length, depth, generator.randrange(len(source.starts))) for needle in needles]


def accuracy(scores: np.ndarray) -> float:
    """How many rows of `scores` `(n, n)` have their largest entry on the diagonal; 1 / k where k entries are largest.

    Entries that differ by rounding alone are equal.
    """
    right, rounding = np.diagonal(scores)[:, None], 1e-6 * max(1.0, float(np.abs(scores).max()))
    tied = (np.abs(scores - right) <= rounding).sum(1)
    return float(np.mean(np.where((scores > right + rounding).any(1), 0.0, 1.0 / tied)))


def similarities(encoder: Encoder, kind: str, questions: list[np.ndarray], documents: list[np.ndarray]) -> np.ndarray:
    """Scores `(n, m)` of matrices of questions and documents, `(k, d)` each, as eval/models/judged.py compares them."""
    vectors = torch.from_numpy(np.stack([rows.sum(0) for rows in questions]))
    if kind == "chunk-max":
        vectors = torch.nn.functional.normalize(vectors)
        chunks = [torch.nn.functional.normalize(torch.from_numpy(rows)) for rows in documents]
        return np.stack([(vectors @ rows.T).amax(1).numpy() for rows in chunks], axis=1)
    others = torch.from_numpy(np.stack([rows.sum(0) for rows in documents]))
    if kind == "chunk-mean":
        vectors, others = torch.nn.functional.normalize(vectors), torch.nn.functional.normalize(others)
    return encoder.model.similarity(vectors, others).numpy()


class Retrieval:
    """An embedding model that has to find the document with the key.

    Args:
        spec: the model.
        encoder: what makes its vectors.
        haystack: the text around the keys; None: sentences that say nothing.
    """

    def __init__(self, spec: JudgedModel, encoder: Encoder, haystack: str | None):
        self.kind, self.encoder, self.identity = spec.kind, encoder, f"{spec.kind}:{encoder.identity}"
        self.source = Haystack(haystack or FILLER * REPEATS, encoder.model.tokenizer)
        self.room = len(encoder.prompt_ids("document"))

    def lengths(self, lengths: Sequence[int]) -> list[int]:
        """All: what is beyond the model's context is cut off, and that is the answer."""
        return list(lengths)

    def judge(self, length: int, depth: float, trials: int, seed: int) -> float:
        """The accuracy of a cell."""
        needles = passkey_needles(trials, seed=seed + length)
        documents = passkey_documents(self.source, needles, length - self.room, depth, seed)
        found = self.encoder(documents, "document")
        asked = self.encoder([needle.question for needle in needles], "query")
        return accuracy(similarities(self.encoder, self.kind, asked, found))


# Language models ------------------------------------------------------------------------------------------------------


def passkey_prompt(source: Haystack, key: int, tokens: int, depth: float) -> str:
    """The prompt of landmark attention, at most `tokens` tokens long."""
    needle = Needle(f"The pass key is {key}. Remember it. {key} is the pass key. ", QUESTION)
    return source.document(needle, tokens, depth, start=0, before=TASK, after=QUESTION)


def is_greedy(model: LanguageModel, ids: Sequence[int], count: int) -> bool:
    """Whether greedy decoding after all but the last `count` of `ids` gives those, token for token."""
    chosen = torch.zeros(1, len(ids) - 1, dtype=torch.bool)
    chosen[:, -count:] = True
    return model.logits(torch.tensor([ids[:-1]]), chosen).argmax(-1).tolist() == list(ids[-count:])


class Generation:
    """A causal language model that has to say the key.

    Args:
        model: the model.
        haystack: the text around the keys; None: the sentences of landmark attention.
    """

    def __init__(self, model: LanguageModel, haystack: str | None):
        if not model.is_causal:
            raise UserError(f"generate:{model.folder.name} is a masked language model; give one that predicts the next")
        self.model, self.identity = model, f"generate:{model.folder.revision}:{model.precision}"
        self.source = Haystack(haystack or GARBAGE * REPEATS, model.tokenizer)

    def lengths(self, lengths: Sequence[int]) -> list[int]:
        """Those within the model's context."""
        return [length for length in lengths if length <= self.model.context]

    def judge(self, length: int, depth: float, trials: int, seed: int) -> float:
        """The accuracy of a cell."""
        generator = random.Random(f"generate-{seed}-{length}-{depth}")
        keys = [generator.choice(KEYS) for _ in range(trials)]
        given = 0
        for key in keys:
            answer = self.model.tokenize(f" {key}")
            prompt = self.model.tokenize(passkey_prompt(self.source, key, length - len(answer), depth))
            given += is_greedy(self.model, [*self.model.lead, *prompt, *answer], len(answer))
        return given / trials


# All of it ------------------------------------------------------------------------------------------------------------


def judge(arguments: Arguments) -> list[Cell]:
    """Measure the cells that are missing.

    Args:
        arguments: as on the command line.

    Returns:
        The cells of all models, in the order asked for.

    Raises:
        UserError: numbers or models that cannot be, or a length without room for a key.
    """
    lengths, labels = parse_lengths(arguments.lengths), arguments.labels or arguments.model
    if len(set(labels)) != len(arguments.model):
        raise UserError("--labels: give a different one for each --model")
    if not 1 <= arguments.trials <= MOST_DOCUMENTS["passkey"] or arguments.depths < 1 or arguments.batch_tokens < 1:
        raise UserError(
            f"--trials {arguments.trials}, --depths {arguments.depths} and --batch_tokens {arguments.batch_tokens} "
            f"must be positive, and the first at most {MOST_DOCUMENTS['passkey']}"
        )
    haystack = read_haystack(arguments.haystack) if arguments.haystack else None
    records, cells = Records(Path(arguments.output_dir, "results.json")), []
    settings: dict[str, Any] = {"trials": arguments.trials, "seed": arguments.seed}
    settings |= {"haystack": hashlib.sha256(haystack.encode()).hexdigest()[:16] if haystack else None}
    loaders = [loader(name, arguments, haystack) for name in arguments.model]
    for load, name, label in zip(loaders, arguments.model, labels, strict=True):
        model = load()
        readable = model.lengths(lengths)
        if not readable:
            raise UserError(f"--lengths: {lengths[0]} tokens are more than the context of {name}; give shorter ones")
        grid = [(length, depth) for length in readable for depth in depths(arguments.depths)]
        for length, depth in tqdm(grid, desc=label, unit="cell"):
            case = {"model": model.identity, "length": length, "depth": depth, **settings}
            row = records.find(case)
            if row is None:
                found = model.judge(length, depth, arguments.trials, arguments.seed)
                row = records.add(case, label=label, accuracy=found)
            cells.append(Cell(label, length, depth, row["accuracy"]))
    return cells


def depths(count: int) -> list[float]:
    """`count` depths from 0 to 1; a single one is in the middle."""
    return [0.5] if count == 1 else [round(i / (count - 1), 4) for i in range(count)]


def loader(name: str, arguments: Arguments, haystack: str | None) -> Callable[[], Any]:
    """What loads a model; that it is there is seen at once."""
    precision = resolve_precision(arguments.precision)
    if name.startswith("generate:"):
        path = name.removeprefix("generate:")
        return lambda: Generation(LanguageModel(path, precision, arguments.trust_remote_code), haystack)
    spec = JudgedModel.parse(name, precision=precision)
    if spec.folder is None:
        raise UserError(
            f"--model {name} has no vectors; it finds every key that it has words for, and is left out here"
        )
    return lambda: Retrieval(spec, spec.load_encoder(arguments.batch_tokens, arguments.trust_remote_code), haystack)


# Report ---------------------------------------------------------------------------------------------------------------


def grids(cells: Sequence[Cell]) -> Iterator[tuple[str, list[int], list[float], np.ndarray]]:
    """Of each model its name, lengths, depths, and accuracies `(depths, lengths)`, NaN beyond its context."""
    lengths, rows = sorted({cell.length for cell in cells}), sorted({cell.depth for cell in cells})
    for model in dict.fromkeys(cell.model for cell in cells):
        grid = np.full((len(rows), len(lengths)), np.nan)
        for cell in cells:
            if cell.model == model:
                grid[rows.index(cell.depth), lengths.index(cell.length)] = cell.accuracy
        yield model, lengths, rows, grid


def as_markdown(cells: Sequence[Cell]) -> str:
    """A table for each model: accuracy in percent, a row a depth, a column a length, and their means."""
    tables = []
    for model, lengths, rows, grid in grids(cells):
        table = [["depth", *(f"{length:,}" for length in lengths)], ["---:"] * (len(lengths) + 1)]
        named = [*zip((f"{depth:.0%}" for depth in rows), grid, strict=True), ("mean", grid.mean(0))]
        table += [[name, *("" if np.isnan(value) else f"{value:.0%}" for value in row)] for name, row in named]
        tables.append(f"{model}\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in table))
    return "\n".join(tables)


def draw(cells: Sequence[Cell], path: Path) -> None:
    """One figure with a heat map a model: lengths across, depths down, accuracy as colour and in percent."""
    models = list(grids(cells))
    widths = max(3.2, 0.6 * len(models[0][1]) + 1.2)
    figure, axes = plt.subplots(
        1, len(models), figsize=(widths * len(models) + 0.8, 3.6), squeeze=False, layout="constrained", sharey=True
    )
    for axis, (model, lengths, rows, grid) in zip(axes[0], models, strict=True):
        image = axis.imshow(grid, vmin=0, vmax=1, cmap="YlGn", aspect="auto")
        for (i, j), value in np.ndenumerate(grid):
            if not np.isnan(value):
                axis.text(
                    j,
                    i,
                    f"{100 * value:.0f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if value > 0.7 else "black",
                )
        axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45)
        axis.set_yticks(range(len(rows)), [f"{depth:.0%}" for depth in rows])
        axis.set_xlabel("length (tokens)")
        axis.set_title(model, fontsize=9)
    axes[0][0].set_ylabel("depth of the pass key")
    figure.colorbar(image, ax=axes[0], label="accuracy")
    save(figure, path)


def main() -> None:
    """The script."""
    (arguments,) = parse(Arguments)
    cells = judge(arguments)
    atomic_write(Path(arguments.output_dir, "table.md"), as_markdown(cells))
    draw(cells, Path(arguments.output_dir, "heatmap.png"))
    Console(width=None if sys.stdout.isatty() else 120).print(Markdown(as_markdown(cells)))


if __name__ == "__main__":
    run(main)
