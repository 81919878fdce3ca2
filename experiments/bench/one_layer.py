"""One batch-norm layer of every library that is installed, called in the same way on the same input.

Inputs are drawn here, the same for all, features last but for torch; scale and bias are parameters, running statistics
are updated. Forward plus backward returns y, the new statistics and the gradients of x, scale and bias.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxbn
from experiments.aot.hlo import temporary_bytes
from experiments.bench.compare import Candidate
from experiments.bench.peers import FUSED, OURS, followed_by, installed, torch_layouts

EVAL, FORWARD, BOTH = "eval", "forward", "forward + backward"


class LayerCall(NamedTuple):
    """What is measured of a layer.

    Attributes:
      shape: of x, features last.
      dtype: of x and y; parameters and statistics are float32.
      mode: EVAL, FORWARD (training mode) or BOTH.
      relu: whether relu follows.
    """

    shape: tuple[int, ...]
    dtype: str
    mode: str
    relu: bool

    @property
    def bytes(self) -> int:
        """Of x."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize

    def draw(self) -> tuple[np.ndarray, np.ndarray]:
        """X, with a mean of half its standard deviation, and the cotangent of y; float32."""
        draws = np.random.default_rng(0)
        return 0.5 + draws.standard_normal(self.shape, np.float32), draws.standard_normal(self.shape, np.float32)


def candidates(call: LayerCall) -> dict[str, Candidate]:
    """The call by every library that is installed; our own first."""
    relu = jax.nn.relu if call.relu else None
    norms = {FUSED if relu else OURS: jaxbn.batch_norm(activation=relu)}
    norms |= {name: followed_by(norm, relu) for name, norm in installed().items()}
    built = {name: in_jax(call, norm) for name, norm in norms.items()}
    return built | {name: in_torch(call, channels_last=last) for name, last in torch_layouts(call.shape).items()}


def in_jax(call: LayerCall, norm: jaxbn.Normalizer) -> Candidate:
    """A Normalizer, compiled."""
    x, dy = (jnp.asarray(v, call.dtype) for v in call.draw())
    variables = norm.init(jax.random.key(0), x)

    def forward(params: Any, batch_stats: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        return norm.apply({"params": params, "batch_stats": batch_stats}, x, train=call.mode != EVAL)

    def both(params: Any, batch_stats: Any, x: jax.Array, dy: jax.Array) -> tuple:
        y, pull, moved = jax.vjp(lambda params, x: forward(params, batch_stats, x), params, x, has_aux=True)
        return y, moved, pull(dy)

    run = jax.jit(both if call.mode == BOTH else forward)
    arguments = (variables["params"], variables["batch_stats"], x, *([dy] if call.mode == BOTH else []))
    temporary = temporary_bytes(run.lower(*arguments).compile())
    return Candidate(lambda: jax.block_until_ready(run(*arguments)), temporary)


def in_torch(call: LayerCall, *, channels_last: bool) -> Candidate:
    """The layer of torch in eager mode, on features first or, in memory, last."""
    import torch

    layer_of = torch.nn.BatchNorm2d if len(call.shape) == 4 else torch.nn.BatchNorm1d
    layer = layer_of(call.shape[-1], momentum=0.01).train(call.mode != EVAL)
    order = torch.channels_last if channels_last else torch.contiguous_format
    x, dy = (
        torch.tensor(np.moveaxis(v, -1, 1)).to(getattr(torch, call.dtype)).contiguous(memory_format=order)
        for v in call.draw()
    )

    def forward() -> Any:
        y = layer(x)
        return torch.relu(y) if call.relu else y

    def without_gradients() -> Any:
        with torch.no_grad():
            return forward()

    def both() -> None:
        layer.zero_grad()
        x.grad = None
        forward().backward(dy)

    x.requires_grad_(call.mode == BOTH)
    return Candidate(both if call.mode == BOTH else without_gradients)


def copy(call: LayerCall) -> Candidate:
    """The call's x read once and written once: what two passes over memory cost."""
    x = jnp.asarray(call.draw()[0], call.dtype)
    run = jax.jit(jnp.negative)
    return Candidate(lambda: jax.block_until_ready(run(x)))
