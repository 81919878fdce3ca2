import json
import os
import signal
import subprocess
import sys
import time

import pytest

from experiments import benefits, deep_conv
from experiments.__main__ import main
from experiments.framework import registry, report


def one_line_of_error(capsys):
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def listing(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("arguments", [[], ["list"]])
def test_list_shows_every_experiment(capsys, arguments):
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in registry.EXPERIMENTS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "benefit"], "there is no experiment 'benefit'; choose one of: benefits, deep_conv"),
        (["run", "benefits", "--preset", "tpu"], "no preset 'tpu'; choose one of: smoke, cpu, full"),
        (["run", "benefits", "--seeds", "0"], "--seeds '0' is not a number of seeds: give a whole number"),
        (["run", "benefits", "--seeds", "five"], "--seeds 'five' is not a number of seeds"),
        (["run", "benefits", "--seeds=-1"], "--seeds '-1' is not a number of seeds"),
        (["run", "benefits", "--data", "mnist6k"], "there is no data set 'mnist6k'; choose one of: mnist5k"),
        (["run", "benefits", "--data", "fashion_mnist:nowhere"], "nowhere has no file train-images-idx3-ubyte"),
        (
            ["bench", "nothing"],
            "no benchmark 'nothing'; choose one of: operation, steps, accuracy, memory, grid",
        ),
    ],
)
def test_bad_input_is_one_line_and_makes_no_directory(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) != 0
    assert message in one_line_of_error(capsys)
    assert list(tmp_path.iterdir()) == []


def test_an_experiment_without_data_refuses_the_option(capsys, monkeypatch):
    monkeypatch.setattr(deep_conv, "PRESETS", {"cpu": {"seeds": 1}})
    assert main(["run", "deep_conv", "--data", "mnist5k"]) != 0
    assert "deep_conv uses no data" in one_line_of_error(capsys)


def test_benefits_runs_judges_and_draws_and_only_draws_the_second_time(capsys, tmp_path, monkeypatch):
    command = ["run", "benefits", "--preset", "smoke", "--seeds", "2", "--out", str(tmp_path / "run")]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "Final test accuracy" in shown
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert len(summary["verdicts"]) == 7
    assert len(summary["tables"][0]["rows"]) == 12
    assert (tmp_path / "run" / "accuracy.png").stat().st_size > 10_000
    assert not (tmp_path / "run" / "checkpoints").exists()

    before = listing(tmp_path / "run")
    monkeypatch.setattr(benefits, "run", None)
    assert main(command) == 0
    assert "Final test accuracy" in capsys.readouterr().out
    assert listing(tmp_path / "run") == before

    assert main([*command, "--seeds", "3"]) != 0
    assert "its seeds is 2, not 3" in one_line_of_error(capsys)
    assert listing(tmp_path / "run") == before


def test_deep_conv_runs_and_the_report_shows_it(capsys, tmp_path):
    assert main(["run", "deep_conv", "--preset", "smoke", "--out", str(tmp_path / "deep_conv")]) == 0
    text = report.write_report(tmp_path).read_text()
    assert "## deep_conv" in text
    assert "| batch norm |" in text
    assert "![" in text


def test_a_report_of_nothing_says_how_to_make_results(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report.write_report, "__defaults__", (tmp_path,))
    assert main(["report"]) != 0
    assert "holds no finished run" in one_line_of_error(capsys)


def test_ctrl_c_keeps_the_directory_and_says_how_to_continue(capsys, tmp_path, monkeypatch):
    finished = benefits.run

    def interrupted(settings, record, track):
        record.append([{"n": 1}])
        raise KeyboardInterrupt

    command = ["run", "benefits", "--preset", "smoke", "--out", str(tmp_path / "run")]
    monkeypatch.setattr(benefits, "run", interrupted)
    assert main(command) == 130
    assert f"continue with: python -m experiments {' '.join(command)}" in capsys.readouterr().err
    monkeypatch.setattr(benefits, "run", finished)
    assert json.loads((tmp_path / "run" / "progress.json").read_text())["finished"] is False


@pytest.mark.parametrize("name", ["benefits", "deep_conv"])
def test_an_experiment_has_what_the_registry_asks_for(name):
    module = registry.load(registry.EXPERIMENTS, name)
    assert {"smoke", "cpu", "full"} <= set(module.PRESETS)
    assert all("seeds" in settings for settings in module.PRESETS.values())
    assert all(callable(getattr(module, part)) for part in ("run", "judge", "tabulate", "draw"))
    assert module.SOURCE


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
