"""BM25 of texts that are in no index, with the document frequencies of a corpus."""

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from common.bm25 import K1, B, weight_of_word, words_of


class CorpusWords:
    """What BM25 has to know of a corpus to score any texts with it: document frequencies and the mean length.

    Attributes:
        texts: number of texts that were added.
        words: number of their words, stop words left out.
        frequencies: in how many of the texts each word is.
    """

    def __init__(self) -> None:
        self.texts, self.words = 0, 0
        self.frequencies: Counter[str] = Counter()

    def add(self, texts: Sequence[str]) -> None:
        """Add texts to the corpus."""
        self.texts += len(texts)
        for words in words_of(texts):
            self.words += len(words)
            self.frequencies.update(set(words))

    def include(self, other: "CorpusWords") -> None:
        """Add the texts of another corpus."""
        self.texts, self.words = self.texts + other.texts, self.words + other.words
        self.frequencies.update(other.frequencies)

    def scores(self, queries: Sequence[str], documents: Sequence[str]) -> np.ndarray:
        """Return the scores of documents, which need not be in the corpus, for queries.

        A document of the corpus has the score that `BM25Index` of the corpus gives it:

            sum over the words w of the query of  idf(w) f / (f + k1 (1 - b + b |d| / mean length)),
            idf(w) = ln(1 + (texts - df(w) + 1/2) / (df(w) + 1/2)),    f how often w is in d

        Words that are not in the corpus count nothing. Source: Kamphuis et al. 2020, "Which BM25 do you mean?", the
        accurate variant of Lucene.

        Args:
            queries: Q texts.
            documents: D texts.

        Returns:
            float32 `(Q, D)`.
        """
        asked: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)  # of a word: queries, how often it is there
        for number, words in enumerate(words_of(queries)):
            for word, count in Counter(words).items():
                if word in self.frequencies:
                    asked[word].append((number, count))
        found: defaultdict[str, list[tuple[int, float]]] = defaultdict(list)  # documents, what is multiplied by idf
        for number, words in enumerate(words_of(documents)):
            saturation = K1 * (1 - B + B * len(words) * self.texts / max(1, self.words))
            for word, count in Counter(words).items():
                if word in asked:
                    found[word].append((number, count / (count + saturation)))
        scores = np.zeros((len(queries), len(documents)), np.float32)
        for word, weights in found.items():
            idf = weight_of_word(self.texts, self.frequencies[word])
            (rows, counts), (columns, shares) = (zip(*pairs, strict=True) for pairs in (asked[word], weights))
            scores[np.ix_(rows, columns)] += idf * np.outer(counts, shares)
        return scores
