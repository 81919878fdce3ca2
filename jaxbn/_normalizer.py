"""The one type that every variant fits."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol, Self, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._factory import Made, normalizer_factory
from jaxbn._inputs import combined_weights
from jaxbn._padding import silenced
from jaxbn._switches import alone, switched

Variables = dict[str, Any]


class Init(Protocol):
    """init(key, x) -> {"params": {...}, "batch_stats": {...}}."""

    def __call__(self, key: jax.Array, x: jax.Array | jax.ShapeDtypeStruct) -> Variables:
        """Make variables.

        Args:
          key: random key.
          x: an array or a `jax.ShapeDtypeStruct`: only its shape and dtype count.
        """
        ...


class Apply(Protocol):
    """apply(variables, x, *, train, use_running, update, where, weights, rng, ...) -> (y, batch_stats)."""

    def __call__(
        self,
        variables: Any,
        x: jax.Array,
        *,
        train: bool,
        use_running: bool | None = None,
        update: bool | None = None,
        where: jax.Array | None = None,
        weights: jax.Array | None = None,
        rng: jax.Array | None = None,
        **extra: Any,
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Normalize x.

        Args:
          variables: what `init` made, or what training made of it.
          x: the array.
          train: normalize by the batch and move the statistics, or normalize by the running statistics and return
            them as they came. A Python bool, as the two switches that follow.
          use_running: normalize by the running statistics, as train=False does; None is `not train`. With False in
            evaluation, or with update=False in training, the batch normalizes and the statistics stay as they are:
            a second forward pass on the same batch, a generator's pass through the discriminator.
          update: move the statistics by the batch, as train=True does; None is `train`. With use_running=True too,
            they move by a batch that they normalize as they were before it.
          where: boolean, broadcastable to x: True counts in the statistics.
          weights: real, broadcastable to x: how much each value counts.
          rng: random key, for variants that draw.
          **extra: what a variant takes beyond that, such as `residual`, `condition` or `step`.

        Returns:
          y of x's shape, and batch_stats of the structure, shapes and dtypes of those given.
        """
        ...


class _Functions(NamedTuple):
    init: Init
    apply: Apply


@jax.tree_util.register_static
class Normalizer(Made, _Functions):
    """A normalization as two pure functions; hyperparameters are closed over, state is passed and returned.

    Two made with equal hyperparameters are equal and hash alike. In a pytree a normalizer is static: it has no leaves.

    Attributes:
      init: init(key, x) -> {"params": {...}, "batch_stats": {...}}; see `Init`.
      apply: apply(variables, x, *, train, use_running=None, update=None, where=None, weights=None, rng=None) ->
        (y, batch_stats); see `Apply`. One that knows `train` alone is given the two switches.
    """

    def __new__(
        cls, init: Callable[..., Variables], apply: Callable[..., tuple[jax.Array, dict[str, Any]]]
    ) -> "Normalizer":
        """Put two functions together; each takes the arguments of its protocol, and those it names itself."""
        return super().__new__(cls, cast(Init, init), cast(Apply, switched(apply)))

    def _parts(self) -> tuple:
        return self.init, alone(self.apply)

    # `_replace` comes this way, and would pass by __new__. mypy adds keyword arguments that NamedTuple does not have.
    @classmethod
    def _make(cls, iterable: Iterable[Any]) -> Self:  # type: ignore[override]
        return cls(*iterable)


@jax.tree_util.register_static
class OneDrawNormalizer(Normalizer):
    """A Normalizer whose layers of one network are to be given the same `rng`, so that all draw alike.

    The Flax modules do so. Any other Normalizer gets a key of its own in each layer.
    """


def check_mode(train: bool) -> None:
    """TypeError unless `train` is a Python or NumPy bool, known when the function is traced."""
    if not isinstance(train, bool | np.bool_):
        raise TypeError(f"train={train!r}; expected True or False, known at trace time: mark it static under jit.")


@normalizer_factory
def identity(*, activation: Callable[[jax.Array], jax.Array] | None = None) -> Normalizer:
    """No normalization, no parameters, no statistics: y = activation(x + residual), the plain arm of a comparison."""

    def init(key, x):
        del key, x
        return {"params": {}, "batch_stats": {}}

    def apply(variables, x, *, train, where=None, weights=None, rng=None, residual=None):
        del train, rng
        if where is not None or weights is not None:
            counts = combined_weights(jnp.asarray(x), where, weights)
            x, residual = silenced(x, counts), silenced(residual, counts)
        y = x if residual is None else x + residual
        y = y if activation is None else activation(y)
        return y, variables["batch_stats"]

    return Normalizer(init, apply)
