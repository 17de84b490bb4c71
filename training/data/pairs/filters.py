"""What is left out of training data on request: short and near-duplicate documents; and a check for leakage."""

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from common.conditions import NOT_GIVEN
from common.errors import UserError
from common.jsonl import read_jsonl
from training.data.sources import Source, text_id

SHINGLE_WORDS, LEAK_WORDS, PERMUTATIONS = 5, 13, 128
WORD = re.compile(r"\w+")

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
) -> list[Source]:
    """Leave out short documents, then those that nearly repeat an earlier one of any source.

    The rows of one document, pairs with several queries, stay or go together.

    Args:
        sources: documents, or pairs, of which the positive is compared.
        arguments: parsed command-line options.
        tokenizer: the model's, whose tokens are counted.
        log: called with a line about each source of which rows are left out.

    Returns:
        The sources with the rows that are left.

    Raises:
        UserError: datasketch is not installed, or a source has no row left.
    """
    filters: list[tuple[str, Callable[[str], bool]]] = []
    if arguments.min_tokens:

        def is_long(text: str) -> bool:
            return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) >= arguments.min_tokens

        filters.append((f"have fewer than {arguments.min_tokens} tokens", is_long))
    if arguments.near_duplicates:
        filters.append(("are near-duplicates of an earlier document", NearDuplicates(arguments.near_duplicates)))
    for reason, keeps in filters:
        left: list[Source] = []
        fates: dict[int, bool] = {}  # of the documents of pairs, by `text_id`
        for source in sources:
            kept = []
            for row, text in enumerate(_documents(source)):
                if len(set(source.columns)) == 1:
                    keep = keeps(text)
                else:  # several queries may have one document: it is no duplicate of itself
                    number = text_id(text)
                    keep = fates[number] if number in fates else fates.setdefault(number, keeps(text))
                if keep:
                    kept.append(row)
            if not kept:
                raise UserError(f"{source.name}: all {len(source.rows)} documents {reason}; give other data")
            if len(kept) < len(source.rows):
                log(f"{source.name}: {len(source.rows) - len(kept)} of {len(source.rows)} documents {reason}: left out")
            left.append(source.select(np.array(kept)))
        sources = left
    return sources


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
            raise UserError("--near_duplicates needs datasketch: pip install -e .[dedup]") from None
        self._threshold, self._library = threshold, datasketch
        self._index: Any = datasketch.MinHashLSH(threshold=max(0.1, threshold - 0.2), num_perm=PERMUTATIONS)
        self._kept: list[frozenset[int]] = []

    def __call__(self, text: str) -> bool:
        """Return whether a document is kept: no near-duplicate of an earlier one."""
        own = frozenset(word_hashes(text, SHINGLE_WORDS))
        sketch: Any = self._library.MinHash(num_perm=PERMUTATIONS)
        sketch.update_batch([value.to_bytes(8, "little") for value in own])
        for number in self._index.query(sketch):
            other = self._kept[number]
            if len(own & other) > self._threshold * len(own | other):
                return False
        self._index.insert(len(self._kept), sketch)
        self._kept.append(own)
        return True


def word_hashes(text: str, count: int) -> Iterator[int]:
    """Hash all runs of consecutive words, in lower case.

    Args:
        text: any text.
        count: number of words of a run; a text with fewer words is one run.

    Yields:
        Hashes of 64 bits, the same in every process.
    """
    words = WORD.findall(text.lower())
    for start in range(max(1, len(words) - count + 1)):
        run = " ".join(words[start : start + count])
        yield int.from_bytes(hashlib.blake2b(run.encode(), digest_size=8).digest(), "little")


def report_leakage(folder: str, sources: list[Source], log: Log) -> None:
    """Count the rows of evaluation data that share 13 consecutive words with the training data.

    Args:
        folder: evaluation data: a file of JSON lines, or a folder of such files, at any depth, in which every text of
            at least 13 words is looked at.
        sources: the training data.
        log: called with a line for each file.

    Raises:
        UserError: there are no such files, or one of them cannot be read.
    """
    root = Path(folder)
    files = [file for file in sorted([root, *root.rglob("*")]) if file.name.endswith((".jsonl", ".jsonl.gz"))]
    files = [file for file in files if file.is_file()]
    if not files:
        raise UserError(f"--check_leakage {folder}: no .jsonl or .jsonl.gz file there")
    owners: dict[int, list[tuple[int, int]]] = {}
    rows = [0] * len(files)
    for number, file in enumerate(files):
        for line, row in read_jsonl(file):
            texts = [text for text in row.values() if isinstance(text, str) and len(WORD.findall(text)) >= LEAK_WORDS]
            rows[number] += bool(texts)
            for run in {run for text in texts for run in word_hashes(text, LEAK_WORDS)}:
                owners.setdefault(run, []).append((number, line))
    leaked: list[set[int]] = [set() for _ in files]
    for source in sources:
        for row in source.rows.select_columns(list(dict.fromkeys(source.columns))):
            for text in row.values():
                for run in word_hashes(text, LEAK_WORDS):
                    for number, line in owners.get(run, ()):
                        leaked[number].add(line)
    for file, count, lines in zip(files, rows, leaked, strict=True):
        where = f", the first of them row {min(lines)}" if lines else ""
        log(f"{file}: {len(lines)} of {count} rows of 13 words or more share 13 words with the training data{where}")


def _documents(source: Source) -> Iterator[str]:
    column = source.columns[:2][-1]
    for row in source.rows.select_columns([column]):
        yield row[column]
