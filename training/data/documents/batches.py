"""Batches of masked sequences; which sequences, and how they are masked, is a pure function of (seed, index)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from common.errors import UserError
from training.data.documents.curriculum import Curriculum
from training.data.documents.sequences import MaskedText, SequenceReader, Sequences
from training.data.documents.token_store import TokenizedDocuments
from training.data.packing import PackedTexts, pack


@dataclass(frozen=True)
class MaskedChunk:
    """Packed masked texts.

    Args:
        texts: what the model reads.
        labels: `(1, T)`, the original id where a token is predicted, -100 elsewhere.
        token_type_ids: `(1, T)`, 1 in B.
        next_labels: `(n,)`, 0 where B follows A.
    """

    texts: PackedTexts
    labels: Tensor
    token_type_ids: Tensor
    next_labels: Tensor

    def to(self, device: torch.device) -> "MaskedChunk":
        """Return a copy on a device."""
        names = ("labels", "token_type_ids", "next_labels")
        tensors = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return replace(self, texts=self.texts.to(device), **tensors)


def pack_masked(texts: Sequence[MaskedText], batch_tokens: int) -> list[MaskedChunk]:
    """Pack masked texts into chunks, in their order.

    Args:
        texts: at least one.
        batch_tokens: most tokens of a chunk; a longer text is a chunk of its own.

    Returns:
        The chunks.
    """
    packed = pack([text.input_ids for text in texts], batch_tokens)
    tokens = [chunk.input_ids.shape[1] for chunk in packed]
    counts = [len(chunk.cu_seq_lens_q) - 1 for chunk in packed]
    labels, types = (
        torch.from_numpy(np.concatenate([getattr(text, name) for text in texts]))[None].split(tokens, dim=1)
        for name in ("labels", "segment_ids")
    )
    next_labels = torch.tensor([text.next_label for text in texts]).split(counts)
    return [MaskedChunk(*parts) for parts in zip(packed, labels, types, next_labels, strict=True)]


@dataclass(frozen=True)
class MaskedBatch:
    """One process's share of a batch.

    Args:
        chunks: the texts, packed.
        predictions: number of tokens that are predicted, in all chunks together.
        length: the sequence length, in tokens.
        mask_rate: the fraction of the tokens that was to be predicted.
    """

    chunks: list[MaskedChunk]
    predictions: int
    length: int
    mask_rate: float

    def to(self, device: torch.device) -> "MaskedBatch":
        """Return a copy on a device."""
        return replace(self, chunks=[chunk.to(device) for chunk in self.chunks])

    def largest_chunk(self) -> PackedTexts:
        """Return the texts of the chunk that takes the most memory."""
        return max((chunk.texts for chunk in self.chunks), key=lambda texts: texts.input_ids.numel())

    def measures(self) -> dict[str, Tensor]:
        """Return what a run logs about its data, as float64 scalars."""
        values = {
            "token_count": sum(chunk.labels.numel() for chunk in self.chunks),
            "prediction_count": self.predictions,
            "text_count": sum(len(chunk.next_labels) for chunk in self.chunks),
            "sequence_length": self.length,
            "mask_rate": self.mask_rate,
        }
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


class MaskedBatches(Dataset):
    """Batch number `index` of an endless run, for one process; `len` is the number of batches in an epoch.

    Every batch has of each source the share that its weight and its tokens give it. The sequences of a source form an
    endless stream of shuffled epochs. A batch owns a range of this stream, and takes the sequences that begin in it,
    whole: it has `batch_size` tokens on average, and the ranges of all processes together are the one that a single
    process with all tokens would have. Where the curriculum changes the sequence length, the next batch continues at
    the same place of the stream of the new sequences. A sequence is masked anew in every epoch.

    Args:
        sources: the documents.
        read: reads and masks a sequence.
        curriculum: sequence length and masking rate of each step.
        batch_size: tokens per batch and process.
        batch_tokens: tokens of a packed chunk.
        seed: random seed.
        rank: number of this process.
        world_size: number of processes.

    Raises:
        UserError: the longest sequence of all sources would not fill a batch, a length leaves no room for text, or the
            documents of a source cannot be paired.
    """

    def __init__(
        self,
        sources: list[TokenizedDocuments],
        read: SequenceReader,
        curriculum: Curriculum,
        *,
        batch_size: int,
        batch_tokens: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.sources, self.read, self.curriculum, self.seed = sources, read, curriculum, seed
        self.batch_size, self.batch_tokens, self.rank, self.world_size = batch_size, batch_tokens, rank, world_size
        for source in sources:
            if read.next_sentence and len(source.lengths) < 2:
                raise UserError(f"--next_sentence: {source.name} has one document, and half of the pairs need another")
        lengths = curriculum.lengths.lengths
        if min(lengths) < read.special_tokens + read.shortest:
            raise UserError(f"--sequence_length {min(lengths)}: leaves no room for text")
        self.sequences: dict[int, list[Sequences]] = {}
        self.shares: dict[int, list[Fraction]] = {}
        for length in set(lengths):
            self.sequences[length] = [Sequences(source, length, read) for source in sources]
            for source, sequences in zip(sources, self.sequences[length], strict=True):
                if not len(sequences):
                    raise UserError(f"{source.name}: no document is long enough; give texts of at least two tokens")
            tokens = [
                Fraction(source.weight) * sequences.total
                for source, sequences in zip(sources, self.sequences[length], strict=True)
            ]
            self.shares[length] = [part / sum(tokens) for part in tokens]
            # The range of the largest source is then as long as a sequence, so that every process has at least one.
            needed = -(-length // max(self.shares[length]))
            if batch_size < needed:
                raise UserError(
                    f"--per_device_train_tokens {batch_size}: a batch must hold a text of every process; give at least "
                    f"{needed}, or a shorter --sequence_length than {length}"
                )

    def __len__(self) -> int:
        return epoch_batches(self.sources, self.batch_size * self.world_size)

    def describe(self) -> dict[str, Any]:
        """Return what options stand for, by option: the content of the data, and the batch of all processes."""
        return {
            "train_data": [f"{source.content()} and weight {source.weight:g}" for source in self.sources],
            "per_device_train_tokens": f"{self.batch_size * self.world_size} over all processes",
        }

    def own_sequences(self, index: int) -> list[tuple[int, int, int]]:
        """Return the sequences of batch `index` of this process.

        Args:
            index: number of the batch.

        Returns:
            Of each the number of its source, the epoch of that source, and its number in the source.
        """
        length, place = self.curriculum.length(index), index * self.world_size + self.rank
        found = []
        for number, (sequences, share) in enumerate(zip(self.sequences[length], self.shares[length], strict=True)):
            # Exact fractions: the ranges of the processes are adjacent without a gap, whatever their number.
            start, stop = (int(n * self.batch_size * share) for n in (place, place + 1))
            found += [(number, *sequence) for sequence in sequences.between(start, stop, self.seed, number)]
        return found

    def __getitem__(self, index: int) -> MaskedBatch:
        length, rate = self.curriculum.length(index), self.curriculum.mask_rate(index)
        texts = []
        for source, epoch, number in self.own_sequences(index):
            sequences = self.sequences[length][source]
            generator = np.random.default_rng((self.seed, source, length, epoch, number))
            texts.append(self.read(sequences.documents, sequences.segment(number), rate, generator))
        return mask_batch(texts, self.batch_tokens, length, rate)

    def heaviest(self) -> MaskedBatch:
        """Return a batch that takes at least as much memory as any batch of the run.

        It repeats the longest sequence of all, under the highest masking rate, until a chunk is full. If a batch has
        several chunks there is a second one, which is computed beside the gradients of the first.
        """
        rates = self.curriculum.mask_rates
        length, rate = max(self.curriculum.lengths.lengths), max(rates.first, rates.last)
        sequences = max(self.sequences[length], key=lambda sequences: sequences.tokens.max())
        longest = sequences.segment(int(sequences.tokens.argmax()))
        text = self.read(sequences.documents, longest, rate, np.random.default_rng(self.seed))
        # A sequence of each source may reach beyond the range of the batch.
        texts, most = [text], self.batch_size + length * len(self.sources)
        while (room := min(most, self.batch_tokens) - sum(map(len, texts))) > 0:
            texts.append(text.cut(room))
        chunks = 2 if most > self.batch_tokens else 1
        return mask_batch(texts * chunks, self.batch_tokens, length, rate)


def mask_batch(texts: Sequence[MaskedText], batch_tokens: int, length: int, mask_rate: float) -> MaskedBatch:
    """Collate masked texts.

    Args:
        texts: at least one.
        batch_tokens: tokens of a packed chunk.
        length: the sequence length, in tokens.
        mask_rate: the fraction of the tokens that was to be predicted.

    Returns:
        The batch.
    """
    predictions = sum(int((text.labels >= 0).sum()) for text in texts)
    return MaskedBatch(pack_masked(texts, batch_tokens), predictions, length, mask_rate)


def epoch_batches(sources: Sequence[TokenizedDocuments], batch_size: int) -> int:
    """Count the batches of `batch_size` tokens in an epoch, which goes through each source as often as its weight."""
    return max(1, round(sum(source.weight * source.total for source in sources) / batch_size))
