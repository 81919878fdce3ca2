"""What is under test, whatever library it comes from, and how laws call it."""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._normalizer import Normalizer
from jaxbn.testing import bounds, oracle
from jaxbn.testing.laws import NEEDS
from jaxbn.testing.scope import BATCH, Scope

AXIS = "shards"
_SCALE_NAMES = ("scale", "weight", "gamma")
_BIAS_NAMES = ("bias", "offset", "beta")


@dataclass(eq=False)
class Subject:
    """A normalizer with what laws need to know of it; laws see x as [batch, ..., features], whatever its layout.

    Attributes:
      norm: init and apply; `apply` takes train=, and where= and weights= where it can.
      name: for reports.
      sharded: the same with statistics shared over the named axis `AXIS`, or None.
      channels_first: the same with feature_axis=1, or None.
      epsilon: as stated by its maker; None is measured.
      decay: of the running statistics: new = decay * old + (1 - decay) * batch; None is measured.
      rule: how they start and are read: a key of `jaxbn.testing.measure.RULES`; None is recognized.
      unbiased: whether the running variance is the unbiased one; None is recognized.
      features: number of features it is tested with.
      feature_axis: axis of x that it keeps.
      scope: which values are normalized together.
      ranks: of the inputs it takes, of 2 and 4.
      lacks: {need: reason} beyond what shows by itself.
      arguments: further keyword arguments of `apply`, or a function of x's shape that gives them.
      compiled: how its functions are made to run: `jax.jit`, or a variant of chex.
    """

    norm: Normalizer
    name: str = "norm"
    sharded: Normalizer | None = None
    channels_first: Normalizer | None = None
    epsilon: float | None = None
    decay: float | None = None
    rule: str | None = None
    unbiased: bool | None = None
    features: int = 2
    feature_axis: int = -1
    scope: Scope = BATCH
    ranks: tuple[int, ...] = (2, 4)
    lacks: Mapping[str, str] = field(default_factory=dict)
    arguments: Mapping[str, Any] | Callable[[tuple[int, ...]], Mapping[str, Any]] = field(default_factory=dict)
    compiled: Callable[[Callable], Callable] = jax.jit

    # ---- what it can do

    @functools.cached_property
    def parameters(self) -> frozenset[str]:
        """Names of the keyword arguments of apply."""
        return frozenset(inspect.signature(self.norm.apply).parameters)

    @functools.cached_property
    def missing(self) -> dict[str, str]:
        """{need: why it is not there}."""
        variables = self.variables(self.shapes[0])
        there = {
            "batch": self.scope is BATCH,
            "running": bool(jax.tree.leaves(variables["batch_stats"])),
            "where": "where" in self.parameters,
            "weights": "weights" in self.parameters,
            "scale": _named(variables["params"], _SCALE_NAMES) is not None,
            "bias": _named(variables["params"], _BIAS_NAMES) is not None,
            "shards": self.sharded is not None,
            "devices": jax.device_count() >= 2,
            "channels first": self.channels_first is not None,
            "rank 2": 2 in self.ranks,
            "rank 4": 4 in self.ranks,
        }
        absent = {need: NEEDS[need] for need, found in there.items() if not found}
        return absent | {need: f"{NEEDS[need]} ({reason})" for need, reason in self.lacks.items()}

    @functools.cached_property
    def shapes(self) -> list[tuple[int, ...]]:
        """The inputs it is tried on: 4 and 8 values a feature, and 8 as images."""
        f = self.features
        by_rank = {2: [(4, f), (8, f)], 4: [(2, 2, 2, f)]}
        return [shape for rank in self.ranks for shape in by_rank[rank]]

    def check_fit(self) -> None:
        """TypeError unless it makes of an array an array of the same shape; whatever the norm raises goes through."""
        shape = self.shapes[0]
        x = jax.ShapeDtypeStruct(shape, jnp.float32)
        apply = self.norm.apply

        def output(variables, x):
            moved = jnp.moveaxis(x, -1, self.feature_axis)
            return apply(variables, moved, train=True, **self._arguments(shape))[0], moved

        y, moved = jax.eval_shape(output, self.variables(shape), x)
        if getattr(y, "shape", None) != moved.shape:
            got = f"shape {y.shape}" if hasattr(y, "shape") else type(y).__name__
            raise TypeError(f"of x with shape {moved.shape} it made {got}; expected x's shape")

    # ---- how it runs

    def variables(self, shape: tuple[int, ...], scale=None, bias=None, features_first=False) -> dict:
        """Initial variables for inputs of that shape; scale and bias, if it has them, set: 1 and 0 unless given."""
        variables = self._initial(shape, jax.config.jax_enable_x64, features_first)
        params = _set(variables["params"], _SCALE_NAMES, 1.0 if scale is None else scale)
        return {**variables, "params": _set(params, _BIAS_NAMES, 0.0 if bias is None else bias)}

    @functools.lru_cache  # noqa: B019  (a subject lives as long as one check)
    def _initial(self, shape, x64, features_first):
        norm, axis = (self.channels_first, 1) if features_first else (self.norm, self.feature_axis)
        outside = np.moveaxis(np.empty(shape, bool), -1, axis).shape
        return norm.init(jax.random.key(0), jnp.zeros(outside, jnp.float64 if x64 else jnp.float32))

    def run(self, x, *, train=True, where=None, weights=None, variables=None) -> tuple[np.ndarray, Any]:
        """Return y in float64 as the norm computed it, and the batch_stats it returned."""
        variables = self.variables(np.shape(x)) if variables is None else variables
        y, batch_stats = self._runs[train](variables, x, where, weights)
        return as_float64(y), batch_stats

    def train(self, x, **batch) -> np.ndarray:
        """Return y in training, float64."""
        return self.run(x, **batch)[0]

    def evaluate(self, x, variables) -> np.ndarray:
        """Return y at test time, float64."""
        return self.run(x, train=False, variables=variables)[0]

    def trained(self, *batches, **batch) -> dict:
        """Variables after one training step on each of the batches."""
        variables = self.variables(np.shape(batches[0]))
        for x in batches:
            variables = {**variables, "batch_stats": self.run(x, variables=variables, **batch)[1]}
        return variables

    def pull(self, x, dy, *, variables=None, where=None) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """Gradients of sum(y dy) in training with respect to x, scale and bias (None where there is none)."""
        variables = self.variables(np.shape(x)) if variables is None else variables
        dparams, dx = self._pulls(variables, x, dy, where)
        named = (_named(dparams, names) for names in (_SCALE_NAMES, _BIAS_NAMES))
        # One row where features are all there is; where there are more, as one for each class, their sum.
        rows = (None if v is None else as_float64(v[1]).reshape(-1, np.shape(x)[-1]) for v in named)
        return as_float64(dx), *(None if v is None else v.sum(0) for v in rows)

    def call(self, variables, x, *, train=True, where=None, weights=None, norm=None, features_first=False):
        """Apply, as a traceable function of [batch, ..., features] -> (y, batch_stats)."""
        extra = {k: v for k, v in (("where", where), ("weights", weights)) if v is not None}
        axis = 1 if features_first else self.feature_axis
        moved = {k: jnp.moveaxis(v, -1, axis) for k, v in extra.items()}
        norm = self.norm if norm is None else norm
        moved |= self._arguments(x.shape)
        y, batch_stats = norm.apply(variables, jnp.moveaxis(x, -1, axis), train=train, **moved)
        return jnp.moveaxis(y, axis, -1), batch_stats

    def _arguments(self, shape):
        return self.arguments(shape) if callable(self.arguments) else self.arguments

    @functools.cached_property
    def _runs(self):
        def make(train):
            return self.compiled(
                lambda v, x, where, weights: self.call(v, x, train=train, where=where, weights=weights)
            )

        return {train: make(train) for train in (True, False)}

    @functools.cached_property
    def _pulls(self):
        def pull(variables, x, dy, where):
            def forward(params, x):
                return self.call({**variables, "params": params}, x, where=where)[0]

            y, vjp = jax.vjp(forward, variables["params"], x)
            return vjp(dy.astype(y.dtype))

        return self.compiled(pull)

    def shard_run(self, mapped: Callable, x, where=None) -> tuple[np.ndarray, Any]:
        """As `run` on x [shards, batch, ..., features], by mapped(f, axis_name) over the first axis."""
        variables = self.variables(np.shape(x)[1:])
        y, batch_stats = self._shard_runs(mapped)(variables, x, where)
        return as_float64(y), batch_stats

    @functools.lru_cache  # noqa: B019
    def _shard_runs(self, mapped):
        def one(variables, x, where):
            return self.call(variables, x, where=where, norm=self.sharded)

        return mapped(one)

    def shard_pull(self, x, dy) -> np.ndarray:
        """Dx of sum(y dy) over all shards, [shards, batch, ..., features], under vmap."""
        return as_float64(self._shard_pulls(self.variables(np.shape(x)[1:]), x, dy))

    @functools.cached_property
    def _shard_pulls(self):
        def one(variables, x):
            return self.call(variables, x, norm=self.sharded)[0]

        def pull(variables, x, dy):
            run = jax.vmap(one, in_axes=(None, 0), axis_name=AXIS)
            y, vjp = jax.vjp(lambda x: run(variables, x), x)
            return vjp(dy.astype(y.dtype))[0]

        return self.compiled(pull)

    def run_channels_first(self, x) -> np.ndarray:
        """Return y of the channels-first version, as [batch, ..., features]."""
        return as_float64(self._channels_first(self.variables(np.shape(x), features_first=True), x))

    @functools.cached_property
    def _channels_first(self):
        norm = self.channels_first
        return self.compiled(lambda variables, x: self.call(variables, x, norm=norm, features_first=True)[0])

    # ---- what it should do

    @property
    def eps(self) -> float:
        """Epsilon as stated, else as measured."""
        return self.measured_epsilon if self.epsilon is None else self.epsilon

    @functools.cached_property
    def measured_epsilon(self) -> float:
        """Epsilon as its outputs imply it."""
        from jaxbn.testing.measure import measure_epsilon  # measuring runs a subject

        return measure_epsilon(self)

    @functools.cached_property
    def running(self):
        """The rule of its running statistics, a `jaxbn.testing.measure.Rule`."""
        from jaxbn.testing.measure import recognize_rule

        return recognize_rule(self)

    def standardized(self, x, weights=None) -> oracle.Standardized:
        """X in float64, standardized."""
        return oracle.standardize(x, self.scope, self.eps, weights)

    def exact(self, x, weights=None) -> np.ndarray:
        """Xhat of x in float64."""
        return oracle.normalize(x, self.scope, self.eps, weights)

    def output_bound(self, x, weights=None) -> np.ndarray:
        """`bounds.output` for x."""
        return bounds.output(x, self.scope, self.eps, weights)

    def gradient_bound(self, x, g) -> np.ndarray:
        """`bounds.gradient` for x and g = scale dy."""
        return bounds.gradient(x, g, self.scope, self.eps)


def as_float64(x) -> np.ndarray:
    """A float64 copy on the host."""
    return np.asarray(x).astype(np.float64)


def _named(params, names):
    """(path, leaf) of the one leaf whose last part of the path that is text is among names, or None."""
    found = [(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params) if _text(path) & set(names)]
    return found[0] if len(found) == 1 else None


def _text(path) -> set[str]:
    parts = (getattr(key, attribute, None) for key in path for attribute in ("key", "name"))
    return {part for part in parts if isinstance(part, str)}


def _set(params, names, value):
    found = _named(params, names)
    if found is None:
        return params
    path, leaf = found
    value = jnp.broadcast_to(jnp.asarray(value, leaf.dtype), leaf.shape)
    return jax.tree_util.tree_map_with_path(lambda p, v: value if p == path else v, params)
