"""The measurements of the experiment `chain`: what is drawn, what is done to it, and one row per cell."""

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments import linear_chain

SCALES = {"around 0.9": (0.9, 0.1), "around 1.0": (1.0, 0.1), "around 1.1": (1.1, 0.1), "Gaussian": (0.0, 1.0)}

# The book's batch norm has a "small positive value" under the square root to avoid dividing by zero: so small that it
# does nothing else is one arm, the library's default the others. In a trial run 1e-100 was not small enough: a step
# at depth 50 with weights around 1.1 takes the variance of h below it.
NEGLIGIBLE = 1e-250
DEFAULT = 1e-5

ARMS = {
    "plain": linear_chain.plain,
    "normalized": linear_chain.normalized(NEGLIGIBLE),
    "normalized, eps 1e-5": linear_chain.normalized(DEFAULT),
    "all normalized, eps 1e-5": linear_chain.normalized_throughout(DEFAULT),
}

RATES = [1e-3, 1e-2, 1e-1]  # the middle one is what the claims are judged at
MAIN_RATE = 1e-2
WANTED = 0.1  # the book's other way to step: "to decrease y by .1" take the rate .1 / (g.g)
SCAN = 10.0 ** np.arange(-7, 5.1, 0.5)  # where the largest usable rate is looked for
FAILS = 0.1  # a forecast further off than this share of itself is no use for choosing a rate
HOLDS = 0.01  # a forecast closer than this is right
CLOSE = 1e-3  # how close mean, variance and correlation of h_hat have to come to 0, 1 and +-1

ARITHMETIC = {"float64, epsilon 1e-250": (jnp.float64, NEGLIGIBLE), "float32, epsilon 1e-5": (jnp.float32, DEFAULT)}


# (lower weights [layers - 1], their gradient in the plain chain, unit Gaussian noise) -> lower weights
CHANGES = {
    "none": lambda lower, gradient, noise: lower,
    "gradient step": lambda lower, gradient, noise: lower - MAIN_RATE * gradient,
    "noise of 0.5 on each": lambda lower, gradient, noise: lower + 0.5 * noise,
    "all drawn anew": lambda lower, gradient, noise: noise,
    "one times a million": lambda lower, gradient, noise: lower.at[-1].multiply(1e6),
    "one over a million": lambda lower, gradient, noise: lower.at[-1].multiply(1e-6),
    "one sign flipped": lambda lower, gradient, noise: lower.at[-1].multiply(-1),
    "two signs flipped": lambda lower, gradient, noise: lower.at[-2:].multiply(-1),
    "one set to zero": lambda lower, gradient, noise: lower.at[-1].set(0),
}


def draw_chains(settings: dict, depth: int) -> tuple[Array, Array, Array, Array]:
    """Weights and noise: [seeds, scales, draws, deepest], x: [seeds, scales, draws, batch], float64; active: [deepest].

    The last `depth` layers are active. Every depth has its own draws, the same for every arm.
    """
    scale = np.array(list(SCALES.values()))
    shape, deepest = (len(SCALES), settings["draws"]), max(settings["depths"])

    def one_seed(seed: int) -> tuple[Array, Array, Array]:
        # The criteria were settled on trial runs, whose draws must not come again in the run that is judged.
        fresh = jax.random.fold_in(jax.random.key(seed), 871)
        keys = jax.random.split(jax.random.fold_in(fresh, depth), 3)
        sizes = (deepest, deepest, settings["batch"])
        unit, noise, x = (
            jax.random.normal(key, (*shape, size), jnp.float64) for key, size in zip(keys, sizes, strict=True)
        )
        return scale[:, :1, None] + scale[:, 1:, None] * unit, noise, x

    drawn = [one_seed(seed) for seed in range(settings["seeds"])]
    return *map(jnp.stack, zip(*drawn, strict=True)), jnp.arange(deepest) >= deepest - depth


def over_draws(function: Callable[..., dict[str, Array]]) -> Callable[..., dict[str, Array]]:
    """Compile `function(active, *arrays)` for arrays with leading [seeds, scales, draws]; seed after seed (memory)."""

    @jax.jit
    def mapped(active: Array, *arrays: Array) -> dict[str, Array]:
        inner = jax.vmap(jax.vmap(functools.partial(function, active)))
        return jax.lax.map(lambda each: inner(*each), arrays)

    return mapped


def measure_step(chain: linear_chain.Chain, active: Array, weights: Array, x: Array) -> dict[str, Array]:
    """Everything that is asked about one step of one chain: [] or one value for each of RATES and the wanted step."""
    chain, weights = linear_chain.shortened(chain, active), jnp.where(active, weights, 1)
    expansion = linear_chain.taylor(chain, weights, x)
    rates = jnp.concatenate([jnp.asarray(RATES), WANTED / expansion.slope[None], jnp.asarray(SCAN)])
    change = linear_chain.step_change(chain, weights, x, expansion, rates)
    error = linear_chain.relative_error(change, change.forecast)
    corrected = linear_chain.relative_error(change, change.forecast + change.second_order)
    asked = slice(0, len(RATES) + 1)
    return {
        "error": error[asked],
        "corrected": corrected[asked],
        "delivered": (change.true / change.forecast)[asked],
        "second": jnp.abs(change.second_order / change.forecast)[RATES.index(MAIN_RATE)],
        "orders": linear_chain.orders_needed(weights, expansion.gradient, jnp.asarray(MAIN_RATE), FAILS),
        "usable": largest_usable(error[asked.stop :]),
        "top": expansion.gradient[-1] ** 2 / expansion.slope,
    }


