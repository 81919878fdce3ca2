"""Statistics drawn at test time, and noise after normalization."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from normalizers import KEY, QUICK, draw, in_training

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn import variants

BATCHES = [draw(seed, (12, 4)) for seed in range(3)]
X = draw(9, (5, 4))
CLOSE = {"rtol": 3e-6, "atol": 3e-6}  # A few roundings of float32 of outputs of size one.


def recorded(bank_size, batches=BATCHES):
    norm = variants.stochastic_batch_norm(bank_size=bank_size)
    variables = norm.init(KEY, X)
    step = jax.jit(lambda v, x: norm.apply(v, x, train=True)[1], compiler_options=QUICK)
    for x in batches:
        variables = variables | {"batch_stats": step(variables, x)}
    return norm, variables


def by_batch(batch):
    wide = np.asarray(batch, np.float64)
    return (np.asarray(X, np.float64) - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-5)


def test_bank_holds_the_latest_batches():
    _, variables = recorded(bank_size=2)
    stats = variables["batch_stats"]
    assert stats["step"] == 3
    for slot, batch in enumerate((BATCHES[2], BATCHES[1])):
        np.testing.assert_allclose(stats["mean_bank"][slot], np.mean(batch, 0), rtol=1e-6)
        np.testing.assert_allclose(stats["var_bank"][slot], np.var(batch, 0), rtol=1e-5)


def test_key_draws_the_moments_of_one_recorded_batch_each_about_as_often():
    norm, variables = recorded(bank_size=8)
    keys = jax.random.split(KEY, 300)
    ys = jax.jit(jax.vmap(lambda rng: norm.apply(variables, X, train=False, rng=rng)[0]))(keys)
    distances = np.stack([np.max(np.abs(ys - by_batch(batch)[None]), axis=(1, 2)) for batch in BATCHES])
    np.testing.assert_array_less(distances.min(0), 1e-5)
    # Binomial(300, 1/3): standard deviation 8.2; four of them.
    np.testing.assert_allclose(np.bincount(distances.argmin(0), minlength=3), 100, atol=33)


def test_layers_with_one_key_draw_the_same_batch():
    norm, variables = recorded(bank_size=8)
    other, others = recorded(bank_size=8, batches=[2 * b for b in BATCHES])
    for rng in jax.random.split(KEY, 5):
        y = norm.apply(variables, X, train=False, rng=rng)[0]
        twice = other.apply(others, 2 * X, train=False, rng=rng)[0]
        np.testing.assert_allclose(y, twice, rtol=1e-4, atol=1e-4)


def test_evaluation_without_a_key_is_batch_norm():
    norm, variables = recorded(bank_size=2)
    stats = {name: variables["batch_stats"][name] for name in ("mean", "var")}
    plain, _ = jaxbn.batch_norm().apply({"params": variables["params"], "batch_stats": stats}, X, train=False)
    np.testing.assert_array_equal(norm.apply(variables, X, train=False)[0], plain)


def test_empty_bank_falls_back_on_the_running_statistics():
    norm, variables = recorded(bank_size=2, batches=[])
    drawn, _ = norm.apply(variables, X, train=False, rng=KEY)
    np.testing.assert_array_equal(drawn, norm.apply(variables, X, train=False)[0])


def test_batch_that_is_not_finite_is_not_recorded():
    norm, variables = recorded(bank_size=2)
    _, stats = norm.apply(variables, BATCHES[0].at[0, 0].set(jnp.nan), train=True)
    jax.tree.map(np.testing.assert_array_equal, stats, variables["batch_stats"])


def test_bank_without_room_is_refused():
    with pytest.raises(ValueError, match="bank_size=0"):
        variants.stochastic_batch_norm(bank_size=0)


def test_noise_of_zero_width_is_no_noise():
    plain = jaxbn.batch_norm()
    norm = variants.noisy(plain, mean_range=0, scale_range=1, mean_spread=0, scale_spread=0)
    variables = in_training(plain, X)
    expected, _ = plain.apply(variables, X, train=True)
    np.testing.assert_allclose(norm.apply(variables, X, train=True, rng=KEY)[0], expected, **CLOSE)


def test_noise_has_the_published_distribution():
    # On zeros y is the shift, on a difference of one the gain.
    norm = variants.noisy(jaxbn.identity())
    variables, zeros = norm.init(KEY, X), jnp.zeros((4000, 50))
    run = jax.jit(lambda x: norm.apply(variables, x, train=True, rng=KEY)[0])
    shift = np.asarray(run(zeros))
    gain = np.asarray(run(zeros + 1)) - shift
    mean, scale = shift.mean(0), gain.mean(0)
    # Within a unit: uniform of half width 0.1 (std 0.1 / sqrt 3) and normal of std 0.1; 4,000 draws give 3%.
    np.testing.assert_allclose(shift.std(0), 0.1 / np.sqrt(3), rtol=0.06)
    np.testing.assert_allclose(gain.std(0), 0.1, rtol=0.06)
    # AxisGroup the 50 units: uniform(-0.5, 0.5) and uniform(1, 1.25).
    assert np.abs(mean).max() < 0.51
    assert np.abs(mean).max() > 0.35
    assert scale.min() > 0.99
    assert scale.max() < 1.26
    assert np.ptp(scale) > 0.15


def test_each_key_gives_a_new_distribution_of_noise():
    norm = variants.noisy(jaxbn.identity())
    zeros = jnp.zeros((500, 3))
    means = [np.mean(norm.apply({"batch_stats": {}}, zeros, train=True, rng=jax.random.key(i))[0], 0) for i in (1, 2)]
    assert np.all(np.abs(means[0] - means[1]) > 0.02)


def test_evaluation_has_no_noise():
    plain = jaxbn.batch_norm()
    norm, variables = variants.noisy(plain, activation=jax.nn.relu), in_training(plain, X)
    expected = jax.nn.relu(plain.apply(variables, X, train=False)[0])
    np.testing.assert_array_equal(norm.apply(variables, X, train=False, rng=KEY)[0], expected)


def test_training_without_a_key_is_refused():
    norm = variants.noisy(jaxbn.identity())
    with pytest.raises(ValueError, match="rng="):
        norm.apply({"batch_stats": {}}, X, train=True)


def test_gains_below_one_are_refused():
    with pytest.raises(ValueError, match=r"scale_range=0\.5"):
        variants.noisy(jaxbn.batch_norm(), scale_range=0.5)


BANKED = variants.stochastic_batch_norm(bank_size=4)


def is_variable(node):
    return isinstance(node, nnx.Variable)


def banked(stats):
    """A bank in which each recorded batch has a mean of its own: slot + 1 in every layer, and variance 1."""
    means = jnp.broadcast_to(jnp.arange(1.0, 5.0)[:, None], stats["mean_bank"].shape)
    return stats | {"mean_bank": means, "var_bank": jnp.ones_like(means), "step": jnp.asarray(4, jnp.int32)}


class Drawing(nn.Module):
    """Tells which batch each of three layers draws."""

    norm: jaxbn.Normalizer

    @nn.compact
    def __call__(self, x):
        layers = [jaxbn.linen.Norm(self.norm, use_running_average=True, name=f"layer_{i}") for i in range(3)]
        return jnp.stack([-layer(jnp.zeros_like(x))[0, 0] for layer in layers])


@pytest.mark.parametrize("norm", [BANKED, variants.frozen(BANKED), jaxbn.recordable(BANKED)])
def test_all_linen_layers_draw_one_batch(norm):
    model = Drawing(norm)
    variables = model.init(KEY, X)
    stats = {name: banked(layer) for name, layer in variables["batch_stats"].items()}
    draw_at = jax.jit(lambda key: model.apply({**variables, "batch_stats": stats}, X, rngs={"norm": key}))
    drawn = np.stack([np.round(draw_at(key)) for key in jax.random.split(KEY, 16)])
    np.testing.assert_array_equal(drawn, drawn[:, :1] * np.ones(3))
    assert len(set(drawn[:, 0])) > 1


def test_all_nnx_layers_draw_one_batch():
    rngs = nnx.Rngs(0, norm=1)
    layers = [jaxbn.nnx.Norm(BANKED, 4, use_running_average=True, rngs=rngs) for _ in range(3)]
    for layer in layers:
        stats = banked({name: v[...] for name, v in layer.batch_stats.items()})
        jax.tree.map(
            lambda v, new: v.set_value(new), layer.batch_stats, stats, is_leaf=lambda v: isinstance(v, nnx.Variable)
        )
    drawn = np.array([[float(jnp.round(-layer(jnp.zeros((2, 4)))[0, 0])) for layer in layers] for _ in range(8)])
    np.testing.assert_array_equal(drawn, drawn[:, :1] * np.ones(3))
    assert len(set(drawn[:, 0])) > 1


def test_noise_is_each_layers_own():
    model = Drawing(variants.noisy(jaxbn.batch_norm()))
    rngs = nnx.Rngs(0, norm=1)
    layers = [jaxbn.nnx.Norm(model.norm, 4, rngs=rngs) for _ in range(2)]
    assert not np.any(layers[0](X) == layers[1](X))
