"""Evaluation on held-out data, the same for all sources of it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import nn

OfSource = TypeVar("OfSource")


@dataclass(frozen=True)
class Evaluation(Generic[OfSource]):
    """Evaluates a model on each held-out source.

    Args:
        sources: what evaluates on one source, by the name of the source.
        evaluate: calls one of them with a model, and returns its metrics.
        contents: returns what tells the data from other data, which may take time.
    """

    sources: Mapping[str, OfSource]
    evaluate: Callable[[OfSource, nn.Module], dict[str, float]]
    contents: Callable[[], Iterable[str]]

    def __bool__(self) -> bool:
        """Return whether there is anything to evaluate on."""
        return bool(self.sources)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Return the metrics of a model in evaluation mode; it is called on all processes.

        Returns:
            Metrics named as `evaluate` names them if there is one source, and `metric/source` otherwise.
        """
        results = {name: self.evaluate(of_source, model) for name, of_source in self.sources.items()}
        if len(results) == 1:
            return next(iter(results.values()))
        return {f"{metric}/{name}": value for name, values in results.items() for metric, value in values.items()}


NO_EVALUATION: Evaluation[Any] = Evaluation({}, lambda of_source, model: {}, list)  # on nothing
