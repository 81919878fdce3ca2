import collections
import functools

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_network
from flax import nnx
from jax.sharding import AxisType
from small_network import BATCHES, FIRST, KEY

import jaxbn
from experiments.aot.collectives import collectives
from jaxbn import training
from jaxbn.training import LossOutput

NAMED = {"axis_name": "data"}
SPREADS = ("jit", "shard_map", "pmap")
# Gradients and statistics are sums of some hundred float32 numbers in another order, and Adam divides by their roots.
ROUNDING = {"rtol": 2e-5, "atol": 2e-6}


def adam():
    return optax.adam(0.01)


def mesh_of(devices, names=("data",), types=AxisType.Auto):
    return jax.make_mesh((devices,), names, axis_types=(types,), devices=jax.devices()[:devices])


def built(spread, loss, *, devices=8, **options):
    """(step, place, fetch): place puts a state where the step wants it, fetch brings it back to the host."""
    if spread == "pmap":
        few = jax.devices()[:devices]
        step = training.pmap_step(loss, adam(), devices=few, **options)
        return (
            step,
            lambda state: training.replicate_for_pmap(state, few),
            lambda state: jax.device_get(training.unreplicate(state)),
        )
    mesh = mesh_of(devices)
    build = training.jit_step if spread == "jit" else training.shard_map_step
    return build(loss, adam(), mesh=mesh, **options), lambda state: training.replicate(state, mesh), jax.device_get


TRACES = collections.Counter()


@functools.cache
def standard(spread, **options):
    """`built` for the network of small_network, each compiled once for all tests."""
    plain = small_network.loss_of(jaxbn.batch_norm(**({} if spread == "jit" else NAMED)))

    def loss(variables, batch, rng):
        TRACES[spread, *options.items()] += 1
        return plain(variables, batch, rng)

    return built(spread, loss, **options)


@functools.cache
def initial():
    return small_network.initial(jaxbn.batch_norm())


def start():
    return training.init_state(initial(), adam())


@functools.cache
def trained(spread, **options):
    """State and metrics of the last step after the BATCHES, on the host."""
    step, place, fetch = standard(spread, **options)
    state = place(start())
    if options.get("scan"):
        state, metrics = step(state, BATCHES, KEY)
        return fetch(state), jax.tree.map(lambda values: np.asarray(values)[-1], metrics)
    for number in range(4):
        state, metrics = step(state, jax.tree.map(lambda leaf, n=number: leaf[n], BATCHES), KEY)
    return fetch(state), jax.device_get(metrics)


@functools.cache
def written_out():
    """The same training as a plain loop over whole batches, with nothing of jaxbn.training but its state."""
    norm, state = jaxbn.batch_norm(), start()

    @jax.jit
    def step(state, batch):
        def mean_loss(params):
            logits, batch_stats = small_network.apply(norm, {**state.variables, "params": params}, batch)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
            hits = jnp.argmax(logits, -1) == batch["label"]
            mean = functools.partial(jnp.average, weights=batch["weight"])
            return mean(losses), (batch_stats, mean(hits))

        (loss, (batch_stats, accuracy)), gradient = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
        updates, opt_state = adam().update(gradient, state.opt_state)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, "accuracy": accuracy, "weight": batch["weight"].sum(), "skipped": 0, "nonfinite": 0}
        return training.TrainState(state.step + 1, params, batch_stats, opt_state), metrics

    for number in range(4):
        state, metrics = step(state, jax.tree.map(lambda leaf, n=number: leaf[n], BATCHES))
    return jax.device_get((state, metrics))


def assert_same_training(actual, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **ROUNDING), actual, expected)


@pytest.mark.parametrize("spread", SPREADS)
def test_eight_devices_train_as_a_plain_loop_does(spread):
    assert_same_training(trained(spread), written_out())


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_training_does_not_depend_on_the_number_of_devices(devices):
    assert_same_training(trained("shard_map", devices=devices), trained("shard_map"))


@pytest.mark.parametrize("spread", ["shard_map", "pmap"])
def test_many_steps_in_one_dispatch_train_as_one_by_one(spread):
    assert_same_training(trained(spread, scan=True), trained(spread))


@pytest.mark.parametrize("spread", ["shard_map", "pmap"])
def test_microbatches_train_alike_however_they_are_spread(spread):
    assert_same_training(trained(spread, microbatches=2), trained("jit", microbatches=2))


