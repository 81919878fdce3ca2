import io
import shutil

import pytest
from rich.console import Console
from test_experiments_verdict import results

from experiments.errors import UserError
from experiments.framework import registry, report
from experiments.framework.claim import Claim, fingerprint
from experiments.framework.display import progress
from experiments.framework.experiment import Drawn, Experiment
from experiments.framework.record import write_json
from experiments.framework.show import show_verdicts
from experiments.framework.tables import Table, to_markdown
from experiments.framework.verdict import judge

TABLE = Table("Accuracy", ["arm", "ours"], [["plain", "0.1"]], "n = 2")
CLAIM = Claim("Claim.", lambda r: r.v, measures="the effect", unit="points", above=0.5)
ABOUT = Experiment(title="T.", question="Why?", source="A paper", settings={}, claims=[CLAIM], differs="Fewer seeds.")


def finished_run(directory, effects, axes=("seed",), *, fixed=True, sha256=None):
    directory = directory / "benefits"
    directory.mkdir()
    origin = {"commit": "0123456789abcdef", "hardware": "a machine", "versions": {"jax": "0.10.2"}}
    today = fingerprint(registry.load("benefits").claims)
    claims = {"sha256": sha256 or today, "fixed_before_the_run": fixed}
    config = {
        "experiment": "benefits",
        "preset": "cpu",
        "settings": {"seeds": 2},
        "provenance": origin,
        "claims": claims,
    }
    write_json(directory / "config.json", config)
    found = judge(CLAIM, results(effects, axes))
    report.write_summary(directory, ABOUT, [found], [TABLE], [Drawn("a.png", None, "A picture.")])
    return found


def text_of(directory):
    return report.write_report(directory, None).read_text()


def test_a_table_in_markdown():
    assert to_markdown(TABLE) == "**Accuracy**\n\n| arm | ours |\n| --- | ---: |\n| plain | 0.1 |\n\nn = 2"


def test_the_report_has_question_verdict_table_picture_criterion_and_origin(tmp_path):
    finished_run(tmp_path, [1.0, 1.1, 1.05])
    text = text_of(tmp_path)
    for part in (
        "Why? Source: A paper.",
        "| Claim. | **supported** |  Effect 1.05 points",
        to_markdown(TABLE),
        "![A picture.](benefits/a.png)",
        f"- Claim. {CLAIM.criterion}",
        "What differs from the source: Fewer seeds.",
        "The claims were fixed before the run",
        "at commit `0123456789ab` on a machine",
    ):
        assert part in text


def test_the_report_has_the_effect_of_every_cell(tmp_path):
    finished_run(tmp_path, [[1.0, 1.1, 1.05], [0.0, 0.1, 0.05]], ("rate", "seed"))
    text = text_of(tmp_path)
    assert "in 1 of 2 cells" in text
    assert "| Claim. | rate 1 | 0.05 (-0.0742 to 0.174) | not supported |" in text


def test_what_was_read_back_is_what_was_judged(tmp_path):
    found = finished_run(tmp_path, [[1.0, 1.1, 1.05], [0.0, 0.1, 0.05]], ("rate", "seed"))
    (again,) = report.read_verdicts(tmp_path / "benefits")
    assert again.cells[0].where == found.cells[0].where
    assert again.effect == pytest.approx(found.effect)
    assert (again.needed, again.outcome) == (found.needed, found.outcome)


def test_claims_that_were_not_in_a_commit_are_said_to_be_so(tmp_path):
    finished_run(tmp_path, [1.0, 1.1], fixed=False)
    assert "**Not fixed before the run**" in text_of(tmp_path)


def test_claims_that_changed_since_are_said_to_have(tmp_path):
    finished_run(tmp_path, [1.0, 1.1], sha256="0" * 64)
    assert "**The claims have changed since**" in text_of(tmp_path)


def test_a_report_of_one_seed_says_that_there_is_no_interval(tmp_path):
    finished_run(tmp_path, [1.0])
    assert "Effect 1 points, no interval, n = 1" in text_of(tmp_path)


def test_a_second_run_of_an_experiment_has_a_section_of_its_own(tmp_path):
    finished_run(tmp_path, [1.0, 1.1, 1.05])
    shutil.copytree(tmp_path / "benefits", tmp_path / "benefits_again")
    text = text_of(tmp_path)
    assert text.index("## benefits\n") < text.index("## benefits_again\n")


def test_a_run_of_an_unknown_experiment_is_refused(tmp_path):
    finished_run(tmp_path, [1.0])
    write_json(tmp_path / "benefits" / "config.json", {"experiment": "gone"})
    with pytest.raises(UserError, match="'gone', which is no experiment"):
        report.write_report(tmp_path, None)


def test_the_report_is_the_same_when_built_again(tmp_path):
    finished_run(tmp_path, [1.0, 1.1, 1.05])
    first = report.write_report(tmp_path, None).read_bytes()
    assert report.write_report(tmp_path, None).read_bytes() == first


@pytest.mark.parametrize(("effects", "outcome"), [([1.0, 1.01], "SUPPORTED"), ([0.0, 0.01], "NOT SUPPORTED")])
def test_a_verdict_on_the_terminal(effects, outcome):
    console = Console(file=io.StringIO(), width=200)
    show_verdicts(console, [judge(CLAIM, results(effects))])
    assert f"\n{outcome} Claim." in console.file.getvalue()
    assert CLAIM.criterion in console.file.getvalue()


def test_progress_begins_anew_where_a_run_continues():
    console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system=None)
    with progress(console) as track:
        track("stage", 0, 1)
        track("stage", 500, 1000)
        track("stage", 1000, 1000)
    assert "1000/1000" in console.file.getvalue()
