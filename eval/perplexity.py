"""Measure perplexity against context length: what masked and causal language models gain from more context.

    python eval/perplexity.py --model runs/before runs/after --data books.jsonl --lengths 512,2048,8192 \\
        --output_dir runs/perplexity

Except for `window`, the same tokens are scored at every length, so that only their context differs: each document gives
a span of the longest length, and at a shorter length a token is scored within the chunk of the span that contains it.
Documents with fewer tokens are left out. Perplexity is exp(mean loss) over all scored tokens.

Masked models read chunks with their special tokens at both ends:

- `pseudo`: pseudo-perplexity (Salazar et al. 2020, equations 1 and 3). Each scored token is masked alone, and all other
  tokens of its chunk are visible. It is exact for the `--tokens_scored` tokens that are drawn from each document; all
  tokens would take as many forward passes as there are tokens.
- `masked`: an estimate from fewer passes, with `--share` of all tokens masked at once and scored, `--draws` times. As a
  rule it is above the pseudo-perplexity, because neighbours are masked too; the two must not be compared.

Causal models read windows that advance by `--stride` tokens, of which the first `--windows` of each document are used:

- `last`: the last `stride` tokens of each window (Press et al. 2022, appendix B), each with nearly the whole length as
  its context. Windows end at the same places at every length.
- `window`: all tokens of each window, as in the script of LongLoRA (Chen et al. 2024); most have a shorter context.

Each number is written to `<output_dir>/results.json` at once, document by document, next to `table.md` and `plot.png`.
"""

import hashlib
import random
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown
from torch import Tensor
from tqdm.auto import tqdm

from common.arguments import parse
from common.conditions import Not
from common.encoders.precision import resolve_precision
from common.errors import UserError, run
from common.files import atomic_write
from common.provenance import code_hash
from common.records import Records
from eval.models.language_models import LanguageModel
from eval.models.token_losses import masked_losses, window_losses
from eval.report.perplexities import Point, as_markdown, draw
from eval.speed.lengths import parse_lengths
from eval.tasks.texts import read_texts


