"""One run at a time in a directory, whoever holds it and however that one ends."""

import os
import signal

import pytest
from holder import Holder

from experiments.errors import UserError
from experiments.framework import lock


def test_a_directory_in_use_is_refused_and_the_holder_named(tmp_path):
    with Holder(tmp_path) as holder, pytest.raises(UserError) as caught:
        lock.acquire(tmp_path)
    assert f"{tmp_path} is in use by process {holder.process.pid} on {os.uname().nodename} since 20" in str(
        caught.value
    )
    assert str(caught.value).endswith("wait until that ends, or choose another --out")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_lock_dies_with_its_process(tmp_path, number):
    with Holder(tmp_path) as holder:
        holder.process.send_signal(number)
        holder.process.wait()
        assert (tmp_path / ".lock").exists()
        lock.acquire(tmp_path)
    lock.release(tmp_path)


def test_a_frozen_holder_still_holds(tmp_path):
    with Holder(tmp_path) as holder:
        holder.process.send_signal(signal.SIGSTOP)
        with pytest.raises(UserError, match="is in use by process"):
            lock.acquire(tmp_path)


def test_the_file_goes_with_the_last_that_holds_it(tmp_path):
    with Holder(tmp_path) as first, Holder(tmp_path, first.token) as second:
        assert first.end() == (0, "")
        with pytest.raises(UserError, match="is in use"):
            lock.acquire(tmp_path)
        assert second.end() == (0, "")
    assert list(tmp_path.iterdir()) == []


def test_another_directory_than_the_first_process_has_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with Holder(tmp_path / "a") as first:
        for directory in (tmp_path / "b", tmp_path / "nowhere"):
            with pytest.raises(UserError, match="is not the directory that process 0 uses"):
                lock.join(directory, first.token)
    assert list((tmp_path / "b").iterdir()) == []


def test_a_process_takes_what_it_has(tmp_path):
    assert lock.acquire(tmp_path) == lock.acquire(tmp_path / ".")
    lock.release(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_is_no_link(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="cannot write"):
        lock.acquire(tmp_path / "run")
    assert (tmp_path / "precious").read_text() == "precious"