@pytest.mark.parametrize("rule", [{"decay": None, "unbiased": True}, {"debias": True}])
def test_microbatches_move_the_running_statistics_once_by_their_pooled_moments(rule):
    """What the first layer sees does not depend on microbatches, so neither may its running statistics."""
    norm = jaxbn.batch_norm(**rule)
    variables = small_network.initial(norm)
    step, place, fetch = built("jit", small_network.loss_of(norm), devices=1, microbatches=4)
    state, _ = step(place(training.init_state(variables, adam())), FIRST, KEY)
    expected = small_network.apply(norm, variables, FIRST)[1][0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), fetch(state).batch_stats[0], expected)


def test_without_pooling_every_microbatch_moves_the_running_statistics():
    norm = jaxbn.batch_norm()
    step, place, fetch = built("jit", small_network.loss_of(norm), devices=1, microbatches=2, pool=False)
    state, _ = step(place(start()), FIRST, KEY)
    expected = initial()["batch_stats"]
    for part in range(2):
        rows = jax.tree.map(lambda leaf, first=part: leaf[first::2], FIRST)
        expected = small_network.apply(norm, {**initial(), "batch_stats": expected}, rows)[1]
    found = fetch(state).batch_stats
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8), found, expected)


def test_microbatches_send_twice_a_layer_and_their_gradients_once():
    step, place, _ = standard("shard_map", microbatches=2)
    state = place(start())
    sent = collectives(step.lower(state, FIRST, KEY).compile().as_text())
    parameters, sums = sum(leaf.size for leaf in jax.tree.leaves(state.params)), len(("loss", "accuracy", "weight"))
    assert [c.bytes for c in sent if not c.in_loop] == [4 * (parameters + sums)]
    # Two layers, forward and backward.
    assert len([c for c in sent if c.in_loop]) == 2 * 2


@pytest.mark.parametrize("spread", SPREADS)
def test_all_devices_end_with_the_same_statistics_bit_for_bit(spread):
    step, place, _ = standard(spread)
    state, _ = step(place(start()), FIRST, KEY)
    for leaf in jax.tree.leaves(state.batch_stats):
        first, *others = [np.squeeze(shard.data) for shard in leaf.addressable_shards]
        assert len(others) == 7
        for other in others:
            np.testing.assert_array_equal(first, other)


def test_the_copy_of_one_device_lies_on_that_device_alone():
    """A program on all devices for each leaf, as indexing would run, can end in a deadlock on a busy machine."""
    step, place, _ = standard("pmap")
    state, metrics = step(place(start()), FIRST, KEY)
    for leaf in jax.tree.leaves((training.unreplicate(state), metrics)):
        assert len(leaf.devices()) == 1
    jax.tree.map(np.testing.assert_array_equal, training.unreplicate({"a": np.arange(3)}), {"a": 0})


@pytest.mark.parametrize("spread", SPREADS)
def test_a_step_consumes_its_state_and_traces_once(spread):
    step, place, _ = standard(spread)
    first = place(start())
    second, _ = step(first, FIRST, KEY)
    traces = TRACES[spread,]
    step(second, FIRST, KEY)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first))
    assert TRACES[spread,] == traces


def test_the_callers_variables_survive():
    step, place, _ = standard("jit")
    step(place(start()), FIRST, KEY)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(initial()))


@pytest.mark.parametrize(
    ("build", "norm"),
    [(training.jit_step, jaxbn.batch_norm()), (training.shard_map_step, jaxbn.batch_norm(axis_name="data"))],
)
def test_a_mesh_of_explicit_axes_will_do(build, norm):
    mesh = mesh_of(8, types=AxisType.Explicit)
    step = build(small_network.loss_of(norm), adam(), mesh=mesh)
    state = training.replicate(start(), mesh)
    for number in range(4):
        batch = training.shard_batch(jax.tree.map(lambda leaf, n=number: leaf[n], BATCHES), mesh)
        state, metrics = step(state, batch, KEY)
    assert_same_training(jax.device_get((state, metrics)), written_out())


