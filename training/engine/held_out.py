"""What a run reports of its held-out data."""

from collections.abc import Callable
from typing import TypeVar

from torch import nn

# Of the model under training, by name.
Evaluate = Callable[[nn.Module], dict[str, float]]
OfSource = TypeVar("OfSource")


def by_source(
    evaluations: dict[str, OfSource], evaluate: Callable[[OfSource, nn.Module], dict[str, float]]
) -> Evaluate | None:
    """The evaluation of a model on each source of `--eval_data`; None if there is none.

    Args:
        evaluations: of the sources, by their name.
        evaluate: calls one of them with a model.

    Returns:
        Metrics of a model: as `evaluate` names them if there is one source, else `metric/source`.
    """

    def metrics(model: nn.Module) -> dict[str, float]:
        results = {name: evaluate(of_source, model) for name, of_source in evaluations.items()}
        if len(results) == 1:
            return next(iter(results.values()))
        return {f"{metric}/{name}": value for name, values in results.items() for metric, value in values.items()}

    return metrics if evaluations else None
