"""Segments of a text: the passages that are found and shown, as exact character offsets into the original text.

    tokens:288/64    windows of 288 tokens, each 64 further than the one before
    late:254         the late chunks of `encode(..., late_chunk_tokens=254)`: 254 tokens, from one reading of the text
    sentences:288    whole sentences, as many as have at most 288 tokens together
    document         the whole text

No character is lost: the first segment begins with the text, the last ends with it, and none begins behind the end of
the one before. Without overlapping windows the segments are the text cut into pieces. Only a character that a tokenizer
divides into several tokens, such as an emoji, may be in two of them.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.errors import UserError
from common.sentences import SENTENCE_END

Span = tuple[int, int]
_SPEC = re.compile(
    r"(?:tokens:(?P<window>\d+)(?:/(?P<stride>\d+))?|late:(?P<late>\d+)|sentences:(?P<sentences>\d+)|document)"
)


@dataclass(frozen=True)
class Reading:
    """A part of a text that the model reads at once, which is all of it unless it is longer than the context.

    Args:
        start: the character of the text with which it begins.
        end: the character behind its last one.
        ids: `(n,)`, the ids of its tokens, with the special tokens around them and the prompt.
        offsets: `(n, 2)`, the characters of the text at which each token starts and ends. They are in order; special
            tokens and the prompt have none: they start and end at the same character.
        is_text: `(n,)`, whether a token is one of the text.
    """

    start: int
    end: int
    ids: np.ndarray
    offsets: np.ndarray
    is_text: np.ndarray


class Segmenter:
    """Cut texts into segments.

    Args:
        spec: `tokens:SIZE/STRIDE` (without `/STRIDE`: windows that do not overlap), `late:SIZE`, `sentences:SIZE` or
            `document`.
        tokenizer: a fast one, that of the model.
        context: the most tokens that the model reads at once, with special tokens and prompt. A longer text is read
            in several parts, so that no end of it is lost. None: there is no limit.
        prompt: what the model reads in front of each part.

    Raises:
        UserError: the spec is none of these, its windows would leave tokens out, the tokenizer does not know the
            offsets of its tokens, or the prompt fills the context.
    """

    def __init__(self, spec: str, tokenizer: Any, *, context: int | None = None, prompt: str = ""):
        match = _SPEC.fullmatch(spec)
        sizes = {name: int(size) for name, size in match.groupdict().items() if size} if match else {}
        if match is None or 0 in sizes.values():
            raise UserError(f"segments {spec!r}: choose from tokens:288/64, late:254, sentences:288 and document")
        if sizes.get("stride", 0) > sizes.get("window", 0):
            raise UserError(f"segments {spec!r}: windows would leave tokens out; give a stride of at most their size")
        if not getattr(tokenizer, "is_fast", False):
            raise UserError("segments need a fast tokenizer; save the model with its tokenizer.json")
        self.spec, self.sizes = spec, sizes
        self._tokenizer, self._prompt = tokenizer, prompt
        self._context = context
        # The tokens of a text that the model reads at once.
        self._limit = None if context is None else context - len(self._encode("").ids)
        if self._limit is not None and self._limit < 1:
            raise UserError(f"the prompt {prompt[:40]!r} fills the context of {context} tokens; give a shorter one")

    def __call__(self, text: str, readings: Sequence[Reading] | None = None) -> list[Span]:
        """Return where the segments of a text start and end.

        Those of `late:SIZE` are the passages that the model makes of each `Reading`, one by one. A passage of special
        tokens alone, which may come last, starts and ends at the same character; all others have characters unless the
        text has none.

        Args:
            text: any string.
            readings: what `read` has returned for it; None: it is read here where that is needed.
        """
        if self.spec == "document":
            return [(0, len(text))]
        if size := self.sizes.get("late"):
            readings = self.read(text) if readings is None else readings
            return [span for reading in readings for span in _late_chunks(reading, size)]
        starts, ends = _in_order(self._encode(text, whole=False).offsets)
        if size := self.sizes.get("window"):
            stride = self.sizes.get("stride", size)
            count = max(1, -(-(len(starts) - size) // stride) + 1)
            windows = [(stride * number, min(stride * number + size, len(starts))) for number in range(count)]
        else:
            windows = _groups(text, starts, self.sizes["sentences"])
        return _spans(windows, starts, ends, 0, len(text))

    def read(self, text: str) -> list[Reading]:
        """Return the parts of a text that the model reads at once, in order; together they are the text.

        Args:
            text: any string.
        """
        if self._context is None or self._limit is None:
            return [self._reading(text, 0, len(text))]
        starts, _ = _in_order(self._encode(text, whole=False).offsets)
        readings: list[Reading] = []
        start = first = 0
        while not readings or start < len(text):
            stop = first + self._limit
            while True:
                end = len(text) if stop >= len(starts) else _word_start(text, starts, first, stop)
                reading = self._reading(text, start, end)
                excess = len(reading.ids) - self._context
                # A part may have a few tokens more than it has within the text, such as where a word is cut in two.
                if excess <= 0 or stop <= first + 1:
                    break
                stop = max(first + 1, min(stop, len(starts)) - excess)
            readings.append(reading)
            start, first = end, int(np.searchsorted(starts, end))
        return readings

    def _encode(self, text: str, whole: bool = True) -> Any:
        """Return the tokens of a text; with `whole` also the special ones and the prompt."""
        if whole:
            text = self._prompt + text
        return self._tokenizer(text, add_special_tokens=whole, truncation=False, verbose=False).encodings[0]

    def _reading(self, text: str, start: int, end: int) -> Reading:
        encoding = self._encode(text[start:end])
        offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2) - len(self._prompt)
        is_text = np.array([sequence is not None for sequence in encoding.sequence_ids], np.bool_)
        if self._prompt:
            is_text &= offsets[:, 1] > 0
        starts, ends = _in_order(np.where(is_text[:, None], offsets.clip(0), 0) + start)
        offsets = np.stack([starts, np.where(is_text, ends, starts)], axis=1)
        return Reading(start, end, np.array(encoding.ids), offsets, is_text)


def _in_order(offsets: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return where tokens start and end, `(n,)` each, neither ever smaller than for the token before."""
    starts, ends = np.maximum.accumulate(np.array(offsets, np.int64).reshape(-1, 2)).T
    return starts, ends


