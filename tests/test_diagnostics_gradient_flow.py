"""Norms, dead and saturated units, ranks and effective rates against numbers worked out by hand or by numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbn
from jaxbn.diagnostics import gradient_flow
from jaxbn.training import LossOutput

RATE = 0.1
ROUNDING = 1e-5  # of singular values: some roundings of float32 times the size of the matrix


def tapped(variables, batch, rng, tap):
    """The mean over values of `relu(x w)`, x w tapped as "h"."""
    h = tap("h", batch @ variables["params"]["w"])
    return LossOutput(jnp.sum(jax.nn.relu(h)), h.size, {})


def flow(x, w, **arguments):
    return gradient_flow(
        tapped, {"params": {"w": jnp.asarray(w, float)}}, jnp.asarray(x, float), rate=RATE, **arguments
    )


def layer(h, **arguments):
    """Figures of a layer whose values are h."""
    return flow(h, np.eye(np.shape(h)[-1]), **arguments).layers["h"]


def test_norms_of_a_linear_layer():
    x, w = np.array([[1.0, 2.0], [3.0, 4.0]]), np.eye(2)
    found = flow(x, w)
    gradient = x.T @ np.full((2, 2), 1 / 4)  # all values are positive, and each counts a quarter
    (param,) = found.params.values()
    assert list(found.params) == ["w"]
    assert found.loss == pytest.approx(10 / 4)
    assert found.layers["h"].rms == pytest.approx(np.sqrt(30 / 4))
    assert found.layers["h"].gradient_norm == pytest.approx(np.sqrt(4 / 16))
    assert param.norm == pytest.approx(np.sqrt(2))
    assert param.gradient_norm == pytest.approx(np.linalg.norm(gradient))
    assert param.update_norm == pytest.approx(RATE * np.linalg.norm(gradient))
    assert param.relative_update == pytest.approx(RATE * np.linalg.norm(gradient) / np.sqrt(2))
    assert param.effective_rate == pytest.approx(RATE / 2)
    assert param.radial == pytest.approx(np.sum(w * gradient) / np.sqrt(2) / np.linalg.norm(gradient))


def test_the_update_is_the_optimizers():
    optimizer = optax.sign_sgd(0.5)
    found = flow([[1.0, 2.0]], np.eye(2), optimizer=optimizer, opt_state=optimizer.init({"w": jnp.eye(2)}))
    assert found.params["w"].update_norm == pytest.approx(0.5 * 2)  # four entries of +-0.5


def test_dead_relus_pass_nothing_on_for_any_example():
    found = layer([[1.0, -1.0, -2.0], [1.0, 3.0, -1.0]])
    assert found.saturated == pytest.approx(3 / 6)
    assert found.dead == pytest.approx(1 / 3)


def test_a_relu_may_be_tapped_behind_it():
    values = np.array([[1.0, -1.0, -2.0], [1.0, 3.0, -1.0]])
    assert layer(np.maximum(values, 0)).dead == layer(values).dead


def test_saturated_units_of_tanh():
    limit = np.arctanh(np.sqrt(1 - 0.01))  # where the slope 1 - tanh^2 is 0.01
    found = layer([[limit + 0.01, limit - 0.01], [-limit - 0.01, 0.0]], activation=jnp.tanh)
    assert found.saturated == pytest.approx(2 / 4)
    assert found.dead == pytest.approx(1 / 2)
    assert layer([[limit + 0.01]], activation=jnp.tanh, flat_below=0.005).saturated == 0


@pytest.mark.parametrize(
    ("singular", "effective", "participation"),
    [
        ([1.0, 1.0, 1.0, 1.0], 4, 4),
        ([5.0, 0.0, 0.0, 0.0], 1, 1),
        ([2.0, 2.0, 0.0, 0.0], 2, 2),
        ([3.0, 1.0, 0.0, 0.0], 4 / 3**0.75, 100 / 82),  # entropy of (3/4, 1/4) is log 4 - 3/4 log 3
        ([0.0, 0.0, 0.0, 0.0], 0, 0),
        ([1e15, 1e15, 0.0, 0.0], 2, 2),
    ],
)
def test_ranks_of_a_matrix_of_known_singular_values(singular, effective, participation):
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=shape))[0] for shape in ((12, 4), (4, 4)))
    matrix = (left * np.array(singular)) @ right.T
    found = layer(matrix.reshape(3, 4, 4))  # leading axes count as examples
    # A singular value of 0 comes out as a rounding, whose entropy is that times its logarithm.
    assert found.effective_rank == pytest.approx(effective, rel=20 * ROUNDING)
    assert found.participation == pytest.approx(participation, rel=ROUNDING)
    assert found.rank == np.count_nonzero(singular)


def test_weights_below_batch_norm_have_a_gradient_across_them():
    norm = jaxbn.batch_norm(use_scale=False, use_bias=False, epsilon=1e-12)

    def loss(variables, batch, rng, tap):
        h = tap("h", batch @ variables["params"]["w"])
        y, moved = norm.apply({"params": {}, "batch_stats": variables["batch_stats"]}, h, train=True)
        return LossOutput(jnp.sum(y**3), h.shape[0], moved)

    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((32, 5), (5, 3)))
    batch_stats = norm.init(jax.random.key(0), x @ w)["batch_stats"]
    one, ten = (
        gradient_flow(loss, {"params": {"w": size * w}, "batch_stats": batch_stats}, x, rate=RATE).params["w"]
        for size in (1, 10)
    )
    assert abs(one.radial) < ROUNDING
    assert ten.effective_rate == pytest.approx(float(one.effective_rate) / 100, rel=ROUNDING)
    assert ten.gradient_norm == pytest.approx(float(one.gradient_norm) / 10, rel=1e-4)


def test_a_param_of_zeros_has_no_relative_update_and_no_effective_rate():
    found = flow([[1.0, 1.0]], np.zeros((2, 2))).params["w"]
    assert np.isnan([found.relative_update, found.effective_rate, found.radial]).all()
