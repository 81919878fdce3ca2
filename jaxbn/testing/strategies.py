"""Hypothesis strategies for what a normalizer may be given: shapes, layouts, masks, dtypes, offsets, scales.

Values are offset + small integer, times a power of two. All of it is exact in float32, so a law about shifted or scaled
inputs is about the normalizer and not about how the inputs were rounded; and it shrinks to something one can read.
Shapes come from short lists, since every new shape is a new compilation.
"""

from collections.abc import Sequence
from typing import NamedTuple

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np

# (values of each feature in brackets) [4], [8], [8] again as images.
SHAPES = ((4, 2), (8, 2), (2, 2, 2, 2))
LARGEST = 8
OFFSETS = (0.0, 1.0, -3.0, 10.0)
SCALES = (1.0, 0.125, 8.0)


class Batch(NamedTuple):
    """One input.

    Attributes:
      x: array, its features along `feature_axis`.
      feature_axis: -1, or 1 where channels come first.
      where: boolean mask of x's shape, True counts, or None; every feature keeps at least two values.
      weights: float32 of x's shape, at least 0.25, or None.
    """

    x: np.ndarray
    feature_axis: int
    where: np.ndarray | None
    weights: np.ndarray | None


def values(
    shape: tuple[int, ...],
    *,
    offsets: Sequence[float] = OFFSETS,
    scales: Sequence[float] = SCALES,
    largest: int = LARGEST,
) -> st.SearchStrategy[np.ndarray]:
    """float32 arrays of that shape: scale (offset + integers up to `largest` in magnitude)."""
    size = int(np.prod(shape))
    integers = st.lists(st.integers(-largest, largest), min_size=size, max_size=size)

    def build(integers, offset, scale):
        return (scale * (offset + np.reshape(np.array(integers, np.float64), shape))).astype(np.float32)

    return st.builds(build, integers, st.sampled_from(list(offsets)), st.sampled_from(list(scales)))


def masks(shape: tuple[int, ...], *, least: int = 2) -> st.SearchStrategy[np.ndarray]:
    """Boolean masks over [..., features] that leave every feature at least that many values."""
    rows = int(np.prod(shape[:-1]))
    column = st.tuples(st.permutations(range(rows)), st.integers(least, rows))

    def build(columns):
        mask = np.zeros((rows, shape[-1]), bool)
        for feature, (order, kept) in enumerate(columns):
            mask[list(order[:kept]), feature] = True
        return mask.reshape(shape)

    return st.lists(column, min_size=shape[-1], max_size=shape[-1]).map(build)


@st.composite
def batches(
    draw: st.DrawFn,
    *,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    dtypes: Sequence = (jnp.float32,),
    layouts: Sequence[int] = (-1,),
    masked: bool = True,
    weighted: bool = True,
    offsets: Sequence[float] = OFFSETS,
    scales: Sequence[float] = SCALES,
) -> Batch:
    """Batches for property tests of your own.

    Args:
      draw: given by hypothesis.
      shapes: [batch, ..., features], the candidates; keep the list short where each shape compiles.
      dtypes: candidates; values are rounded to them.
      layouts: feature axes: -1, and 1 for channels first (arrays of rank 2 are the same in both).
      masked: whether some batches have a mask.
      weighted: whether some have weights.
      offsets: of the mean, in units of the scale.
      scales: of the values, powers of two for exactness.
    """
    shape = draw(st.sampled_from(list(shapes)))
    x = draw(values(shape, offsets=offsets, scales=scales))
    x = np.asarray(x, jnp.dtype(draw(st.sampled_from(list(dtypes)))))
    where = draw(st.none() | masks(shape)) if masked else None
    weights = draw(st.none() | values(shape, offsets=(2.25,), scales=(1.0,), largest=2)) if weighted else None
    feature_axis = draw(st.sampled_from(list(layouts)))
    if feature_axis != -1:
        x = np.moveaxis(x, -1, feature_axis)
        where, weights = (None if v is None else np.moveaxis(v, -1, feature_axis) for v in (where, weights))
    return Batch(x, feature_axis, where, weights)
