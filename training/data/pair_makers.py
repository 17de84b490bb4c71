"""Positives made from plain documents: two texts that belong together because one document holds them.

Each way is a function of a document and a generator. Sizes are in tokens of the model's tokenizer, but what is cut out
is text: from there on it goes the way of all other pairs.
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
        text: of which pieces are cut.
        spans: `(n, 2)`, the characters at which each token starts and ends, in order and without overlap.
        words: `(n,)`, the same number for the tokens of one word.
    """

    text: str
    spans: np.ndarray
    words: np.ndarray

    @classmethod
    def read(cls, text: str, tokenizer: PreTrainedTokenizerBase) -> "Document":
        """Tokenise a text.

        Raises:
            UserError: the tokenizer does not know at which characters its tokens stand.
        """
        if not tokenizer.is_fast:
            raise UserError("--pairs from documents needs a fast tokenizer; save the model with its tokenizer.json")
        encoding = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False).encodings[0]
        spans = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        # Byte-level tokens of one character share its place: only the first of them counts.
        spans[1:, 0] = np.maximum(spans[1:, 0], np.maximum.accumulate(spans[:, 1])[:-1])
        # Some tokenizers have tokens of blanks alone: a piece must not be one of them.
        kept = np.array([not text[start:stop].isspace() and start < stop for start, stop in spans.tolist()], np.bool_)
        words = np.array([~place if word is None else word for place, word in enumerate(encoding.word_ids)], np.int64)
        return cls(text, spans[kept], words[kept])

    def __len__(self) -> int:
        return len(self.spans)

    def piece(self, start: int, stop: int) -> str:
        """The text of tokens `start` to `stop`."""
        return self.text[self.spans[start, 0] : self.spans[stop - 1, 1]]

    @cached_property
    def sentences(self) -> np.ndarray:
        """`(sentences, 2)`: at which token each starts and ends; those without tokens are left out."""
        return self._between(SENTENCE_END)

    @cached_property
    def paragraphs(self) -> np.ndarray:
        """`(paragraphs, 2)`, the same for paragraphs, which a blank line parts."""
        return self._between(PARAGRAPH_END)

    def _between(self, end: re.Pattern[str]) -> np.ndarray:
        bounds = [0, *(match.end() for match in end.finditer(self.text)), len(self.text)]
        tokens = np.unique(np.searchsorted(self.spans[:, 0], bounds))
        return np.stack([tokens[:-1], tokens[1:]], axis=1)


class Positives(Protocol):
    """A way to make a pair. Without a second piece in the document it answers None, whatever the generator."""

    def __call__(self, document: Document, generator: np.random.Generator) -> tuple[str, str] | None: ...

    def longest(self, tokens: int) -> int:
        """Most tokens of a piece that is cut from a document of so many."""
        ...


@dataclass(frozen=True)
class Crops:
    """Two stretches drawn independently, words deleted (Contriever, Izacard et al. 2022, arXiv:2112.09118).

    Args:
        window: tokens, at a random place of the document; all of a shorter one.
        ratio: least and largest share of the window that a stretch takes. The authors' 0.05 to 0.5 of 256 tokens teach
            nothing about length: an encoder of long documents needs stretches that are longer than what it knew.
        deletion: chance of each word to be left out, one word staying at least.
    """

    window: int
    ratio: tuple[float, float]
    deletion: float

    def __call__(self, document: Document, generator: np.random.Generator) -> tuple[str, str] | None:
        if len(document) < 2:
            return None
        size = min(self.window, len(document))
        start = int(generator.integers(len(document) - size, endpoint=True))
        return self._crop(document, start, size, generator), self._crop(document, start, size, generator)

    def longest(self, tokens: int) -> int:
        return self._lengths(min(self.window, tokens))[1]

    def _lengths(self, size: int) -> tuple[int, int]:
        """Least and largest length of a crop: whole tokens inside the ratio where there are any, one token at least."""
        least = max(1, int(np.ceil(self.ratio[0] * size)))
        return least, max(least, int(self.ratio[1] * size))

    def _crop(self, document: Document, start: int, size: int, generator: np.random.Generator) -> str:
        length = int(generator.integers(*self._lengths(size), endpoint=True))
        start += int(generator.integers(size - length, endpoint=True))
        return delete_words(document, start, start + length, self.deletion, generator)


