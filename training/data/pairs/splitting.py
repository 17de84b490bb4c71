"""Held-out rows of the training data: drawn with a seed, and without a text in common with the rows that are left."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from common.conditions import GIVEN, NOT_GIVEN
from common.errors import UserError
from training.data.sources import Source


@dataclass(kw_only=True)
class SplitArguments:
    """Which part of the training data is held out."""

    eval_split: float = field(
        default=0.0,
        metadata={
            "help": "fraction of the training rows that is held out for evaluation; they share no text with the others",
            "within": "[0, 1)",
            "applies": {"streaming": NOT_GIVEN},
        },
    )
    eval_split_seed: int = field(
        default=42,
        metadata={
            "help": "random seed of --eval_split, whatever --seed is",
            "within": "[0, 4294967295]",
            "applies": {"eval_split": GIVEN},
        },
    )


def hold_out(
    sources: list[Source], arguments: SplitArguments, log: Callable[[str], None]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Divide sources into rows to train on and held-out rows, whose texts are nowhere in the others.

    Rows that share their first or second text (the anchor, the positive, or the document) are held out together or not
    at all. Rows that have a held-out text in another column, as a negative, are left out of the training; the negatives
    of held-out rows do not count. What is held out depends on the texts and the seed, not on the order of the rows.

    Args:
        sources: texts in at least one column.
        arguments: parsed command-line options.
        log: called with a line about the rows that are held out and left out.

    Returns:
        For each source the rows to train on, and those that are held out.

    Raises:
        UserError: nothing can be held out, or a source has no other rows.
    """
    if not arguments.eval_split:
        return [(np.arange(len(source.rows)), np.empty(0, np.int64)) for source in sources]
    ids = [source.text_ids(source.columns) for source in sources]
    groups = _groups(np.concatenate([texts[:, :2][:, [0, -1]] for texts in ids]))
    is_held = np.split(_drawn(groups, arguments), np.cumsum([len(texts) for texts in ids])[:-1])
    texts_held = np.concatenate([texts[held, :2].ravel() for texts, held in zip(ids, is_held, strict=True)])
    parts = []
    for source, texts, held in zip(sources, ids, is_held, strict=True):
        left = ~np.isin(texts, texts_held).any(axis=1)
        log(
            f"{source.name}: {held.sum()} of {len(held)} rows are held out by --eval_split, and "
            f"{(~held & ~left).sum()} more are left out, because a negative of theirs is one of the held-out texts"
        )
        if not left.any():
            raise UserError(f"{source.name}: --eval_split {arguments.eval_split} leaves no row to train on; lower it")
        parts.append((np.flatnonzero(left), np.flatnonzero(held)))
    return parts


def _drawn(groups: np.ndarray, arguments: SplitArguments) -> np.ndarray:
    """Draw whole groups of rows, and return which rows are in them, `(rows,)` bool."""
    roots, sizes = np.unique(groups, return_counts=True)
    drawn, wanted = list[int](), max(1, round(arguments.eval_split * len(groups)))
    for place in np.random.default_rng(arguments.eval_split_seed).permutation(len(roots)).tolist():
        if sizes[place] <= wanted:
            drawn.append(place)
            wanted -= sizes[place]
    if not drawn:
        raise UserError(
            f"--eval_split {arguments.eval_split}: the rows share so many texts that none can be held out; give "
            "--eval_data"
        )
    return np.isin(groups, roots[drawn])


def _groups(texts: np.ndarray) -> np.ndarray:
    """Number rows so that rows which share a text, directly or through others, have the same number.

    Args:
        texts: `(rows, 2)` int64, equal where the texts are equal.

    Returns:
        The smallest text of each row's group, `(rows,)`.
    """
    parent: dict[int, int] = {}

    def root(text: int) -> int:
        while (above := parent.setdefault(text, text)) != text:
            parent[text] = text = parent[above]  # halves the path for the next search
        return text

    for first, second in texts.tolist():
        small, large = sorted((root(first), root(second)))
        parent[large] = small
    return np.array([root(first) for first, _ in texts.tolist()], np.int64)
