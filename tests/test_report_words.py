"""What the report says and draws of single claims, Holm's correction, and the protocol of a run."""

import dataclasses
import io
import math
import re

import numpy as np
import pytest
from finished_runs import CLAIM, EVERY, FAILED, HELD, OPEN, finished_run, results, verdict
from rich.console import Console

from experiments.framework import registry
from experiments.framework.display import progress
from experiments.framework.experiment import Experiment, Grid, Search
from experiments.framework.protocol import parameter_counts, protocol_of, validation_beside_test
from experiments.framework.report import drawing, markdown, words
from experiments.framework.report.collect import read_run
from experiments.framework.report.holm import LEVEL, holm, survivors
from experiments.framework.results import final
from experiments.framework.show import show_verdicts
from experiments.framework.verdict import IN_PART, INCONCLUSIVE, NOT_SUPPORTED, SUPPORTED, Cell, judge

every_verdict = pytest.mark.parametrize("found", EVERY.values(), ids=EVERY)


def test_holms_correction_is_that_of_the_textbook():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_holms_correction_never_favours_and_keeps_the_order():
    p_values = np.random.default_rng(0).uniform(size=40)
    adjusted = np.array(holm(p_values.tolist()))
    assert np.all(adjusted >= p_values)
    assert np.all(np.diff(adjusted[np.argsort(p_values)]) >= 0)


def test_a_claim_alone_survives_exactly_where_it_holds():
    for effects in (HELD, FAILED, OPEN, [0.5, 0.7, 0.6], [0.45, 0.62, 0.7, 0.9]):
        found = verdict(effects)
        assert survivors([found]) == [found.outcome == SUPPORTED]


def test_what_survives_of_many_claims_and_what_is_not_tested():
    held = EVERY["above, held"]
    weak = held._replace(p_value=0.9 * LEVEL)
    alone = [held, EVERY["exact"], EVERY["one seed"], EVERY["above, failed"]]
    assert survivors([*alone, weak, weak]) == [True, None, None, False, False, False]
    assert "2 are exact, or have no interval" in words.together_in_words([*alone, weak, weak])


@every_verdict
def test_a_drawing_is_well_formed_and_stays_inside(found):
    text = str(drawing.drawn(found))
    numbers = re.findall(r'\b(?:x|x1|x2|cx)="([^"]+)"', text)
    assert all(0 <= float(number) <= drawing.WIDTH for number in numbers)
    assert text.count("<svg") == text.count("</svg>") == 1
    assert words.SHORT[found.outcome] in text
    assert ('class="limit"' in text) or found.threshold == 0


@every_verdict
def test_a_claim_holds_to_the_right_of_its_threshold(found):
    if not math.isfinite(found.effect) or found.outcome not in (SUPPORTED, NOT_SUPPORTED):
        return
    scale = drawing.scale_of(found)
    place, limits = scale.x(found.effect), [scale.x(limit) for limit in drawing.limits_of(found)]
    held = limits[0] <= place <= limits[-1] if found.kind == "equal" else place >= limits[0]
    assert held == (found.outcome == SUPPORTED)


@every_verdict
def test_how_far_beyond_its_threshold_a_claim_lies_has_the_sign_of_its_verdict(found):
    beyond = drawing.beyond(found)
    assert not math.isnan(beyond)
    if math.isfinite(found.effect) and math.isfinite(found.low) and found.kind != "exact":
        assert {SUPPORTED: beyond >= 1, IN_PART: beyond >= 1, NOT_SUPPORTED: beyond <= -1}.get(
            found.outcome, abs(beyond) <= 1
        )


def test_each_outcome_has_a_shape_of_its_own():
    shapes = {re.sub(r'class="[^"]+"', "", drawing.mark(outcome, 7, 7)) for outcome in words.OUTCOMES}
    assert len(shapes) == len(words.OUTCOMES) == len({SUPPORTED, IN_PART, NOT_SUPPORTED, INCONCLUSIVE})


def test_cells_that_do_not_hold_are_named():
    found = EVERY["above, in part"]
    assert words.failing_cells(found) == ["rate 1 (-0.0742 to 0.174)"]
    nothing = found._replace(cells=[Cell({"rate": 1.0}, math.nan, math.nan, math.nan, INCONCLUSIVE)])
    assert words.failing_cells(nothing) == ["rate 1 (no interval)"]


