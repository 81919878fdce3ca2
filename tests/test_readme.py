"""The READMEs: examples run as they stand, figures are those of the committed results, links lead somewhere."""

import doctest
import re
from pathlib import Path

import pytest

from experiments.framework import report

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
READMES = [README, *sorted(ROOT.glob("jaxbn/**/README.md")), *sorted(ROOT.glob("experiments/**/README.md"))]
READMES += sorted(ROOT.glob("jaxbn/RECIPES*.md"))
names = pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))


def quickly(readme: Path):
    """The README's own examples in every run; those of the recipes and the diagnostics are slow."""
    slow = readme.stem.startswith("RECIPES") or readme.parent.name == "diagnostics"
    return pytest.param(readme, marks=pytest.mark.slow if slow else ())


@pytest.mark.parametrize("readme", [*map(quickly, READMES)], ids=lambda path: str(path.relative_to(ROOT)))
def test_examples_give_what_they_show(readme):
    result = doctest.testfile(str(readme), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


def test_the_first_two_shell_blocks_are_one_line_each():
    blocks = re.findall(r"^```sh\n(.*?)^```", README.read_text(), re.S | re.M)[:2]
    assert [len(block.strip().splitlines()) for block in blocks] == [1, 1]
    assert "experiments run benefits" in blocks[0]
    assert "pytest" in blocks[1]


@names
def test_every_file_that_is_named_exists(readme):
    named = re.findall(r"\]\(((?!http)[^)#]+)", readme.read_text())
    assert not [name for name in named if not (readme.parent / name).exists()]


def test_the_top_page_is_short():
    assert len(README.read_text().splitlines()) <= 150


FILES = [README, report.RESULTS / report.REPORT, report.RESULTS / report.PAGE]


@pytest.mark.parametrize("file", FILES, ids=["found", "markdown", "page"])
def test_the_report_is_what_the_committed_results_say(file):
    built = report.files_of(report.collect(report.RESULTS), report.RESULTS, README)
    assert file.read_text() == built[file], "run `python -m experiments report`"
