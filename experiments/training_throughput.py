"""Contrastive training side by side with sentence-transformers: eval/throughput.py --training.

Both make the same step on the same texts with the same weights: InfoNCE with gradient caching over all pairs, then
AdamW (experiments/measured_step.py, experiments/published_step.py). Before anything is timed,
loss and gradients of the two are compared, and the script ends if they differ by more than `TOLERANCE`. Dropout is 0.
What sentence-transformers runs is:

- for `full` attention, transformers' own BERT with SDPA, the weights that `to_native` writes;
- for every other pattern, which it does not have, our model.

Every number comes from a fresh process, and the repeats are interleaved. Each side is tried with each of the
`--batch_tokens`; `table.md` has them all, and compares the fastest of sentence-transformers with the fastest of ours
that takes no more memory.
"""

import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from common.errors import UserError
from common.files import atomic_write
from common.jsonl import read_text_columns
from common.patterns import parse_pattern
from eval.speed.growth import GB
from modeling_longembed import LongEmbedModel
from modeling_longembed.conversion_families_longembed import FAMILIES
from modeling_longembed.export_native_longembed import native_weights

ROOT = Path(__file__).resolve().parent.parent
OURS, PUBLISHED = "experiments.measured_step", "experiments.published_step"
TOLERANCE = 1e-4  # of loss and gradients, relative
QUERY = 24  # tokens of a query of random texts
TEMPERATURE = 0.05


@dataclass
class TrainingThroughputArguments:
    """What --training compares."""

    training: bool = field(
        default=False, metadata={"help": "compare contrastive steps with sentence-transformers' instead"}
    )
    base_model: str | None = field(
        default=None, metadata={"help": "--training: the encoder, a BERT; its position table is repeated"}
    )
    pairs: str | None = field(
        default=None,
        metadata={
            "help": "--training: .jsonl or .jsonl.gz with anchor and positive, cut off at each of --lengths; default: "
            f"random documents that are all as long as that, with queries of {QUERY} tokens"
        },
    )
    pair_count: int = field(default=16, metadata={"help": "--training: pairs of a batch"})
    batch_tokens: list[int] = field(
        default_factory=lambda: [1, 4096, 16384], metadata={"help": "--training: tokens held at once, all are tried"}
    )


@dataclass(frozen=True)
class Row:
    """One side under one setting: `who` is a module that measures, `texts` and `model` are what it reads."""

    who: str
    pattern: str
    length: int
    batch_tokens: int
    model: str
    texts: str
    threads: int

    def job(self, gradients: Path | None = None) -> dict[str, Any]:
        """What the process is given."""
        shared = {name: getattr(self, name) for name in ("model", "texts", "batch_tokens", "threads")}
        return shared | {"temperature": TEMPERATURE, "gradients": None if gradients is None else str(gradients)}


def compare_training(
    arguments: TrainingThroughputArguments,
    patterns: list[str],
    lengths: list[int],
    repeats: int,
    threads: int,
    output: Path,
) -> str:
    """Measure, and write `training.json` and `table.md`.

    Returns:
        The table.

    Raises:
        UserError: no base model, one that is no BERT, or two sides that do not compute the same.
    """
    if arguments.base_model is None:
        raise UserError("--training needs --base_model, a BERT such as sentence-transformers/all-MiniLM-L6-v2")
    output.mkdir(parents=True, exist_ok=True)
    models = {pattern: _models(arguments.base_model, pattern, max(lengths), output) for pattern in patterns}
    counts = {}
    rows = []
    for length in lengths:
        texts = output / f"texts-{length}.json"
        columns = _columns(arguments, length, models[patterns[0]][OURS])
        counts[length] = sum(len(text) for column in columns for text in column)
        atomic_write(texts, json.dumps(columns))
        for pattern in patterns:
            _check_equal(models[pattern], pattern, length, texts, max(arguments.batch_tokens), threads, output)
            rows += [
                Row(who, pattern, length, tokens, models[pattern][who], str(texts), threads)
                for who in (OURS, PUBLISHED)
                for tokens in arguments.batch_tokens
            ]
    measured: dict[Row, list[dict]] = {row: [] for row in rows}
    for repeat in range(repeats):
        for row in rows:
            measured[row].append(_run(row.who, row.job()))
            seconds, peak = measured[row][-1]["seconds"], measured[row][-1]["peak"] / GB
            print(f"repeat {repeat + 1}, {_told(row)}: {seconds:.2f} s, {peak:.2f} GB", flush=True)
            atomic_write(
                output / "training.json",
                json.dumps([asdict(row) | {"repeats": found} for row, found in measured.items()]),
            )
    table = _table(measured, arguments.pair_count, counts)
    atomic_write(output / "table.md", table)
    return table


