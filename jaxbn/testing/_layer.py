"""A layer under test, whatever library it comes from, and how laws run it."""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._normalizer import Normalizer
from jaxbn.testing._scope import BATCH, Scope

AXIS = "shards"
_SCALE_NAMES = ("scale", "weight", "gamma")
_BIAS_NAMES = ("bias", "offset", "beta")

# What a law may need of a layer, and how the report says that the layer lacks it.
NEEDS = {
    "batch": "statistics over the batch",
    "running": "running statistics",
    "test mode": "a test mode",
    "switches": "both switches of a call (use_running=, update=)",
    "where": "a mask (where=)",
    "weights": "weights (weights=)",
    "scale": "a scale among its params",
    "bias": "a bias among its params",
    "epsilon": "an epsilon",
    "shards": "a version with axis_name",
    "devices": "two devices",
    "channels first": "a version with feature_axis=1",
    "rank 2": "inputs of rank 2",
    "rank 4": "inputs of rank 4",
    "jit": "a function that JAX can trace",
    "gradient": "reverse mode",
    "forward mode": "forward mode",
    "float64": "float64 inputs",
}


@dataclass(eq=False)
class Layer:
    """A normalizer and what is needed to run it. Laws see x as [batch, ..., features], whatever its layout.

    Attributes:
      norm: init and apply; `apply` takes train=, and where= and weights= where it can.
      name: for reports.
      sharded: the same layer with statistics shared over the named axis `AXIS`, or None.
      channels_first: the same layer with feature_axis=1, or None.
      features: number of features of the inputs.
      feature_axis: the axis of x that holds the features.
      scope: which values are normalized together.
      ranks: ranks of the inputs that the layer takes, of 2 and 4.
      lacks: {need: reason} of what the layer lacks and `missing` cannot see.
      arguments: further keyword arguments of `apply`, or a function of x's shape that gives them.
      compiled: how functions are made to run: `jax.jit`, or a variant of chex.
    """

    norm: Normalizer
    name: str = "norm"
    sharded: Normalizer | None = None
    channels_first: Normalizer | None = None
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
        """{need: why it is not there}, for every key of `NEEDS` that the layer lacks."""
        variables = self.variables(self.shapes[0])
        ranks = {len(shape) for shape in self.shapes}
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
            "rank 2": 2 in ranks,
            "rank 4": 4 in ranks,
        }
        absent = {need: NEEDS[need] for need, found in there.items() if not found}
        return absent | {need: f"{NEEDS[need]} ({reason})" for need, reason in self.lacks.items()}

    @functools.cached_property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the inputs: [4, features], [8, features] and [2, 2, 2, features].

        Those of a rank that the layer does not take are left out, and those in which a value would be normalized by
        itself alone, as instance norm does with inputs of rank 2.

        Raises:
          ValueError: none is left, or the scope cannot divide the features.
        """
        f = self.features
        by_rank: dict[int, list[tuple[int, ...]]] = {2: [(4, f), (8, f)], 4: [(2, 2, 2, f)]}
        candidates = [shape for rank in self.ranks for shape in by_rank[rank]]
        found = [shape for shape in candidates if self.scope.size(shape) > 1]
        if not found:
            raise ValueError(
                f"scope {self.scope.name} normalizes every value by itself on inputs of shapes"
                f" {', '.join(map(str, candidates))}; give another scope or more features"
            )
        return found

    def check_fit(self) -> None:
        """Raise TypeError unless the output has the shape of the input; errors of the layer itself go through."""
        for shape in (self.shapes[0], self.shapes[-1]):
            self._check_shape(shape)

    def refusal(self, rank: int) -> str:
        """Why it does not take inputs of that rank, or ""."""
        try:
            self._check_shape({2: (4, self.features), 4: (2, 2, 2, self.features)}[rank])
        except Exception as error:
            return f"raised {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        return ""

    def _check_shape(self, shape: tuple[int, ...]) -> None:
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

    def variables(self, shape: tuple[int, ...], scale: Any = None, bias: Any = None, features_first=False) -> dict:
        """Initial variables for inputs of that shape; scale and bias, if it has them, set: 1 and 0 unless given."""
        variables = self._initial(shape, bool(jax.config.read("jax_enable_x64")), features_first)
        params = _set(variables["params"], _SCALE_NAMES, 1.0 if scale is None else scale)
        return {**variables, "params": _set(params, _BIAS_NAMES, 0.0 if bias is None else bias)}

    @functools.lru_cache  # noqa: B019  (a layer lives as long as one check)
    def _initial(self, shape, x64, features_first):
        norm, axis = (self.channels_first, 1) if features_first else (self.norm, self.feature_axis)
        if norm is None:
            raise ValueError(f"{self.name} has no version with feature_axis=1.")
        outside = np.moveaxis(np.empty(shape, bool), -1, axis).shape
        return norm.init(jax.random.key(0), jnp.zeros(outside, jnp.float64 if x64 else jnp.float32))

    def run(self, x, *, train=True, where=None, weights=None, variables=None) -> tuple[np.ndarray, Any]:
        """Return y in float64 as the layer computed it, and the batch_stats it returned."""
        variables = self.variables(np.shape(x)) if variables is None else variables
        y, batch_stats = self.runs[train](variables, x, where, weights)
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

    def settled(self, x, steps: int, variables: dict) -> dict:
        """Variables after that many training steps on the same batch, in one compiled loop."""
        return {**variables, "batch_stats": self._settle(variables, x, steps)}

    @functools.cached_property
    def _settle(self):
        def settle(variables, x, steps):
            def step(_, batch_stats):
                moved = self.call({**variables, "batch_stats": batch_stats}, x)[1]
                # A loop needs equal types; whether the layer keeps them is a law of its own.
                return jax.tree.map(lambda new, old: jnp.asarray(new, jnp.result_type(old)), moved, batch_stats)

            return jax.lax.fori_loop(0, steps, step, jax.tree.map(jnp.asarray, variables["batch_stats"]))

        return jax.jit(settle)

    def pull(self, x, dy, *, variables=None, where=None) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """Gradients of sum(y dy) in training with respect to x, scale and bias (None where there is none)."""
        variables = self.variables(np.shape(x)) if variables is None else variables
        dparams, dx = self._pulls(variables, x, dy, where)
        features = np.shape(x)[-1]
        return as_float64(dx), _row(dparams, _SCALE_NAMES, features), _row(dparams, _BIAS_NAMES, features)

    def call(self, variables, x, *, train=True, where=None, weights=None, norm=None, features_first=False, **switches):
        """Apply, as a traceable function of [batch, ..., features] -> (y, batch_stats)."""
        extra = {k: v for k, v in (("where", where), ("weights", weights)) if v is not None}
        axis = 1 if features_first else self.feature_axis
        moved = {k: jnp.moveaxis(v, -1, axis) for k, v in extra.items()}
        norm = self.norm if norm is None else norm
        arguments = moved | dict(self._arguments(x.shape))
        y, batch_stats = norm.apply(variables, jnp.moveaxis(x, -1, axis), train=train, **switches, **arguments)
        return jnp.moveaxis(y, axis, -1), batch_stats

    def _arguments(self, shape):
        return self.arguments(shape) if callable(self.arguments) else self.arguments

    @functools.cached_property
    def runs(self) -> dict[bool, Callable]:
        """{train: function of (variables, x, where, weights) -> (y, batch_stats)}."""

        def make(train):
            return self.compiled(
                lambda v, x, where, weights: self.call(v, x, train=train, where=where, weights=weights)
            )

        return {train: make(train) for train in (True, False)}

    @functools.cached_property
    def run_switched(self) -> Callable:
        """Function of (variables, x) -> {(use_running, update): (y, batch_stats)}, for all four."""
        both = [(use_running, update) for use_running in (False, True) for update in (False, True)]

        def run(variables, x):
            # The mode that train= asks for is the opposite of both, so that nothing comes of it.
            return {(a, b): self.call(variables, x, train=a and not b, use_running=a, update=b) for a, b in both}

        return self.compiled(run)

    @functools.cached_property
    def _pulls(self):
        def pull(variables, x, dy, where):
            def forward(params, x):
                return self.call({**variables, "params": params}, x, where=where)[0]

            y, vjp = jax.vjp(forward, variables["params"], x)
            return vjp(dy.astype(y.dtype))

        return self.compiled(pull)

    # ---- shards and layouts

    def shard_run(self, mapped: Callable, x, where=None) -> tuple[np.ndarray, Any]:
        """As `run` on x [shards, batch, ..., features], by mapped(f) over the first axis."""
        variables = self.variables(np.shape(x)[1:])
        y, batch_stats = self._shard_runs(mapped)(variables, x, where)
        return as_float64(y), batch_stats

    @functools.lru_cache  # noqa: B019  (a layer lives as long as one check)
    def _shard_runs(self, mapped):
        def one(variables, x, where):
            return self.call(variables, x, where=where, norm=self.sharded)

        return mapped(one)

    def shard_pull(self, x, dy) -> np.ndarray:
        """Gradient of sum(y dy) over all shards, [shards, batch, ..., features], under vmap."""
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

    def run_channels_first(self, x, *, train=True, variables=None) -> tuple[np.ndarray, Any]:
        """As `run` of the channels-first version, with x and y as [batch, ..., features]."""
        variables = self.variables(np.shape(x), features_first=True) if variables is None else variables
        y, batch_stats = self._channels_first[train](variables, x)
        return as_float64(y), batch_stats

    @functools.cached_property
    def _channels_first(self):
        def make(train):
            norm = self.channels_first
            return self.compiled(lambda v, x: self.call(v, x, train=train, norm=norm, features_first=True))

        return {train: make(train) for train in (True, False)}


def as_float64(x: Any) -> np.ndarray:
    """A float64 copy on the host."""
    return np.asarray(x).astype(np.float64)


def _row(dparams, names, features):
    """The gradient of one parameter, [features]; a parameter with more rows, as one a class, summed over them."""
    found = _named(dparams, names)
    return None if found is None else as_float64(found[1]).reshape(-1, features).sum(0)


def _named(params, names):
    """(path, leaf) of the one leaf whose path has one of the names, or None where none or several have."""
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
