"""A network takes a norm and does not care which: every normalizer through every tool of the library."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from normalizers import AGAIN, CASES, DOMAINS, KEY, QUICK, draw, ready

import jaxbn
from jaxbn import training

EACH = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in AGAIN else ()) for name in CASES]
)
# Those whose running statistics are no moments of their input.
UNRECORDED = ("virtual_batch_norm", "whitening_norm")
ROUNDING = dict(rtol=1e-5, atol=1e-5)  # Float32 sums of some dozen terms, in another order under each compilation.
BATCHES = [draw(seed=1), draw(seed=2, offset=-1.0)]

quick = functools.partial(jax.jit, compiler_options=QUICK)


def assert_close(actual, expected):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **ROUNDING), actual, expected)


class Network(nn.Module):
    """A dense layer and a norm."""

    norm: jaxbn.Normalizer

    @nn.compact
    def __call__(self, x, train, **arguments):
        return jaxbn.linen.Norm(self.norm, name="norm")(nn.Dense(4, name="dense")(x), not train, **arguments)


@functools.cache
def linen_network(name):
    network = Network(ready(name).norm)
    return network, quick(functools.partial(network.init, train=True))(KEY, draw(), **ready(name).arguments)


def linen_loss(name, variables, batch, rng):
    """The square of the outputs; a network without running statistics has no "batch_stats" to give back."""
    del rng
    x, arguments = batch["x"], {k: v for k, v in batch.items() if k != "x"} | scalars(name)
    y, moved = linen_network(name)[0].apply(variables, x, train=True, mutable=["batch_stats"], **arguments)
    return training.LossOutput(jnp.sum((y - 1) ** 2), len(x), moved.get("batch_stats", {}))


def scalars(name):
    """Arguments that are the same for every example, such as a time step or a key."""
    return {k: v for k, v in CASES[name].arguments.items() if np.ndim(v) == 0}


def batch_of(name):
    """A batch for a train step: the input, and the arguments that have an entry an example."""
    return {"x": draw()} | {k: v for k, v in CASES[name].arguments.items() if np.ndim(v) > 0}


@EACH
def test_the_linen_module_computes_what_the_normalizer_does(name):
    case = ready(name)
    module = jaxbn.linen.Norm(case.norm)

    @quick
    def both(variables, x):
        y, moved = module.apply(variables, x, False, mutable=["batch_stats"], **case.arguments)
        return y, module.apply(variables, x, True, **case.arguments), moved.get("batch_stats", {})

    used = {kind: values for kind, values in case.variables.items() if values}  # As init of a linen module leaves it.
    y, at_test_time, moved = both(used, draw())
    expected, stats = case.train(case.variables, draw(), **case.arguments)
    assert_close((y, moved), (expected, stats))
    assert_close(at_test_time, case.evaluate(case.variables, draw(), **case.arguments)[0])


@EACH
def test_the_nnx_module_computes_what_the_normalizer_does(name):
    case = ready(name)
    module = jaxbn.nnx.Norm(case.norm, draw(), rngs=nnx.Rngs(0))
    graph, params, stats = nnx.split(module, nnx.Param, nnx.BatchStat)
    for state, values in ((params, case.variables["params"]), (stats, case.variables["batch_stats"])):
        name_of = "params" if state is params else "batch_stats"
        if values:
            nnx.replace_by_pure_dict(state, {name_of: values})

    @quick
    def both(params, stats, x):
        module = nnx.merge(graph, params, stats, copy=True)
        y = module(x, **case.arguments)
        moved = nnx.to_pure_dict(nnx.state(module, nnx.BatchStat)).get("batch_stats", {})
        return y, moved, nnx.merge(graph, params, stats, copy=True)(x, use_running_average=True, **case.arguments)

    y, moved, at_test_time = both(params, stats, draw())
    assert_close((y, moved), case.train(case.variables, draw(), **case.arguments))
    assert_close(at_test_time, case.evaluate(case.variables, draw(), **case.arguments)[0])


@pytest.mark.parametrize("name", [name for name in CASES if name not in AGAIN])
@pytest.mark.parametrize("microbatches", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_network_with_any_of_them_trains(name, microbatches):
    _, variables = linen_network(name)
    optimizer, mesh = optax.sgd(1e-3), jax.make_mesh((1,), ("data",))
    loss = functools.partial(linen_loss, name)
    build = functools.partial(training.jit_step, loss, optimizer, mesh=mesh, microbatches=microbatches)
    start = training.init_state(variables, optimizer)
    if microbatches == 2 and name.startswith(UNRECORDED):
        with pytest.raises(ValueError, match=r"pool=False|microbatches=1"):
            build()(start, batch_of(name), KEY)
        return
    step, losses = build(), []
    state = start
    for _ in range(3):
        state, metrics = step(state, batch_of(name), KEY)
        losses.append(metrics["loss"])
        assert not metrics["skipped"]
    assert losses[-1] < losses[0]


# The moments of the data that a layer's statistics are to be afterwards, by the name of the normalizer.


def population(name):
    """{statistic: value} of one layer over BATCHES, in float64; {} for a layer without running statistics."""
    x = np.concatenate([np.asarray(x, np.float64) for x in BATCHES])
    if name.startswith("split_batch_norm, one domain"):
        rows = [None, x]
    elif name.startswith("split_batch_norm"):
        rows = [x[np.tile(DOMAINS, 2) == domain] for domain in range(2)]
    elif name.startswith("recurrent"):
        rows = [None, x, None]
    else:
        rows = None
    axes = (0, 2) if name == "batch_norm, other axis" else (0, 1)
    if rows is None:
        found = {"mean": x.mean(axes), "var": x.var(axes)}
    else:
        old = ready(name).variables["batch_stats"]
        of = {"mean": np.mean, "var": np.var}
        found = {
            n: np.stack([old[n][i] if r is None else f(r, axes) for i, r in enumerate(rows)]) for n, f in of.items()
        }
    if name.startswith("recurrent"):
        found["length"] = max(2, int(ready(name).variables["batch_stats"]["length"]))
    return found


@pytest.mark.parametrize(
    ("name", "layer_by_layer"),
    [(name, one) for one in (True, False) for name in CASES if name not in AGAIN],
)
def test_population_statistics_of_any_of_them(name, layer_by_layer):
    case = ready(name)
    apply = quick(lambda variables, x: case.norm.apply(variables, x, train=True, **case.arguments)[1])

    def measured():
        return jaxbn.population_statistics(apply, case.variables, BATCHES, layer_by_layer=layer_by_layer)

    old = case.variables["batch_stats"]
    if name.startswith(UNRECORDED):
        with pytest.raises(ValueError, match="there are no population statistics of it"):
            measured()
    elif name == "frozen":
        with pytest.raises(ValueError, match="recorded anything; apply has to run the network in training mode"):
            measured()
    elif not old:
        assert measured() == {}
    else:
        stats, expected = measured(), population(name)
        assert jax.tree.map(jnp.shape, stats) == jax.tree.map(jnp.shape, old)
        if name == "batch_norm, debias":
            stats = dict(zip(("mean", "var"), jaxbn.running_moments(stats, debias=True), strict=True))
        assert {"mean", "length"} & set(stats) == {"mean", "length"} & set(expected)
        for statistic in set(stats) & set(expected):
            np.testing.assert_allclose(stats[statistic], expected[statistic], rtol=2e-6, atol=2e-6)


def test_sequences_measured_at_test_time_are_as_long_as_those_of_the_data():
    """A recurrent layer that has seen no sequence would use the first step's statistics for all steps."""
    norm = jaxbn.recurrent_batch_norm(max_length=4)
    variables = norm.init(KEY, BATCHES[0])

    @quick
    def unrolled(variables, x):
        for step in range(3):
            _, stats = norm.apply(variables, x + step, train=True, step=step)
            variables = {**variables, "batch_stats": stats}
        return stats

    stats = jaxbn.population_statistics(unrolled, variables, BATCHES)
    assert stats["length"] == 3
    variables = {**variables, "batch_stats": stats}
    for step in range(3):
        y, _ = norm.apply(variables, jnp.concatenate(BATCHES) + step, train=False, step=step)
        np.testing.assert_allclose(np.mean(y, (0, 1)), 0, atol=1e-5)
