"""A step that is not finite, or in which nothing counts, changes nothing: every cause, however the batch is spread."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

import jaxbn
from jaxbn import training
from jaxbn.training import LossOutput, _step

KEY = jax.random.key(0)
DEVICES, BATCH = 4, 16
RATE = 1e10  # Of plain gradient descent, so that a gradient of 1e30 is finite and the step is not.
SPREADS = {
    f"{spread}, {name}": (spread, options)
    for spread in ("jit", "shard_map", "pmap")
    for name, options in {"plain": {}, "microbatches": {"microbatches": 2}, "scan": {"scan": True}}.items()
}

# What a good batch holds, for every example.
GOOD = {"plain": 1e-11, "half": 1e-2, "odd": 1e-2, "added": 0.0, "root": 1.0, "statistic": 1.0, "weight": 1.0}
# cause: (which entry of the batch, its value in one example or all, the parts that are then not finite)
CAUSES = {
    "loss": ("added", np.nan, 1, ("loss",)),
    "gradient": ("root", 0.0, 1, ("gradient", "params")),
    "params, gradient descent overflows": ("plain", 1e30, BATCH, ("params",)),
    "opt_state, Adam's second moment in float16": ("half", 300.0, BATCH, ("opt_state",)),
    "params, the optimizer gives NaN": ("odd", 1e3, BATCH, ("params",)),
    "batch_stats": ("statistic", np.nan, 1, ("batch_stats",)),
    "several": ("plain", np.nan, 1, ("loss", "gradient", "params")),
    "weight of the loss": ("weight", np.inf, 1, ("loss",)),
    "nothing counts": ("weight", 0.0, BATCH, ()),
}


def odd_optimizer():
    """Gradient descent that gives NaN for large gradients: a defect of the optimizer's own."""
    update = lambda g, state, params: (jax.tree.map(lambda g: jnp.where(jnp.abs(g) > 1, jnp.nan, -g), g), state)
    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


OPTIMIZER = optax.partition(
    {"plain": optax.sgd(RATE), "half": optax.adam(0.1), "odd": odd_optimizer()},
    {"plain": "plain", "half": "half", "odd": "odd"},
)
VARIABLES = {
    "params": {"plain": jnp.ones(()), "half": jnp.ones((), jnp.float16), "odd": jnp.full((), 4.0)},
    "batch_stats": {"sum": jnp.zeros(())},
}


def loss(axis_name, variables, batch, rng):
    del rng
    params, old = variables["params"], variables["batch_stats"]["sum"]
    losses = [params[name] * jnp.sum(batch[name].astype(params[name].dtype)) for name in ("plain", "half", "odd")]
    roots = jnp.sum(jnp.sqrt(params["odd"] * batch["root"]))  # Finite at 0, where its slope is not.
    loss_sum = sum(losses, roots + jnp.sum(batch["added"])).astype(jnp.float32)
    moved = jnp.sum(batch["statistic"])
    moved = old + (moved if axis_name is None else jax.lax.psum(moved, axis_name))
    return LossOutput(loss_sum, jnp.sum(batch["weight"]), {"sum": moved})


@functools.cache
def built(name):
    """(step, place, fetch), compiled once for all causes."""
    spread, options = SPREADS[name]
    options = options | ({"pool": False} if "microbatches" in options else {})
    devices = jax.devices()[:DEVICES]
    of = functools.partial(loss, None if spread == "jit" else "data")
    if spread == "pmap":
        step = training.pmap_step(of, OPTIMIZER, devices=devices, **options)
        place = functools.partial(training.replicate_for_pmap, devices=devices)
        return step, place, lambda state: jax.device_get(training.unreplicate(state))
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    build = training.jit_step if spread == "jit" else training.shard_map_step
    return build(of, OPTIMIZER, mesh=mesh, **options), lambda s: training.replicate(s, mesh), jax.device_get


def batch_of(name, **spoilt):
    batch = {entry: np.full(BATCH, value, np.float32) for entry, value in GOOD.items()}
    for entry, (value, examples) in spoilt.items():
        batch[entry][:examples] = value
    return jax.tree.map(lambda leaf: np.stack([leaf] * 2), batch) if "scan" in name else batch


