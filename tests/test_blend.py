"""Running statistics blended with those of a few examples (Schneider et al. 2020)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from normalizers import KEY, draw

import jaxbn

STATS = {"mean": jnp.array([1.0, -2.0, 0.0]), "var": jnp.array([4.0, 1.0, 0.5])}
X = draw(0, (6, 3))
MOMENTS = jaxbn.moments(X, 0)


@pytest.mark.parametrize("prior_count", [0, 1, 16, 1e6])
@pytest.mark.parametrize("count", [None, 2])
def test_the_weight_of_the_running_statistics_is_the_papers(prior_count, count):
    blended = jaxbn.blend(STATS, MOMENTS, prior_count=prior_count, count=count)
    share = prior_count / (prior_count + (count or 6))
    for name, batch in (("mean", MOMENTS.mean), ("var", MOMENTS.var)):
        expected = share * np.asarray(STATS[name], float) + (1 - share) * np.asarray(batch, float)
        np.testing.assert_allclose(blended[name], expected, rtol=1e-6, atol=1e-6)


def test_no_prior_forgets_what_was_there():
    stats = {"mean": jnp.full(3, 1e6), "var": jnp.full(3, 1e8)}
    blended = jaxbn.blend(stats, MOMENTS, prior_count=0)
    np.testing.assert_array_equal(blended["mean"], MOMENTS.mean)
    np.testing.assert_array_equal(blended["var"], MOMENTS.var)


def test_a_feature_that_saw_nothing_and_a_batch_that_is_not_finite_keep_their_statistics():
    moments = jaxbn.moments(X, 0, where=np.array([True, False, True]))
    blended = jaxbn.blend(STATS, moments, prior_count=0)
    assert (blended["mean"][1], blended["var"][1]) == (-2, 1)
    same = jaxbn.blend(STATS, jaxbn.moments(X * jnp.nan, 0), prior_count=1)
    jax.tree.map(np.testing.assert_array_equal, same, STATS)


def test_averages_that_are_corrected_when_read_are_blended_as_they_read():
    stats = {"mean": STATS["mean"] / 4, "var": STATS["var"] / 4, "weight": jnp.full(3, 0.25)}
    blended = jaxbn.blend(stats, MOMENTS, prior_count=10, debias=True)
    mean, var = jaxbn.running_moments(blended, debias=True)
    expected = jaxbn.blend(STATS, MOMENTS, prior_count=10)
    np.testing.assert_allclose(mean, expected["mean"], rtol=1e-6)
    np.testing.assert_allclose(var, expected["var"], rtol=1e-6)


def test_no_gradient_flows_into_them():
    loss = lambda x: jnp.sum(jaxbn.blend(STATS, jaxbn.moments(x, 0), prior_count=1)["mean"])
    np.testing.assert_array_equal(jax.grad(loss)(X), 0)


class Deep(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        for _ in range(2):
            x = nn.relu(jaxbn.linen.BatchNorm(use_running_average=not train)(nn.Dense(5)(x)))
        return x


def test_a_deep_network_is_adapted_in_as_many_passes_as_it_has_layers():
    net, x = Deep(), draw(1, (7, 4), offset=6.0)
    variables = net.init(KEY, x, train=False)
    apply = jax.jit(lambda v, x: net.apply(v, x, train=True, mutable=["batch_stats"])[1]["batch_stats"])
    stats = variables["batch_stats"]
    for _ in range(2):
        moments = jaxbn.input_moments(apply, {**variables, "batch_stats": stats}, [x])
        stats = jaxbn.blend(variables["batch_stats"], moments, prior_count=16)
    # Layer by layer, as the paper has it: each sees what the adapted layers below make of the examples.
    for layer in range(2):
        dense = jax.tree.map(np.asarray, variables["params"][f"Dense_{layer}"])
        z = np.asarray(x, float) @ dense["kernel"] + dense["bias"]
        mean, var = 7 / 23 * z.mean(0), 16 / 23 + 7 / 23 * z.var(0)
        np.testing.assert_allclose(stats[f"BatchNorm_{layer}"]["mean"], mean, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(stats[f"BatchNorm_{layer}"]["var"], var, rtol=1e-5)
        x = np.maximum((z - mean) / np.sqrt(var + 1e-5), 0)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: jaxbn.blend(STATS, MOMENTS, prior_count=-1), "prior_count=-1"),
        (lambda: jaxbn.blend(STATS, MOMENTS, prior_count=1, count=-2), "count=-2"),
        (lambda: jaxbn.blend(STATS, {"norm": MOMENTS}, prior_count=1), r"the layer 'norm'; batch_stats has.*''"),
        (lambda: jaxbn.blend(STATS, jaxbn.moments(X), prior_count=1), r"features of shape \(\)"),
    ],
)
def test_what_does_not_fit_is_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()