def test_every_shard_and_step_gets_a_key_of_its_own():
    def loss(variables, batch, rng):
        draws = jax.random.uniform(rng, (len(batch["x"]),))
        return LossOutput(variables["params"]["w"] * draws.sum(), len(draws), {}, {"square": jnp.sum(draws**2)})

    step, place, _ = built("shard_map", loss)
    state, metrics = place(training.init_state({"params": {"w": jnp.ones(())}, "batch_stats": {}}, adam())), []
    for _ in range(2):
        state, measured = step(state, FIRST, KEY)
        metrics.append(measured["square"])
    # 64 draws of which some were the same would have a mean square further from 1 / 3 than 0.1 only by chance.
    assert metrics[0] != metrics[1]
    np.testing.assert_allclose(metrics, 1 / 3, atol=0.1)


@pytest.mark.parametrize("spread", SPREADS)
def test_a_state_that_was_consumed_is_refused(spread):
    step, place, _ = standard(spread)
    first = place(start())
    step(first, FIRST, KEY)
    with pytest.raises(ValueError, match=r"state\.step was consumed by an earlier step.*donate=False"):
        step(first, FIRST, KEY)


@pytest.mark.parametrize("spread", SPREADS)
def test_without_donation_a_state_can_be_used_again(spread):
    step, place, fetch = standard(spread, donate=False)
    first = place(start())
    (again, _), (once, _) = step(first, FIRST, KEY), step(first, FIRST, KEY)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(first))
    jax.tree.map(np.testing.assert_array_equal, fetch(again), fetch(once))


def test_an_optimizer_may_keep_the_params_in_its_state():
    keeping = optax.GradientTransformation(lambda params: params, lambda g, old, params: (g, old))
    step = training.jit_step(small_network.loss_of(jaxbn.batch_norm()), keeping, mesh=mesh_of(1))
    state, metrics = step(training.init_state(initial(), keeping), FIRST, KEY)
    assert not metrics["skipped"]
    jax.tree.map(np.testing.assert_array_equal, state.opt_state, initial()["params"])


class Network(nnx.Module):
    """A dense layer and a norm; the recipe in the docstring of jaxbn.training is for models such as this."""

    def __init__(self, norm):
        self.dense, self.norm = nnx.Linear(small_network.INPUTS, small_network.CLASSES, rngs=nnx.Rngs(0)), norm

    def __call__(self, x):
        return self.norm(self.dense(x))


def nnx_loss(graph, variables, batch, rng):
    model = nnx.merge(graph, variables["params"], variables["batch_stats"], copy=True)
    losses = optax.softmax_cross_entropy_with_integer_labels(model(batch["x"]), batch["label"])
    return LossOutput(losses.sum(), losses.size, nnx.state(model, nnx.BatchStat))


def plain_loss(norm, variables, batch, rng):
    dense, of_norm = variables["params"]["dense"], variables["params"]["norm"]
    x = batch["x"] @ dense["kernel"] + dense["bias"][None]
    y, moved = norm.apply({"params": of_norm, "batch_stats": variables["batch_stats"]}, x, train=True)
    losses = optax.softmax_cross_entropy_with_integer_labels(y, batch["label"])
    return LossOutput(losses.sum(), losses.size, moved)


@pytest.mark.parametrize("options", [{}, {"microbatches": 2}, {"scan": True}], ids=["plain", "microbatches", "scan"])
@pytest.mark.parametrize(
    ("norm", "module"),
    [
        (jaxbn.batch_norm(), jaxbn.nnx.BatchNorm),
        (jaxbn.batch_norm(), functools.partial(jaxbn.nnx.Norm, jaxbn.batch_norm())),
        (jaxbn.layer_norm(), functools.partial(jaxbn.nnx.Norm, jaxbn.layer_norm())),
    ],
    ids=["BatchNorm", "Norm", "Norm of layer_norm"],
)
def test_an_nnx_model_merged_inside_the_loss_trains_as_plain_functions_do(norm, module, options):
    model, mesh = Network(module(small_network.CLASSES, rngs=nnx.Rngs(0))), mesh_of(8)
    graph, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    of_norm = norm.init(KEY, jnp.zeros((1, small_network.CLASSES)))
    dense = {"kernel": model.dense.kernel[...], "bias": model.dense.bias[...]}
    plain = {"params": {"dense": dense, "norm": of_norm["params"]}, "batch_stats": of_norm["batch_stats"]}
    ways = {
        functools.partial(nnx_loss, graph): {"params": params, "batch_stats": batch_stats},
        functools.partial(plain_loss, norm): plain,
    }
    results = []
    for loss, variables in ways.items():
        step = training.jit_step(loss, adam(), mesh=mesh, **options)
        state = training.replicate(training.init_state(variables, adam()), mesh)
        for _ in range(2):
            state, metrics = step(state, BATCHES if "scan" in options else FIRST, KEY)
        results.append((state, metrics))
    (state, metrics), (expected, expected_metrics) = results
    assert_same_training(metrics, expected_metrics)
    nnx.update(model, state.params, state.batch_stats)
    np.testing.assert_allclose(model.dense.kernel[...], expected.params["dense"]["kernel"], **ROUNDING)
    assert_same_training(jax.tree.leaves(nnx.state(model, nnx.BatchStat)), jax.tree.leaves(expected.batch_stats))


