"""The laws as an absl test case: collected, run under each variant, skipped and failed with the reason."""

import unittest

from planted_defects import EmptyFeaturesMoved, EpsilonTwice
from textbook import factory

import jaxbn
import jaxbn.testing as laws


class BatchNormTest(laws.NormalizerTest):
    """A subclass as a user writes it, collected with this module; a few laws, since each variant compiles its own."""

    laws = (laws.zero_mean, "no_retrace")
    examples, examples_without_jit = 5, 2
    options = {"ranks": (2,)}  # noqa: RUF012  (as a user would write it)

    def make(self):
        return jaxbn.batch_norm()


def outcomes(case, *names):
    """Run a case's tests whose names contain one of `names`; {name: "ok", or why it was skipped or failed}."""
    result = unittest.TestResult()
    suite = unittest.defaultTestLoader.loadTestsFromTestCase(case)
    chosen = [test for test in suite if any(name in test.id() for name in names)]
    for test in chosen:
        test(result)
    reasons = {test.id(): why for test, why in (*result.skipped, *result.failures, *result.errors)}
    return {test.id().rsplit(".", 1)[1]: reasons.get(test.id(), "ok") for test in chosen}


def count(case):
    return unittest.defaultTestLoader.loadTestsFromTestCase(case).countTestCases()


def test_there_is_one_test_for_each_law_and_variant():
    class Everything(laws.NormalizerTest):
        pass

    assert count(Everything) == 4 * len(laws.LAWS)
    assert count(BatchNormTest) == 4 * len(BatchNormTest.laws)


def test_base_class_is_not_collected_but_its_subclasses_are():
    assert not laws.NormalizerTest.__test__
    assert BatchNormTest.__test__


def test_case_without_make_skips_with_the_remedy():
    class Forgotten(laws.NormalizerTest):
        pass

    (why,) = set(outcomes(Forgotten, "zero_mean").values())
    assert "define make" in why


def test_broken_law_fails_with_the_whole_report():
    class Broken(laws.NormalizerTest):
        def make(self):
            return factory(EpsilonTwice)

    (why,) = outcomes(Broken, "epsilon_inside_root__with_jit").values()
    for part in ("epsilon_inside_root is broken", "smallest failing input", "expected", "got", "bound"):
        assert part in why


def test_law_that_does_not_apply_is_skipped_with_the_reason():
    class Function(laws.NormalizerTest):
        def make(self):
            return lambda x: (x - x.mean(0)) / x.std(0)

    (why,) = outcomes(Function, "running_closed_form__with_jit").values()
    assert "needs running statistics" in why


def test_excused_law_is_skipped_with_the_reason():
    class Excused(laws.NormalizerTest):
        excused = {"empty_mask_keeps_statistics": "planted"}  # noqa: RUF012  (as a user would write it)

        def make(self):
            return factory(EmptyFeaturesMoved)

    (why,) = outcomes(Excused, "empty_mask_keeps_statistics__with_jit").values()
    assert "planted" in why


def test_other_variants_catch_a_defect_too():
    class Broken(laws.NormalizerTest):
        def make(self):
            return factory(EpsilonTwice)

    found = outcomes(Broken, "epsilon_inside_root__without_jit", "epsilon_inside_root__with_device")
    assert len(found) == 2
    assert all("epsilon_inside_root is broken" in why for why in found.values())


def test_options_reach_the_subject():
    class Stated(laws.NormalizerTest):
        options = {"epsilon": 1e-3}  # noqa: RUF012

        def make(self):
            return jaxbn.batch_norm(epsilon=1e-5)

    (why,) = outcomes(Stated, "epsilon_inside_root__with_jit").values()
    assert "is broken" in why
