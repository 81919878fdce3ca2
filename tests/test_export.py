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


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype float64")  # jax2onnx's own.
@pytest.mark.parametrize("name", ["batch_norm", "batch_renorm", "rms_norm"])
def test_onnx_evaluates_batches_of_any_size_alike(name):
    """See RECIPES_MODULES for what jax2onnx does not take."""
    reason = "the export to ONNX is checked where jax2onnx and onnxruntime are installed"
    to_onnx = pytest.importorskip("jax2onnx", reason=reason).to_onnx
    runtime = pytest.importorskip("onnxruntime", reason=reason)
    norm, variables, x = CASES[name].build(None), ready(name).variables, np.asarray(draw()[:6])

    def evaluate(x):
        return norm.apply(variables, x, train=False)[0]

    session = runtime.InferenceSession(to_onnx(evaluate, inputs=[("B", *x.shape[1:])]).SerializeToString())
    (y,) = session.run(None, {session.get_inputs()[0].name: x})
    np.testing.assert_allclose(y, evaluate(x), rtol=1e-5, atol=1e-5)
