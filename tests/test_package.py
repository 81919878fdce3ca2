"""What `import jaxbn` gives: public names, modules imported when first used, help and a version."""

import io
import pydoc
import re
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest

import jaxbn

MODULES = ["convert", "diagnostics", "linen", "nnx", "testing", "training", "variants"]
OTHERS = ["equinox", "haiku"]  # Of libraries that need not be installed.
PRELUDE = "import sys, jaxbn\n"


def run(code):
    return subprocess.run([sys.executable, "-c", PRELUDE + code], capture_output=True, text=True)


def public_names():
    """What a user finds in jaxbn, beside modules and what `typing` lends."""
    members = {name: value for name, value in vars(jaxbn).items() if not name.startswith("_")}
    return {n for n, v in members.items() if not isinstance(v, types.ModuleType) and n not in ("Any", "TYPE_CHECKING")}


def test_modules_are_imported_when_first_used():
    loaded = run(
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'flax', 'optax', 'hypothesis', 'chex'}))\n"
        f"print([getattr(jaxbn, name).__name__ for name in {MODULES}])"
    )
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.splitlines() == ["[]", str([f"jaxbn.{name}" for name in MODULES])]


def test_a_module_that_cannot_be_imported_says_why():
    missing = run("sys.modules['hypothesis'] = None\nassert not hasattr(jaxbn, 'testing')\njaxbn.testing")
    assert missing.returncode == 1
    assert "AttributeError: jaxbn.testing cannot be imported: " in missing.stderr
    assert "hypothesis" in missing.stderr


@pytest.mark.parametrize("name", OTHERS)
def test_a_library_that_is_not_installed_says_which(name):
    missing = run(f"sys.modules['{name}'] = None\nassert not hasattr(jaxbn, '{name}')\njaxbn.{name}")
    assert f"AttributeError: jaxbn.{name} cannot be imported: import of {name} halted" in missing.stderr


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'jaxbn' has no attribute 'batchnorm'"):
        jaxbn.batchnorm  # noqa: B018


def test_dir_lists_modules_and_version():
    assert {*MODULES, *OTHERS, "__version__", "batch_norm"} <= set(dir(jaxbn))


def test_public_names_are_functions_and_classes_and_no_modules():
    assert all(callable(getattr(jaxbn, name)) for name in public_names())


def test_the_docstring_is_a_complete_table_of_contents():
    contents = jaxbn.__doc__.split("The type that every normalizer has")[1]
    words = set(re.findall(r"[A-Za-z]\w+", contents))
    assert public_names() <= words
    assert set(re.findall(r"jaxbn\.(\w+) ", contents)) <= {*MODULES, *OTHERS}
    assert {word for word in words if "_" in word} <= public_names()


def test_help_is_short():
    page = io.StringIO()
    pydoc.Helper(output=page).help(jaxbn)
    assert len(page.getvalue().splitlines()) < 150


def test_the_version_is_that_of_the_project():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert jaxbn.__version__ == project["version"]
