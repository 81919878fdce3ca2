"""The table of laws in the README: its rows are the laws there are, and its columns say what the layers do today."""

import functools
import pathlib

import jax
import pytest

import jaxbn.testing as laws
from jaxbn.testing._resolve import resolve
from jaxbn.testing._table import BEGIN, END, read, write
from jaxbn.testing.adapters import subject_of

README = pathlib.Path(laws.__file__).with_name("README.md")
MARKS = {"holds": "holds", "BROKEN": "**broken**", "n/a": "–"}
# flax.nnx puts float64 statistics into its float32 variables; the command, which made the table, only warns.
pytestmark = pytest.mark.filterwarnings("ignore:scatter inputs have incompatible types:FutureWarning")
HERE = ("jaxbn.batch_norm", "flax.linen.BatchNorm", "flax.nnx.BatchNorm")


@pytest.fixture(autouse=True)
def rank_promotion():
    """Layers of other libraries promote ranks."""
    with jax.numpy_rank_promotion("allow"):
        yield


@functools.cache
def subject(layer):
    return subject_of(resolve(layer), name=layer)


def column(layer, names, **options):
    report = laws.survey(subject(layer), sorted(names), shrink=False, **options)
    return {outcome.law.name: MARKS[outcome.status] for outcome in report.outcomes}


def test_rows_are_the_laws_there_are_with_promises_last():
    expected = sorted(laws.LAWS.values(), key=lambda law: law.promise)
    for found in read(README).values():
        assert list(found) == [law.name for law in expected]


@pytest.mark.parametrize("layer", HERE)
def test_what_is_said_to_be_broken_is_and_what_does_not_apply_does_not(layer):
    said = {name: mark for name, mark in read(README)[layer].items() if mark != "holds"}
    assert column(layer, said, examples=12) == said


@pytest.mark.slow
@pytest.mark.parametrize("layer", HERE)
def test_column_is_what_the_command_finds(layer):
    assert column(layer, laws.LAWS) == read(README)[layer]


def test_table_is_written_between_its_markers(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"before\n{BEGIN}\nformer\n{END}\nafter\n", encoding="utf-8")
    write(path, "| law | layer |\n| --- | --- |\n| `zero_mean` | holds |")
    assert read(path) == {"layer": {"zero_mean": "holds"}}
    text = path.read_text(encoding="utf-8")
    assert "former" not in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")


def test_file_without_markers_is_refused(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("nothing\n", encoding="utf-8")
    with pytest.raises(ValueError, match="has no lines"):
        write(path, "table")
    assert path.read_text(encoding="utf-8") == "nothing\n"
