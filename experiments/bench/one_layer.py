"""One batch-norm layer of every library that is installed, called in the same way on the same input.

Inputs are drawn here, the same for all, features last but for torch; scale and bias are parameters, running statistics
are updated. Forward plus backward returns y, the new statistics and the gradients of x, scale and bias.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

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


@lru_cache(maxsize=1)
def draw(call: LayerCall) -> tuple[jax.Array, jax.Array]:
    """X, with a mean of half its standard deviation, and the cotangent of y; all libraries take the same arrays."""
    key_of_x, key_of_dy = jax.random.split(jax.random.key(0))
    x = 0.5 + jax.random.normal(key_of_x, call.shape)
    return x.astype(call.dtype), jax.random.normal(key_of_dy, call.shape).astype(call.dtype)


def candidates(call: LayerCall) -> dict[str, Candidate]:
    """The call by every library that is installed; our own first."""
    relu = jax.nn.relu if call.relu else None
    norms = {FUSED if relu else OURS: jaxbn.batch_norm(activation=relu)}
    norms |= {name: followed_by(norm, relu) for name, norm in installed().items()}
    draw(call)
    with ThreadPoolExecutor() as threads:  # compiles them side by side
        built = dict(zip(norms, threads.map(partial(in_jax, call), norms.values()), strict=True))
    return built | {name: in_torch(call, channels_last=last) for name, last in torch_layouts(call.shape).items()}


def in_jax(call: LayerCall, norm: jaxbn.Normalizer) -> Candidate:
    """A Normalizer, compiled."""
    x, dy = draw(call)
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
    """The layer of torch in eager mode, on features first or, in memory, last; where JAX has its arrays."""
    import torch

    order = torch.channels_last if channels_last else torch.contiguous_format
    x, dy = (torch.from_dlpack(v).movedim(-1, 1).contiguous(memory_format=order) for v in draw(call))
    layer_of = torch.nn.BatchNorm2d if len(call.shape) == 4 else torch.nn.BatchNorm1d
    layer = layer_of(call.shape[-1], momentum=0.01, device=x.device).train(call.mode != EVAL)

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
    return Candidate(waiting(both if call.mode == BOTH else without_gradients))


def waiting(work: Callable[[], object]) -> Callable[[], None]:
    """Work of torch, and the wait until a GPU has done it."""
    import torch

    def run() -> None:
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return run


def copy(call: LayerCall) -> Candidate:
    """The call's x read once and written once: what two passes over memory cost."""
    x, _ = draw(call)
    run = jax.jit(jnp.negative)
    return Candidate(lambda: jax.block_until_ready(run(x)))