# What users get wrong.


def flax_loss(features):
    """Flax's layer as the whole network."""
    layer = flax.linen.BatchNorm(use_running_average=False)

    def loss(variables, batch, rng):
        y, moved = layer.apply(variables, batch["x"], mutable=["batch_stats"])
        return LossOutput(jnp.sum(y**2), len(y), moved["batch_stats"])

    return loss, layer.init(KEY, jnp.ones((2, features)))


def microbatches_through_flax(features, **options):
    loss, variables = flax_loss(features)
    batch = {"x": np.random.default_rng(features).normal(size=(8, features)).astype(np.float32)}
    step = training.jit_step(loss, adam(), mesh=mesh_of(1), microbatches=2, **options)
    with jax.numpy_rank_promotion("allow"):
        return step(training.init_state(variables, adam()), batch, KEY)


@pytest.mark.parametrize("features", [1, 2, 5])
def test_microbatches_of_layers_that_do_not_pool_are_refused(features):
    with pytest.raises(ValueError, match="pool=False"):
        microbatches_through_flax(features)


def ready(spread="shard_map", norm=NAMED, **options):
    step, place, _ = built(spread, small_network.loss_of(jaxbn.batch_norm(**norm)), **options)
    return functools.partial(step, place(start()))


@pytest.mark.parametrize("spread", ["shard_map", "pmap"])
def test_a_normalizer_that_knows_of_no_shards_is_refused(spread):
    with pytest.raises(ValueError, match=r"differs from shard to shard of axis 'data'.*axis_name='data'"):
        ready(spread, norm={})(FIRST, KEY)


def test_a_wrong_axis_name_is_refused():
    with pytest.raises(ValueError, match=r"axis_name='dat' is not bound here \('data' is\)"):
        ready(norm={"axis_name": "dat"})(FIRST, KEY)


def test_an_axis_name_under_plain_jit_is_refused():
    with pytest.raises(ValueError, match="under plain jit with sharded inputs leave axis_name=None"):
        ready("jit")(FIRST, KEY)


@pytest.mark.parametrize("build", [training.jit_step, training.shard_map_step])
def test_a_mesh_without_the_axis_is_refused(build):
    with pytest.raises(ValueError, match=r"the mesh has axes \{'model': 8\} and no 'data'"):
        build(small_network.loss_of(jaxbn.batch_norm()), adam(), mesh=mesh_of(8, names=("model",)))


@pytest.mark.parametrize("spread", SPREADS)
def test_a_batch_that_does_not_divide_is_refused(spread):
    short = jax.tree.map(lambda leaf: leaf[:63], FIRST)
    with pytest.raises(ValueError, match="a batch of 63 examples does not divide into 8 shards of 1 microbatches"):
        ready(spread, norm={} if spread == "jit" else NAMED)(short, KEY)


def test_microbatches_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="64 examples does not divide into 8 shards of 3 microbatches each"):
        ready(microbatches=3)(FIRST, KEY)


def test_leaves_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match="expected as many examples in all"):
        ready()({**FIRST, "label": FIRST["label"][:8]}, KEY)


def test_a_loss_that_returns_something_else_is_refused():
    step, place, _ = built("shard_map", lambda variables, batch, rng: 0.0)
    with pytest.raises(TypeError, match=r"returned float; expected a jaxbn\.training\.LossOutput"):
        step(place(training.init_state({"params": {}, "batch_stats": {}}, adam())), FIRST, KEY)
