"""Prune a LongEmbed model to a depth: which layers it can do without is searched on held-out pairs.

python training/pruning.py --model_name_or_path MODEL --eval_data pairs.jsonl --depth 3 --output_dir runs/pruned

Layers go one after the other, each time the one without which the nDCG@10 of the pairs is highest. From n layers to d
that takes (n (n + 1) - d (d + 1)) / 2 readings of all texts of the pairs, each with one layer less than the round
began with: 15 for 6 to 3, 57 for 12 to 6. No weight changes, so it is for models that were trained with LayerDrop
(Fan et al. 2020, arXiv:1909.11556), or as the start of a distillation (training/compression.py).

`<output_dir>/search.json` holds every score as soon as it is there: the same command again goes on where it was. The
best model of the depth is in `<output_dir>/final`.
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
from common.errors import UserError, run
from common.files import atomic_write
from modeling_longembed.layout_registry_longembed import layers_of
from training.data.pair_batches import PairTokenizer
from training.data.sources import PAIRS, read_sources
from training.engine.saving import save
from training.models.encoder import ModelArguments, load_encoder, text_length
from training.models.identity import model_identity
from training.objectives.embed import embed
from training.objectives.pair_retrieval import PairRetrieval


@dataclass
class PruningArguments:
    """How far, and how it is judged."""

    eval_data: list[str] = field(
        metadata={"help": "labelled pairs, anchor and positive: .jsonl, .jsonl.gz, .parquet, or org/name on the Hub"}
    )
    depth: int = field(metadata={"help": "layers, or sublayers, that are left"})
    output_dir: str = field(metadata={"help": "folder of search.json and final/"})
    unit: Literal["layer", "sublayer"] = field(
        default="layer", metadata={"help": "what goes as one: an attention with the feed-forward after it, or either"}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "tokens at which a text is cut off; the model's context if not given"}
    )
    batch_tokens: int = field(default=16384, metadata={"help": "tokens of one forward pass"})

    def __post_init__(self) -> None:
        for name in ("depth", "batch_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least 1")


Units = tuple[int, ...]


@dataclass
class Search:
    """The scores of what may be kept of a model.

    Args:
        score: what units are kept to a score; the higher the better.
        scores: those that are known.
        remember: called whenever one is added.
    """

    score: Callable[[Units], float | None]
    scores: dict[Units, float | None]
    remember: Callable[[], None]

    def greedy(self, count: int, depth: int) -> list[Units]:
        """What to keep of `count` units at each depth from `count` down to `depth`.

        Of equal scores the one that keeps the earlier units wins.

        Raises:
            UserError: nothing that could be dropped leaves a model.
        """
        path = [tuple(range(count))]
        steps = sum(range(depth + 1, count + 1)) + 1
        with tqdm(total=steps, desc="searching", unit="model") as bar:
            self._of(path[0])
            bar.update()
            while len(path[-1]) > depth:
                candidates = [tuple(unit for unit in path[-1] if unit != gone) for gone in reversed(path[-1])]
                found = []
                for candidate in candidates:
                    found.append((self._of(candidate), candidate))
                    bar.update()
                possible = [(score, kept) for score, kept in found if score is not None]
                if not possible:
                    raise UserError(f"--depth {depth}: below {len(path[-1])} no attention would be left; give more")
                path.append(max(possible, key=lambda pair: pair[0])[1])
        return path

    def _of(self, kept: Units) -> float | None:
        if kept not in self.scores:
            self.scores[kept] = self.score(kept)
            self.remember()
        return self.scores[kept]


def pruned(model: Any, kept: Sequence[int], unit: str) -> Any:
    """A copy of a model that keeps these layers or sublayers.

    Raises:
        ValueError: no attention is left.
    """
    model = copy.deepcopy(model)
    return model.keep_layers(list(kept)) if unit == "layer" else model.keep_sublayers(list(kept))


def main(argv: Sequence[str] | None = None) -> None:
    """Search and write; `argv` is the process's own if None."""
    model_arguments, arguments = parse(ModelArguments, PruningArguments, argv=argv)
    loaded, tokenizer = load_encoder(model_arguments)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    model: Any = loaded.eval().to(device)
    length = text_length("max_length", arguments.max_length, model, tokenizer)
    layout = model.config.sublayer_pattern
    count = len(layers_of(layout)) if arguments.unit == "layer" else len(layout)
    if arguments.depth > count:
        raise UserError(f"--depth {arguments.depth}: the model has {count} {arguments.unit}s; give at most that")
    tokenize = PairTokenizer(tokenizer, length, length, model.config.prompts)
    sources = read_sources(arguments.eval_data, PAIRS)
    retrievals = [PairRetrieval(s, tokenize, batch_size=64, batch_tokens=arguments.batch_tokens) for s in sources]

    @torch.no_grad()
    def score(kept: Units) -> float | None:
        try:
            candidate = pruned(model, kept, arguments.unit)
        except ValueError:
            return None
        found = [r(lambda chunk: embed(candidate, chunk.to(device)), 0.05)["eval_ndcg_at_10"] for r in retrievals]
        return sum(found) / len(found)

    output_dir = Path(arguments.output_dir).absolute()
    file = output_dir / "search.json"
    made_by: dict[str, Any] = {"unit": arguments.unit, "max_length": length, "texts": _hash_texts(retrievals)}
    made_by["model"] = model_identity(model, tokenizer)
    known = _read(file, made_by)
    search = Search(score, known, lambda: _write(file, made_by, known))
    path = search.greedy(count, arguments.depth)
    for kept in path:
        value = known[kept]
        assert value is not None
        print(f"{len(kept)} {arguments.unit}s: nDCG@10 {100 * value:.2f}, kept {' '.join(map(str, kept))}")
    save(pruned(model, path[-1], arguments.unit), output_dir, title=output_dir.name)


def _hash_texts(retrievals: list[PairRetrieval]) -> str:
    texts = [[r.queries, r.documents, r.positive.tolist()] for r in retrievals]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def _read(file: Path, made_by: dict[str, Any]) -> dict[Units, float | None]:
    """The scores that are there.

    Raises:
        UserError: they are of another model, or of other pairs; the file is damaged.
    """
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text())
        before, scores = dict(content["made_by"]), content["scores"]
        known = {tuple(map(int, entry["kept"])): entry["ndcg_at_10"] for entry in scores}
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file}: is damaged ({error}); remove it, or give another --output_dir") from None
    for name, value in made_by.items():
        if before.get(name) != value:
            raise UserError(f"{file}: was made with another {name}; give another --output_dir")
    return known


def _write(file: Path, made_by: dict[str, Any], scores: dict[Units, float | None]) -> None:
    entries = [{"kept": list(kept), "ndcg_at_10": value} for kept, value in scores.items()]
    atomic_write(file, json.dumps({"made_by": made_by, "scores": entries}, indent=1))


if __name__ == "__main__":
    run(main)
