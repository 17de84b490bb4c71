"""Sequences: the spans that documents are split into for masked-language modelling, and how the model reads one."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from modeling_longembed.encoding_tokens_longembed import special_tokens_around
from training.data.documents.masking import Masking
from training.data.documents.next_sentence import Segment, draw_pair
from training.data.documents.token_store import TokenizedDocuments


@dataclass(frozen=True)
class SpecialTokens:
    """The ids of the special tokens that a tokenizer puts before and after a text."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "SpecialTokens":
        """Return the special tokens of a tokenizer."""
        before, after = special_tokens_around(tokenizer)
        return cls(tuple(before), tuple(after))

    def count(self, segments: int) -> int:
        """Count the special tokens of a text of so many segments."""
        return len(self.before) + segments * len(self.after)

    def frame(self, *segments: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Put special tokens around segments: `[CLS] A [SEP] B [SEP]`.

        Args:
            segments: of each its token ids, `(m,)` int64, and which of them start a word, `(m,)` bool.

        Returns:
            Token ids, word starts and segment ids (0 in A, 1 in B) of the whole text, each `(n,)`.
        """
        ids, starts = [np.array(self.before, np.int64)], [np.ones(len(self.before), np.bool_)]
        segment_ids = [np.zeros(len(self.before), np.int64)]
        for number, (tokens, starts_word) in enumerate(segments):
            ids += [tokens, np.array(self.after, np.int64)]
            starts += [starts_word, np.ones(len(self.after), np.bool_)]
            segment_ids.append(np.full(len(tokens) + len(self.after), number))
        return np.concatenate(ids), np.concatenate(starts), np.concatenate(segment_ids)


@dataclass(frozen=True)
class MaskedText:
    """A sequence as the model reads it.

    Args:
        input_ids: `(n,)`, masked.
        labels: `(n,)`, the original id where a token is predicted, -100 elsewhere.
        segment_ids: `(n,)`, 0 in A, 1 in B.
        next_label: 0 if B follows A in its document, 1 if it is from another one.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    segment_ids: np.ndarray
    next_label: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)

    def cut(self, length: int) -> "MaskedText":
        """Return the first tokens, at most `length` of them."""
        return MaskedText(self.input_ids[:length], self.labels[:length], self.segment_ids[:length], self.next_label)


@dataclass(frozen=True)
class SequenceReader:
    """Reads sequences of documents as masked texts.

    Args:
        special: special tokens around a sequence.
        masking: chooses the tokens to predict.
        next_sentence: turn each sequence into a pair of segments.
    """

    special: SpecialTokens
    masking: Masking
    next_sentence: bool = False

    @property
    def special_tokens(self) -> int:
        """The number of special tokens in a text."""
        return self.special.count(2 if self.next_sentence else 1)

    @property
    def shortest(self) -> int:
        """The fewest tokens of a sequence without its special tokens: a pair needs two."""
        return 2 if self.next_sentence else 1

    def __call__(
        self, documents: TokenizedDocuments, sequence: Segment, mask_rate: float, generator: np.random.Generator
    ) -> MaskedText:
        """Read and mask a sequence.

        Args:
            documents: the source.
            sequence: where the sequence is.
            mask_rate: fraction of the tokens to predict.
            generator: source of all randomness.

        Returns:
            The text with its special tokens.
        """
        segments, next_label = [sequence], 0
        if self.next_sentence:
            *segments, next_label = draw_pair(sequence, documents.lengths, generator)
        ids, starts_word, segment_ids = self.special.frame(*map(documents.read, segments))
        input_ids, labels = self.masking(ids, starts_word, mask_rate, generator)
        return MaskedText(input_ids, labels, segment_ids, next_label)


class Sequences:
    """The consecutive sequences of all documents of a source. They have the same length; a document's last is shorter.

    Args:
        documents: the source.
        length: tokens of a sequence, with its special tokens.
        reader: reads the sequences.
    """

    def __init__(self, documents: TokenizedDocuments, length: int, reader: SequenceReader) -> None:
        self.documents = documents
        size = length - reader.special_tokens
        last = documents.lengths % size
        count = documents.lengths // size + (last >= reader.shortest)
        document = np.repeat(np.arange(len(count)), count)
        first_of_document = np.append(0, np.cumsum(count))
        start = (np.arange(len(document)) - first_of_document[document]) * size
        stop = np.minimum(start + size, documents.lengths[document])
        self.segments = np.stack([document, start, stop], axis=1)  # (sequences, 3)
        self.tokens = stop - start + reader.special_tokens  # (sequences,)
        self.total = int(self.tokens.sum())
        self._shuffles: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return len(self.segments)

    def segment(self, number: int) -> Segment:
        """Return where sequence `number` is."""
        return Segment(*map(int, self.segments[number]))

    def between(self, start: int, stop: int, *seed: int) -> Iterator[tuple[int, int]]:
        """Find the sequences in a range of the endless stream of shuffled epochs.

        Args:
            start, stop: the range, in tokens of the stream.
            seed: random seed of the shuffles.

        Yields:
            The epoch and the number of each sequence whose first token is in the range.
        """
        for epoch in range(start // self.total, -(-stop // self.total)):
            order, begins = self._shuffled(epoch, seed)
            low, high = np.searchsorted(begins, [start - epoch * self.total, stop - epoch * self.total])
            yield from ((epoch, int(number)) for number in order[low:high])

    def _shuffled(self, epoch: int, seed: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Return the order of the sequences in an epoch, and at which of its tokens each begins."""
        key = (*seed, epoch)
        if key not in self._shuffles:
            order = np.random.default_rng(key).permutation(len(self))
            # Two are kept, because a range may reach from one epoch into the next.
            self._shuffles = dict([*self._shuffles.items()][-1:])
            self._shuffles[key] = order, np.append(0, np.cumsum(self.tokens[order])[:-1])
        return self._shuffles[key]
