"""Mine hard negatives for pairs: documents that a teacher ranks high for a query although they do not answer it.

    python training/mine_negatives.py --model chunk-max:sentence-transformers/all-MiniLM-L6-v2:256 --data pairs.jsonl \\
        --relative_margin 0.05 --output mined.jsonl

Reads pairs as training/contrastive.py does, and writes JSON lines {anchor, positive, negative_1, ...} for it.
Needs `pip install -e '.[train,eval,search]'`. docs/guides/pairs.md says which settings are for what.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import datasets
import numpy as np

from common.arguments import parse
from common.encoders.model_spec import ModelSpec
from common.encoders.precision import resolve_precision
from common.encoders.vector_cache import VectorCache
from common.errors import UserError, run
from common.files import write_jsonl
from training.data.pairs.ranking import RankerWithWords, WordRanker, load_ranker
from training.data.sources import PAIRS, TEXTS, read_sources

CORPUS = replace(TEXTS, refused=("title",))  # an evaluation puts titles in front of the texts; mining would drop them


@dataclass
class Thresholds:
    """Which of the documents near a query become its negatives.

    Raises:
        UserError: ranges that exclude each other.
    """

    num_negatives: int = field(default=3, metadata={"help": "negatives per pair; pairs with fewer are left out"})
    range_max: int = field(
        default=100, metadata={"help": "number of the nearest documents that are considered, without positives"}
    )
    range_min: int = field(
        default=0,
        metadata={"help": "number of the nearest documents that are skipped, of those that pass the thresholds"},
    )
    relative_margin: float | None = field(
        default=None,
        metadata={"help": "maximum score of a negative: the positive's less this fraction of it; NV-Retriever: 0.05"},
    )
    absolute_margin: float | None = field(
        default=None, metadata={"help": "maximum score of a negative: the positive's less this"}
    )
    max_score: float | None = field(default=None, metadata={"help": "maximum score of a negative"})
    min_score: float | None = field(default=None, metadata={"help": "minimum score of a negative"})
    sampling: Literal["top", "random"] = field(
        default="top", metadata={"help": "take the nearest of the documents that are left, or random ones"}
    )
    seed: int = field(
        default=0,
        metadata={
            "help": "random seed of --sampling random",
            "within": "[0, 4294967295]",
            "applies": {"sampling": "random"},
        },
    )

    def __post_init__(self) -> None:
        if not 0 <= self.range_min < self.range_max:
            raise UserError(f"--range_min {self.range_min}: must be from 0 to less than --range_max {self.range_max}")
        if not 1 <= self.num_negatives <= self.range_max - self.range_min:
            raise UserError(
                f"--num_negatives {self.num_negatives}: must be at least 1 and at most the "
                f"{self.range_max - self.range_min} from --range_min to --range_max"
            )

    def choose(self, scores: np.ndarray, positive: float, query: int, removed: Counter[str]) -> np.ndarray:
        """Return the negatives of one query (Moreira et al. 2024, arXiv:2407.15831, section 3: positive-aware mining).

        Args:
            scores: `(n,)`, scores of the candidates, none of which is a positive.
            positive: score of the positive; the lowest if there are several.
            query: number of the query; random sampling is a function of the seed and this number.
            removed: counts of the candidates that each threshold removes, which are added to.

        Returns:
            Indices into the candidates, the nearest first; fewer than `num_negatives` if no more are left.
        """
        keeps: dict[str, Callable[[float], np.ndarray]] = {
            "absolute_margin": lambda margin: scores <= positive - margin,
            # A fraction of the absolute score: (1 - margin) times a negative score would be higher than it.
            "relative_margin": lambda margin: scores <= positive - abs(positive) * margin,
            "max_score": lambda limit: scores <= limit,
            "min_score": lambda limit: scores >= limit,
        }
        left = np.argsort(-scores, kind="stable")
        for name, keep in keeps.items():
            if (value := getattr(self, name)) is not None:
                kept = keep(value)[left]
                removed[name] += int((~kept).sum())
                left = left[kept]
        left = left[self.range_min :]
        if self.sampling == "random" and len(left) > self.num_negatives:
            drawn = np.random.default_rng([self.seed, query]).choice(len(left), self.num_negatives, replace=False)
            return left[np.sort(drawn)]
        return left[: self.num_negatives]


@dataclass
class Arguments:
    """The pairs, the teacher, and the output."""

    model: str = field(
        metadata={
            "help": "the teacher, as in eval/mteb_long.py: a folder or Hub id, chunk-max:PATH:256, PATH@tokens (MaxSim "
            "of token vectors), ..., bm25"
        }
    )
    data: str = field(metadata={"help": "pairs, as an entry of --train_data of training/contrastive.py"})
    output: str = field(
        metadata={"help": "JSON-lines file to write, gzipped if its name ends in .gz", "output": "file"}
    )
    corpus: str | None = field(
        default=None, metadata={"help": "more documents to choose from beside all positives, with a column text"}
    )
    add_bm25: bool = field(
        default=False,
        metadata={
            "help": "draw from the nearest documents of the teacher and those of BM25, --range_max in all, by turns; "
            "it is the teacher's scores that are compared with the thresholds",
            "applies": {"sampling": "random"},
        },
    )
    guide: str | None = field(
        default=None,
        metadata={
            "help": "a second teacher, whose scores are compared with the thresholds and order the nearest documents"
        },
    )
    index: Literal["flat", "hnsw"] = field(
        default="flat", metadata={"help": "flat: exact; hnsw: approximate, for millions of documents"}
    )
    vector_cache: str | None = field(
        default=None, metadata={"help": "file that keeps computed vectors; default: OUTPUT.vectors.sqlite"}
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "tokens at which a model truncates texts; chunk-max:PATH:N and the like have their own"},
    )
    precision: str = field(
        default="auto", metadata={"help": "float32, bfloat16, or auto: bfloat16 if the processor computes it fast"}
    )
    batch_tokens: int = field(default=16384, metadata={"help": "tokens per forward pass"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run the code in the models' folders"})


class PairTexts:
    """Pairs by their unique queries and documents; the texts stay on disk.

    Args:
        data: the pairs.
        corpus: more documents.

    Raises:
        UserError: a file cannot be read, or the corpus has titles.

    Attributes:
        queries, documents: the unique texts; the documents are the positives, then the corpus.
        query_of, document_of: `(rows,)`, for each pair the index of its query and of its document.
        positives: for each query the indices of its positives.
        own: for each query the same and, if there is one, the document with the text of the query.
    """

    def __init__(self, data: str, corpus: str | None):
        (source,) = read_sources([data], replace(PAIRS, prefix=None))  # negatives that are there already do not matter
        self._rows = source.rows
        ids = source.text_ids(["anchor", "positive"])
        query_ids, self.query_of, query_rows = _unique(ids[:, 0])
        document_ids, self.document_of, document_rows = _unique(ids[:, 1])
        self.queries: Sequence[str] = self._rows.select(query_rows)["anchor"]
        parts = [_texts(self._rows.select(document_rows), "positive")]
        if corpus is not None:
            (more,) = read_sources([corpus], CORPUS)
            more_ids, _, more_rows = _unique(more.text_ids(["text"])[:, 0])
            new = ~np.isin(more_ids, document_ids)
            document_ids = np.concatenate([document_ids, more_ids[new]])
            parts.append(_texts(more.rows.select(more_rows[new]), "text"))
        self.documents: Sequence[str] = datasets.concatenate_datasets(parts)["text"]
        self.positives: list[set[int]] = [set() for _ in query_ids]
        for query, document in zip(self.query_of.tolist(), self.document_of.tolist(), strict=True):
            self.positives[query].add(document)
        place = {identifier: document for document, identifier in enumerate(document_ids.tolist())}
        self.own = [
            positives | ({place[identifier]} if identifier in place else set())
            for positives, identifier in zip(self.positives, query_ids.tolist(), strict=True)
        ]

    def __len__(self) -> int:
        return len(self._rows)

    def with_negatives(self, negatives: Sequence[Sequence[int]]) -> Iterator[dict[str, str]]:
        """Yield the rows to write, in order; `negatives` holds those of each query, none if its pairs are left out."""
        for query, document in zip(self.query_of.tolist(), self.document_of.tolist(), strict=True):
            if len(negatives[query]):
                row = {"anchor": self.queries[query], "positive": self.documents[document]}
                yield row | {f"negative_{n}": self.documents[d] for n, d in enumerate(negatives[query], start=1)}


def mine(arguments: Arguments, thresholds: Thresholds) -> str:
    """Mine negatives and write the rows.

    Args:
        arguments: pairs, teacher and output.
        thresholds: which documents become negatives.

    Returns:
        A sentence about how many pairs have negatives, and what the thresholds removed.

    Raises:
        UserError: a mistake in the data or the models, or thresholds that leave no pair.
    """
    precision = resolve_precision(arguments.precision)
    spec = ModelSpec.parse(arguments.model, arguments.max_length, precision)
    guide_spec = None if arguments.guide is None else ModelSpec.parse(arguments.guide, None, precision)
    pairs = PairTexts(arguments.data, arguments.corpus)
    cache = VectorCache(arguments.vector_cache or f"{arguments.output}.vectors.sqlite")
    settings: dict[str, Any] = {
        "batch_tokens": arguments.batch_tokens,
        "trust_remote_code": arguments.trust_remote_code,
    }
    ranker = load_ranker(spec, pairs.queries, pairs.documents, cache, index=arguments.index, **settings)
    if arguments.add_bm25:
        words = WordRanker(pairs.queries, pairs.documents)
        ranker = RankerWithWords(ranker, words, pairs.own, thresholds.range_max)
    judge = ranker if guide_spec is None else load_ranker(guide_spec, pairs.queries, pairs.documents, cache, **settings)

    scores, documents = ranker.nearest(thresholds.range_max + max(map(len, pairs.own)))
    removed: Counter[str] = Counter()
    positive_scores, negative_scores = [], []
    negatives = []
    for query, own in enumerate(pairs.own):
        there = documents[query][documents[query] >= 0]
        is_other = ~np.isin(there, list(own))
        removed["being a positive"] += int((~is_other).sum())
        candidates = there[is_other][: thresholds.range_max]
        near = scores[query][: len(there)][is_other][: thresholds.range_max]
        if judge is not ranker and len(candidates):
            near = judge.scores(query, candidates)
        positive = float(judge.scores(query, np.array(sorted(pairs.positives[query]))).min())
        chosen = thresholds.choose(near, positive, query, removed)
        if len(chosen) == thresholds.num_negatives:
            positive_scores.append(positive)
            negative_scores.append(near[chosen].mean())
            negatives.append(candidates[chosen].tolist())
        else:
            negatives.append([])
    written = sum(len(negatives[query]) > 0 for query in pairs.query_of.tolist())
    pool = f"{len(pairs.documents)} documents"
    if not written:
        raise UserError(
            f"{arguments.data}: no pair has {thresholds.num_negatives} negatives among its {thresholds.range_max} "
            f"nearest of {pool}; loosen the thresholds, or give more documents with --corpus"
        )
    write_jsonl(arguments.output, pairs.with_negatives(negatives))
    counts = ", ".join(f"{count} by {name}" for name, count in removed.items() if count)
    return (
        f"{arguments.output}: {written} of {len(pairs)} pairs with {thresholds.num_negatives} negatives each, from "
        f"{pool}; the other {len(pairs) - written} had fewer; removed {counts or 'none'}; "
        f"mean score {np.mean(positive_scores):.3f} of positives, {np.mean(negative_scores):.3f} of negatives"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Mine with the command-line options `argv`; None: those of the process."""
    print(mine(*parse(Arguments, Thresholds, argv=argv)))


def _unique(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return unique ids in the order of their first row, the index of each row among them, and their first rows."""
    values, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    order = np.argsort(first)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return values[order], place[inverse], first[order]


def _texts(rows: datasets.Dataset, column: str) -> datasets.Dataset:
    """Return one column, renamed to `text` and cast to one type whatever file it comes from."""
    rows = rows.select_columns([column])
    rows = rows if column == "text" else rows.rename_column(column, "text")
    return rows.cast_column("text", datasets.Value("large_string"))


if __name__ == "__main__":
    run(main)
