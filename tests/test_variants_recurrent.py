"""Statistics per time step, and the batch-normalized LSTM in `lax.scan` and in `flax.linen.RNN`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from normalizers import KEY, QUICK, draw, in_training

import jaxbn
from jaxbn import variants
from jaxbn.variants._lstm_linen import BatchNormLSTMCell, rnn

BATCH, TIME, INPUTS, FEATURES = 6, 5, 3, 4
X = draw(0, (TIME, BATCH, INPUTS), offset=0.0)
LENGTHS = np.array([5, 3, 2, 4, 2, 3], np.int32)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # Some hundred operations of float32 on values of size one.
CELL = variants.batch_norm_lstm(FEATURES, TIME, decay=0.0)
TRAINING, EVALUATING = (rnn(CELL, train=train, time_major=True) for train in (True, False))


def scan(cell, variables, xs, train, where=None):
    """Run the cell over xs [time, batch, inputs]; outputs, statistics and the last carry."""
    where = jnp.ones(xs.shape[:2], bool) if where is None else where

    def step(state, inputs):
        carry, batch_stats = state
        here = {"params": variables["params"], "batch_stats": batch_stats}
        carry, y, batch_stats = cell.apply(here, carry, inputs[0], train=train, where=inputs[1])
        return (carry, batch_stats), y

    start = cell.initial_carry(xs[0]), variables["batch_stats"]
    (carry, batch_stats), ys = jax.lax.scan(step, start, (xs, where))
    return ys, batch_stats, carry


@functools.cache
def compiled(cell, train):
    return jax.jit(lambda v, xs, where: scan(cell, v, xs, train, where), compiler_options=QUICK)


def run(cell, variables, xs, train, where=None):
    where = np.ones(xs.shape[:2], bool) if where is None else where
    return compiled(cell, train)(variables, xs, where)


def reference(params, xs, where):
    """Equations 6 to 8 in float64, masked statistics included."""
    p = jax.tree.map(lambda v: np.asarray(v, np.float64), params)
    sigmoid = lambda v: (1 + np.tanh(v / 2)) / 2

    def normalized(v, keep, scale):
        return scale * (v - v[keep].mean(0)) / np.sqrt(v[keep].var(0) + 1e-5)

    hidden, cell, ys = np.zeros((BATCH, FEATURES)), np.zeros((BATCH, FEATURES)), []
    for x, keep in zip(np.asarray(xs, np.float64), where, strict=True):
        gates = normalized(hidden @ p["recurrent"]["kernel"], keep, p["recurrent"]["scale"])
        gates = gates + normalized(x @ p["input"]["kernel"], keep, p["input"]["scale"]) + p["bias"]
        forget, enter, out, value = np.split(gates, 4, axis=1)
        new = sigmoid(forget) * cell + sigmoid(enter) * np.tanh(value)
        after = sigmoid(out) * np.tanh(normalized(new, keep, p["cell"]["scale"]) + p["cell"]["bias"])
        hidden, cell = np.where(keep[:, None], after, hidden), np.where(keep[:, None], new, cell)
        ys.append(hidden)
    return np.stack(ys)


@pytest.fixture(scope="module")
def variables():
    return in_training(CELL, X[0])


def test_each_time_step_has_statistics_of_its_own():
    norm = variants.recurrent_batch_norm(3, decay=0.0)
    variables = norm.init(KEY, X[0])
    for step in (0, 2):
        _, stats = norm.apply(variables, X[step], train=True, step=step)
        variables = variables | {"batch_stats": stats}
    expected = np.stack([np.mean(X[0], 0), np.zeros(INPUTS), np.mean(X[2], 0)])
    np.testing.assert_allclose(stats["mean"], expected, rtol=1e-5, atol=1e-6)


def test_scale_starts_at_a_tenth():
    norm = variants.recurrent_batch_norm(3)
    np.testing.assert_array_equal(norm.init(KEY, X[0])["params"]["scale"], np.full(INPUTS, 0.1, np.float32))


def test_steps_beyond_the_longest_seen_use_the_last_one_seen():
    norm = variants.recurrent_batch_norm(4, decay=0.0)
    variables = norm.init(KEY, X[0])
    for step in (0, 1):
        _, stats = norm.apply(variables, X[step], train=True, step=step)
        variables = variables | {"batch_stats": stats}
    assert stats["length"] == 2
    last, beyond, far = (norm.apply(variables, X[3], train=False, step=step)[0] for step in (1, 2, 100))
    np.testing.assert_array_equal(beyond, last)
    np.testing.assert_array_equal(far, last)


def test_time_step_of_padding_only_counts_as_not_seen():
    norm = variants.recurrent_batch_norm(4)
    variables = norm.init(KEY, X[0])
    _, stats = norm.apply(variables, X[2], train=True, step=2, where=np.zeros((BATCH, 1), bool))
    jax.tree.map(np.testing.assert_array_equal, stats, variables["batch_stats"])


@pytest.mark.parametrize("step", [None, 1.0, np.arange(2)])
def test_step_that_is_no_integer_scalar_is_refused(step):
    norm = variants.recurrent_batch_norm(4)
    with pytest.raises(ValueError, match="step="):
        norm.apply(norm.init(KEY, X[0]), X[0], train=True, step=step)


def test_lstm_is_equations_6_to_8(variables):
    ys, _, carry = run(CELL, variables, X, train=True)
    np.testing.assert_allclose(ys, reference(variables["params"], X, np.ones((TIME, BATCH), bool)), **CLOSE)
    np.testing.assert_array_equal(carry.hidden, ys[-1])
    assert carry.step == TIME


def test_lstm_evaluates_with_the_statistics_of_each_step(variables):
    # With decay 0 the running statistics are those of the batch, so that both modes agree on it.
    ys, stats, _ = run(CELL, variables, X, train=True)
    evaluated, same, _ = run(CELL, {"params": variables["params"], "batch_stats": stats}, X, train=False)
    np.testing.assert_allclose(evaluated, ys, **CLOSE)
    jax.tree.map(np.testing.assert_array_equal, same, stats)


def test_lstm_leaves_padding_out_of_statistics_and_carry(variables):
    where = np.arange(TIME)[:, None] < LENGTHS
    garbage = jnp.where(where[:, :, None], X, 1e3)
    ys, _, carry = run(CELL, variables, garbage, train=True, where=where)
    np.testing.assert_allclose(ys, reference(variables["params"], X, where), **CLOSE)
    np.testing.assert_array_equal(carry.hidden, ys[LENGTHS - 1, np.arange(BATCH)])


def test_gradient_flows_through_time_and_statistics(variables):
    def loss(x):
        ys, _, _ = scan(CELL, variables, X.at[0].set(x), train=True)
        return jnp.sum(ys[-1] ** 2)

    step = 1e-2 * draw(1, X[0].shape, offset=0.0)
    both = jax.jit(
        lambda x: (jnp.vdot(jax.grad(loss)(x), step), (loss(x + step) - loss(x - step)) / 2), compiler_options=QUICK
    )
    slope, difference = both(X[0])
    np.testing.assert_allclose(slope, difference, rtol=2e-2)  # Steps of 0.01: the third derivative's share.


def test_bfloat16_in_gives_bfloat16_out_and_float32_state(variables):
    narrow = X.astype(jnp.bfloat16)
    carry, y, stats = jax.eval_shape(lambda x: CELL.apply(variables, CELL.initial_carry(x), x, train=True), narrow[0])
    assert (y.dtype, carry.hidden.dtype, carry.cell.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    assert {v.dtype for v in jax.tree.leaves(stats)} == {jnp.dtype("float32"), jnp.dtype("int32")}


def in_linen(variables):
    return {collection: {"cell": variables[collection]} for collection in ("params", "batch_stats")}


def test_linen_rnn_makes_the_variables_of_the_cell(variables):
    made = jax.eval_shape(EVALUATING.init, KEY, X)
    shapes = lambda tree: jax.tree.map(lambda v: (v.shape, v.dtype), tree)
    assert shapes(dict(made)) == shapes(in_linen(variables))


def test_linen_rnn_computes_what_the_scan_does(variables):
    ys, stats, _ = run(CELL, variables, X, train=True)
    apply = jax.jit(lambda v, x: TRAINING.apply(v, x, mutable="batch_stats"), compiler_options=QUICK)
    y, moved = apply(in_linen(variables), X)
    np.testing.assert_allclose(y, ys, **CLOSE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), moved["batch_stats"]["cell"], stats)


def test_linen_rnn_evaluates_without_a_mutable_collection(variables):
    _, stats, _ = run(CELL, variables, X, train=True)
    variables = {"params": variables["params"], "batch_stats": stats}
    y = jax.jit(EVALUATING.apply, compiler_options=QUICK)(in_linen(variables), X)
    np.testing.assert_allclose(y, run(CELL, variables, X, train=False)[0], **CLOSE)


def test_linen_rnn_leaves_padding_out(variables):
    where = np.arange(TIME)[:, None] < LENGTHS
    carry = BatchNormLSTMCell(CELL).padded(X[0], LENGTHS)
    options = dict(initial_carry=carry, seq_lengths=LENGTHS, return_carry=True, mutable="batch_stats")
    apply = jax.jit(lambda v, x: TRAINING.apply(v, x, **options), compiler_options=QUICK)
    (last, y), _ = apply(in_linen(variables), X)
    expected = reference(variables["params"], X, where)
    np.testing.assert_allclose(y, expected, **CLOSE)
    np.testing.assert_allclose(last.hidden, expected[-1], **CLOSE)


def test_cell_takes_one_time_step(variables):
    with pytest.raises(ValueError, match="one time step"):
        CELL.apply(variables, CELL.initial_carry(X[0]), X, train=True)


@pytest.mark.parametrize("make", [lambda: variants.recurrent_batch_norm(0), lambda: variants.batch_norm_lstm(0, 3)])
def test_size_of_zero_is_refused(make):
    with pytest.raises(ValueError, match="expected at least 1"):
        make()


def test_statistics_are_shared_over_shards(variables):
    shared = variants.batch_norm_lstm(FEATURES, TIME, decay=0.0, axis_name="shards")
    parts = jnp.swapaxes(X.reshape(TIME, 2, -1, INPUTS), 0, 1)
    mapped = jax.vmap(lambda xs: scan(shared, variables, xs, train=True)[0], axis_name="shards")
    ys = jax.jit(mapped, compiler_options=QUICK)(parts)
    whole, _, _ = run(CELL, variables, X, train=True)
    np.testing.assert_allclose(jnp.swapaxes(ys, 0, 1).reshape(whole.shape), whole, **CLOSE)


def test_init_of_the_cell_takes_no_key_twice():
    normal = jax.nn.initializers.normal()
    cell = variants.batch_norm_lstm(3, 4, scale_init=normal)
    with jax.debug_key_reuse(True):
        variables = jax.jit(lambda key: cell.init(key, jax.ShapeDtypeStruct((6, 5), jnp.float32)))(KEY)
    scales = [np.asarray(variables["params"][name]["scale"]) for name in ("input", "recurrent")]
    assert not np.any(scales[0] == scales[1])


def test_the_cell_is_scanned_inside_shard_map():
    cell = variants.batch_norm_lstm(3, 4, axis_name="data")
    alone = variants.batch_norm_lstm(3, 4)
    x = draw(0, (5, 8, 6))
    variables = alone.init(KEY, x[0])

    def outputs(cell, x):
        def step(carried, x):
            carry, stats = carried
            carry, y, stats = cell.apply({**variables, "batch_stats": stats}, carry, x, train=True)
            return (carry, stats), y

        (_, stats), ys = jax.lax.scan(step, (cell.initial_carry(x[0]), variables["batch_stats"]), x)
        return ys, stats

    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    part = jax.P(None, "data")
    sharded = jax.shard_map(functools.partial(outputs, cell), mesh=mesh, in_specs=part, out_specs=(part, jax.P()))
    both = jax.jit(lambda x: (sharded(x), outputs(alone, x)), compiler_options=QUICK)(x)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), *both)


@pytest.mark.parametrize(
    "made", [variants.recurrent_batch_norm(3), jaxbn.batch_norm(), variants.recurrent_batch_norm(7)]
)
def test_statistics_made_for_another_length_are_refused(made):
    norm, x = variants.recurrent_batch_norm(5), draw(0, (6, 4))
    with pytest.raises(ValueError, match="max_length=5"):
        norm.apply(made.init(KEY, x), x, train=False, step=0)
