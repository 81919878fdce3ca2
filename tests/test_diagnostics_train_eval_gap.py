"""A network that is fine in training and bad in evaluation, made so on purpose in several ways."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
import jaxbn.linen
from jaxbn.diagnostics import train_eval_gap, train_eval_gap_table
from jaxbn.training import LossOutput

ROUNDING = 1e-5  # Tens of roundings of float32.
NORM = jaxbn.batch_norm(use_scale=False, use_bias=False, epsilon=1e-12)


def data(batches=3, examples=40):
    return list(5 + 2 * np.random.default_rng(0).normal(size=(batches, examples, 2)).astype(np.float32))


def loss(variables, batch, rng, *, train):
    """The mean square of the normalized batch, which is 1 where the statistics fit."""
    of_norm = {"params": {}, "batch_stats": variables["batch_stats"]["norm"]}
    y, moved = NORM.apply(of_norm, batch, train=train)
    y = y * variables["params"]["size"]
    return LossOutput(jnp.sum(y**2), y.size, {"norm": moved}, {"large": jnp.sum(jnp.abs(y) > 1)})


TRAIN, EVAL = partial(loss, train=True), partial(loss, train=False)


def variables(mean, var):
    stats = {"mean": jnp.full(2, float(mean)), "var": jnp.full(2, float(var))}
    return {"params": {"size": jnp.ones(())}, "batch_stats": {"norm": stats}}


def test_statistics_that_lag_are_told_by_three_losses_and_by_the_drift():
    batches = data()
    gap = train_eval_gap(TRAIN, EVAL, variables(0, 1), batches)
    everything = np.concatenate(batches).astype(np.float64)
    assert gap.by_batch.loss == pytest.approx(1, rel=ROUNDING)
    assert gap.by_running.loss == pytest.approx(np.mean(everything**2), rel=ROUNDING)
    assert gap.by_population.loss == pytest.approx(1, rel=ROUNDING)
    (layer,) = gap.layers
    assert layer.path == "norm"
    assert layer.mean_drift == pytest.approx(np.max(everything.mean(0) / everything.std(0)), rel=1e-4)
    assert layer.var_drift == pytest.approx(np.max(np.log2(everything.var(0))), rel=1e-4)
    np.testing.assert_allclose(gap.batch_stats["norm"]["mean"], everything.mean(0), rtol=ROUNDING)


def test_metrics_are_means_of_all_batches_whatever_their_size():
    batches = [*data(2, 40), *data(1, 7)]
    gap = train_eval_gap(TRAIN, EVAL, variables(0, 1), batches)
    assert gap.by_running.metrics == {"large": pytest.approx(np.mean(np.abs(np.concatenate(batches)) > 1))}


def test_batches_of_one_class_each_cannot_be_mended_by_exact_statistics():
    def fourth_power(variables, batch, rng, *, train):
        output = loss(variables, batch, rng, train=train)
        y, _ = NORM.apply({"params": {}, "batch_stats": variables["batch_stats"]["norm"]}, batch, train=train)
        return output._replace(loss_sum=jnp.sum(y**4))

    def expected(x):
        x = np.asarray(x, np.float64)
        return np.mean((x - x.mean(0)) ** 4 / x.var(0) ** 2)

    batches = [batch + 100 * number for number, batch in enumerate(data(2))]
    losses = [partial(fourth_power, train=train) for train in (True, False)]
    gap = train_eval_gap(*losses, variables(0, 1), batches)
    # In training each batch is a Gaussian, in evaluation all are two peaks.
    assert gap.by_batch.loss == pytest.approx(np.mean([expected(batch) for batch in batches]), rel=1e-4)
    assert gap.by_population.loss == pytest.approx(expected(np.concatenate(batches)), rel=1e-4)
    assert gap.by_batch.loss > 2 * gap.by_population.loss


def test_exact_statistics_may_come_from_other_data():
    batches, others = data(), [batch + 3 for batch in data()]
    gap = train_eval_gap(TRAIN, EVAL, variables(5, 4), batches, statistics_batches=others)
    np.testing.assert_allclose(gap.batch_stats["norm"]["mean"], np.concatenate(others).mean(0), rtol=ROUNDING)
    assert gap.by_population.loss > 2 > gap.by_running.loss


class Network(nn.Module):
    norm: type

    @nn.compact
    def __call__(self, x, train):
        h = nn.Dense(4)(self.norm(use_running_average=not train, name="low")(x))
        return self.norm(use_running_average=not train, name="high")(jnp.tanh(h))


def linen_loss(variables, batch, rng, *, norm, train):
    y, moved = Network(norm).apply(variables, batch, train, mutable=["batch_stats"])
    return LossOutput(jnp.sum(y**2), y.size, moved["batch_stats"])


OURS = [partial(linen_loss, norm=jaxbn.linen.BatchNorm, train=train) for train in (True, False)]


def linen_variables(norm=jaxbn.linen.BatchNorm):
    return Network(norm).init(jax.random.key(0), data()[0], True)


def test_layer_by_layer_the_drift_is_zero_where_the_statistics_are_those_of_the_data():
    first = train_eval_gap(*OURS, linen_variables(), data())
    assert [layer.path for layer in first.layers] == ["high", "low"]
    assert first.layers[1].mean_drift > 2
    mended = train_eval_gap(*OURS, {**linen_variables(), "batch_stats": first.batch_stats}, data())
    assert all(layer.mean_drift < ROUNDING and layer.var_drift < ROUNDING for layer in mended.layers)
    assert mended.by_running.loss == pytest.approx(first.by_population.loss, rel=ROUNDING)


def test_a_network_without_statistics_has_no_gap():
    def plain(variables, batch, rng):
        return LossOutput(jnp.sum(batch * variables["params"]), batch.size, {})

    gap = train_eval_gap(plain, plain, {"params": jnp.ones(())}, data())
    assert gap.by_batch == gap.by_running == gap.by_population
    assert gap.layers == []
    assert len(train_eval_gap_table(gap).splitlines()) == 4


def test_the_table_has_three_rows_and_then_the_layers():
    gap = train_eval_gap(TRAIN, EVAL, variables(0, 1), data())
    rows = [line.split() for line in train_eval_gap_table(gap).splitlines()]
    assert rows[0] == ["statistics", "loss", "large"]
    assert [row[0] for row in rows[1:4]] == ["batch", "running", "population"]
    assert rows[1][1] == "1"
    assert rows[4] == []
    assert rows[5][-2:] == ["mean_drift", "var_drift"]
    assert rows[6][0] == "norm"


def test_flaxs_own_layers_are_refused_with_the_remedy():
    losses = [partial(linen_loss, norm=nn.BatchNorm, train=train) for train in (True, False)]
    with pytest.raises(TypeError) as refused:
        train_eval_gap(*losses, linen_variables(nn.BatchNorm), data())
    assert "jaxbn.linen.BatchNorm" in refused.value.__notes__[0]


def test_variables_of_flaxs_layers_are_measured_by_ours():
    gap = train_eval_gap(*OURS, linen_variables(nn.BatchNorm), data())
    inputs = np.concatenate(data()).astype(np.float64)
    assert gap.layers[1].path == "low"
    assert gap.layers[1].mean_drift == pytest.approx(np.max(inputs.mean(0) / inputs.std(0)), rel=1e-4)


def test_a_training_loss_in_evaluation_mode_is_refused():
    with pytest.raises(ValueError, match="training mode"):
        train_eval_gap(EVAL, EVAL, variables(0, 1), data())
