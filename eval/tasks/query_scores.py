"""The scores of single queries, which MTEB computes and does not keep."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mteb.abstasks import AbsTask, AbsTaskRetrieval


@contextmanager
def noting_query_scores(task: AbsTask) -> Iterator[dict[str, dict[str, float]]]:
    """Note the main score of each query while a retrieval task is evaluated.

    MTEB gives the scores of all queries to a method of the task, which adds scores of its own to them.

    Args:
        task: the task.

    Yields:
        Split -> query id -> main score, of the first subset as in `AtomicResultCache.scores`. It stays empty if the
        task is no retrieval task, or its main score is no mean over queries that trec_eval computes.
    """
    noted: dict[str, dict[str, float]] = {}
    if not isinstance(task, AbsTaskRetrieval):
        yield noted
        return
    own: Any = task.task_specific_scores
    metric = task.metadata.main_score.replace("_at_", "_cut_")

    def noting(scores: dict[str, dict[str, float]], *args: Any, hf_split: str, **kwargs: Any) -> dict[str, float]:
        if all(metric in of_query for of_query in scores.values()):
            noted.setdefault(hf_split, {query: of_query[metric] for query, of_query in scores.items()})
        return own(scores, *args, hf_split=hf_split, **kwargs)

    task.task_specific_scores = noting  # type: ignore[method-assign, assignment]
    try:
        yield noted
    finally:
        del task.task_specific_scores
