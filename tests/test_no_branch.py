"""A layer's program for GPUs and TPUs has no loop and no branch that waits for a value of the data."""

import jax
import jax.extend as jex
import jax.numpy as jnp
import numpy as np
import pytest
from hard_inputs import cotangent
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from normalizers import CASES, KEY, draw

import jaxbn
from jaxbn import _cpu


def branches(norm, x, *, mesh=None, code="default", **arguments):
    """How many, in the trace for y, the gradients by x and params, and the new statistics."""
    variables = norm.init(KEY, x)
    params = variables.get("params", {})

    def layer(params, x, dy):
        def forward(params, x):
            return norm.apply({**variables, "params": params}, x, train=True, **arguments)

        y, pull, moved = jax.vjp(forward, params, x, has_aux=True)
        return y, pull(dy), moved

    if mesh is not None:
        split, whole = P("data"), P()
        out = split, (whole, split), whole
        layer = jax.shard_map(layer, mesh=mesh, in_specs=(whole, split, split), out_specs=out)
    with _cpu.force(code):
        return waiting(jax.make_jaxpr(layer)(params, x, cotangent(x.shape)).jaxpr)


def waiting(jaxpr):
    """Loops of which values decide the end, and branches; a scan or a loop of a fixed number of rounds is neither."""
    found = sum(equation.primitive.name in ("while", "cond") for equation in jaxpr.eqns)
    return found + sum(map(waiting, jex.core.subjaxprs(jaxpr)))


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("name", CASES)
def test_of_every_normalizer(name, masked):
    case = CASES[name]
    x = draw()
    where = {"where": jnp.asarray(np.arange(len(x)) % 5 > 0).reshape(-1, *(1,) * (x.ndim - 1))} if masked else {}
    assert branches(case.build(None), x, **case.arguments, **where) == 0


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("choice", [{}, {"group_size": 4}, {"axis_index_groups": [[0, 1, 2, 3], [4, 5, 6, 7]]}])
def test_of_batch_norm_on_eight_devices(choice, masked):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x = np.random.default_rng(0).normal(size=(32, 3, 6)).astype(np.float32)
    where = {"where": jnp.asarray(np.arange(4) % 5 > 0).reshape(-1, 1, 1)} if masked else {}  # of a device's four
    assert branches(jaxbn.batch_norm(axis_name="data", **choice), x, mesh=mesh, **where) == 0


def test_that_a_loop_would_be_seen():
    """On CPUs there is one: sums around zero, and again where they lost digits."""
    assert branches(CASES["batch_norm"].build(None), draw(), code="cpu") == 1
