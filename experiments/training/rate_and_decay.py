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
REFERENCE = {HELD: NONE}  # the arm whose outputs those of an arm are compared with; DECAY where not given
DECAYING = np.array([arm in (DECAY, HELD, NUDGED) for arm in ARMS])
AT = {arm: number for number, arm in enumerate(ARMS)}


def growing_rates(rate: float, shrink: float, steps: int) -> np.ndarray:
    """The rates r a^-(2 t + 1) of steps 0 ... steps - 1: float64 [steps]."""
    return rate * shrink ** -(2.0 * np.arange(steps) + 1)


def last_step_in_range(rate: float, shrink: float, dtype: Any) -> float:
    """The step after which a growing rate is beyond the largest number of `dtype`."""
    return float(np.log(float(jnp.finfo(dtype).max) / rate) / (-2 * np.log(shrink)) - 0.5)


def start(seed: int, weights: Any) -> Any:
    """The weights of every arm, leaves [arms, ...]: equal, but for those of NUDGED."""
    draw = np.random.default_rng(seed)

    def spread(leaf: np.ndarray) -> np.ndarray:
        nudged = leaf * (1 + np.finfo(leaf.dtype).eps * draw.choice([-1, 1], leaf.shape)).astype(leaf.dtype)
        return np.stack([nudged if arm == NUDGED else leaf for arm in ARMS])

    return jax.tree.map(spread, weights)


def rates(square: Array, rate: Array, shrink: Array, growing: Array) -> Array:
    """The rate of every unit: [arms, units].

    Args:
      square: [arms, units], |w|^2.
      rate: [], r.
      shrink: [], a.
      growing: [], r a^-(2 t + 1).
    """
    fixed = jnp.full_like(square[0], rate)
    by_arm = {
        GROWING: jnp.full_like(square[0], growing),
        REPLAYED: fixed / shrink * square[AT[REPLAYED]] / square[AT[DECAY]],
        HELD: fixed * shrink * square[AT[HELD]] / square[AT[NONE]],
    }
    return jnp.stack([by_arm.get(arm, fixed) for arm in ARMS])


def descend(
    weights: dict[str, Array],
    gradient: dict[str, Array],
    free: frozenset[str],
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
      rate: [], r.
      shrink: [], a.
      growing: [], r a^-(2 t + 1).
    """

    def one(path: str) -> Array:
        w, g = weights[path], gradient[path]
        factor = jnp.where(jnp.asarray(DECAYING), shrink, 1).astype(w.dtype).reshape(-1, *(1,) * (w.ndim - 1))
        by_unit = rates(jnp.sum(w**2, -1), rate, shrink, growing)[..., None] if path in free else rate
        return factor * w - by_unit * g

    return {path: one(path) for path in weights}


@partial(jax.jit, static_argnames=("apply", "whole"))
def train(
    apply: Callable,
    whole: bool,
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
      variables: to start from, see `start`: leaves [arms, ...].
      index: [intervals, steps, batch], the examples of each batch.
      arrays: of `loop.on_device`.
      rate: [], r.
      shrink: [decays], a.
      growing: [intervals, steps, decays], r a^-(2 t + 1).

    Returns:
      "loss" on training batches; "apart", from the reference's outputs on the test images, see `apart`; "accuracy" on
      test normalized by its own statistics, and "running_accuracy" by the running ones; "effective_rate" of the step
      to come, over a where the arm decays, and "size", |w|, geometric means over the units.
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
            return (descend(state[0], gradient, free, rate, shrink, growing), batch_stats), value

        return jax.vmap(one_decay)(state, shrink, growing)

    def measure(state: tuple, shrink: Array, growing: Array) -> dict[str, Array]:
        outputs, running = (jax.vmap(lambda w, s, m=m: forward(w, s, test, m)[0])(*state) for m in (True, False))
        square = jnp.concatenate([jnp.sum(state[0][path] ** 2, -1) for path in sorted(free)], -1)
        turning = rates(square, rate, shrink, growing / shrink**2) / square
        turning = jnp.where(jnp.asarray(DECAYING)[:, None], turning / shrink, turning)
        right = [jnp.mean(jnp.argmax(logits, -1) == arrays["test_labels"][None], -1) for logits in (outputs, running)]
        return {
            "apart": jnp.stack([apart(outputs[AT[arm]], outputs[AT[REFERENCE.get(arm, DECAY)]]) for arm in ARMS]),
            "accuracy": right[0],
            "running_accuracy": right[1],
            "effective_rate": jnp.exp(jnp.mean(jnp.log(turning), -1)),
            "size": jnp.exp(jnp.mean(jnp.log(square), -1) / 2),
        }

    def interval(state: tuple, now: tuple) -> tuple[tuple, dict]:
        state, values = lax.scan(step, state, now)
        return state, {"loss": values.mean(0), **jax.vmap(measure)(state, shrink, now[1][-1])}

    begun = trained, variables["batch_stats"]
    begun = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(shrink), *leaf.shape)), begun)
    return lax.scan(interval, begun, (index, growing))[1]


def apart(a: Array, b: Array) -> Array:
    """|a - b| / (|a| + |b|): 0 where equal, at most 1, and 1 where one is not finite."""
    found = jnp.linalg.norm(a - b) / (jnp.linalg.norm(a) + jnp.linalg.norm(b))
    return jnp.where(jnp.isfinite(found), found, 1)
