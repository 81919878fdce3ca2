"""What a layer does not state, read off its outputs: epsilon, running statistics, the rule that they follow.

Everything is read from y, so it works for every library, whatever its state looks like inside.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxbn.testing import _oracle as oracle
from jaxbn.testing._bounds import FLOAT32
from jaxbn.testing._layer import Layer

# Far enough from zero that the slope is free of the mean, near enough that float32 keeps both.
_FAR = 64.0
# A misfit beyond this is no rounding: (n + 8) u times the squares of the values, up to 10, with some room.
_FITS = 2e-4


def read_running(layer: Layer, variables: Any, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    """Running mean and variance, [features] each, as evaluation uses them.

    With scale 1 and bias 0, y = (x - mean) r: from y(0) = -mean r and y(far) - y(-far) = 2 far r. The mean comes with a
    relative error of at most 16 u, var + epsilon with 32 u.
    """
    shape = layer.shapes[0]
    x = np.zeros((int(np.prod(shape[:-1])), shape[-1]), np.float32)
    x[1], x[2] = _FAR, -_FAR
    y = layer.evaluate(x.reshape(shape), variables).reshape(x.shape)
    with np.errstate(divide="ignore", invalid="ignore"):
        r = (y[1] - y[2]) / (2 * _FAR)
        return -y[0] / r, r**-2 - epsilon


def measure_epsilon(layer: Layer) -> float:
    """Epsilon of an output that should be x / sqrt(var + epsilon), by inputs a and -a: epsilon = a^2 / y^2 - a^2.

    Of several sizes a the one at which y^2 is nearest to 1/2 tells most. Returns 0 where y^2 is near 1/2 at none.
    """
    shape = layer.shapes[0]
    # Signs that alternate within every set, whatever the scope.
    values = layer.scope.split(np.empty(shape)).shape
    signs = layer.scope.join(np.where(np.arange(values[0])[:, None] % 2, 1.0, -1.0) * np.ones(values), shape)
    implied = []
    for a in 2.0 ** np.arange(1, -26, -1):
        square = float(np.mean(layer.train((a * signs).astype(np.float32)) ** 2))
        if 0.2 < square < 0.8:
            implied.append((abs(square - 0.5), a * a / square - a * a))
    return _rounded(min(implied)[1]) if implied else 0.0


def _rounded(value: float) -> float:
    """Value to two digits where float32 cannot tell the difference: epsilons are written by hand."""
    short = float(f"{value:.1e}")
    return short if abs(short - value) <= 1e-4 * value else value


def _exponential(decay, start, batches) -> Iterator:
    for batch in batches:
        start = decay * start + (1 - decay) * batch
        yield start


def _debiased(decay, start, batches) -> Iterator:
    weight = 0.0
    for total in zip(_exponential(decay, np.zeros_like(start), batches), strict=True):
        weight = decay * weight + (1 - decay)
        yield total[0] / weight


def _cumulative(decay, start, batches) -> Iterator:
    for steps in range(1, len(batches) + 1):
        yield sum(batches[:steps]) / steps


def _first(decay, start, batches) -> Iterator:
    yield batches[0]
    yield from _exponential(decay, batches[0], batches[1:])


# Of each kind: what is read after each batch, and the decay implied by the means b of the first two batches and the
# readings m before them, after the first and after the second.
RULES: dict[str, tuple[Callable, Callable]] = {
    "exponential": (_exponential, lambda b, m: (m[1] - b[0]) / (m[0] - b[0])),
    "debiased": (_debiased, lambda b, m: (b[1] - m[2]) / (m[2] - b[0])),
    "cumulative": (_cumulative, lambda b, m: np.zeros(())),
    "starting from the first batch": (_first, lambda b, m: (m[2] - b[1]) / (b[0] - b[1])),
}


class Rule(NamedTuple):
    """How running statistics follow the batches.

    Attributes:
      kind: a key of `RULES`.
      decay: new = decay * old + (1 - decay) * batch.
      unbiased: whether batch variances enter as var n / (n - 1).
      start: running (mean, var) before the first batch, [features].
      fits: whether it was found to describe the normalizer at all.
    """

    kind: str
    decay: float
    unbiased: bool
    start: tuple[np.ndarray, np.ndarray]
    fits: bool = True

    def after(self, batches: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Running mean and variance after each of the batches, sets of values [values, features]."""
        moments = [oracle.moments(values) for values in batches]
        bessel = [len(v) / (len(v) - 1) if self.unbiased else 1.0 for v in batches]
        follow = RULES[self.kind][0]
        means = follow(self.decay, self.start[0], [mean for mean, _ in moments])
        variances = follow(self.decay, self.start[1], [var * b for (_, var), b in zip(moments, bessel, strict=True)])
        return list(zip(means, variances, strict=True))


def recognize_rule(
    layer: Layer,
    *,
    epsilon: float,
    decay: float | None = None,
    kind: str | None = None,
    unbiased: bool | None = None,
) -> Rule:
    """The rule that best fits the running statistics after three batches of different mean and variance.

    Args:
      layer: what is measured.
      epsilon: of the layer.
      decay: as stated; None measures it.
      kind: a key of `RULES`, as stated; None tries all.
      unbiased: as stated; None tries both.
    """
    shape = layer.shapes[0]
    pattern = np.where(np.arange(int(np.prod(shape[:-1]))) % 2, 1.0, -1.0).reshape(*shape[:-1], 1)
    batches = [
        np.broadcast_to(mean + deviation * pattern, shape).astype(np.float32)
        for mean, deviation in ((4, 1), (-2, 2), (7, 3))
    ]
    variables = layer.variables(shape)
    readings = [read_running(layer, variables, epsilon)]
    for x in batches:
        variables = {**variables, "batch_stats": layer.run(x, variables=variables)[1]}
        readings.append(read_running(layer, variables, epsilon))
    means = [float(mean[0]) for mean, _ in readings]
    kinds = list(RULES) if kind is None else [kind]
    flavours = (False, True) if unbiased is None else (unbiased,)
    candidates = [
        Rule(kind, _implied_decay(kind, batches, means) if decay is None else decay, unbiased, readings[0])
        for kind in kinds
        for unbiased in flavours
    ]
    sets = [layer.scope.split(x) for x in batches]
    best = min(candidates, key=lambda rule: _misfit(rule, sets, readings[1:]))
    return best._replace(fits=_misfit(best, sets, readings[1:]) <= _FITS)


def _implied_decay(kind: str, batches: Sequence[np.ndarray], means: Sequence[float]) -> float:
    with np.errstate(divide="ignore", invalid="ignore"):
        decay = float(RULES[kind][1]([np.float64(x.mean()) for x in batches[:2]], np.asarray(means)))
    short = round(decay, 4) if np.isfinite(decay) else 0.0
    # Written by hand, so it has few digits; the readings are good to a millionth.
    return short if not np.isfinite(decay) or abs(short - decay) < 16 * FLOAT32 * 8 else decay


def _misfit(rule, sets, readings) -> float:
    with np.errstate(all="ignore"):
        gaps = [
            np.max(np.abs(np.subtract(expected, got)) / (1 + np.abs(expected)))
            for expected, got in zip(rule.after(sets), readings, strict=True)
        ]
    worst = max(gaps) if np.all(np.isfinite(gaps)) else np.inf
    # All that fit are equal, so that the first of them is taken; NaN fits nothing.
    return worst if worst > _FITS else 0.0