def _word_start(text: str, starts: np.ndarray, first: int, stop: int) -> int:
    """Return the character at which to cut in front of token `stop`, or of one before it where a word begins."""
    for token in range(stop, stop - (stop - first) // 8, -1):
        place = int(starts[token])
        if place > starts[first] and (text[place].isspace() or text[place - 1].isspace()):
            return place
    # The tokens of one character start together, and at least one character has to be in front of the cut.
    after = int(np.searchsorted(starts, starts[first], side="right"))
    return int(starts[max(stop, after)]) if after < len(starts) else len(text)


def _late_chunks(reading: Reading, size: int) -> list[Span]:
    """Return the spans of the chunks of `size` tokens, special ones and the prompt included."""
    places = np.flatnonzero(reading.is_text)
    starts, ends = reading.offsets[places].T
    bounds = np.searchsorted(places, np.arange(0, len(reading.ids) + size, size))
    windows = list(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True))
    if not len(places):
        return [(reading.start, reading.end), *[(reading.end, reading.end)] * (len(windows) - 1)]
    return _spans(windows, starts, ends, reading.start, reading.end)


def _groups(text: str, starts: np.ndarray, size: int) -> list[Span]:
    """Return windows of tokens: sentences while they have at most `size` tokens together, and parts of longer ones."""
    bounds = [0, *(match.end() for match in SENTENCE_END.finditer(text)), len(text)]
    windows: list[Span] = []
    begin = end = 0
    for stop in np.unique(np.searchsorted(starts, bounds[1:])).tolist():
        if stop - begin > size and begin < end:
            windows.append((begin, end))
            begin = end
        while stop - begin > size:
            windows.append((begin, begin + size))
            begin += size
        end = stop
    return [*windows, (begin, end)] if begin < end or not windows else windows


def _spans(windows: list[Span], starts: np.ndarray, ends: np.ndarray, first: int, last: int) -> list[Span]:
    """Return the characters of windows of tokens, with what is between one window and the next.

    Args:
        windows: the first token of each, and the one behind its last; empty ones at the beginning or the end only.
        starts: `(n,)`, the characters at which the tokens start.
        ends: `(n,)`, those behind them.
        first: the character with which the text begins.
        last: the one behind its end.
    """
    spans = []
    for begin, end in windows:
        if begin == end:
            edge = first if not begin and len(starts) else last
            spans.append((first, last) if not len(starts) else (edge, edge))
            continue
        left = first if begin == 0 else int(starts[begin])
        spans.append((left, last if end == len(starts) else max(int(ends[end - 1]), int(starts[end]))))
    return spans
