"""Pictures from arrays with named axes: seaborn's, in one look."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # pictures go to files; a display may not exist
import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from experiments.framework.experiment import Drawn

# Told apart by the colour-blind and, by their brightness, in print. Others take seaborn's "colorblind" in turn.
COLORS = {"plain": "#c1440e", "batch norm": "#1f5fa8"}
LOOK = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}


def palette(arms: Sequence[Any]) -> dict[Any, str]:
    """A colour for each arm: that of COLORS, else one of its own."""
    free = iter([color for color in sns.color_palette("colorblind", 12).as_hex() if color not in COLORS.values()])
    return {arm: COLORS.get(arm) or next(free) for arm in arms}


def curves(
    values: Callable[[xr.Dataset], xr.DataArray],
    *,
    title: str,
    labels: Mapping[str, str],
    caption: str = "",
    file: str = "curves.png",
    x: str = "step",
    hue: str = "arm",
    row: str | None = None,
    col: str | None = None,
    dotted: xr.DataArray | None = None,
    logx: bool = False,
    logy: bool = False,
    ylim: tuple[float, float] | None = None,
    height: float = 2.6,
    **options: Any,
) -> Callable[[Any, xr.Dataset], Drawn]:
    """Means over seeds along `x` as lines, their range over seeds as bands; a panel for each value of row and col.

    Args:
      values: values(results) -> array with the axes x, hue, row, col and "seed", and a name.
      title: the question that the picture answers.
      labels: {name of the array or of an axis: what to write, with the unit}.
      caption: what is to be seen beyond lines and bands; stands under the picture, as text.
      file: name of the PNG.
      x: the axis along which lines go.
      hue: the axis whose values have colours.
      row: the axis whose values have rows of panels.
      col: as row, columns.
      dotted: figures over hue, row and col that are drawn as dotted horizontal lines: the published ones.
      logx: a logarithmic axis for x.
      logy: for the values.
      ylim: the range of values that is shown.
      height: of a panel, inches.
      **options: for `seaborn.relplot`.

    Returns:
      picture(settings, results) -> Drawn, as an Experiment wants it.
    """

    def picture(settings: Any, results: xr.Dataset) -> Drawn:
        array = values(results)
        grid = _relplot(array, x, hue, row, col, height=height, **options)
        for at, ax in _panels(grid, [axis for axis in (row, col) if axis]):
            ax.set_title(", ".join(v if isinstance(v, str) else f"{labels.get(n, n)} {v:g}" for n, v in at.items()))
            if dotted is not None:
                _dotted(ax, dotted.sel(at), hue, array[hue].values)
        grid.set(**({"xscale": "log"} if logx else {}), **({"yscale": "log"} if logy else {}), ylim=ylim)
        grid.set_axis_labels(labels.get(x, x), labels.get(str(array.name), str(array.name)))
        _legend(grid, labels.get(hue, ""))
        seeds = f"Line: mean of {settings.seeds} seeds; band: their range." if settings.seeds > 1 else "One seed."
        theirs = " Dotted: published." if dotted is not None else ""
        words = f"{seeds}{theirs} {caption}{f' Data: {settings.data}.' if settings.data else ''}"
        return finish(grid.figure, file, title, words)

    return picture


def _relplot(array, x, hue, row, col, **options):
    arms = list(array[hue].values)
    shown = dict(hue=hue, hue_order=arms, style=hue, style_order=arms, palette=palette(arms), row=row, col=col)
    with plt.rc_context(LOOK):
        frame = array.to_dataframe().reset_index()
        return sns.relplot(
            frame, kind="line", x=x, y=str(array.name), errorbar=("pi", 100), aspect=1.35, **shown, **options
        )


def _legend(grid, title):
    """Right of the panels, where it covers nothing."""
    if grid.legend:
        handles, words = grid.legend.legend_handles, [text.get_text() for text in grid.legend.get_texts()]
        grid.legend.remove()
        grid.figure.legend(handles, words, title=title, loc="outside right center", frameon=False)


def _panels(grid, names):
    if not names:
        return [({}, grid.ax)]
    places = grid.axes_dict.items()
    return [(dict(zip(names, p if isinstance(p, tuple) else (p,), strict=True)), ax) for p, ax in places]


def _dotted(ax, values, hue, arms):
    colors = palette(list(arms))
    for arm in arms:
        if arm in values[hue].values and np.isfinite(value := float(values.sel({hue: arm}))):
            ax.axhline(value, color=colors[arm], linestyle=":", linewidth=1.2)


def figure(rows: int = 1, columns: int = 1, *, size: tuple[float, float]) -> tuple[Figure, np.ndarray]:
    """An empty figure and its axes as [rows, columns]; `size` of one panel in inches. For what seaborn has not."""
    with plt.rc_context(LOOK):
        return plt.subplots(rows, columns, figsize=(size[0] * columns, size[1] * rows + 0.8), squeeze=False)


def lines(ax: Axes, array: xr.DataArray, x: str, **options: Any) -> None:
    """Lines along the axis `x` in one panel: means over the axes that are not drawn, their range as a band.

    Args:
      ax: the panel.
      array: with the axis x, and a name.
      x: the axis along which lines go.
      **options: for `seaborn.lineplot`, such as `hue`, the axis whose values have colours, and their `palette`.
    """
    frame = array.to_dataframe().reset_index()
    sns.lineplot(frame, x=x, y=str(array.name), **{"errorbar": ("pi", 100), "ax": ax, **options})


def dots(ax: Axes, array: xr.DataArray, y: str, colors: Mapping[Any, str]) -> None:
    """A line for each value of the axis `y` in one panel: every seed as a dot, their mean as a bar with its number.

    Args:
      ax: the panel.
      array: with the axes y and "seed".
      y: the axis whose values stand one below the other.
      colors: {value of y: its colour}.
    """
    for place, name in enumerate(array[y].values):
        values = array.sel({y: name}).values
        ax.plot(values, np.full(len(values), place), "o", color=colors[name], alpha=0.35, markersize=5)
        ax.plot(values.mean(), place, "|", color=colors[name], markersize=16, markeredgewidth=2.5)
        ax.annotate(f"{values.mean():.3f}", (values.mean(), place - 0.24), ha="center", va="bottom", color=colors[name])
    ax.set_yticks(range(array.sizes[y]), array[y].values)
    ax.set_ylim(array.sizes[y] - 0.5, -0.75)


def panels(
    *draw: Callable[[Axes, Any, xr.Dataset], None],
    title: str,
    caption: str,
    file: str,
    size: tuple[float, float] = (5.0, 4.2),
) -> Callable[[Any, xr.Dataset], Drawn]:
    """Panels side by side that show different things.

    Args:
      *draw: draw(ax, settings, results) fills one panel, with its labels and its title.
      title: the question that the picture answers.
      caption: what is to be seen; stands under the picture, as text.
      file: name of the PNG.
      size: of a panel in inches.

    Returns:
      picture(settings, results) -> Drawn, as an Experiment wants it.
    """

    def picture(settings: Any, results: xr.Dataset) -> Drawn:
        drawn, axes = figure(1, len(draw), size=size)
        for one, ax in zip(draw, axes[0], strict=True):
            one(ax, settings, results)
        return finish(drawn, file, title, caption)

    return picture


def finish(drawn: Figure, file: str, title: str, caption: str) -> Drawn:
    """Put the question above a figure, in lines that fit the width; the caption goes with it, as text."""
    lines = textwrap.wrap(title, int(drawn.get_size_inches()[0] * 8))
    drawn.suptitle("\n".join(lines), fontsize=13, fontweight="bold", x=0.02, ha="left")
    drawn.set_layout_engine("constrained")
    return Drawn(file, drawn, caption, title)


def save(drawn: Drawn, directory: Path) -> None:
    """Write a picture as a PNG and close its figure."""
    write_png(drawn.figure, directory / drawn.file)


def write_png(drawn: Figure, path: Path, **options: Any) -> None:
    """Write a figure in 256 colours, a third of the bytes of a PNG of all colours, and close it."""
    whole = BytesIO()
    # No software version or date inside: the same rows give the same bytes.
    drawn.savefig(whole, format="png", dpi=110, metadata={"Software": None}, **options)
    plt.close(drawn)
    # The 256 that leave no colour far away, moved to where pixels are: a median cut loses colours of thin lines.
    choice = {"method": Image.Quantize.MAXCOVERAGE, "kmeans": 1, "dither": Image.Dither.NONE}
    few = Image.open(whole).convert("RGB").quantize(256, **choice)
    few.save(path, "PNG", optimize=True)
