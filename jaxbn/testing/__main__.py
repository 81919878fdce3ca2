"""`python -m jaxbn.testing flax.linen.BatchNorm`: which laws a layer keeps, and what breaks the others."""

import argparse
import importlib.metadata
import os
import platform
import sys
import warnings
from collections.abc import Sequence

import jax

from jaxbn.testing.adapters import subject_of
from jaxbn.testing.laws import LAWS
from jaxbn.testing.report import Report, markdown
from jaxbn.testing.resolve import UnknownPathError, resolve
from jaxbn.testing.runner import law_named, survey
from jaxbn.testing.scope import SCOPES

_LIBRARIES = ("jax", "jaxbn", "flax", "dm-haiku", "equinox", "torch", "hypothesis", "chex")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 where all laws hold, 1 where one is broken, 2 where a path or option does not fit."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if not (options.paths or options.list):
        parser.error("name a layer, such as flax.linen.BatchNorm")
    if options.list:
        print(
            "\n\n".join(
                f"{law.name}\n  {law.statement}\n  bound:  {law.bound}\n  source: {law.source}" for law in LAWS.values()
            )
        )
        return 0
    try:
        laws = None if options.laws is None else [law_named(name.strip()) for name in options.laws.split(",")]
        subjects = [_subject(path, options) for path in options.paths]
    except (UnknownPathError, TypeError, ValueError) as error:
        print(f"jaxbn.testing: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    shrink = not options.no_shrink
    reports = [survey(subject, laws, examples=options.examples, shrink=shrink) for subject in subjects]
    print(_table(reports, options) if options.table else "\n\n\n".join(map(str, reports)))
    return 1 if any(report.broken for report in reports) else 0


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m jaxbn.testing",
        description="Check layers against the laws of normalization. Exit status 1 if a law is broken.",
    )
    parser.add_argument(
        "paths",
        nargs="*",
        metavar="PATH",
        help="import path of a module class (flax.linen, flax.nnx, Haiku, Equinox, torch), of a Normalizer or a factory"
        " of them, or of a function x -> y; keyword arguments may follow, as in \"equinox.nn.BatchNorm(mode='batch')\"",
    )
    parser.add_argument("--laws", help="names of laws, with commas between; all by default")
    parser.add_argument("--examples", type=int, default=25, help="inputs tried for each law (default 25)")
    parser.add_argument("--scope", choices=SCOPES, help="which values are normalized together (default batch)")
    parser.add_argument("--features", type=int, help="number of features of the inputs (default 2)")
    parser.add_argument("--table", action="store_true", help="one Markdown table, laws down and layers across")
    parser.add_argument("--no-shrink", action="store_true", help="do not look for the smallest failing input")
    parser.add_argument("--list", action="store_true", help="print all laws with their bounds and sources")
    return parser


def _subject(path, options):
    chosen = {"name": path}
    if options.scope:
        chosen["scope"] = SCOPES[options.scope]
    if options.features:
        chosen["features"] = options.features
    try:
        subject = subject_of(resolve(path), **chosen)
        subject.check_fit()
    except UnknownPathError:
        raise
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        kind = "" if isinstance(error, TypeError | ValueError) else f"{type(error).__name__}: "
        raise UnknownPathError(f"{path} does not fit: {kind}{first}") from error
    return subject


def _table(reports: Sequence[Report], options) -> str:
    """The table, what made it, and of each broken law its counterexample."""
    versions = ", ".join(f"{name} {version}" for name in _LIBRARIES if (version := _version(name)))
    quoted = " ".join(f'"{path}"' if "(" in path else path for path in options.paths)
    extras = "" if options.examples == 25 else f" --examples {options.examples}"
    environment = "".join(
        f"{name}={os.environ[name]} " for name in ("JAX_PLATFORMS", "XLA_FLAGS") if name in os.environ
    )
    made = f"Made by `{environment}python -m jaxbn.testing --table{extras} {quoted}` on {jax.default_backend()}"
    details = [f"- {report.name}: {report.facts}" for report in reports]
    found = [
        f"- {report.name}, `{outcome.law.name}`: {outcome.detail}" for report in reports for outcome in report.broken
    ]
    parts = [
        markdown(reports),
        f"{made} ({jax.device_count()} devices, {platform.machine()}, Python {platform.python_version()}): {versions}.",
        "What was checked:\n" + "\n".join(details),
        "What the broken laws show, on the smallest failing input:\n" + "\n".join(found) if found else "",
    ]
    return "\n\n".join(part for part in parts if part)


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    # Layers under test may warn; the table is what was asked for.
    warnings.simplefilter("ignore")
    try:
        status = main()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)
