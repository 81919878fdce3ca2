"""One batch-norm layer of every library that is installed, as programs with one signature.

Inputs are drawn here, the same for all, features last but for torch; scale and bias are parameters, running statistics
are updated. Forward plus backward returns y, the new statistics and the gradients of x, scale and bias.
"""

import importlib.util
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxbn
from experiments.bench.peer_layers import FUSED, OURS, followed_by, installed

EVAL, FORWARD, BOTH = "eval", "forward", "forward + backward"


class Case(NamedTuple):
    """What is measured.

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


class Program(NamedTuple):
    """A case as one library runs it.

    Attributes:
      run: does it once, and waits.
      temporary: bytes that the compiled program allocates while it runs; None where there is no such program.
    """

    run: Callable[[], object]
    temporary: int | None = None


def programs(case: Case) -> dict[str, Program]:
    """The case as a program of every library that is installed; our own first."""
    relu = jax.nn.relu if case.relu else None
    norms = {FUSED if relu else OURS: jaxbn.batch_norm(activation=relu)}
    norms |= {name: followed_by(norm, relu) for name, norm in installed().items()}
    built = {name: in_jax(case, norm) for name, norm in norms.items()}
    return built | {name: in_torch(case, channels_last=last) for name, last in torch_layouts(case.shape).items()}


def torch_layouts(shape: tuple[int, ...]) -> dict[str, bool]:
    """By name, whether channels come last in memory: for images both, else the first; none where torch is missing."""
    if not importlib.util.find_spec("torch"):
        return {}
    return {"torch NCHW": False} | ({"torch NHWC": True} if len(shape) == 4 else {})


def in_jax(case: Case, norm: jaxbn.Normalizer) -> Program:
    """A Normalizer, compiled."""
    x, dy = (jnp.asarray(v, case.dtype) for v in case.draw())
    variables = norm.init(jax.random.key(0), x)

    def forward(params, batch_stats, x):
        return norm.apply({"params": params, "batch_stats": batch_stats}, x, train=case.mode != EVAL)

    def both(params, batch_stats, x, dy):
        y, pull, moved = jax.vjp(lambda params, x: forward(params, batch_stats, x), params, x, has_aux=True)
        return y, moved, pull(dy)

    arguments = variables["params"], variables["batch_stats"], x
    run = jax.jit(forward)
    if case.mode == BOTH:
        arguments, run = (*arguments, dy), jax.jit(both)
    temporary = run.lower(*arguments).compile().memory_analysis().temp_size_in_bytes
    return Program(lambda: jax.block_until_ready(run(*arguments)), temporary)


def in_torch(case: Case, *, channels_last: bool) -> Program:
    """The layer of torch in eager mode, on features first or, in memory, last."""
    import torch

    layer_of = torch.nn.BatchNorm2d if len(case.shape) == 4 else torch.nn.BatchNorm1d
    layer = layer_of(case.shape[-1], momentum=0.01).train(case.mode != EVAL)
    order = torch.channels_last if channels_last else torch.contiguous_format
    x, dy = (
        torch.tensor(np.moveaxis(v, -1, 1)).to(getattr(torch, case.dtype)).contiguous(memory_format=order)
        for v in case.draw()
    )

    def forward():
        y = layer(x)
        return torch.relu(y) if case.relu else y

    def without_gradients():
        with torch.no_grad():
            return forward()

    def both():
        layer.zero_grad()
        x.grad = None
        forward().backward(dy)

    x.requires_grad_(case.mode == BOTH)
    return Program(both if case.mode == BOTH else without_gradients)


def copy(case: Case) -> Program:
    """The case's x read once and written once: what two passes over memory cost."""
    x = jnp.asarray(case.draw()[0], case.dtype)
    run = jax.jit(jnp.negative)
    return Program(lambda: jax.block_until_ready(run(x)))
