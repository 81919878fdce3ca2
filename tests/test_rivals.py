"""The normalizer and the networks that all rivals of batch norm share, against each norm of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from experiments.training import rival_norms
from experiments.training.rival_norms import BATCH, EPSILON, GROUP, GROUPS, INSTANCE, KINDS, LAYER, NONE, WEIGHT, Rivals

RANDOM = np.random.default_rng(0)
IMAGES = jnp.asarray(RANDOM.normal(1.0, 2.0, (8, 3, 3, 4)), jnp.float32)
ROWS = jnp.asarray(RANDOM.normal(1.0, 2.0, (8, 4)), jnp.float32)
NORMS = {
    NONE: jaxbn.identity(),
    BATCH: jaxbn.batch_norm(decay=rival_norms.DECAY, epsilon=EPSILON),
    LAYER: jaxbn.layer_norm(axis=(1, 2, 3), feature_axis=-1, epsilon=EPSILON),
    GROUP: jaxbn.group_norm(GROUPS, epsilon=EPSILON),
    INSTANCE: jaxbn.instance_norm(epsilon=EPSILON),
}
FLOAT32 = dict(rtol=1e-5, atol=2e-5)  # another order of sums


def switched(kind):
    return rival_norms.switched(jnp.asarray(KINDS.index(kind), jnp.float32))


def applied(norm, x, train):
    variables = norm.init(jax.random.key(0), x)
    _, moved = norm.apply(variables, x, train=True)
    return norm.apply({**variables, "batch_stats": moved}, 3 * x + 1, train=train)[0]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kind", NORMS)
def test_each_kind_is_the_norm_of_that_name(kind, train):
    np.testing.assert_allclose(applied(switched(kind), IMAGES, train), applied(NORMS[kind], IMAGES, train), **FLOAT32)


def test_instance_norm_leaves_a_dense_layer_as_it_is():
    np.testing.assert_array_equal(applied(switched(INSTANCE), ROWS, True), 3 * ROWS + 1)


def run_of(kind, he=0, standardized=0):
    numbers = {"kind": KINDS.index(kind), "he": he, "standardized": standardized}
    return {name: jnp.asarray(value, jnp.float32) for name, value in numbers.items()}


def rivals(network="MLP"):
    first = RANDOM.uniform(size=(16, 28, 28, 1)).astype(np.float32)
    return Rivals(rival_norms.NETWORKS[network], rival_norms.Sizes(True, 1, 4), first, (0.5, 0.25))


@pytest.mark.parametrize(
    "network", [pytest.param(n, marks=() if n == "MLP" else pytest.mark.slow) for n in rival_norms.NETWORKS]
)
def test_weight_norm_starts_as_batch_norm_on_the_first_images(network):
    own = rivals(network)
    found = [
        own.apply(own.init(run_of(kind), jax.random.key(0), own.first), own.first, train=True)[0]
        for kind in (WEIGHT, BATCH)
    ]
    np.testing.assert_allclose(*found, rtol=1e-3, atol=1e-3)  # epsilon beside variances of 0.01 and more


def test_weight_norm_does_not_depend_on_the_size_of_its_kernels():
    own = rivals()
    variables = own.init(run_of(WEIGHT), jax.random.key(0), own.first)
    scaled = {**variables, "params": rival_norms.map_kernels(lambda kernel: 3 * kernel, variables["params"])}
    found = [own.apply(some, own.first, train=True)[0] for some in (variables, scaled)]
    np.testing.assert_allclose(*found, **FLOAT32)


@pytest.mark.parametrize(("he", "expected"), [(1, 2 / 196), (0, 2 / (196 + 100))])
def test_initial_weights_have_the_variance_of_he_or_of_xavier(he, expected):
    own = rivals()
    kernel = own.init(run_of(NONE, he), jax.random.key(0), own.first)["params"][0]["layer"]["kernel"]
    assert kernel.shape == (100, 196)
    np.testing.assert_allclose(jnp.var(kernel), expected, rtol=0.05)  # of 19,600 draws: off by 1% or so


def test_standardized_inputs_are_those_of_the_run_alone():
    own = rivals()
    plain, standardized = (own.init(run_of(NONE, standardized=on), jax.random.key(0), own.first) for on in (0, 1))
    expected, _ = own.apply(plain, (own.first - 0.5) / 0.25, train=True)
    np.testing.assert_allclose(own.apply(standardized, own.first, train=True)[0], expected, **FLOAT32)
