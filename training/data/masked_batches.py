"""Batches of masked pieces of documents: which pieces, and how they are masked, is a pure function of (seed, index)."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from common.errors import UserError
from common.files import atomic_folder
from modeling_longembed.encoding_longembed import special_tokens_around
from training.data.curriculum import Course
from training.data.masking import Masking
from training.data.next_sentence import Segment, draw_pair
from training.data.packing import PackedTexts, pack
from training.data.sources import Source
from training.models.identity import tokenizer_identity

IDS, STARTS_WORD, LENGTHS = "ids.int32", "starts_word.bool", "lengths.npy"


class TokenizedDocuments:
    """The documents of a source as token ids without special ones, memory-mapped; documents without tokens left out.

    Args:
        folder: where `tokenize_documents` has written them.
        name, weight: of the source.
    """

    def __init__(self, folder: Path, name: str, weight: float = 1.0) -> None:
        self.folder, self.name, self.weight = folder, name, weight
        self.lengths: np.ndarray = np.load(folder / LENGTHS)  # (documents,) tokens of each
        self.offsets = np.append(0, np.cumsum(self.lengths))
        self.ids = np.memmap(folder / IDS, np.int32, "r")
        self.starts_word = np.memmap(folder / STARTS_WORD, np.bool_, "r")

    def read(self, segment: Segment) -> tuple[np.ndarray, np.ndarray]:
        """Token ids `(n,)` int64 of a segment, and which of them start a word, `(n,)` bool."""
        start = self.offsets[segment.document]
        rows = slice(start + segment.start, start + segment.stop)
        return self.ids[rows].astype(np.int64), np.array(self.starts_word[rows])

    def token_counts(self, vocab_size: int) -> Tensor:
        """How often each token occurs, `(vocab_size,)` int64; special tokens are not in the documents."""
        counts = np.zeros(vocab_size, np.int64)
        for start in range(0, len(self.ids), 1 << 24):  # in portions: the whole file need not fit into memory
            counts += np.bincount(self.ids[start : start + (1 << 24)], minlength=vocab_size)
        return torch.from_numpy(counts)


def tokenize_documents(source: Source, tokenizer: PreTrainedTokenizerBase, folder: Path) -> TokenizedDocuments:
    """Tokenise a source once: what another run has written below `folder`, of the same texts and tokenizer, is read.

    Raises:
        UserError: the texts hold no tokens.
    """
    identity = json.dumps([source.rows._fingerprint, source.columns, tokenizer_identity(tokenizer)])
    path = folder / hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
    if not path.exists():
        with atomic_folder(path) as temporary:
            lengths: list[int] = []
            with open(temporary / IDS, "wb") as ids, open(temporary / STARTS_WORD, "wb") as starts:
                for start in tqdm(range(0, len(source.rows), 64), desc=f"tokenising {source.name}", leave=False):
                    (texts,) = source.texts(list(range(start, min(start + 64, len(source.rows)))))
                    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
                    for number, tokens in enumerate(encoded["input_ids"]):
                        if tokens:
                            lengths.append(len(tokens))
                            np.array(tokens, np.int32).tofile(ids)
                            word_starts(tokenizer, tokens, encoded.encodings, number).tofile(starts)
            if not lengths:
                raise UserError(f"{source.name}: its texts hold no token that the tokenizer knows; give other texts")
            np.save(temporary / LENGTHS, np.array(lengths))
    return TokenizedDocuments(path, source.name, source.weight)


def word_starts(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], encodings: Any = None, number: int = 0
) -> np.ndarray:
    """`(n,)` bool: which tokens start a word, by the tokenizer's own words, or by WordPiece's marks if it has none."""
    if encodings is None:
        words = tokenizer.convert_ids_to_tokens(list(tokens))
        return np.array([not word.startswith("##") for word in words], np.bool_)
    words = encodings[number].word_ids
    return np.array([place == 0 or word is None or word != words[place - 1] for place, word in enumerate(words)])


@dataclass(frozen=True)
class SpecialTokens:
    """What a tokenizer puts before and after a text."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "SpecialTokens":
        """Return the special tokens of a tokenizer."""
        before, after = special_tokens_around(tokenizer)
        return cls(tuple(before), tuple(after))

    def count(self, segments: int) -> int:
        """How many stand around and between the segments of a text."""
        return len(self.before) + segments * len(self.after)

    def frame(self, *segments: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`[CLS] A [SEP] B [SEP]` of segments, each ids and word starts: ids, word starts, and segment ids, `(n,)`."""
        ids, starts = [np.array(self.before, np.int64)], [np.ones(len(self.before), np.bool_)]
        segment_ids = [np.zeros(len(self.before), np.int64)]
        for number, (tokens, starts_word) in enumerate(segments):
            ids += [tokens, np.array(self.after, np.int64)]
            starts += [starts_word, np.ones(len(self.after), np.bool_)]
            segment_ids.append(np.full(len(tokens) + len(self.after), number))
        return np.concatenate(ids), np.concatenate(starts), np.concatenate(segment_ids)


@dataclass(frozen=True)
class MaskedText:
    """A piece of a document as the model reads it: ids, labels and segment ids, all `(n,)`; whether B follows A."""

    input_ids: np.ndarray
    labels: np.ndarray
    segment_ids: np.ndarray
    next_label: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)

    def cut(self, length: int) -> "MaskedText":
        """Its first tokens, at most `length` of them."""
        return MaskedText(self.input_ids[:length], self.labels[:length], self.segment_ids[:length], self.next_label)


@dataclass(frozen=True)
class PieceReader:
    """Pieces of documents to masked texts.

    Args:
        special: what stands around a piece.
        masking: how it is masked.
        next_sentence: a piece becomes a pair of segments.
    """

    special: SpecialTokens
    masking: Masking
    next_sentence: bool = False

    @property
    def special_tokens(self) -> int:
        """How many of the tokens of a text are special."""
        return self.special.count(2 if self.next_sentence else 1)

    @property
    def shortest(self) -> int:
        """Fewest tokens of a piece, special ones aside: a pair needs two."""
        return 2 if self.next_sentence else 1

    def __call__(
        self, documents: TokenizedDocuments, piece: Segment, mask_rate: float, generator: np.random.Generator
    ) -> MaskedText:
        """Read a piece, and mask it; all randomness comes from `generator`."""
        segments, next_label = [piece], 0
        if self.next_sentence:
            *segments, next_label = draw_pair(piece, documents.lengths, generator)
        ids, starts_word, segment_ids = self.special.frame(*map(documents.read, segments))
        input_ids, labels = self.masking(ids, starts_word, mask_rate, generator)
        return MaskedText(input_ids, labels, segment_ids, next_label)


class Pieces:
    """The consecutive pieces of all documents of a source: of the same length, a document's last one shorter.

    Args:
        documents: the source.
        length: of a text, in tokens, special ones included.
        reader: how pieces are read.
    """

    def __init__(self, documents: TokenizedDocuments, length: int, reader: PieceReader) -> None:
        self.documents = documents
        size = length - reader.special_tokens
        last = documents.lengths % size
        count = documents.lengths // size + (last >= reader.shortest)
        document = np.repeat(np.arange(len(count)), count)
        self.first_of_document = np.append(0, np.cumsum(count))
        start = (np.arange(len(document)) - self.first_of_document[document]) * size
        stop = np.minimum(start + size, documents.lengths[document])
        self.segments = np.stack([document, start, stop], axis=1)  # (pieces, 3)
        self.tokens = stop - start + reader.special_tokens  # (pieces,)
        self.total = int(self.tokens.sum())
        self._shuffles: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return len(self.segments)

    def segment(self, piece: int) -> Segment:
        """Where a piece is."""
        return Segment(*map(int, self.segments[piece]))

    def between(self, start: int, stop: int, *seed: int) -> Iterator[tuple[int, int]]:
        """The pieces, as (pass, piece), that begin at tokens `start` to `stop` of the endless stream of passes."""
        for number in range(start // self.total, -(-stop // self.total)):
            order, begins = self._shuffled(number, seed)
            low, high = np.searchsorted(begins, [start - number * self.total, stop - number * self.total])
            yield from ((number, int(piece)) for piece in order[low:high])

    def _shuffled(self, number: int, seed: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """The order of a pass, and where in it each piece begins, in tokens."""
        key = (*seed, number)
        if key not in self._shuffles:
            order = np.random.default_rng(key).permutation(len(self))
            self._shuffles = dict([*self._shuffles.items()][-1:])  # a stretch reaches from one pass into the next
            self._shuffles[key] = order, np.append(0, np.cumsum(self.tokens[order])[:-1])
        return self._shuffles[key]


@dataclass(frozen=True)
class MaskedChunk:
    """Packed masked texts.

    Args:
        texts: what the model reads.
        labels: `(1, T)`, -100 where nothing is predicted.
        token_type_ids: `(1, T)`, 1 in B.
        next_labels: `(n,)`, 0 where B follows A.
    """

    texts: PackedTexts
    labels: Tensor
    token_type_ids: Tensor
    next_labels: Tensor

    def to(self, device: torch.device) -> "MaskedChunk":
        names = ("labels", "token_type_ids", "next_labels")
        tensors = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return replace(self, texts=self.texts.to(device), **tensors)


def pack_masked(texts: Sequence[MaskedText], batch_tokens: int) -> list[MaskedChunk]:
    """Texts in their order, in chunks of at most `batch_tokens` tokens; a longer text is a chunk of its own."""
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
        predictions: tokens that are predicted, in all chunks together.
        length: of the longest text that there could be, in tokens.
        mask_rate: share of the tokens that was to be predicted.
    """

    chunks: list[MaskedChunk]
    predictions: int
    length: int
    mask_rate: float

    def to(self, device: torch.device) -> "MaskedBatch":
        return replace(self, chunks=[chunk.to(device) for chunk in self.chunks])

    def largest_chunk(self) -> PackedTexts:
        """The texts that take the most memory at once."""
        return max((chunk.texts for chunk in self.chunks), key=lambda texts: texts.input_ids.numel())

    def measures(self) -> dict[str, Tensor]:
        """What a run reports of its data, as scalars."""
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

    Every batch holds of each source the share that its weight and its tokens give it. A source's pieces form an endless
    stream of shuffled passes; a batch takes the pieces that begin in its stretch of the stream, whole: it holds
    `batch_size` tokens on average, and the stretches of all processes together are the one that a single process with
    all tokens would have. Where the course changes the length of the pieces, the next batch goes on at the same place
    of the stream of the new pieces. A piece is masked anew in every pass.
    """

    def __init__(
        self,
        sources: list[TokenizedDocuments],
        read: PieceReader,
        course: Course,
        *,
        batch_size: int,
        batch_tokens: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Args:
        batch_size: tokens of one process in a batch.
        batch_tokens: tokens of one packed chunk.

        Raises:
            UserError: a batch that the longest piece of all sources would not fill, a length without room for text, or
                a source whose documents cannot be paired.
        """
        self.sources, self.read, self.course, self.seed = sources, read, course, seed
        self.batch_size, self.batch_tokens, self.rank, self.world_size = batch_size, batch_tokens, rank, world_size
        for source in sources:
            if read.next_sentence and len(source.lengths) < 2:
                raise UserError(f"--next_sentence: {source.name} has one document, and half of the pairs need another")
        if min(course.lengths.lengths) < read.special_tokens + read.shortest:
            raise UserError(f"--sequence_length {min(course.lengths.lengths)}: leaves no room for text")
        self.pieces: dict[int, list[Pieces]] = {}
        self.shares: dict[int, list[Fraction]] = {}
        for length in set(course.lengths.lengths):
            pieces = [Pieces(source, length, read) for source in sources]
            for source, of_source in zip(sources, pieces, strict=True):
                if not len(of_source):
                    raise UserError(f"{source.name}: no document is long enough; give texts of at least two tokens")
            weighted = [Fraction(source.weight) * p.total for source, p in zip(sources, pieces, strict=True)]
            self.pieces[length], self.shares[length] = pieces, [part / sum(weighted) for part in weighted]
            # The stretch of the largest source is then as long as a piece, so that no process goes without.
            needed = -(-length // max(self.shares[length]))
            if batch_size < needed:
                raise UserError(
                    f"--per_device_train_tokens {batch_size}: a batch must hold a text of every process; give at least "
                    f"{needed}, or a shorter --sequence_length than {length}"
                )

    def __len__(self) -> int:
        return epoch_batches(self.sources, self.batch_size * self.world_size)

    def describe(self) -> dict[str, Any]:
        """All that the batches depend on, and a resumed run must agree in; the number of processes is not in it."""
        masking = self.read.masking
        return {
            "seed": self.seed,
            "tokens a batch": self.batch_size * self.world_size,
            "sources": [[s.name, s.weight, len(s.lengths), int(s.offsets[-1])] for s in self.sources],
            "masking": [masking.unit, masking.mask_share, masking.random_share],
            "next sentences": self.read.next_sentence,
        } | self.course.describe()

    def own_pieces(self, index: int) -> list[tuple[int, int, int]]:
        """The pieces of batch `index` of this process: number of the source, pass, number of the piece."""
        length, place = self.course.length(index), index * self.world_size + self.rank
        found = []
        for number, (pieces, share) in enumerate(zip(self.pieces[length], self.shares[length], strict=True)):
            # Exact fractions: the stretches of processes meet without a gap, whatever their number.
            start, stop = (int(n * self.batch_size * share) for n in (place, place + 1))
            found += [(number, *piece) for piece in pieces.between(start, stop, self.seed, number)]
        return found

    def __getitem__(self, index: int) -> MaskedBatch:
        length, rate = self.course.length(index), self.course.mask_rate(index)
        texts = []
        for number, epoch, piece in self.own_pieces(index):
            pieces = self.pieces[length][number]
            generator = np.random.default_rng((self.seed, number, length, epoch, piece))
            texts.append(self.read(pieces.documents, pieces.segment(piece), rate, generator))
        return mask_batch(texts, self.batch_tokens, length, rate)

    def heaviest(self) -> MaskedBatch:
        """What takes at least as much memory as any batch of the run: the longest piece of all, again and again, under
        the highest masking rate, in a full chunk, and in a second one beside the gradients of the first.
        """
        length, rate = max(self.course.lengths.lengths), max(self.course.mask_rates.first, self.course.mask_rates.last)
        pieces = max(self.pieces[length], key=lambda pieces: pieces.tokens.max())
        longest = pieces.segment(int(pieces.tokens.argmax()))
        text = self.read(pieces.documents, longest, rate, np.random.default_rng(self.seed))
        texts, most = [text], self.batch_size + length * len(self.sources)  # of each source a piece may reach beyond
        while (room := min(most, self.batch_tokens) - sum(map(len, texts))) > 0:
            texts.append(text.cut(room))
        chunks = 2 if most > self.batch_tokens else 1
        return mask_batch(texts * chunks, self.batch_tokens, length, rate)


def mask_batch(texts: Sequence[MaskedText], batch_tokens: int, length: int, mask_rate: float) -> MaskedBatch:
    """Masked texts to a batch."""
    predictions = sum(int((text.labels >= 0).sum()) for text in texts)
    return MaskedBatch(pack_masked(texts, batch_tokens), predictions, length, mask_rate)


def epoch_batches(sources: Sequence[TokenizedDocuments], batch_size: int) -> int:
    """Batches of `batch_size` tokens that go once through all documents, a source's weight times through its own."""
    return max(1, round(sum(source.weight * int(source.offsets[-1]) for source in sources) / batch_size))
