"""Benchmarks: every library is measured doing the same thing, and what is said of the times. No time is asserted."""

import json
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from experiments.__main__ import main
from experiments.aot import record as aot_record
from experiments.aot.cost import Cost
from experiments.bench import (
    accuracy,
    command,
    compare,
    compile,
    figures,
    grid,
    memory,
    one_layer,
    operation,
    peers,
    steps,
)
from experiments.bench import record as records
from experiments.bench.one_layer import BOTH, EVAL, FORWARD, LayerCall
from experiments.bench.record import Measured
from experiments.errors import UserError
from experiments.framework import registry, tables, timing
from experiments.framework.provenance import provenance
from experiments.training import conv_chain, data, models

INSTALLED = list(peers.installed())


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
    for ours, theirs in zip(gradients(jaxbn.batch_norm()), gradients(peers.PEERS[name][1]()), strict=True):
        np.testing.assert_allclose(theirs, ours, atol=1e-5)


@pytest.mark.parametrize("case", [LayerCall((6, 4), "float32", mode, True) for mode in (EVAL, FORWARD, BOTH)])
def test_a_case_runs_in_every_library(case):
    candidates = one_layer.candidates(case)
    assert next(iter(candidates)) == peers.FUSED
    assert set(INSTALLED) < set(candidates)
    for candidate in candidates.values():
        candidate.run()


def test_times_come_in_rounds_for_every_program():
    calls = []
    found = timing.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert {name: values.shape for name, values in found.items()} == {"a": (3,), "b": (3,)}
    assert calls.count("a") > 3
    assert timing.ratio(np.array([1.0, 2, 30]), np.array([1.0, 1, 10])) == 2


def test_turns_come_in_an_order_drawn_anew_each_round():
    calls = []
    found = timing.in_turns({name: partial(calls.append, name) for name in "abcd"}, rounds=6)
    assert {name: len(values) for name, values in found.items()} == dict.fromkeys("abcd", 6)
    rounds = [tuple(calls[first : first + 4]) for first in range(0, 24, 4)]
    assert all(sorted(one) == list("abcd") for one in rounds)
    assert len(set(rounds)) > 3


def test_a_comparison_takes_ratios_within_rounds_and_scales_what_stands_for_more(monkeypatch):
    seconds = {"ours": np.array([2.0, 4, 6]), "copy": np.array([1.0, 1, 1])}
    monkeypatch.setattr(compare, "interleaved", lambda programs, rounds: seconds)
    candidates = {"ours": compare.Candidate(print, 7), "copy": compare.Candidate(print)}
    found = compare.compare(candidates, "ours", 3, {"copy": 4})
    assert found.seconds == {"ours": 4, "copy": 4}
    assert found.ours_over == {"ours": 1, "copy": 1}
    assert found.quartiles == (3, 5)
    assert found.temporary == {"ours": 7}


def row(seconds):
    case = LayerCall((4, 3), "float32", FORWARD, False)
    floor = {operation.FLOOR: 3.0}
    over = {name: seconds["jaxbn"] / value for name, value in seconds.items()}
    return operation.Row(case, seconds, over | floor, (1e-6, 3e-6), {"jaxbn": 48, "flax.linen": 96})


def test_the_table_names_the_best_peer_and_the_geometric_mean():
    rows = [row({"jaxbn": 2e-6, "flax.linen": 4e-6, "haiku": 1e-6}), row({"jaxbn": 2e-6, "flax.linen": 1e-6})]
    (table,) = operation.tabulate(rows)
    assert table.rows[0] == ["4x3", "2", "0.50", "2.00", "haiku", "3.00", "1.0", "2.0"]
    assert table.rows[1][2:5] == ["2.00", "2.00", "flax.linen"]
    assert table.rows[2][2:4] == ["1.00", "2.00"]
    assert len(operation.draw(rows).axes) == 1


def test_a_step_of_every_library_trains_and_is_tabulated(monkeypatch):
    monkeypatch.setitem(steps.TRAININGS, "MLP", steps.TRAININGS["MLP"]._replace(shape=(8, 784)))
    found = steps.measure("MLP", rounds=1)
    assert {peers.OURS, steps.NONE, *INSTALLED} <= set(found.seconds)
    assert found.ours_over[peers.OURS] == 1
    (table,) = steps.tabulate([found])
    assert len(table.rows) == len(found.seconds)


class Quick:
    """A benchmark that takes no time."""

    Row = operation.Row
    tabulate = staticmethod(operation.tabulate)
    draw = staticmethod(operation.draw)

    @staticmethod
    def measured():
        return [row({"jaxbn": 2e-6, "flax.linen": 4e-6})]


