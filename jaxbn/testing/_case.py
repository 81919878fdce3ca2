"""The laws as an absl/chex test case: one test for each law and each way to run JAX."""

import unittest
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import chex
from absl.testing import parameterized

from jaxbn.testing._law import BROKEN, LAWS, NOT_APPLICABLE, Law, law_named
from jaxbn.testing._subject import Subject
from jaxbn.testing.adapters import subject_of


class NormalizerTest(chex.TestCase):
    """Every law, under each of chex's variants.

    A subclass says what is tested::

        class MyNormTest(laws.NormalizerTest):
            def make(self):
                return my_norm()

    Attributes:
      laws: laws or names to check; None is all.
      strict: whether a broken promise fails its test; otherwise the test is skipped. One named in `laws` always fails.
      excused: {law or name: reason} of laws that are not meant to hold.
      options: fields of `jaxbn.testing.Subject`, such as epsilon or scope.
      examples: inputs tried for each law with jit and under pmap.
      examples_without_jit: inputs tried in the variants that do not compile, where each takes a hundred times as long.
    """

    # A base class, not a test: pytest must not collect it where a test module imports it by name.
    __test__ = False

    laws: ClassVar[Sequence[Law | str] | None] = None
    strict: ClassVar[bool] = False
    excused: ClassVar[Mapping[Law | str, str]] = {}
    options: ClassVar[Mapping[str, Any]] = {}
    examples: ClassVar[int] = 15
    examples_without_jit: ClassVar[int] = 3
    _subjects: ClassVar[dict[Any, Subject]]

    def __init_subclass__(cls, **keywords: Any):
        super().__init_subclass__(**keywords)
        cls.__test__ = True
        cls._subjects = {}
        if cls.laws is None:
            return
        chosen = {law_named(law).name for law in cls.laws}
        for name in LAWS:
            if name not in chosen:
                cls._leave_out(name)

    @classmethod
    def _leave_out(cls, law: str) -> None:
        # What is not callable is no test: neither a pass nor a skip.
        for test in [attribute for attribute in dir(cls) if attribute.startswith(f"test_{law}__with")]:
            setattr(cls, test, None)

    def make(self) -> Any:
        """What is tested: anything that `jaxbn.testing.check` takes."""
        raise unittest.SkipTest(f"{type(self).__name__} does not say what to test; define make(self).")

    @chex.variants(with_jit=True, without_jit=True, with_device=True, with_pmap=True)
    @parameterized.named_parameters(*((f"_{name}", law) for name, law in LAWS.items()))
    def test(self, law: Law) -> None:
        """Check one law under the variant that is running."""
        kind = self.variant.type
        # chex fails a test that never asks for its variant, and what this one runs may have been compiled by another.
        self.variant(_nothing)
        excuse = {law_named(name): why for name, why in self.excused.items()}.get(law)
        eager = kind in (chex.ChexVariantType.WITHOUT_JIT, chex.ChexVariantType.WITH_DEVICE)
        examples = self.examples_without_jit if eager else self.examples
        result = law.try_on(self._subject(kind), excuse=excuse, examples=examples)
        if result.status == NOT_APPLICABLE:
            self.skipTest(f"{law.name}: {result.detail}")
        if result.status == BROKEN and law.promise and not self.strict and self.laws is None:
            self.skipTest(f"{law.name} is a promise that this layer does not keep: {result.detail}")
        if result.status == BROKEN:
            self.fail(str(result))

    def _subject(self, kind: Any) -> Subject:
        # One for each variant, kept for the whole class: what one law compiled serves the next.
        if kind not in self._subjects:
            self._subjects[kind] = subject_of(self.make(), compiled=self.variant, **self.options)
        return self._subjects[kind]


def _nothing() -> None:
    return None
