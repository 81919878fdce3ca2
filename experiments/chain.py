"""In a deep product of weights a gradient step misses its first-order forecast; normalizing h mends it.

Source: Goodfellow, Bengio and Courville, Deep Learning, section 8.7.1. In `y = x w_1 ... w_l` the gradient tells how
to change each weight while the others stand still, and then all are changed at once. The change of the output has
terms up to order l, such as `r^2 g_1 g_2 prod_(i>=3) w_i`: negligible or exponentially large, as the weights will
have it. With `h = x w_1 ... w_(l-1)` batch-normalized, h_hat stays a unit Gaussian under almost any change of the
layers below, and `y = w_l h_hat` is learned as a linear function.

Protocol. Weights are drawn from four distributions (`SCALES`), x is a batch of unit Gaussians, the cost is the mean
of `x y` (`linear_chain.cost` says why). One step of plain gradient descent; the true change of the cost against the
first-order forecast, the second-order term (a jvp of the gradient, through the library's batch norm) and the full
expansion. A seed is a fresh set of draws; every figure is the median over the draws of a seed, with its interval over
seeds, unless it says otherwise. In float64, because changes far below the cost itself are measured. Then the lower
weights are changed in every way of `CHANGES`, and h and h_hat are looked at before and after, also in float32 with
the library's default epsilon. `chain_rows` measures, `linear_chain` has the mathematics.

The criteria stood before the committed run. Trial runs on other draws had shown the orders of magnitude, and that an
epsilon of 1e-100 is not negligible in the deepest chains; with it, the claim that h_hat stays a unit Gaussian failed.

    python -m experiments run chain --preset cpu

takes about two minutes on two busy cores, half of it compilation. Expected: with weights around 1.1, one step at rate
0.01 does what was forecast for few layers and something else for fifty; after normalization it does what was forecast
everywhere, as long as the variance of h is far above epsilon.
"""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from matplotlib.axes import Axes

from experiments import chain_rows
from experiments.chain_judge import EXACT, FLOAT32, MAIN, NORMALIZED, PLAIN, judge, percent, pick
from experiments.chain_rows import ARITHMETIC, ARMS, CHANGES, FAILS, HOLDS, MAIN_RATE, RATES, SCALES, SCAN, WANTED
from experiments.errors import UserError
from experiments.framework import plots
from experiments.framework.record import Record
from experiments.framework.tables import Table
from experiments.framework.verdict import interval

__all__ = ["PRESETS", "SOURCE", "draw", "judge", "run", "tabulate"]

SOURCE = "Goodfellow, Bengio and Courville, Deep Learning, section 8.7.1"

EVERYTHING = {"arms": list(ARMS), "arithmetics": list(ARITHMETIC)}
PRESETS = {
    # Nearly all of its time is compilation, so it leaves out what differs from the rest by a constant only.
    "smoke": {
        "seeds": 2,
        "depths": [2, 10],
        "draws": 40,
        "batch": 64,
        "arms": [PLAIN, NORMALIZED],
        "arithmetics": [EXACT],
    },
    "cpu": {"seeds": 5, "depths": [2, 3, 5, 10, 20, 50], "draws": 200, "batch": 128, **EVERYTHING},
    "full": {
        "seeds": 20,
        "depths": [2, 3, 4, 5, 7, 10, 15, 20, 25, 30, 40, 50],
        "draws": 500,
        "batch": 256,
        **EVERYTHING,
    },
}

STEPS = [*(f"rate {rate:g}" for rate in RATES), f"{WANTED:g} wanted"]


def run(settings: dict, record: Record, track: Callable[[str, int, int], None]) -> None:
    """Measure depth after depth; a stage holds the rows of one depth."""
    depths = settings["depths"]
    if len(depths) < 2 or min(depths) < 2 or list(depths) != sorted(set(depths)):
        raise UserError(f"depths={depths}; expected at least two different depths from 2 up, in rising order")
    with jax.enable_x64(True):
        for number, depth in enumerate(depths):
            if not record.is_done(f"depth {depth}"):
                rows = [*chain_rows.step_rows(settings, depth), *chain_rows.below_rows(settings, depth)]
                record.finish(f"depth {depth}", rows=rows)
            track("chain", number + 1, len(depths))


def tabulate(settings: dict, rows: list[dict]) -> list[Table]:
    """Forecasts by depth; the deepest plain chain closely; learning rates; h_hat after changes; epsilon."""
    functions = [table_errors, table_orders, table_rates, table_changes]
    functions += [table_holds] if len(settings["arms"]) > 2 else []
    functions += [table_epsilon] if FLOAT32 in settings["arithmetics"] else []
    return [function(settings, rows) for function in functions]


