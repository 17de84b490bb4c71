"""Evaluation on held-out data: one function for all sources of `--eval_data`."""

from collections.abc import Callable
from typing import TypeVar

from torch import nn

# Maps the model under training to its metrics.
Evaluate = Callable[[nn.Module], dict[str, float]]
OfSource = TypeVar("OfSource")


def by_source(
    evaluations: dict[str, OfSource], evaluate: Callable[[OfSource, nn.Module], dict[str, float]]
) -> Evaluate | None:
    """Return a function that evaluates a model on each source of `--eval_data`; None if there is no source.

    Args:
        evaluations: what evaluates on one source, by the name of the source.
        evaluate: calls one of the evaluations with a model, and returns its metrics.

    Returns:
        A function from a model to its metrics, which are named as `evaluate` names them if there is one source, and
        `metric/source` otherwise.
    """

    def metrics(model: nn.Module) -> dict[str, float]:
        results = {name: evaluate(of_source, model) for name, of_source in evaluations.items()}
        if len(results) == 1:
            return next(iter(results.values()))
        return {f"{metric}/{name}": value for name, values in results.items() for metric, value in values.items()}

    return metrics if evaluations else None
