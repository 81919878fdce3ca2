"""The table of laws by layers, with what made it, and its place in a Markdown file."""

import importlib.metadata
import os
import pathlib
import platform
import subprocess
from collections.abc import Sequence

import jax

from jaxbn.testing._report import Report, markdown

BEGIN = "<!-- table of laws: begin -->"
END = "<!-- table of laws: end -->"
_LIBRARIES = ("jax", "jaxbn", "flax", "dm-haiku", "equinox", "torch", "hypothesis", "chex")


def table(reports: Sequence[Report], command: str) -> str:
    """The table, what made it, what was checked, and of each broken law its counterexample.

    Args:
      reports: one for each layer, of the same laws.
      command: the arguments with which the command was called, as typed.
    """
    checked = [f"- {report.name}: {report.facts}" for report in reports]
    found = [
        f"- {report.name}, `{outcome.law.name}`: {outcome.detail}" for report in reports for outcome in report.broken
    ]
    shown = "What the broken laws and promises show, on the smallest failing input:"
    parts = [
        markdown(reports),
        _made_by(command),
        "What was checked:\n\n" + "\n".join(checked),
        f"{shown}\n\n" + "\n".join(found) if found else "",
    ]
    return "\n\n".join(part for part in parts if part)


def write(path: pathlib.Path, text: str) -> None:
    """Put the text between the two markers of a Markdown file.

    Raises:
      ValueError: the file has no such markers.
    """
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{path} has no lines {BEGIN} and {END} to write the table between")
    path.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")


def read(path: pathlib.Path) -> dict[str, dict[str, str]]:
    """The table in a Markdown file: {layer: {law: "holds", "**broken**" or "–"}}."""
    text = path.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    layers, laws = rows[0][1:], [row for row in rows if row[0].startswith("`")]
    return {layer: {row[0].strip("`"): row[1 + i] for row in laws} for i, layer in enumerate(layers)}


def _made_by(command: str) -> str:
    environment = "".join(
        f"{name}={os.environ[name]} " for name in ("JAX_PLATFORMS", "XLA_FLAGS") if name in os.environ
    )
    versions = ", ".join(f"{name} {version}" for name in _LIBRARIES if (version := _version(name)))
    commit = _commit()
    return (
        f"Made by `{environment}python -m jaxbn.testing {command}`{f' at commit {commit}' if commit else ''}"
        f" on {jax.default_backend()} ({jax.device_count()} devices, {platform.machine()},"
        f" Python {platform.python_version()}): {versions}."
    )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """The commit of the checkout that jaxbn was imported from, or "" where it is none."""
    here = pathlib.Path(__file__).parent
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"],
            cwd=here,
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""
