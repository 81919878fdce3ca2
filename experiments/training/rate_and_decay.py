"""Networks side by side on the same batches, each under its own learning rate and decay of the weights.

With the gradient g, the rate r and the decay d a step of gradient descent is w <- a w - r g with a = 1 - r d. Where the
loss does not depend on the size of w, as it does not for the weights w of a unit below batch norm, g(c w) = g(w) / c.
All arms below that decay is replaced in then take the same direction w / |w| at every step:

    decay            w <- a w - r g
    growing rate     w <- w - r a^-(2 t + 1) g                  at step t = 0, 1, ...: w is a^-t times that with decay
    replayed rate    w <- w - (r / a) (|w| / |w of decay|)^2 g  the effective rate, rate / |w|^2, of the arm with decay

    no decay         w <- w - r g
    held rate        w <- a w - a r (|w| / |w of no decay|)^2 g: decays, with the effective rate of the arm without
    nudged           as decay, from weights that differ in their last digit: how far rounding drives two runs apart
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from experiments.training import loop, models

ARMS = DECAY, GROWING, NONE, REPLAYED, HELD, NUDGED = (
    "decay",
    "growing rate",
    "no decay",
    "replayed rate",
    "held rate",
    "nudged",
)
REFERENCE = {HELD: NONE}  # whose outputs those of an arm are compared with; DECAY where not given
DECAYING = (DECAY, HELD, NUDGED)


def growing_rates(rate: float, shrink: float, steps: int) -> np.ndarray:
    """The rates r a^-(2 t + 1) of steps 0 ... steps - 1: float64 [steps]."""
    return rate * shrink ** -(2.0 * np.arange(steps) + 1)


def last_step_in_range(rate: float, shrink: float, dtype: Any) -> float:
    """The step after which a growing rate is beyond the largest number of `dtype`."""
    return float(np.log(float(jnp.finfo(dtype).max) / rate) / (-2 * np.log(shrink)) - 0.5)


def start(seed: int, weights: Any, arms: tuple[str, ...]) -> Any:
    """The weights of every arm, leaves [arms, ...]: equal, but for those of NUDGED."""
    draw = np.random.default_rng(seed)

    def spread(leaf: np.ndarray) -> np.ndarray:
        nudged = leaf * (1 + np.finfo(leaf.dtype).eps * draw.choice([-1, 1], leaf.shape)).astype(leaf.dtype)
        return np.stack([nudged if arm == NUDGED else leaf for arm in arms])

    return jax.tree.map(spread, weights)


def rates(square: Array, arms: tuple[str, ...], rate: Array, shrink: Array, growing: Array) -> Array:
    """The rate of every unit: [arms, units].

    Args:
      square: [arms, units], |w|^2.
      arms: their names.
      rate: [], r.
      shrink: [], a.
      growing: [], r a^-(2 t + 1).
    """
    of, fixed = dict(zip(arms, square, strict=True)), jnp.full_like(square[0], rate)

    def one(arm: str) -> Array:
        if arm == GROWING:
            return jnp.full_like(fixed, growing)
        if arm == REPLAYED:
            return fixed / shrink * of[REPLAYED] / of[DECAY]
        return fixed * shrink * of[HELD] / of[NONE] if arm == HELD else fixed

    return jnp.stack([one(arm) for arm in arms])


def descend(
    weights: dict[str, Array],
    gradient: dict[str, Array],
    free: frozenset[str],
    arms: tuple[str, ...],
    rate: Array,
    shrink: Array,
    growing: Array,
) -> dict[str, Array]:
    """One step of every arm.

    Args:
      weights: leaves [arms, ...].
      gradient: likewise.
      free: the leaves, [arms, units, inputs], that are treated as if the loss did not depend on the size of their rows.
        Others have the rate r in every arm, and shrink where the arm decays.
      arms: their names.
      rate: [], r.
      shrink: [], a.
      growing: [], r a^-(2 t + 1).
    """

    def one(path: str) -> Array:
        w, g = weights[path], gradient[path]
        by_unit = rates(jnp.sum(w**2, -1), arms, rate, shrink, growing)[..., None] if path in free else rate
        return factors(arms, shrink).reshape(-1, *(1,) * (w.ndim - 1)) * w - by_unit * g

    return {path: one(path) for path in weights}


def factors(arms: tuple[str, ...], shrink: Array) -> Array:
    """What a step leaves of the weights: [arms]."""
    return jnp.where(jnp.asarray([arm in DECAYING for arm in arms]), shrink, jnp.ones_like(shrink))


@partial(jax.jit, static_argnames=("apply", "whole", "arms"))
def train(
    apply: Callable,
    whole: bool,
    arms: tuple[str, ...],
    variables: dict,
    index: Array,
    arrays: dict,
    rate: Array,
    shrink: Array,
    growing: Array,
) -> dict[str, Array]:
    """Train every arm under every decay, in the dtype of `shrink`; what is measured is [intervals, decays, arms].

    Args:
      apply: of an MLP of `models`, for images of half the height and width.
      whole: whether scales, biases and the last layer are trained, and decay, beside the weights of hidden layers.
      arms: some of ARMS, and the arms that they refer to.
      variables: to start from, see `start`: leaves [arms, ...].
      index: [intervals, steps, batch], the examples of each batch.
      arrays: of `loop.on_device`.
      rate: [], r.
      shrink: [decays], a.
      growing: [intervals, steps, decays], r a^-(2 t + 1).

    Returns:
      "loss" on training batches; "apart", from the reference's outputs on the test images, see `apart`; "accuracy" on
      test normalized by its own statistics; "effective_rate" of the step to come, over a where the arm decays, and
      "size", |w|, geometric means over the units. "running_accuracy", by the running statistics at the end, is
      [decays, arms].
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(variables["params"])
    params = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    head = len(variables["params"]) - 1
    free = frozenset(path for path in params if path.endswith("kernel") and not path.startswith(f"{head}/"))
    trained = {path: params[path] for path in params if whole or path in free}
    fixed = {path: params[path][0] for path in params if path not in trained}
    test = models.pool2x2(loop.pixels(arrays["test_images"])).astype(shrink.dtype)

    def forward(weights: dict, batch_stats: Any, x: Array, train: bool) -> tuple[Array, Any]:
        merged = jax.tree.unflatten(treedef, [(fixed | weights)[path] for path in params])
        return apply({"params": merged, "batch_stats": batch_stats}, x, train=train)

    def loss(weights: dict, batch_stats: Any, x: Array, labels: Array) -> tuple[Array, Any]:
        logits, batch_stats = forward(weights, batch_stats, x, True)
        return loop.softmax_loss(logits, labels), batch_stats

    def step(state: tuple, now: tuple) -> tuple[tuple, Array]:
        index, growing = now
        images, labels = loop.take(arrays, index)
        x = models.pool2x2(images).astype(shrink.dtype)

        def one_decay(state: tuple, shrink: Array, growing: Array) -> tuple[tuple, Array]:
            slope = jax.value_and_grad(loss, has_aux=True)
            (value, batch_stats), gradient = jax.vmap(slope, (0, 0, None, None))(*state, x, labels)
            return (descend(state[0], gradient, free, arms, rate, shrink, growing), batch_stats), value

        return jax.vmap(one_decay)(state, shrink, growing)

    def accuracy(logits: Array) -> Array:
        return jnp.mean(jnp.argmax(logits, -1) == arrays["test_labels"][None], -1)

    def outputs(state: tuple, train: bool) -> Array:
        return jax.vmap(lambda weights, batch_stats: forward(weights, batch_stats, test, train)[0])(*state)

    def measure(state: tuple, shrink: Array, growing: Array) -> dict[str, Array]:
        logits = outputs(state, True)
        of = dict(zip(arms, logits, strict=True))
        square = jnp.concatenate([jnp.sum(state[0][path] ** 2, -1) for path in sorted(free)], -1)
        turning = rates(square, arms, rate, shrink, growing / shrink**2) / square / factors(arms, shrink)[:, None]
        return {
            "apart": jnp.stack([apart(of[arm], of[REFERENCE.get(arm, DECAY)]) for arm in arms]),
            "accuracy": accuracy(logits),
            "effective_rate": jnp.exp(jnp.mean(jnp.log(turning), -1)),
            "size": jnp.exp(jnp.mean(jnp.log(square), -1) / 2),
        }

    def interval(state: tuple, now: tuple) -> tuple[tuple, dict]:
        state, values = lax.scan(step, state, now)
        return state, {"loss": values.mean(0), **jax.vmap(measure)(state, shrink, now[1][-1])}

    begun = trained, variables["batch_stats"]
    begun = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(shrink), *leaf.shape)), begun)
    ended, found = lax.scan(interval, begun, (index, growing))
    return {**found, "running_accuracy": jax.vmap(lambda state: accuracy(outputs(state, False)))(ended)}


def apart(a: Array, b: Array) -> Array:
    """|a - b| / (|a| + |b|): 0 where equal, at most 1, and 1 where one is not finite."""
    found = jnp.linalg.norm(a - b) / (jnp.linalg.norm(a) + jnp.linalg.norm(b))
    return jnp.where(jnp.isfinite(found), found, 1)
