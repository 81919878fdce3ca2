"""Vectors that lie in trees of arrays, such as params and gradients."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxbn._arithmetic import at_least_float32


def add_scaled(tree: Any, factor: ArrayLike, direction: Any) -> Any:
    """`tree + factor * direction`, every leaf in the dtype of `tree`."""
    return jax.tree.map(lambda leaf, d: (leaf + factor * d).astype(leaf.dtype), tree, direction)


def subtract(a: Any, b: Any) -> Any:
    """`a - b`, leaf by leaf, in float32 at least."""
    return jax.tree.map(lambda x, y: at_least_float32(x) - at_least_float32(y), a, b)


def dot(a: Any, b: Any) -> Array:
    """[]: sum of the products of all values, in float32 at least."""
    return sum(jax.tree.leaves(jax.tree.map(leaf_dot, a, b)), jnp.zeros((), jnp.float32))


def norm(tree: Any) -> Array:
    """[]: Euclidean norm of all values."""
    return jnp.sqrt(dot(tree, tree))


def cosine(products: Array, a: Array, b: Array) -> Array:
    """`products / (a b)`, and NaN where a norm a or b is 0; any shapes that broadcast."""
    size = a * b
    return jnp.where(size > 0, products / jnp.where(size > 0, size, 1), jnp.nan)


def leaf_dot(a: Array, b: Array) -> Array:
    """[]: sum of the products of two arrays of one shape, in float32 at least."""
    return jnp.sum(at_least_float32(a) * at_least_float32(b))
