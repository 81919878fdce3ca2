"""From rows to arrays with named axes, and what searches make of them."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import xarray as xr

from experiments.framework import protocol, results, run
from experiments.framework.experiment import Experiment, Grid, Search, Settings
from experiments.framework.run import measured_stretches
from experiments.framework.search import FIRST_SEED, choose, runs_of, search, with_chosen
from experiments.framework.tables import mean_and_std, table_of
from experiments.training import loop

GRID = Grid(task=None, batch_size=1, programs={"arm": ("plain", "batch norm")}, runs={"rate": (2.0, 1.0)})


def rows_of(stage, runs, value, steps=(10, 20), parts=1):
    """Rows as training writes them; value(run, step) is the metric."""
    size = len(runs) // parts
    yield {"stage": stage, "runs": runs}
    for first in range(0, len(runs), size):
        some = runs[first : first + size]
        for step in steps:
            measured = [value(run, step) for run in some]
            yield {"stage": stage, "first": first, "step": step, "loss": [0.0] * size, "validation_accuracy": measured}


def told_apart(number, run, step):
    return 100 * number + 10 * run["rate"] + run["seed"] + step / 100


def grid_rows(parts=1):
    runs = runs_of(GRID.runs, seeds=2)
    for number, arm in enumerate(GRID.programs["arm"]):
        yield from rows_of(arm, runs, partial(told_apart, number), parts=parts)


def experiment(**parts):
    return Experiment(title="", question="", source="", settings={}, claims=[], **parts)


@pytest.mark.parametrize("parts", [1, 2])
def test_metrics_of_a_grid_have_the_axes_of_its_programs_and_runs_in_order(parts):
    found = results.results_of(experiment(grid=GRID), list(grid_rows(parts)))["validation_accuracy"]
    assert set(found.dims) == {"arm", "rate", "seed", "step"}
    assert [list(found[axis].values) for axis in ("arm", "rate")] == [["plain", "batch norm"], [2.0, 1.0]]
    assert float(found.sel(arm="batch norm", rate=2.0, seed=1, step=20)) == pytest.approx(121.2)
    assert not found.isnull().any()


def test_numbers_of_a_run_that_have_names_are_found_by_them():
    grid = Grid(None, 1, {}, {"arm": {"off": {"on": 0}, "on": {"on": 1}}}, Search("rate", (0.1,)))
    runs = [{**run, "rate": 0.1 + run["on"]} for run in runs_of(grid.runs, seeds=2)]
    rows = list(rows_of("training", runs, lambda run, step: run["on"] + run["seed"]))
    found = results.results_of(experiment(grid=grid), rows)["validation_accuracy"]
    assert list(found.arm.values) == ["off", "on"]
    assert float(found.sel(arm="on", seed=1, step=20)) == 2
    assert protocol.chosen(grid, rows) == [
        {"where": {"arm": "off"}, "value": 0.1},
        {"where": {"arm": "on"}, "value": 1.1},
    ]


def test_what_was_concluded_of_one_program_is_unknown_of_the_others():
    rows = [
        *grid_rows(),
        {"stage": "plain", "first": 0, "concluded": {"rank": [["layer"], [[1, 2], [3, 4], [5, 6], [7, 8]]]}},
    ]
    found = results.results_of(experiment(grid=GRID), rows)["rank"]
    assert float(found.sel(arm="plain", rate=1.0, seed=0).isel(layer=1)) == 4
    assert found.sel(arm="batch norm").isnull().all()


def test_stages_are_put_together_along_what_they_differ_in():
    parts = [xr.Dataset({"error": ("seed", [float(depth), 2.0])}, {"depth": depth}) for depth in (3, 2)]
    rows = [{"stage": str(number), "dataset": part.to_dict()} for number, part in enumerate(parts)]
    found = results.results_of(experiment(), rows)["error"]
    assert float(found.sel(depth=3).isel(seed=0)) == 3


def test_the_first_step_is_unknown_where_it_is_never_reached():
    array = xr.DataArray([[0.1, 0.9, 0.8], [0.1, 0.2, 0.3]], {"step": [10, 20, 30]}, ("seed", "step"))
    np.testing.assert_array_equal(results.first_step_with(array, 0.5), [20, np.nan])


def test_figures_stand_side_by_side_by_name():
    array = xr.DataArray([1.0, 2.0], {"arm": ["plain", "batch norm"]}, "arm", "loss").assign_coords(step=3)
    found = results.side_by_side({"loss": array, "twice": 2 * array})
    assert float(found.sel(arm="batch norm", figure="twice")) == 4


def test_labelled_cells_say_what_they_are():
    array = xr.DataArray(
        np.zeros((2, 1, 3)), {"activation": ["relu", "sigmoid"], "std": [0.05]}, ("activation", "std", "seed")
    )
    assert list(results.label_cells(array, ("activation", "std")).cell.values) == [
        "relu, std 0.05",
        "sigmoid, std 0.05",
    ]


def searched(peaks, values=(1.0, 2.0, 4.0), **options):
    """The search over a grid in which each arm is best at its own rate; what was tried, and what was chosen."""
    grid = Grid(None, 1, {"arm": tuple(peaks)}, {"std": (1.0, 5.0)}, Search("rate", values, seeds=2, **options))
    trials = []

    def train(stage, program, runs):
        trials.append((stage, program["arm"], sorted({run["rate"] for run in runs})))
        assert {run["seed"] for run in runs} == {FIRST_SEED, FIRST_SEED + 1}
        score = lambda run, step: -abs(np.log2(run["rate"]) - np.log2(peaks[program["arm"]]))
        return list(rows_of(stage, runs, score))

    return search(grid, train), trials


def test_each_arm_gets_its_best_rate_in_every_cell():
    chosen, trials = searched({"plain": 2.0, "batch norm": 2.0})
    assert chosen.dims == ("arm", "std")
    assert (chosen == 2.0).all()
    assert len(trials) == 2


def test_where_one_arm_is_best_at_the_edge_all_arms_try_more():
    chosen, trials = searched({"plain": 2.0, "batch norm": 16.0})
    np.testing.assert_array_equal(chosen.sel(arm=["plain", "batch norm"]), [[2, 2], [16, 16]])
    assert [tried for _, arm, tried in trials if arm == "plain"] == [[1, 2, 4], [8], [16]]
    assert [tried for _, arm, tried in trials if arm == "batch norm"] == [[1, 2, 4], [8], [16]]


def test_rates_are_added_below_too_and_no_more_often_than_allowed():
    chosen, trials = searched({"plain": 0.01}, extensions=1)
    assert (chosen == 0.5).all()
    assert [tried for *_, tried in trials] == [[1, 2, 4], [0.5]]


def test_cells_of_a_shared_axis_take_what_is_best_at_its_first_value():
    grid = Grid(None, 1, {}, {"times": (1.0, 100.0)}, Search("rate", (1.0, 2.0, 4.0), shared=("times",)))

    def train(stage, program, runs):
        assert {run["times"] for run in runs} == {1.0}
        return list(rows_of(stage, runs, lambda run, step: -abs(run["rate"] - 2.0)))

    runs = with_chosen(runs_of(grid.runs, 1), search(grid, train), {})
    assert [(run["times"], run["rate"]) for run in runs] == [(1.0, 2.0), (100.0, 2.0)]


def test_programs_share_a_choice_and_take_what_is_given():
    programs = {"trained": ("best rate", "given rate"), "arm": ("plain", "batch norm")}
    given = lambda cell: 9.0 if cell["trained"] == "given rate" and cell["arm"] == "plain" else None
    grid = Grid(None, 1, programs, {}, Search("rate", (1.0, 2.0, 4.0), shared=("trained",), given=given))

    def train(stage, program, runs):
        assert program["trained"] == "best rate"
        return list(rows_of(stage, runs, lambda run, step: -abs(run["rate"] - 2.0)))

    chosen = search(grid, train)
    rates = {
        tuple(program.values()): with_chosen(runs_of({}, 1), chosen, program, given)[0]["rate"]
        for program in results.programs_of(grid)
    }
    assert rates.pop(("given rate", "plain")) == 9.0
    assert set(rates.values()) == {2.0}


def test_a_program_takes_some_of_the_seeds_and_the_result_all_examples(monkeypatch):
    trained = {}
    monkeypatch.setattr(run, "choose", lambda grid, steps, train: xr.DataArray([1.0], {"arm": ["plain"]}, name="rate"))
    monkeypatch.setattr(
        run,
        "train_grid",
        lambda record, stage, task, schedule, runs, dataset, *rest, **more: trained.update(
            seeds=[one["seed"] for one in runs], examples=len(dataset.train_labels)
        ),
    )
    wanted = Search("rate", (1.0,), then_on_all=True)
    most = lambda settings, arm: {"plain": 2}[arm]
    grid = Grid(lambda settings, arm: None, 1, {"arm": ("plain",)}, search=wanted, most_seeds=most)
    record = SimpleNamespace(is_done=lambda stage: False, rows=list)
    run._train(grid, Settings(seeds=3, data="mnist5k", steps=1, interval=1), record, None)
    assert trained == {"seeds": [0, 1], "examples": 4000}


def test_a_named_value_of_an_axis_brings_its_numbers_into_the_run():
    arms = {"plain": {"normalize": 0, "scale": 2}, "batch norm": {"normalize": 1, "scale": 3}}
    runs = runs_of({"arm": arms, "std": (1.0,)}, 1)
    assert runs[1] == {"seed": 0, "arm": "batch norm", "std": 1.0, "normalize": 1, "scale": 3}
    stacked = loop.stacked(runs, 2)
    assert set(stacked) == {"seed", "std", "normalize", "scale"}
    np.testing.assert_array_equal(stacked["scale"], [2, 3])


def test_values_that_do_not_train_together_give_the_same_choice():
    peaks = {"plain": 0.01, "batch norm": 2.0}
    chosen, _ = searched(peaks, extensions=1)
    apart, trials = searched(peaks, extensions=1, together=False)
    xr.testing.assert_identical(apart, chosen)
    assert [tried for _, arm, tried in trials if arm == "plain"] == [[1], [2], [4], [0.5]]
    assert len({stage for stage, *_ in trials}) == len(trials)


def test_a_run_that_diverged_is_never_chosen():
    grid = Grid(None, 1, {"arm": ("plain",)}, {}, Search("rate", (1.0, 2.0, 4.0), extensions=0))

    def train(stage, program, runs):
        rows = list(rows_of(stage, runs, lambda run, step: run["rate"]))
        rows[-1]["loss"] = [np.nan if run["rate"] == 4 else 0.0 for run in runs]
        return rows

    assert float(search(grid, train).sel(arm="plain")) == 2.0


def test_a_training_of_fewer_steps_is_not_searched():
    grid = Grid(None, 1, {"arm": ("plain", "batch norm")}, {"std": (1.0, 5.0)}, Search("rate", (1.0,), least_steps=10))
    chosen = choose(grid, 9, None)
    runs = with_chosen(runs_of(grid.runs, 1), chosen, {"arm": "plain"})
    assert runs == [{"seed": 0, "std": 1.0, "rate": 1.0}, {"seed": 0, "std": 5.0, "rate": 1.0}]


def test_runs_get_the_value_chosen_for_their_cell():
    chosen = xr.DataArray([[0.1, 0.2]], {"arm": ["plain"], "std": [1.0, 5.0]}, ("arm", "std"), "rate")
    runs = with_chosen(runs_of({"std": (1.0, 5.0)}, 1), chosen, {"arm": "plain"})
    assert runs == [{"seed": 0, "std": 1.0, "rate": 0.1}, {"seed": 0, "std": 5.0, "rate": 0.2}]


def final_accuracy(r):
    return results.final(r.validation_accuracy)


class Sizes:
    seeds, data, steps = 2, "mnist5k", 20


def test_a_table_has_mean_and_deviation_beside_the_published_figure():
    found = results.results_of(experiment(grid=GRID), list(grid_rows()))
    published = xr.DataArray([0.5, np.nan], {"arm": ["plain", "batch norm"]})
    table = table_of("T", final_accuracy, rows=["rate"], columns="arm", published=published)
    shown = table(Sizes, found)
    assert shown.columns == ["rate", "plain", "batch norm", "published plain", "published batch norm"]
    assert shown.rows[0] == ["2", "20.700 ± 0.707", "120.700 ± 0.707", "0.500", ""]
    assert shown.note == "Mean ± standard deviation of 2 seeds, mnist5k, 20 steps."


def test_a_table_of_what_does_not_depend_on_the_seed_says_so():
    values = xr.DataArray([[[0.1], [0.3]]], {"arm": ["plain"], "rate": [1, 2], "seed": [0]})
    table = table_of("T", lambda r: values, rows=["arm"], columns="rate", form="g")(Sizes, None)
    assert table.rows == [["plain", "0.1", "0.3"]]
    assert table.note == "The same for all 2 seeds, mnist5k, 20 steps."


def test_a_table_of_several_metrics_writes_each_in_its_own_form():
    cells = {"error": ("seed", [1e-6, 3e-6]), "share": ("seed", [0.5, 1.0])}
    values = xr.Dataset(cells).to_dataarray("metric").expand_dims(depth=[2])
    form = {"error": ".1e", "share": ".0%"}
    table = table_of("T", lambda r: values, rows=["depth"], columns="metric", form=form)(Sizes, None)
    assert table.rows == [["2", "2.0e-06 ± 1.4e-06", "75% ± 35%"]]


def test_mean_and_deviation_of_one_value_of_none_and_of_some():
    assert mean_and_std(np.array([0.5])) == "0.500"
    assert mean_and_std(np.array([0.4, 0.6])) == "0.500 ± 0.141"
    assert mean_and_std(np.array([0.4, 0.6, np.nan])) == "0.500 ± 0.141 (2 of 3)"
    assert mean_and_std(np.array([np.nan])) == "–"
    assert mean_and_std(np.array([1e200, 3e200]), ".1e") == "2.0e+200 ± 1.4e+200"
    assert mean_and_std(np.zeros(2), ".2g") == "0 ± 0"


def test_runs_without_any_value_are_not_kept():
    nan = np.nan
    values = np.array([[nan, 1], [2, nan], [nan, nan], [3, 4], [nan, nan]])
    assert measured_stretches(values) == [(0, 2), (3, 4)]
    assert measured_stretches(values[2:3]) == [(0, 1)]
