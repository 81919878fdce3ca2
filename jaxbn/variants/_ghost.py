"""Ghost batch normalization: small batches' noise in a large batch."""

from typing import Any

from jaxbn._batch_norm import batch_norm
from jaxbn._factory import normalizer_factory
from jaxbn._normalizer import Normalizer


@normalizer_factory(options_of=batch_norm)
def ghost_batch_norm(group_size: int = 128, *, shuffle: bool = False, **options: Any) -> Normalizer:
    """Ghost batch normalization (Hoffer, Hubara and Soudry 2017, algorithm 1): normalize each group of examples alone.

    The paper moves its running statistics once per ghost batch, one after the other; here they move once per batch,
    by the moments of all ghost batches pooled, which are exactly those of the whole batch.

    Shuffled, a ghost batch is no run of neighbours but drawn at random, over all devices with `axis_name`, and y comes
    back in the order of x. Contrastive learning needs that where an example and its positive are neighbours, on one
    device: their common statistics would give the pair away (He et al. 2020, Momentum Contrast, section 3.3, "Shuffling
    BN"). There examples travel between devices; here only the statistics of the ghost batches do.

    Args:
      group_size: examples a ghost batch, the paper's 128; it has to divide the batch, shuffled that of all devices.
      shuffle: draw the ghost batches anew with each `rng` that `apply` is given, which training then needs.
      **options: of `batch_norm`.

    Returns:
      A Normalizer with params {"scale", "bias"} and batch_stats {"mean", "var"}.

    Raises:
      ValueError: as `batch_norm`; from apply, a group_size that does not divide the batch, or no rng to shuffle by.
    """
    return batch_norm(group_size=group_size, shuffle=shuffle, **options)
