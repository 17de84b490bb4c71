"""Pairs to train on: the options that say what a pair is, and the sources or streams that these make of the data."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from common.conditions import GIVEN, NOT_GIVEN, Not
from common.errors import UserError
from common.provenance import code_hash
from training.data.document import PairStrategy
from training.data.documents.token_store import with_token_offsets
from training.data.pairs.batches import PairTokenizer
from training.data.pairs.filters import FilterArguments, filtered, leakage_files, report_leakage
from training.data.pairs.makers import Crops, InverseCloze, Neighbours, Segments, make_pairs
from training.data.pairs.splitting import SplitArguments, hold_out
from training.data.pairs.streams import Stream, open_streams
from training.data.sources import Columns, Source, fingerprint, read_sources
from training.engine.processes.distributed import from_main_process

REALM_WINDOW = 288  # tokens of a segment, as in REALM and ORQA
LABELS = {"entailment": "entailment", "0": "entailment", "contradiction": "contradiction", "2": "contradiction"}
UNUSED_LABELS = ("neutral", "1", "-", "-1")

Log = Callable[[str], None]


@dataclass(kw_only=True)
class PairArguments(SplitArguments, FilterArguments):
    """What a pair is.

    Raises:
        UserError: options exclude each other.
    """

    pairs: Literal["columns", "nli", "twins", "crops", "inverse_cloze", "neighbours", "segments"] = field(
        default="columns",
        metadata={
            "help": "where pairs come from. columns: labelled pairs; nli: triplets of premise, entailment and "
            "contradiction, from the columns premise, hypothesis and label. The others make pairs from the documents "
            "of --text_column. twins: a text and itself; crops: two random spans; inverse_cloze: a sentence and the "
            "passage around it; neighbours: two adjacent spans; segments: two windows"
        },
    )
    anchor_column: str = field(
        default="anchor",
        metadata={
            "help": "column of queries, such as questions or titles",
            "applies": [{"pairs": "columns"}, {"eval_data": GIVEN}],
        },
    )
    positive_column: str = field(
        default="positive",
        metadata={
            "help": "column of the documents that answer them",
            "applies": [{"pairs": "columns", "objective": Not("simcse", "sup_con")}, {"eval_data": GIVEN}],
        },
    )
    text_column: str = field(
        default="text",
        metadata={
            "help": "column of documents from which pairs are made",
            "applies": {"pairs": ("twins", "crops", "inverse_cloze", "neighbours", "segments")},
        },
    )
    pair_window: int | None = field(
        default=None,
        metadata={
            "help": "length in tokens of the span of a document that crops are taken from, of the passage of "
            "inverse_cloze, and of each neighbour or segment; by default what the model can read, 288 for segments",
            "within": "[2, inf)",
            "applies": {"pairs": ("crops", "inverse_cloze", "neighbours", "segments")},
        },
    )
    crop_ratio: list[float] = field(
        default_factory=lambda: [0.25, 0.5],
        metadata={
            "help": "smallest and largest fraction of the window in a crop (Contriever: 0.05 0.5 of 256)",
            "within": "(0, 1]",
            "applies": {"pairs": "crops"},
        },
    )
    word_deletion: float = field(
        default=0.1,
        metadata={
            "help": "fraction of the words that are deleted from a crop",
            "within": "[0, 1)",
            "applies": {"pairs": "crops"},
        },
    )
    sentence_removal: float = field(
        default=0.9,
        metadata={
            "help": "fraction of the pairs of inverse_cloze whose passage lacks the sentence",
            "within": "[0, 1]",
            "applies": {"pairs": "inverse_cloze"},
        },
    )
    segment_step: int = field(
        default=64,
        metadata={
            "help": "tokens from the start of a segment to that of the next",
            "within": "[1, inf)",
            "applies": {"pairs": "segments"},
        },
    )
    segment_gap: int = field(
        default=0,
        metadata={
            "help": "least number of tokens between the two segments of a pair; -100: they may share up to 100 tokens",
            "applies": {"pairs": "segments"},
        },
    )
    mixing_temperature: float = field(
        default=1.0,
        metadata={
            "help": "the share of a source in an epoch is proportional to its weight times its size to the power of "
            "1 / temperature",
            "within": "(0, inf)",
            "applies": {"streaming": NOT_GIVEN},
        },
    )

    streaming: bool = field(
        default=False,
        metadata={
            "help": "read the data during training, without copying it to disk or looking through it first; weights "
            "are then shares of the batches, and --max_steps sets the length of the run"
        },
    )
    shuffle_buffer: int = field(
        default=2048,
        metadata={
            "help": "rows of a stream that are shuffled together",
            "within": "[1, inf)",
            "applies": {"streaming": True},
        },
    )

    def __post_init__(self) -> None:
        window = self.pair_window or REALM_WINDOW
        if len(self.crop_ratio) != 2 or self.crop_ratio[0] > self.crop_ratio[1]:
            raise UserError("--crop_ratio: must be two numbers, of which the first is not the larger")
        if self.pairs == "segments" and self.segment_step > window:
            raise UserError(f"--segment_step {self.segment_step}: must be from 1 to --pair_window")
        if self.segment_gap <= -window:
            raise UserError(f"--segment_gap {self.segment_gap}: two segments cannot share more tokens than one has")
        if self.streaming and self.pairs == "nli":
            raise UserError("--streaming: --pairs nli has to see all rows of a premise; leave out one of them")
        if self.pairs == "twins" and self.eval_split:
            raise UserError("--eval_split: a text is found by itself, which tells nothing; give --eval_data with pairs")

    def columns(self, columns: Columns) -> Columns:
        """Return the columns of the data from which pairs with the given columns can be made."""
        if self.pairs == "columns":
            return self.renamed(columns)
        if self.pairs == "nli":
            return Columns(("premise", "hypothesis"), None, "rows", (*columns.classes, "label"))
        required = (self.text_column,) * (2 if self.pairs == "twins" else 1)
        return Columns(required, None, "documents", columns.classes)

    def renamed(self, columns: Columns) -> Columns:
        """Return the columns of labelled pairs under the names that they have in the data."""
        names = {"anchor": self.anchor_column, "positive": self.positive_column}
        return replace(columns, required=tuple(names.get(column, column) for column in columns.required))

    def strategy(self, tokenize: PairTokenizer) -> PairStrategy | None:
        """Return how pairs are made from documents; None if they are not."""
        room = tokenize.room()
        window = self.pair_window or room
        smallest, largest = self.crop_ratio
        strategies: dict[str, PairStrategy] = {
            "crops": Crops(window, (smallest, largest), self.word_deletion),
            "inverse_cloze": InverseCloze(window, self.sentence_removal),
            "neighbours": Neighbours(window),
            "segments": Segments(self.pair_window or min(REALM_WINDOW, room), self.segment_step, self.segment_gap),
        }
        return strategies.get(self.pairs)


def read_pairs(
    specifications: list[str],
    arguments: PairArguments,
    columns: Columns,
    tokenize: PairTokenizer,
    log: Log,
    main_first: AbstractContextManager[None] | None = None,
) -> tuple[list[Source], list[Source]]:
    """Read training data as sources of pairs, and hold out a part of it with `--eval_split`.

    Which rows are left out or held out the main process finds, for all.

    Args:
        specifications: the sources, in the format of `read_sources`.
        arguments: parsed command-line options.
        columns: the columns of pairs that the objective needs.
        tokenize: tokenizer of the pairs.
        log: called with one line about everything that is left out or looks like a mistake.
        main_first: with several processes, a context that the main one enters and leaves before the others.

    Returns:
        One source per specification, and the held-out pairs, as pairs of texts.

    Raises:
        UserError: a source cannot be read, or nothing of it is left; or there is nothing for `--check_leakage`.
    """
    leaks = [] if arguments.check_leakage is None else leakage_files(arguments.check_leakage)
    with main_first or nullcontext():  # the others find the texts and their tokens in the cache
        sources = read_sources(specifications, arguments.columns(columns))
        if arguments.pairs == "nli":
            sources = [triplets(source, log) for source in sources]
        elif arguments.pairs == "twins":
            sources = [replace(source, anchor_kind="document") for source in sources]
        strategy = arguments.strategy(tokenize)
        if strategy is not None:
            sources = [with_token_offsets(source, tokenize.tokenizer) for source in sources]
            sources = [long_enough(source, strategy, tokenize.tokenizer, log) for source in sources]
    parts = from_main_process(lambda: _divided(sources, arguments, tokenize.tokenizer, leaks, log))
    train = [source.select(rows) for source, (rows, _) in zip(sources, parts, strict=True)]
    held_out = [source.select(rows) for source, (_, rows) in zip(sources, parts, strict=True) if len(rows)]
    seed = arguments.eval_split_seed
    return mixed(train, arguments.mixing_temperature), [held_out_pairs(s, tokenize.tokenizer, seed) for s in held_out]


def _divided(
    sources: list[Source], arguments: PairArguments, tokenizer: PreTrainedTokenizerBase, leaks: list[Path], log: Log
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the rows of each source to train on, and those that are held out; the files `leaks` are checked."""
    rows = [distinct(source, log) for source in sources]
    # Before rows are held out, so that no near-duplicate of a held-out document is trained on; after documents that
    # make no pair are gone, so that none is left out for being like one of those.
    kept = filtered([source.select(own) for source, own in zip(sources, rows, strict=True)], arguments, tokenizer, log)
    rows = [own[places] for own, places in zip(rows, kept, strict=True)]
    parts = hold_out([source.select(own) for source, own in zip(sources, rows, strict=True)], arguments, log)
    divided = [(own[train], own[held]) for own, (train, held) in zip(rows, parts, strict=True)]
    if leaks:
        trained_on = [source.select(train) for source, (train, _) in zip(sources, divided, strict=True)]
        report_leakage(leaks, trained_on, log)
    return divided


