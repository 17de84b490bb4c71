"""From arguments to sources of pairs: which columns are read, what pairs are made of, what is left out, what weighs."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from common.errors import UserError
from training.data.pair_batches import PairTokenizer
from training.data.pair_makers import Crops, Document, InverseCloze, Neighbours, Positives, Segments
from training.data.sources import TOKENS, Columns, Source, read_sources
from training.data.streams import Stream, open_streams
from training.models.identity import tokenizer_identity

REALM_WINDOW = 288  # tokens of a segment, as in REALM and ORQA
LABELS = {"entailment": "entailment", "0": "entailment", "contradiction": "contradiction", "2": "contradiction"}
PASSED_OVER = ("neutral", "1", "-", "-1")

Say = Callable[[str], None]


@dataclass(kw_only=True)
class PairArguments:
    """What a pair is."""

    pairs: Literal["columns", "nli", "twins", "crops", "inverse_cloze", "neighbours", "segments"] = field(
        default="columns",
        metadata={
            "help": "columns: labelled pairs. nli: premise, entailment and contradiction, from columns premise, "
            "hypothesis and label. Or made from the documents of --text_column: twins: a text and itself; crops: two "
            "stretches; inverse_cloze: a sentence and the passage around it; neighbours: two stretches side by side; "
            "segments: two windows"
        },
    )
    anchor_column: str = field(default="anchor", metadata={"help": "what asks: a question, a title, an abstract"})
    positive_column: str = field(default="positive", metadata={"help": "the document that answers"})
    text_column: str = field(default="text", metadata={"help": "documents that pairs are made of"})
    pair_window: int | None = field(
        default=None,
        metadata={
            "help": "tokens of the stretch of a document in which crops lie, of the passage of inverse_cloze, and of "
            "each neighbour or segment; as many as the model is given if left out, 288 for segments"
        },
    )
    crop_ratio: list[float] = field(
        default_factory=lambda: [0.25, 0.5],
        metadata={"help": "least and largest share of the window that a crop takes (Contriever: 0.05 0.5 of 256)"},
    )
    word_deletion: float = field(default=0.1, metadata={"help": "share of the words that is left out of a crop"})
    sentence_removal: float = field(
        default=0.9, metadata={"help": "share of the pairs of inverse_cloze whose passage is without the sentence"}
    )
    segment_step: int = field(default=64, metadata={"help": "tokens from the start of a segment to that of the next"})
    mixing_temperature: float = field(
        default=1.0,
        metadata={
            "help": "a source's share of an epoch grows with its size to the power of 1 / this, times its weight"
        },
    )

    streaming: bool = field(
        default=False,
        metadata={
            "help": "read the data as it comes, without a copy on disk and without a look at all of it first; weights "
            "are then shares of the batches, and the run's length is --max_steps"
        },
    )
    shuffle_buffer: int = field(default=2048, metadata={"help": "rows of a stream that are shuffled together"})

    def __post_init__(self) -> None:
        least, largest = (*self.crop_ratio, 0.0, 0.0)[:2]
        if len(self.crop_ratio) != 2 or not 0 < least <= largest <= 1:
            raise UserError("--crop_ratio: must be two numbers, 0 < least <= largest <= 1")
        if not 0 <= self.word_deletion < 1:
            raise UserError(f"--word_deletion {self.word_deletion}: must be at least 0 and less than 1")
        if not 0 <= self.sentence_removal <= 1:
            raise UserError(f"--sentence_removal {self.sentence_removal}: must be from 0 to 1")
        if self.pair_window is not None and self.pair_window < 2:
            raise UserError(f"--pair_window {self.pair_window}: must be at least 2")
        if self.pairs == "segments" and not 1 <= self.segment_step <= (self.pair_window or REALM_WINDOW):
            raise UserError(f"--segment_step {self.segment_step}: must be from 1 to --pair_window")
        if self.mixing_temperature <= 0:
            raise UserError(f"--mixing_temperature {self.mixing_temperature}: must be more than 0")
        if self.shuffle_buffer < 1:
            raise UserError(f"--shuffle_buffer {self.shuffle_buffer}: must be at least 1")
        if self.streaming and self.pairs == "nli":
            raise UserError("--streaming: --pairs nli has to see all rows of a premise; leave out one of them")
        if self.streaming and self.mixing_temperature != 1:
            raise UserError("--streaming: the sizes for --mixing_temperature are not known; give weights, as path:2")

    def columns(self, wanted: Columns) -> Columns:
        """The columns of the data to read, if the objective wants these of the pairs."""
        if self.pairs == "columns":
            return self.renamed(wanted)
        if self.pairs == "nli":
            return Columns(("premise", "hypothesis"), None, "rows", (*wanted.classes, "label"))
        required = (self.text_column,) * (2 if self.pairs == "twins" else 1)
        return Columns(required, None, "documents", wanted.classes)

    def renamed(self, wanted: Columns) -> Columns:
        """The columns of labelled pairs, as the user calls them."""
        names = {"anchor": self.anchor_column, "positive": self.positive_column}
        return replace(wanted, required=tuple(names.get(column, column) for column in wanted.required))

    def way(self, tokenize: PairTokenizer) -> Positives | None:
        """How pairs are made of documents; None if they are not."""
        room = tokenize.room()
        window = self.pair_window or room
        least, largest = self.crop_ratio
        ways: dict[str, Positives] = {
            "crops": Crops(window, (least, largest), self.word_deletion),
            "inverse_cloze": InverseCloze(window, self.sentence_removal),
            "neighbours": Neighbours(window),
            "segments": Segments(self.pair_window or min(REALM_WINDOW, room), self.segment_step),
        }
        return ways.get(self.pairs)


def read_pairs(
    specifications: list[str], arguments: PairArguments, wanted: Columns, tokenize: PairTokenizer, say: Say
) -> list[Source]:
    """Training data as sources of pairs.

    Args:
        specifications: of `read_sources`.
        arguments: what a pair is.
        wanted: the columns of pairs that the objective reads.
        tokenize: the model's.
        say: told of what is left out or looks like a mistake, a line each.

    Raises:
        UserError: what cannot be read, or a source of which nothing is left.
    """
    sources = read_sources(specifications, arguments.columns(wanted))
    if arguments.pairs == "nli":
        sources = [triplets(source, say) for source in sources]
    elif arguments.pairs == "twins":
        sources = [replace(source, anchor_kind="document") for source in sources]
    make = arguments.way(tokenize)
    if make is not None:
        sources = [tokenised(source, tokenize.tokenizer) for source in sources]
    sources = [distinct(source, say) for source in sources]
    if make is not None:
        sources = [long_enough(source, make, tokenize.tokenizer, say) for source in sources]
    return mixed(sources, arguments.mixing_temperature)


def stream_pairs(
    specifications: list[str], arguments: PairArguments, wanted: Columns, tokenize: PairTokenizer
) -> list[Stream]:
    """The same as streams; what is too short is passed over as it comes."""
    make, anchor_kind = arguments.way(tokenize), "document" if arguments.pairs == "twins" else "query"
    streams = open_streams(specifications, arguments.columns(wanted))
    return [replace(stream, make=make, anchor_kind=anchor_kind) for stream in streams]


def triplets(source: Source, say: Say) -> Source:
    """Labelled premises and hypotheses as (premise, entailment, contradiction), as supervised SimCSE trains on.

    A premise of several of both has as many triplets as it has of what it has more of.
    """
    groups: dict[str, dict[str, list[str]]] = {}
    for start in range(0, len(source.rows), 1000):
        rows = list(range(start, min(start + 1000, len(source.rows))))
        premises, hypotheses = source.texts(rows)
        for row, premise, hypothesis, label in zip(
            rows, premises, hypotheses, source.classes_of(rows)["label"], strict=True
        ):
            name = LABELS.get(label.lower())
            if name is None and label.lower() not in PASSED_OVER:
                raise UserError(
                    f"{source.name}, row {row + 1}: label is {label}; it must be entailment, neutral or contradiction, "
                    "or 0, 1 or 2, or -1 for none"
                )
            if name is not None:
                groups.setdefault(premise, {}).setdefault(name, []).append(hypothesis)
    if len(source.classes) > 1:
        raise UserError("--pairs nli: its rows have no other class than their label; use another --objective")
    whole = {premise: group for premise, group in groups.items() if len(group) == 2}
    if not whole:
        raise UserError(f"{source.name}: no premise has both an entailment and a contradiction")
    if left_out := len(groups) - len(whole):
        say(f"{source.name}: {left_out} of {len(groups)} premises lack an entailment or a contradiction: left out")
    triples = []
    for premise, group in whole.items():
        positives, negatives = group["entailment"], group["contradiction"]
        for n in range(max(len(positives), len(negatives))):
            triples.append((premise, positives[n % len(positives)], negatives[n % len(negatives)]))
    columns = ("anchor", "positive", "negative")
    rows = datasets.Dataset.from_dict(dict(zip(columns, map(list, zip(*triples, strict=True)), strict=True)))
    return replace(source, rows=rows, columns=columns, classes=())


def distinct(source: Source, say: Say) -> Source:
    """The source without rows that repeat another one whole; what looks like a mistake is told."""
    columns = list(dict.fromkeys((*source.columns, *source.classes)))
    ids = source.text_ids(columns)
    kept = np.sort(np.unique(ids, axis=0, return_index=True)[1])
    if repeated := len(ids) - len(kept):
        say(f"{source.name}: {repeated} of {len(ids)} rows repeat another row whole: left out")
    same = int((ids[kept, 0] == ids[kept, 1]).sum()) if len(set(source.columns)) > 1 else 0
    if same:
        say(
            f"{source.name}: in {same} of {len(kept)} rows {columns[0]} and {columns[1]} are the same text: from these "
            "a model learns nothing"
        )
    return source.select(kept)


def tokenised(source: Source, tokenizer: PreTrainedTokenizerBase) -> Source:
    """The source with the columns `TOKENS`: documents are tokenised once, and what comes of it is cached on disk."""
    column = source.columns[0]

    def places(texts: list[str]) -> dict[str, list[np.ndarray]]:
        documents = [Document.read(text, tokenizer) for text in texts]
        found = [(*document.spans.T, document.words) for document in documents]
        return dict(zip(TOKENS, map(list, zip(*found, strict=True)), strict=True))

    tokens = source.rows.select_columns(column).map(
        places,
        input_columns=column,
        remove_columns=column,
        batched=True,
        batch_size=64,
        features=datasets.Features(dict.fromkeys(TOKENS, datasets.List(datasets.Value("int32")))),
        new_fingerprint=_fingerprint(source.rows._fingerprint, column, tokenizer_identity(tokenizer)),
        desc=f"tokenising {source.name}",
    )
    return replace(source, rows=datasets.concatenate_datasets([source.rows, tokens], axis=1))


def long_enough(source: Source, make: Positives, tokenizer: PreTrainedTokenizerBase, say: Say) -> Source:
    """The source, whose documents become pairs, without those that are too short for one.

    Raises:
        UserError: none is left.
    """

    def can_pair(rows: list[int]) -> list[bool]:
        return [make(document, np.random.default_rng(0)) is not None for document in source.documents(rows, tokenizer)]

    rows = source.rows.filter(
        lambda _, rows: can_pair(rows),
        input_columns=source.columns[0],
        with_indices=True,
        batched=True,
        batch_size=64,
        new_fingerprint=_fingerprint(source.rows._fingerprint, str(make)),
        desc=f"looking through {source.name}",
    )
    if not len(rows):
        raise UserError(f"{source.name}: no document is long enough for two pieces; give longer ones, or other --pairs")
    if left_out := len(source.rows) - len(rows):
        say(f"{source.name}: {left_out} of {len(source.rows)} documents are too short for two pieces: left out")
    return replace(source, rows=rows, make=make)


def _fingerprint(*parts: str) -> str:
    """Under which datasets caches what is made of a dataset: its own hash of a tokenizer changes from run to run."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def mixed(sources: list[Source], temperature: float) -> list[Source]:
    """Sources whose shares of an epoch are proportional to weight * rows ** (1 / temperature).

    The epoch is as long as before. (Conneau et al. 2020, arXiv:1911.02116, section 3.1, with alpha = 1 / temperature.)
    """
    if temperature == 1:
        return sources
    sizes = np.array([len(source.rows) for source in sources], np.float64)
    weights = np.array([source.weight for source in sources])
    shares = weights * sizes ** (1 / temperature)
    shares *= (weights * sizes).sum() / shares.sum()
    return [replace(source, weight=float(share)) for source, share in zip(sources, shares / sizes, strict=True)]
