"""Batch normalization for JAX: exact statistics, explicit state, any number of devices."""

from jaxbn._batch_norm import batch_norm
from jaxbn._factory import normalizer_factory
from jaxbn._fold import Following, Preceding, fold_following, fold_preceding, fold_variables, unfold, unfold_variables
from jaxbn._moments import Moments, merge_moments, moments
from jaxbn._normalize import batch_normalize, normalize
from jaxbn._normalizer import Normalizer, identity
from jaxbn._population import input_moments, population_statistics
from jaxbn._recording import recordable
from jaxbn._remat import dots_and_statistics_saveable
from jaxbn._running import init_batch_stats, running_moments, update_batch_stats
from jaxbn.variants import (
    LSTMCarry,
    RecurrentCell,
    batch_norm_lstm,
    batch_renorm,
    conditional_batch_norm,
    filter_response_norm,
    frozen,
    ghost_batch_norm,
    group_norm,
    instance_norm,
    inverse_square_root,
    keep_at,
    layer_norm,
    mean_only_batch_norm,
    newton_inverse_square_root,
    noisy,
    paper_d_max,
    paper_r_max,
    path_mask,
    penalty,
    recurrent_batch_norm,
    renormalize_after_step,
    rms_norm,
    split_batch_norm,
    stochastic_batch_norm,
    stop_gradient_at,
    virtual_batch_norm,
    weight_norm,
    weight_norm_init,
    weight_norm_split,
    whitening_norm,
)

__all__ = [
    # The type that every variant fits
    "Normalizer",
    "normalizer_factory",
    # Statistics of the batch
    "batch_norm",
    "batch_renorm",
    "ghost_batch_norm",
    "virtual_batch_norm",
    "whitening_norm",
    "conditional_batch_norm",
    "split_batch_norm",
    "stochastic_batch_norm",
    "mean_only_batch_norm",
    "recurrent_batch_norm",
    # Statistics of each example
    "layer_norm",
    "instance_norm",
    "group_norm",
    "rms_norm",
    "filter_response_norm",
    # No statistics, and around a normalizer
    "identity",
    "noisy",
    "frozen",
    # Arguments of these
    "paper_r_max",
    "paper_d_max",
    "inverse_square_root",
    "newton_inverse_square_root",
    # Fine-tuning by path
    "path_mask",
    "stop_gradient_at",
    "keep_at",
    # Recurrent networks
    "batch_norm_lstm",
    "RecurrentCell",
    "LSTMCarry",
    # Weight normalization
    "weight_norm",
    "weight_norm_split",
    "weight_norm_init",
    # What batch norm replaced
    "penalty",
    "renormalize_after_step",
    # Measuring a batch
    "Moments",
    "moments",
    "merge_moments",
    # Normalization
    "batch_normalize",
    "normalize",
    # What a checkpoint around a network keeps
    "dots_and_statistics_saveable",
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