def held_out_pairs(source: Source, tokenizer: PreTrainedTokenizerBase, seed: int) -> Source:
    """Return held-out rows as pairs of texts without negatives; those of a document are the same in every run.

    Args:
        source: pairs, or documents from which they are made.
        tokenizer: the model's.
        seed: random seed of the spans of documents.

    Raises:
        UserError: the rows have a single text.
    """
    source = replace(source, name=f"{source.name}/held_out", columns=source.columns[:2])
    if source.strategy is None:
        if len(source.columns) < 2:
            raise UserError("--eval_split: the rows of this objective are no pairs; give --eval_data with pairs")
        return source
    rows = list(range(len(source.rows)))
    generators = [np.random.default_rng((seed, text)) for text in source.text_ids(source.columns[:1])[:, 0].tolist()]
    texts = make_pairs(source.strategy, source.documents(rows, tokenizer), generators)
    names = ("anchor", "positive")
    pairs = datasets.Dataset.from_dict(dict(zip(names, texts, strict=True)))
    return replace(source, rows=pairs, columns=names, classes=(), strategy=None)


def stream_pairs(
    specifications: list[str], arguments: PairArguments, columns: Columns, tokenize: PairTokenizer
) -> list[Stream]:
    """Open training data as streams of pairs; documents that are too short are skipped during training.

    Their share of the rows is logged as `too_short_share`.

    Args:
        specifications: the sources, in the format of `read_sources`.
        arguments: parsed command-line options.
        columns: the columns of pairs that the objective needs.
        tokenize: tokenizer of the pairs.

    Returns:
        One stream per specification.

    Raises:
        UserError: a source cannot be read.
    """
    strategy, anchor_kind = arguments.strategy(tokenize), "document" if arguments.pairs == "twins" else "query"
    streams = open_streams(specifications, arguments.columns(columns))
    return [replace(stream, strategy=strategy, anchor_kind=anchor_kind) for stream in streams]


