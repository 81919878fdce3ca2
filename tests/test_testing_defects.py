"""The laws themselves: each defect is caught by the laws made for it, and by no other where that makes sense."""

import functools

import planted_defects
import pytest
from textbook import Textbook, factory

import jaxbn.testing as laws

# What compares with float64, so that hardly any wrong value escapes it.
ORACLES = {
    "epsilon_inside_root",
    "mask_per_feature",
    "gradient_matches_float64",
    "backward_stable",
    "hard_inputs",
    "hard_gradients",
    "low_precision_output",
}
SHARDS = {"axis_name_equals_concatenation", "pmap_equals_concatenation", "shard_map_equals_concatenation"}
MASKS = {"mask_equals_subset", "mask_per_feature", "mask_gradient"}
# Both evaluate with what a step of training has left, and so see what is wrong there too: the second holds the values
# against the closed form, the first against those of training.
EVALUATION = {"evaluation_equals_training", "evaluation_closed_form"}
CLOSED_FORM = {"evaluation_closed_form"}
ANY = set(laws.LAWS)

# {defect: (laws that must catch it, laws that may besides)}; an empty second entry says that no other law minds.
DEFECTS: dict[str, tuple[set[str], set[str]]] = {
    # Statistics of the batch
    "UnbiasedInTheOutput": ({"unit_variance", "merged_halves"}, ORACLES | CLOSED_FORM | {"running_closed_form"}),
    "UnbiasedInTheRunningVariance": ({"running_closed_form"}, EVALUATION),
    "Cancelling": ({"backward_stable", "hard_inputs", "hard_gradients", "far_constant_feature"}, set()),
    "CancellingToNaN": ({"backward_stable", "hard_inputs", "hard_gradients", "far_constant_feature"}, set()),
    "TwoPassWithARoundedMean": ({"hard_inputs"}, {"hard_gradients"}),
    "StatisticsInBfloat16": ({"hard_inputs", "backward_stable", "gradient_orthogonal_to_ones"}, ANY),
    "NarrowInside": ({"low_precision_output", "low_precision_statistics"}, set()),
    # Epsilon
    "EpsilonOutsideTheRoot": (
        {"epsilon_inside_root"},
        ORACLES | CLOSED_FORM | {"scale_invariance", "running_closed_form"},
    ),
    "EpsilonMissing": ({"epsilon_inside_root", "constant_feature"}, ANY),
    "EpsilonTwice": ({"epsilon_inside_root"}, ORACLES | CLOSED_FORM | {"unit_variance", "scale_invariance"}),
    # Gradients
    "StopGradientOnTheMean": (
        {"gradient_orthogonal_to_ones", "preceding_bias_has_no_gradient", "gradient_matches_differences"},
        {"gradient_matches_float64", "hard_gradients"},
    ),
    "StopGradientOnTheVariance": (
        {"gradient_orthogonal_to_xhat", "gradient_matches_differences"},
        {"gradient_matches_float64", "hard_gradients"},
    ),
    "RunningStatisticsGetGradients": ({"running_statistics_get_no_gradient"}, set()),
    "UpdateLeaksGradients": ({"updated_statistics_are_constants"}, set()),
    "NoForwardMode": ({"forward_mode_exists"}, set()),
    # Its linear_call cannot be mapped over shards at all.
    "ForwardModeOff": ({"forward_equals_reverse"}, {"axis_name_gradient"}),
    "WeightGradientNotRescaled": (
        {"weight_gradient_inverse_scale", "gradient_matches_float64"},
        ORACLES | {"gradient_matches_differences"},
    ),
    # Shards
    "ShardGradientAveraged": ({"axis_name_gradient"}, set()),
    "AveragedVariances": (SHARDS, {"axis_name_with_unequal_masks", "axis_name_gradient"}),
    "AveragedMoments": ({"axis_name_with_unequal_masks"}, set()),
    "ShardsKeptApart": (SHARDS, {"axis_name_with_unequal_masks", "axis_name_gradient"}),
    # Masks and weights
    "MaskIgnored": (
        MASKS | {"mask_silences"},
        {"empty_mask_keeps_statistics", "weights_equal_repetition", "axis_name_with_unequal_masks"},
    ),
    "MaskIgnoredInTheCount": (MASKS, {"weights_equal_repetition", "axis_name_with_unequal_masks"}),
    "MaskSubtracted": ({"mask_silences"}, {"mask_equals_subset", "mask_gradient", "empty_mask_keeps_statistics"}),
    "PaddingInTheGradient": ({"mask_silences"}, set()),
    "WeightsAsMask": ({"weights_equal_repetition"}, set()),
    "EmptyFeaturesMoved": ({"empty_mask_keeps_statistics"}, set()),
    # Running statistics
    "DecayAndMomentumSwapped": ({"running_closed_form"}, set()),
    "StandardDeviationsAveraged": ({"running_closed_form"}, set()),
    "EvaluatesWithTheBatch": (
        {"eval_is_affine", "eval_treats_examples_independently", "folding_keeps_function", "evaluation_closed_form"},
        {"running_closed_form"},
    ),
    "TrainsWithTheRunningVariance": ({"train_ignores_running", "scale_invariance", "weight_scale_invariance"}, ANY),
    "TrainsAsItEvaluates": ({"train_couples_examples", "shift_invariance"}, ANY),
    "SwitchesTiedTogether": ({"switches_are_independent"}, set()),
    "StatisticsChangeDtype": ({"statistics_keep_structure", "no_retrace"}, EVALUATION | {"running_closed_form"}),
    "StartsFromWeakTypes": ({"no_retrace"}, set()),
    # At test time
    "EvaluationForgetsTheScale": (EVALUATION, set()),
    "EvaluationForgetsTheBias": (EVALUATION, set()),
    "EvaluationForgetsEpsilon": (EVALUATION, set()),
    "EvaluationAlongTheWrongAxisOfImages": ({"evaluation_closed_form"}, {"layouts_agree"}),
    "ChannelsFirstEvaluatedLast": ({"layouts_agree"}, set()),
    # Which values go together
    "WrongAxisForImages": ({"layouts_agree", "dense_equals_convolution", "sets_are_independent"}, ANY),
    "ChannelsFirstIgnored": ({"layouts_agree"}, set()),
    "AllFeaturesTogether": ({"zero_mean", "sets_are_independent"}, ANY),
    # Of two examples a position makes one +1 and one -1, whatever they are.
    "EachPositionByItself": (
        {"dense_equals_convolution"},
        ORACLES | CLOSED_FORM | {"scale_invariance", "unit_variance", "train_couples_examples"},
    ),
    "FirstExampleLeftOut": ({"permutation_equivariance", "zero_mean"}, ANY),
    # Scale and bias
    "ScaleBeforeTheMean": (
        {"affine_last"},
        ORACLES | {"evaluation_equals_training", "constant_feature", "far_constant_feature"},
    ),
    "BiasBeforeTheScale": ({"affine_last"}, CLOSED_FORM | {"gradient_matches_float64"}),
}


