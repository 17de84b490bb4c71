"""The ranking of documents: candidates by vectors and words, MaxSim over them, a convex combination with BM25."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from common.score_scaling import min_max_
from retrieval.index.snapshot import Snapshot
from retrieval.index.tokens import TokenScores


@dataclass(frozen=True)
class Passage:
    """A passage of a document that was found.

    Args:
        start: its first character in the text of the document.
        end: the character after its last.
        text: what stands there.
        score: how well it answers the query; comparable within a search.
        page: the page that it begins on; None: it is not known.
        heading: the heading that it stands under; None: there is none.
    """

    start: int
    end: int
    text: str
    score: float
    page: str | None
    heading: str | None


@dataclass(frozen=True)
class Hit:
    """A document that was found.

    Args:
        id: of the document.
        score: by which the documents are ranked.
        parts: the scores that it is made of, by `vector`, `tokens` and `words`, as they are before they are scaled.
        passages: the best passages, best first.
        metadata: of the document.
    """

    id: str
    score: float
    parts: Mapping[str, float]
    passages: Sequence[Passage]
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Query:
    """A query that was read.

    Args:
        text: of the query.
        vector: `(d,)` float32; None: vectors are not used.
        tokens: `(t, k)`; None: token vectors are not used.
    """

    text: str
    vector: np.ndarray | None = None
    tokens: torch.Tensor | None = None


@dataclass(frozen=True)
class Scores:
    """The scores of the candidates of a query.

    Args:
        numbers: of the documents, `(n,)`.
        parts: for `vector`, `tokens` and `words`, those that are used, the score of each document, `(n,)` float32.
    """

    numbers: np.ndarray
    parts: Mapping[str, np.ndarray]

    def combined(self, weight: float) -> np.ndarray:
        """Return one score for each document, `(n,)` float32.

        The model's score is MaxSim, or without token vectors that of the best passage. Beside words it is scaled as
        they are, by `min_max_`, and counts with the weight: `weight * scaled(model) + (1 - weight) * scaled(words)`.

        Args:
            weight: of the model, 0 to 1.
        """
        model = self.parts.get("tokens", self.parts.get("vector"))
        words = self.parts.get("words")
        if model is None or words is None:
            return words if model is None else model  # type: ignore[return-value]
        scaled = min_max_(torch.from_numpy(np.stack([model, words]))).numpy()
        return weight * scaled[0] + (1 - weight) * scaled[1]


def score_candidates(
    snapshot: Snapshot, query: Query, parts: Sequence[str], candidates: int, filters: Mapping[str, Any] | None = None
) -> Scores:
    """Score the documents that may answer a query.

    The candidates are the nearest by vectors and by words together. If only token vectors are used, all documents are.

    Args:
        snapshot: the index.
        query: what is sought.
        parts: `vector`, `tokens` and `words`, or some of them.
        candidates: number of documents that vectors and words find each.
        filters: limit the search to documents with such metadata; see `retrieval.index.filters`.

    Returns:
        The candidates, and all their scores.
    """
    allowed = snapshot.allowed(filters)
    found = []
    words: np.ndarray | None = None
    if "words" in parts and snapshot.words is not None:
        words = snapshot.words(query.text)
        having = np.flatnonzero(allowed & (words > 0))
        found.append(having[np.argsort(-words[having], kind="stable")[:candidates]])
    if "vector" in parts and snapshot.vectors is not None and query.vector is not None:
        found.append(snapshot.vectors.best(query.vector, candidates, allowed))
    numbers = np.unique(np.concatenate(found)) if found else np.flatnonzero(allowed)
    scores: dict[str, np.ndarray] = {}
    if "vector" in parts and snapshot.vectors is not None and query.vector is not None:
        near = snapshot.vectors.of_documents(query.vector, numbers)
        # A document without passages is as far as the farthest.
        scores["vector"] = np.where(np.isfinite(near), near, near.min(initial=0, where=np.isfinite(near)))
    if "tokens" in parts and query.tokens is not None:
        scores["tokens"] = np.zeros(len(numbers), np.float32)
        if snapshot.codec is not None:
            maxsim = TokenScores(snapshot.codec, query.tokens)
            scores["tokens"] = maxsim.of_documents([snapshot.tokens(int(number)) for number in numbers])
    if words is not None:
        scores["words"] = words[numbers]
    return Scores(numbers, scores)


def score_passages(snapshot: Snapshot, query: Query, parts: Sequence[str], number: int) -> list[Passage]:
    """Return all passages of a document, in the order of the text.

    Args:
        snapshot: the index.
        query: what is sought.
        parts: that are used: passages are compared by their tokens, without these by their vectors, or by words alone.
        number: of the document.
    """
    shard, place = snapshot.locate(number)
    rows, document = shard.rows("passage", place), shard.document(place)
    spans = shard.arrays["passages"][rows].tolist()
    texts = [document.text[start:end] for start, end in spans]
    if "tokens" in parts and query.tokens is not None and snapshot.codec is not None:
        maxsim = TokenScores(snapshot.codec, query.tokens)
        scores = maxsim.of_passages(shard.codes(place), shard.arrays["passage_tokens"][rows])
    elif "vector" in parts and query.vector is not None and snapshot.vectors is not None:
        scores = snapshot.vectors.of_passages(query.vector, number)
    elif snapshot.words is not None:
        scores = snapshot.words.of_passages(query.text, texts)
    else:
        scores = np.zeros(len(spans), np.float32)
    return [
        Passage(start, end, text, score, document.mark("page", start), document.mark("heading", start))
        for (start, end), text, score in zip(spans, texts, scores.tolist(), strict=True)
    ]


def best_passages(passages: Sequence[Passage], count: int) -> list[Passage]:
    """Return the passages with the largest scores, best first, none of which overlaps another.

    Args:
        passages: of a document.
        count: most passages that are returned; one without any token that could answer is none.
    """
    chosen: list[Passage] = []
    for passage in sorted(passages, key=lambda passage: -passage.score):
        if len(chosen) == count or not np.isfinite(passage.score):
            break
        if all(passage.end <= other.start or other.end <= passage.start for other in chosen):
            chosen.append(passage)
    return chosen
