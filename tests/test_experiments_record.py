import json
import math

import numpy as np
import pytest

from experiments.errors import UserError
from experiments.framework.record import open_record

CONFIG = {"experiment": "e", "preset": "smoke", "settings": {"seeds": 2, "rates": (1, 2)}}


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


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


def test_a_directory_with_another_configuration_is_refused_and_untouched(tmp_path):
    open_record(tmp_path / "run", CONFIG).finish("one", [{"n": 1}])
    before = contents(tmp_path / "run")
    with pytest.raises(UserError, match=r"its seeds is 2, not 3\): choose another --out"):
        open_record(tmp_path / "run", {**CONFIG, "settings": {"seeds": 3, "rates": (1, 2)}})
    assert contents(tmp_path / "run") == before


def test_a_directory_that_holds_no_run_is_refused_and_untouched(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="holds no run"):
        open_record(tmp_path, CONFIG)
    assert contents(tmp_path) == {"thesis.tex": b"precious"}


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path):
    (tmp_path / "run").write_text("precious")
    with pytest.raises(UserError, match="holds no run"):
        open_record(tmp_path / "run", CONFIG)
    assert (tmp_path / "run").read_text() == "precious"


def test_a_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot create"):
        open_record(tmp_path / "file" / "run", CONFIG)


@pytest.mark.parametrize("name", ["config.json", "progress.json"])
def test_damaged_json_is_refused(tmp_path, name):
    open_record(tmp_path / "run", CONFIG)
    (tmp_path / "run" / name).write_text("{")
    with pytest.raises(UserError, match=f"{name} is not readable JSON"):
        open_record(tmp_path / "run", CONFIG)


def test_lost_rows_are_noticed(tmp_path):
    record = open_record(tmp_path / "run", CONFIG)
    record.finish("one", [{"n": 1}])
    record.metrics_path.write_text("")
    with pytest.raises(UserError, match=r"damaged \(0 bytes, 9 expected\)"):
        open_record(tmp_path / "run", CONFIG)


def test_continuing_from_another_commit_is_noted(tmp_path):
    open_record(tmp_path / "run", {**CONFIG, "provenance": {"commit": "a"}})
    open_record(tmp_path / "run", {**CONFIG, "provenance": {"commit": "b"}})
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["provenance"] == {"commit": "a"}
    assert config["continued"] == [{"commit": "b"}]
