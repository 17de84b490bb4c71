"""Strategies that make pairs from plain documents: two spans that belong together because one document contains them.

A strategy is a function of a document and a random generator. Sizes are in tokens of the model's tokenizer, but what it
returns is text, which is then tokenised like that of all other pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from training.data.document import Document, PairStrategy


@dataclass(frozen=True)
class Crops:
    """Take two spans independently, and delete words (Contriever, Izacard et al. 2022, arXiv:2112.09118).

    Args:
        window: tokens of the part of the document, at a random place, that both spans are taken from; a shorter
            document is taken whole.
        ratio: smallest and largest fraction of the window that a span takes. The authors' 0.05 to 0.5 of 256 tokens
            teach nothing about length: an encoder of long documents needs spans longer than those it was trained on.
        deletion: probability of each word to be deleted; at least one word stays.
    """

    window: int
    ratio: tuple[float, float]
    deletion: float

    def __call__(self, document: Document, generator: np.random.Generator) -> tuple[str, str] | None:
        """Make a pair; see `PairStrategy`."""
        if len(document) < 2:
            return None
        size = min(self.window, len(document))
        start = int(generator.integers(len(document) - size, endpoint=True))
        return self._crop(document, start, size, generator), self._crop(document, start, size, generator)

    def longest(self, tokens: int) -> int:
        """Return the most tokens of a span; see `PairStrategy`."""
        return self._lengths(min(self.window, tokens))[1]

    @property
    def needs(self) -> str:
        """Say what a document must have; see `PairStrategy`."""
        return "2 tokens"

    def _lengths(self, size: int) -> tuple[int, int]:
        """Return the smallest and largest length: whole tokens inside the ratio if there are any, at least one."""
        smallest = max(1, int(np.ceil(self.ratio[0] * size)))
        return smallest, max(smallest, int(self.ratio[1] * size))

    def _crop(self, document: Document, start: int, size: int, generator: np.random.Generator) -> str:
        length = int(generator.integers(*self._lengths(size), endpoint=True))
        start += int(generator.integers(size - length, endpoint=True))
        return delete_words(document, start, start + length, self.deletion, generator)


def delete_words(document: Document, start: int, stop: int, rate: float, generator: np.random.Generator) -> str:
    """Delete random words from a span.

    Args:
        document: contains the span.
        start, stop: the tokens of the span.
        rate: probability of each word to be deleted.
        generator: source of all randomness.

    Returns:
        The text that is left; at least one word.
    """
    words = document.words[start:stop]
    first = np.flatnonzero(np.append(True, words[1:] != words[:-1]))  # tokens at which a word starts
    begins = document.offsets[start + first, 0]
    ends = document.offsets[start + np.append(first[1:], len(words)) - 1, 1]
    kept = generator.random(len(first)) >= rate
    if not kept.any():
        kept[generator.integers(len(first))] = True
    text = ""
    for begin, end, following, stays in zip(begins, ends, [*begins[1:], ends[-1]], kept, strict=True):
        if stays:
            text += document.text[begin:end]
        if not text[-1:].isspace():  # of the blanks on both sides of a deleted word those before it stay
            text += document.text[end:following]
    return text.strip()


@dataclass(frozen=True)
class InverseCloze:
    """Take a sentence and the passage around it (Lee et al. 2019, arXiv:1906.00300, section 4).

    Args:
        window: tokens of the passage, in which the sentence is at a random place.
        removal: probability that the sentence is removed from the passage.
    """

    window: int
    removal: float

    def __call__(self, document: Document, generator: np.random.Generator) -> tuple[str, str] | None:
        """Make a pair; see `PairStrategy`."""
        size = min(self.window, len(document))
        lengths = document.sentences[:, 1] - document.sentences[:, 0]
        sentences = document.sentences[lengths < size]  # a longer one leaves no passage
        if not len(sentences):
            return None
        start, stop = map(int, sentences[generator.integers(len(sentences))])
        begin = int(generator.integers(max(0, stop - size), min(start, len(document) - size), endpoint=True))
        end = begin + size
        if generator.random() >= self.removal:
            return document.span(start, stop), document.span(begin, end)
        before = document.span(begin, start) if begin < start else ""
        after = document.span(stop, end) if stop < end else ""
        return document.span(start, stop), f"{before} {after}".strip()

    def longest(self, tokens: int) -> int:
        """Return the most tokens of a span; see `PairStrategy`."""
        return min(self.window, tokens)

    @property
    def needs(self) -> str:
        """Say what a document must have; see `PairStrategy`."""
        return "a sentence, and text beside it in the window"


@dataclass(frozen=True)
class Neighbours:
    """Take the spans before and after a random boundary of paragraphs (Neelakantan et al. 2022, arXiv:2201.10005).

    In a document of one paragraph it is a boundary of sentences, and in one of a single sentence one of tokens.

    Args:
        window: most tokens of each span.
    """

    window: int

    def __call__(self, document: Document, generator: np.random.Generator) -> tuple[str, str] | None:
        """Make a pair; see `PairStrategy`."""
        if len(document) < 2:
            return None
        for parts in (document.paragraphs, document.sentences):
            if len(parts) > 1:
                boundary = int(generator.choice(parts[1:, 0]))
                break
        else:
            boundary = int(generator.integers(1, len(document)))
        start, stop = max(0, boundary - self.window), min(len(document), boundary + self.window)
        return document.span(start, boundary), document.span(boundary, stop)

    def longest(self, tokens: int) -> int:
        """Return the most tokens of a span; see `PairStrategy`."""
        return min(self.window, tokens)

    @property
    def needs(self) -> str:
        """Say what a document must have; see `PairStrategy`."""
        return "2 tokens"


@dataclass(frozen=True)
class Segments:
    """Take two of the windows of a document.

    Args:
        window: tokens of a window; the last one of a document may be shorter.
        step: tokens from the start of a window to that of the next, at most `window`.
        gap: least number of tokens between the two. Below 0 they may share that many: windows that share most of their
            tokens teach a model to recognise copies.
    """

    window: int
    step: int
    gap: int = 0

    def __call__(self, document: Document, generator: np.random.Generator) -> tuple[str, str] | None:
        """Make a pair; see `PairStrategy`."""
        count = 1 + max(0, -(-(len(document) - self.window) // self.step))
        if count <= self._apart:
            return None
        # Two different numbers, between which the windows that are too close are put in: all pairs are equally likely.
        places = generator.choice(count - self._apart + 1, 2, replace=False)
        places[places.argmax()] += self._apart - 1
        starts = self.step * places
        first, second = (document.span(int(s), min(int(s) + self.window, len(document))) for s in starts)
        return first, second

    @property
    def _apart(self) -> int:
        """The least difference of the numbers of the two windows."""
        return max(1, -(-(self.window + self.gap) // self.step))

    def longest(self, tokens: int) -> int:
        """Return the most tokens of a span; see `PairStrategy`."""
        return min(self.window, tokens)

    @property
    def needs(self) -> str:
        """Say what a document must have; see `PairStrategy`."""
        shared = f"sharing at most {-self.gap}" if self.gap < 0 else f"at least {self.gap} apart"
        shortest = self.window + (self._apart - 1) * self.step + 1
        return f"{shortest} tokens, for two segments of up to {self.window} tokens, {shared}"


def make_pairs(
    strategy: PairStrategy, documents: Sequence[Document], generators: Sequence[np.random.Generator]
) -> list[list[str]]:
    """Make a pair from each document.

    Args:
        strategy: how.
        documents: all long enough for a pair.
        generators: source of randomness of each document.

    Returns:
        The anchors and the positives.
    """
    pairs = [strategy(document, generator) for document, generator in zip(documents, generators, strict=True)]
    assert None not in pairs, "documents that are too short are left out before training"
    return [[pair[side] for pair in pairs if pair is not None] for side in (0, 1)]
