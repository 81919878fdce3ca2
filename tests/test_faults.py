"""Faults of the command line's surroundings: signals, streams that are gone, terminals and names that are not UTF-8."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from holder import Holder
from rich.console import Console

from experiments import cluster
from experiments.__main__ import main
from experiments.errors import GaveUpError, UserError
from experiments.framework import display, lock, run, stopping

COMMAND = ["run", "placement", "--preset", "smoke", "--out"]


def fail_with(monkeypatch, error):
    """Let every experiment fail so while it measures."""

    def measure(*_, **__):
        raise error

    monkeypatch.setattr(run, "measure", measure)


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (KeyboardInterrupt(), 130, "Stopped. What is done is kept; continue with: python -m experiments run placement"),
        (stopping.Stopped(signal.SIGTERM, "saved step 5"), 143, "Stopped (saved step 5). What is done is kept"),
        (stopping.Stopped(signal.SIGHUP), 129, "Stopped. What is done is kept"),
        (stopping.Stopped(signal.SIGPIPE), 141, "Stopped. What is done is kept"),
        (UserError("no"), 2, "error: no"),
        (GaveUpError("no"), 1, "error: no"),
        (OSError(28, "No space left on device"), 2, "error: cannot use standard output (No space left on device)"),
        (PermissionError(13, "Permission denied", "x"), 2, "error: cannot use x (Permission denied)"),
    ],
)
def test_every_end_has_its_status_and_one_message(tmp_path, monkeypatch, capsys, error, status, words):
    fail_with(monkeypatch, error)
    before = [signal.getsignal(number) for number in stopping.SIGNALS]
    assert main([*COMMAND, str(tmp_path / "run")]) == status
    assert [signal.getsignal(number) for number in stopping.SIGNALS] == before
    said = capsys.readouterr().err
    assert words in said
    assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "run" / ".lock").exists()


def test_an_error_of_ours_is_not_hidden(tmp_path, monkeypatch):
    fail_with(monkeypatch, OSError("a defect"))
    with pytest.raises(OSError, match="a defect"):
        main([*COMMAND, str(tmp_path / "run")])


def test_a_directory_in_use_is_one_line_with_its_holder(tmp_path, capsys):
    with Holder(tmp_path) as holder:
        assert main([*COMMAND, str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(rf"error: {tmp_path} is in use by process {holder.process.pid} on .*\n", said)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_outside_of_training_stops_at_once(number):
    with stopping.stopping_at_once(), pytest.raises(stopping.Stopped) as stop:
        signal.raise_signal(number)
    assert stop.value.status == 128 + number


@pytest.fixture
def unread():
    """A text stream into a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        yield stream


def test_a_closed_output_is_a_request_to_stop(unread):
    with stopping.Terminator() as terminator:
        stopping.say("a line", unread)
    assert terminator.received == signal.SIGPIPE
    stopping.say("another line, which vanishes", unread)


@pytest.mark.parametrize("inside", [True, False])
def test_a_closed_output_stops_rich_too(unread, inside, monkeypatch):
    monkeypatch.setattr(sys, "stdout", unread)
    console = display.terminal()
    if not inside:
        with pytest.raises(stopping.Stopped):
            console.print("a table")
        return
    with stopping.Terminator() as terminator:
        console.print("a table")
    assert terminator.received == signal.SIGPIPE


@pytest.mark.slow
def test_a_terminal_without_all_characters_is_no_error(tmp_path, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert main([*COMMAND, str(tmp_path / "r\u00e9sultats")]) == 0
    stream.flush()
    assert rb"r\xe9sultats" in stream.buffer.getvalue().replace(b"\n", b"")  # Long lines are wrapped.


@pytest.mark.slow
def test_a_name_that_is_not_utf_8_is_no_error(tmp_path):
    directory = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    assert main([*COMMAND, directory]) == 0
    assert os.path.exists(directory + "/summary.json")


def track_all(reports):
    """The lines for reports (label, done, total, seconds since the one before)."""
    now, said = [0.0], []
    track = display.lines(said.append, lambda: now[0])
    for label, done, total, seconds in reports:
        now[0] += seconds
        track(label, done, total)
    return said


def test_lines_come_at_the_start_now_and_then_and_at_the_end():
    reports = [("net", 0, 1000, 0)] + [("net", done, 1000, 1) for done in range(10, 1001, 10)]
    said = track_all(reports)
    assert said[0] == "net: 0 of 1000"
    assert said[-1].startswith("net: 1000 of 1000, 10.0/s")
    assert 4 < len(said) < 10
    assert re.fullmatch(r"net: 50 of 1000, 10.0/s, 1:35 left", said[1])


def test_compiling_does_not_count_in_the_rate():
    """The first ten steps take 100 seconds."""
    said = track_all([("net", 0, 40, 0), ("net", 10, 40, 100), ("net", 20, 40, 1), ("net", 40, 40, 2)])
    assert said[1] == "net: 10 of 40"
    assert said[-1] == "net: 40 of 40, 10.0/s"


def test_where_there_is_no_terminal_progress_is_lines():
    console = Console(file=io.StringIO(), width=200)
    with display.progress(console) as track:
        track("stage", 0, 1000)
        track("stage", 500, 1000)
        track("stage", 1000, 1000)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "stage: 0 of 1000"
    assert lines[-1].startswith("stage: 1000 of 1000")


def named_in_the_table():
    """(file, beginning of a test's name) of the tests that the table of faults names."""
    table = Path(cluster.__file__).with_name("README.md").read_text().partition("## Faults")[2]
    for line in table.splitlines():
        if line.startswith("|") and "test" in line:
            for held in line.split("|")[5].split(";"):
                file, _, names = held.replace("*", "").strip().partition(": ")
                yield from ((file, name.strip().removesuffix("...")) for name in names.split(","))


def test_every_test_in_the_table_of_faults_is_there():
    named = [(file, name) for file, name in named_in_the_table() if file.startswith("test_")]
    assert len(named) > 30
    for file, name in named:
        source = (Path(__file__).with_name(file + ".py")).read_text()
        assert re.search(rf"^def test_{name}", source, re.MULTILINE), f"{file}: {name}"


def holds(process, directory):
    """Whether the lock of `directory` names this process; it has begun then, and handles signals."""
    try:
        return json.loads((directory / lock.NAME).read_text())["pid"] == process.pid
    except (FileNotFoundError, json.JSONDecodeError):
        return False


@pytest.mark.slow  # processes of their own
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_signals_at_random_times_end_a_run_as_documented_and_it_continues(tmp_path, number):
    command = [sys.executable, "-m", "experiments", "run", "deep_conv", "--preset", "smoke", "--out"]
    random = np.random.default_rng(number)
    for _ in range(3):
        process = subprocess.Popen([*command, tmp_path / "run"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while process.poll() is None and not holds(process, tmp_path / "run"):
            time.sleep(0.05)
        time.sleep(random.uniform(0, 8))
        process.send_signal(number)
        _, said = process.communicate(timeout=300)
        if process.returncode != 0:  # it had not finished before
            assert process.returncode == (-number if number == signal.SIGKILL else 128 + number), said
            assert said.count(b"Stopped") == (number != signal.SIGKILL), said
    for name in ("run", "undisturbed"):
        subprocess.run([*command, tmp_path / name], check=True, stdout=subprocess.DEVNULL)
    rows = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("run", "undisturbed")]
    assert rows[0] == rows[1]
