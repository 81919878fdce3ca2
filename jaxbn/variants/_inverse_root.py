"""The inverse square root of positive definite matrices, with derivatives that do not fear equal eigenvalues."""

import jax
import jax.numpy as jnp
from jax import lax


@jax.custom_jvp
def inverse_square_root(matrix: jax.Array) -> jax.Array:
    """matrix**-1/2 by eigenvalues.

    With matrix = U diag(s**2) U^T the derivative in a symmetric direction dM is

        -U ((U^T dM U) / (s_i s_j (s_i + s_j))) U^T

    The derivative of the eigenvectors would divide by the gaps between eigenvalues; this divides by sums. In the
    eigenbasis each entry is divided by its own roots, so that a tiny eigenvalue, as of linearly dependent features,
    spreads no rounding error to the others.

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
    inverse = inverse_square_root(matrix)
    root = _dot(matrix, inverse)
    # The formula solves matrix dR root + root dR matrix = -dM. Further derivatives are taken from this equation, not
    # from the solver.
    roots, vectors = _eigen(lax.stop_gradient(matrix))
    across, along = roots[..., :, None], roots[..., None, :]
    factor = across * along * (across + along)
    return inverse, lax.custom_linear_solve(
        lambda d: _dot(_dot(matrix, d), root) + _dot(_dot(root, d), matrix),
        -(tangent + _transposed(tangent)) / 2,
        lambda _, b: _turned_back(_turned(b, vectors) / factor, vectors),
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


def _turned(matrix, vectors):
    """The matrix in the basis of the eigenvectors."""
    return _dot(_dot(_transposed(vectors), matrix), vectors)


def _turned_back(matrix, vectors):
    return _dot(_dot(vectors, matrix), _transposed(vectors))


def _compose(values, vectors):
    return _dot(vectors * values[..., None, :], _transposed(vectors))


def _dot(a, b):
    return jnp.matmul(a, b, precision="highest")


def _transposed(matrix):
    return jnp.swapaxes(matrix, -1, -2)
