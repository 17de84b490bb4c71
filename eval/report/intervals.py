"""How far scores may be chance: intervals by the bootstrap over queries (Efron and Tibshirani 1993, chapter 13).

A task has a few hundred queries, and others of the same kind would give other scores. The queries are drawn anew, with
replacement, ten thousand times; the interval holds the middle 95 % of the scores. Two models are compared on the same
draws of the same queries, because what is hard for one is mostly hard for the other, so that their difference is known
better than either score (Sakai 2006, SIGIR).
"""

from collections.abc import Sequence

import numpy as np

from common.errors import UserError
from eval.report.markdown import markdown_table
from eval.report.results import Score

LEVEL, RESAMPLES, SEED = 0.95, 10_000, 0
_BLOCK = 500  # draws that are in memory at once


def interval(samples: Sequence[np.ndarray]) -> tuple[float, float]:
    """Return the interval of a mean over tasks, in which each task counts alike and has its queries drawn by itself.

    Args:
        samples: for each task the scores of its queries, or their differences between two models, `(queries,)`.

    Returns:
        The two ends of the percentile interval.
    """
    generator = np.random.default_rng(SEED)
    means = np.zeros(RESAMPLES)
    for values in samples:
        for start in range(0, RESAMPLES, _BLOCK):
            drawn = generator.integers(len(values), size=(len(means[start : start + _BLOCK]), len(values)))
            means[start : start + _BLOCK] += values[drawn].mean(1) / len(samples)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def interval_markdown(scores: Sequence[Score]) -> str:
    """Format a table of intervals: of the scores, and of the differences from the model that comes first.

    Args:
        scores: of all models on the same tasks, with the scores of their queries.

    Returns:
        Two rows for each model but the first. With several columns there is one more, for their mean.

    Raises:
        UserError: the scores of queries are not known.
    """
    for score in scores:
        if not score.queries:
            raise UserError(
                f"--intervals: {score.task} keeps no {score.metric or 'main score'} of each query, over which the "
                "bootstrap draws; leave --metrics or --intervals out"
            )
    columns, models = (list(dict.fromkeys(getattr(s, name) for s in scores)) for name in ("column", "model"))
    values = {(s.model, s.column): s.queries for s in scores}
    rows = []
    for model in models:
        own = [np.array(list(values[model, column].values())) for column in columns]
        rows.append([model, *(f"{low:.1f} to {high:.1f}" for low, high in _intervals(own))])
        if model != models[0]:
            pairs = [(values[model, column], values[models[0], column]) for column in columns]
            less = [np.array([of_model[query] - of_first[query] for query in of_first]) for of_model, of_first in pairs]
            means = [each.mean() for each in less]
            found = zip([*means, np.mean(means)], _intervals(less), strict=False)
            rows.append(
                [
                    f"{model} less {models[0]}",
                    *(f"{mean:+.1f} ({low:+.1f} to {high:+.1f})" for mean, (low, high) in found),
                ]
            )
    headings = [f"{LEVEL:.0%} intervals", *columns, *(["mean"] if len(columns) > 1 else [])]
    return markdown_table(headings, rows)


def _intervals(samples: Sequence[np.ndarray]) -> list[tuple[float, float]]:
    """Return the interval of each sample, and of the mean of several."""
    return [*(interval([values]) for values in samples), *([interval(samples)] if len(samples) > 1 else [])]