@dataclass
class Arguments:
    """Options of the script."""

    model: list[str] = field(
        metadata={"help": "folders or Hub ids of masked or causal language models, or .gguf files"}
    )
    data: str = field(
        metadata={"help": ".txt file, .jsonl or .jsonl.gz file with text fields, or a folder of such files"}
    )
    output_dir: str = field(metadata={"help": "folder of results.json, table.md and plot.png", "output": "folder"})
    lengths: list[str] = field(
        default_factory=lambda: ["512,2048,8192"],
        metadata={"help": "context lengths: tokens that are read, with special tokens"},
    )
    labels: list[str] = field(
        default_factory=list, metadata={"help": "names of the models in tables and plots; default: those of --model"}
    )
    documents: int = field(default=20, metadata={"help": "number of documents: the first that are long enough"})
    tokens_scored: int = field(default=32, metadata={"help": "pseudo: tokens scored of each document; 0: leave it out"})
    draws: int = field(default=4, metadata={"help": "masked: sets of masked tokens of each document; 0: leave it out"})
    share: float = field(
        default=0.15,
        metadata={"help": "masked: share of the tokens that is masked at once", "applies": {"draws": Not(0)}},
    )
    stride: int = field(default=256, metadata={"help": "last, window: tokens from one window to the next"})
    windows: int = field(default=8, metadata={"help": "last, window: windows of each document"})
    seed: int = field(default=0, metadata={"help": "random seed of the masks"})
    batch_tokens: int = field(default=16384, metadata={"help": "tokens in one forward pass"})
    precision: str = field(default="float32", metadata={"help": "float32, bfloat16 or auto"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run code that comes with a model"})


def compare(arguments: Arguments) -> list[Point]:
    """Measure what has not been measured yet.

    Args:
        arguments: parsed command-line options.

    Returns:
        A point for each model, score and length, in the requested order.

    Raises:
        UserError: an option, the data or a model is not valid; raised before anything is measured.
    """
    lengths, labels = parse_lengths(arguments.lengths), arguments.labels or arguments.model
    check(arguments, labels)
    precision = resolve_precision(arguments.precision)
    texts = read_texts(arguments.data, "--data")
    contexts = {}
    for name in arguments.model:  # an error of the last model is raised before the first one is measured
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
    """Check the options.

    Raises:
        UserError: a number is out of range, or labels are missing or not different.
    """
    if len(set(labels)) != len(arguments.model):
        raise UserError("--labels: give a different one for each --model")
    if min(arguments.documents, arguments.stride, arguments.windows, arguments.batch_tokens) < 1:
        raise UserError("--documents, --stride, --windows and --batch_tokens must be positive")
    if min(arguments.tokens_scored, arguments.draws) < 0 or arguments.tokens_scored + arguments.draws == 0:
        raise UserError("--tokens_scored and --draws must not be negative, nor both 0")
    if not 0 < arguments.share < 1:
        raise UserError(f"--share {arguments.share} must lie between 0 and 1")


def load(name: str, arguments: Arguments, precision: str) -> LanguageModel:
    """Load a model.

    Args:
        name: a value of `--model`.
        arguments: parsed command-line options.
        precision: `float32` or `bfloat16`.

    Returns:
        The model.

    Raises:
        UserError: the model does not load, or the lengths leave it no token to score.
    """
    model = LanguageModel(name, precision, arguments.trust_remote_code)
    shortest = parse_lengths(arguments.lengths)[0]
    if model.is_causal and shortest - len(model.lead) < arguments.stride + (not model.lead):
        raise UserError(
            f"--stride {arguments.stride} leaves a window of {shortest} tokens no context for the first of its last "
            f"{arguments.stride} tokens; give a smaller one"
        )
    if not model.is_causal and shortest <= len(model.lead) + len(model.closing):
        raise UserError(f"--lengths: {shortest} tokens have no room for any but the special ones")
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
    """Measure one model; what is in `records` is not measured again.

    Args:
        model: the language model.
        label: its name in tables.
        texts: the documents.
        lengths: context lengths within the model's context, in tokens.
        longest: the longest of all requested lengths, which decides the tokens that are scored.
        records: earlier measurements, to which new ones are added.
        arguments: parsed command-line options.

    Returns:
        A point for each score and length.
    """
    span = longest - len(model.lead) - (0 if model.is_causal else len(model.closing))
    documents = long_documents(model, texts, span, arguments)
    computed_by = model.computed_by | {"measured_by": code_hash("eval.perplexity", "eval.models.token_losses")}
    found: dict[tuple[str, int], list[tuple[float, int]]] = defaultdict(list)
    todo = [(name, settings, length) for name, settings in passes(model, arguments).items() for length in lengths]
    with tqdm(total=len(todo) * len(documents), desc=label, unit="document") as progress:
        for name, settings, length in todo:
            for digest, ids in documents.items():
                case = {"model": model.folder.revision, "precision": model.precision, "pass": name, **settings}
                case |= {"length": length, "longest": longest, "document": digest, "computed_by": computed_by}
                row = records.find(case)
                if row is None:
                    generator = random.Random(f"{name}-{arguments.seed}-{digest}")
                    losses = score(model, name, ids, span, length, arguments, generator)
                    sums = {key: (float(torch.cat(of).sum()), sum(map(len, of))) for key, of in losses.items()}
                    row = records.add(case, label=label, losses=sums)
                for key, (loss, tokens) in row["losses"].items():
                    found[key, length].append((loss, tokens))
                progress.update()
    return [Point(label, key, length, losses) for (key, length), losses in found.items()]


def long_documents(model: LanguageModel, texts: Iterable[str], span: int, arguments: Arguments) -> dict[str, Tensor]:
    """Tokenize the first documents that are long enough.

    Args:
        model: its tokenizer is used.
        texts: the documents.
        span: tokens that a document needs.
        arguments: parsed command-line options.

    Returns:
        Hash of the text -> token ids `(n,)` without special tokens, cut after the last token that is scored.

    Raises:
        UserError: no document is long enough.
    """
    most = span + arguments.stride * (arguments.windows - 1)
    documents: dict[str, Tensor] = {}
    longest = 0
    for text in texts:
        ids = torch.tensor(model.tokenize(text), dtype=torch.long)
        longest = max(longest, len(ids))
        if len(ids) >= span:
            documents[hashlib.sha256(text.encode()).hexdigest()[:16]] = ids[:most]
        if len(documents) == arguments.documents:
            break
    if not documents:
        raise UserError(
            f"--data {arguments.data}: the longest text has {longest} tokens, and {span} are needed for the "
            "longest of --lengths; give longer texts or shorter lengths"
        )
    return documents


def passes(model: LanguageModel, arguments: Arguments) -> dict[str, dict[str, Any]]:
    """Return the passes over each document: name -> the options that its numbers depend on."""
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
    span: int,
    length: int,
    arguments: Arguments,
    generator: random.Random,
) -> dict[str, list[Tensor]]:
    """Score one document.

    Args:
        model: the language model.
        name: of the pass: `windows`, `pseudo` or `masked`.
        ids: `(n,)` token ids of the document.
        span: tokens of the longest context without special tokens.
        length: the context length in tokens.
        arguments: parsed command-line options.
        generator: draws the masks.

    Returns:
        Kind of perplexity -> losses `(n,)` in nats.
    """
    if name == "windows":
        ends = range(span, len(ids) + 1, arguments.stride)[: arguments.windows]
        losses = window_losses(model, ids, ends, length, arguments.batch_tokens)
        return {"last": [of[-arguments.stride :] for of in losses], "window": losses}
    places = range(span)
    if name == "pseudo":
        masks = [{place} for place in generator.sample(places, min(arguments.tokens_scored, span))]
    else:
        count = max(1, round(arguments.share * span))
        masks = [set(generator.sample(places, count)) for _ in range(arguments.draws)]
    return {name: [masked_losses(model, ids[:span], masks, length, arguments.batch_tokens)]}


def titles(arguments: Arguments) -> dict[str, str]:
    """Return the title of each kind of perplexity."""
    return {
        "pseudo": f"Pseudo-perplexity: {arguments.tokens_scored} tokens a document, each masked alone",
        "masked": f"Masked perplexity, an estimate: {arguments.share:.0%} of the tokens masked at once",
        "last": f"Perplexity of the last {arguments.stride} tokens of each window",
        "window": "Perplexity of all tokens of each window",
    }


def main() -> None:
    """Run the script."""
    (arguments,) = parse(Arguments)
    points = compare(arguments)
    table = as_markdown(points, parse_lengths(arguments.lengths), titles(arguments))
    atomic_write(Path(arguments.output_dir, "table.md"), table)
    draw(points, Path(arguments.output_dir, "plot.png"), titles(arguments))
    Console(width=None if sys.stdout.isatty() else 120).print(Markdown(table))


if __name__ == "__main__":
    run(main)
