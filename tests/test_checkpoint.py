import json
import os
import shutil
import types

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from experiments.errors import UserError
from experiments.framework import checkpoint
from jaxbn import training

STATE = {"kernel": np.arange(12, dtype=np.float32).reshape(3, 4), "count": np.int32(7)}


def placed(devices, state=STATE):
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    return training.replicate(state, mesh)


def save(directory, number, state):
    """A checkpoint in `directory`, a run's, with one row for each step so far."""
    rows = directory / "metrics.jsonl"
    rows.write_text("".join(f'{{"step": {step}}}\n' for step in range(number)))
    checkpoint.save_state(directory / "checkpoints", number, state)
    checkpoint.seal(directory / "checkpoints", number, {"step": number}, rows, state)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run's directory with checkpoints 10 and 20."""
    directory = tmp_path_factory.mktemp("saved")
    for number in (10, 20):
        save(directory, number, placed(8, {**STATE, "count": np.int32(number)}))
    return directory


@pytest.fixture
def two(saved, tmp_path):
    """A copy of the checkpoints 10 and 20."""
    shutil.copytree(saved / "checkpoints", tmp_path / "run" / "checkpoints")
    return tmp_path / "run" / "checkpoints"


def damages(directory):
    return {found.number: found.damage for found in checkpoint.survey(directory)}


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_a_state_comes_back_on_any_number_of_devices(saved, devices):
    like = placed(devices, jax.tree.map(np.zeros_like, STATE))
    restored = checkpoint.restore(saved / "checkpoints", 20, like)
    np.testing.assert_array_equal(restored["kernel"], STATE["kernel"])
    assert restored["count"] == 20
    assert restored["kernel"].dtype == STATE["kernel"].dtype
    assert restored["kernel"].sharding == like["kernel"].sharding


def test_a_state_comes_back_by_shapes_alone(saved):
    restored = checkpoint.restore(saved / "checkpoints", 20, jax.eval_shape(lambda: STATE))
    np.testing.assert_array_equal(restored["kernel"], STATE["kernel"])


@pytest.mark.parametrize(
    "like", [{"kernel": np.zeros((4, 4), np.float32), "count": np.int32(0)}, {"kernel": np.zeros((3, 4), np.float32)}]
)
def test_a_state_of_other_shapes_is_refused(saved, like):
    with pytest.raises(UserError, match="20 does not fit"):
        checkpoint.restore(saved / "checkpoints", 20, jax.tree.map(jax.numpy.asarray, like))


def test_a_note_comes_back_and_the_newest_comes_first(two):
    assert [(found.number, found.note, found.damage) for found in checkpoint.survey(two)] == [
        (20, {"step": 20}, ""),
        (10, {"step": 10}, ""),
    ]


def test_a_checkpoint_has_the_rows_so_far(two):
    assert len((two / "10" / "metrics.jsonl").read_text().splitlines()) == 10


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def alter(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def link(path):
    elsewhere = path.parents[3] / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def files(path):
    return [file for file in path.rglob("*") if file.is_file() and file.stat().st_size and file.name != "seal.json"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, "bytes, not"),
        (alter, "other contents"),
        (lambda path: path.unlink(), "is missing"),
        (link, "leads out of it"),
        (lambda path: path.with_name("more").touch(), "does not belong to it"),
    ],
)
def test_damage_to_any_file_is_found(two, damage, words):
    number = len(files(two / "20"))
    assert number > 3
    for index in range(number):
        shutil.copytree(two / "20", two / "30")
        damage(sorted(files(two / "30"))[index])
        found = damages(two)
        assert words in found[30]
        assert found[20] == ""
        shutil.rmtree(two / "30")


def test_a_checkpoint_without_its_seal_was_not_finished(two):
    (two / "20" / "seal.json").unlink()
    assert "it was not finished" in damages(two)[20]


@pytest.mark.parametrize(
    "seal", ["", "{", "[]", '{"files": {}}', '{"files": 3, "note": {}}', '{"files": {"d": 3}, "note": {}}']
)
def test_a_damaged_seal_is_found(two, seal):
    (two / "20" / "seal.json").write_text(seal)
    assert damages(two) == {20: "its seal is not readable", 10: ""}


def test_without_checkpoints_there_is_nothing(tmp_path):
    assert checkpoint.survey(tmp_path) == []
    assert checkpoint.survey(tmp_path / "nowhere") == []


def seal(directory, number):
    checkpoint.seal(directory, number, {}, directory.parent / "metrics.jsonl")


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_the_newest_two_are_kept(two):
    seal(two, 30)
    assert names(two) == ["20", "30"]


def test_one_that_was_passed_over_goes_when_the_run_has_gone_on_from_the_one_before(two):
    """Else it would count as one of the two that are kept."""
    alter(two / "20" / "seal.json")
    seal(two, 15)
    assert names(two) == ["10", "15"]


def test_what_a_killed_process_left_unfinished_goes_with_the_next(two):
    (two / "30" / "state.orbax-checkpoint-tmp").mkdir(parents=True)
    assert "not finished" in damages(two)[30]
    seal(two, 25)
    assert names(two) == ["20", "25"]


def test_only_what_was_written_is_removed(two, tmp_path):
    """Not what someone else put there, not what a link or a seal leads to."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("precious")
    (two / "10" / "notes.txt").write_text("mine")
    (two / "10" / "state" / "link").symlink_to(precious)
    content = json.loads((two / "10" / "seal.json").read_text())
    content["files"]["../../../precious/thesis.tex"] = [8, ""]
    (two / "10" / "seal.json").write_text(json.dumps(content))
    (two / "7").symlink_to(precious)
    seal(two, 30)
    seal(two, 40)
    checkpoint.clear(two)
    assert (precious / "thesis.tex").read_text() == "precious"
    assert (two / "10" / "notes.txt").read_text() == "mine"
    assert names(two) == ["10", "7"]


def test_nothing_is_written_through_a_link(two, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (two / "30").symlink_to(elsewhere)
    with pytest.raises(UserError, match="leads out of"):
        seal(two, 30)
    assert os.listdir(elsewhere) == []


@pytest.mark.parametrize(
    ("error", "told"),
    [(RuntimeError("Event loop is closed"), 0), (RuntimeError("another"), 1), (ValueError("Event loop is closed"), 1)],
)
def test_of_what_threads_cannot_raise_only_closed_loops_are_not_told(monkeypatch, error, told):
    """The loops are orbax's, which closes them after a write that failed."""
    seen = []
    monkeypatch.setattr(checkpoint, "_report_unraisable", seen.append)
    checkpoint._report_but_closed_loops(types.SimpleNamespace(exc_value=error))
    assert len(seen) == told
