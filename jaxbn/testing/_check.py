"""Check all laws on one layer."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxbn.testing._coupling import coupling_hint
from jaxbn.testing._law import LAWS, Law, law_named
from jaxbn.testing._report import Report
from jaxbn.testing.adapters import subject_of


def check(norm: Any, laws: Sequence[Law | str] | None = None, *, strict: bool = False, **options: Any) -> Report:
    """Check a normalizer against the laws that apply to it, and raise where one is broken.

    Args:
      norm: a Normalizer; a factory of them that takes keyword arguments, such as `jaxbn.batch_norm` itself (then laws
        of `axis_name` and layouts are checked too); a module of linen, nnx, Haiku, Equinox or torch (see
        `jaxbn.testing.adapters`); or a function x -> y.
      laws: laws or their names; None is all.
      strict: whether a broken promise raises too. One that is named in `laws` always does.
      **options: of `survey`.

    Returns:
      The Report.

    Raises:
      AssertionError: a law is broken: its name, the smallest failing input, expected, got, and the bound.
    """
    report = survey(norm, laws, **options)
    counted = counting(report, strict=strict or laws is not None)
    if counted:
        names = ", ".join(outcome.law.name for outcome in counted)
        text = "\n\n".join(part for part in (report.facts, report.failures(), report.hint) if part)
        raise AssertionError(f"{report.name} breaks {names}\n{text}")
    return report


def counting(report: Report, *, strict: bool) -> list:
    """The results that fail a check: broken laws, and broken promises where strict."""
    return report.broken if strict else report.broken_laws


def survey(
    norm: Any,
    laws: Sequence[Law | str] | None = None,
    *,
    excused: Mapping[Law | str, str] | None = None,
    examples: int = 25,
    shrink: bool = True,
    **options: Any,
) -> Report:
    """Check a normalizer against the laws that apply to it, without raising.

    Args:
      norm: as for `check`.
      laws: as for `check`.
      excused: {law or name: reason} of laws that are not meant to hold.
      examples: inputs tried for each law.
      shrink: look for the smallest failing input, which takes about a second for each broken law.
      **options: fields of `jaxbn.testing.Subject`: name, epsilon, decay, rule, unbiased (measured where not stated),
        scope (inferred where not stated), features, feature_axis, ranks, lacks, arguments, sharded, channels_first.

    Raises:
      TypeError: norm is nothing that can be checked, or does not keep x's shape.
      ValueError: the scope does not fit the inputs.
    """
    subject = subject_of(norm, **options)
    subject.check_fit()
    reasons = {law_named(law): reason for law, reason in (excused or {}).items()}
    chosen = list(LAWS.values()) if laws is None else [law_named(law) for law in laws]
    outcomes = [law.try_on(subject, excuse=reasons.get(law), examples=examples, shrink=shrink) for law in chosen]
    report = Report(subject.name, subject.facts(), outcomes)
    if report.broken_laws and (hint := coupling_hint(subject)):
        return Report(report.name, report.facts, outcomes, hint)
    return report
