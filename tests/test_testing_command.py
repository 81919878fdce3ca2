"""`python -m jaxbn.testing`: the table, the counterexample, the exit status, errors in one line."""

import subprocess
import sys

import jax
import pytest

import jaxbn.testing as laws
from jaxbn.testing.__main__ import main
from jaxbn.testing._resolve import UnknownPathError, resolve

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
    return (x - x.mean(0, keepdims=True)) / (x.var(0, keepdims=True) + 1e-5) ** 0.5


def small(x):
    assert len(x) < 8, "too many"
    return x


def variance_of_another_kind(x):
    axes = tuple(range(x.ndim - 1))
    mean = x.mean(axes, keepdims=True)
    return (x - mean) / ((x * x).mean(axes, keepdims=True) - mean * mean + 1e-5) ** 0.5
"""
FEW = ("--laws", "zero_mean,epsilon_inside_root")
# A promise that the textbook formula for the variance does not keep.
FAR = "far_constant_feature"


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
    assert main(["my_layers.small", "--laws", "permutation_equivariance,dense_equals_convolution"]) == 1
    assert "raised AssertionError: too many" in capsys.readouterr().out


def test_layer_that_takes_one_rank_is_checked_on_that(layers, capsys):
    assert main(["my_layers.square", "--laws", "zero_mean,dense_equals_convolution"]) == 0
    out = capsys.readouterr().out
    assert "1 laws hold, 0 broken, 1 not applicable" in out
    assert "needs inputs of rank 4 (raised AssertionError: two axes only)" in out


def test_broken_promise_counts_where_asked(layers, capsys):
    few = ["my_layers.variance_of_another_kind", "--no-shrink", "--skip", ",".join(set(laws.LAWS) - {"zero_mean", FAR})]
    assert main(few) == 0
    assert f"{FAR} is not kept (a promise of jaxbn)" in capsys.readouterr().out
    assert main([*few, "--strict"]) == 1
    assert main(["my_layers.variance_of_another_kind", "--no-shrink", "--laws", FAR]) == 1


def test_skipped_law_is_said_and_does_not_count(layers, capsys, rank_promotion):
    assert main(["my_layers.outside", *FEW, "--skip", "epsilon_inside_root"]) == 0
    assert "n/a     skipped by --skip" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "scope"),
    [
        (["flax.linen.LayerNorm"], "layer (inferred)"),
        (["flax.linen.InstanceNorm"], "instance (inferred)"),
        (["flax.linen.InstanceNorm", "--scope", "instance"], "instance (stated)"),
        (["jaxbn.instance_norm", "--scope", "instance"], "instance (stated)"),
        (["jaxbn.group_norm(num_groups=2)"], "group:2 (inferred)"),
        (["jaxbn.group_norm", "--features", "64"], "group:32 (inferred)"),
        (["flax.nnx.LayerNorm"], "layer (inferred)"),
    ],
)
def test_right_layer_of_each_scope_is_not_condemned(arguments, scope, capsys, rank_promotion):
    few = ["zero_mean", "unit_variance", "shift_invariance", "scale_invariance", "gradient_orthogonal_to_ones"]
    assert main([*arguments, "--laws", ",".join(few), "--examples", "8"]) == 0
    assert f"scope {scope}" in capsys.readouterr().out


def test_wrong_scope_is_answered_with_the_right_one(capsys):
    assert main(["jaxbn.group_norm", "--features", "32", "--scope", "example", "--laws", "unit_variance"]) == 1
    assert "try --scope instance" in capsys.readouterr().out


def test_scope_that_leaves_no_sets_is_one_line_and_status_2(capsys):
    assert main(["jaxbn.batch_norm", "--scope", "ghost:3", *FEW]) == 2
    assert "scope ghost:3 does not divide a batch of 4" in capsys.readouterr().err
    assert main(["jaxbn.batch_norm", "--scope", "rows", *FEW]) == 2
    assert "no scope is called 'rows'" in capsys.readouterr().err


def test_markdown_table_has_laws_down_and_layers_across(layers, capsys, rank_promotion):
    assert main(["--table", "jaxbn.batch_norm", "my_layers.outside", *FEW]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| law | jaxbn.batch_norm | my_layers.outside |"
    assert "| `epsilon_inside_root` | holds | **broken** |" in lines
    assert "| laws broken / applicable | 0 / 2 | 1 / 2 |" in lines
    assert any("python -m jaxbn.testing --table" in line for line in lines)


def test_list_names_every_law_with_its_bound_and_source(capsys):
    assert main(["--list"]) == 0
    out = capsys.readouterr().out
    for law in laws.LAWS.values():
        title = f"{law.name} (a promise of jaxbn)" if law.promise else law.name
        assert f"{title}\n  {law.statement}\n  bound:  {law.bound}\n  source: {law.source}" in out


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
