"""Ghost batch normalization: small batches' noise in a large batch."""

from typing import Any

from jaxbn._batch_norm import batch_norm
from jaxbn._factory import normalizer_factory
from jaxbn._normalizer import Normalizer


@normalizer_factory(options_of=batch_norm)
def ghost_batch_norm(group_size: int = 128, **options: Any) -> Normalizer:
    """Ghost batch normalization (Hoffer, Hubara and Soudry 2017, algorithm 1): normalize each group of examples alone.

    The paper moves its running statistics once per ghost batch, one after the other; here they move once per batch,
    by the moments of all ghost batches pooled, which are exactly those of the whole batch.

    Args:
      group_size: examples a ghost batch, the paper's 128; it has to divide the batch.
      **options: of `batch_norm`.

    Returns:
      A Normalizer with params {"scale", "bias"} and batch_stats {"mean", "var"}.

    Raises:
      ValueError: as `batch_norm`; from apply, a group_size that does not divide the batch.
    """
    return batch_norm(group_size=group_size, **options)
