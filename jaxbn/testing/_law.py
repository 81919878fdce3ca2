"""What a law is, and how it is tried on a subject: hypothesis looks for an input that breaks it, and shrinks it."""

import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np

from jaxbn.testing._agree import BrokenLawError, LawDoesNotApplyError
from jaxbn.testing._layer import NEEDS
from jaxbn.testing._subject import Subject
from jaxbn.testing.adapters import subject_of

HOLDS, BROKEN, NOT_APPLICABLE = "holds", "BROKEN", "n/a"
_ALL_HEALTH_CHECKS = list(hypothesis.HealthCheck)


@dataclass(frozen=True, eq=False)
class Law:
    """One invariant as a property check.

    Attributes:
      name: as in `jaxbn.testing`.
      statement: what holds, in a sentence.
      bound: where the tolerance comes from.
      source: who showed it, or where it is promised.
      needs: keys of `NEEDS` without which the law says nothing.
      inputs: inputs(subject) -> {name: hypothesis strategy}, the arguments of `function`.
      function: function(subject, **drawn); raises `BrokenLawError`.
      examples: of the number of examples that were asked for, the share that this law tries.
      promise: True for what this library promises beyond the definition of normalization. A layer that does not keep
        it is not wrong.
    """

    name: str
    statement: str
    bound: str
    source: str
    needs: frozenset[str]
    inputs: Callable[[Any], Mapping[str, Any]]
    function: Callable[..., None]
    examples: float
    promise: bool

    def __call__(self, norm: Any, *, examples: int = 25, shrink: bool = True, **options: Any) -> None:
        """Check this law alone, as `jaxbn.testing.check(norm, laws=[law], ...)` does.

        Raises:
          AssertionError: the law is broken; the message shows the smallest failing input.
        """
        subject = subject_of(norm, **options)
        result = self.try_on(subject, examples=examples, shrink=shrink)
        if result.status == BROKEN:
            raise AssertionError(f"{subject.name} breaks {self.name}\n{subject.facts()}\n\n{result}")

    def __repr__(self) -> str:
        return f"<law {self.name}: {self.statement}>"

    def try_on(
        self, subject: Subject, *, excuse: str | None = None, examples: int = 25, shrink: bool = True
    ) -> "LawResult":
        """Look for an input that breaks the law.

        Args:
          subject: what is checked.
          excuse: why the law is not meant to hold; then it is not tried.
          examples: number of inputs, of which the law tries its share.
          shrink: look for the smallest failing input.
        """
        reason = excuse or self.not_applicable(subject)
        if reason:
            return LawResult(self, NOT_APPLICABLE, reason)
        try:
            _search(self, subject, max(2, round(examples * self.examples)), shrink)
        except LawDoesNotApplyError as reason:
            return LawResult(self, NOT_APPLICABLE, str(reason))
        except BrokenLawError as broken:
            return LawResult(self, BROKEN, str(broken), broken.inputs)
        except hypothesis.errors.Flaky as error:
            first = str(error).splitlines()[0]
            return LawResult(self, BROKEN, f"the same input does not always give the same answer: {first}")
        return LawResult(self, HOLDS)

    def not_applicable(self, subject: Subject) -> str | None:
        """What the law needs and the subject lacks, or None."""
        lacking = [subject.missing[need] for need in NEEDS if need in self.needs and need in subject.missing]
        if not lacking and "epsilon" in self.needs and not subject.eps > 0:
            lacking = [NEEDS["epsilon"]]
        return f"needs {' and '.join(lacking)}" if lacking else None


LAWS: dict[str, Law] = {}


def law(
    *,
    statement: str,
    bound: str,
    source: str,
    inputs: Callable[[Any], Mapping[str, Any]],
    needs: tuple[str, ...] = (),
    examples: float = 1.0,
    promise: bool = False,
) -> Callable[[Callable[..., None]], Law]:
    """Make a function(subject, **drawn) a law, named after it and listed in `LAWS` in order of definition.

    The arguments are the fields of `Law`.

    Raises:
      ValueError: a need is no key of `NEEDS`.
    """
    unknown = set(needs) - set(NEEDS)
    if unknown:
        raise ValueError(f"needs {sorted(unknown)}; expected some of {sorted(NEEDS)}.")

    def register(function: Callable[..., None]) -> Law:
        function.__doc__ = function.__doc__ or statement
        name = function.__name__
        made = Law(name, statement, bound, source, frozenset(needs), inputs, function, examples, promise)
        LAWS[made.name] = made
        return made

    return register


def law_named(law: Law | str) -> Law:
    """The law of that name; ValueError with all names where there is none."""
    if isinstance(law, Law):
        return law
    if law not in LAWS:
        raise ValueError(f"no law is called {law!r}; there are {', '.join(LAWS)}.")
    return LAWS[law]


@dataclass(frozen=True)
class LawResult:
    """What became of one law.

    Attributes:
      law: the law.
      status: `HOLDS`, `BROKEN` or `NOT_APPLICABLE`.
      detail: of a broken law what was expected, what came, and the bound; of one that does not apply, why.
      inputs: of a broken law the smallest failing inputs, by name.
    """

    law: Law
    status: str
    detail: str = ""
    inputs: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.status != BROKEN:
            return f"{self.law.name}: {self.status}{f' ({self.detail})' if self.detail else ''}"
        drawn = "\n".join(f"  {line}" for name, value in self.inputs.items() for line in shown(name, value))
        broken = "is not kept (a promise of jaxbn)" if self.law.promise else "is broken"
        return (
            f"{self.law.name} {broken}\n"
            f"  law:    {self.law.statement}\n"
            f"  source: {self.law.source}\n"
            f"  smallest failing input:\n{textwrap.indent(drawn, '  ')}\n"
            f"  {self.detail}\n"
            f"  bound:  {self.law.bound}"
        )


def shown(name: str, value: Any) -> list[str]:
    """Lines that show one drawn input."""
    if isinstance(value, tuple) and any(isinstance(part, np.ndarray) for part in value):
        names = name.split("_") if len(name.split("_")) == len(value) else [f"{name}[{i}]" for i in range(len(value))]
        return [line for part, v in zip(names, value, strict=True) for line in shown(part, v)]
    if isinstance(value, list) and any(isinstance(part, np.ndarray) for part in value):
        return [line for i, part in enumerate(value) for line in shown(f"{name}[{i}]", part)]
    if not isinstance(value, np.ndarray):
        return [f"{name} = {value!r}"]
    text = np.array2string(value, separator=", ", floatmode="unique", max_line_width=100)
    first, *rest = f"{name} = {text}".splitlines()
    return [
        f"{first}   # {value.dtype} {list(value.shape)}" if not rest else first,
        *(" " * (len(name) + 3) + r for r in rest),
    ]


def _search(law: Law, subject: Subject, examples: int, shrink: bool) -> None:
    """Run the law on drawn inputs; raise `BrokenLawError` with the smallest that breaks it."""
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
        except (hypothesis.errors.HypothesisException, LawDoesNotApplyError):
            raise
        except Exception as error:
            first = (str(error).splitlines() or [""])[0]
            raised = BrokenLawError(f"raised {type(error).__name__}: {first}")
            raised.inputs = drawn
            raise raised from error

    one()
