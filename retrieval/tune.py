"""Choose how much the model counts beside BM25, by queries whose documents are known.

    python -m retrieval.tune --index my-index --queries judged.jsonl

The rows are {query, documents}, one JSON object per line: a query, and the ids of the documents that answer it. The
index keeps the weight with which nDCG@10 is largest, and searches that name no weight use it. A few queries are enough
(Bruch et al. 2023, arXiv:2210.11934).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common.arguments import parse
from common.errors import UserError, run
from common.jsonl import read_jsonl
from retrieval.index.index import Index
from retrieval.ranking import Scores, score_candidates

WEIGHTS = tuple(round(step / 20, 2) for step in range(21))
K = 10


@dataclass
class Arguments:
    """Options of the script."""

    index: str = field(metadata={"help": "folder of the index"})
    queries: str = field(
        metadata={"help": ".jsonl or .jsonl.gz file with the fields query and documents (a list of ids)"}
    )
    model: str | None = field(
        default=None, metadata={"help": "the model of the index, if it is not where it was when the index was built"}
    )
    candidates: int = field(
        default=100, metadata={"help": "documents that vectors and BM25 find each", "within": "[1, inf)"}
    )
    save: bool = field(default=True, metadata={"help": "keep the best weight in the index"})


def read_judged_queries(path: str | Path, index: Index) -> list[tuple[str, list[str]]]:
    """Read queries and the ids of the documents that answer them.

    Args:
        path: the file.
        index: that has the documents.

    Returns:
        Pairs of a query and ids.

    Raises:
        UserError: a row is malformed, or names a document that the index does not have.
    """
    known, found = index.snapshot.places(), []
    for line, row in read_jsonl(path, "query", "documents"):
        place = f"{path}, row {line}"
        query, ids = row["query"], row["documents"]
        ids = [ids] if isinstance(ids, str) else ids
        if not isinstance(query, str) or not query.strip():
            raise UserError(f"{place}: query is {query!r}; give a text")
        if not isinstance(ids, list) or not ids or not all(isinstance(one, str) for one in ids):
            raise UserError(f"{place}: documents is {str(ids)[:40]}; give a list of ids")
        if missing := [one for one in ids if one not in known]:
            raise UserError(f"{place}: the index has no document with the id {missing[0]!r}")
        found.append((query, ids))
    if not found:
        raise UserError(f"{path} holds no queries")
    return found


def ndcg(ranking: Sequence[int], relevant: set[int], k: int = K) -> float:
    """Return nDCG@k of a ranking.

    Args:
        ranking: numbers of documents, best first.
        relevant: those that answer the query.
        k: how many of the first count.
    """
    gains = 1 / np.log2(np.arange(2, k + 2))
    found = [number in relevant for number in ranking[:k]]
    return float(gains[: len(found)][found].sum() / gains[: len(relevant)].sum())


def tune_weight(scores: Sequence[Scores], relevant: Sequence[set[int]]) -> dict[float, float]:
    """Return the mean nDCG@10 for each weight of the model.

    Args:
        scores: of the candidates of each query.
        relevant: numbers of the documents that answer it.
    """
    means = {}
    for weight in WEIGHTS:
        rankings = [of_query.numbers[np.argsort(-of_query.combined(weight), kind="stable")] for of_query in scores]
        means[weight] = float(
            np.mean([ndcg(row.tolist(), answers) for row, answers in zip(rankings, relevant, strict=True)])
        )
    return means


def best_weight(means: dict[float, float]) -> float:
    """Return the weight with the largest mean; of several the one in their middle, which other queries suit best."""
    best = [weight for weight, mean in means.items() if mean >= max(means.values()) - 1e-9]
    return best[len(best) // 2]


def main() -> None:
    """Run the script.

    Raises:
        UserError: the index has one way to score alone.
    """
    (arguments,) = parse(Arguments)
    index = Index.open(arguments.index, arguments.model)
    parts = index.manifest.settings.parts
    if "words" not in parts or len(parts) < 2:
        raise UserError(
            f"--index {arguments.index}: it has {', '.join(parts)} alone, so that there is nothing to weigh"
        )
    judged, places = read_judged_queries(arguments.queries, index), index.snapshot.places()
    scores = [
        score_candidates(index.snapshot, index.read_query(query), parts, arguments.candidates) for query, _ in judged
    ]
    means = tune_weight(scores, [{places[one] for one in ids} for _, ids in judged])
    print("weight  nDCG@10")
    for weight, mean in means.items():
        print(f"{weight:6.2f}  {100 * mean:7.2f}")
    weight = best_weight(means)
    print(f"{len(judged)} queries: the best weight is {weight}, and that of the index was {index.manifest.weight}")
    if arguments.save:
        index.set_weight(weight)


if __name__ == "__main__":
    run(main)
