"""Benchmarks: every library is measured doing the same thing, and what is said of the times. No time is asserted."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from experiments.bench import accuracy as bench_accuracy
from experiments.bench import command as bench
from experiments.bench import operation as bench_operation
from experiments.bench import peer_layers, timing
from experiments.bench import peers as bench_peers
from experiments.bench import steps as bench_steps
from experiments.bench.peers import BOTH, EVAL, FORWARD, Case
from experiments.errors import UserError
from experiments.framework import tables
from experiments.training import models

INSTALLED = list(peer_layers.installed())


@pytest.mark.parametrize("shape", [(16, 5), (3, 4, 4, 5)])
@pytest.mark.parametrize("name", INSTALLED)
def test_every_librarys_layer_computes_what_ours_does(name, shape):
    x = 1 + 2 * jax.random.normal(jax.random.key(0), shape)
    dy = jax.random.normal(jax.random.key(1), shape)

    def gradients(norm):
        variables = norm.init(jax.random.key(2), jax.ShapeDtypeStruct(x.shape, x.dtype))

        def output(params, x):
            return norm.apply({"params": params, "batch_stats": variables["batch_stats"]}, x, train=True)

        y, pull, moved = jax.vjp(output, variables["params"], x, has_aux=True)
        assert jax.tree.structure(moved) == jax.tree.structure(variables["batch_stats"])
        return y, pull(dy)[1]

    # epsilon is 1e-5 in all of them; momentum does not matter here.
    for ours, theirs in zip(gradients(jaxbn.batch_norm()), gradients(peer_layers.PEERS[name][1]()), strict=True):
        np.testing.assert_allclose(theirs, ours, atol=1e-5)


@pytest.mark.parametrize("case", [Case((6, 4), "float32", mode, True) for mode in (EVAL, FORWARD, BOTH)])
def test_a_case_runs_in_every_library(case):
    programs = bench_peers.programs(case)
    assert next(iter(programs)) == peer_layers.FUSED
    assert set(INSTALLED) < set(programs)
    for program in programs.values():
        program.run()


def test_times_come_in_rounds_for_every_program():
    calls = []
    found = timing.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert {name: values.shape for name, values in found.items()} == {"a": (3,), "b": (3,)}
    assert calls.count("a") > 3
    assert timing.ratio(np.array([1.0, 2, 30]), np.array([1.0, 1, 10])) == 2


def row(seconds):
    case = Case((4, 3), "float32", FORWARD, False)
    floor = {bench_operation.FLOOR: 3.0}
    over = {name: seconds["jaxbn"] / value for name, value in seconds.items()}
    return bench_operation.Row(case, seconds, over | floor, (1e-6, 3e-6), {"jaxbn": 48, "flax.linen": 96})


def test_the_table_names_the_best_peer_and_the_geometric_mean():
    rows = [row({"jaxbn": 2e-6, "flax.linen": 4e-6, "haiku": 1e-6}), row({"jaxbn": 2e-6, "flax.linen": 1e-6})]
    (table,) = bench_operation.tabulate(rows)
    assert table.rows[0] == ["4x3", "2", "0.50", "2.00", "haiku", "3.00", "1.0", "2.0"]
    assert table.rows[1][2:5] == ["2.00", "2.00", "flax.linen"]
    assert table.rows[2][2:4] == ["1.00", "2.00"]
    assert bench_operation.draw(rows).axes


def test_a_step_of_every_library_trains_and_is_tabulated(monkeypatch):
    example = bench_steps.EXAMPLES["MLP"]._replace(shape=(8, 784))
    monkeypatch.setitem(bench_steps.EXAMPLES, "MLP", example)
    found = bench_steps.measure("MLP", rounds=1)
    assert {peer_layers.OURS, bench_steps.NONE, *INSTALLED} <= set(found.seconds)
    assert found.ours_over[peer_layers.OURS] == 1
    (table,) = bench_steps.tabulate([found])
    assert len(table.rows) == len(found.seconds)


def test_the_record_holds_rows_and_where_they_come_from(tmp_path, monkeypatch):
    class Module:
        @staticmethod
        def measured():
            return [row({"jaxbn": 2e-6, "flax.linen": 4e-6})]

        tabulate = staticmethod(bench_operation.tabulate)
        draw = staticmethod(bench_operation.draw)

    monkeypatch.setattr(bench.registry, "load", lambda *_: Module)
    bench.run(["operation"], tmp_path / "record.json")
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["benchmarks"]["operation"][0]["seconds"]["jaxbn"] == 2e-6
    assert record["provenance"]["commit"]
    assert (tmp_path / "record-operation.png").stat().st_size > 1000
    assert "| 4x3 |" in (tmp_path / "record.md").read_text()


def test_a_record_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path):
    with pytest.raises(UserError, match="there is no directory"):
        bench.run(["operation"], tmp_path / "missing" / "record.json")


def test_lenet_has_the_sizes_of_the_paper():
    network = models.lenet(jaxbn.identity(), use_bias=True, activation=jnp.tanh)
    variables = network.init(jax.random.key(0), jnp.zeros((2, 28, 28, 1)))
    kernels = [param["layer"]["kernel"].shape for param in variables["params"]]
    assert kernels == [(5, 5, 1, 6), (5, 5, 6, 16), (120, 400), (84, 120), (10, 84)]
    logits, _ = network.apply(variables, jnp.ones((2, 28, 28, 1)), train=True)
    assert logits.shape == (2, 10)


def test_markdown_has_a_row_a_case():
    (table,) = bench_operation.tabulate([row({"jaxbn": 2e-6, "flax.linen": 4e-6})])
    assert tables.to_markdown(table).count("\n| ") == 4


def test_the_reference_of_accuracy_is_batch_norm_in_float64():
    with jax.enable_x64(True):
        x, dy = (np.random.default_rng(seed).normal(3, 2, (40, 3)) for seed in (0, 1))
        y, pull = jax.vjp(lambda x: jaxbn.batch_normalize(x, axis=0, epsilon=bench_accuracy.EPSILON)[0], x)
        (exact_y, exact_dx), _ = bench_accuracy.reference(x, dy)
        np.testing.assert_allclose(exact_y, y, rtol=1e-12)
        np.testing.assert_allclose(exact_dx, pull(dy)[0], rtol=1e-10, atol=1e-13)


def test_ours_is_the_most_accurate_of_all_libraries_on_what_is_hard_and_exact_on_everything():
    rows = list(bench_accuracy.measured())
    for row in rows:
        assert max(row.y[peer_layers.OURS], row.dx[peer_layers.OURS]) < 1e-6
    (far,) = (row for row in rows if row.name == "mean 10000 std")
    assert min(far.y, key=far.y.get) == peer_layers.OURS
    assert not far.y["flax.linen"] < 1
    first, second = bench_accuracy.tabulate(rows)
    assert len(first.rows) == len(second.rows) == len(bench_accuracy.inputs())
