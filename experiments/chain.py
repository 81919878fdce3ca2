"""In a deep product of weights a gradient step misses its first-order forecast; normalizing h mends it.

In `y = x w_1 ... w_l` the gradient tells how to change each weight while the others stand still, and then all are
changed at once: the change of y has terms up to order l. With `h = x w_1 ... w_(l-1)` batch-normalized, h_hat stays a
unit Gaussian under almost any change of the layers below, and `y = w_l h_hat` is learned as a linear function.

Protocol. Weights are drawn from four distributions (`SCALES`), x is a batch of unit Gaussians, the cost is the mean of
`x y`. One step of gradient descent: the true change of the cost against its first-order forecast, the second-order
term (a jvp of the gradient, through the library's batch norm) and the full expansion. A seed is a fresh set of draws;
every figure is the median over its draws, or a share of them, in float64. Then the lower weights are changed in every
way of `CHANGES`, and h and h_hat are looked at before and after, also in float32 with the library's default epsilon.
Trial runs on other draws had shown the orders of magnitude, and that an epsilon of 1e-100 is not negligible.

`python -m experiments run chain` takes about a minute on two cores.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jax import Array
from matplotlib.axes import Axes

from experiments.framework.claim import Claim, Compared, Least
from experiments.framework.experiment import WHY_FASTER, Experiment, Settings, Stage
from experiments.framework.pictures import COLORS, lines, panels
from experiments.framework.tables import table_of
from experiments.training import linear_chain
from experiments.training.linear_chain import LINEAR, NORMALIZED, OFF

EPSILONS = NEGLIGIBLE, DEFAULT = 1e-250, 1e-5  # the first only avoids dividing by zero, the second is the library's
PLAIN, ONCE, WITH_EPSILON, THROUGHOUT = "plain", "normalized", "normalized, eps 1e-5", "all normalized, eps 1e-5"
ARMS = {  # the kind of the lower layers, and that of the last one
    PLAIN: (LINEAR, LINEAR),
    ONCE: (LINEAR, NORMALIZED + EPSILONS.index(NEGLIGIBLE)),
    WITH_EPSILON: (LINEAR, NORMALIZED + EPSILONS.index(DEFAULT)),
    THROUGHOUT: (NORMALIZED + EPSILONS.index(DEFAULT), NORMALIZED + EPSILONS.index(DEFAULT)),
}
SCALES = {"around 0.9": (0.9, 0.1), "around 1.0": (1.0, 0.1), "around 1.1": (1.1, 0.1), "Gaussian": (0.0, 1.0)}
SHADES = {"around 0.9": "#f0a37c", "around 1.0": COLORS["plain"], "around 1.1": "#6b1f05", "Gaussian": "#8c8c8c"}
RATES = RATE, *_ = 1e-2, 1e-3, 1e-1  # the first is the one that the claims are judged at
WANTED = 0.1  # the book's other way to step: "to decrease y by .1" take the rate .1 / (g.g)
STEPS = MAIN, *_ = (*(f"rate {rate:g}" for rate in RATES), f"{WANTED:g} wanted")
SCAN = 10.0 ** np.arange(-7, 5.1, 0.5)  # where the largest usable rate is looked for
FAILS = 0.1  # a forecast further off than this share of itself is no use for choosing a rate
HOLDS = 0.01  # a forecast closer than this is right
CLOSE = 1e-3  # how close mean, variance and correlation of h_hat have to come to 0, 1 and +-1
ARITHMETIC = {"float64, epsilon 1e-250": (jnp.float64, NEGLIGIBLE), "float32, epsilon 1e-5": (jnp.float32, DEFAULT)}
EXACT, FLOAT32 = ARITHMETIC
SEEN = ["unit", "gaussian", "same", "opposite", "collapsed"]  # what h_hat is after a change
CHANGES = {  # (lower weights [layers - 1], their gradient in the plain chain, unit Gaussian noise) -> lower weights
    "none": lambda lower, gradient, noise: lower,
    "gradient step": lambda lower, gradient, noise: lower - RATE * gradient,
    "noise of 0.5 on each": lambda lower, gradient, noise: lower + 0.5 * noise,
    "all drawn anew": lambda lower, gradient, noise: noise,
    "one times a million": lambda lower, gradient, noise: lower.at[-1].multiply(1e6),
    "one over a million": lambda lower, gradient, noise: lower.at[-1].multiply(1e-6),
    "one sign flipped": lambda lower, gradient, noise: lower.at[-1].multiply(-1),
    "two signs flipped": lambda lower, gradient, noise: lower.at[-2:].multiply(-1),
    "one set to zero": lambda lower, gradient, noise: lower.at[-1].set(0),
}


@dataclass(frozen=True, kw_only=True)
class Sizes(Settings):
    """And the numbers of layers, how many chains are drawn, and the size of x's batch."""

    depths: tuple[int, ...]
    draws: int
    batch: int


