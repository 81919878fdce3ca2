"""The inverse square root of positive definite matrices, with derivatives that do not fear equal eigenvalues."""

import jax
import jax.numpy as jnp
from jax import lax


@jax.custom_jvp
def inverse_square_root(matrix: jax.Array) -> jax.Array:
    """matrix**-1/2 by eigenvalues.

    The derivative of eigenvectors divides by gaps between eigenvalues; that of the inverse root does not, for it solves
    dR R + R dR = -R**2 dM R**2, whose solution divides by sums of roots. All derivatives are taken from this equation,
    of any order.

    Args:
      matrix: [..., d, d], symmetric and positive definite, float32 or float64.

    Returns:
      The symmetric R with R @ R @ matrix = I, of the same shape.
    """
    roots, vectors = _eigen(matrix)
    return _compose(1 / roots, vectors)


@inverse_square_root.defjvp
def _inverse_square_root_jvp(primals, tangents):
    (matrix,), (tangent,) = primals, tangents
    root = inverse_square_root(matrix)
    inverse = _dot(root, root)
    # The solver is not differentiated: JAX derives further derivatives from the equation that it solves.
    roots, vectors = _eigen(lax.stop_gradient(matrix))
    symmetric = (tangent + _transposed(tangent)) / 2
    return root, lax.custom_linear_solve(
        lambda d: _dot(d, root) + _dot(root, d),
        -_dot(_dot(inverse, symmetric), inverse),
        lambda _, b: _solve(b, 1 / roots, vectors),
        symmetric=True,
    )


def newton_inverse_square_root(matrix: jax.Array, *, steps: int = 5) -> jax.Array:
    """matrix**-1/2 approximately, by Newton's iteration (Huang et al. 2019, algorithm 1).

    P <- (3 P - P**3 N) / 2 from P = I, with N = matrix / trace(matrix); the result is P / sqrt(trace). Few steps leave
    the directions of small variance partly unwhitened, on purpose. The same P are computed here from P and Y = P N,
    each times (3 I - P Y) / 2, at the same cost: as published the iteration diverges once it has converged, from
    rounding (Higham 2008, section 6.4).

    Args:
      matrix: [..., d, d], symmetric and positive definite.
      steps: of the iteration, the paper's 5.

    Returns:
      Of matrix's shape.
    """
    trace = jnp.trace(matrix, axis1=-2, axis2=-1)[..., None, None]
    eye = jnp.broadcast_to(jnp.eye(matrix.shape[-1], dtype=matrix.dtype), matrix.shape)
    root, square = eye, matrix / trace
    for _ in range(steps):
        factor = 1.5 * eye - 0.5 * _dot(root, square)
        root, square = _dot(factor, root), _dot(square, factor)
    return root * lax.rsqrt(trace)


def _eigen(matrix):
    """Roots of the eigenvalues, and eigenvectors; what rounding made negative or tiny counts as tiny."""
    values, vectors = jnp.linalg.eigh(matrix)
    least = jnp.finfo(values.dtype).eps * jnp.max(jnp.abs(values), axis=-1, keepdims=True)
    return jnp.sqrt(jnp.maximum(values, least)), vectors


def _solve(b, roots, vectors):
    """X with X R + R X = b, for R = vectors diag(roots) vectors^T."""
    turned = _dot(_dot(_transposed(vectors), b), vectors) / (roots[..., :, None] + roots[..., None, :])
    return _dot(_dot(vectors, turned), _transposed(vectors))


def _compose(values, vectors):
    return _dot(vectors * values[..., None, :], _transposed(vectors))


def _dot(a, b):
    return jnp.matmul(a, b, precision="highest")


def _transposed(matrix):
    return jnp.swapaxes(matrix, -1, -2)
