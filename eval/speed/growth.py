"""How time and memory grow with length: medians of measurements, growth exponents, tables and a plot."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from eval.report.figures import plt, save_figure, use_length_axis, use_log_values
from eval.report.markdown import markdown_table
from eval.speed.measurement import Measurement

GB = 1e9  # bytes


def growth_exponent(lengths: Sequence[int], values: Sequence[float]) -> float:
    """Fit p of the power law `c * length^p` by least squares on log(value) against log(length).

    Args:
        lengths: in tokens.
        values: one for each length.

    Returns:
        p; NaN where there are fewer than two lengths, or a value that is not positive.
    """
    if len(lengths) < 2 or min(values) <= 0:
        return math.nan
    return float(np.polyfit(np.log(lengths), np.log(values), deg=1)[0])


@dataclass(frozen=True)
class Curve:
    """The measurements of one pattern on one kernel: a row of the tables.

    Attributes:
        name: of the row.
        repeats: length in tokens -> its measurements. A failed one stands for its length and for all longer ones.
        model_flops: length -> floating-point operations of the model, where they were requested.
    """

    name: str
    repeats: dict[int, list[Measurement]]
    model_flops: dict[int, float]

    def failure(self, length: int) -> str | None:
        """Return why there are no numbers at this length; None if there are, or if it has not been measured."""
        tried = [m for shorter, repeats in self.repeats.items() for m in repeats if shorter <= length]
        return next((m.outcome for m in tried if m.outcome != "measured"), None)

    @cached_property
    def lengths(self) -> list[int]:
        """Lengths with numbers, ascending."""
        return [length for length, found in sorted(self.repeats.items()) if found and self.failure(length) is None]

    def seconds(self, length: int) -> float:
        """Return the median time of a call."""
        return statistics.median(m.seconds for m in self.repeats[length])

    def spread(self, length: int) -> float:
        """Return half the range of the times of a call, divided by their median."""
        seconds = [m.seconds for m in self.repeats[length]]
        return (max(seconds) - min(seconds)) / 2 / statistics.median(seconds)

    def peak(self, length: int) -> float:
        """Return the median peak memory of a process, in bytes."""
        return statistics.median(m.peak for m in self.repeats[length])

    def memory(self, length: int) -> float:
        """Return the median peak memory above the base, in bytes: what reading the document takes."""
        return statistics.median(m.peak - m.base for m in self.repeats[length])

    def utilisation(self, length: int, peak_flops: float) -> float:
        """Return the model FLOPs per second as a share of the device's peak."""
        return self.model_flops[length] / self.seconds(length) / peak_flops

    def exponents(self, quantity: str) -> tuple[float, float]:
        """Return the growth exponents of `seconds` or `memory`: over all lengths, and between the last two."""
        values = [getattr(self, quantity)(length) for length in self.lengths]
        return growth_exponent(self.lengths, values), growth_exponent(self.lengths[-2:], values[-2:])


def as_markdown(curves: Sequence[Curve], lengths: Sequence[int], peak_flops: float | None = None) -> str:
    """Return Markdown tables of speed and memory and, where the device's peak is given, of model FLOP utilisation.

    Args:
        curves: the rows.
        lengths: the columns, in tokens.
        peak_flops: operations per second of the device at most.
    """

    def table(title: str, cell: Callable[[Curve, int], str], quantity: str | None) -> str:
        headings = ["pattern", *(f"{length:,}" for length in lengths)]
        headings += ["exponent", "of the last two"] if quantity else []
        rows = []
        for curve in curves:
            row = [
                curve.failure(length) or (cell(curve, length) if length in curve.lengths else "") for length in lengths
            ]
            exponents = curve.exponents(quantity) if quantity else ()
            rows.append([curve.name, *row, *("" if math.isnan(number) else f"{number:.2f}" for number in exponents)])
        return f"{title}\n\n{markdown_table(headings, rows)}"

    def speed(curve: Curve, length: int) -> str:
        return f"{length / curve.seconds(length):,.0f} ± {curve.spread(length):.0%}"

    def peak(curve: Curve, length: int) -> str:
        return f"{curve.peak(length) / GB:.2f}"

    tables = [
        table(
            "Tokens per second (median ± half the range) by tokens of the document; exponent of time", speed, "seconds"
        ),
        table("Peak memory of the process in GB; exponent of the memory above the base", peak, "memory"),
    ]
    if peak_flops is not None:
        title = f"Model FLOP utilisation of {peak_flops / 1e12:,.0f} TFLOP/s"
        tables.append(table(title, lambda curve, length: f"{curve.utilisation(length, peak_flops):.1%}", None))
    return "\n".join(tables)


def draw(curves: Sequence[Curve], path: str | Path) -> None:
    """Draw time and peak memory against length, with logarithmic axes, into a PNG file."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for number, curve in enumerate(curves):
        style = {"marker": "o", "markersize": 4, "color": f"C{number % 10}", "linestyle": "-" if number < 10 else "--"}
        for axis, quantity, unit in zip(axes, ("seconds", "peak"), (1, GB), strict=True):
            values = [getattr(curve, quantity)(length) / unit for length in curve.lengths]
            axis.plot(curve.lengths, values, label=curve.name if axis is axes[0] else None, **style)
    lengths = [length for curve in curves for length in curve.lengths]
    for axis, title in zip(axes, ("seconds", "peak memory (GB)"), strict=True):
        use_length_axis(axis, lengths, "tokens of the document")
        use_log_values(axis, base=2)
        axis.set_title(title)
        axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    save_figure(figure, path)