def delete_words(document: Document, start: int, stop: int, rate: float, generator: np.random.Generator) -> str:
    """The text of tokens `start` to `stop` without some of its words, each left out with the chance `rate`."""
    words = document.words[start:stop]
    first = np.flatnonzero(np.append(True, words[1:] != words[:-1]))  # tokens at which a word starts
    begins = document.spans[start + first, 0]
    ends = document.spans[start + np.append(first[1:], len(words)) - 1, 1]
    kept = generator.random(len(first)) >= rate
    if not kept.any():
        kept[generator.integers(len(first))] = True
    text = ""
    for begin, end, following, stays in zip(begins, ends, [*begins[1:], ends[-1]], kept, strict=True):
        if stays:
            text += document.text[begin:end]
        if not text[-1:].isspace():  # of the blanks around a word that goes those before it stay
            text += document.text[end:following]
    return text.strip()


@dataclass(frozen=True)
class InverseCloze:
    """A sentence, and the passage that it was taken from (Lee et al. 2019, arXiv:1906.00300, section 4).

    Args:
        window: tokens of the passage, which holds the sentence at a random place.
        removal: chance that the sentence is missing from the passage.
    """

    window: int
    removal: float

    def __call__(self, document: Document, generator: np.random.Generator) -> tuple[str, str] | None:
        size = min(self.window, len(document))
        lengths = document.sentences[:, 1] - document.sentences[:, 0]
        sentences = document.sentences[lengths < size]  # a longer one leaves nothing
        if not len(sentences):
            return None
        start, stop = map(int, sentences[generator.integers(len(sentences))])
        begin = int(generator.integers(max(0, stop - size), min(start, len(document) - size), endpoint=True))
        end = begin + size
        if generator.random() >= self.removal:
            return document.piece(start, stop), document.piece(begin, end)
        before = document.piece(begin, start) if begin < start else ""
        after = document.piece(stop, end) if stop < end else ""
        return document.piece(start, stop), f"{before} {after}".strip()

    def longest(self, tokens: int) -> int:
        return min(self.window, tokens)


@dataclass(frozen=True)
class Neighbours:
    """What comes before and after a random place between two paragraphs (Neelakantan et al. 2022, arXiv:2201.10005).

    In a document of one paragraph it is a place between two sentences, and in one of one sentence between two tokens.

    Args:
        window: tokens that each piece has at most.
    """

    window: int

    def __call__(self, document: Document, generator: np.random.Generator) -> tuple[str, str] | None:
        if len(document) < 2:
            return None
        for parts in (document.paragraphs, document.sentences):
            if len(parts) > 1:
                place = int(generator.choice(parts[1:, 0]))
                break
        else:
            place = int(generator.integers(1, len(document)))
        before, after = max(0, place - self.window), min(len(document), place + self.window)
        return document.piece(before, place), document.piece(place, after)

    def longest(self, tokens: int) -> int:
        return min(self.window, tokens)


@dataclass(frozen=True)
class Segments:
    """Two of the overlapping windows of a document: they start every `step` tokens, and the last one may be shorter.

    Args:
        window: tokens of a segment.
        step: tokens from one start to the next, at most `window`.
    """

    window: int
    step: int

    def __call__(self, document: Document, generator: np.random.Generator) -> tuple[str, str] | None:
        count = 1 + max(0, -(-(len(document) - self.window) // self.step))
        if count < 2:
            return None
        starts = self.step * generator.choice(count, 2, replace=False)
        first, second = (document.piece(int(s), min(int(s) + self.window, len(document))) for s in starts)
        return first, second

    def longest(self, tokens: int) -> int:
        return min(self.window, tokens)


def make_pairs(
    make: Positives, documents: Sequence[Document], generators: Sequence[np.random.Generator]
) -> list[list[str]]:
    """The anchors and the positives of documents that are long enough."""
    pairs = [make(document, generator) for document, generator in zip(documents, generators, strict=True)]
    assert None not in pairs, "documents that are too short are left out before training"
    return [[pair[side] for pair in pairs if pair is not None] for side in (0, 1)]


def longest_pairs(make: Positives, documents: Sequence[Document]) -> list[list[str]]:
    """For each document pieces that are as long as any that could be made of it, as anchors and as positives."""
    pieces = [document.piece(0, make.longest(len(document))) for document in documents]
    return [pieces, pieces]
