"""Strategies that make pairs from plain documents: two spans that belong together because one document contains them.

A strategy is a function of a document and a random generator. Sizes are in tokens of the model's tokenizer, but what it
returns is text, which is then tokenised like that of all other pairs.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from common.errors import UserError
from common.sentences import SENTENCE_END

PARAGRAPH_END = re.compile(r"\n\s*\n")


@dataclass(frozen=True)
class Document:
    """A text and its tokens.

    Args:
        text: the whole text.
        offsets: `(n, 2)`, the characters at which each token starts and stops, in order and without overlap.
        words: `(n,)`, the same number for all tokens of a word.
    """

    text: str
    offsets: np.ndarray
    words: np.ndarray

    @classmethod
    def read(cls, text: str, tokenizer: PreTrainedTokenizerBase) -> "Document":
        """Tokenise a text.

        Args:
            text: any string.
            tokenizer: the model's.

        Returns:
            The text and its tokens.

        Raises:
            UserError: the tokenizer does not know the offsets of its tokens.
        """
        if not tokenizer.is_fast:
            raise UserError("--pairs from documents needs a fast tokenizer; save the model with its tokenizer.json")
        encoding = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False).encodings[0]
        offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        # Byte-level tokens of one character have the same offsets: only the first of them counts.
        offsets[1:, 0] = np.maximum(offsets[1:, 0], np.maximum.accumulate(offsets[:, 1])[:-1])
        # Some tokenizers have tokens of blanks alone: a span must not consist of them.
        kept = np.array([start < stop and not text[start:stop].isspace() for start, stop in offsets.tolist()], np.bool_)
        words = np.array([~place if word is None else word for place, word in enumerate(encoding.word_ids)], np.int64)
        return cls(text, offsets[kept], words[kept])

    def __len__(self) -> int:
        return len(self.offsets)

    def span(self, start: int, stop: int) -> str:
        """Return the text of tokens `start` to `stop`."""
        return self.text[self.offsets[start, 0] : self.offsets[stop - 1, 1]]

    @cached_property
    def sentences(self) -> np.ndarray:
        """The tokens at which each sentence starts and stops, `(sentences, 2)`, without sentences that have none."""
        return self._split(SENTENCE_END)

    @cached_property
    def paragraphs(self) -> np.ndarray:
        """The same for paragraphs, which blank lines separate: `(paragraphs, 2)`."""
        return self._split(PARAGRAPH_END)

    def _split(self, end: re.Pattern[str]) -> np.ndarray:
        bounds = [0, *(match.end() for match in end.finditer(self.text)), len(self.text)]
        tokens = np.unique(np.searchsorted(self.offsets[:, 0], bounds))
        return np.stack([tokens[:-1], tokens[1:]], axis=1)


class PairStrategy(Protocol):
    """Makes a pair from a document."""

    def __call__(self, document: Document, generator: np.random.Generator) -> tuple[str, str] | None:
        """Return the anchor and the positive; None if the document is too short, whatever the generator."""

    def longest(self, tokens: int) -> int:
        """Return the most tokens of a span that is cut from a document of so many tokens."""
        ...

    @property
    def needs(self) -> str:
        """Say what a document must have, for the line about those that are left out."""
        ...


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


def longest_pairs(strategy: PairStrategy, documents: Sequence[Document]) -> list[list[str]]:
    """Return, for each document, spans as long as any that a strategy could take, as anchors and as positives."""
    spans = [document.span(0, strategy.longest(len(document))) for document in documents]
    return [spans, spans]