def stages(settings: Sizes) -> Iterator[Stage]:
    """One stage per depth."""
    for depth in settings.depths:
        yield Stage(f"depth {depth}", partial(measured, settings, depth))


def measured(settings: Sizes, depth: int) -> xr.Dataset:
    """Everything about the chains of one depth: medians, quantiles and shares over the draws of each seed."""
    with jax.enable_x64(True):
        sizes = {"deepest": max(settings.depths), "draws": settings.draws, "batch": settings.batch}
        seeds = [jax.device_get(measure(depth, seed, **sizes)) for seed in settings.every_seed]
    steps, below = jax.tree.map(lambda *values: np.stack(values), *seeds)
    axes = ("seed", "arm", "scale", "draw", "step"), ("seed", "arithmetic", "scale", "draw", "change")
    step = xr.Dataset({name: (axes[0][: values.ndim], values) for name, values in steps.items()}).map(over_draws)
    state = xr.Dataset({name: (axes[1], values) for name, values in below.items()}).map(over_draws)
    state = state.assign_coords(change=list(CHANGES))
    state = state.where((state.change != "two signs flipped") | (depth > 2))  # of two layers one is a lower one
    names = {"arm": list(ARMS), "scale": list(SCALES), "step": list(STEPS), "arithmetic": list(ARITHMETIC)}
    return step.merge(state).assign_coords({**names, "seed": settings.every_seed, "depth": depth})


def over_draws(values: xr.DataArray) -> xr.DataArray:
    """The share of draws of which something is true; the median of a number and where 90% of the draws are."""
    if values.dtype == bool:
        return values.mean("draw")
    # A quantile that interpolates would be nan beside an infinity.
    low, high = (values.quantile(end, "draw", method="nearest", skipna=False) for end in (0.05, 0.95))
    median = values.median("draw", skipna=False).assign_coords(quantile=0.5)
    return xr.concat([low, median, high], "quantile")


@partial(jax.jit, static_argnames=("deepest", "draws", "batch"))
def measure(depth: int, seed: int, *, deepest: int, draws: int, batch: int) -> tuple[dict, dict]:
    """`measure_step` [arms, scales, draws, ...] and `measure_below` [arithmetics, scales, draws, changes].

    Every depth has its own draws, the same for every arm. One program serves all depths: the last `depth` layers of
    the deepest chain are active.
    """
    # The criteria were settled on trial runs, whose draws must not come again in the run that is judged.
    fresh = jax.random.fold_in(jax.random.key(seed), 871)
    keys = jax.random.split(jax.random.fold_in(fresh, depth), 3)
    shapes = [(len(SCALES), draws, size) for size in (deepest, deepest, batch)]
    unit, noise, x = (jax.random.normal(key, shape, jnp.float64) for key, shape in zip(keys, shapes, strict=True))
    mean, deviation = np.array(list(SCALES.values())).T[..., None, None]
    active, last = jnp.arange(deepest) >= deepest - depth, jnp.arange(deepest) == deepest - 1
    weights = jnp.where(active, mean + deviation * unit, 1)
    kinds = jnp.stack([jnp.where(active, jnp.where(last, top, lower), OFF) for lower, top in ARMS.values()])

    steps = jax.lax.map(lambda arm: jax.vmap(jax.vmap(partial(measure_step, arm)))(weights, x), kinds)
    below = [partial(measure_below, kinds[0], *how) for how in ARITHMETIC.values()]
    below = [jax.vmap(jax.vmap(function))(weights, noise, x) for function in below]
    return steps, jax.tree.map(lambda *values: jnp.stack(values), *below)


