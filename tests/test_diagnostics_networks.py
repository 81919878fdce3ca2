"""How diagnostics call a network: linen, nnx and plain ones alike, tapped or not, one batch or several."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn import diagnostics
from jaxbn.training import LossOutput

INPUTS, HIDDEN, EXAMPLES = 3, 4, 16
SCALE, BIAS = np.linspace(0.5, 2, HIDDEN, dtype=np.float32), np.linspace(-1, 0.5, HIDDEN, dtype=np.float32)
ROUNDING = 1e-5  # A hundred roundings of float32: the three networks add the same terms in other orders.


def data(seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(EXAMPLES, INPUTS)).astype(np.float32)
    return {"x": x, "y": rng.normal(size=(EXAMPLES, 1)).astype(np.float32)}


def weights(seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in ((INPUTS, HIDDEN), (HIDDEN, 1))]


TRACES = []  # one entry for each time that Python runs a loss


def squares(output, batch, batch_stats):
    TRACES.append(output)
    return LossOutput(jnp.sum((output - batch["y"]) ** 2), EXAMPLES, batch_stats)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        h = nn.Dense(HIDDEN, use_bias=False, name="first")(x)
        h = jaxbn.linen.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(h)
        return nn.Dense(1, use_bias=False, name="second")(jnp.tanh(h))


def linen_loss(variables, batch, rng, train=True):
    output, moved = Linen().apply(variables, batch["x"], train, mutable=["batch_stats"])
    return squares(output, batch, moved["batch_stats"])


def linen_variables(seed=0):
    first, second = weights(seed)
    variables = Linen().init(jax.random.key(0), data()["x"], True)
    params = {
        "first": {"kernel": first},
        "norm": {"scale": SCALE, "bias": BIAS},
        "second": {"kernel": second},
    }
    return {**variables, "params": jax.tree.map(jnp.asarray, params)}


class Nnx(nnx.Module):
    def __init__(self, first, second):
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(INPUTS, HIDDEN, use_bias=False, rngs=rngs)
        self.norm = jaxbn.nnx.BatchNorm(HIDDEN, momentum=0.9, rngs=rngs)
        self.second = nnx.Linear(HIDDEN, 1, use_bias=False, rngs=rngs)
        self.first.kernel[...], self.second.kernel[...] = first, second
        self.norm.scale[...], self.norm.bias[...] = SCALE, BIAS

    def __call__(self, x, tap):
        return self.second(jnp.tanh(tap("norm", self.norm(tap("first", self.first(x))))))


GRAPH = nnx.split(Nnx(*weights()), nnx.Param, nnx.BatchStat)[0]


def nnx_variables(seed=0):
    _, params, batch_stats = nnx.split(Nnx(*weights(seed)), nnx.Param, nnx.BatchStat)
    return {"params": params, "batch_stats": batch_stats}


def nnx_tapped(variables, batch, rng, tap, train=True):
    model = nnx.merge(GRAPH, variables["params"], variables["batch_stats"], copy=True)
    model.norm.use_running_average = not train
    return squares(model(batch["x"], tap), batch, nnx.state(model, nnx.BatchStat))


NORM = jaxbn.batch_norm(decay=0.9)


def plain_variables(seed=0):
    first, second = weights(seed)
    of_norm = NORM.init(jax.random.key(0), jnp.zeros((EXAMPLES, HIDDEN)))
    params = {"first": first, "norm": {"scale": SCALE, "bias": BIAS}, "second": second}
    return {"params": jax.tree.map(jnp.asarray, params), "batch_stats": {"norm": of_norm["batch_stats"]}}


def plain_tapped(variables, batch, rng, tap, train=True):
    params = variables["params"]
    h = tap("first", batch["x"] @ params["first"])
    of_norm = {"params": params["norm"], "batch_stats": variables["batch_stats"]["norm"]}
    h, moved = NORM.apply(of_norm, h, train=train)
    return squares(jnp.tanh(tap("norm", h)) @ params["second"], batch, {"norm": moved})


def untapped(tapped):
    return lambda variables, batch, rng, train=True: tapped(variables, batch, rng, lambda name, x: x, train)


class Network(NamedTuple):
    variables: Callable  # variables(seed)
    train_loss: Callable
    eval_loss: Callable
    tapped: Callable


def network_of(variables, loss, tapped):
    return Network(variables, loss, partial(loss, train=False), tapped)


KINDS = {
    "linen": network_of(
        linen_variables, linen_loss, diagnostics.linen_taps(linen_loss, lambda path: path in ("first", "norm"))
    ),
    "nnx": network_of(nnx_variables, untapped(nnx_tapped), nnx_tapped),
    "plain": network_of(plain_variables, untapped(plain_tapped), plain_tapped),
}
SGD = optax.sgd(0.1, momentum=0.9)


def gradient_flow(network, variables, _):
    state = SGD.init(variables["params"])
    found = diagnostics.gradient_flow(
        network.tapped, variables, data(), rate=0.1, activation=jnp.tanh, optimizer=SGD, opt_state=state
    )
    return found.loss, found.layers, list(found.params.values())  # their paths differ


def train_eval_gap(network, variables, _):
    gap = diagnostics.train_eval_gap(network.train_loss, network.eval_loss, variables, [data(), data(1)])
    (layer,) = gap.layers
    return gap.by_batch.loss, gap.by_running.loss, gap.by_population.loss, layer.mean_drift, layer.var_drift


def covariate_shift(network, before, after):
    return diagnostics.covariate_shift(network.tapped, before, after, data())


def gradient_shift(network, before, after):
    layers = ("first", "norm", "second")
    return diagnostics.gradient_shift(network.train_loss, before, after["params"], data(), layers=layers)


def interpolate(network, *ends):
    return diagnostics.interpolate(network.train_loss, network.eval_loss, ends, data(), ([0.0, 0.4, 1.0],))


def taylor(network, variables, _):
    found = diagnostics.taylor(network.train_loss, variables, data(), rates=[0.01, 0.1], orders=3)
    return found.true, found.terms


def landscape(network, variables, _):
    return diagnostics.landscape(network.train_loss, variables, data(), rates=[0.01, 0.1])


def spectrum(network, variables, _):
    # The others have not settled after so few iterations, and still depend on rounding.
    key = jax.random.key(0)
    return diagnostics.spectrum(network.train_loss, variables, data(), key=key, iterations=16).leading(1)[0]


def hessian_vector_product(network, variables, _):
    return diagnostics.hessian_vector_product(network.train_loss, variables, data(), variables["params"])


DIAGNOSTICS = {
    f.__name__: f
    for f in (
        gradient_flow,
        taylor,
        train_eval_gap,
        landscape,
        covariate_shift,
        gradient_shift,
        spectrum,
        hessian_vector_product,
        interpolate,
    )
}
PURE = [name for name in DIAGNOSTICS if name != "train_eval_gap"]


def run(name, kind):
    network = KINDS[kind]
    return jax.tree.leaves(DIAGNOSTICS[name](network, network.variables(0), network.variables(1)))


@pytest.mark.parametrize("name", DIAGNOSTICS)
def test_a_network_gives_the_same_in_linen_in_nnx_and_plain(name):
    linen, other_flax, plain = (run(name, kind) for kind in KINDS)
    assert len(linen) == len(other_flax) == len(plain) > 0
    assert all(np.all(np.isfinite(leaf)) for leaf in plain)
    for a, b, c in zip(linen, other_flax, plain, strict=True):
        size = ROUNDING * max(1.0, float(np.max(np.abs(c))))
        np.testing.assert_allclose(a, c, rtol=0, atol=size)
        np.testing.assert_allclose(b, c, rtol=0, atol=size)


@pytest.mark.parametrize("name", DIAGNOSTICS)
def test_nothing_is_traced_on_the_second_call(name):
    run(name, "plain")
    before = len(TRACES)
    assert before > 0
    run(name, "plain")
    assert len(TRACES) == before


@pytest.mark.parametrize("name", PURE)
def test_they_stand_inside_of_vmap(name):
    before, after = (
        jax.tree.map(lambda *leaves: jnp.stack(leaves), plain_variables(i), plain_variables(i + 2)) for i in (0, 1)
    )
    found = jax.eval_shape(jax.vmap(partial(DIAGNOSTICS[name], KINDS["plain"])), before, after)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(found)} == {2}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
@pytest.mark.parametrize("name", PURE)
def test_params_of_any_width_give_figures_of_float32_at_least(name, dtype):
    with jax.enable_x64(True):
        cast = partial(jax.tree.map, lambda leaf: leaf.astype(dtype))
        ends = [v | {"params": cast(v["params"])} for v in (plain_variables(0), plain_variables(1))]
        found = jax.eval_shape(partial(DIAGNOSTICS[name], KINDS["plain"]), *ends)
    expected = (
        {jnp.dtype(dtype)} if name == "hessian_vector_product" else {jnp.dtype(jnp.float32), jnp.dtype(jnp.float64)}
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} <= expected


def test_under_vmap_each_network_has_its_own_figures():
    variables = [plain_variables(seed) for seed in (0, 1)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *variables)
    alone = [landscape(KINDS["plain"], v, None).beta_smoothness for v in variables]
    both = jax.vmap(lambda v: landscape(KINDS["plain"], v, None).beta_smoothness)(stacked)
    np.testing.assert_allclose(both, alone, rtol=ROUNDING)


def test_linen_taps_name_modules_by_path_and_number_further_calls():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(INPUTS, name="dense")
            return dense(dense(x))

    def loss(variables, batch, rng):
        return LossOutput(Twice().apply(variables, batch).sum(), 1, {})

    x = data()["x"]
    variables = Twice().init(jax.random.key(0), x)
    found = diagnostics.gradient_flow(diagnostics.linen_taps(loss), variables, x, rate=0.1).layers
    assert set(found) == {"dense", "dense#1", ""}
    once = x @ variables["params"]["dense"]["kernel"]
    np.testing.assert_allclose(found["dense"].rms, np.sqrt(np.mean(once**2)), rtol=ROUNDING)


def weighted(variables, batch, rng):
    errors = (batch["x"] @ variables["params"] - batch["y"]) ** 2
    return LossOutput(jnp.sum(batch["w"] * errors), jnp.sum(batch["w"]), {}, {"errors": jnp.sum(batch["w"] * errors)})


def test_over_batches_is_the_loss_of_all_examples_where_batches_do_not_share():
    rng = np.random.default_rng(0)
    shapes = {"x": (3, 5, 2), "y": (3, 5), "w": (3, 5)}
    batches = {name: rng.uniform(size=shape).astype(np.float32) for name, shape in shapes.items()}
    whole = {name: leaf.reshape(15, *leaf.shape[2:]) for name, leaf in batches.items()}
    params, key = jnp.asarray([0.5, -1.0]), jax.random.key(0)
    run = [
        jax.value_and_grad(lambda p, f=f, b=b: f({"params": p}, b, key).loss_sum)
        for f, b in ((diagnostics.over_batches(weighted), batches), (weighted, whole))
    ]
    jax.tree.map(partial(np.testing.assert_allclose, rtol=ROUNDING), run[0](params), run[1](params))
    output = diagnostics.over_batches(weighted)({"params": params}, batches, key)
    np.testing.assert_allclose(output.metric_sums["errors"], output.loss_sum)
    np.testing.assert_allclose(output.weight_sum, batches["w"].sum(), rtol=ROUNDING)


def test_over_batches_normalizes_each_batch_by_itself():
    loss = KINDS["plain"].train_loss
    batches = jax.tree.map(lambda *leaves: np.stack(leaves), data(0), data(1))
    rates = dict(rates=[0.0])
    both = diagnostics.landscape(diagnostics.over_batches(loss), plain_variables(), batches, **rates).loss
    alone = [diagnostics.landscape(loss, plain_variables(), data(seed), **rates).loss for seed in (0, 1)]
    np.testing.assert_allclose(both, np.mean(alone, axis=0), rtol=ROUNDING)


def test_over_batches_draws_anew_for_each_batch_and_the_same_at_each_point():
    def noise(variables, batch, rng):
        drawn = jax.random.normal(rng) + 0 * variables["params"]
        return LossOutput(drawn, 1, {}, {"square": drawn**2})

    many = diagnostics.over_batches(noise)
    output = many({"params": 0.0}, jnp.zeros((50, 1)), jax.random.key(0))
    assert 0.5 < output.metric_sums["square"] / 50 - (output.loss_sum / 50) ** 2 < 1.5  # the variance is 1 +- 0.2
    found = diagnostics.landscape(many, {"params": jnp.ones(())}, jnp.zeros((50, 1)), rates=[0.0, 0.1])
    np.testing.assert_allclose(found.loss, found.loss_here, rtol=ROUNDING)


def test_over_batches_refuses_leaves_of_unequal_length():
    with pytest.raises(ValueError, match="as many batches in all"):
        diagnostics.over_batches(weighted)({"params": 0}, {"x": np.ones((3, 1)), "y": np.ones(2)}, None)


def plain(batch_of):
    return lambda variables, batch, rng: batch_of(variables["params"], batch)


def tapped(run):
    return lambda variables, batch, rng, tap: LossOutput(jnp.sum(run(tap, variables["params"][None] * batch)), 1, {})


ONE = {"params": jnp.ones(2)}
X = np.ones((4, 2), np.float32)
square = plain(lambda params, batch: LossOutput(jnp.sum((batch @ params) ** 2), 1, {}))
flow = partial(diagnostics.gradient_flow, variables=ONE, batch=X, rate=0.1)
slopes = partial(diagnostics.landscape, variables=ONE, batch=X, rates=[0.1])
shift = partial(diagnostics.gradient_shift, square, {"params": {"a": 1.0, "b": 1.0}}, {"a": 1.0, "b": 1.0}, X)
sharp = partial(diagnostics.spectrum, square, ONE, X, key=jax.random.key(0))
line = partial(diagnostics.interpolate, square, square, batch=X)
REFUSALS = {
    "a loss that returns a number": (TypeError, "LossOutput", lambda: slopes(plain(lambda p, x: jnp.sum(p)))),
    "a loss for each example": (ValueError, "scalars", lambda: slopes(plain(lambda p, x: LossOutput(x @ p, 4, {})))),
    "variables without params": (TypeError, "batch_stats", lambda: slopes(square, variables={"w": ONE})),
    "no params": (ValueError, "no arrays", lambda: slopes(square, variables={"params": {}})),
    "integer params": (TypeError, "'n' has dtype int32", lambda: slopes(square, variables={"params": {"n": 1}})),
    "rates in a matrix": (ValueError, r"shape \(1, 1\)", lambda: slopes(square, rates=[[0.1]])),
    "no rates": (ValueError, "one value or more", lambda: slopes(square, rates=[])),
    "complex rates": (TypeError, "complex64", lambda: slopes(square, rates=[1j])),
    "a direction of another tree": (ValueError, "structure", lambda: slopes(square, direction=[ONE["params"]])),
    "a direction of another shape": (ValueError, r"\(3,\)", lambda: slopes(square, direction=jnp.ones(3))),
    "order 0": (ValueError, "orders=0", lambda: diagnostics.taylor(square, ONE, X, rates=[0.1], orders=0)),
    "nothing tapped": (ValueError, "tapped nothing", lambda: flow(tapped(lambda tap, h: h))),
    "one name twice": (ValueError, "tapped twice", lambda: flow(tapped(lambda tap, h: tap("h", tap("h", h))))),
    "a name that is none": (TypeError, "expected a string", lambda: flow(tapped(lambda tap, h: tap(0, h)))),
    "a tap of integers": (TypeError, "int32", lambda: flow(tapped(lambda tap, h: tap("h", h.astype(int))))),
    "a tap of a scalar": (ValueError, "scalar", lambda: flow(tapped(lambda tap, h: tap("h", h.sum())))),
    "a tap within jit": (
        ValueError,
        "transformation",
        lambda: flow(tapped(lambda tap, h: jax.jit(partial(tap, "h"))(h))),
    ),
    "a tap within checkpoint": (
        ValueError,
        "transformation",
        lambda: flow(tapped(lambda tap, h: jax.checkpoint(partial(tap, "h"))(h))),
    ),
    "an optimizer without state": (TypeError, "opt_state", lambda: flow(square, optimizer=SGD)),
    "a layer that is none": (ValueError, "no param lies at 'c'", lambda: shift(layers=("a", "b", "c"))),
    "a param in no layer": (ValueError, r"none or several: {'b': \[\]}", lambda: shift(layers=("a",))),
    "a param in two layers": (ValueError, r"{'a': \[0, 1\]}", lambda: shift(layers=("a", ("a", "b")))),
    "more iterations than params": (ValueError, "1 to 2, the number of params", lambda: sharp(iterations=3)),
    "no probes": (ValueError, "probes=0", lambda: sharp(iterations=1, probes=0)),
    "more eigenvalues than iterations": (ValueError, "count=3", lambda: sharp(iterations=2).leading(3)),
    "one corner": (ValueError, "1 corners", lambda: line(corners=(ONE,), coordinates=())),
    "a plane with coordinates of a line": (
        ValueError,
        "3 corners",
        lambda: line(corners=(ONE,) * 3, coordinates=(X[0],)),
    ),
    "corners that are not alike": (
        ValueError,
        r"corners\[1\]",
        lambda: line(corners=(ONE, {"params": jnp.ones(3)}), coordinates=(X[0],)),
    ),
    "batches to be read once": (
        ValueError,
        "iterator",
        lambda: diagnostics.train_eval_gap(square, square, ONE, iter([X])),
    ),
    "no batches": (ValueError, "empty", lambda: diagnostics.train_eval_gap(square, square, ONE, [])),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_input_is_refused(case):
    error, match, run = REFUSALS[case]
    with pytest.raises(error, match=match):
        run()
