"""What all figures share: a backend that needs no display, PNG files, and an axis of lengths.

Import `plt` from here, not from matplotlib: the backend must be chosen before the first figure is made.
"""

import io
from collections.abc import Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws into files; a server has no display
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common.files import atomic_write

__all__ = ["plt", "save_figure", "use_length_axis", "use_log_values"]


def save_figure(figure: Figure, path: str | Path, dpi: int = 150) -> None:
    """Write a figure to a PNG file, whole or not at all, and close it.

    Args:
        figure: the figure.
        path: the file.
        dpi: dots per inch.
    """
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=dpi)
    plt.close(figure)
    atomic_write(path, image.getvalue())


def use_length_axis(axis: Axes, lengths: Iterable[int], label: str) -> None:
    """Make the x axis logarithmic, with a tick at each length.

    Args:
        axis: the axes.
        lengths: in tokens.
        label: of the x axis.
    """
    ticks = sorted(set(lengths))
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [f"{length:,}" for length in ticks])
    axis.set_xlabel(label)


def use_log_values(axis: Axes, base: int = 10) -> None:
    """Make the y axis logarithmic, with plain numbers (not powers) at its ticks."""
    axis.set_yscale("log", base=base)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
