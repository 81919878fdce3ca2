import json
import os
import signal
import subprocess
import sys
import time

import pytest

from experiments.__main__ import main
from experiments.framework import registry, report, run


def one_line_of_error(capsys):
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def listing(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


QUICK = ("chain",)  # which compiles least


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A directory with a finished smoke run of the experiment of that name; each is run once a worker."""
    finished = {}

    def directory(name):
        if name not in finished:
            finished[name] = tmp_path_factory.mktemp("results") / name
            assert main(["run", name, "--preset", "smoke", "--out", str(finished[name])]) == 0
        return finished[name]

    return directory


@pytest.mark.parametrize("arguments", [[], ["list"]])
def test_list_shows_every_experiment(capsys, arguments):
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in registry.EXPERIMENTS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "benefit"], f"there is no experiment 'benefit'; choose one of: {', '.join(registry.EXPERIMENTS)}"),
        (["run", "benefits", "--preset", "tpu"], "no preset 'tpu'; choose one of: smoke, cpu, full"),
        (["run", "benefits", "--seeds", "0"], "--seeds '0' is not a number of seeds: give a whole number"),
        (["run", "benefits", "--seeds", "five"], "--seeds 'five' is not a number of seeds"),
        (["run", "benefits", "--seeds=-1"], "--seeds '-1' is not a number of seeds"),
        (["run", "benefits", "--data", "mnist6k"], "there is no data set 'mnist6k'; choose one of: mnist5k"),
        (["run", "benefits", "--data", "fashion_mnist:nowhere"], "nowhere"),
        (["run", "chain", "--data", "mnist5k"], "chain uses no data: leave out --data mnist5k"),
        (["run", "placement", "--pilot", "--seeds", "1"], "a pilot needs two seeds at least"),
        (["bench", "nothing"], f"no benchmark 'nothing'; choose one of: {', '.join(registry.BENCHMARKS)}"),
    ],
)
def test_bad_input_is_one_line_and_makes_no_directory(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) != 0
    assert message in one_line_of_error(capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in registry.EXPERIMENTS]
)
def test_every_experiment_runs_and_judges_all_its_claims(smoke, name):
    directory, experiment = smoke(name), registry.load(name)
    summary = json.loads((directory / "summary.json").read_text())
    assert [verdict["claim"] for verdict in summary["verdicts"]] == [claim.sentence for claim in experiment.claims]
    assert len(summary["tables"]) == len(experiment.tables)
    assert all(table["rows"] for table in summary["tables"])
    assert len(summary["pictures"]) == len(experiment.pictures)
    assert all((directory / picture["file"]).stat().st_size > 10_000 for picture in summary["pictures"])
    assert not (directory / "checkpoints").exists()


def test_a_finished_run_is_judged_and_drawn_again_and_not_trained(smoke, capsys, monkeypatch):
    directory = smoke("chain")
    before = listing(directory)
    monkeypatch.setattr(run, "measure", None)
    assert main(["run", "chain", "--preset", "smoke", "--out", str(directory)]) == 0
    assert "The deepest plain chain" in capsys.readouterr().out
    assert listing(directory) == before


def test_a_directory_of_other_settings_is_refused_and_left_alone(smoke, capsys):
    directory = smoke("chain")
    before = listing(directory)
    assert main(["run", "chain", "--preset", "smoke", "--seeds", "3", "--out", str(directory)]) != 0
    assert "its seeds is 2, not 3" in one_line_of_error(capsys)
    assert listing(directory) == before


def test_the_report_shows_a_run(smoke):
    results = smoke("chain").parent
    assert report.write_report(results, None) == []
    assert "[chain](chain/README.md)" in (results / report.REPORT).read_text()
    text = (results / "chain" / report.REPORT).read_text()
    assert "**The deepest plain chain: one step against its expansion**" in text


def test_a_pilot_says_how_many_seeds_each_claim_needs(capsys, tmp_path):
    command = ["run", "chain", "--preset", "smoke", "--pilot", "--out", str(tmp_path / "pilot")]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "Seeds that chain needs, by a pilot of 2 seeds" in shown
    settings = json.loads((tmp_path / "pilot" / "config.json").read_text())["settings"]
    assert (settings["first_seed"], settings["seeds"]) == (20_000, 2)


def test_all_goes_on_past_a_failure_and_skips_what_is_done(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "EXPERIMENTS", ("gone", "chain"))
    command = ["run", "all", "--preset", "smoke", "--out", str(tmp_path)]
    assert main(command) == 1
    shown = capsys.readouterr().out
    assert "failed gone: ModuleNotFoundError" in shown
    assert (tmp_path / "chain-smoke" / "summary.json").exists()
    assert main(command) == 1
    assert "done already" in capsys.readouterr().out


def test_a_report_of_nothing_says_how_to_make_results(capsys, tmp_path):
    assert main(["report", "--results", str(tmp_path)]) != 0
    assert "holds no finished run" in one_line_of_error(capsys)


def test_ctrl_c_keeps_the_directory_and_says_how_to_continue(capsys, tmp_path, monkeypatch):
    def interrupted(experiment, settings, record, track):
        record.append([{"n": 1}])
        raise KeyboardInterrupt

    command = ["run", "placement", "--preset", "smoke", "--out", str(tmp_path / "run")]
    monkeypatch.setattr(run, "measure", interrupted)
    assert main(command) == 130
    assert f"continue with: python -m experiments {' '.join(command)}" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "progress.json").read_text())["finished"] is False


@pytest.mark.slow  # two whole smoke runs in processes of their own
def test_a_killed_run_continues_to_the_same_rows(tmp_path):
    command = [sys.executable, "-m", "experiments", "run", "deep_conv", "--preset", "smoke", "--out"]
    directory = tmp_path / "killed"
    process = subprocess.Popen([*command, directory], stdout=subprocess.DEVNULL)
    while not (directory / "metrics.jsonl").exists() or (directory / "metrics.jsonl").stat().st_size < 200:
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    for where in (directory, tmp_path / "undisturbed"):
        subprocess.run([*command, where], check=True, stdout=subprocess.DEVNULL)
    rows = [(where / "metrics.jsonl").read_bytes() for where in (directory, tmp_path / "undisturbed")]
    assert rows[0] == rows[1]