@pytest.mark.parametrize("cause", CAUSES)
@pytest.mark.parametrize("name", SPREADS)
def test_a_refused_step_changes_nothing_but_the_count_of_steps(name, cause):
    entry, value, examples, parts = CAUSES[cause]
    step, place, fetch = built(name)
    state, metrics = step(place(training.init_state(VARIABLES, OPTIMIZER)), batch_of(name), KEY)
    assert not np.any(metrics["skipped"])
    assert not np.any(metrics["nonfinite"])
    before = fetch(state)
    assert before.batch_stats["sum"] > 0
    state, metrics = step(state, batch_of(name, **{entry: (value, examples)}), KEY)
    after, steps = fetch(state), 2 if "scan" in name else 1
    assert after.step == before.step + steps
    jax.tree.map(np.testing.assert_array_equal, after._replace(step=before.step), before)
    np.testing.assert_array_equal(metrics["skipped"], np.ones((steps,) if "scan" in name else ()))
    assert {training.nonfinite_parts(code) for code in np.atleast_1d(metrics["nonfinite"])} == {parts}
    # And the next good batch is trained on.
    state, metrics = step(state, batch_of(name), KEY)
    assert not np.any(metrics["skipped"])
    assert fetch(state).params["plain"] < after.params["plain"]


def test_what_was_not_finite_before_does_not_refuse_a_step():
    best = optax.GradientTransformation(
        lambda params: {"best": jnp.array(jnp.inf), "worst": jnp.array(-jnp.inf)},
        lambda g, state, params: (jax.tree.map(lambda g: -g, g), {"best": jnp.array(1.0), "worst": state["worst"]}),
    )
    step = training.jit_step(functools.partial(loss, None), best, mesh=jax.make_mesh((1,), ("data",)), donate=False)
    state = training.init_state(VARIABLES, best)
    state, metrics = step(state, batch_of(""), KEY)
    assert not metrics["skipped"]
    assert (state.opt_state["best"], state.opt_state["worst"]) == (1, -np.inf)


@pytest.mark.parametrize("code", range(32))
def test_the_parts_of_a_code_are_its_bits(code):
    parts = ("loss", "gradient", "params", "opt_state", "batch_stats")
    assert sum(1 << parts.index(part) for part in training.nonfinite_parts(code)) == code


class Timed:
    """A compiled step and the state that it goes on from."""

    def __init__(self, loss, state, batch):
        self.state, self.batch = jax.tree.map(jnp.array, state), batch
        step = training.jit_step(loss, optax.adam(1e-3), mesh=jax.make_mesh((1,), ("data",)))
        lowered = step.lower(self.state, batch, KEY)
        self.run = lowered.compile(compiler_options={"xla_backend_optimization_level": 3})

    def seconds(self, steps=10):
        began = time.perf_counter()
        for _ in range(steps):
            self.state, _ = self.run(self.state, self.batch, KEY)
        jax.block_until_ready(self.state)
        return time.perf_counter() - began


@pytest.mark.slow
@pytest.mark.parametrize(("width", "examples"), [(1024, 32), (256, 256)])
def test_the_check_costs_little_beside_a_step(width, examples, monkeypatch, capsys):
    """Adam and a network of three dense layers with batch norm; steps with and without the check alternate."""
    norm, key = jaxbn.batch_norm(), jax.random.key(0)
    params = {"kernels": [jax.random.normal(key, (width, width)) / width**0.5] * 3, "scale": jnp.ones(width)}
    stats = norm.init(key, jnp.zeros((2, width)))

    def loss(variables, batch, rng):
        x, moved = batch["x"], []
        for kernel, layer in zip(variables["params"]["kernels"], variables["batch_stats"], strict=True):
            y, statistics = norm.apply({**stats, "batch_stats": layer}, x @ kernel, train=True)
            x = jax.nn.relu(y)
            moved.append(statistics)
        return LossOutput(jnp.sum(x @ variables["params"]["scale"]) / width, len(x), moved)

    batch = {"x": np.random.default_rng(0).normal(size=(examples, width)).astype(np.float32)}
    start = training.init_state({"params": params, "batch_stats": [stats["batch_stats"]] * 3}, optax.adam(1e-3))

    checked = Timed(loss, start, batch)
    monkeypatch.setattr(_step, "_nonfinite", lambda *results: jnp.zeros((), jnp.int32))
    unchecked = Timed(loss, start, batch)
    pairs = [[timed.seconds() for timed in (checked, unchecked)] for _ in range(30)]
    ratio = float(np.median([a / b for a, b in pairs]))
    with capsys.disabled():
        print(f"\nwidth {width}, {examples} examples: a step with the check takes {ratio:.2f} times as long")
    assert ratio < 4  # Of the wider network, on a machine with other work.