def measure_step(kinds: Array, weights: Array, x: Array) -> dict[str, Array]:
    """Everything that is asked about one step of one chain: [] or one value for each of STEPS."""

    def rates(slope: Array) -> Array:
        return jnp.concatenate([jnp.asarray(RATES), WANTED / slope[None], jnp.asarray(SCAN)])

    step = linear_chain.step(linear_chain.chain(kinds, EPSILONS), weights, x, rates)
    error = linear_chain.relative_error(step, step.forecast)
    return {
        "error": error[: len(STEPS)],
        "holds": error[: len(STEPS)] <= HOLDS,
        "corrected": linear_chain.relative_error(step, step.forecast + step.second_order)[: len(STEPS)],
        "delivered": (step.true / step.forecast)[: len(STEPS)],
        "second": jnp.abs(step.second_order / step.forecast)[0],
        "orders": linear_chain.orders_needed(weights, step.gradient, RATE, FAILS),
        "usable": largest_usable(error[len(STEPS) :]),
        "top": step.gradient[-1] ** 2 / jnp.sum(step.gradient**2),
    }


def largest_usable(error: Array) -> Array:
    """The largest rate of SCAN up to which every forecast is within FAILS; half a decade below SCAN if none is."""
    fine = jnp.append(error <= FAILS, False)  # an error that is not finite is not fine
    return jnp.asarray([SCAN[0] / 10**0.5, *SCAN])[jnp.argmin(fine)]


def measure_below(plain: Array, dtype: type, epsilon: float, weights: Array, noise: Array, x: Array) -> dict:
    """What h and h_hat are like after each of CHANGES, and against what they were before: all [changes]."""
    gradient = jax.grad(linear_chain.cost, argnums=1)(linear_chain.chain(plain), weights, x)
    changed = jnp.stack([change(weights[:-1], gradient[:-1], noise[:-1]) for change in CHANGES.values()])
    h = jax.vmap(linear_chain.chain(plain[:-1]), in_axes=(0, None))(changed.astype(dtype), x.astype(dtype))
    h_hat = jax.vmap(partial(linear_chain.standardize, epsilon=epsilon))(h)
    before = list(CHANGES).index("none")
    mean, var, agreement = jnp.mean(h_hat, axis=1), jnp.var(h_hat, axis=1), h_hat @ h_hat[before] / h_hat.shape[1]
    times = jnp.var(h, axis=1) / jnp.var(h[before])
    distance = jax.vmap(linear_chain.kolmogorov_distance)(h_hat)
    return {
        "var_h": jnp.var(h, axis=1).astype(jnp.float64),
        "var_h_hat": var.astype(jnp.float64),
        "unit": (jnp.abs(mean) <= CLOSE) & (jnp.abs(var - 1) <= CLOSE),
        "gaussian": distance <= linear_chain.kolmogorov_limit(x.shape[0]),
        "doubled": (times > 2) | (times < 0.5),
        "same": agreement >= 1 - CLOSE,
        "opposite": agreement <= CLOSE - 1,
        "collapsed": var <= CLOSE,
    }


def medians(r: xr.Dataset) -> xr.Dataset:
    """The medians over draws of the plain chain."""
    return r.sel(arm=PLAIN, quantile=0.5)


def growth(r: xr.Dataset, scale: str) -> xr.DataArray:
    """Factor per layer by which the second-order term grows over the forecast; its depth - 1 parts divided out."""
    second = medians(r).second.sel(scale=scale) / (r.depth - 1)
    return (second[{"depth": -1}] / second[{"depth": 0}]) ** (1 / (r.depth[-1] - r.depth[0]))


def holds(arm: str) -> Least:
    """Share of draws whose step does what was forecast."""
    return Least(lambda r: r.holds.sel(arm=arm, step=MAIN), "scale")


