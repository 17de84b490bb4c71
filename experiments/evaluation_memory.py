"""Measure the memory that an evaluation by token vectors takes, for few and for many long documents.

    python experiments/evaluation_memory.py --output runs/evaluation-memory.md

Each row is a fresh process that evaluates a random model of the width of all-MiniLM-L6-v2 on documents of random words.
It has one layer: passes through the layers follow one another, so that their number does not decide the memory. The
figures are those of docs/guides/late-interaction.md.
"""

import itertools
import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.arguments import parse
from common.errors import run
from common.files import atomic_write, write_jsonl
from common.memory import resident_memory
from eval.report.markdown import markdown_table
from eval.speed.process import run_module
from eval.tasks.evaluation import RetrievalArguments, evaluate_retrieval
from experiments.encoding_memory import build_model, random_texts


@dataclass
class Arguments:
    """The options of the script."""

    counts: list[int] = field(default_factory=lambda: [2, 8], metadata={"help": "numbers of documents"})
    lengths: list[int] = field(default_factory=lambda: [32_768], metadata={"help": "tokens of each document"})
    settings: list[str] = field(
        default_factory=lambda: ["@tokens"],
        metadata={"help": "what is kept of a document, as after PATH in eval/mteb_long.py"},
    )
    output: str | None = field(default=None, metadata={"help": "file for the table, in Markdown", "output": "file"})


def measure(job: dict[str, Any], **shape: Any) -> dict[str, float]:
    """Evaluate a model on a task of random documents.

    Args:
        job: the `count` of documents, the `tokens` of each, and the `settings` of the model.
        shape: fields of the model's config.

    Returns:
        `mib`: by how much the peak of the memory is above that of the same evaluation of a document of eight tokens, in
        MiB; `kilobytes`: what is kept of a document.
    """
    width = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}
    patterns = {"type": "block", "size": min(254, job["tokens"])}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = build_model(
            **width | {"max_position_embeddings": job["tokens"], "attention_patterns": patterns} | shape
        )
        model.save_pretrained(folder / "model")
        peaks, kept = [], 0.0
        for count, words in ((1, 8), (job["count"], job["tokens"])):
            texts = list(random_texts(count, words))
            task = folder / f"{count} of {words}" / "Words"
            write_jsonl(task / "corpus.jsonl", [{"doc_id": str(n), "text": text} for n, text in enumerate(texts)])
            write_jsonl(task / "queries.jsonl", [{"qid": str(n), "text": text[-200:]} for n, text in enumerate(texts)])
            write_jsonl(task / "qrels.jsonl", [{"qid": str(n), "doc_id": str(n)} for n in range(count)])
            (score,) = evaluate_retrieval(
                RetrievalArguments(
                    model=[f"{folder / 'model'}{job['settings']}"],
                    output_dir=str(folder / "results"),
                    data_dir=str(task.parent),
                )
            )
            peaks.append(resident_memory("VmHWM"))
            kept = score.bytes_per_document or 0.0
    return {"mib": (peaks[1] - peaks[0]) / 2**20, "kilobytes": kept / 1000}


def main() -> None:
    """Measure each combination in a fresh process, and print a table."""
    (arguments,) = parse(Arguments)
    rows = []
    for settings, tokens, count in itertools.product(arguments.settings, arguments.lengths, arguments.counts):
        job = {"count": count, "tokens": tokens, "settings": settings}
        found = run_module("experiments.evaluation_memory", job, 1, f"{settings} of {count} documents")
        # An outcome is why nothing could be measured.
        cells = [found["outcome"], ""] if "outcome" in found else [f"{found['mib']:.0f}", f"{found['kilobytes']:,.0f}"]
        rows.append([settings, f"{tokens:,}", f"{count:,}", *cells])
        print(" | ".join(rows[-1]), flush=True)
    table = markdown_table(["kept", "tokens", "documents", "MiB", "KB a document"], rows)
    if arguments.output is not None:
        atomic_write(arguments.output, table)
    print(table)


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].startswith("{"):
        print(json.dumps(measure(json.loads(sys.argv[1]))))
    else:
        run(main)
