"""How time and memory grow with length: medians of measurements, exponents, tables and a plot."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a script draws into a file; it needs no display
import matplotlib.pyplot as plt
import numpy as np

from common.files import atomic_write
from eval.speed.measurement import Measurement

GB = 1e9  # bytes


def growth_exponent(lengths: Sequence[int], values: Sequence[float]) -> float:
    """p of the power law c * length^p: slope of the least-squares line through log(value) against log(length).

    NaN where there are fewer than two lengths, or a value that is not positive and has no logarithm.
    """
    if len(lengths) < 2 or min(values) <= 0:
        return math.nan
    return float(np.polyfit(np.log(lengths), np.log(values), deg=1)[0])


@dataclass(frozen=True)
class Curve:
    """One row of the tables: a pattern on a kernel at all lengths.

    Attributes:
        name: what the tables call it.
        repeats: length in tokens -> its measurements; one that has no numbers stands for its length and all above.
        model_flops: length -> operations of the model, where they are asked for.
    """

    name: str
    repeats: dict[int, list[Measurement]]
    model_flops: dict[int, float]

    def failure(self, length: int) -> str | None:
        """Why there are no numbers at this length; None if there are."""
        tried = [m for shorter, some in self.repeats.items() for m in some if shorter <= length]
        return next((m.outcome for m in tried if m.outcome != "measured"), None)

    @cached_property
    def lengths(self) -> list[int]:
        """Lengths that have numbers, ascending."""
        return [length for length, some in sorted(self.repeats.items()) if some and self.failure(length) is None]

    def seconds(self, length: int) -> float:
        """Median time of a call."""
        return statistics.median(m.seconds for m in self.repeats[length])

    def spread(self, length: int) -> float:
        """Half the range of the times of a call, over their median."""
        seconds = [m.seconds for m in self.repeats[length]]
        return (max(seconds) - min(seconds)) / 2 / statistics.median(seconds)

    def peak(self, length: int) -> float:
        """Median of the most memory of a process, in bytes."""
        return statistics.median(m.peak for m in self.repeats[length])

    def memory(self, length: int) -> float:
        """Median of the most memory above the base, in bytes: what reading the document takes."""
        return statistics.median(m.peak - m.base for m in self.repeats[length])

    def utilisation(self, length: int, peak_flops: float) -> float:
        """Model FLOPs a second over the device's peak."""
        return self.model_flops[length] / self.seconds(length) / peak_flops

    def exponents(self, quantity: str) -> tuple[float, float]:
        """Growth exponents of `seconds` or `memory`: over all lengths, and between the last two."""
        values = [getattr(self, quantity)(length) for length in self.lengths]
        return growth_exponent(self.lengths, values), growth_exponent(self.lengths[-2:], values[-2:])


def as_markdown(curves: Sequence[Curve], lengths: Sequence[int], peak_flops: float | None = None) -> str:
    """The tables of speed, of memory and, where the device's peak is given, of model FLOP utilisation."""

    def table(title: str, cell: Callable[[Curve, int], str], quantity: str | None) -> str:
        headings = ["pattern", *(f"{length:,}" for length in lengths)]
        headings += ["exponent", "of the last two"] if quantity else []
        rows = [headings, ["---", *["---:"] * (len(headings) - 1)]]
        for curve in curves:
            row = [
                curve.failure(length) or (cell(curve, length) if length in curve.lengths else "") for length in lengths
            ]
            numbers = curve.exponents(quantity) if quantity else ()
            rows.append([curve.name, *row, *("" if math.isnan(number) else f"{number:.2f}" for number in numbers)])
        return f"{title}\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)

    def speed(curve: Curve, length: int) -> str:
        return f"{length / curve.seconds(length):,.0f} ± {curve.spread(length):.0%}"

    def peak(curve: Curve, length: int) -> str:
        return f"{curve.peak(length) / GB:.2f}"

    tables = [
        table(
            "Tokens a second (median, ± half the range) by tokens of the document; exponent of time", speed, "seconds"
        ),
        table("Peak memory of the process in GB; exponent of what is above the base", peak, "memory"),
    ]
    if peak_flops is not None:
        title = f"Model FLOP utilisation of {peak_flops / 1e12:,.0f} TFLOP/s"
        tables.append(table(title, lambda curve, length: f"{curve.utilisation(length, peak_flops):.1%}", None))
    return "\n".join(tables)


def draw(curves: Sequence[Curve], path: str | Path) -> None:
    """One PNG, written whole: time and peak memory against length, both on logarithmic axes."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for number, curve in enumerate(curves):
        style = {"marker": "o", "markersize": 4, "color": f"C{number % 10}", "linestyle": "-" if number < 10 else "--"}
        for axis, quantity, unit in zip(axes, ("seconds", "peak"), (1, GB), strict=True):
            values = [getattr(curve, quantity)(length) / unit for length in curve.lengths]
            axis.plot(curve.lengths, values, label=curve.name if axis is axes[0] else None, **style)
    lengths = sorted({length for curve in curves for length in curve.lengths})
    for axis, title in zip(axes, ("seconds", "peak memory (GB)"), strict=True):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_xlabel("tokens of the document")
        axis.set_title(title)
        axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    image = BytesIO()
    figure.savefig(image, format="png", dpi=150)
    plt.close(figure)
    atomic_write(path, image.getvalue())