def test_the_record_holds_rows_and_where_they_come_from(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "load_benchmark", lambda _: Quick)
    path = tmp_path / "made" / "for" / "record.json"
    command.run(["operation"], path)
    held = json.loads(path.read_text())["operation"]
    assert held["rows"][0]["seconds"]["jaxbn"] == 2e-6
    assert held["provenance"]["commit"]
    assert (path.parent / "record-operation.png").stat().st_size > 1000
    assert "| 4x3 |" in path.with_suffix(".md").read_text()
    command.run(["memory"], path)
    assert list(json.loads(path.read_text())) == ["operation", "memory"]
    assert records.read(path)["operation"].rows == Quick.measured()


def test_a_record_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "load_benchmark", lambda _: None)
    (tmp_path / "file").write_text("no record")
    for path, message in ((tmp_path / "file" / "below.json", "cannot be written"), (tmp_path / "file", "not readable")):
        with pytest.raises(UserError, match=message):
            command.run(["operation"], path)
    assert (tmp_path / "file").read_text() == "no record"


LIBRARIES = {"jaxbn": 1.0, "flax.linen": 2.0}
ROWS = {
    "operation": row(LIBRARIES),
    "steps": steps.Row("MLP", LIBRARIES, LIBRARIES, (1.0, 2.0), {"jaxbn": 3}),
    "accuracy": accuracy.Row("far", LIBRARIES, LIBRARIES),
    "memory": memory.Row("jaxbn", False, (2, 4, 4, 3), 5.0, dict.fromkeys(memory.NOTES, 6)),
    "compile": compile.Row("layer", LIBRARIES, LIBRARIES, LIBRARIES, {"jaxbn": 1}, {"jaxbn": 0}),
    "grid": grid.Row("jaxbn grid", (1.0, 2.0, 3.0), 1.0),
}


@pytest.mark.parametrize("name", registry.BENCHMARKS)
def test_rows_come_back_from_a_record(tmp_path, name):
    made = {"commit": "abc", "hardware": "one", "versions": {"jax": "1", "flax": "2", "torch": "not installed"}}
    record = {name: Measured(made, [ROWS[name]])}
    if name != "memory":  # whose tables take Flax's row too
        records.write(tmp_path / "record.json", record)
        assert "one; jax 1, flax 2; commit abc" in (tmp_path / "record.md").read_text()
    assert records.from_json(type(ROWS[name]), records.as_json(ROWS[name])) == ROWS[name]


def test_an_error_that_is_no_number_comes_back_from_strict_json():
    lost = accuracy.Row("far", {"haiku": math.nan}, {"haiku": math.inf})
    text = json.dumps(records.as_json(lost), allow_nan=False)
    assert repr(records.from_json(type(lost), json.loads(text))) == repr(lost)


def test_what_was_counted_ahead_of_time_is_kept_and_replaced(tmp_path):
    def entry(program, moved):
        counted = aot_record.Counted("jaxbn", Cost(2, 0, 0, 1024, moved, 0, 0, 500))
        return aot_record.Entry("h100:8", program, "A layer", 8, 100, provenance(), [counted])

    path = tmp_path / "made" / "aot.json"
    entries = aot_record.open_record(path)
    for one in (entry("layer", 600), entry("chain", 800), entry("layer", 700)):
        entries = aot_record.added(entries, one)
    aot_record.write(path, entries)
    assert aot_record.read(path) == [entry("chain", 800)._replace(provenance=entries[0].provenance), entries[1]]
    table, origin = aot_record.in_markdown(entries[1])
    assert "| jaxbn | 2 | 0 | 0 | 1.0 | 7.000 | 0.000 | 0.000 | 5.000 |" in table
    assert "bench --aot h100:8 --program layer" in origin


def test_the_page_shows_the_figures_of_the_committed_record():
    text = figures.README.read_text()
    assert all(f"<!-- {name} -->" in text for name in figures.FIGURES)
    assert figures.with_figures(text) == text, "run `python -m experiments bench --tables`"


@pytest.mark.parametrize("path", [figures.RECORD, figures.GPU_RECORD])
def test_the_tables_beside_the_record_are_those_of_the_record(path):
    held = path.with_suffix(".md").read_text()
    assert records.in_markdown(records.read(path)) == held, "run `python -m experiments bench --tables`"


def test_figures_are_made_anew_from_the_record(tmp_path, monkeypatch, capsys):
    record = {"operation": Measured(provenance(), Quick.measured())}
    page = tmp_path / "README.md"
    page.write_text("Before.\n<!-- grid -->\nold\n<!-- end of grid -->\nAfter.\n")
    for module in (figures, command):
        monkeypatch.setattr(module, "README", page)
        monkeypatch.setattr(module, "RECORD", tmp_path / "record.json")
        monkeypatch.setattr(module, "GPU_RECORD", tmp_path / "gpu.json")
    records.write(tmp_path / "record.json", record)
    assert main(["bench", "--tables"]) == 0
    assert "README.md" in capsys.readouterr().out
    assert page.read_text().startswith("Before.\n<!-- grid -->\nNot recorded yet")
    assert (tmp_path / "record-operation.png").exists()


