"""Measure pass-key retrieval against length and depth, as heat maps: how far into a document a model reads.

    python eval/passkey.py --model runs/my/final truncate:my-encoder:512 --lengths 512,8192 --output_dir runs/passkey
    python eval/passkey.py --model generate:my-language-model --lengths 1024,2048,4096 --output_dir runs/passkey

Embedding models (those that eval/mteb_long.py evaluates, except `bm25`) find documents, as in LongEmbed (Zhu et al.
2024). A cell of the heat map has `--trials` documents of one length, each with the pass key of another person at the
cell's depth, and one question for each person. Its accuracy is the share of questions for which the right document is
nearest; if k documents are equally near, the question counts 1 / k, so that a model that cannot tell documents apart
scores exactly 1 / trials. People and filler are the same at all depths.

Causal language models (`generate:PATH`) complete the prompt of landmark attention (Mohtashami & Jaggi 2023), which
LongLoRA (Chen et al. 2024) uses as well. Accuracy is the share of `--trials` keys that greedy decoding generates
exactly.

A depth is the place of the key in the text around it, from 0 (at its start) to 1 (at its end), rounded to a boundary of
sentences. Each cell is written to `<output_dir>/results.json` at once, next to `table.md` and `heatmap.png`.
"""

import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown
from tqdm.auto import tqdm

from common.arguments import parse
from common.encoders.precision import resolve_precision
from common.errors import UserError, run
from common.files import atomic_write
from common.provenance import code_hash
from common.records import Records
from eval.models.language_models import LanguageModel
from eval.models.mteb_models import EvaluatedModel
from eval.report.heat_maps import Cell, as_markdown, draw
from eval.speed.lengths import parse_lengths
from eval.tasks.needles import MOST_DOCUMENTS
from eval.tasks.passkey import EmbeddingTest, GenerationTest
from eval.tasks.texts import read_haystack


@dataclass
class Arguments:
    """Options of the script."""

    model: list[str] = field(
        metadata={
            "help": "embedding models, as folders or Hub ids, truncate:PATH:N, chunk-mean:PATH:N, chunk-max:PATH:N; "
            "causal language models as generate:PATH, where PATH may be a .gguf file"
        }
    )
    output_dir: str = field(metadata={"help": "folder of results.json, table.md and heatmap.png", "output": "folder"})
    lengths: list[str] = field(
        default_factory=lambda: ["256,512,1024,2048,4096,8192"],
        metadata={"help": "tokens of a document, or of prompt and key together"},
    )
    depths: int = field(default=6, metadata={"help": "number of depths, evenly from 0 to 1"})
    labels: list[str] = field(
        default_factory=list, metadata={"help": "names of the models in tables and plots; default: those of --model"}
    )
    trials: int = field(default=20, metadata={"help": "documents and questions, or prompts, of a cell"})
    haystack: str | None = field(
        default=None, metadata={"help": ".txt or .jsonl file of the text around the keys; default: filler sentences"}
    )
    seed: int = field(default=0, metadata={"help": "random seed"})
    precision: str = field(default="float32", metadata={"help": "float32, bfloat16 or auto"})
    batch_tokens: int = field(default=16384, metadata={"help": "tokens in one forward pass of an embedding model"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run code that comes with a model"})


def measure(arguments: Arguments) -> list[Cell]:
    """Measure the cells that have not been measured yet.

    Args:
        arguments: parsed command-line options.

    Returns:
        The cells of all models, in the requested order.

    Raises:
        UserError: an option or a model is not valid, or a length has no room for a key.
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
    measured_by = {"measured_by": code_hash("eval.passkey", "eval.tasks.passkey", "eval.tasks.needles")}
    loaders = [loader(name, arguments, haystack) for name in arguments.model]
    for load, name, label in zip(loaders, arguments.model, labels, strict=True):
        model = load()
        readable = model.lengths(lengths)
        if not readable:
            raise UserError(f"--lengths: {lengths[0]} tokens are more than the context of {name}; give shorter ones")
        grid = [(length, depth) for length in readable for depth in depths(arguments.depths)]
        for length, depth in tqdm(grid, desc=label, unit="cell"):
            case = {"model": model.identity, "length": length, "depth": depth, **settings}
            case |= {"computed_by": model.computed_by | measured_by}
            row = records.find(case)
            if row is None:
                found = model.measure(length, depth, arguments.trials, arguments.seed)
                row = records.add(case, label=label, accuracy=found)
            cells.append(Cell(label, length, depth, row["accuracy"]))
    return cells


def depths(count: int) -> list[float]:
    """Return `count` depths, evenly from 0 to 1; a single one is in the middle."""
    return [0.5] if count == 1 else [round(i / (count - 1), 4) for i in range(count)]


def loader(name: str, arguments: Arguments, haystack: str | None) -> Callable[[], Any]:
    """Return a function that loads a model.

    Args:
        name: a value of `--model`.
        arguments: parsed command-line options.
        haystack: the text around the keys, or None.

    Raises:
        UserError: there is no such model, or it has no vectors.
    """
    precision = resolve_precision(arguments.precision)
    if name.startswith("generate:"):
        path = name.removeprefix("generate:")
        return lambda: GenerationTest(LanguageModel(path, precision, arguments.trust_remote_code), haystack)
    spec = EvaluatedModel.parse(name, precision=precision)
    if spec.folder is None:
        raise UserError(f"--model {name} has no vectors; it finds a key by its words at any length, so leave it out")
    return lambda: EmbeddingTest(spec, spec.load_encoder(arguments.batch_tokens, arguments.trust_remote_code), haystack)


def main() -> None:
    """Run the script."""
    (arguments,) = parse(Arguments)
    cells = measure(arguments)
    atomic_write(Path(arguments.output_dir, "table.md"), as_markdown(cells))
    draw(cells, Path(arguments.output_dir, "heatmap.png"))
    Console(width=None if sys.stdout.isatty() else 120).print(Markdown(as_markdown(cells)))


if __name__ == "__main__":
    run(main)
