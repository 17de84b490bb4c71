"""BM25 over the words of whole documents, with document frequencies that are counted over all shards.

A shard keeps the counts, not the scores: what a word weighs and how long a document is on average changes with every
document that is added or deleted. The scores are those that one index of the remaining documents would give (Lucene's,
as `common.bm25`).

The V different words of a shard of D documents: `words`, UTF-8 one after another in the order of their bytes, and
`word_ends` `(V,)`; `word_documents` and `word_counts`, int32, for each word the documents that have it and how often;
`posting_ends` `(V,)`; `lengths` `(D,)` int32, the number of words of each document.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from common.bm25 import K1, B, weight_of_word, words_of

Arrays = Mapping[str, np.ndarray]


def postings(texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Count the words of documents.

    Args:
        texts: of the D documents of a shard.

    Returns:
        The arrays above, by their names.
    """
    found: dict[bytes, list[tuple[int, int]]] = defaultdict(list)
    lengths = []
    for place, text in enumerate(texts):
        (words,) = words_of([text])  # the words of all texts together would take many times their memory
        lengths.append(len(words))
        for word, count in Counter(words).items():
            found[word.encode()].append((place, count))
    words_in_order = sorted(found)
    pairs = np.array([pair for word in words_in_order for pair in found[word]], np.int32).reshape(-1, 2)
    return {
        "words": np.frombuffer(b"".join(words_in_order), np.uint8),
        "word_ends": np.cumsum([len(word) for word in words_in_order], dtype=np.int64),
        "word_documents": np.ascontiguousarray(pairs[:, 0]),
        "word_counts": np.ascontiguousarray(pairs[:, 1]),
        "posting_ends": np.cumsum([len(found[word]) for word in words_in_order], dtype=np.int64),
        "lengths": np.array(lengths, np.int32),
    }


def find_word(arrays: Arrays, word: str) -> slice | None:
    """Return the rows of a word in the postings of a shard; None if no document has it."""
    sought, ends, words = word.encode(), arrays["word_ends"], arrays["words"]
    low, high = 0, len(ends)
    while low < high:
        middle = (low + high) // 2
        start = int(ends[middle - 1]) if middle else 0
        found = words[start : int(ends[middle])].tobytes()
        if found == sought:
            posting_ends = arrays["posting_ends"]
            return slice(int(posting_ends[middle - 1]) if middle else 0, int(posting_ends[middle]))
        low, high = (middle + 1, high) if found < sought else (low, middle)
    return None


class WordScores:
    """BM25 over the documents of some shards that are not deleted.

    Args:
        shards: the arrays of each shard.
        alive: of each shard which documents are not deleted, `(D,)` bool.
    """

    def __init__(self, shards: Sequence[Arrays], alive: Sequence[np.ndarray]):
        self.shards, self.alive = shards, alive
        self.documents = int(sum(kept.sum() for kept in alive))
        total = sum(
            int(arrays["lengths"][kept].sum(dtype=np.int64)) for arrays, kept in zip(shards, alive, strict=True)
        )
        self.average_length = total / self.documents if self.documents else 0.0
        self._frequencies: dict[str, int] = {}  # of the words that were sought, whose postings are long

    def frequency(self, word: str) -> int:
        """Return the number of documents that have a word."""
        if word not in self._frequencies:
            self._frequencies[word] = sum(
                int(kept[arrays["word_documents"][rows]].sum())
                for arrays, kept in zip(self.shards, self.alive, strict=True)
                if (rows := find_word(arrays, word)) is not None
            )
        return self._frequencies[word]

    def weights(self, query: str) -> dict[str, float]:
        """Return what each word of a query weighs: how often it is there times its inverse document frequency.

        Words that no document has are left out.
        """
        (words,) = words_of([query])
        counts = {word: count for word, count in Counter(words).items() if self.frequency(word)}
        return {word: count * weight_of_word(self.documents, self.frequency(word)) for word, count in counts.items()}

    def __call__(self, query: str) -> np.ndarray:
        """Return the scores of all documents, those of deleted ones too, in the order of the shards, `(D,)` float32."""
        weights, scores = self.weights(query), []
        for arrays in self.shards:
            found = np.zeros(len(arrays["lengths"]), np.float32)
            for word, weight in weights.items():
                if (rows := find_word(arrays, word)) is None:
                    continue
                documents = arrays["word_documents"][rows]
                frequency = arrays["word_counts"][rows].astype(np.float32)
                length = arrays["lengths"][documents] / self.average_length
                found[documents] += weight * frequency / (K1 * (1 - B + B * length) + frequency)
            scores.append(found)
        return np.concatenate([*scores, np.zeros(0, np.float32)])

    def of_passages(self, query: str, passages: Sequence[str]) -> np.ndarray:
        """Return scores of passages by the words of a query, `(p,)` float32, as if all passages were equally long."""
        weights, scores = self.weights(query), np.zeros(len(passages), np.float32)
        for place, words in enumerate(words_of(passages)):
            counts = Counter(words)
            scores[place] = sum(weight * counts[word] / (K1 + counts[word]) for word, weight in weights.items())
        return scores
