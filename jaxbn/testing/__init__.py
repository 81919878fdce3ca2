"""The laws of normalization, as checks that anyone can run on any normalizer, module or function x -> y.

    import jaxbn.testing as laws

    laws.check(norm)                                   # all laws that apply; AssertionError with a readable report
    laws.check(jaxbn.batch_norm)                       # a factory: layouts and axis_name too
    laws.check(lambda x: layer(x), laws=[laws.shift_invariance, laws.scale_invariance])

    class MyNormTest(laws.NormalizerTest):             # chex variants: with_jit, without_jit, with_device, with_pmap
        def make(self):
            return my_norm()

    @hypothesis.given(laws.strategies.batches())
    def test_mine(batch): ...

`python -m jaxbn.testing flax.linen.BatchNorm` prints the table of laws for that layer.
"""

try:
    import absl.testing
    import chex
    import hypothesis
except ImportError as error:
    raise ImportError(f'jaxbn.testing needs {error.name}: pip install "jaxbn[testing]"', name=error.name) from error

from jaxbn.testing import adapters, strategies
from jaxbn.testing.case import NormalizerTest
from jaxbn.testing.laws import LAWS, BrokenLawError, Law, agree, law, require
from jaxbn.testing.laws_count import (
    axis_name_equals_concatenation,
    axis_name_gradient,
    axis_name_with_unequal_masks,
    empty_mask_keeps_statistics,
    mask_equals_subset,
    mask_gradient,
    mask_per_feature,
    mask_silences,
    merged_halves,
    pmap_equals_concatenation,
    shard_map_equals_concatenation,
    weights_equal_repetition,
)
from jaxbn.testing.laws_gradient import (
    forward_equals_reverse,
    gradient_matches_differences,
    gradient_matches_float64,
    gradient_orthogonal_to_ones,
    gradient_orthogonal_to_xhat,
    preceding_bias_has_no_gradient,
    running_statistics_get_no_gradient,
    updated_statistics_are_constants,
    weight_gradient_inverse_scale,
    weight_scale_invariance,
)
from jaxbn.testing.laws_precision import (
    backward_stable,
    hard_gradients,
    hard_inputs,
    low_precision_output,
    low_precision_statistics,
    no_retrace,
)
from jaxbn.testing.laws_running import (
    eval_is_affine,
    eval_treats_examples_independently,
    folding_keeps_function,
    running_closed_form,
    statistics_keep_structure,
    train_couples_examples,
    train_ignores_running,
)
from jaxbn.testing.laws_value import (
    affine_last,
    constant_feature,
    dense_equals_convolution,
    epsilon_inside_root,
    layouts_agree,
    permutation_equivariance,
    scale_invariance,
    sets_are_independent,
    shift_invariance,
    unit_variance,
    zero_mean,
)
from jaxbn.testing.report import LawResult, Report, markdown
from jaxbn.testing.runner import check, survey
from jaxbn.testing.scope import BATCH, INSTANCE, LAYER, Scope, ghost, group
from jaxbn.testing.subject import AXIS, Subject