def table_errors(settings: dict, rows: list[dict]) -> Table:
    """How far the true change is from the forecast, by arm, weights and depth."""
    lines = [
        [f"{arm}, {scale}", *(with_interval(error[MAIN]) for error in pick(rows, "error", arm=arm, scale=scale))]
        for arm in (PLAIN, NORMALIZED)
        for scale in SCALES
    ]
    return Table(
        f"One gradient step at rate {MAIN_RATE:g}: |true change - forecast| / |forecast|, by depth",
        ["arm, weights", *map(str, settings["depths"])],
        lines,
        f"Median over {settings['draws']} draws: mean and 95% interval over {settings['seeds']} seeds."
        " 0 is no difference beyond the rounding of float64.",
    )


def table_orders(settings: dict, rows: list[dict]) -> Table:
    """The deepest plain chain under every step: what is delivered, and what higher orders explain."""
    deep = settings["depths"][-1]
    lines = []
    for scale in SCALES:
        names = ("delivered", "error", "corrected")
        delivered, error, corrected = (
            pick(rows, name, arm=PLAIN, scale=scale, depth=deep)[0].mean(axis=-1) for name in names
        )
        for number, step in enumerate(STEPS):
            figures = [figure_or_overflow(column[number]) for column in (delivered, error, corrected)]
            needed = pick(rows, "orders", arm=PLAIN, scale=scale, depth=deep).mean()
            lines.append([f"{scale}, {step}", *figures, f"{needed:.0f}" if number == MAIN else ""])
    return Table(
        f"The plain chain of {deep} layers: one step against its expansion",
        ["weights, step", "true / forecast", "error", "error with second order", "orders needed"],
        lines,
        f"Medians over draws, mean over seeds. '{WANTED:g} wanted': the rate {WANTED:g} / g.g, forecast to lower the"
        f" cost by {WANTED:g}: as good as the output is large beside {WANTED:g}. Orders needed: the"
        f" terms that come within {FAILS:g} of the true change.",
    )


def table_rates(settings: dict, rows: list[dict]) -> Table:
    """The largest learning rate that still does what is forecast."""

    def cell(row: dict) -> str:
        low, middle, high = (np.mean(row[name]) for name in ("usable_low", "usable", "usable_high"))
        return f"{middle:.1g} ({low:.1g} to {high:.1g})" if low < SCAN[-1] else "any"

    lines = [
        [f"{arm}, {scale}", *(cell(row) for row in rows if (row.get("arm"), row["scale"]) == (arm, scale))]
        for arm in (PLAIN, NORMALIZED)
        for scale in SCALES
    ]
    return Table(
        f"The largest learning rate whose forecast is within {FAILS:g}, by depth",
        ["arm, weights", *map(str, settings["depths"])],
        lines,
        f"Median (5% to 95% of the draws), mean over seeds; two rates a decade from {SCAN[0]:.0e} to {SCAN[-1]:.0e}"
        " were tried; 'any': all of them, which a cost linear in y allows: it bends with nothing but the weights.",
    )


def table_changes(settings: dict, rows: list[dict]) -> Table:
    """H and h_hat after each change of the layers below."""
    shares = ("unit", "gaussian", "same", "opposite", "collapsed")
    lines = []
    for change in CHANGES:
        cells = {
            name: pick(rows, name, arithmetic=EXACT, change=change) for name in (*shares, "var_h_low", "var_h_high")
        }
        spread = f"{cells['var_h_low'].min():.0e} to {cells['var_h_high'].max():.0e}"
        lines.append([change, spread, *(percent(cells[name]) for name in shares)])
    return Table(
        "What the last weight sees after a change of the layers below",
        [
            "change",
            "variance of h",
            "mean 0, variance 1",
            "passes for Gaussian",
            "as before",
            "sign turned",
            "constant",
        ],
        lines,
        "All depths and weights, float64, epsilon negligible. Variance of h: 5% to 95% of the draws, at the depth and"
        " weights where either is most extreme. The rest are shares of draws and describe h_hat; 95% of samples of a"
        " Gaussian pass for one.",
    )


def table_holds(settings: dict, rows: list[dict]) -> Table:
    """Where the library's epsilon spoils the forecast."""
    lines = [
        [f"{arm}, {scale}", *(percent(holds[MAIN]) for holds in pick(rows, "holds", arm=arm, scale=scale))]
        for arm in settings["arms"][2:]
        for scale in SCALES
    ]
    return Table(
        f"Draws whose true change is within {HOLDS:g} of the forecast (rate {MAIN_RATE:g}), by depth",
        ["arm, weights", *map(str, settings["depths"])],
        lines,
        "The lower weights get a gradient where the variance that is normalized comes down to epsilon; one Gaussian"
        " weight of 0.05 does that even where every layer is normalized.",
    )


def table_epsilon(settings: dict, rows: list[dict]) -> Table:
    """Where the library's epsilon in float32 is felt."""
    lines = [
        [scale, *map(percent, pick(rows, "unit", arithmetic=FLOAT32, scale=scale, change="none"))] for scale in SCALES
    ]
    return Table(
        f"Draws whose h_hat has mean 0 and variance 1, in {FLOAT32}, by depth",
        ["weights", *map(str, settings["depths"])],
        lines,
        f"To {chain_rows.CLOSE:g}, before any change. The others have an h whose variance is not far above epsilon.",
    )


