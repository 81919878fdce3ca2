"""What a checkpoint around a whole network keeps: products and statistics, none of what is elementwise."""

import jax

from jaxbn._measure import STATISTICS

_products = jax.checkpoint_policies.dots_saveable
_statistics = jax.checkpoint_policies.save_only_these_names(STATISTICS)


def dots_and_statistics_saveable(primitive, *avals, **params) -> bool:
    """Policy of `jax.checkpoint`: keep what convolutions, matrix products and the measuring of a batch put out.

    For networks of convolutions (or dense layers), norms and activations::

        jax.checkpoint(network, policy=jaxbn.dots_and_statistics_saveable)

    What a convolution puts out is the input of the norm, which the norm's derivative rule keeps anyway; outputs of the
    norm and of the activation, which the next convolution's derivative would keep, are computed again, one pass over
    the input each, whether the activation is fused or not. `jax.checkpoint_policies.dots_saveable` alone would measure
    the statistics again too: one more pass over the input, and one more collective a layer. Here the four vectors
    [features] that hold them are kept. They bear the name "jaxbn_statistics", for policies of your own.

    In a `jax.lax.scan` over layers put the checkpoint around the body, `prevent_cse=False`, and let the body begin with
    the norm: its input is then both what the loop carries and all that is kept.

    Args:
      primitive: the operation whose outputs might be kept.
      *avals: shapes and dtypes of its inputs.
      **params: of the primitive.

    Returns:
      Whether they are.
    """
    return _products(primitive, *avals, **params) or _statistics(primitive, *avals, **params)
