"""How Gaussian are the units of a layer: skewness, excess kurtosis and a test of normality.

None of these depends on a unit's mean and scale: they are the same before and after it is normalized.
"""

import jax.numpy as jnp
from jax import Array

LEVEL = 0.05  # of the test: so many of the units that are Gaussian fail it
CONSTANT = 1e-5  # a unit whose deviation is less than this share of its size differs by rounding only


def moments(z: Array) -> tuple[Array, Array]:
    """Skewness `m3 / m2^1.5` and excess kurtosis `m4 / m2^2 - 3` of each unit, nan if it is constant.

    Those of `scipy.stats.skew` and `scipy.stats.kurtosis`, with m_k the mean of (z - mean)^k.

    Args:
      z: [..., samples, units].

    Returns:
      Two arrays [..., units].
    """
    deviation = z - z.mean(-2, keepdims=True)
    m2, m3, m4 = ((deviation**k).mean(-2) for k in (2, 3, 4))
    m2 = jnp.where(m2 > CONSTANT**2 * (z**2).mean(-2), m2, jnp.nan)
    return m3 / m2**1.5, m4 / m2**2 - 3


def jarque_bera_p_value(skewness: Array, kurtosis: Array, samples: int) -> Array:
    """P value of the test of Jarque and Bera, that of `scipy.stats.jarque_bera`.

    Its statistic `samples / 6 * (skewness^2 + kurtosis^2 / 4)` has for Gaussian samples a chi-squared distribution
    with two degrees of freedom, which exceeds s with probability exp(-s / 2).
    """
    return jnp.exp(-samples / 12 * (skewness**2 + kurtosis**2 / 4))


def summary(z: Array) -> dict[str, Array]:
    """What is usual in a layer; constant units are left out.

    Args:
      z: [..., samples, units].

    Returns:
      "skewness" and "excess kurtosis", medians over the units of their sizes; "passes the test", the share of the
      units that pass for Gaussian. All [...], nan where all units are constant.
    """
    skewness, kurtosis = moments(z)
    known = ~jnp.isnan(skewness)
    passes = known & (jarque_bera_p_value(skewness, kurtosis, z.shape[-2]) > LEVEL)
    return {
        "skewness": jnp.nanmedian(jnp.abs(skewness), -1),
        "excess kurtosis": jnp.nanmedian(jnp.abs(kurtosis), -1),
        "passes the test": passes.sum(-1) / known.sum(-1),
    }
