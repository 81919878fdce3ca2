"""An LSTM that batch norm normalizes in some parts, all or none, chosen by numbers: all arms train in one program.

    f, i, o, g = split(BN(h @ recurrent_kernel) + BN(x @ input_kernel) + bias)
    cell = sigmoid(f) * cell + sigmoid(i) * tanh(g)          h = sigmoid(o) * tanh(BN(cell) + cell_bias)

where each BN keeps its statistics per time step (`jaxbn.variants.recurrent_batch_norm`) or is switched off. With all of
them on it is `jaxbn.variants.batch_norm_lstm`, with none an LSTM. The class is read from the last hidden state.

The start is that of the released code of Cooijmans et al. 2016: orthogonal kernels, but the identity from the hidden
state to g; a bias of 1 for f and 0 else; learned initial states, zero at first, and noise on the hidden one.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxbn.variants import recurrent_batch_norm

PARTS = ("input", "recurrent", "cell")  # what batch norm may normalize
ORDERS = ("rows", "pixels", "permuted")  # in which an image is read
LARGEST = 38.0  # the power of ten of the largest number, and about that of 1 / the smallest, that float32 holds

DECAY, EPSILON = 0.9, 1e-5
_orthogonal = jax.nn.initializers.orthogonal()


class SwitchedLSTM(NamedTuple):
    """Pure functions; sequences are [time, batch, inputs], "params" and "batch_stats" those of one network.

    Attributes:
      init: init(run, key, sequence) -> variables; `run` holds the numbers of `switches`.
      apply: apply(variables, sequence, *, train, taps=None) -> (logits, batch_stats); taps [time, batch, features] are
        added to the hidden states, so that a derivative by them is one by the states.
    """

    init: Callable
    apply: Callable


def switches(*parts: str, scale: float = 0.1, noise: float = 0.1) -> dict[str, float]:
    """The numbers of a run: which parts batch norm normalizes, its scale at the start, the initial state's noise."""
    return {**{part: float(part in parts) for part in PARTS}, "scale": scale, "noise": noise}


def sequence(images: Array, order: str) -> Array:
    """Images [batch, height, width, channels] as [time, batch, inputs]: a row or a pixel at a time.

    The order "permuted" is one fixed permutation of the pixels.
    """
    batch, height = images.shape[:2]
    if order == "rows":
        return jnp.moveaxis(images.reshape(batch, height, -1), 1, 0)
    pixels = images.reshape(batch, -1).T[:, :, None]
    return pixels if order == "pixels" else pixels[np.random.default_rng(0).permutation(len(pixels))]


