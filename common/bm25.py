"""BM25 (Robertson et al. 1994), the lexical baseline: scores by the words that a query and a text share."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from common.errors import UserError

# The parameters of BM25: how soon more of a word counts no more, and how much the length of a text counts.
K1, B = 1.5, 0.75


def import_bm25s() -> Any:
    """Import bm25s.

    Raises:
        UserError: it is not installed.
    """
    try:
        import bm25s
    except ImportError:
        raise UserError("BM25 needs bm25s; install the extra 'search': pip install -e '.[search]'") from None
    return bm25s


def words_of(texts: Sequence[str]) -> list[list[str]]:
    """Return the words of each text: two letters or digits and more, in lower case, without English stop words."""
    return import_bm25s().tokenize(list(texts), stopwords="en", return_ids=False, show_progress=False)


def weight_of_word(texts: int, frequency: int) -> float:
    """Return the inverse document frequency of a word, as Lucene has it.

    Args:
        texts: number of all texts.
        frequency: number of the texts that have the word.
    """
    return math.log(1 + (texts - frequency + 0.5) / (frequency + 0.5))


class BM25Index:
    """An index with Lucene's BM25 as bm25s implements it (Lù 2024): k1 = 1.5, b = 0.75, English stop words.

    Words are not stemmed.

    Args:
        texts: the texts that are searched.

    Raises:
        UserError: no text has a word.
    """

    def __init__(self, texts: Sequence[str]):
        self._size = len(texts)
        bm25s = import_bm25s()
        self._retriever = bm25s.BM25(k1=K1, b=B, method="lucene")
        words = bm25s.tokenize(list(texts), stopwords="en")
        if not words.vocab:
            raise UserError(
                f"bm25: none of the {len(texts)} documents has a word of two letters or more that is no stop word; "
                "leave BM25 out"
            )
        self._retriever.index(words)

    def search(self, queries: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Find the texts with the highest scores for each query, best first.

        Args:
            queries: the queries.
            k: number of texts per query.

        Returns:
            Scores (float32) and indices into the texts (int64), both `(queries, min(k, texts))`.
        """
        words = import_bm25s().tokenize(list(queries), stopwords="en")
        indices, scores = self._retriever.retrieve(words, k=min(k, self._size))
        return scores.astype(np.float32), indices.astype(np.int64)

    def scores(self, query: str) -> np.ndarray:
        """Return the scores of all texts for one query, float32 `(texts,)`; 0 for a query of stop words alone."""
        (words,) = words_of([query])
        if not words:
            return np.zeros(self._size, np.float32)
        return self._retriever.get_scores(words).astype(np.float32)

    @property
    def nbytes(self) -> int:
        """The bytes of the index: the scores of its words, and the words."""
        arrays = [value for value in self._retriever.scores.values() if isinstance(value, np.ndarray)]
        return sum(array.nbytes for array in arrays) + sum(len(word.encode()) for word in self._retriever.vocab_dict)
