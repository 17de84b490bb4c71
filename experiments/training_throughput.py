"""Compare a training step with sentence-transformers in speed and memory: the table of docs/reports/training-speed.md.

    python experiments/training_throughput.py --base_model sentence-transformers/all-MiniLM-L6-v2 \\
        --attention_patterns full block:size=256 --lengths 512,2048,8192 --output_dir runs/training_throughput

Both sides make the same step on the same texts with the same weights: InfoNCE with gradient caching over all pairs,
then AdamW (experiments/measured_steps.py). Before anything is timed, the loss and the gradients of both sides are
compared, and the script ends if they differ by more than `TOLERANCE`. Dropout is 0. sentence-transformers runs

- for `full` attention transformers' own BERT with SDPA, with the weights that `to_native` writes;
- for every other pattern, which it does not have, the LongEmbed model.

Every number comes from a fresh process, and the repeats are interleaved. Each side is tried with each of the
`--batch_tokens`; `table.md` has all of them, and compares the fastest setting of sentence-transformers with our fastest
setting that takes no more memory.
"""

import hashlib
import json
import statistics
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file
from transformers import AutoTokenizer

from common.arguments import parse
from common.encoders.model_folder import ModelFolder
from common.errors import UserError, run
from common.files import atomic_folder, atomic_write
from common.jsonl import read_text_columns
from common.patterns import parse_pattern
from common.provenance import computed_by
from eval.report.markdown import markdown_table
from eval.speed.growth import GB
from eval.speed.lengths import parse_lengths
from eval.speed.process import run_module
from modeling_longembed import LongEmbedModel
from modeling_longembed.conversion_families_longembed import FAMILIES
from modeling_longembed.export_native_longembed import native_weights

OURS, PUBLISHED = "longembed", "sentence-transformers"  # sides of experiments/measured_steps.py
SIDE_NAMES = {OURS: "ours", PUBLISHED: PUBLISHED}
TOLERANCE = 1e-4  # relative difference of loss and gradients
QUERY = 24  # tokens of a random query
TEMPERATURE = 0.05


@dataclass
class Arguments:
    """Options of the script."""

    output_dir: str = field(
        metadata={
            "help": "folder of training.json, table.md and the models that are compared",
            "output": "folder",
        }
    )
    base_model: str = field(metadata={"help": "the encoder, a BERT; its position table is repeated for longer texts"})
    attention_patterns: list[str] = field(
        default_factory=lambda: ["full"], metadata={"help": "patterns, each used in all layers: full block:size=256"}
    )
    lengths: list[str] = field(
        default_factory=lambda: ["4096,8192,16384,32768,65536"], metadata={"help": "tokens of a document"}
    )
    pairs: str | None = field(
        default=None,
        metadata={
            "help": ".jsonl or .jsonl.gz file with anchor and positive, truncated to each of --lengths; default: "
            f"random documents of exactly that length, with queries of {QUERY} tokens"
        },
    )
    pair_count: int = field(default=16, metadata={"help": "pairs of a batch"})
    batch_tokens: list[int] = field(
        default_factory=lambda: [1, 4096, 16384],
        metadata={"help": "tokens whose activations are held at once; each setting is tried"},
    )
    repeats: int = field(default=3, metadata={"help": "measurements of each number, each in a fresh process"})
    threads: int = field(default=1, metadata={"help": "CPU threads"})


@dataclass(frozen=True)
class Row:
    """One side under one setting.

    Attributes:
        side: `OURS` or `PUBLISHED`.
        pattern: attention pattern as on the command line.
        length: tokens of a document.
        batch_tokens: tokens whose activations are held at once.
        model: folder of the model.
        texts: JSON file of token ids.
        threads: CPU threads.
    """

    side: str
    pattern: str
    length: int
    batch_tokens: int
    model: str
    texts: str
    threads: int

    def job(self, gradients: Path | None = None) -> dict[str, Any]:
        """Return the job of experiments/measured_steps.py."""
        shared = {name: getattr(self, name) for name in ("side", "model", "texts", "batch_tokens", "threads")}
        return shared | {"temperature": TEMPERATURE, "gradients": None if gradients is None else str(gradients)}