@pytest.mark.parametrize("name", compile.PROGRAMS)
def test_a_program_is_compiled_with_every_librarys_layer(monkeypatch, name):
    monkeypatch.setattr(compile, "SHAPE", (2, 4, 4, 3))
    monkeypatch.setattr(compile, "BLOCKS", 2)
    program = compile.PROGRAMS[name]
    if program.build is compile.resnet50:  # a minute a library: see that it lowers
        step, arguments = compile.resnet50(jaxbn.identity())
        assert jax.eval_shape(step, *arguments)[0].step.shape == ()
        return
    found = compile.measure(name, rounds=1)
    assert {peers.OURS, compile.NONE, *INSTALLED} == set(found.lines)
    assert found.ours_over[peers.OURS] == 1
    assert found.lines[compile.NONE] < min(found.lines[library] for library in ("jaxbn", "flax.linen"))
    (table,) = compile.tabulate([found])
    assert len(table.rows) == len(found.lines)


def test_a_branch_is_a_conditional_or_a_loop_that_values_end():
    def looped(norm):
        def f(x):
            x = jax.lax.fori_loop(0, 7, lambda i, x: jnp.sin(x), x)  # this counts
            x = jax.lax.while_loop(lambda x: x[0] < 3, lambda x: x + 1, x)
            return jax.lax.cond(x[1] > 0, jnp.sin, jnp.cos, x)

        return jax.jit(f), (jnp.ones(3),)

    assert compile.build(looped, jaxbn.identity()).branches == 2


def test_a_chain_written_out_is_the_chain_in_a_loop():
    norm = jaxbn.batch_norm(activation=jax.nn.relu)
    shape = (4, 3, 3, 2)
    generator = np.random.default_rng(0)
    _, units = jax.tree.map(lambda leaf: generator.normal(1, 0.3, leaf.shape), conv_chain.arguments(norm, shape, 3))
    x, dy = generator.normal(size=(2, *shape)).astype(np.float32)
    with jax.enable_x64(True):
        looped, written = (
            jax.jit(conv_chain.gradient_of(partial(chain, norm)))(x.astype(float), units, dy.astype(float))
            for chain in (conv_chain.loop(conv_chain.convolve_first, False), conv_chain.unrolled(False))
        )
    for ours, theirs in zip(jax.tree.leaves(looped[0]), jax.tree.leaves(written[0]), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_a_grid_and_a_single_network_are_timed_a_step(monkeypatch):
    monkeypatch.setattr(grid, "RUNS", grid.RUNS[:2])
    monkeypatch.setattr(grid, "STEPS", 2)
    digits = data.load("mnist5k")
    trainers = {"grid": grid.train_grid(digits), "flax": grid.train_flax(grid.draw_batches(digits))}
    rows = grid.measure(trainers, rounds=1)
    assert [trainer.networks for trainer in trainers.values()] == [2, 1]
    assert [row.name for row in rows] == ["grid", "flax"]
    assert rows[0].over_grid == 1
    assert all(row.microseconds[0] <= row.microseconds[1] <= row.microseconds[2] for row in rows)


def test_lenet_has_the_sizes_of_the_paper():
    network = models.lenet(jaxbn.identity(), use_bias=True, activation=jnp.tanh)
    variables = network.init(jax.random.key(0), jnp.zeros((2, 28, 28, 1)))
    kernels = [param["layer"]["kernel"].shape for param in variables["params"]]
    assert kernels == [(5, 5, 1, 6), (5, 5, 6, 16), (120, 400), (84, 120), (10, 84)]
    logits, _ = network.apply(variables, jnp.ones((2, 28, 28, 1)), train=True)
    assert logits.shape == (2, 10)


def test_markdown_has_a_row_a_case():
    (table,) = operation.tabulate([row({"jaxbn": 2e-6, "flax.linen": 4e-6})])
    assert tables.to_markdown(table).count("\n| ") == 4


def test_the_reference_of_accuracy_is_batch_norm_in_float64():
    with jax.enable_x64(True):
        x, dy = (np.random.default_rng(seed).normal(3, 2, (40, 3)) for seed in (0, 1))
        y, pull = jax.vjp(lambda x: jaxbn.batch_normalize(x, axis=0, epsilon=accuracy.EPSILON)[0], x)
        (exact_y, exact_dx), _ = accuracy.reference(x, dy)
        np.testing.assert_allclose(exact_y, y, rtol=1e-12)
        np.testing.assert_allclose(exact_dx, pull(dy)[0], rtol=1e-10, atol=1e-13)


def test_ours_is_exact_on_every_input_and_every_library_is_tabulated():
    rows = list(accuracy.measured())
    for row in rows:
        assert max(row.y[peers.OURS], row.dx[peers.OURS]) < 1e-6
    first, second = accuracy.tabulate(rows)
    assert len(first.rows) == len(second.rows) == len(accuracy.inputs())
    assert set(INSTALLED) < set(first.columns)
