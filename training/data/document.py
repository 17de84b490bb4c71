"""A document with its tokens, and the interface of what makes a pair from one."""

import re
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