def kinds():
    """Every planted defect, by name."""
    found = [kind for kind in vars(planted_defects).values() if isinstance(kind, type) and kind is not Textbook]
    return {kind.__name__: kind for kind in found}


@functools.cache
def defective(name):
    return laws.adapters.subject_of(factory(kinds()[name]), name=name)


def broken_by(name, chosen, examples):
    report = laws.survey(defective(name), sorted(chosen), examples=examples, shrink=False)
    return {outcome.law.name for outcome in report.broken}


def test_every_planted_defect_is_in_the_table():
    assert set(kinds()) == set(DEFECTS)


def test_every_law_has_a_defect_that_it_must_catch():
    assert set().union(*(must for must, _ in DEFECTS.values())) >= set(laws.LAWS)


@pytest.mark.slow
def test_the_textbook_keeps_every_law():
    laws.check(factory(Textbook), strict=True)


@pytest.mark.parametrize("name", DEFECTS)
def test_defect_is_caught(name):
    must, _ = DEFECTS[name]
    assert broken_by(name, must, examples=25) == must


@pytest.mark.slow
@pytest.mark.parametrize("name", DEFECTS)
def test_no_other_law_minds(name):
    must, may = DEFECTS[name]
    assert broken_by(name, ANY - must - may, examples=25) == set()
