"""Run laws on a normalizer: hypothesis looks for an input that breaks each, and shrinks it."""

from collections.abc import Mapping, Sequence
from typing import Any

import hypothesis
import hypothesis.strategies as st

from jaxbn.testing import laws_count, laws_gradient, laws_precision, laws_running, laws_value  # noqa: F401  (list them)
from jaxbn.testing.adapters import subject_of
from jaxbn.testing.laws import LAWS, NEEDS, BrokenLawError, Law
from jaxbn.testing.report import BROKEN, HOLDS, NOT_APPLICABLE, LawResult, Report
from jaxbn.testing.subject import Subject

_ALL_HEALTH_CHECKS = list(hypothesis.HealthCheck)


def check(norm: Any, laws: Sequence[Law | str] | None = None, **options: Any) -> Report:
    """Check a normalizer against the laws that apply to it.

    Args:
      norm: a Normalizer; a factory of them that takes keyword arguments, such as `jaxbn.batch_norm` itself (then laws
        of `axis_name` and layouts are checked too); a module of linen, nnx, Haiku, Equinox or torch (see
        `jaxbn.testing.adapters`); or a function x -> y.
      laws: laws or their names; None is all.
      **options: of `survey`.

    Returns:
      The Report.

    Raises:
      AssertionError: a law is broken: its name, the smallest failing input, expected, got, and the bound.
    """
    report = survey(norm, laws, **options)
    if report.broken:
        names = ", ".join(outcome.law.name for outcome in report.broken)
        raise AssertionError(f"{report.name} breaks {names}\n{report.facts}\n\n{report.failures()}")
    return report


def survey(
    norm: Any,
    laws: Sequence[Law | str] | None = None,
    *,
    excused: Mapping[Law | str, str] | None = None,
    examples: int = 25,
    shrink: bool = True,
    **options: Any,
) -> Report:
    """The same without raising.

    Args:
      norm: as for `check`.
      laws: as for `check`.
      excused: {law or name: reason} of laws that are not meant to hold.
      examples: inputs tried for each law.
      shrink: look for the smallest failing input, which takes about a second for each broken law.
      **options: fields of `jaxbn.testing.Subject`: name, epsilon, decay, rule, unbiased (measured where not stated),
        features, feature_axis, scope, ranks, lacks, arguments, sharded, channels_first.

    Raises:
      TypeError: norm is nothing that can be checked, or does not keep x's shape.
    """
    subject = subject_of(norm, **options)
    subject.check_fit()
    reasons = {law_named(law): reason for law, reason in (excused or {}).items()}
    chosen = list(LAWS.values()) if laws is None else [law_named(law) for law in laws]
    outcomes = [outcome_of(law, subject, reasons.get(law), examples, shrink) for law in chosen]
    return Report(subject.name, facts(subject), outcomes)


def law_named(law: Law | str) -> Law:
    """The law of that name; ValueError with all names where there is none."""
    if isinstance(law, Law):
        return law
    if law not in LAWS:
        raise ValueError(f"no law is called {law!r}; there are {', '.join(LAWS)}.")
    return LAWS[law]


def outcome_of(
    law: Law, subject: Subject, excuse: str | None = None, examples: int = 25, shrink: bool = True
) -> LawResult:
    """Try one law on one subject."""
    reason = excuse or not_applicable(law, subject)
    if reason:
        return LawResult(law, NOT_APPLICABLE, reason)
    try:
        _search(law, subject, max(2, round(examples * law.examples)), shrink)
    except BrokenLawError as broken:
        return LawResult(law, BROKEN, str(broken), broken.inputs)
    except hypothesis.errors.Flaky as error:
        return LawResult(law, BROKEN, f"the same input does not always give the same answer: {error}".splitlines()[0])
    return LawResult(law, HOLDS)


def not_applicable(law: Law, subject: Subject) -> str | None:
    """What the law needs and the subject lacks, or None."""
    lacking = [subject.missing[need] for need in NEEDS if need in law.needs and need in subject.missing]
    if not lacking and "epsilon" in law.needs and not subject.eps > 0:
        lacking = [NEEDS["epsilon"]]
    if not lacking and law.name == "sets_are_independent" and subject.features == 1:
        lacking = ["a second feature"]
    return f"needs {' and '.join(lacking)}" if lacking else None


def _search(law, subject, examples, shrink):
    phases = [hypothesis.Phase.generate, *([hypothesis.Phase.shrink] if shrink else [])]

    @hypothesis.settings(
        max_examples=examples,
        phases=phases,
        derandomize=True,
        database=None,
        deadline=None,
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=_ALL_HEALTH_CHECKS,
    )
    @hypothesis.given(st.fixed_dictionaries(dict(law.inputs(subject))))
    def one(drawn):
        try:
            law.function(subject, **drawn)
        except BrokenLawError as broken:
            broken.inputs = drawn
            raise
        except hypothesis.errors.HypothesisException:
            raise
        except Exception as error:
            first = (str(error).splitlines() or [""])[0]
            broken = BrokenLawError(f"raised {type(error).__name__}: {first}")
            broken.inputs = drawn
            raise broken from error

    one()


def facts(subject: Subject) -> str:
    """What was stated or measured, in a line."""
    measured = subject.epsilon is None
    parts = [f"scope {subject.scope.name}", f"epsilon {subject.eps:g} ({'measured' if measured else 'stated'})"]
    if "running" not in subject.missing and "batch" not in subject.missing:
        parts.append(_rule_in_words(subject))
    return "; ".join(parts)


def _rule_in_words(subject):
    rule = subject.running
    if not rule.fits:
        return "running statistics follow none of the known rules"
    source = "measured" if subject.decay is None else "stated"
    decay = "" if rule.kind == "cumulative" else f", decay {rule.decay:g} ({source})"
    return f"running statistics {rule.kind}{decay}, {'unbiased' if rule.unbiased else 'biased'} variance"
