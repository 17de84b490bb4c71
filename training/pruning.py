"""Prune a LongEmbed model to a given depth: a search on held-out pairs finds the layers that it can do without.

python training/pruning.py --model_name_or_path MODEL --eval_data pairs.jsonl --depth 3 --output_dir runs/pruned

Layers are removed one by one, each time the one without which the nDCG@10 of the pairs is highest. From n layers to d
this embeds all texts of the pairs (n (n + 1) - d (d + 1)) / 2 times: 15 times from 6 to 3, 57 times from 12 to 6. No
weight changes, so it is for models that were trained with LayerDrop (Fan et al. 2020, arXiv:1909.11556), or as the
start of a distillation (training/compression.py).

`<output_dir>/search.json` receives every score when it is computed, so the same command resumes an interrupted search.
The best model of the depth is written to `<output_dir>/final`.
"""

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from common.arguments import parse
from common.errors import UserError, one_line, run
from common.provenance import computed_by, device_kind
from common.records import Records
from modeling_longembed.layout_registry_longembed import layers_of
from training.data.pairs.batches import PairTokenizer
from training.data.sources import PAIRS, read_sources
from training.engine.record import record
from training.engine.saving import save
from training.models.encoder import ModelArguments, load_encoder, text_length
from training.models.identity import model_identity
from training.objectives.embed import embed
from training.objectives.pair_retrieval import PairRetrieval

# What scores are computed by.
CODE = ("modeling_longembed", "training.pruning", "training.objectives", "training.data")


@dataclass
class PruningArguments:
    """The depth, and the pairs that models are judged by.

    Raises:
        UserError: a number is not positive.
    """

    eval_data: list[str] = field(
        metadata={"help": "labelled pairs, anchor and positive: .jsonl, .jsonl.gz, .parquet, or org/name on the Hub"}
    )
    depth: int = field(metadata={"help": "number of layers, or sublayers, to keep"})
    output_dir: str = field(metadata={"help": "folder of search.json and final/", "output": "folder"})
    unit: Literal["layer", "sublayer"] = field(
        default="layer",
        metadata={
            "help": "what is removed at once: an attention with the feed-forward after it (layer), or either of them"
        },
    )
    max_length: int | None = field(
        default=None, metadata={"help": "tokens at which a text is truncated; the model's context if not given"}
    )
    batch_tokens: int = field(default=16384, metadata={"help": "tokens per forward pass"})

    def __post_init__(self) -> None:
        for name in ("depth", "batch_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least 1")


Units = tuple[int, ...]


def search(score: Callable[[Units], float | None], count: int, depth: int) -> list[Units]:
    """Return the units (layers or sublayers) to keep at each depth from `count` down to `depth`, found greedily.

    Among equal scores the one that keeps the earlier units wins.

    Args:
        score: maps units to keep to a score, of which higher is better; None: no model has these units.
        count: number of units of the model.
        depth: number of units to keep at the end.

    Raises:
        UserError: no unit can be removed without leaving a model without attention.
    """
    path = [tuple(range(count))]
    steps = sum(range(depth + 1, count + 1)) + 1
    with tqdm(total=steps, desc="searching", unit="model") as bar:
        score(path[0])
        bar.update()
        while len(path[-1]) > depth:
            candidates = [tuple(unit for unit in path[-1] if unit != gone) for gone in reversed(path[-1])]
            found = []
            for candidate in candidates:
                found.append((score(candidate), candidate))
                bar.update()
            possible = [(value, kept) for value, kept in found if value is not None]
            if not possible:
                raise UserError(f"--depth {depth}: below {len(path[-1])} no attention would be left; give more")
            path.append(max(possible, key=lambda pair: pair[0])[1])
    return path


def pruned(model: Any, kept: Sequence[int], unit: str) -> Any:
    """Return a copy of a model that keeps some of its layers or sublayers.

    Args:
        model: a LongEmbed model.
        kept: numbers of the layers or sublayers to keep.
        unit: `layer` or `sublayer`.

    Raises:
        ValueError: no attention is left.
    """
    model = copy.deepcopy(model)
    return model.keep_layers(list(kept)) if unit == "layer" else model.keep_sublayers(list(kept))


def main(argv: Sequence[str] | None = None) -> None:
    """Search and write with the command-line options `argv`; None: those of the process.

    Raises:
        UserError: a mistake in the options, the data or the model.
    """
    model_args, args = parse(ModelArguments, PruningArguments, argv=argv)
    loaded, tokenizer = load_encoder(model_args)
    device = torch.device(device_kind())
    model: Any = loaded.eval().to(device)
    length = text_length("max_length", args.max_length, model, tokenizer)
    layout = model.config.sublayer_pattern
    count = len(layers_of(layout)) if args.unit == "layer" else len(layout)
    if args.depth > count:
        raise UserError(f"--depth {args.depth}: the model has {count} {args.unit}s; give at most that")
    tokenize = PairTokenizer(tokenizer, length, length, model.config.prompts)
    sources = read_sources(args.eval_data, PAIRS)
    retrievals = [PairRetrieval(s, tokenize, batch_size=64, batch_tokens=args.batch_tokens) for s in sources]

    @torch.no_grad()
    def measure(kept: Units) -> float | None:
        try:
            candidate = pruned(model, kept, args.unit)
        except ValueError:
            return None
        found = [r(lambda chunk, kind: embed(candidate, chunk.to(device)), 0.05)["eval_ndcg_at_10"] for r in retrievals]
        return sum(found) / len(found)

    output_dir = Path(args.output_dir).absolute()
    made_by: dict[str, Any] = {"unit": args.unit, "max_length": length, "texts": _hash_texts(retrievals)}
    made_by["model"] = model_identity(model, tokenizer)
    made_by["version of the code or of a library"] = computed_by(*CODE, device=device.type)
    records = _read(output_dir / "search.json", made_by)

    def score(kept: Units) -> float | None:
        case = made_by | {"kept": list(kept)}
        row = records.find(case) or records.add(case, ndcg_at_10=measure(kept))
        return row["ndcg_at_10"]

    path = search(score, count, args.depth)
    for kept in path:
        value = score(kept)
        assert value is not None
        print(f"{len(kept)} {args.unit}s: nDCG@10 {100 * value:.2f}, kept {' '.join(map(str, kept))}")
    save(pruned(model, path[-1], args.unit), output_dir, title=output_dir.name, made=record((model_args, args)))


def _hash_texts(retrievals: list[PairRetrieval]) -> str:
    texts = [[r.queries, r.documents, r.positive.tolist()] for r in retrievals]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def _read(file: Path, made_by: dict[str, Any]) -> Records:
    """Read the scores of an earlier search, if there are any.

    Raises:
        UserError: they belong to another model, other pairs or other code, or the file is damaged.
    """
    records = Records(file)
    for row in records.rows.values():
        for name, value in made_by.items():
            if (old := row["case"].get(name)) != value:
                raise UserError(f"{file}: was made with {_difference(name, old, value)}; give another --output_dir")
        if "ndcg_at_10" not in row:
            raise UserError(f"{file}: a score is missing; give another --output_dir")
    return records


def _difference(name: str, old: Any, new: Any) -> str:
    """Say in words how two values differ; of two dictionaries, the first entry that does."""
    if isinstance(old, dict) and isinstance(new, dict):
        name = next(key for key in new | old if old.get(key) != new.get(key))
        old, new = old.get(name), new.get(name)
    return f"{name} {one_line(old, most=200)}, and this run has {one_line(new, most=200)}"


if __name__ == "__main__":
    run(main)