def triplets(source: Source, log: Log) -> Source:
    """Group labelled premises and hypotheses into triplets (premise, entailment, contradiction), as supervised SimCSE.

    A premise with several entailments or contradictions makes as many triplets as it has of the more frequent kind.
    (Gao et al. 2021, arXiv:2104.08821, section 4.)

    Args:
        source: premises, hypotheses and labels.
        log: called with a line about premises that are left out.

    Returns:
        A source of triplets.

    Raises:
        UserError: an unknown label, or no premise with both an entailment and a contradiction.
    """
    groups: dict[str, dict[str, list[str]]] = {}
    for start in range(0, len(source.rows), 1000):
        rows = list(range(start, min(start + 1000, len(source.rows))))
        premises, hypotheses = source.texts(rows)
        labels = source.classes_of(rows)["label"]
        for row, premise, hypothesis, label in zip(rows, premises, hypotheses, labels, strict=True):
            name = LABELS.get(label.lower())
            if name is None and label.lower() not in UNUSED_LABELS:
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
        log(f"{source.name}: {left_out} of {len(groups)} premises lack an entailment or a contradiction: left out")
    triples = []
    for premise, group in whole.items():
        positives, negatives = group["entailment"], group["contradiction"]
        for n in range(max(len(positives), len(negatives))):
            triples.append((premise, positives[n % len(positives)], negatives[n % len(negatives)]))
    columns = ("anchor", "positive", "negative")
    texts = dict(zip(columns, map(list, zip(*triples, strict=True)), strict=True))
    return replace(source, rows=datasets.Dataset.from_dict(texts), columns=columns, classes=())