def test_parameters_are_counted_by_the_axes_on_which_they_depend():
    experiment = registry.load("benefits")
    assert experiment.grid is not None
    counts = parameter_counts(experiment.grid, experiment.settings["smoke"])
    plain = 784 * 100 + 2 * 100 * 100 + 100 * 10 + 310
    expected = [({"arm": "plain"}, plain), ({"arm": "batch norm"}, plain + 300)]  # scale and bias for a bias
    assert [(entry["where"], entry["value"]) for entry in counts] == expected


def test_the_protocol_has_what_a_search_tried_and_chose():
    grid = registry.load("deep_conv").grid
    searching = Grid(grid.task, 64, {"arm": ("plain",)}, {"std": (1.0,)}, search=Search("rate", (0.1, 1.0), on="loss"))
    experiment = Experiment(title="", question="", source="", settings={}, claims=[], grid=searching)
    rows = [
        {"stage": "search 0: plain", "runs": [{"rate": 0.1}, {"rate": 1.0}]},
        {"stage": "search 1: plain", "runs": [{"rate": 10.0}]},
        {"stage": "plain", "runs": [{"std": 1.0, "rate": 1.0, "seed": 0}, {"std": 1.0, "rate": 1.0, "seed": 1}]},
    ]
    found = protocol_of(experiment, registry.load("deep_conv").settings["smoke"], rows, results(HELD))
    assert found["search"] == {"axis": "rate", "values": [0.1, 1.0, 10.0], "seeds": 2, "on": "loss"}
    assert found["chosen"] == [{"where": {"arm": "plain", "std": 1.0}, "value": 1.0}]
    assert found["validation"] is None


def test_validation_stands_beside_test_accuracy():
    grid = Grid(lambda settings: None, 1, {"arm": ("plain", "batch norm")})
    both = results([[[0.5, 0.8]], [[0.6, 0.9]]], ("arm", "seed", "step")).assign_coords(arm=["plain", "batch norm"])
    found = both.rename(v="test_accuracy").assign(validation_accuracy=both.v - 0.1)
    table = validation_beside_test(grid, found)
    assert table is not None
    assert final(found.test_accuracy).values.tolist() == [[0.8], [0.9]]
    assert (table.columns, table.names) == (["arm", "validation", "test"], 1)
    assert table.rows == [["plain", "0.700", "0.800"], ["batch norm", "0.800", "0.900"]]


@pytest.mark.parametrize(("effects", "outcome"), [([1.0, 1.01], "SUPPORTED"), ([0.0, 0.01], "NOT SUPPORTED")])
def test_a_verdict_on_the_terminal(effects, outcome):
    console = Console(file=io.StringIO(), width=200)
    show_verdicts(console, [judge(CLAIM, results(effects))])
    assert f"\n{outcome} Claim." in console.file.getvalue()
    assert "  The effect = " in console.file.getvalue()
    assert "Criterion: supported if the 95% interval of the mean over seeds is above 0.5." in console.file.getvalue()


@pytest.mark.parametrize("citation", ["A work. ICML 2015", "A work. ICML 2015.", ""])
def test_a_source_ends_with_one_full_stop(tmp_path, citation):
    run = read_run(finished_run(tmp_path, [verdict(HELD)]))
    run = dataclasses.replace(run, experiment=dataclasses.replace(run.experiment, citation=citation))
    cited = words.citation_of(run)
    assert cited == f"{citation or run.summary['source']}".rstrip(".") + "."
    assert f"Source: {cited}\n" in markdown.page_of_run(run)


@every_verdict
def test_no_cell_of_a_table_begins_with_two_spaces(tmp_path, found):
    assert "|  " not in markdown.page_of_run(read_run(finished_run(tmp_path, [found])))


def test_progress_begins_anew_where_a_run_continues():
    console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system=None)
    with progress(console) as track:
        track("stage", 0, 1)
        track("stage", 500, 1000)
        track("stage", 1000, 1000)
    assert "1000/1000" in console.file.getvalue()