def switched_lstm(features: int, length: int, classes: int = 10) -> SwitchedLSTM:
    """The network for sequences of `length` time steps with `features` hidden units."""
    norm = recurrent_batch_norm(length, decay=DECAY, epsilon=EPSILON, use_bias=False)
    sizes = {"input": 4 * features, "recurrent": 4 * features, "cell": features}

    def init(run: dict, key: Array, sequence: Array) -> dict:
        keys = jax.random.split(key, 5)
        gates = _orthogonal(keys[1], (features, 3 * features))
        kernels = {
            "input": _orthogonal(keys[0], (sequence.shape[-1], 4 * features)),
            "recurrent": jnp.concatenate([gates, jnp.eye(features)], axis=1),
            "head": _orthogonal(keys[2], (features, classes)),
        }
        params = {
            "kernel": kernels,
            "scale": {part: jnp.full(size, run["scale"]) for part, size in sizes.items()},
            "bias": {
                "gates": jnp.zeros(4 * features).at[:features].set(1.0),
                "cell": jnp.zeros(features),
                "head": jnp.zeros(classes),
            },
            "initial": {"hidden": jnp.zeros(features), "cell": jnp.zeros(features)},
        }
        rows = {part: norm.init(keys[3], jnp.zeros((2, size)))["batch_stats"] for part, size in sizes.items()}
        noise = {
            "std": jnp.array(run["noise"], jnp.float32),
            "key": jax.random.key_data(keys[4]),
            "drawn": jnp.array(0),
        }
        switched = {part: jnp.array(run[part], jnp.float32) for part in PARTS}
        return {"params": params, "batch_stats": {"rows": rows, "noise": noise, "switches": switched}}

    def apply(variables: dict, sequence: Array, *, train: bool, taps: Array | None = None) -> tuple[Array, dict]:
        params, stats = variables["params"], variables["batch_stats"]
        kernel, bias = params["kernel"], params["bias"]

        def one(carry: tuple, inputs: tuple) -> tuple[tuple, None]:
            hidden, cell, rows = carry
            step, x, tap = inputs
            moved = {}

            def normalized(part: str, v: Array) -> Array:
                own = {"params": {"scale": params["scale"][part]}, "batch_stats": rows[part]}
                y, moved[part] = norm.apply(own, v, train=train, step=step)
                return jnp.where(stats["switches"][part] > 0, y, v)

            gates = normalized("recurrent", hidden @ kernel["recurrent"])
            gates += normalized("input", x @ kernel["input"]) + bias["gates"][None]
            forget, enter, out, value = jnp.split(gates, 4, axis=-1)
            cell = jax.nn.sigmoid(forget) * cell + jax.nn.sigmoid(enter) * jnp.tanh(value)
            hidden = jax.nn.sigmoid(out) * jnp.tanh(normalized("cell", cell) + bias["cell"][None])
            return (hidden if tap is None else hidden + tap, cell, moved), None

        hidden, cell = (jnp.broadcast_to(v, (sequence.shape[1], features)) for v in params["initial"].values())
        noise = stats["noise"]
        key = jax.random.fold_in(jax.random.wrap_key_data(noise["key"]), noise["drawn"])
        start = hidden + noise["std"] * jax.random.normal(key, hidden.shape), cell, stats["rows"]
        (hidden, _, rows), _ = jax.lax.scan(one, start, (jnp.arange(len(sequence)), sequence, taps))
        noise = {**noise, "drawn": noise["drawn"] + int(train)}
        logits = hidden @ kernel["head"] + bias["head"][None]
        return logits, {**stats, "rows": rows, "noise": noise}

    return SwitchedLSTM(init, apply)


def averaged_over_time(variables: dict) -> dict:
    """The same network with one mean and one variance for all time steps: the averages over them."""

    def average(rows: dict) -> dict:
        shared = {name: jnp.broadcast_to(rows[name].mean(0), rows[name].shape) for name in ("mean", "var")}
        return {**rows, **shared}

    stats = variables["batch_stats"]
    return {**variables, "batch_stats": {**stats, "rows": {part: average(stats["rows"][part]) for part in PARTS}}}


def gradient_sizes(
    network: SwitchedLSTM, loss: Callable, variables: dict, sequence: Array, labels: Array
) -> tuple[Array, Array]:
    """How large the gradients of the loss are, as powers of ten: by each hidden state [time], and by the parameters [].

    The norm by a hidden state is taken over all examples and units. What is not finite counts as LARGEST.
    """

    def of(params: dict, taps: Array) -> Array:
        logits, _ = network.apply({**variables, "params": params}, sequence, train=True, taps=taps)
        return loss(logits, labels)

    features = variables["params"]["initial"]["hidden"].shape[-1]
    taps = jnp.zeros((*sequence.shape[:2], features))
    by_params, by_states = jax.grad(of, argnums=(0, 1))(variables["params"], taps)
    flat = jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(by_params)])
    return jax.vmap(_power_of_ten)(by_states), _power_of_ten(flat)


def _power_of_ten(x: Array) -> Array:
    """log10 of the norm of x, within +-LARGEST; no square overflows."""
    largest = jnp.max(jnp.abs(x))
    relative = x / jnp.where(largest > 0, largest, 1.0)
    power = jnp.log10(largest) + jnp.log10(jnp.sum(relative**2)) / 2
    power = jnp.where(largest > 0, power, -LARGEST)
    return jnp.clip(jnp.where(jnp.isfinite(power) & jnp.isfinite(largest), power, LARGEST), -LARGEST, LARGEST)
