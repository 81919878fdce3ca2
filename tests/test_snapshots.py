import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from experiments.framework import snapshots
from jaxbn import training

STATE = {"kernel": np.arange(12, dtype=np.float32).reshape(3, 4), "count": np.int32(7)}


def placed(devices, state=STATE):
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    return training.replicate(state, mesh)


@pytest.fixture
def two(tmp_path):
    """A directory with checkpoints of steps 10 and 20."""
    for step in (10, 20):
        snapshots.save(tmp_path, step, placed(8, {**STATE, "count": np.int32(step)}))
    return tmp_path


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_a_state_comes_back_on_any_number_of_devices(two, devices):
    like = placed(devices, jax.tree.map(np.zeros_like, STATE))
    restored = snapshots.restore(two, 20, like)
    np.testing.assert_array_equal(restored["kernel"], STATE["kernel"])
    assert restored["count"] == 20
    assert restored["kernel"].dtype == STATE["kernel"].dtype
    assert restored["kernel"].sharding == like["kernel"].sharding


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def alter(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "words"),
    [(truncate, "bytes, not"), (alter, "other contents"), (lambda path: path.unlink(), "is missing")],
)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(two, damage, words):
    damage(max((two / "step-20").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size))
    said = []
    assert snapshots.newest(two, said.append) == 10
    assert len(said) == 1
    assert "step-20 is damaged" in said[0]
    assert words in said[0]
    assert "looking for the one before it" in said[0]


def test_every_file_of_a_checkpoint_is_sealed(two):
    files = [path for path in (two / "step-20").rglob("*") if path.is_file() and path.stat().st_size]
    assert len(files) > 3
    for path in files:
        before = path.read_bytes()
        alter(path)
        assert snapshots.newest(two, lambda line: None) == 10, path
        path.write_bytes(before)
    assert snapshots.newest(two, pytest.fail) == 20


def test_a_checkpoint_without_its_seal_was_not_finished(two):
    (two / "step-20.json").unlink()
    said = []
    assert snapshots.newest(two, said.append) == 10
    assert "it was not finished" in said[0]


@pytest.mark.parametrize("seal", ["", "{", "[]", '{"files": {}}', '{"files": 3}', '{"files": {"d": 3}}'])
def test_a_checkpoint_with_a_damaged_seal_is_passed_over(two, seal):
    (two / "step-20.json").write_text(seal)
    said = []
    assert snapshots.newest(two, said.append) == 10
    assert "its seal is not readable" in said[0]


def test_where_no_checkpoint_is_whole_it_says_that_it_starts_over(two):
    for step in (10, 20):
        (two / f"step-{step}.json").unlink()
    said = []
    assert snapshots.newest(two, said.append) is None
    assert said[-1] == "no checkpoint is whole: starting over"


def test_without_checkpoints_there_is_nothing_to_continue(tmp_path):
    assert snapshots.newest(tmp_path, pytest.fail) is None


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_the_newest_two_are_kept(two):
    snapshots.save(two, 30, placed(1))
    assert names(two) == ["step-20", "step-20.json", "step-30", "step-30.json"]


def test_one_that_was_passed_over_goes_when_the_run_has_gone_on_from_the_one_before(two):
    """Else it would count as one of the two that are kept."""
    alter(two / "step-20.json")
    snapshots.save(two, 15, placed(1))
    assert names(two) == ["step-10", "step-10.json", "step-15", "step-15.json"]


def test_what_a_killed_process_left_unfinished_goes_with_the_next(two):
    (two / "step-30.orbax-checkpoint-tmp").mkdir()
    assert snapshots.newest(two, pytest.fail) == 20
    snapshots.save(two, 30, placed(1))
    assert names(two) == ["step-20", "step-20.json", "step-30", "step-30.json"]
