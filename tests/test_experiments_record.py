import contextlib
import errno
import json
import math
import os
import shutil

import jax
import numpy as np
import pytest

from experiments.errors import UserError
from experiments.framework import lock
from experiments.framework.record import open_record

CONFIG = {
    "experiment": "e",
    "preset": "smoke",
    "settings": {"seeds": 2, "rates": (1, 2)},
    "data": {"name": "d", "sha256": "a" * 64},
    "claims": {"sha256": "1"},
}


def contents(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_rows_come_back_as_they_were_appended(tmp_path):
    record = open_record(tmp_path / "run", CONFIG)
    record.append([{"a": 1, "b": [0.5, 0.25]}, {"c": "x", "d": np.float32(2)}])
    assert record.rows() == [{"a": 1, "b": [0.5, 0.25]}, {"c": "x", "d": 2.0}]


def test_a_number_that_is_not_finite_is_null_in_the_file_and_nan_again_on_reading(tmp_path):
    record = open_record(tmp_path / "run", CONFIG)
    record.append([{"loss": np.array([np.inf, np.nan, 1.0])}])
    assert record.metrics_path.read_text() == '{"loss": [null, null, 1.0]}\n'
    loss = record.rows()[0]["loss"]
    assert math.isnan(loss[0])
    assert loss[2] == 1.0


def test_rows_after_the_last_certain_one_are_cut_off_on_reopening(tmp_path):
    record = open_record(tmp_path / "run", CONFIG)
    record.finish("one", [{"n": 1}])
    record.append([{"n": 2}])
    reopened = open_record(tmp_path / "run", CONFIG)
    assert reopened.rows() == [{"n": 1}]
    assert reopened.is_done("one")


def test_a_half_written_row_is_cut_off_on_reopening(tmp_path):
    record = open_record(tmp_path / "run", CONFIG)
    record.finish("one", [{"n": 1}])
    with record.metrics_path.open("a") as file:
        file.write('{"n": ')
    assert open_record(tmp_path / "run", CONFIG).rows() == [{"n": 1}]


def altered(**changes):
    return {**CONFIG, **changes}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (altered(settings={"seeds": 3, "rates": (1, 2)}), "its seeds is 2, not 3"),
        (altered(settings={"seeds": 2}), r"its rates is \[1, 2\], not None"),
        (altered(experiment="f"), "its experiment is 'e', not 'f'"),
        (altered(preset="cpu"), "its preset is 'smoke', not 'cpu'"),
        (
            altered(data={"name": "d", "sha256": "b" * 64}),
            "the data have been replaced since it began",
        ),
    ],
)
@pytest.mark.parametrize("finished", [False, True])
def test_a_directory_with_another_configuration_is_refused_and_untouched(tmp_path, config, words, finished):
    record = open_record(tmp_path / "run", CONFIG)
    record.finish("one", [{"n": 1}])
    if finished:
        record.close()
    lock.release_all()
    before = contents(tmp_path / "run")
    with pytest.raises(UserError, match=f"holds another run .*{words}.*: choose another --out"):
        open_record(tmp_path / "run", config)
    assert contents(tmp_path / "run") == before


def test_other_claims_do_not_continue_a_run_but_may_be_judged_once_it_is_finished(tmp_path):
    record, other = open_record(tmp_path / "run", CONFIG), altered(claims={"sha256": "2"})
    record.finish("one", [{"n": 1}])
    with pytest.raises(UserError, match=r"began with other claims .* 1, now 2\): claims are fixed before a run"):
        open_record(tmp_path / "run", other)
    record.close()
    assert open_record(tmp_path / "run", other).config["claims"] == {"sha256": "1"}


def test_a_directory_that_holds_no_run_is_refused_and_untouched(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="holds no run"):
        open_record(tmp_path, CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path):
    (tmp_path / "run").write_text("precious")
    with pytest.raises(UserError, match="holds no run"):
        open_record(tmp_path / "run", CONFIG)
    assert (tmp_path / "run").read_text() == "precious"


def test_a_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot use .*Not a directory.*: choose another --out"):
        open_record(tmp_path / "file" / "run", CONFIG)


@pytest.mark.parametrize("name", ["config.json", "progress.json", "metrics.jsonl", "checkpoints"])
def test_a_link_out_of_the_directory_is_refused(tmp_path, name):
    record = open_record(tmp_path / "run", CONFIG)
    record.finish("one", [{"n": 1}])
    (tmp_path / "run" / name).rename(tmp_path / name)
    (tmp_path / "run" / name).symlink_to(tmp_path / name)
    with pytest.raises(UserError, match=f"{name} leads out of"):
        open_record(tmp_path / "run", CONFIG)


