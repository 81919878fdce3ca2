"""Batch normalization for JAX: exact statistics, explicit state, any number of devices."""

from jaxbn.batch_norm import batch_norm
from jaxbn.fold import Following, Preceding, fold_following, fold_preceding, fold_variables, unfold, unfold_variables
from jaxbn.moments import Moments, merge_moments, moments
from jaxbn.normalize import batch_normalize, normalize
from jaxbn.normalizer import Normalizer, identity
from jaxbn.population import input_moments, population_statistics
from jaxbn.recording import recordable
from jaxbn.running import init_batch_stats, running_moments, update_batch_stats

__all__ = [
    # The type that every variant fits
    "Normalizer",
    # Variants
    "batch_norm",
    "identity",
    # Statistics of a batch
    "Moments",
    "moments",
    "merge_moments",
    # Normalization
    "batch_normalize",
    "normalize",
    # Running statistics
    "init_batch_stats",
    "update_batch_stats",
    "running_moments",
    # Statistics of a data set, for a trained network
    "population_statistics",
    "input_moments",
    "recordable",
    # To and from the plain affine map
    "fold_variables",
    "fold_preceding",
    "fold_following",
    "Preceding",
    "Following",
    "unfold_variables",
    "unfold",
]