def compare(arguments: Arguments) -> str:
    """Measure both sides, and write `training.json` and `table.md`.

    Args:
        arguments: parsed command-line options.

    Returns:
        The table.

    Raises:
        UserError: the base model is no BERT, there are too few pairs, or the two sides do not compute the same.
    """
    lengths, output = parse_lengths(arguments.lengths), Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    models = {
        pattern: _models(arguments.base_model, pattern, max(lengths), output)
        for pattern in arguments.attention_patterns
    }
    counts = {}
    rows = []
    for length in lengths:
        texts = output / f"texts-{length}.json"
        columns = _columns(arguments, length, models[arguments.attention_patterns[0]][OURS])
        counts[length] = sum(len(text) for column in columns for text in column)
        atomic_write(texts, json.dumps(columns))
        for pattern in arguments.attention_patterns:
            sides = [
                [
                    Row(side, pattern, length, tokens, models[pattern][side], str(texts), arguments.threads)
                    for tokens in arguments.batch_tokens
                ]
                for side in (OURS, PUBLISHED)
            ]
            ours, published = (max(side, key=lambda row: row.batch_tokens) for side in sides)
            _check_equal(ours, published, output)
            rows += [row for side in sides for row in side]
    measured: dict[Row, list[dict]] = {row: [] for row in rows}
    for repeat in range(arguments.repeats):
        for row in rows:
            measured[row].append(_run(row))
            seconds, peak = measured[row][-1]["seconds"], measured[row][-1]["peak"] / GB
            print(f"repeat {repeat + 1}, {_describe(row)}: {seconds:.2f} s, {peak:.2f} GB", flush=True)
            atomic_write(
                output / "training.json",
                json.dumps([asdict(row) | {"repeats": found} for row, found in measured.items()]),
            )
    table = _table(measured, arguments.pair_count, counts)
    atomic_write(output / "table.md", table)
    return table


def _models(base: str, pattern: str, context: int, output: Path) -> dict[str, str]:
    """Make the folders that the two sides load, if they are missing: side -> folder.

    The name of a folder holds a hash of all that it is made from.
    """
    chosen = parse_pattern(pattern)
    made_by = [ModelFolder.find(base).revision, chosen, context, computed_by("modeling_longembed")]
    key = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:12]
    ours, native = output / f"model-{chosen['type']}-{context}-{key}", output / f"native-{context}-{key}"
    if not ours.exists() or (chosen["type"] == "full" and not native.exists()):
        choices: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_dropout": 0.0, "attention_patterns": chosen}
        model = LongEmbedModel.from_encoder(
            base, max_position_embeddings=context, position_extension="repeat", **choices
        )
        with atomic_folder(ours) as temporary:
            model.save_pretrained(temporary, title=ours.name)
        if chosen["type"] == "full":
            with atomic_folder(native) as temporary:
                model.to_native(temporary)
                config = json.loads((temporary / "config.json").read_text())
                if config["model_type"] != "bert":
                    raise UserError(f"--base_model {base}: is a {config['model_type']} model; give a BERT")
                (temporary / "config.json").write_text(json.dumps(config | {"attention_probs_dropout_prob": 0.0}))
    return {OURS: str(ours), PUBLISHED: str(native if chosen["type"] == "full" else ours)}


def _columns(arguments: Arguments, length: int, model: str) -> list[list[list[int]]]:
    """Return the token ids of the queries and of the documents."""
    if arguments.pairs is None:
        draw, sizes = np.random.default_rng(0), (min(QUERY, length), length)
        vocabulary = LongEmbedModel.config_class.from_pretrained(model).vocab_size
        return [draw.integers(1, vocabulary, (arguments.pair_count, size)).tolist() for size in sizes]
    tokenizer = AutoTokenizer.from_pretrained(model)
    pairs = [pair for _, pair in islice(read_text_columns(arguments.pairs, "anchor", "positive"), arguments.pair_count)]
    if len(pairs) < arguments.pair_count:
        raise UserError(f"{arguments.pairs}: has {len(pairs)} pairs, --pair_count asks for {arguments.pair_count}")
    return [
        tokenizer(list(column), truncation=True, max_length=length)["input_ids"] for column in zip(*pairs, strict=True)
    ]


