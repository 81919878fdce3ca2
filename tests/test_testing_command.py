"""`python -m jaxbn.testing`: the table, the counterexample, the exit status, errors in one line."""

import subprocess
import sys

import jax
import pytest

import jaxbn.testing as laws
from jaxbn.testing.__main__ import main
from jaxbn.testing.resolve import UnknownPathError, resolve

MY_LAYERS = """
import jaxbn

norm = jaxbn.batch_norm()
number = 3


def outside(x):
    axes = tuple(range(x.ndim - 1))
    return (x - x.mean(axes)) / (x.std(axes) + 1e-5)


def sure(x):
    raise RuntimeError("not today")


def flat(x):
    return x.reshape(-1)


def square(x):
    assert x.ndim == 2, "two axes only"
    return x
"""
FEW = ("--laws", "zero_mean,epsilon_inside_root")


@pytest.fixture
def layers(tmp_path, monkeypatch):
    """A module of a user's own, importable."""
    (tmp_path / "my_layers.py").write_text(MY_LAYERS)
    (tmp_path / "needs_another.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.fixture
def rank_promotion():
    """Layers of others may promote ranks."""
    with jax.numpy_rank_promotion("allow"):
        yield


def test_laws_that_hold_give_status_0(capsys):
    assert main(["jaxbn.batch_norm", *FEW]) == 0
    assert "2 laws hold, 0 broken" in capsys.readouterr().out


def test_broken_law_gives_status_1_and_its_counterexample(layers, capsys, rank_promotion):
    assert main(["my_layers.outside", "--laws", "epsilon_inside_root"]) == 1
    out = capsys.readouterr().out
    for part in ("epsilon_inside_root is broken", "smallest failing input", "expected", "got", "bound", "source"):
        assert part in out


def test_normalizer_at_an_import_path(layers, capsys):
    assert main(["my_layers.norm", *FEW]) == 0
    assert "my_layers.norm: scope batch; epsilon 1e-05 (measured)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("no_such_package.Layer", "no module named 'no_such_package'"),
        ("jaxbn.no_such_thing", "has no attribute 'no_such_thing'"),
        ("jaxbn.linen.BatchNorm.nothing", "has no attribute 'nothing'"),
        ("BatchNorm", "names no module"),
        ("not a path", "is not an import path"),
        ("jaxbn.batch_norm(0.9)", "name the arguments"),
        ("jaxbn.batch_norm(decays=0.9)", "takes no decays"),
        ("jaxbn.batch_norm(decay=2)", "does not fit: decay=2"),
        ("my_layers.number", "does not fit: 3 is no Normalizer"),
        ("jaxbn.moments", "does not fit: of x with shape (4, 2) it made Moments"),
        ("my_layers.sure", "does not fit: RuntimeError: not today"),
        ("my_layers.flat", "does not fit: of x with shape (4, 2) it made shape (8,)"),
        ("needs_another.Layer", "no module named 'a_package_that_is_not_there'"),
    ],
)
def test_path_that_does_not_fit_is_one_line_and_status_2(path, words, layers, capsys):
    assert main([path, *FEW]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert words in err


def test_unknown_law_is_one_line_and_status_2(capsys):
    assert main(["jaxbn.batch_norm", "--laws", "zero_meen"]) == 2
    assert "no law is called 'zero_meen'" in capsys.readouterr().err


def test_law_on_whose_inputs_the_layer_raises_is_broken(layers, capsys):
    assert main(["my_layers.square", "--laws", "permutation_equivariance,dense_equals_convolution"]) == 1
    assert "raised AssertionError: two axes only" in capsys.readouterr().out


def test_markdown_table_has_laws_down_and_layers_across(layers, capsys, rank_promotion):
    assert main(["--table", "jaxbn.batch_norm", "my_layers.outside", *FEW]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| law | jaxbn.batch_norm | my_layers.outside |"
    assert "| `epsilon_inside_root` | holds | **broken** |" in lines
    assert "| broken / applicable | 0 / 2 | 1 / 2 |" in lines
    assert any("python -m jaxbn.testing --table" in line for line in lines)


def test_list_names_every_law_with_its_bound_and_source(capsys):
    assert main(["--list"]) == 0
    out = capsys.readouterr().out
    for law in laws.LAWS.values():
        assert f"{law.name}\n  {law.statement}\n  bound:  {law.bound}\n  source: {law.source}" in out


def test_no_path_is_an_error():
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2


def test_arguments_are_bound():
    assert resolve("jaxbn.batch_norm(decay=0.5)").keywords == {"decay": 0.5}


def test_arguments_of_what_takes_none():
    with pytest.raises(UnknownPathError, match="is not callable"):
        resolve("jaxbn.testing.AXIS(a=1)")


def test_as_a_program():
    run = subprocess.run(
        [sys.executable, "-m", "jaxbn.testing", "jaxbn.batch_norm", "--laws", "zero_mean"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0
    assert "1 laws hold" in run.stdout
