"""Measure the memory that `encode` takes for many texts and for long ones: the figures of docs/guides/load.md.

    python experiments/encoding_memory.py --output runs/encoding-memory.md

Each row is a fresh process with a tiny random model, whose own memory is small: what is measured is what texts, tokens
and vectors take. The texts come from a generator and are never all in memory.
"""

import itertools
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from common.arguments import parse
from common.errors import run
from common.files import atomic_write
from common.memory import resident_memory
from eval.speed.process import run_module
from modeling_longembed import LongEmbedConfig, LongEmbedModel

VOCABULARY = [f"word{number}" for number in range(1000)]
CONTEXT = 512
WAYS = ("encode_stream", "encode into a file", "encode")


@dataclass
class Arguments:
    """The options of the script."""

    counts: list[int] = field(default_factory=lambda: [1_000, 100_000], metadata={"help": "numbers of short texts"})
    words: int = field(default=40, metadata={"help": "words of a short text"})
    long_texts: int = field(default=62, metadata={"help": "number of long texts, each of 70,000 words (500 kB)"})
    output: str | None = field(default=None, metadata={"help": "file for the table, in Markdown", "output": "file"})


def build_model(**fields: Any) -> LongEmbedModel:
    """Return a random model of one layer with a tokenizer of a token per word.

    Args:
        fields: of its config, if other than those of a tiny model.
    """
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, **{word: n for n, word in enumerate(VOCABULARY, 1)}}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tiny = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": CONTEXT}
    model = LongEmbedModel(LongEmbedConfig(vocab_size=len(VOCABULARY) + 1, num_hidden_layers=1, **tiny | fields))
    model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[UNK]")
    return model


def random_texts(count: int, words: int) -> Iterator[str]:
    """Yield texts of so many random words."""
    generator = np.random.default_rng(0)
    for _ in range(count):
        yield " ".join(VOCABULARY[n] for n in generator.integers(0, len(VOCABULARY), words))


def measure(job: dict[str, Any]) -> dict[str, float]:
    """Encode the texts of a job.

    Args:
        job: the `way`, one of `WAYS`, and `count` and `words` of the texts.

    Returns:
        `mib`: by how much the peak of the memory is above that of a hundred texts, in MiB; `megabytes` of the texts.
    """
    model, read = build_model(), 0

    def texts() -> Iterator[str]:
        nonlocal read
        for text in random_texts(job["count"], job["words"]):
            read += len(text)
            yield text

    model.encode(random_texts(100, 400))
    before = resident_memory("VmHWM")
    if job["way"] == "encode_stream":
        for _ in model.encode_stream(texts()):
            pass
    elif job["way"] == "encode into a file":
        with tempfile.TemporaryDirectory() as folder:
            model.encode(texts(), output_file=Path(folder) / "vectors.npy", show_progress_bar=False)
    else:
        model.encode([*texts()], show_progress_bar=False)
    return {"mib": (resident_memory("VmHWM") - before) / 2**20, "megabytes": read / 1e6}


def main() -> None:
    """Measure each way in a fresh process, and print a table."""
    (arguments,) = parse(Arguments)
    rows = ["| call | texts | words each | text | memory |", "|---|---|---|---|---|"]
    shapes = [(count, arguments.words) for count in arguments.counts] + [(arguments.long_texts, 70_000)]
    for way, (count, words) in itertools.product(WAYS, shapes):
        job = {"way": way, "count": count, "words": words}
        found = run_module("experiments.encoding_memory", job, 1, f"{way} of {count} texts")
        measured = found.get("outcome") or f"{found['mib']:.0f} MiB"  # an outcome is why nothing could be measured
        size = f"{found['megabytes']:.1f} MB" if "megabytes" in found else ""
        rows.append(f"| {way} | {count:,} | {words:,} | {size} | {measured} |")
        print(rows[-1], flush=True)
    if arguments.output is not None:
        atomic_write(arguments.output, "\n".join(rows) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].startswith("{"):
        print(json.dumps(measure(json.loads(sys.argv[1]))))
    else:
        run(main)
