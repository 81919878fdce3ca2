"""The normalizers of the literature, each one a `Normalizer`; the cell for `flax.linen.RNN` is in `_lstm_linen`."""

from jaxbn.variants._conditional import conditional_batch_norm
from jaxbn.variants._filter_response import filter_response_norm
from jaxbn.variants._frozen import frozen, keep_at, path_mask, stop_gradient_at
from jaxbn.variants._ghost import ghost_batch_norm
from jaxbn.variants._graph import graph_norm
from jaxbn.variants._group import group_norm
from jaxbn.variants._instance import instance_norm
from jaxbn.variants._inverse_root import inverse_square_root, newton_inverse_square_root
from jaxbn.variants._layer import layer_norm
from jaxbn.variants._lstm import LSTMCarry, RecurrentCell, batch_norm_lstm
from jaxbn.variants._mean_only import mean_only_batch_norm
from jaxbn.variants._noisy import noisy
from jaxbn.variants._observations import running_norm
from jaxbn.variants._predecessors import penalty, renormalize_after_step
from jaxbn.variants._recurrent import recurrent_batch_norm
from jaxbn.variants._renorm import batch_renorm, paper_d_max, paper_r_max
from jaxbn.variants._root_mean_square import rms_norm
from jaxbn.variants._split import split_batch_norm
from jaxbn.variants._stochastic import stochastic_batch_norm
from jaxbn.variants._virtual import virtual_batch_norm
from jaxbn.variants._weight_norm import weight_norm, weight_norm_init, weight_norm_split
from jaxbn.variants._whitening import whitening_norm

__all__ = [
    # Statistics of the batch
    "batch_renorm",
    "ghost_batch_norm",
    "virtual_batch_norm",
    "whitening_norm",
    "conditional_batch_norm",
    "split_batch_norm",
    "stochastic_batch_norm",
    "mean_only_batch_norm",
    "recurrent_batch_norm",
    # Statistics of all batches so far
    "running_norm",
    # Statistics of each graph
    "graph_norm",
    # Statistics of each example
    "layer_norm",
    "instance_norm",
    "group_norm",
    "rms_norm",
    "filter_response_norm",
    # Around a normalizer
    "noisy",
    "frozen",
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
    # Arguments of the above
    "paper_r_max",
    "paper_d_max",
    "inverse_square_root",
    "newton_inverse_square_root",
]