def largest_usable(error: Array) -> Array:
    """The largest rate of SCAN up to which every forecast is within FAILS; half a decade below SCAN if none is."""
    rates = jnp.asarray([SCAN[0] / 10**0.5, *SCAN])
    fine = jnp.append(error <= FAILS, False)  # an error that is not finite is not fine
    return rates[jnp.argmin(fine)]


MEASURE_STEP = {arm: over_draws(functools.partial(measure_step, chain)) for arm, chain in ARMS.items()}


def step_rows(settings: dict, depth: int) -> list[dict]:
    """One row per arm and scale; each entry has one value per seed, those of single steps [steps][seeds]."""
    weights, _, x, active = draw_chains(settings, depth)
    rows = []
    for arm in settings["arms"]:
        found = jax.tree.map(np.asarray, MEASURE_STEP[arm](active, weights, x))
        for number, scale in enumerate(SCALES):
            cell = {name: values[:, number] for name, values in found.items()}  # [seeds, draws] or [.., steps]
            rows.append({"kind": "step", "depth": depth, "arm": arm, "scale": scale, **summarize_step(cell)})
    return rows


def summarize_step(cell: dict[str, np.ndarray]) -> dict:
    """Reduce the draws of each seed: medians, the share of forecasts that hold, and the spread of usable rates."""
    medians = {name: np.median(cell[name], axis=1).T for name in ("error", "corrected", "delivered")}
    scalars = {name: np.median(cell[name], axis=1) for name in ("second", "orders", "usable", "top")}
    low, high = np.quantile(cell["usable"], [0.05, 0.95], axis=1)
    holds = np.mean(cell["error"] <= HOLDS, axis=1).T
    return {**medians, **scalars, "holds": holds, "usable_low": low, "usable_high": high}


def measure_below(
    dtype: type, epsilon: float, active: Array, weights: Array, noise: Array, x: Array
) -> dict[str, Array]:
    """What h and h_hat are like after each of CHANGES, and against what they were before: all [changes]."""
    weights = jnp.where(active, weights, 1)
    plain = linear_chain.shortened(linear_chain.plain, active)
    gradient = jax.grad(linear_chain.cost, argnums=1)(plain, weights, x)
    changed = [change(weights[:-1], gradient[:-1], noise[:-1]) for change in CHANGES.values()]
    lower = jnp.where(active[:-1], jnp.stack(changed), 1).astype(dtype)  # [changes, layers - 1]
    h = jax.vmap(linear_chain.below, in_axes=(0, None))(lower, x.astype(dtype))
    h_hat = jax.vmap(lambda each: linear_chain.standardize(each, epsilon))(h)
    before = list(CHANGES).index("none")
    return {
        "var_h": jnp.var(h, axis=1),
        "times": jnp.var(h, axis=1) / jnp.var(h[before]),
        "mean": jnp.mean(h_hat, axis=1),
        "var": jnp.var(h_hat, axis=1),
        "distance": jax.vmap(linear_chain.kolmogorov_distance)(h_hat),
        "agreement": h_hat @ h_hat[before] / h_hat.shape[1],
    }


MEASURE_BELOW = {
    name: over_draws(functools.partial(measure_below, dtype, epsilon)) for name, (dtype, epsilon) in ARITHMETIC.items()
}


def below_rows(settings: dict, depth: int) -> list[dict]:
    """One row per arithmetic, change and scale; each entry has one value per seed."""
    weights, noise, x, active = draw_chains(settings, depth)
    limit = linear_chain.kolmogorov_limit(settings["batch"])
    rows = []
    for arithmetic in settings["arithmetics"]:
        found = jax.tree.map(np.asarray, MEASURE_BELOW[arithmetic](active, weights, noise, x))
        for (number, scale), (place, change) in itertools.product(enumerate(SCALES), enumerate(CHANGES)):
            if change == "two signs flipped" and depth < 3:
                continue  # there is one lower weight
            cell = {name: values[:, number, :, place] for name, values in found.items()}  # [seeds, draws]
            labels = {"depth": depth, "arithmetic": arithmetic, "change": change, "scale": scale}
            rows.append({"kind": "below", **labels, **summarize_below(cell, limit)})
    return rows


def summarize_below(cell: dict[str, np.ndarray], limit: float) -> dict:
    """Reduce the draws of each seed: shares of draws that passed, the worst of them, and the range of var(h)."""
    off_mean, off_var = np.abs(cell["mean"]), np.abs(cell["var"] - 1)
    low, high = np.quantile(cell["var_h"], [0.05, 0.95], axis=1)
    shares = {
        "unit": (off_mean <= CLOSE) & (off_var <= CLOSE),
        "gaussian": cell["distance"] <= limit,
        "doubled": (cell["times"] > 2) | (cell["times"] < 0.5),
        "same": cell["agreement"] >= 1 - CLOSE,
        "opposite": cell["agreement"] <= CLOSE - 1,
        "collapsed": cell["var"] <= CLOSE,
    }
    extremes = {"worst_var": off_var.max(axis=1), "var_h_low": low, "var_h_high": high}
    return {**{name: passed.mean(axis=1) for name, passed in shares.items()}, **extremes}