def with_interval(values: np.ndarray) -> str:
    """Mean over seeds and the half-width of its 95% interval."""
    found = interval(values)
    return f"{found.mean:.2g} ± {found.high - found.mean:.1g}" if found.mean else "0"


def figure_or_overflow(value: float) -> str:
    """Two digits, or a word where float64 did not reach."""
    return f"{value:.2g}" if np.isfinite(value) else "overflow"


SHADES = {"around 0.9": "#f0a37c", "around 1.0": plots.COLORS["plain"], "around 1.1": "#6b1f05", "Gaussian": "#8c8c8c"}


def draw(settings: dict, rows: list[dict], directory: Path) -> list[plots.Picture]:
    """One picture: what a step delivers, which rates are usable, what the last weight sees."""
    drawn, axes = plots.figure(
        "Does one gradient step on all layers do what its gradient forecasts?", 1, 3, size=(5.0, 4.2)
    )
    draw_delivered(axes[0, 0], settings, rows)
    draw_usable(axes[0, 1], settings, rows)
    for ax in axes[0, :2]:
        ax.set_xscale("log")
        ax.set_xticks(settings["depths"], settings["depths"])
        ax.minorticks_off()
    draw_variance(axes[0, 2], settings, rows)
    caption = (
        "A chain of one linear unit per layer. Left: the share of the forecast change that one step delivers. Middle:"
        " the largest learning rate whose forecast can be trusted, with the range of 90% of the draws. Right: the"
        " variance that the last weight sees after the layers below were changed. Blue: h batch-normalized, epsilon"
        " negligible."
    )
    return [plots.save(drawn, directory, "chain.png", caption)]


def draw_delivered(ax: Axes, settings: dict, rows: list[dict]) -> None:
    """True change over forecast against depth."""
    depths = settings["depths"]
    for scale, color in SHADES.items():
        delivered = pick(rows, "delivered", arm=PLAIN, scale=scale)[:, MAIN].T
        plots.band(ax, depths, delivered, label=f"plain, weights {scale}", color=color)
    every = pick(rows, "delivered", arm=NORMALIZED)[:, MAIN].reshape(len(depths), -1).T
    label = "h normalized, all weights"
    plots.band(ax, depths, every, label=label, color=plots.COLORS["batch norm"], style="--")
    ax.set(
        xlabel="layers",
        ylabel="true change / forecast change",
        title=f"One step at rate {MAIN_RATE:g}: 1 = as forecast",
    )
    ax.set_ylim(0, 1.1)
    ax.legend(frameon=False, fontsize=8, loc="lower left")


def draw_usable(ax: Axes, settings: dict, rows: list[dict]) -> None:
    """Largest usable learning rate against depth."""
    depths = settings["depths"]
    for scale, color in SHADES.items():
        low, middle, high = (
            pick(rows, name, arm=PLAIN, scale=scale).mean(axis=1) for name in ("usable_low", "usable", "usable_high")
        )
        ax.fill_between(depths, low, high, color=color, alpha=0.18, linewidth=0)
        ax.plot(depths, middle, color=color, linewidth=1.8)
    lowest = pick(rows, "usable_low", arm=NORMALIZED).reshape(len(depths), -1).min(axis=1)
    ax.plot(depths, lowest, "--", color=plots.COLORS["batch norm"], linewidth=1.8)
    ax.annotate(
        "h normalized: every rate tried",
        (depths[0], lowest[0]),
        (0, -12),
        textcoords="offset points",
        fontsize=8,
        color=plots.COLORS["batch norm"],
    )
    ax.set(
        xlabel="layers", ylabel="learning rate", yscale="log", title=f"Largest rate with a forecast within {FAILS:.0%}"
    )


def draw_variance(ax: Axes, settings: dict, rows: list[dict]) -> None:
    """Variance of h after each change, beside that of h_hat."""
    deep, shown = settings["depths"][-1], list(reversed(CHANGES))
    names = ("var_h_low", "var_h_high", "worst_var")
    labels = {"arithmetic": EXACT, "scale": "around 1.0", "depth": deep}
    cells = [[pick(rows, name, change=change, **labels).mean() for name in names] for change in shown]
    low, high, worst = np.array(cells).T
    apart = low > 0  # a weight of 0 leaves nothing to draw on a logarithmic axis
    places = np.arange(len(shown))
    ax.hlines(places[apart], low[apart], high[apart], color=SHADES["around 1.0"], linewidth=7, alpha=0.45, label="h")
    ax.plot(1 + worst[apart], places[apart], "o", color=plots.COLORS["batch norm"], label="h normalized")
    for place in places[~apart]:
        ax.annotate("both are 0", (1, place), ha="center", va="center", fontsize=8)
    ax.set_yticks(places, shown, fontsize=8)
    ax.set(xscale="log", xlabel="variance (weights around 1.0, 90% of the draws)")
    ax.set_ylim(-0.6, len(shown) - 0.4)
    ax.set_title("What the last weight sees after a change below")
    ax.legend(frameon=False, fontsize=8, loc="upper left")
