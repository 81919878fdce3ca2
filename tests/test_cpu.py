"""Long rows: the same array, sums of it, and vectors spread over it, for whatever axes are reduced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jaxbn
from jaxbn._cpu import Rows, long_rows

FEW_FEATURES = [((4, 8, 8, 6), (0, 1, 2)), ((3, 12, 5), (0, 1)), ((2, 4, 4, 2, 3), (0, 1, 2)), ((5, 16), (0, 1))]
AS_THEY_ARE = [
    ((64, 6), (0,)),  # Positions of different examples may be on different devices.
    ((4, 8, 8, 64), (0, 1, 2)),
    ((4, 7, 7, 6), (0, 1, 2)),
    ((4, 6, 8, 8), (0, 2, 3)),
    ((4, 8, 8, 0), (0, 1, 2)),
    ((4, 8), ()),
    ((), ()),
]


@pytest.mark.parametrize(("shape", "axes"), FEW_FEATURES)
def test_rows_of_few_features_lie_beside_each_other(shape, axes):
    rows = long_rows(jnp.zeros(shape), axes)
    assert rows.beside > 1
    assert rows.lay(jnp.zeros(shape)).shape[-1] == rows.beside * np.prod(rows.features, dtype=int) <= 96


@pytest.mark.parametrize(("shape", "axes"), AS_THEY_ARE)
def test_other_arrays_stay_as_they_are(shape, axes):
    assert long_rows(jnp.zeros(shape), axes) == Rows(shape, axes)


@pytest.mark.parametrize(("shape", "axes"), FEW_FEATURES + AS_THEY_ARE)
def test_rows_hold_the_array_and_its_sums(shape, axes):
    rows = long_rows(jnp.zeros(shape), axes)
    x = jnp.arange(np.prod(shape, dtype=int), dtype=jnp.float32).reshape(shape)  # Sums are exact.
    np.testing.assert_array_equal(rows.back(rows.lay(x)), x)
    np.testing.assert_array_equal(rows.sum(rows.lay(x)), x.sum(axes))


@pytest.mark.parametrize(("shape", "axes"), FEW_FEATURES + AS_THEY_ARE)
def test_a_vector_spreads_over_the_features_and_transposes_to_sums(shape, axes):
    rows = long_rows(jnp.zeros(shape), axes)
    v = jnp.arange(np.prod(rows.features, dtype=int), dtype=jnp.float32).reshape(rows.features)
    x = jnp.arange(np.prod(shape, dtype=int), dtype=jnp.float32).reshape(shape)

    def broadcast(v):
        return rows.back(jnp.broadcast_to(rows.broadcast(v), rows.lay(x).shape))

    np.testing.assert_array_equal(broadcast(v), jnp.broadcast_to(jnp.expand_dims(v, axes), shape))
    np.testing.assert_array_equal(jax.linear_transpose(broadcast, v)(x)[0], x.sum(axes))


@pytest.mark.parametrize("sizes", ["b, h, w, 6", "b, 8, 8, 6", "b, 8, 8, c", "b, h, w, c"])
def test_sizes_may_be_symbols(sizes):
    def gradient(x, scale):
        return jax.grad(lambda x: jnp.sum(jaxbn.batch_normalize(x, scale, axis=(0, 1, 2), epsilon=1e-5)[0] ** 3))(x)

    shape = export.symbolic_shape(sizes)
    exported = export.export(jax.jit(gradient))(
        jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape[-1:], jnp.float32)
    )
    x, scale = jax.random.normal(jax.random.key(0), (4, 8, 8, 6)), jnp.arange(6.0)
    found, expected = exported.call(x, scale), gradient(x, scale)
    assert jnp.linalg.norm(found - expected) <= 1e-6 * jnp.linalg.norm(expected)
