"""Batch normalization for JAX: exact statistics, explicit state, any number of devices."""

from jaxbn.batch_norm import batch_norm
from jaxbn.moments import Moments, merge_moments, moments
from jaxbn.normalize import batch_normalize, normalize
from jaxbn.normalizer import Normalizer, identity
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
]
