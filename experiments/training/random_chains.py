"""Chains of thousands of random layers, of equal width, and the rank of what comes out of them."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jax import Array

import jaxbn

PLAIN, BATCH, BROKEN = CHAINS = ("plain", "batch norm", "broken batch norm")
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"linear": lambda h: h, "ReLU": jax.nn.relu}
NEGLIGIBLE = 1e-250  # in float64 it does no more than avoid dividing by zero, where every unit has died
SMALLEST = 1e-5  # of the largest singular value: what counts for the rank


def chain_ranks(width: int, depths: Sequence[int], relu_depth: int, seeds: Sequence[int]) -> xr.Dataset:
    """`chain_rank` and `chain_bound` [chain, activation, layers, seed] of as many Gaussian inputs as units, in float64.

    The bound is (sum s^2)^2 / sum s^4 over the singular values s; both are 0 where all units died. What is deeper than
    `relu_depth` with ReLU is nan.
    """
    shape = len(CHAINS), len(ACTIVATIONS), len(depths), len(seeds)
    ranks, bounds = np.full((2, *shape), np.nan)
    with jax.enable_x64(True):
        keys = jax.vmap(jax.random.key)(jnp.asarray(seeds))
        start = jax.vmap(lambda key: jax.random.normal(key, (width, width)))(keys)
        for chain, (number, activation) in itertools.product(range(len(CHAINS)), enumerate(ACTIVATIONS)):
            h, done = start, 0
            for place, depth in enumerate(depths):
                if activation == "ReLU" and depth > relu_depth:
                    break
                h, done = deeper(chain, number, keys, h, done, depth), depth
                ranks[chain, number, place], bounds[chain, number, place] = rank_and_bound(np.asarray(h))
    axes = ("chain", "activation", "layers", "seed")
    names = {"chain": list(CHAINS), "activation": list(ACTIVATIONS), "layers": list(depths), "seed": list(seeds)}
    found = xr.Dataset({"chain_rank": (axes, ranks), "chain_bound": (axes, bounds)}, names)
    return found.assign_coords(width=width)


def rank_and_bound(h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number of singular values s above SMALLEST of the largest, and (sum s^2)^2 / sum s^4; h: [..., rows, columns]."""
    singular = np.linalg.svd(h, compute_uv=False)
    largest = singular[..., :1]
    singular /= np.where(largest > 0, largest, 1)
    fourth = np.maximum(np.sum(singular**4, axis=-1), np.finfo(float).tiny)
    return np.sum(singular > SMALLEST, axis=-1), np.sum(singular**2, axis=-1) ** 2 / fourth


@jax.jit
def deeper(arm: int, activation: int, keys: Array, h: Array, first: int, last: int) -> Array:
    """Layers `first` to `last - 1` of one of CHAINS for every key; h: [keys, examples, units] in float64."""

    def layer(key: Array, number: int, h: Array) -> Array:
        draw = jax.random.uniform(jax.random.fold_in(key, number), h.shape[-1:] * 2, jnp.float32).astype(h.dtype)
        h = h @ jnp.where(arm == CHAINS.index(BROKEN), draw, 2 * draw - 1)
        # Without normalization the size is taken out as a whole: it has no bearing on the rank.
        plain = h / jnp.sqrt(jnp.mean(h**2) + NEGLIGIBLE)
        h = jnp.where(arm == CHAINS.index(PLAIN), plain, jaxbn.batch_normalize(h, axis=0, epsilon=NEGLIGIBLE)[0])
        return jax.lax.switch(activation, list(ACTIVATIONS.values()), h)

    def chain(own: tuple[Array, Array]) -> Array:
        key, h = own
        return jax.lax.fori_loop(first, last, partial(layer, key), h)

    return jax.lax.map(chain, (keys, h))
