import io
import shutil

import numpy as np
import pytest
from rich.console import Console

from experiments.errors import UserError
from experiments.framework import display, report
from experiments.framework.plots import Picture
from experiments.framework.record import write_json
from experiments.framework.tables import Table, spread, to_markdown
from experiments.framework.verdict import effect_in_words, verdict

TABLE = Table("Accuracy", ["arm", "ours"], [["plain", "0.1"]], "n = 2")
WORDS = {"unit": "points", "criterion": "c.", "sentence": "s."}


def finished_run(results, effects):
    directory = results / "benefits"
    directory.mkdir()
    origin = {"commit": "0123456789abcdef", "hardware": "a machine", "versions": {"jax": "0.10.2"}}
    config = {"experiment": "benefits", "preset": "cpu", "settings": {"seeds": 2}, "provenance": origin}
    write_json(directory / "config.json", config)
    found = verdict("Claim.", effects, threshold=0.5, **WORDS)
    report.write_summary(directory, [found], [TABLE], [Picture("a.png", "A picture.")])


def test_a_table_in_markdown():
    assert to_markdown(TABLE) == "**Accuracy**\n\n| arm | ours |\n| --- | ---: |\n| plain | 0.1 |\n\nn = 2"


def test_the_report_has_verdict_table_picture_criterion_and_origin(tmp_path):
    finished_run(tmp_path, [1.0, 1.1, 1.05])
    text = report.write_report(tmp_path).read_text()
    for part in ("| Claim. | **supported** | s. Effect: 1.05 points", to_markdown(TABLE), "- Claim. c."):
        assert part in text
    assert "![A picture.](benefits/a.png)" in text
    assert "at commit `0123456789ab` on a machine" in text


def test_a_report_of_one_seed_says_that_there_is_no_interval(tmp_path):
    finished_run(tmp_path, [1.0])
    assert "Effect: 1 points, no interval, n = 1" in report.write_report(tmp_path).read_text()


def test_a_second_run_of_an_experiment_has_a_section_of_its_own(tmp_path):
    finished_run(tmp_path, [1.0, 1.1, 1.05])
    shutil.copytree(tmp_path / "benefits", tmp_path / "benefits_again")
    text = report.write_report(tmp_path).read_text()
    assert text.index("## benefits\n") < text.index("## benefits_again\n")


def test_a_run_of_an_unknown_experiment_is_refused(tmp_path):
    finished_run(tmp_path, [1.0])
    write_json(tmp_path / "benefits" / "config.json", {"experiment": "gone"})
    with pytest.raises(UserError, match="'gone', which is no experiment"):
        report.write_report(tmp_path)


def test_the_report_is_the_same_when_built_again(tmp_path):
    finished_run(tmp_path, [1.0, 1.1, 1.05])
    first = report.write_report(tmp_path).read_bytes()
    assert report.write_report(tmp_path).read_bytes() == first


@pytest.mark.parametrize(("effects", "outcome"), [([1.0, 1.01], "SUPPORTED"), ([0.0, 0.01], "NOT SUPPORTED")])
def test_a_verdict_on_the_terminal(effects, outcome):
    console = Console(file=io.StringIO(), width=200)
    display.show_verdicts(console, [verdict("Claim.", effects, threshold=0.5, **WORDS)])
    assert f"\n{outcome} Claim." in console.file.getvalue()


def test_progress_begins_anew_where_a_run_continues():
    console = Console(file=io.StringIO(), width=200)
    with display.progress(console) as track:
        track("stage", 0, 1)
        track("stage", 500, 1000)
        track("stage", 1000, 1000)
    assert "1000/1000" in console.file.getvalue()


def test_spread_of_one_seed_has_no_deviation():

    assert spread(np.array([0.5])) == "0.500"
    assert spread(np.array([0.4, 0.6])) == "0.500 ± 0.141"


def test_an_effect_without_interval_says_so():
    assert "no interval" in effect_in_words(verdict("", [1.0], threshold=0.0, **WORDS))
