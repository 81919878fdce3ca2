"""A layer with what it should compute: what its maker stated, what was measured, and float64 to compare with."""

import functools
import math
from dataclasses import dataclass

import numpy as np

from jaxbn.testing import _bounds as bounds
from jaxbn.testing import _oracle as oracle
from jaxbn.testing._agree import LawDoesNotApplyError
from jaxbn.testing._layer import Layer
from jaxbn.testing._measure import Rule, measure_epsilon, read_running, recognize_rule

# What may be left of the first running statistics after settling: far below float32's resolution.
_LEFT = 2.0**-40
# More steps than this would take minutes.
_LONGEST = 2**17


@dataclass(eq=False)
class Subject(Layer):
    """What laws are checked on: a `Layer`, its hyperparameters and its exact answers.

    Attributes:
      epsilon: as stated by its maker; None is measured.
      decay: of the running statistics, new = decay * old + (1 - decay) * batch; None is measured.
      rule: how the running statistics start and are read, a key of `jaxbn.testing._measure.RULES`; None is measured.
      unbiased: whether the running variance is the unbiased one; None is measured.
      scope_source: where the scope comes from, for reports: "stated", "inferred" or "" (taken for granted).
    """

    epsilon: float | None = None
    decay: float | None = None
    rule: str | None = None
    unbiased: bool | None = None
    scope_source: str = ""

    @property
    def eps(self) -> float:
        """Epsilon as stated, else as measured."""
        return self.measured_epsilon if self.epsilon is None else self.epsilon

    @functools.cached_property
    def measured_epsilon(self) -> float:
        """Epsilon as its outputs imply it."""
        return measure_epsilon(self)

    @functools.cached_property
    def running(self) -> Rule:
        """The rule that its running statistics follow."""
        return recognize_rule(self, epsilon=self.eps, decay=self.decay, kind=self.rule, unbiased=self.unbiased)

    @functools.cached_property
    def settling_steps(self) -> int:
        """Training steps on one batch after which the running statistics are that batch's, whatever they were.

        Raises:
          LawDoesNotApplyError: the decay is not known, or so near 1 that a check would take minutes.
        """
        if self.running.kind == "cumulative" and self.running.fits:
            return 1
        if not 0 <= self.settling_decay < 1:
            raise LawDoesNotApplyError("needs running statistics whose decay is known")
        steps = 1 if self.settling_decay == 0 else math.ceil(math.log(_LEFT) / math.log(self.settling_decay))
        if steps > _LONGEST:
            raise LawDoesNotApplyError(f"running statistics with decay {self.settling_decay:g} need {steps} steps")
        return steps

    @property
    def settling_decay(self) -> float:
        """The decay as stated, else as measured; 0 for the average of all batches."""
        return self.running.decay if self.decay is None else self.decay

    @functools.cached_property
    def settled_unbiased(self) -> bool:
        """Whether the settled running variance is unbiased: as stated, as the rule says, or as evaluation shows."""
        if self.unbiased is not None or self.running.fits:
            return self.running.unbiased
        shape = self.shapes[0]
        signs = np.where(np.arange(int(np.prod(shape[:-1]))) % 2, 1.0, -1.0).reshape(*shape[:-1], 1)
        x = np.broadcast_to(signs, shape).astype(np.float32)
        n = self.scope.size(shape)
        variables = self.settled(x, self.settling_steps, self.variables(shape))
        var = read_running(self, variables, self.eps)[1]
        return bool(abs(np.mean(var) - n / (n - 1)) < abs(np.mean(var) - 1))

    def standardized(self, x: np.ndarray, weights: np.ndarray | None = None) -> oracle.Standardized:
        """Standardize x in float64."""
        return oracle.standardize(x, self.scope, self.eps, weights)

    def exact(self, x: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """Normalized x in float64, before scale and bias."""
        return oracle.normalize(x, self.scope, self.eps, weights)

    def output_bound(self, x: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """`bounds.output` for x."""
        return bounds.output(x, self.scope, self.eps, weights)

    def gradient_bound(self, x: np.ndarray, g: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """`bounds.gradient` for x and g = scale dy."""
        return bounds.gradient(x, g, self.scope, self.eps, weights)

    def facts(self) -> str:
        """What was stated, inferred or measured of it, in a line."""
        scope = f"scope {self.scope.name}" + (f" ({self.scope_source})" if self.scope_source else "")
        parts = [scope, f"epsilon {self.eps:g} ({'measured' if self.epsilon is None else 'stated'})"]
        if not {"running", "batch", "test mode"} & set(self.missing):
            parts.append(self._rule_in_words())
        if "test mode" in self.lacks and "running" not in self.missing:
            parts.append(self.lacks["test mode"])
        parts += [f"no inputs of {need}: {why}" for need, why in self.lacks.items() if need in ("rank 2", "rank 4")]
        return "; ".join(parts)

    def _rule_in_words(self) -> str:
        rule = self.running
        if not rule.fits:
            return "running statistics follow none of the known rules"
        source = "measured" if self.decay is None else "stated"
        decay = "" if rule.kind == "cumulative" else f", decay {rule.decay:g} ({source})"
        return f"running statistics {rule.kind}{decay}, {'unbiased' if rule.unbiased else 'biased'} variance"