def distinct(source: Source, log: Log) -> np.ndarray:
    """Leave out rows that repeat another row.

    Args:
        source: pairs or documents.
        log: called with a line about repeated rows, and about pairs of a text and itself, from which nothing is learnt.

    Returns:
        The rows that are left: the first of equal rows.
    """
    columns = list(dict.fromkeys((*source.columns, *source.classes)))
    ids = source.text_ids(columns)
    kept = np.sort(np.unique(ids, axis=0, return_index=True)[1])
    if repeated := len(ids) - len(kept):
        log(f"{source.name}: {repeated} of {len(ids)} rows repeat another row: left out")
    same = int((ids[kept, 0] == ids[kept, 1]).sum()) if len(set(source.columns)) > 1 else 0
    if same:
        log(
            f"{source.name}: in {same} of {len(kept)} rows {columns[0]} and {columns[1]} are the same text: from these "
            "a model learns nothing"
        )
    return kept


def long_enough(source: Source, strategy: PairStrategy, tokenizer: PreTrainedTokenizerBase, log: Log) -> Source:
    """Leave out documents that are too short for a pair.

    Args:
        source: documents, with the places of their tokens.
        strategy: how pairs are made from them.
        tokenizer: the model's.
        log: called with a line about documents that are left out.

    Returns:
        The source, whose documents become pairs.

    Raises:
        UserError: no document is left.
    """

    def can_pair(_: list[str], rows: list[int]) -> list[bool]:
        documents = source.documents(rows, tokenizer)
        return [strategy(document, np.random.default_rng(0)) is not None for document in documents]

    rows = source.rows.filter(
        can_pair,
        input_columns=source.columns[0],
        with_indices=True,
        batched=True,
        batch_size=64,
        new_fingerprint=fingerprint(
            source.rows._fingerprint, str(strategy), code_hash("training.data.document", "training.data.pairs.makers")
        ),
        desc=f"looking through {source.name}",
    )
    if not len(rows):
        raise UserError(
            f"{source.name}: no document is long enough for a pair, which needs {strategy.needs}; give longer ones, or "
            "other --pairs"
        )
    if left_out := len(source.rows) - len(rows):
        log(
            f"{source.name}: {left_out} of {len(source.rows)} documents are too short for a pair, which needs "
            f"{strategy.needs}: left out"
        )
    return replace(source, rows=rows, strategy=strategy)


def mixed(sources: list[Source], temperature: float) -> list[Source]:
    """Weight sources so that their shares of an epoch are proportional to weight * rows ** (1 / temperature).

    (Conneau et al. 2020, arXiv:1911.02116, section 3.1, with alpha = 1 / temperature.)

    Args:
        sources: with the weights that the user gave them.
        temperature: 1 leaves the weights as they are.

    Returns:
        The sources with new weights. The epoch is as long as before.
    """
    if temperature == 1:
        return sources
    sizes = np.array([len(source.rows) for source in sources], np.float64)
    weights = np.array([source.weight for source in sources])
    shares = weights * sizes ** (1 / temperature)
    shares *= (weights * sizes).sum() / shares.sum()
    return [replace(source, weight=float(share)) for source, share in zip(sources, shares / sizes, strict=True)]
