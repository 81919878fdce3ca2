"""Any Normalizer as a Haiku module; needs the package: `pip install "jaxbn[haiku]"`."""

from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp

from jaxbn._layers import flat_names, nested_names
from jaxbn._module_norm import moves_statistics
from jaxbn._normalizer import Normalizer


class Norm(hk.Module):
    """A Normalizer as a module, called as `hk.BatchNorm` is: its params among params, its statistics in the state.

        def network(x, is_training):
            return hk.Linear(2)(jaxbn.haiku.Norm(jaxbn.batch_norm())(hk.Linear(16)(x), is_training))

        network = hk.without_apply_rng(hk.transform_with_state(network))
        params, state = network.init(key, x, True)
        y, state = network.apply(params, state, x, True)

    Variables have the normalizer's own names. While they are made y is what the normalizer gives with its initial
    statistics, so that no named axis need be bound. Checkpoints of `hk.BatchNorm` come over by
    `jaxbn.convert.from_haiku`.
    """

    def __init__(self, norm: Normalizer, name: str | None = None):
        """Wrap a Normalizer.

        Args:
          norm: the Normalizer.
          name: of the module; None is "norm", numbered.
        """
        super().__init__(name=name)
        self.norm = norm

    def __call__(self, x: jax.Array, is_training: bool, **arguments: Any) -> jax.Array:
        """Normalize x, moving the state where is_training.

        Args:
          x: what the normalizer takes.
          is_training: whether to normalize by the batch. A Python bool.
          **arguments: for the normalizer's apply: where, weights, rng, residual, condition, step, ...

        Returns:
          y of x's shape.
        """
        key = hk.maybe_next_rng_key() if hk.running_init() else None
        key = jax.random.key(0) if key is None else key
        start = self.norm.init(key, jax.ShapeDtypeStruct(x.shape, x.dtype))
        held = {kind: nested_names(self._variables(kind, flat_names(start[kind]))) for kind in _GETTERS}
        y, moved = self.norm.apply(held, x, train=is_training and not hk.running_init(), **arguments)
        if moves_statistics(not is_training, arguments) and not hk.running_init():
            for name, value in flat_names(moved).items():
                hk.set_state(name.replace("/", "."), value)
        return y

    def _variables(self, kind, start):
        """Each variable under its name; Haiku's names have no "/"."""
        get = _GETTERS[kind]
        return {
            n: get(n.replace("/", "."), v.shape, v.dtype, init=lambda *_, v=v: jnp.array(v)) for n, v in start.items()
        }


_GETTERS = {"params": hk.get_parameter, "batch_stats": hk.get_state}
