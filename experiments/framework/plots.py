"""What the pictures share: colours, a curve with its band over seeds, and saving."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np

matplotlib.use("Agg")  # pictures go to files; a display may not exist
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLORS = {"plain": "#c1440e", "batch norm": "#1f5fa8"}


class Picture(NamedTuple):
    """A file in the run's directory and what it shows."""

    file: str
    caption: str


def figure(title: str, rows: int = 1, columns: int = 1, *, size: tuple[float, float]) -> tuple[Figure, np.ndarray]:
    """A figure whose title states the question, and its axes as [rows, columns]; `size` in inches of one panel."""
    drawn, axes = plt.subplots(
        rows, columns, figsize=(size[0] * columns, size[1] * rows + 0.6), squeeze=False, layout="constrained"
    )
    drawn.suptitle(title, fontsize=13, fontweight="bold")
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    return drawn, axes


def band(ax: Axes, x: Sequence[float], values: np.ndarray, *, label: str, color: str, style: str = "-") -> None:
    """Draw the mean over seeds of `values` [seeds, points] as a curve, and the range over seeds as a band."""
    values = np.asarray(values, np.float64)
    ax.fill_between(x, values.min(axis=0), values.max(axis=0), color=color, alpha=0.18, linewidth=0)
    ax.plot(x, values.mean(axis=0), style, color=color, label=label, linewidth=1.8)


def save(drawn: Figure, directory: Path, file: str, caption: str) -> Picture:
    """Write the figure as a PNG and close it."""
    # No software version or date inside: the same rows give the same bytes.
    drawn.savefig(directory / file, dpi=110, metadata={"Software": None})
    plt.close(drawn)
    return Picture(file, caption)
