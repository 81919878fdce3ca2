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

`python -m jaxbn.testing flax.linen.BatchNorm` prints the table of laws for that layer. The README beside this file says
what the laws are for and what the command takes.

Files, in an order in which each imports only from those before it:

    _scope, _oracle, _bounds      which values go together; the exact answer in float64; what rounding may cost
    strategies, _agree            inputs to try; comparing
    _layer, _measure, _subject    running a layer; reading off what it does not state; what it should compute
    _signatures, _resolve, _calls what constructors and calls take; import paths; names of modes and masks
    _coupling                     which values a layer normalizes together
    _adapt_functions, _adapt_flax, _adapt_haiku, _adapt_equinox, _adapt_torch, adapters
                                  layers of each library as subjects
    _law                          what a law is and how it is tried
    _laws_value, _laws_running, _laws_evaluation, _laws_masks, _laws_shards, _laws_gradient, _laws_precision
                                  the laws
    _report, _check, _case        what was found; checking all laws; the absl test case
    _table, __main__              the table in the README; the command
"""

try:
    import absl.testing
    import chex
    import hypothesis
except ImportError as error:
    raise ImportError(f'jaxbn.testing needs {error.name}: pip install "jaxbn[testing]"', name=error.name) from error

# ruff: noqa: I001  (laws are listed in the order in which these files are imported)
from jaxbn.testing import adapters, strategies
from jaxbn.testing._laws_value import (
    affine_last,
    constant_feature,
    dense_equals_convolution,
    epsilon_inside_root,
    far_constant_feature,
    layouts_agree,
    permutation_equivariance,
    scale_invariance,
    sets_are_independent,
    shift_invariance,
    unit_variance,
    zero_mean,
)
from jaxbn.testing._laws_running import (
    eval_is_affine,
    eval_treats_examples_independently,
    folding_keeps_function,
    running_closed_form,
    statistics_keep_structure,
    switches_are_independent,
    train_couples_examples,
    train_ignores_running,
)
from jaxbn.testing._laws_evaluation import evaluation_closed_form, evaluation_equals_training
from jaxbn.testing._laws_masks import (
    empty_mask_keeps_statistics,
    mask_equals_subset,
    mask_gradient,
    mask_per_feature,
    mask_silences,
    weights_equal_repetition,
)
from jaxbn.testing._laws_shards import (
    axis_name_equals_concatenation,
    axis_name_gradient,
    axis_name_with_unequal_masks,
    merged_halves,
    pmap_equals_concatenation,
    shard_map_equals_concatenation,
)
from jaxbn.testing._laws_gradient import (
    forward_equals_reverse,
    forward_mode_exists,
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
from jaxbn.testing._laws_precision import (
    backward_stable,
    hard_gradients,
    hard_inputs,
    low_precision_output,
    low_precision_statistics,
    no_retrace,
)
from jaxbn.testing._agree import BrokenLawError, agree, require
from jaxbn.testing._case import NormalizerTest
from jaxbn.testing._check import check, survey
from jaxbn.testing._law import LAWS, Law, LawResult, law
from jaxbn.testing._layer import AXIS
from jaxbn.testing._report import Report, markdown
from jaxbn.testing._scope import BATCH, EXAMPLE, INSTANCE, LAYER, Scope, ghost, group
from jaxbn.testing._subject import Subject