def _check_equal(ours: Row, published: Row, output: Path) -> None:
    """Compare the loss and each parameter's gradient of the two sides, relative to the largest gradient.

    Raises:
        UserError: they differ by more than `TOLERANCE`.
    """
    losses, gradients = [], []
    for row in (ours, published):
        file = output / f"gradients-{row.side}.safetensors"
        losses.append(_run(row, file)["loss"])
        gradients.append(load_file(file))
        file.unlink()
    if ours.model != published.model:  # give our gradients the names of the native model
        model = LongEmbedModel.from_pretrained(ours.model)
        for name, parameter in model.named_parameters():
            parameter.data = gradients[0].get(name, parameter.data * 0)
        gradients[0] = native_weights(model, FAMILIES["bert"])
    largest = max(gradient.abs().max().item() for gradient in gradients[1].values())
    difference = max((gradients[0][name] - gradient).abs().max().item() for name, gradient in gradients[1].items())
    difference /= largest
    loss = abs(losses[0] - losses[1]) / abs(losses[1])
    print(
        f"{ours.pattern}, {ours.length} tokens: loss differs by {loss:.1e}, gradients by {difference:.1e}", flush=True
    )
    if not max(loss, difference) <= TOLERANCE:
        raise UserError(
            f"{ours.pattern} at {ours.length} tokens: loss or gradients differ by more than {TOLERANCE}, nothing is "
            "timed"
        )


def _run(row: Row, gradients: Path | None = None) -> dict[str, Any]:
    """Run a job in a fresh process."""
    result = run_module("experiments.measured_steps", row.job(gradients), row.threads, _describe(row))
    if "outcome" in result:
        raise UserError(f"{_describe(row)} could not be measured: {result['outcome']}")
    return result


def _describe(row: Row) -> str:
    return f"{SIDE_NAMES[row.side]}, {row.pattern}, {row.length} tokens, {row.batch_tokens} at once"


def _table(measured: dict[Row, list[dict]], pairs: int, counts: dict[int, int]) -> str:
    """Format all settings in Markdown, and below them the comparison of the best setting of each side.

    Args:
        measured: row -> its measurements.
        pairs: pairs of a batch.
        counts: length -> tokens of a batch.
    """
    lines = []
    found: dict[tuple[str, int], dict[str, list[tuple[float, float]]]] = {}
    for row, repeats in measured.items():
        speeds = [pairs / one["seconds"] for one in repeats]
        peak = statistics.median(one["peak"] for one in repeats) / GB
        speed = statistics.median(speeds)
        spread = (max(speeds) - min(speeds)) / 2 / speed
        cells = [row.pattern, f"{row.length:,}", f"{counts[row.length]:,}", SIDE_NAMES[row.side]]
        cells += [f"{row.batch_tokens:,}", f"{speed:.3g} ± {spread:.0%}", f"{peak:.2f}"]
        lines.append(cells)
        found.setdefault((row.pattern, row.length), {OURS: [], PUBLISHED: []})[row.side].append((speed, peak))
    headings = ["attention", "length", "tokens of the batch", "side", "tokens at once", "pairs/s", "peak, GB"]
    comparisons = []
    for (pattern, length), sides in found.items():
        published, peak = max(sides[PUBLISHED])
        within = [setting for setting in sides[OURS] if setting[1] <= peak]
        if not within:
            comparisons.append(f"- {pattern}, {length:,} tokens: no setting of ours takes {peak:.2f} GB or less\n")
            continue
        ours, own_peak = max(within)
        comparisons.append(
            f"- {pattern}, {length:,} tokens: {ours / published:.2f} times the pairs/s of sentence-transformers' "
            f"fastest setting, at {own_peak:.2f} GB against {peak:.2f} GB\n"
        )
    return f"{markdown_table(headings, lines, left=4)}\n{''.join(comparisons)}"


def main() -> None:
    """Run the script."""
    (arguments,) = parse(Arguments)
    print(compare(arguments))


if __name__ == "__main__":
    run(main)