def unit(arithmetic: str) -> Least:
    """Share of draws whose h_hat is a unit Gaussian after a change, but for a weight of 0."""
    return Least(lambda r: r.unit.sel(arithmetic=arithmetic).drop_sel(change="one set to zero"), "scale")


def corners(r: xr.Dataset) -> xr.DataArray:
    """Share of draws in which h_hat does what it should after each change."""
    r = r.sel(arithmetic=EXACT)
    expected = {"one set to zero": r.collapsed, "one sign flipped": r.opposite, "two signs flipped": r.same}
    return xr.concat([expected.get(c, r.same + r.opposite).sel(change=[c]) for c in CHANGES], "change")


def by_depth(
    values: Callable[[xr.Dataset], xr.DataArray], ax: Axes, settings: Sizes, r: xr.Dataset, legend: bool, **look: object
) -> None:
    """A panel with the plain chains by their weights, and the normalized ones, all weights together."""
    how = {"x": "depth", "estimator": "median", "legend": legend}
    lines(ax, values(r).sel(arm=PLAIN), hue="scale", palette=SHADES, **how)
    lines(ax, values(r).sel(arm=ONCE), color=COLORS["batch norm"], linestyle="--", label="all, h normalized", **how)
    ax.set(xscale="log", xlabel="layers", **look)
    ax.set_xticks(settings.depths, map(str, settings.depths))
    ax.minorticks_off()
    if legend:
        ax.legend(title="weights", frameon=False)


def draw_variance(ax: Axes, settings: Sizes, r: xr.Dataset) -> None:
    """Variance of h after each change beside that of h_hat, in the deepest chain."""
    shown = r.sel(arithmetic=EXACT, scale="around 1.0", depth=r.depth[-1]).mean("seed")
    low, _, high = shown.var_h.transpose("quantile", "change").values
    places = np.arange(len(CHANGES))
    apart = low > 0  # a weight of 0 leaves nothing to draw on a logarithmic axis
    ax.hlines(places[apart], low[apart], high[apart], color=COLORS["plain"], linewidth=7, alpha=0.45, label="h")
    h_hat = shown.var_h_hat.sel(quantile=0.5).values
    ax.plot(h_hat[apart], places[apart], "o", color=COLORS["batch norm"], label="h normalized")
    ax.annotate("both are 0", (1, places[~apart][0]), ha="center", va="center")
    ax.set_yticks(places, CHANGES)
    ax.set(xscale="log", xlabel="variance", title="What the last weight sees after a change below")
    ax.set_ylim(len(CHANGES) - 0.4, -0.6)
    ax.legend(frameon=False)


share = partial(Claim, unit="share of draws", above=0.99)
per_layer = partial(Claim, unit="times per layer", above=1.05, ratio=True)
as_forecast = partial(share, measures=f"share of draws within {HOLDS:g} of the forecast change (rate {RATE:g})")
stays_unit = partial(share, measures=f"share of draws with mean 0 and variance 1 to {CLOSE:g}, after every change")

