"""Programs exported for batches of any size compute what the normalizer computes, in both modes."""

import jax
import numpy as np
import pytest
from jax import export
from normalizers import CASES, draw, ready

# The dimension of the batch, and what is known of it.
BATCHES = {
    "batch_norm": ("b", ()),
    "batch_renorm": ("b", ()),
    "ghost_batch_norm": ("2*b", ()),
    "virtual_batch_norm": ("b", ("b >= 3",)),
    "whitening_norm": ("b", ()),
    "group_norm": ("b", ()),
}


@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", BATCHES)
def test_a_program_takes_batches_of_any_size(name, train):
    norm, variables, x = CASES[name].build(None), ready(name).variables, draw()[:6]
    size, constraints = BATCHES[name]
    (batch,) = export.symbolic_shape(size, constraints=constraints)
    apply = jax.jit(lambda variables, x: norm.apply(variables, x, train=train))
    exported = export.export(apply)(variables, jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype))
    found, expected = exported.call(variables, x), apply(variables, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected)
