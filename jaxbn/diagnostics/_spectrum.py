"""Eigenvalues of the Hessian of the loss, without the Hessian: Lanczos' method on Hessian-vector products."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike

from jaxbn._arithmetic import at_least_float32
from jaxbn.diagnostics._network import (
    Loss,
    Variables,
    check_alike,
    checked_variables,
    key_of,
    loss_of_params,
    vector_of,
)


class Spectrum(NamedTuple):
    """What Lanczos' method found of the eigenvalues of a symmetric matrix, from several random starts.

    Attributes:
      values: [probes, iterations], Ritz values in ascending order: those at the ends are eigenvalues first.
      weights: [probes, iterations], of each start's Gauss quadrature: the sum of weights times f(values) stands for the
        mean of f over all eigenvalues. They sum to 1.
      errors: [probes, iterations], some eigenvalue lies no further from `values` than this, but for rounding.
    """

    values: Array
    weights: Array
    errors: Array

    def leading(self, count: int) -> tuple[Array, Array]:
        """The greatest Ritz values of the first probe, in descending order, and their errors.

        Eigenvalues that are equal count once, except where the method starts anew because it has exhausted a subspace.

        Args:
          count: how many, at most iterations.

        Returns:
          values [count], errors [count].
        """
        if not 1 <= count <= self.values.shape[1]:
            raise ValueError(f"count={count}; expected 1 to {self.values.shape[1]}, the number of iterations.")
        return self.values[0, ::-1][:count], self.errors[0, ::-1][:count]

    def density(self, points: ArrayLike, width: ArrayLike) -> Array:
        """Density of eigenvalues, each blurred to a Gaussian; it integrates to 1.

        Args:
          points: [points], where.
          width: [], standard deviation of the Gaussian, in units of the eigenvalues.

        Returns:
          [points], the mean of all probes.
        """
        points = vector_of(points, "points")
        kernels = jax.scipy.stats.norm.pdf(points[None, None], self.values[..., None], width)
        return jnp.mean(jnp.sum(self.weights[..., None] * kernels, axis=1), axis=0)


def hessian_vector_product(
    loss: Loss, variables: Variables, batch: Any, vector: Any, *, rng: Array | None = None
) -> Any:
    """The Hessian of the mean loss by params, times a vector: forward over reverse (Pearlmutter 1994).

    Args:
      loss: loss(variables, batch, rng) -> LossOutput; see `jaxbn.diagnostics`.
      variables: {"params", "batch_stats", ...}.
      batch: what the loss takes.
      vector: a tree like params.
      rng: random key for the loss; None is a fixed one.

    Raises:
      TypeError: variables without params, params that are not real floats, a loss that does not return a LossOutput.
      ValueError: a vector that is not like params.
    """
    variables = checked_variables(variables)
    check_alike(vector, "vector", variables["params"], "params")
    return _product(loss, variables, batch, vector, key_of(rng))


def spectrum(
    loss: Loss,
    variables: Variables,
    batch: Any,
    *,
    key: Array,
    iterations: int = 64,
    probes: int = 1,
    rng: Array | None = None,
) -> Spectrum:
    """Leading eigenvalues of the Hessian of the mean loss by params, and their density.

    Stochastic Lanczos quadrature as in Ghorbani, Krishnan and Xiao 2019, section 2. Every new vector is made
    orthogonal to all before it, twice. Costs `probes * iterations` Hessian-vector products, one after the other, and
    memory for `iterations + 1` copies of the params. A loss in training mode is differentiated through the statistics
    of its batch; one in evaluation mode has frozen statistics, which is the control of Page 2019.

    Args:
      loss: loss(variables, batch, rng) -> LossOutput; see `jaxbn.diagnostics`. For more data than fits see
        `over_batches`.
      variables: {"params", "batch_stats", ...}.
      batch: what the loss takes.
      key: random key of the starts, whose values are 1 or -1.
      iterations: of Lanczos' method, at most the number of params, with which all distinct eigenvalues are found.
      probes: number of starts; the density is their mean, the leading eigenvalues are the first one's.
      rng: random key for the loss, the same in every product; None is a fixed one.

    Raises:
      TypeError: variables without params, params that are not real floats, a loss that does not return a LossOutput.
      ValueError: iterations or probes below 1, or more iterations than there are params.
    """
    variables = checked_variables(variables)
    size = sum(int(np.prod(jnp.shape(leaf))) for leaf in jax.tree.leaves(variables["params"]))
    if not 1 <= iterations <= size:
        raise ValueError(f"iterations={iterations}; expected 1 to {size}, the number of params.")
    if probes < 1:
        raise ValueError(f"probes={probes}; expected 1 or more.")
    return _spectrum(loss, variables, batch, jax.random.split(key, probes), iterations, key_of(rng))


@partial(jax.jit, static_argnames="loss")
def _product(loss, variables, batch, vector, rng) -> Any:
    gradient = jax.grad(loss_of_params(loss, variables, batch, rng))
    vector = jax.tree.map(lambda v, w: jnp.asarray(v, w.dtype), vector, variables["params"])
    return jax.jvp(gradient, (variables["params"],), (vector,))[1]


@partial(jax.jit, static_argnames=("loss", "iterations"))
def _spectrum(loss, variables, batch, keys, iterations, rng) -> Spectrum:
    narrow, unravel = ravel_pytree(variables["params"])
    mean, params = loss_of_params(loss, variables, batch, rng), at_least_float32(narrow)
    gradient = jax.grad(lambda flat: mean(unravel(flat.astype(narrow.dtype))))

    def product(vector):
        return jax.jvp(gradient, (params,), (vector,))[1]

    def probe(key):
        diagonal, beside = _lanczos(product, params, iterations, key)
        tridiagonal = jnp.diag(diagonal) + jnp.diag(beside[:-1], 1) + jnp.diag(beside[:-1], -1)
        values, vectors = jnp.linalg.eigh(tridiagonal)
        return Spectrum(values, vectors[0] ** 2, jnp.abs(beside[-1] * vectors[-1]))

    return lax.map(probe, keys)


def _lanczos(product, like: Array, iterations: int, key: Array) -> tuple[Array, Array]:
    """The diagonal of the tridiagonal matrix, and what stands beside it and would stand next: both [iterations].

    Where the vectors span a subspace that the matrix maps to itself, it goes on from a new random one, beside 0.
    """
    size, dtype = like.size, like.dtype
    start = jax.random.rademacher(key, (size,), dtype) / jnp.sqrt(jnp.asarray(size, dtype))
    basis = jnp.zeros((iterations + 1, size), dtype).at[0].set(start)

    times = partial(jnp.matmul, precision="highest")  # on accelerators float32 is rounded otherwise

    def orthogonal(vector, basis):
        for _ in range(2):  # Once leaves rounding of the order of what was taken away; twice is enough (Kahan).
            vector = vector - times(times(basis, vector), basis)
        return vector

    def one(basis, number):
        image = product(basis[number])
        diagonal = times(basis[number], image)
        rest = orthogonal(image, basis)
        beside = jnp.linalg.norm(rest)
        exhausted = beside <= 10 * jnp.finfo(dtype).eps * jnp.linalg.norm(image)
        other = orthogonal(jax.random.normal(jax.random.fold_in(key, number), (size,), dtype), basis)
        following = jnp.where(exhausted, other, rest)
        following = following / jnp.maximum(jnp.linalg.norm(following), jnp.finfo(dtype).tiny)
        return basis.at[number + 1].set(following), (diagonal, jnp.where(exhausted, 0, beside))

    _, (diagonal, beside) = lax.scan(one, basis, jnp.arange(iterations))
    return diagonal, beside
