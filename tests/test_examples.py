"""The example scripts, run as a reader runs them: they learn, and each is short and stands alone."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "experiments" / "examples").glob("*.py"))
ONE_DEVICE = [path for path in EXAMPLES if path.stem != "sharded"]
LINES = 60
MAY_IMPORT = {"argparse", "flax", "jax", "jaxbn", "mlxtend", "numpy", "optax"}
EPOCH = re.compile(r"epoch (\d+): loss ([0-9.]+), test accuracy ([0-9.]+)$", re.M)

named = pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)


def run(path, directory, *options):
    """What the script prints, from a directory of its own; a warning ends it."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("XLA_FLAGS", None)  # The session's own number of devices; scripts choose theirs.
    command = [sys.executable, "-W", "error", str(path), *options]
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def history(printed):
    """(loss, accuracy) of each epoch printed, in order."""
    found = EPOCH.findall(printed)
    assert len(found) == len(printed.splitlines())
    assert [int(epoch) for epoch, _, _ in found] == list(range(1, len(found) + 1))
    return [(float(loss), float(accuracy)) for _, loss, accuracy in found]


def check_learns(epochs):
    """The loss falls by a third and half of the test digits are right, where chance is a tenth."""
    (first, _), (last, accuracy) = epochs[0], epochs[-1]
    assert last < first * 2 / 3
    assert accuracy > 0.5


@pytest.mark.parametrize(
    "path", [pytest.param(p, marks=() if p.stem == "plain" else pytest.mark.slow, id=p.stem) for p in ONE_DEVICE]
)
def test_an_example_learns(path, tmp_path):
    epochs = history(run(path, tmp_path, "--epochs", "2", "--limit", "800"))
    assert len(epochs) == 2
    check_learns(epochs)


@pytest.mark.slow
def test_many_devices_learn_what_one_learns(tmp_path):
    printed = run(ROOT / "experiments" / "examples" / "sharded.py", tmp_path, "--epochs", "2", "--limit", "800")
    one, eight = (history("".join(re.findall(rf"^devices {n}, (.*\n)", printed, re.M))) for n in (1, 8))
    assert len(one) == len(eight) == 2
    check_learns(one)
    # Sums in another order differ by roundings, which Adam enlarges from step to step.
    assert [loss for loss, _ in eight] == pytest.approx([loss for loss, _ in one], rel=1e-4)
    assert [accuracy for _, accuracy in eight] == pytest.approx([accuracy for _, accuracy in one], abs=2e-3)


@named
def test_an_example_is_short(path):
    assert len(path.read_text().splitlines()) <= LINES


@named
def test_an_example_stands_alone(path):
    """It imports installed packages only, so that a reader can copy the file by itself."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    modules += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    assert {module.split(".")[0] for module in modules} <= MAY_IMPORT


@named
def test_an_example_says_how_to_run_it_and_what_to_expect(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert f"python {path.name}" in docstring
    assert re.search(r"test accuracy 0\.\d+ ", docstring)


def test_the_readme_names_every_example():
    readme = (ROOT / "experiments" / "examples" / "README.md").read_text()
    assert {path.name for path in EXAMPLES} <= set(re.findall(r"\]\((\w+\.py)\)", readme))
