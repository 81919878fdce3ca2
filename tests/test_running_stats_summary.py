"""Figures of the running statistics against numbers put there, and the table they make."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from normalizers import CASES, ready

import jaxbn.nnx
from jaxbn._moments import Moments
from jaxbn.diagnostics import running_stats_summary, running_stats_table

EPSILON = 1e-5


def one_layer(scale=(1, 1, 1, 1), bias=(0, 0, 0, 0), mean=(0, 0, 0, 0), var=(1, 1, 1, 1)):
    params = {"scale": jnp.array(scale, float), "bias": jnp.array(bias, float)}
    return {"params": params, "batch_stats": {"mean": jnp.array(mean, float), "var": jnp.array(var, float)}}


def only(rows):
    (row,) = rows
    return row


def test_a_fresh_layer_is_healthy():
    row = only(running_stats_summary(one_layer()))
    assert row[1:6] == (4, 0, 0, 0, 0)
    assert (row.var_min, row.var_median, row.var_max, row.mean_over_std) == (1, 1, 1, 0)


def test_variance_below_epsilon_counts_as_constant():
    assert only(running_stats_summary(one_layer(var=(0, 1e-6, 2e-5, 1)))).constant == 2


def test_scale_of_zero_is_silent_and_a_bias_far_below_is_negative():
    row = only(running_stats_summary(one_layer(scale=(0, 1, -1, 0.5), bias=(-9, -5, -3, -2.1))))
    assert (row.silent, row.negative) == (1, 2)


def test_what_is_not_finite_is_counted_and_left_out_of_the_rest():
    row = only(running_stats_summary(one_layer(mean=(np.nan, 0, 0, 3), var=(1, np.inf, -1, 4))))
    assert row.nonfinite == 3
    assert (row.var_min, row.var_max) == (4, 4)
    assert row.mean_over_std == pytest.approx(3 / np.sqrt(4 + EPSILON))


def test_drift_is_in_standard_deviations_and_in_factors_of_two():
    batch = Moments(np.full(4, 10.0), np.array([0, 2.0, 0, 0]), np.array([1, 4.0, 1, 8.0]))
    row = only(running_stats_summary(one_layer(), {"": batch}))
    assert row.mean_drift == pytest.approx(2 / np.sqrt(4 + EPSILON))
    assert row.var_drift == pytest.approx(3, rel=1e-4)


def test_a_feature_that_the_batch_did_not_show_does_not_drift():
    batch = Moments(np.array([10.0, 0, 10, 10]), np.zeros(4), np.array([1.0, 0, 1, 1]))
    row = only(running_stats_summary(one_layer(mean=(0, 7, 0, 0)), {"": batch}))
    assert (row.mean_drift, row.var_drift) == (0, 0)


def test_debiased_averages_are_corrected_first():
    variables = one_layer(mean=(1, 1, 1, 1), var=(1, 1, 1, 1))
    variables["batch_stats"]["weight"] = jnp.full(4, 0.25)
    assert only(running_stats_summary(variables, debias=True)).var_max == 4


def test_a_layer_without_scale_and_bias_counts_as_ones_and_zeros():
    row = only(running_stats_summary({"batch_stats": one_layer()["batch_stats"]}))
    assert (row.silent, row.negative) == (0, 0)


@pytest.mark.parametrize("name", CASES)
def test_every_normalizer_with_a_running_mean_and_variance_has_a_healthy_row(name):
    variables = ready(name).variables
    rows = running_stats_summary(variables)
    assert len(rows) == ({"mean", "var"} <= set(variables["batch_stats"]))
    for row in rows:
        assert row.features == variables["batch_stats"]["mean"].size
        assert row[2:6] == (0, 0, 0, 0)
        assert np.all(np.isfinite(row[6:10]))


def test_what_classes_choose_counts_where_it_holds_for_every_class():
    variables = one_layer()
    scale, bias = np.ones((2, 4)), np.zeros((2, 4))
    scale[:, 0], scale[0, 1], bias[:, 2], bias[0, 3] = 0, 0, -5, -5
    row = only(running_stats_summary(variables | {"params": {"scale": scale, "bias": bias}}))
    assert (row.silent, row.negative) == (1, 1)


def test_what_vectors_choose_counts_where_the_vector_changes_nothing():
    params = one_layer(scale=(0, 0, 1, 1), bias=(0, 0, -5, -5))["params"]
    kernel = np.array([[0.0, 1, 0, 1]])
    params |= {"scale_kernel": kernel, "bias_kernel": np.zeros((1, 4))}
    row = only(running_stats_summary(one_layer() | {"params": params}))
    assert (row.silent, row.negative) == (1, 1)


def test_a_network_without_statistics_has_no_rows():
    assert running_stats_summary({"params": {"dense": {"kernel": np.ones((2, 2))}}}) == []


def test_layers_of_a_tree_are_rows_by_path():
    layer = one_layer(bias=(-9, 0, 0, 0))
    variables = {name: {"block": {"norm": layer[name]}, "head": layer[name]} for name in layer}
    rows = running_stats_summary(variables, {"head": Moments(np.ones(4), np.zeros(4), np.ones(4))})
    assert [row.path for row in rows] == ["block/norm", "head"]
    assert [row.negative for row in rows] == [1, 1]
    assert [np.isnan(row.mean_drift) for row in rows] == [True, False]


def test_an_nnx_model_is_read_from_its_states():
    class Model(nnx.Module):
        def __init__(self):
            self.norm = jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))

    _, params, stats = nnx.split(Model(), nnx.Param, nnx.BatchStat)
    assert [(row.path, row.features) for row in running_stats_summary({"params": params, "batch_stats": stats})] == [
        ("norm", 3)
    ]


def test_the_table_has_a_line_of_names_and_one_a_layer():
    table = running_stats_table(running_stats_summary(one_layer(mean=(1e4, 0, 0, 0))))
    names, figures = table.splitlines()
    assert names.split() == list(jaxbn.diagnostics.LayerSummary._fields[:10])
    assert figures.split() == [".", "4", "0", "0", "0", "0", "1", "1", "1", "1e+04"]


def test_the_columns_of_the_table_are_aligned():
    layer = one_layer()
    variables = {name: {"a": layer[name], "a/longer/path": layer[name]} for name in layer}
    lines = running_stats_table(
        running_stats_summary(variables, {"a": Moments(np.ones(4), np.zeros(4), np.ones(4))})
    ).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split()[-2:] == ["mean_drift", "var_drift"]
    assert lines[2].split()[-2:] == ["nan", "nan"]


def test_a_network_without_layers_has_an_empty_table():
    assert len(running_stats_table(running_stats_summary({"params": {}, "batch_stats": {}})).splitlines()) == 1
