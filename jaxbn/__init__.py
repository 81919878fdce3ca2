"""Batch normalization for JAX: exact statistics, explicit state, any number of devices.

    norm = jaxbn.batch_norm(decay=0.99)
    variables = norm.init(jax.random.key(0), x)
    y, batch_stats = norm.apply(variables, x, train=True)

The type that every normalizer has: Normalizer; for a factory of your own: normalizer_factory

Normalizers
  by statistics of the batch: batch_norm, batch_renorm, ghost_batch_norm, virtual_batch_norm, whitening_norm,
    conditional_batch_norm, split_batch_norm, stochastic_batch_norm, mean_only_batch_norm, recurrent_batch_norm
  by statistics of all batches so far: running_norm; of each graph or packed sequence: graph_norm
  by statistics of each example: layer_norm, instance_norm, group_norm, rms_norm, filter_response_norm
  without statistics, and around a normalizer: identity, noisy, frozen
  their arguments: paper_r_max, paper_d_max, inverse_square_root, newton_inverse_square_root

Parts of batch norm
  measuring: Moments, moments, merge_moments
  normalizing: batch_normalize, normalize
  running statistics: init_batch_stats, update_batch_stats, running_moments
  of microbatches, of several networks, of few new examples: start_pooling, finish_pooling, merge_batch_stats, blend
  what a checkpoint around a network keeps: dots_and_statistics_saveable

A trained network
  statistics of a data set: population_statistics, input_moments, recordable
  folding into a neighbouring layer: fold_variables, fold_preceding, fold_following, Preceding, Following
  inserting without an effect: unfold_variables, unfold
  fine-tuning by path: path_mask, stop_gradient_at, keep_at; without weight decay on norms: decay_mask
  what to cite: citation

Beside batch norm
  recurrent networks: batch_norm_lstm, RecurrentCell, LSTMCarry
  weight normalization: weight_norm, weight_norm_split, weight_norm_init
  what batch norm replaced: penalty, renormalize_after_step

Modules, imported when first used: jaxbn.linen and jaxbn.nnx (Flax layers), jaxbn.training (train steps),
jaxbn.convert (torch, Keras, Haiku), jaxbn.diagnostics, jaxbn.testing (laws of a normalizer), jaxbn.variants; and for
other libraries jaxbn.equinox, jaxbn.haiku.

`help(jaxbn.batch_norm)` and the like give arguments, shapes, errors and sources.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from jaxbn._batch_norm import batch_norm as batch_norm
from jaxbn._blend import blend as blend
from jaxbn._citation import citation as citation
from jaxbn._decay_mask import decay_mask as decay_mask
from jaxbn._factory import normalizer_factory as normalizer_factory
from jaxbn._fold import Following as Following
from jaxbn._fold import Preceding as Preceding
from jaxbn._fold import fold_following as fold_following
from jaxbn._fold import fold_preceding as fold_preceding
from jaxbn._fold import fold_variables as fold_variables
from jaxbn._fold import unfold as unfold
from jaxbn._fold import unfold_variables as unfold_variables
from jaxbn._merge_stats import merge_batch_stats as merge_batch_stats
from jaxbn._moments import Moments as Moments
from jaxbn._moments import merge_moments as merge_moments
from jaxbn._moments_of import moments as moments
from jaxbn._normalize import batch_normalize as batch_normalize
from jaxbn._normalize import normalize as normalize
from jaxbn._normalizer import Normalizer as Normalizer
from jaxbn._normalizer import identity as identity
from jaxbn._population import input_moments as input_moments
from jaxbn._population import population_statistics as population_statistics
from jaxbn._recording import finish_pooling as finish_pooling
from jaxbn._recording import recordable as recordable
from jaxbn._recording import start_pooling as start_pooling
from jaxbn._remat import dots_and_statistics_saveable as dots_and_statistics_saveable
from jaxbn._running import init_batch_stats as init_batch_stats
from jaxbn._running import running_moments as running_moments
from jaxbn._running import update_batch_stats as update_batch_stats
from jaxbn.variants import LSTMCarry as LSTMCarry
from jaxbn.variants import RecurrentCell as RecurrentCell
from jaxbn.variants import batch_norm_lstm as batch_norm_lstm
from jaxbn.variants import batch_renorm as batch_renorm
from jaxbn.variants import conditional_batch_norm as conditional_batch_norm
from jaxbn.variants import filter_response_norm as filter_response_norm
from jaxbn.variants import frozen as frozen
from jaxbn.variants import ghost_batch_norm as ghost_batch_norm
from jaxbn.variants import graph_norm as graph_norm
from jaxbn.variants import group_norm as group_norm
from jaxbn.variants import instance_norm as instance_norm
from jaxbn.variants import inverse_square_root as inverse_square_root
from jaxbn.variants import keep_at as keep_at
from jaxbn.variants import layer_norm as layer_norm
from jaxbn.variants import mean_only_batch_norm as mean_only_batch_norm
from jaxbn.variants import newton_inverse_square_root as newton_inverse_square_root
from jaxbn.variants import noisy as noisy
from jaxbn.variants import paper_d_max as paper_d_max
from jaxbn.variants import paper_r_max as paper_r_max
from jaxbn.variants import path_mask as path_mask
from jaxbn.variants import penalty as penalty
from jaxbn.variants import recurrent_batch_norm as recurrent_batch_norm
from jaxbn.variants import renormalize_after_step as renormalize_after_step
from jaxbn.variants import rms_norm as rms_norm
from jaxbn.variants import running_norm as running_norm
from jaxbn.variants import split_batch_norm as split_batch_norm
from jaxbn.variants import stochastic_batch_norm as stochastic_batch_norm
from jaxbn.variants import stop_gradient_at as stop_gradient_at
from jaxbn.variants import virtual_batch_norm as virtual_batch_norm
from jaxbn.variants import weight_norm as weight_norm
from jaxbn.variants import weight_norm_init as weight_norm_init
from jaxbn.variants import weight_norm_split as weight_norm_split
from jaxbn.variants import whitening_norm as whitening_norm

if TYPE_CHECKING:
    from jaxbn import convert as convert
    from jaxbn import diagnostics as diagnostics
    from jaxbn import equinox as equinox
    from jaxbn import haiku as haiku
    from jaxbn import linen as linen
    from jaxbn import nnx as nnx
    from jaxbn import testing as testing
    from jaxbn import training as training
    from jaxbn import variants as variants

    __version__: str

# Names are exported as `X as X` and not by `__all__`, with which `help(jaxbn)` would print every docstring in full.
_MODULES = ("convert", "diagnostics", "equinox", "haiku", "linen", "nnx", "testing", "training", "variants")


def __getattr__(name: str) -> Any:
    # Flax, optax and hypothesis take seconds to import, and not everybody needs them.
    if name == "__version__":
        return importlib.metadata.version("jaxbn")
    if name not in _MODULES:
        raise AttributeError(f"module 'jaxbn' has no attribute {name!r}")
    try:
        return importlib.import_module(f"jaxbn.{name}")
    except ImportError as error:  # An AttributeError, so that hasattr and help work where an extra is not installed.
        raise AttributeError(f"jaxbn.{name} cannot be imported: {error}") from error


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, "__version__"})
