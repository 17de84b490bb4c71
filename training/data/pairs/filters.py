"""What is left out of training data on request: short and near-duplicate documents; and a check for leakage."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from common.conditions import NOT_GIVEN
from common.data_files import JSON_SUFFIXES
from common.errors import UserError
from common.jsonl import read_jsonl
from modeling_longembed.encoding_tokens_longembed import special_tokens_around, tokenize_beginnings
from training.data.sources import Source, text_id

SHINGLE_WORDS, LEAK_WORDS, PERMUTATIONS = 5, 13, 128
ROWS_AT_ONCE = 100  # that are read and tokenised together; they may be long documents
WORD = re.compile(r"\w+")

Filter = Callable[[list[str]], list[bool]]  # says of each of some documents whether it is kept
Log = Callable[[str], None]


@dataclass(kw_only=True)
class FilterArguments:
    """What is left out of the training data, and what it is compared with."""

    near_duplicates: float = field(
        default=0.0,
        metadata={
            "help": "leave out documents (the positives of pairs) whose shingles of 5 words have a Jaccard similarity "
            "of more than this, such as 0.7, with those of an earlier one (several queries of one document stay); "
            "0: none",
            "within": "[0, 1)",
            "applies": {"streaming": NOT_GIVEN},
        },
    )
    min_tokens: int = field(
        default=0,
        metadata={
            "help": "leave out documents (the positives of pairs) of fewer tokens",
            "within": "[0, inf)",
            "applies": {"streaming": NOT_GIVEN},
        },
    )
    check_leakage: str | None = field(
        default=None,
        metadata={
            "help": "file or folder of evaluation data in JSON lines: count its rows that share 13 consecutive words "
            "with the training data",
            "applies": {"streaming": NOT_GIVEN},
        },
    )


def filtered(
    sources: list[Source], arguments: FilterArguments, tokenizer: PreTrainedTokenizerBase, log: Log
) -> list[np.ndarray]:
    """Leave out short documents, then those that nearly repeat an earlier one of any source.

    The rows of one document, pairs with several queries, stay or go together.

    Args:
        sources: documents, or pairs, of which the positive is compared.
        arguments: parsed command-line options.
        tokenizer: the model's, whose tokens are counted.
        log: called with a line about each source of which rows are left out.

    Returns:
        The rows of each source that are left.

    Raises:
        UserError: datasketch is not installed, or a source has no row left.
    """
    filters: list[tuple[str, Filter]] = []
    if arguments.min_tokens:
        least = arguments.min_tokens + sum(map(len, special_tokens_around(tokenizer)))

        def are_long(texts: list[str]) -> list[bool]:
            return [len(ids) >= least for ids in tokenize_beginnings(tokenizer, texts, least)]

        filters.append((f"have fewer than {arguments.min_tokens} tokens", are_long))
    if arguments.near_duplicates:
        is_new = NearDuplicates(arguments.near_duplicates)
        filters.append(("are near-duplicates of an earlier document", lambda texts: [is_new(text) for text in texts]))
    rows = [np.arange(len(source.rows)) for source in sources]
    for reason, keep in filters:
        left = [source.select(own) for source, own in zip(sources, rows, strict=True)]
        for number, (source, kept) in enumerate(zip(left, _kept_rows(left, keep), strict=True)):
            if not kept.any():
                raise UserError(f"{source.name}: all {len(kept)} documents {reason}; give other data")
            if not kept.all():
                log(f"{source.name}: {(~kept).sum()} of {len(kept)} documents {reason}: left out")
            rows[number] = rows[number][kept]
    return rows


def _kept_rows(sources: list[Source], keep: Filter) -> list[np.ndarray]:
    """Return which rows of each source a filter keeps, `(rows,)` bool; it is shown the documents in their order."""
    sizes = [len(source.rows) for source in sources]
    if len(set(sources[0].columns)) == 1:
        documents = np.arange(sum(sizes))
    else:  # several queries may have one document: it is no duplicate of itself
        documents = np.concatenate([source.text_ids(source.columns[1:2])[:, 0] for source in sources])
    _, first, document_of = np.unique(documents, return_index=True, return_inverse=True)
    is_first = np.zeros(len(documents), np.bool_)
    is_first[first] = True
    kept = list[bool]()  # of the first row of each document, in their order
    for source, own in zip(sources, np.split(is_first, np.cumsum(sizes)[:-1]), strict=True):
        column = source.columns[:2][-1]
        for batch in source.select(np.flatnonzero(own)).rows.select_columns([column]).iter(ROWS_AT_ONCE):
            kept += keep(batch[column])
    fate = np.zeros(len(documents), np.bool_)
    fate[is_first] = kept
    return np.split(fate[first][document_of], np.cumsum(sizes)[:-1])


class NearDuplicates:
    """Tells documents from near-duplicates of those that it was given before and kept.

    MinHash with locality-sensitive hashing proposes candidates, below the threshold too, so that hardly any is missed;
    the exact Jaccard similarity of their shingles decides.

    Args:
        threshold: a document with a higher similarity is a near-duplicate.

    Raises:
        UserError: datasketch is not installed.
    """

    def __init__(self, threshold: float) -> None:
        try:
            import datasketch
        except ImportError:
            raise UserError("--near_duplicates needs datasketch: pip install -e '.[dedup]'") from None
        self._threshold, self._library = threshold, datasketch
        self._index: Any = datasketch.MinHashLSH(threshold=max(0.1, threshold - 0.2), num_perm=PERMUTATIONS)
        self._kept: list[np.ndarray] = []  # the hashes of each, sorted: 8 bytes each, of which a set takes 60

    def __call__(self, text: str) -> bool:
        """Return whether a document is kept: no near-duplicate of an earlier one."""
        own = np.unique(word_hashes(text, SHINGLE_WORDS))
        sketch: Any = self._library.MinHash(num_perm=PERMUTATIONS)
        sketch.update_batch([value.tobytes() for value in own])
        for number in self._index.query(sketch):
            other = self._kept[number]
            shared = len(np.intersect1d(own, other, assume_unique=True))
            if shared > self._threshold * (len(own) + len(other) - shared):
                return False
        self._index.insert(len(self._kept), sketch)
        self._kept.append(own)
        return True


def word_hashes(text: str, count: int) -> np.ndarray:
    """Hash all runs of consecutive words, in lower case.

    Args:
        text: any text.
        count: number of words of a run; a text with fewer words is one run.

    Returns:
        The `text_id` of each run, `(runs,)` int64.
    """
    words = WORD.findall(text.lower())
    starts = range(max(1, len(words) - count + 1))
    return np.fromiter((text_id(" ".join(words[start : start + count])) for start in starts), np.int64, len(starts))


def leakage_files(path: str) -> list[Path]:
    """List the files of evaluation data.

    Args:
        path: a file of JSON lines, or a folder of such files, at any depth.

    Returns:
        The files, in the order of their names.

    Raises:
        UserError: there are none.
    """
    root = Path(path)
    files = [file for file in sorted([root, *root.rglob("*")]) if file.name.endswith(JSON_SUFFIXES) and file.is_file()]
    if not files:
        raise UserError(f"--check_leakage {path}: no {', '.join(JSON_SUFFIXES)} file there")
    return files


def report_leakage(files: list[Path], sources: list[Source], log: Log) -> None:
    """Count the rows of evaluation data that share 13 consecutive words with the training data.

    Args:
        files: evaluation data, in which every text of at least 13 words is looked at.
        sources: the training data.
        log: called with a line for each file.

    Raises:
        UserError: a file cannot be read.
    """
    places, runs = list[tuple[int, int]](), list[np.ndarray]()  # of each row its file and line, and what it has
    for number, file in enumerate(files):
        for line, row in read_jsonl(file):
            texts = [text for text in row.values() if isinstance(text, str) and len(WORD.findall(text)) >= LEAK_WORDS]
            if texts:
                places.append((number, line))
                runs.append(np.unique(np.concatenate([word_hashes(text, LEAK_WORDS) for text in texts])))
    owners = np.repeat(np.arange(len(places)), [len(own) for own in runs])
    every, place = np.unique(np.concatenate([np.empty(0, np.int64), *runs]), return_inverse=True)
    shared = np.zeros(len(every), np.bool_)
    for source in sources if len(every) else ():
        for batch in source.rows.select_columns(list(dict.fromkeys(source.columns))).iter(ROWS_AT_ONCE):
            hashes = np.concatenate([word_hashes(text, LEAK_WORDS) for texts in batch.values() for text in texts])
            near = np.searchsorted(every, hashes).clip(max=len(every) - 1)
            shared[near[every[near] == hashes]] = True
    leaked = {places[row] for row in np.unique(owners[shared[place]]).tolist()}
    for number, file in enumerate(files):
        count, lines = sum(of == number for of, _ in places), [line for of, line in leaked if of == number]
        where = f", the first of them row {min(lines)}" if lines else ""
        log(f"{file}: {len(lines)} of {count} rows of 13 words or more share 13 words with the training data{where}")
