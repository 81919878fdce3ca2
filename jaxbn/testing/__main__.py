"""`python -m jaxbn.testing flax.linen.BatchNorm`: which laws a layer keeps, and what breaks the others."""

import argparse
import os
import pathlib
import shlex
import sys
import warnings
from collections.abc import Sequence

from jaxbn.testing._check import counting, survey
from jaxbn.testing._law import LAWS, Law, law_named
from jaxbn.testing._resolve import UnknownPathError, resolve
from jaxbn.testing._scope import scope_named
from jaxbn.testing._subject import Subject
from jaxbn.testing._table import table, write
from jaxbn.testing.adapters import subject_of

SYMBOLS = """In the bounds: u is the unit roundoff, 2^-24 for float32. Of a set, the values normalized together: n is
their number, peak the largest of their magnitudes, r = 1 / sqrt(var + epsilon), xhat = (x - mean) r,
slack = (n + 8) u (1 + (peak r)^2), D = max |scale dy| and X = max |xhat|."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command: 0 where all laws hold, 1 where one is broken, 2 where a path or an option does not fit."""
    parser = _parser()
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(arguments)
    if options.list:
        print("\n\n".join([SYMBOLS, *map(_described, LAWS.values())]))
        return 0
    if not options.paths:
        parser.error("name a layer, such as flax.linen.BatchNorm")
    try:
        laws = None if options.laws is None else _laws(options.laws)
        skipped: dict[Law | str, str] = dict.fromkeys(_laws(options.skip or ""), "skipped by --skip")
        subjects = [_subject(path, options) for path in options.paths]
    except (UnknownPathError, TypeError, ValueError) as error:
        return _refused(error)
    shrink = not options.no_shrink
    reports = [survey(subject, laws, excused=skipped, examples=options.examples, shrink=shrink) for subject in subjects]
    if options.table or options.write:
        text = table(reports, " ".join(map(_quoted, arguments)))
        if options.write:
            try:
                write(options.write, text)
            except (OSError, ValueError) as error:
                return _refused(error)
        print(text)
    else:
        print("\n\n\n".join(map(str, reports)))
    strict = options.strict or laws is not None
    return 1 if any(counting(report, strict=strict) for report in reports) else 0


def _quoted(argument: str) -> str:
    """The argument as one would type it: in double quotes where it has spaces or parentheses."""
    return argument if shlex.quote(argument) == argument or '"' in argument else f'"{argument}"'


def _refused(error: Exception) -> int:
    print(f"jaxbn.testing: {str(error).splitlines()[0]}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jaxbn.testing",
        description="Check layers against the laws of normalization. Naming a layer imports its module and builds it,"
        " so it runs their code.",
        epilog="Exit status: 0 all laws hold; 1 a law is broken (with --strict, or where --laws names it, a promise"
        " too); 2 a path or an option does not fit.",
    )
    parser.add_argument(
        "paths",
        nargs="*",
        metavar="PATH",
        help="import path of a module class (flax.linen, flax.nnx, Haiku, Equinox, torch), of a Normalizer or a factory"
        " of them, or of a function x -> y; keyword arguments may follow, as in \"equinox.nn.BatchNorm(mode='batch')\"",
    )
    parser.add_argument("--laws", metavar="NAMES", help="laws to check, with commas between; all by default")
    parser.add_argument("--skip", metavar="NAMES", help="laws not to check, with commas between")
    parser.add_argument(
        "--strict",
        action="store_true",
        help="exit with 1 also where a promise is not kept: what jaxbn promises beyond the definition of normalization",
    )
    parser.add_argument("--examples", type=int, default=25, help="inputs tried for each law (default 25)")
    parser.add_argument(
        "--scope",
        help="which values are normalized together: batch, layer, instance, example, group:N (N groups) or ghost:N (N"
        " examples); inferred by default where the layer has no running statistics, else batch",
    )
    parser.add_argument(
        "--features", type=int, help="number of features of the inputs (default: 2, or more where the layer needs it)"
    )
    parser.add_argument("--table", action="store_true", help="one Markdown table, laws down and layers across")
    parser.add_argument(
        "--write", metavar="FILE", type=pathlib.Path, help="put the table between its markers in a Markdown file, too"
    )
    parser.add_argument("--no-shrink", action="store_true", help="do not look for the smallest failing input")
    parser.add_argument("--list", action="store_true", help="print all laws with their bounds and sources")
    return parser


def _described(law: Law) -> str:
    promise = " (a promise of jaxbn)" if law.promise else ""
    return f"{law.name}{promise}\n  {law.statement}\n  bound:  {law.bound}\n  source: {law.source}"


def _laws(names: str) -> list[Law]:
    return [law_named(name.strip()) for name in names.split(",") if name.strip()]


def _subject(path: str, options: argparse.Namespace) -> Subject:
    chosen: dict = {"name": path}
    if options.scope:
        chosen["scope"] = scope_named(options.scope)
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


if __name__ == "__main__":
    # Layers under test may warn; the report is what was asked for.
    warnings.simplefilter("ignore")
    try:
        status = main()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)
