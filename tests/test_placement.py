"""The experiment `placement`: its mathematics against closed forms, and its network against those of one placement."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

import jaxbn
from experiments import placement
from experiments.training import gaussianity
from experiments.training.placed_norm import PlacedNorm

RNG = np.random.default_rng(0)
NORM = jaxbn.batch_norm(decay=0.9, epsilon=1e-3)
NETWORK = PlacedNorm(NORM, layers=3, width=5)
INIT, APPLY = jax.jit(NETWORK.init), jax.jit(NETWORK.apply, static_argnames="train")  # one program for all switches


@pytest.mark.parametrize("ones", [1, 10, 50])
def test_moments_of_zeros_and_ones_are_those_of_bernoulli(ones):
    p = ones / 100
    skewness, kurtosis = gaussianity.moments(jnp.asarray((np.arange(100) < ones)[:, None], jnp.float32))
    # Sums of 100 float32 numbers, and powers of order 100.
    np.testing.assert_allclose(skewness[0], (1 - 2 * p) / np.sqrt(p * (1 - p)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(kurtosis[0], (1 - 6 * p * (1 - p)) / (p * (1 - p)), rtol=1e-4)


def test_moments_and_test_are_those_of_scipy():
    z = 3 + RNG.gamma(50.0, size=(200, 4)).astype(np.float32)
    skewness, kurtosis = gaussianity.moments(jnp.asarray(z))
    p_value = gaussianity.jarque_bera_p_value(skewness, kurtosis, len(z))
    # scipy's in float64 of the same numbers; |z| is 8 times the deviation, and fourth powers of it are taken.
    np.testing.assert_allclose(skewness, scipy.stats.skew(z.astype(float)), atol=1e-4)
    np.testing.assert_allclose(kurtosis, scipy.stats.kurtosis(z.astype(float)), atol=1e-4)
    np.testing.assert_allclose(p_value, scipy.stats.jarque_bera(z.astype(float), axis=0).pvalue, atol=1e-3)


def test_gaussians_pass_in_nineteen_of_twenty_cases_and_exponentials_never():
    samples = np.stack([RNG.normal(size=(1000, 2000)), RNG.exponential(size=(1000, 2000))])
    found = gaussianity.summary(jnp.asarray(samples, jnp.float32))
    # With 1,000 samples the test of level 5% is one of 4 to 5%; the share of 2,000 is known to 0.005.
    np.testing.assert_allclose(found["passes the test"], [0.955, 0], atol=0.015)
    np.testing.assert_allclose(found["skewness"][1], 2, atol=0.1)  # of an exponential; the estimate is biased


def test_constant_units_are_left_out():
    z = np.stack([np.full(100, 0.7), np.arange(100) < 50], axis=1).astype(np.float32)
    found = gaussianity.summary(jnp.asarray(z))
    np.testing.assert_allclose(found["excess kurtosis"], -2 + 4, atol=1e-5)  # its size
    assert jnp.isnan(gaussianity.summary(jnp.asarray(z[:, :1]))["skewness"])


def variables_of(arm, sigmoid=0.0):
    """The network's variables with the switches of one arm, its kernels, and images."""
    switches = jax.tree.map(lambda leaf: jnp.asarray(leaf[placement.ARMS.index(arm)]), placement.switches(3))
    images = jax.random.normal(jax.random.key(1), (8, 6))
    variables = INIT(switches._replace(sigmoid=jnp.asarray(sigmoid)), jax.random.key(0), images)
    params = variables["params"]
    kernels = [params["first"]["kernel"], *params["rest"]["kernel"], params["head"]["kernel"]]
    return variables, [np.asarray(kernel) for kernel in kernels], np.asarray(images)


def standardized(z):
    return (z - z.mean(0, keepdims=True)) / np.sqrt(z.var(0, keepdims=True) + 1e-3)


def written_out(arm, kernels, x, activation):
    """The network of one arm, by hand."""
    *hidden, head = kernels
    for number, kernel in enumerate(hidden):
        x = standardized(x) if arm == placement.X or (arm == placement.IMAGE and number == 0) else x
        h = x @ kernel
        alone = {placement.FIRST: 0, placement.LAST: len(hidden) - 1}.get(arm)
        x = activation(standardized(h) if arm == placement.XW or number == alone else h)
        x = standardized(x) if arm == placement.AFTER else x
    return x @ head


@pytest.mark.parametrize("sigmoid", [0.0, 1.0])
@pytest.mark.parametrize("arm", placement.ARMS)
def test_every_arm_normalizes_where_its_name_says(arm, sigmoid):
    variables, kernels, images = variables_of(arm, sigmoid)
    logits, _ = APPLY(variables, images, train=True)
    expected = written_out(arm, kernels, images, scipy.special.expit if sigmoid else lambda h: np.maximum(h, 0))
    # Sums of six products at most, divided by deviations down to sqrt(epsilon) = 0.03.
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_a_bias_under_a_norm_and_a_norm_that_is_off_have_no_gradient():
    variables, _, images = variables_of(placement.XW)

    def loss(params):
        return jnp.sum(APPLY({**variables, "params": params}, images, train=True)[0] ** 2)

    gradient = jax.jit(jax.grad(loss))(variables["params"])
    for layer in ("first", "rest"):
        np.testing.assert_array_equal(gradient[layer]["x"]["scale"], 0)
        size = np.abs(gradient[layer]["kernel"]).max()
        # Eight terms that cancel, each as large as the gradient of a weight.
        np.testing.assert_allclose(gradient[layer]["bias"], 0, atol=1e-5 * size)
        assert np.abs(gradient[layer]["xw"]["bias"]).max() > 0


def test_x_is_what_comes_out_of_the_activation_below():
    variables, kernels, images = variables_of(placement.NONE)
    seen = jax.jit(NETWORK.seen)(variables, images)
    expected = np.maximum(images @ kernels[0], 0)
    np.testing.assert_allclose(seen.x[0], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(seen.xw[0], expected @ kernels[1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(seen.x[1], jax.nn.relu(seen.xw[0]), rtol=1e-5, atol=1e-6)
