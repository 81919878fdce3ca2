"""Averages of params over training steps: what they are, and that every step keeps them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbn
from jaxbn import training

STEPS = 7
RATE = 0.1
X = np.random.default_rng(0).normal(1, 2, (3, 8, 3)).astype(np.float32)


def followed(**options):
    """The averages after each of STEPS steps of p -> p - RATE, from 1, and the params."""
    optimizer = training.averaging(optax.sgd(RATE), **options)
    params = {"w": jnp.ones(2, jnp.bfloat16)} if options.pop("low", False) else {"w": jnp.ones(2)}
    state, averages, seen = optimizer.init(params), [], []
    for _ in range(STEPS):
        updates, state = optimizer.update({"w": jnp.ones(2)}, state, params)
        params = optax.apply_updates(params, updates)
        averages.append(float(state.average["w"][0]))
        seen.append(float(params["w"][0]))
    return averages, seen


def test_exponential_average_is_the_recursion_from_the_first_params():
    averages, params = followed(decay=0.9)
    expected = [params[0]]
    for p in params[1:]:
        expected.append(0.9 * expected[-1] + 0.1 * p)
    np.testing.assert_allclose(averages, expected, rtol=1e-6)


def test_plain_average_is_the_mean_of_all_params():
    averages, params = followed(decay=None)
    np.testing.assert_allclose(averages, [np.mean(params[: n + 1]) for n in range(STEPS)], rtol=1e-6)


def test_average_follows_until_the_start_and_then_takes_every_second():
    averages, params = followed(decay=None, start=2, every=2)
    expected = [*params[:4], params[3], np.mean([params[3], params[5]]), np.mean([params[3], params[5]])]
    np.testing.assert_allclose(averages, expected, rtol=1e-6)


def test_low_precision_params_are_averaged_in_float32():
    optimizer = training.averaging(optax.sgd(0.0), decay=0.999)
    params = {"w": jnp.ones(2, jnp.bfloat16)}
    assert optimizer.init(params).average["w"].dtype == jnp.float32
    state = training.init_state({"params": params}, optimizer)
    assert training.averaged_variables(state)["params"]["w"].dtype == jnp.bfloat16


def dense_loss(norm):
    """A dense layer and a norm, whose outputs are to be 1."""

    def loss(variables, x, rng):
        del rng
        params, stats = variables["params"], variables["batch_stats"]
        y, stats = norm.apply({"params": params["norm"], "batch_stats": stats}, x @ params["kernel"], train=True)
        return training.LossOutput(jnp.sum((y - 1) ** 2), len(x), stats)

    return loss


def dense_variables(norm):
    of_norm = norm.init(jax.random.key(0), jnp.ones((1, 2)))
    params = {"kernel": jnp.array([[1.0, 2], [3, 5], [8, 13]]), "norm": of_norm["params"]}
    return {"params": params, "batch_stats": of_norm["batch_stats"]}


@pytest.mark.parametrize("build", [training.jit_step, training.shard_map_step])
def test_steps_keep_the_average_and_train_as_without(build):
    mesh, named = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2]), build is training.shard_map_step
    norm, results = jaxbn.batch_norm(axis_name="data" if named else None), []
    for optimizer in (optax.sgd(0.1), training.averaging(optax.sgd(0.1), decay=None)):
        step = build(dense_loss(norm), optimizer, mesh=mesh)
        state, seen = training.replicate(training.init_state(dense_variables(norm), optimizer), mesh), []
        for x in X:
            state, _ = step(state, x, jax.random.key(0))
            seen.append(jax.device_get(state.params))
        results.append((state, seen))
    (_, plain), (state, seen) = results
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), plain, seen)
    mean = jax.tree.map(lambda *leaves: np.mean(leaves, 0), *seen)
    average = training.averaged_variables(state)["params"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), average, mean)


def test_averaged_params_are_evaluated_with_statistics_of_their_own():
    norm, optimizer = jaxbn.batch_norm(), training.averaging(optax.sgd(0.1))
    step = training.jit_step(dense_loss(norm), optimizer, mesh=jax.make_mesh((1,), ("data",)))
    state, _ = step(training.init_state(dense_variables(norm), optimizer), X[0], jax.random.key(0))
    variables = training.averaged_variables(state)
    apply = jax.jit(lambda v, x: dense_loss(norm)(v, x, None).batch_stats)
    stats = jaxbn.population_statistics(apply, variables, list(X))
    expected = np.mean(X.reshape(-1, 3) @ np.asarray(variables["params"]["kernel"]), 0)
    np.testing.assert_allclose(stats["mean"], expected, rtol=1e-5)


def test_a_state_without_an_average_is_refused():
    state = training.init_state({"params": {"w": jnp.ones(2)}}, optax.adam(0.1))
    with pytest.raises(ValueError, match=r"holds 0 averages.*wrap the optimizer in averaging"):
        training.averaged_variables(state)


@pytest.mark.parametrize("options", [{"decay": 1.5}, {"start": -1}, {"every": 0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="expected"):
        training.averaging(optax.sgd(0.1), **options)


def test_an_update_without_params_is_refused():
    optimizer = training.averaging(optax.sgd(0.1))
    with pytest.raises(ValueError, match="averaging needs the params"):
        optimizer.update({"w": jnp.ones(2)}, optimizer.init({"w": jnp.ones(2)}))