def test_a_record_of_someone_else_removes_nothing_outside(tmp_path):
    """Whatever progress.json says: no path is read from it."""
    record = open_record(tmp_path / "run", CONFIG)
    record.finish("one", [{"n": 1}])
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("precious")
    path = tmp_path / "run" / "progress.json"
    held = json.loads(path.read_text())
    for harm in ({"checkpoint": {"file": str(precious)}}, {"number": "../../precious"}, {"position": str(precious)}):
        path.write_text(json.dumps({**held, **harm}))
        again = open_record(tmp_path / "run", CONFIG, [].append)
        again.finish("two", [{"n": 2}])
        again.commit()
    again.close()
    assert (precious / "thesis.tex").read_text() == "precious"


def two_stages(directory):
    """A run with two finished stages, and rows of a third that are not yet certain."""
    record = open_record(directory, CONFIG)
    record.finish("one", [{"n": 1}])
    record.finish("two", [{"n": 2}])
    record.append([{"n": 3}])
    return record


def cut(path):
    path.write_bytes(path.read_bytes()[:5])


def flip(path):
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip, lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("names", [["metrics.jsonl"], ["progress.json"], ["metrics.jsonl", "progress.json"]])
def test_lost_rows_and_progress_come_back_from_the_checkpoint_and_that_is_said(tmp_path, names, damage):
    two_stages(tmp_path / "run")
    for name in names:
        damage(tmp_path / "run" / name)
    said = []
    reopened = open_record(tmp_path / "run", CONFIG, said.append)
    assert reopened.rows() == [{"n": 1}, {"n": 2}]
    assert reopened.is_done("one")
    assert reopened.is_done("two")
    for name in names:
        assert any(name in line for line in said), said
    said.clear()
    assert open_record(tmp_path / "run", CONFIG, said.append).rows() == [{"n": 1}, {"n": 2}]
    assert said == []