EXPERIMENT = Experiment(
    title="In a deep product of weights a gradient step misses its forecast; normalizing h mends it.",
    question="Does one gradient step on all layers do what its gradient forecasts?",
    source="Goodfellow, Bengio and Courville, Deep Learning, section 8.7.1",
    citation="Goodfellow, Bengio and Courville 2016, Deep Learning, section 8.7.1.",
    theme=WHY_FASTER,
    answer={
        "cpu": "Not in a deep chain of plain linear layers, where all weights change at once: with 50 layers of"
        " weights around 1.1 a step at rate 0.01 delivered 2.5% of what its gradient had forecast. With the last"
        " layer's input normalized it delivered all of it at any depth, as long as epsilon was negligible beside the"
        " variance that was divided by.",
    },
    surprise="The Deep Learning book says that without normalization nearly every update has an extreme effect on the"
    " statistics of a deep layer. In our linear chains a step at rate 0.01 doubled or halved the variance in 11% of"
    " the draws, nearly all of them chains of 20 or 50 layers with weights around 1 or 1.1.",
    reader_questions={
        "Why does a gradient step not do what the gradient says?": "The gradient says what each weight does while all"
        " others stand still, and then all are changed at once. In our product of 50 weights around 1.1 the"
        " second-order term alone was 20 times the forecast, and a step at rate 0.01 delivered 2.5% of it.",
        "Can batch norm's epsilon be too large?": "Yes, beside a small variance. Where weights around 0.9 let the"
        " signal of our linear chain die out over 50 layers, the default of 1e-5 was half the variance, and with the"
        " last layer's input normalized a step did what was forecast in 20% of the draws only.",
    },
    settings={
        "smoke": Sizes(seeds=2, depths=(2, 10), draws=40, batch=64),
        "cpu": Sizes(seeds=5, depths=(2, 3, 5, 10, 20, 50), draws=200, batch=128),
        "full": Sizes(seeds=20, depths=(2, 3, 4, 5, 7, 10, 15, 20, 25, 30, 40, 50), draws=500, batch=256),
    },
    stages=stages,
    claims=[
        Claim(
            "In a deep chain a gradient step does not do what its first-order forecast says.",
            lambda r: medians(r).error.sel(scale="around 1.0", step=MAIN)[{"depth": [0, -1]}].diff("depth"),
            measures=f"|true - forecast| / |forecast|, deepest chain minus shallowest; weights around 1, rate {RATE:g}",
            unit="relative error", above=FAILS,
            standalone="In a deep chain of linear units a gradient step does not do what its first-order forecast"
            " says.",
        ),
        per_layer(
            "Where weights exceed 1 the second-order term grows exponentially with depth.",
            lambda r: growth(r, "around 1.1"),
            measures="growth per layer of |second-order term / forecast| / number of terms (1.1 is expected)",
            standalone="Where the weights of a deep linear chain exceed 1, the second-order term of a gradient step"
            " grows exponentially with depth.",
        ),
        per_layer(
            "Where weights are below 1 the second-order term dies out exponentially.",
            lambda r: 1 / growth(r, "around 0.9"),
            measures="shrinking per layer, measured likewise (1 / 0.9 = 1.11 is expected)",
            standalone="Where the weights of a deep linear chain are below 1, the second-order term of a gradient step"
            " dies out exponentially.",
        ),
        Claim(
            "A second-order method would not be enough: still higher orders matter.",
            lambda r: medians(r).orders[{"depth": -1}].sel(scale="around 1.1"),
            measures="the lowest order whose partial sums, and all later ones, come within"
            f" {FAILS:g} of the true change, weights around 1.1, deepest chain, rate {RATE:g}",
            unit="orders", above=2,
            standalone="For a deep linear chain a second-order method would not be enough: still higher orders matter.",
        ),
        Claim(
            "The weights decide which learning rate is usable.",
            Compared(lambda r: medians(r).usable[{"depth": -1}], "around 0.9", "around 1.1", "scale", ratio=True),
            measures=f"the largest rate whose forecast is within {FAILS:g}, deepest chain",
            unit="times the rate", above=100,
            standalone="In a deep linear chain the weights decide which learning rate is usable.",
        ),
        as_forecast(
            "With h normalized, a gradient step does what was forecast, at any depth.", holds(ONCE),
            standalone="With the last layer's input normalized, a gradient step on a linear chain does what was"
            " forecast, at any depth.",
        ),
        as_forecast(
            f"The same with the library's default epsilon, {DEFAULT:g}.", holds(WITH_EPSILON),
            standalone="With the last layer's input normalized and the default epsilon of 1e-5, a gradient step on a"
            " linear chain does what was forecast, at any depth.",
        ),
        as_forecast(
            "The same with the default epsilon and every layer normalized.", holds(THROUGHOUT),
            standalone="With every layer normalized and the default epsilon of 1e-5, a gradient step on a linear chain"
            " does what was forecast, at any depth.",
        ),
        Claim(
            "Under the normalization nothing is left to learn: y = w_l h_hat, and all of the gradient is that of w_l.",
            Least(lambda r: r.top.sel(arm=ONCE, quantile=0.5), "scale"),
            measures="share of w_l in the squared gradient", unit="share of the squared gradient", above=0.999,
            standalone="In a linear chain nothing is left to learn below a normalized layer: all of the gradient is"
            " that of the last weight.",
        ),
        stays_unit(
            "h_hat stays a unit Gaussian whatever happens below, short of a weight of 0.", unit(EXACT),
            standalone="In a linear chain the normalized input of the last layer stays a unit Gaussian whatever"
            " happens below, short of a weight of 0.",
        ),
        stays_unit(
            f"The same in float32 with the default epsilon, {DEFAULT:g}.", unit(FLOAT32),
            standalone="In a linear chain the normalized input of the last layer stays a unit Gaussian whatever"
            " happens below, in float32 with the default epsilon of 1e-5 too.",
        ),
        Claim(
            "Without normalization nearly every update has an extreme effect on the statistics of h.",
            lambda r: r.doubled.sel(arithmetic=EXACT, change="gradient step"),
            measures=f"share of draws in which a step at rate {RATE:g} doubles or halves the variance of h",
            unit="share of draws", above=0.9,
            standalone="Without normalization nearly every update of a linear chain has an extreme effect on the"
            " statistics of the last layer's input.",
        ),
        share(
            "The lower layers have an effect in corner cases only: a weight of 0, or an odd number of signs flipped.",
            Least(corners, "change"),
            measures="share of draws in which h_hat is 0 with a weight of 0, turns with one sign, else stays or turns",
            standalone="Below a normalized layer of a linear chain the lower layers have an effect in corner cases"
            " only: a weight of 0, or an odd number of signs flipped.",
        ),
    ],
    tables=[
        table_of(
            f"One gradient step at rate {RATE:g}: |true change - forecast| / |forecast|, by depth",
            lambda r: r.error.sel(arm=[PLAIN, ONCE], step=MAIN, quantile=0.5),
            rows=["arm", "scale"], columns="depth", form=".2g",
            note="Medians over draws. 0 is no difference beyond the rounding of float64.",
        ),
        table_of(
            "The deepest plain chain: one step against its expansion",
            lambda r: medians(r)[["delivered", "error", "corrected"]].isel(depth=-1).to_dataarray("figure"),
            rows=["scale", "step"], columns="figure", form=".2g",
            note="True change over forecast; relative error of the forecast without and with the second-order term;"
            f" – is beyond float64. '{WANTED:g} wanted': the rate {WANTED:g} / g.g.",
        ),
        table_of(
            "What the last weight sees after a change of the layers below: shares of draws",
            lambda r: r[SEEN].sel(arithmetic=EXACT).mean(["depth", "scale"]).to_dataarray("h_hat"),
            rows=["change"], columns="h_hat", form=".1%",
            note="All depths and weights, epsilon negligible; 95% of samples of a Gaussian pass for one.",
        ),
        table_of(
            f"Draws whose true change is within {HOLDS:g} of the forecast (rate {RATE:g}), by depth",
            lambda r: r.holds.sel(arm=[WITH_EPSILON, THROUGHOUT], step=MAIN),
            rows=["arm", "scale"], columns="depth", form=".1%",
            note="The lower weights get a gradient where the variance that is normalized comes down to epsilon.",
        ),
    ],
    pictures=[
        panels(
            partial(
                by_depth, lambda r: r.delivered.sel(step=MAIN, quantile=0.5), legend=True, ylim=(0, 1.1),
                title=f"One step at rate {RATE:g}: 1 = as forecast", ylabel="true change / forecast change",
            ),
            partial(
                by_depth, lambda r: r.usable.mean("seed"), legend=False, yscale="log", ylabel="learning rate",
                title=f"Largest rate with a forecast within {FAILS:.0%}",
            ),
            draw_variance, file="chain.png",
            title="Does one gradient step on all layers do what its gradient forecasts?",
            caption="A chain of one linear unit per layer; blue: h normalized. Left: the share of the forecast change"
            " that one step delivers. Middle: the largest learning rate whose forecast can be trusted, and the range of"
            " 90% of the draws. Right: the variance that the last weight sees after the layers below were changed.",
        )
    ],
)  # fmt: skip
