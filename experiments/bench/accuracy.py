"""How far a batch-norm layer of each library is from float64, on batches that lie far from zero, are huge or flat.

    python -m experiments bench accuracy

The output and the gradient by the input, in training mode, float32, each feature's error relative to the size of what
the exact value is a sum of: the largest over the features. The reference is NumPy in float64, of the same float32
inputs; the output of a constant, which is 0, is judged against 0.001. No clock: the figures are the same on every run.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxbn
from experiments.bench.peers import OURS, installed
from experiments.framework.tables import Table

ROWS, FEATURES = 1024, 16
EPSILON = 1e-5  # of all the libraries

Normalized = tuple[np.ndarray, np.ndarray]  # y and the gradient by x, [ROWS, FEATURES]


class Row(NamedTuple):
    """One input.

    Attributes:
      name: of the input.
      y: error of the output, by library; NaN where it is not finite.
      dx: error of the gradient by x.
    """

    name: str
    y: dict[str, float]
    dx: dict[str, float]


def inputs() -> dict[str, np.ndarray]:
    """Batches [ROWS, FEATURES] in float32, by name."""
    noise = np.random.default_rng(0).standard_normal((ROWS, FEATURES))
    first = np.zeros((ROWS, 1))
    first[0] = 1
    drawn = {f"mean {ratio:g} std": ratio + noise for ratio in (0, 1, 10, 100, 1e4, 1e6)}
    drawn |= {
        "size 1e18": 1e18 * noise,
        "outlier 1e4 std in the first row": noise + 1e4 * first,
        "constant 1e4": np.full_like(noise, 1e4),
    }
    return {name: x.astype(np.float32) for name, x in drawn.items()}


def measured() -> Iterator[Row]:
    """Every input, by every library that is installed."""
    return (measure(name, x) for name, x in inputs().items())


def measure(name: str, x: np.ndarray) -> Row:
    """Errors of every library on one input [ROWS, FEATURES]."""
    dy = np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)
    exact, sizes = reference(x, dy)
    found = {library: normalized(x, dy) for library, normalized in libraries().items()}
    y, dx = ({library: error(f[i], exact[i], sizes[i]) for library, f in found.items()} for i in (0, 1))
    return Row(name, y, dx)


def reference(x: np.ndarray, dy: np.ndarray) -> tuple[Normalized, Normalized]:
    """Exact y and dx, and the sizes of what they are sums of, to whose norms errors are relative; 0.001 at least."""
    x, dy = x.astype(np.float64), dy.astype(np.float64)
    centered = x - x.mean(0)
    rstd = 1 / np.sqrt((centered**2).mean(0) + EPSILON)
    xhat = centered * rstd
    dx = rstd * (dy - dy.mean(0) - xhat * (dy * xhat).mean(0))
    return (xhat, dx), (np.maximum(np.abs(xhat), 1e-3), np.abs(rstd * dy))


def error(found: np.ndarray, exact: np.ndarray, size: np.ndarray) -> float:
    """Largest over the features of |found - exact| / |size|, norms over the rows."""
    with np.errstate(over="ignore", invalid="ignore"):
        apart = np.linalg.norm(found.astype(np.float64) - exact, axis=0) / np.linalg.norm(size, axis=0)
    return float(np.max(apart))


def libraries() -> dict:
    """normalized(x, dy) -> (y, dx) of every library that is installed, our own first."""
    norms = {OURS: jaxbn.batch_norm()} | installed()
    found = {name: jax.tree_util.Partial(_in_jax, norm) for name, norm in norms.items()}
    return found | ({"torch": _in_torch} if importlib.util.find_spec("torch") else {})


def _in_jax(norm: jaxbn.Normalizer, x: np.ndarray, dy: np.ndarray) -> Normalized:
    variables = norm.init(jax.random.key(0), jnp.zeros_like(x))

    @jax.jit
    def both(x: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, pull = jax.vjp(lambda x: norm.apply(variables, x, train=True)[0], x)
        return y, pull(dy)[0]

    y, dx = both(x, dy)
    return np.asarray(y), np.asarray(dx)


def _in_torch(x: np.ndarray, dy: np.ndarray) -> Normalized:
    import torch

    given = torch.tensor(x, requires_grad=True)
    y = torch.nn.BatchNorm1d(x.shape[-1], eps=EPSILON)(given)
    y.backward(torch.tensor(dy))
    return y.detach().numpy(), given.grad.numpy()


def tabulate(rows: Sequence[Row]) -> list[Table]:
    """A table of the output's errors and one of the gradient's."""
    names = list(rows[0].y)
    note = f"float32, {ROWS} rows; the largest over {FEATURES} features."
    return [
        Table(title, ["x", *names], [[row.name, *(f"{errors(row)[n]:.0e}" for n in names)] for row in rows], note)
        for title, errors in (
            ("Error of the output", lambda row: row.y),
            ("Error of the gradient by the input", lambda row: row.dx),
        )
    ]