@pytest.mark.parametrize("damage", [cut, flip, lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("name", ["metrics.jsonl", "progress.json"])
@pytest.mark.parametrize("finished", [False, True])
def test_what_cannot_be_mended_is_refused_and_nothing_is_cut(tmp_path, name, damage, finished):
    record = two_stages(tmp_path / "run")
    if finished:
        record.close()
    shutil.rmtree(tmp_path / "run" / "checkpoints", ignore_errors=True)
    damage(tmp_path / "run" / name)
    lock.release_all()
    before = contents(tmp_path / "run")
    with pytest.raises(UserError, match="put a copy of it in its place, or choose another --out") as caught:
        open_record(tmp_path / "run", CONFIG)
    assert name in str(caught.value)
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("newest_is_whole", [True, False])
def test_no_finished_stage_is_thrown_away_for_a_checkpoint(tmp_path, newest_is_whole):
    two_stages(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    if newest_is_whole:
        assert open_record(tmp_path / "run", CONFIG, [].append).is_done("two")
        return
    flip(tmp_path / "run" / "checkpoints" / "2" / "metrics.jsonl")
    with pytest.raises(UserError, match="no checkpoint has its rows"):
        open_record(tmp_path / "run", CONFIG, [].append)


def with_arrays(directory):
    """A finished run whose result is the arrays of its newest checkpoint."""
    record = open_record(directory, CONFIG)
    for step in (10, 20, 30):
        record.append([{"step": step}])
        record.commit({"w": np.full(3, step, np.float32)}, step, position={"step": step}, finished=step == 30)


@pytest.mark.parametrize("damaged", [0, 1, 2])
def test_of_a_state_the_newest_whole_checkpoint_is_used_else_the_run_starts_over(tmp_path, damaged):
    with_arrays(tmp_path / "run")
    for number in (30, 20)[:damaged]:
        seal = tmp_path / "run" / "checkpoints" / str(number) / "seal.json"
        seal.write_text(seal.read_text()[:-5])
    said = []
    record = open_record(tmp_path / "run", CONFIG, said.append)
    assert record.rows() == [{"step": step} for step in (10, 20, 30)][: (3, 2, 0)[damaged]]
    assert record.finished == (damaged == 0)
    assert sum("is damaged" in line for line in said) == damaged
    assert (
        said[damaged:]
        == [
            [],
            ["continuing from step 20, not from step 30"],
            ["continuing from the start, not from step 30"],
        ][damaged]
    )
    if damaged < 2:
        like = {"w": jax.ShapeDtypeStruct((3,), np.dtype(np.float32))}
        np.testing.assert_array_equal(record.restore(like)["w"], (30, 20)[damaged])
    else:
        assert not record.place.arrays


def test_a_finished_run_of_an_earlier_version_is_shown(tmp_path):
    open_record(tmp_path / "run", CONFIG).append([{"n": 1}])
    old = {"bytes": 9, "done": ["one"], "checkpoint": None, "finished": True}
    (tmp_path / "run" / "progress.json").write_text(json.dumps(old))
    record = open_record(tmp_path / "run", CONFIG)
    assert record.finished
    assert record.rows() == [{"n": 1}]


def test_a_damaged_configuration_is_refused(tmp_path):
    open_record(tmp_path / "run", CONFIG)
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json is not readable JSON: put a copy of it in its place"):
        open_record(tmp_path / "run", CONFIG)


class DiskIsFull:
    """Lets so many writes pass and fails the next one, as a full disk does, or with another error."""

    def __init__(self, writes, number=errno.ENOSPC):
        self.left, self.number = writes, number

    def __call__(self, file):
        self.left -= 1
        if self.left < 0:
            raise OSError(self.number, os.strerror(self.number))


def measure(directory):
    """A run of two stages, of which the second has a checkpoint with arrays."""
    record = open_record(directory, CONFIG)
    if not record.is_done("one"):
        record.finish("one", [{"n": 1}])
    if record.place.position is None:
        record.append([{"n": 2}])
        record.commit({"w": np.arange(3.0)}, position={"stage": "two"})
    w = record.restore({"w": jax.ShapeDtypeStruct((3,), np.dtype(float))})["w"]
    record.append([{"n": 3, "w": w}])
    record.finish("two")
    record.close()


@pytest.mark.parametrize("writes", range(12))
def test_a_full_disk_is_one_line_and_the_same_command_continues(tmp_path, monkeypatch, writes):
    with jax.enable_x64(True):
        measure(tmp_path / "undisturbed")
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", disk := DiskIsFull(writes))
            with pytest.raises(UserError, match=r"cannot write .*\(No space left on device\): make room") as caught:
                measure(tmp_path / "run")
        assert disk.left == -1
        assert "\n" not in str(caught.value)
        lock.release_all()
        measure(tmp_path / "run")
    for name in ("metrics.jsonl", "progress.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("writes", [0, 1, 2, 3, 4])
def test_what_cannot_be_written_is_one_line(tmp_path, monkeypatch, number, writes):
    monkeypatch.setattr(os, "fsync", DiskIsFull(writes, number))
    advice = "make room" if number == errno.EDQUOT else "choose another --out"
    with pytest.raises(UserError, match=rf"cannot write .*\({os.strerror(number)}\): {advice}"):
        open_record(tmp_path / "run", CONFIG).finish("one", [{"n": 1}])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("config.json", r"cannot read .*config.json \(Is a directory\): make it readable"),
        ("progress.json", r"cannot write .*progress.json \(Is a directory\)"),
        ("checkpoints", r"cannot write .*2 \(File exists\)"),
        ("metrics.jsonl", ""),
    ],
)
def test_what_cannot_be_read_is_one_line_or_mended(tmp_path, name, words):
    """Here since there is something else in its place."""
    open_record(tmp_path / "run", CONFIG).finish("one", [{"n": 1}])
    path = tmp_path / "run" / name
    path.rename(tmp_path / name)
    path.mkdir() if path.suffix else path.touch()
    if not words:
        assert open_record(tmp_path / "run", CONFIG, [].append).rows() == [{"n": 1}]
        return
    with pytest.raises(UserError, match=words):
        open_record(tmp_path / "run", CONFIG, [].append).finish("two", [{"n": 2}])


def test_a_full_disk_at_the_start_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", DiskIsFull(0))
    with pytest.raises(UserError, match="No space left"):
        open_record(tmp_path / "run", CONFIG)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_start_left_is_no_other_run(tmp_path):
    (tmp_path / "config.json.new").write_text('{"exp')
    (tmp_path / ".lock").touch()
    assert open_record(tmp_path, CONFIG).rows() == []


def test_a_killed_commit_leaves_the_one_before_or_the_one_after(tmp_path, monkeypatch):
    """Killed at any of its writes, here by an exception that nothing handles."""

    class KilledError(Exception):
        pass

    for writes in range(5):
        left = [writes]

        def fsync(file, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise KilledError

        directory = tmp_path / str(writes)
        open_record(directory, CONFIG).finish("one", [{"n": 1}])
        record = open_record(directory, CONFIG)
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", fsync)
            with contextlib.suppress(KilledError):
                record.finish("two", [{"n": 2}])
        said = []
        again = open_record(directory, CONFIG, said.append)
        assert again.rows() == ([{"n": 1}, {"n": 2}] if again.is_done("two") else [{"n": 1}])
        assert again.is_done("one")
        again.finish("three", [{"n": 3}])
        assert open_record(directory, CONFIG, pytest.fail).is_done("three")


def test_continuing_from_another_commit_is_noted(tmp_path):
    open_record(tmp_path / "run", {**CONFIG, "provenance": {"commit": "a"}})
    open_record(tmp_path / "run", {**CONFIG, "provenance": {"commit": "b"}})
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["provenance"] == {"commit": "a"}
    assert config["continued"] == [{"commit": "b"}]
