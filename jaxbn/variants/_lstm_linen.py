"""The batch-normalized LSTM as a Flax linen cell, for `flax.linen.RNN`."""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxbn.variants._lstm import LSTMCarry, RecurrentCell

_NO_PADDING = jnp.iinfo(jnp.int32).max


class PaddedCarry(NamedTuple):
    """Hidden and cell [batch, features], step and lengths int32 [batch]; from `lengths` on an example is padding."""

    hidden: jax.Array
    cell: jax.Array
    step: jax.Array
    lengths: jax.Array


def rnn(cell: RecurrentCell, *, train: bool, **options: Any) -> nn.RNN:
    """`flax.linen.RNN` over a cell that keeps statistics.

        variables = rnn(cell, train=False).init(key, x)
        y, moved = rnn(cell, train=True).apply(variables, x, mutable="batch_stats")

    In training the RNN carries the collection "batch_stats" from step to step; otherwise it only reads it. Variables
    have to be made with train=False, since Flax cannot make them inside what it carries (flax issue 2052): inside a
    module that is `train and not self.is_initializing()`.

    Args:
      cell: as `batch_norm_lstm` makes it.
      train: normalize by the batch, and move the statistics.
      **options: of `flax.linen.RNN`: time_major, return_carry, ...
    """
    module = BatchNormLSTMCell(cell, use_running_average=not train)
    if train:
        return nn.RNN(module, variable_carry="batch_stats", **options)
    return nn.RNN(module, variable_broadcast=["params", "batch_stats"], **options)


class BatchNormLSTMCell(nn.RNNCellBase):
    """A RecurrentCell, such as `batch_norm_lstm` makes, as a cell for `flax.linen.RNN`; `rnn` builds the two together.

    For padded sequences pass `initial_carry=cell.padded(x, lengths)`: `nn.RNN` does not tell its cell of seq_lengths.

    Attributes:
      cell: the RecurrentCell.
      use_running_average: normalize by the running statistics, and leave them alone.
    """

    cell: RecurrentCell
    use_running_average: bool = False

    @nn.compact
    def __call__(self, carry: PaddedCarry, x: jax.Array) -> tuple[PaddedCarry, jax.Array]:
        """One time step: x [batch, inputs] and the carry to the new carry and y [batch, features]."""
        params, stats = self._variables(x)
        variables = {"params": params, "batch_stats": {name: v.value for name, v in stats.items()}}
        train = not (self.use_running_average or self.is_initializing())
        step, where = carry.step[0], carry.step < carry.lengths
        # `nn.RNN` asks for the first carry without telling the dtype of x.
        here = LSTMCarry(carry.hidden.astype(x.dtype), carry.cell, step)
        here, y, moved = self.cell.apply(variables, here, x, train=train, where=where)
        if train:
            for name, value in moved.items():
                stats[name].value = value
        hidden = here.hidden.astype(carry.hidden.dtype)
        return PaddedCarry(hidden, here.cell, carry.step + 1, carry.lengths), y

    def _variables(self, x):
        key = self.make_rng("params") if self.has_rng("params") else jax.random.key(0)
        start = partial(self.cell.init, key, jax.ShapeDtypeStruct(x.shape, x.dtype))
        names = jax.eval_shape(start)
        params = {n: self.param(n, lambda _, n=n: start()["params"][n]) for n in names["params"]}
        stats = {
            n: self.variable("batch_stats", n, lambda n=n: start()["batch_stats"][n]) for n in names["batch_stats"]
        }
        return params, stats

    @nn.nowrap
    def initialize_carry(self, rng: jax.Array, input_shape: tuple[int, ...]) -> PaddedCarry:
        """The carry at the first step, for float32 x of that shape, [batch, inputs], without padding."""
        del rng
        return self.padded(jax.ShapeDtypeStruct(input_shape, jnp.float32), None)

    @nn.nowrap
    def padded(self, x: jax.Array | jax.ShapeDtypeStruct, lengths: jax.Array | None) -> PaddedCarry:
        """The carry at the first step.

        Args:
          x: [batch, ..., inputs]; only shape and dtype count.
          lengths: int [batch], time steps of each sequence that are not padding; None is all.
        """
        while len(x.shape) > 2:
            x = x[:, 0] if isinstance(x, jax.Array) else jax.ShapeDtypeStruct((x.shape[0], *x.shape[2:]), x.dtype)
        carry = self.cell.initial_carry(x)
        step = jnp.zeros(x.shape[0], jnp.int32)
        lengths = jnp.full_like(step, _NO_PADDING) if lengths is None else jnp.asarray(lengths, jnp.int32)
        return PaddedCarry(carry.hidden, carry.cell, step, lengths)

    @property
    def num_feature_axes(self) -> int:
        """Axes of x that are features."""
        return 1