def _models(base: str, pattern: str, context: int, output: Path) -> dict[str, str]:
    """The folders that the two sides load."""
    chosen = parse_pattern(pattern)
    ours, native = output / f"model-{chosen['type']}-{context}", output / f"native-{context}"
    if not ours.exists():
        choices: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_dropout": 0.0, "attention_patterns": chosen}
        model = LongEmbedModel.from_encoder(
            base, max_position_embeddings=context, position_extension="repeat", **choices
        )
        model.save_pretrained(str(ours))
        if chosen["type"] == "full" and not native.exists():
            model.to_native(native)
            config = json.loads((native / "config.json").read_text())
            if config["model_type"] != "bert":
                raise UserError(f"--base_model {base}: is a {config['model_type']} model; give a BERT")
            (native / "config.json").write_text(json.dumps(config | {"attention_probs_dropout_prob": 0.0}))
    return {OURS: str(ours), PUBLISHED: str(native if chosen["type"] == "full" else ours)}


def _columns(arguments: TrainingThroughputArguments, length: int, model: str) -> list[list[list[int]]]:
    """Token ids of queries and documents."""
    if arguments.pairs is None:
        draw, sizes = np.random.default_rng(0), (min(QUERY, length), length)
        vocabulary = LongEmbedModel.config_class.from_pretrained(model).vocab_size
        return [draw.integers(1, vocabulary, (arguments.pair_count, size)).tolist() for size in sizes]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    pairs = [pair for _, pair in islice(read_text_columns(arguments.pairs, "anchor", "positive"), arguments.pair_count)]
    if len(pairs) < arguments.pair_count:
        raise UserError(f"{arguments.pairs}: has {len(pairs)} pairs, --pair_count asks for {arguments.pair_count}")
    return [
        tokenizer(list(column), truncation=True, max_length=length)["input_ids"] for column in zip(*pairs, strict=True)
    ]


def _check_equal(
    models: dict[str, str], pattern: str, length: int, texts: Path, batch_tokens: int, threads: int, output: Path
) -> None:
    """Loss and gradients of the two sides, parameter by parameter, against the largest gradient there is."""
    losses, gradients = [], []
    for who in (OURS, PUBLISHED):
        file = output / f"gradients-{who}.safetensors"
        row = Row(who, pattern, length, batch_tokens, models[who], str(texts), threads)
        losses.append(_run(who, row.job(file))["loss"])
        gradients.append(load_file(file))
        file.unlink()
    ours, published = gradients
    if models[OURS] != models[PUBLISHED]:  # in the names of the native model
        model = LongEmbedModel.from_pretrained(models[OURS])
        for name, parameter in model.named_parameters():
            parameter.data = ours.get(name, parameter.data * 0)
        ours = native_weights(model, FAMILIES["bert"])
    largest = max(gradient.abs().max().item() for gradient in published.values())
    difference = max((ours[name] - gradient).abs().max().item() for name, gradient in published.items()) / largest
    loss = abs(losses[0] - losses[1]) / abs(losses[1])
    print(f"{pattern}, {length} tokens: loss differs by {loss:.1e}, gradients by {difference:.1e}", flush=True)
    if not max(loss, difference) <= TOLERANCE:
        raise UserError(
            f"{pattern} at {length} tokens: loss or gradients differ by more than {TOLERANCE}, nothing is timed"
        )


def _run(who: str, job: dict) -> dict:
    """A fresh process."""
    environment = os.environ | {name: str(job["threads"]) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    command = [sys.executable, "-m", who, json.dumps(job)]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    if process.returncode:
        last = (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        raise UserError(f"{who} could not be measured: {last}")
    return json.loads(process.stdout.splitlines()[-1])


def _told(row: Row) -> str:
    side = "ours" if row.who == OURS else "sentence-transformers"
    return f"{side}, {row.pattern}, {row.length} tokens, {row.batch_tokens} at once"


def _table(measured: dict[Row, list[dict]], pairs: int, counts: dict[int, int]) -> str:
    """Markdown: all settings, with a line under each comparison that says what the best of both come to."""
    lines = [
        "| attention | length | tokens of the batch | side | tokens at once | pairs/s | peak, GB |",
        "|---" * 7 + "|",
    ]
    found: dict[tuple[str, int], dict[str, list[tuple[float, float]]]] = {}
    for row, repeats in measured.items():
        speeds, peak = (
            [pairs / one["seconds"] for one in repeats],
            statistics.median(one["peak"] for one in repeats) / GB,
        )
        speed = statistics.median(speeds)
        spread = (max(speeds) - min(speeds)) / 2 / speed
        side = "ours" if row.who == OURS else "sentence-transformers"
        cells = [row.pattern, f"{row.length:,}", f"{counts[row.length]:,}", side, f"{row.batch_tokens:,}"]
        lines.append(f"| {' | '.join([*cells, f'{speed:.3g} ± {spread:.0%}', f'{peak:.2f}'])} |")
        found.setdefault((row.pattern, row.length), {OURS: [], PUBLISHED: []})[row.who].append((speed, peak))
    lines.append("")
    for (pattern, length), sides in found.items():
        published, peak = max(sides[PUBLISHED])
        within = [setting for setting in sides[OURS] if setting[1] <= peak]
        if not within:
            lines.append(f"- {pattern}, {length:,} tokens: no setting of ours takes {peak:.2f} GB or less")
            continue
        ours, own_peak = max(within)
        lines.append(
            f"- {pattern}, {length:,} tokens: {ours / published:.2f} times the pairs/s of sentence-transformers' "
            f"fastest setting, at {own_peak:.2f} GB against {peak:.2f} GB"
        )
    return "\n".join(lines) + "\n"
