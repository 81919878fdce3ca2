"""The README's examples run as they stand, and its two commands are what continuous integration takes them for."""

import doctest
import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_examples_give_what_they_show():
    result = doctest.testfile(str(README), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert result.attempted > 20
    assert result.failed == 0


def test_the_first_two_shell_blocks_are_one_line_each():
    blocks = re.findall(r"^```sh\n(.*?)^```", README.read_text(), re.S | re.M)[:2]
    assert [len(block.strip().splitlines()) for block in blocks] == [1, 1]
    assert "experiments run benefits" in blocks[0]
    assert "pytest" in blocks[1]


def test_every_file_that_the_readme_names_exists():
    named = re.findall(r"\]\(((?!http)[^)#]+)\)", README.read_text())
    assert named
    assert not [name for name in named if not (README.parent / name).exists()]
