"""Batch, layer, group, instance and weight norm and none as one normalizer: all train in one compiled program.

A layer computes `scale (h - mean) / size + bias` of its pre-activations h = W x. What differs is whose mean and size:

    batch norm       one feature over all examples and positions; running averages at test time
    layer norm       one example, over all features and positions
    group norm       one example and one of GROUPS groups of features, over these and the positions
    instance norm    one example and one feature, over the positions; a dense layer has none and stays as it is
    weight norm      mean 0, and for size the length of the row of W that makes the feature
    none             mean 0 and size 1, and no scale

So the moments of each example and feature over the positions, [examples, features], give all others by averaging.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import jaxbn
from experiments.training import models
from experiments.training.resnet import patch_convolve, small_resnet

KINDS = NONE, BATCH, LAYER, GROUP, INSTANCE, WEIGHT = (
    "none",
    "batch norm",
    "layer norm",
    "group norm",
    "instance norm",
    "weight norm",
)
GROUPS = 2
DECAY, EPSILON = 0.9, 1e-5

Pair = tuple[Array, Array]


def by_position(x: Array) -> Pair:
    """Mean and variance over positions, [examples, features]; x: [examples, ..., features]."""
    axes = tuple(range(1, x.ndim - 1))
    mean = jnp.mean(x, axes)
    return mean, jnp.mean((x - jnp.expand_dims(mean, axes)) ** 2, axes)


def over_examples(mean: Array, var: Array) -> Pair:
    """Mean and variance of each feature over examples and positions, [1, features], from those of `by_position`."""
    whole = jnp.mean(mean, 0, keepdims=True)
    return whole, jnp.mean(var + (mean - whole) ** 2, 0, keepdims=True)


def over_features(mean: Array, var: Array, averages: Array) -> Pair:
    """The same of each example over features: [examples, features]; averages: [features, features], see `averaging`."""
    average = partial(jnp.matmul, b=averages, precision="highest")  # a GPU would round to 11 bits
    whole = average(mean)
    return whole, average(var + (mean - whole) ** 2)


def averaging(kind: Array, features: int) -> Array:
    """The matrix that averages over all features, over a group of neighbours or over one, as `kind` does."""
    group = np.arange(features) // max(1, features // GROUPS)
    same = (group[:, None] == group[None]).astype(np.float32)
    of_kind = {LAYER: np.full((features, features), 1 / features, np.float32), GROUP: same / same.sum(0)}
    return jnp.stack([of_kind.get(name, np.eye(features, dtype=np.float32)) for name in KINDS])[kind.astype(int)]


def switched(kind: Array) -> jaxbn.Normalizer:
    """The normalizer whose number in KINDS is `kind`, which may be traced; of weight norm the scale and the bias."""

    def init(key: Array, x: Array) -> dict:
        features = x.shape[-1:]
        params = {"scale": jnp.ones(features), "bias": jnp.zeros(features)}
        return {"params": params, "batch_stats": {"mean": jnp.zeros(features), "var": jnp.ones(features)}}

    def apply(variables: dict, x: Array, *, train: bool | Array) -> tuple[Array, dict]:
        params, stats = variables["params"], variables["batch_stats"]
        axes, own = tuple(range(1, x.ndim - 1)), by_position(x)
        running = stats["mean"][None], stats["var"][None]
        batch = [jnp.where(train, *pair) for pair in zip(over_examples(*own), running, strict=True)]
        of_example = over_features(*own, averaging(kind, x.shape[-1]))
        mean, var = (jnp.where(is_in(kind, BATCH), *pair) for pair in zip(batch, of_example, strict=True))
        normalizes = is_in(kind, BATCH, LAYER, GROUP, *([INSTANCE] if axes else []))
        factor = jnp.where(normalizes, jax.lax.rsqrt(var + EPSILON), 1.0)
        factor *= jnp.where(normalizes | is_in(kind, WEIGHT), params["scale"], 1.0)[None]
        shift = params["bias"][None] - jnp.where(normalizes, mean, 0.0) * factor
        decay = jnp.where(train, DECAY, 1.0)
        moved = {name: decay * stats[name] + (1 - decay) * part[0] for name, part in zip(stats, batch, strict=True)}
        return x * jnp.expand_dims(factor, axes) + jnp.expand_dims(shift, axes), moved

    return jaxbn.Normalizer(init, apply)


def is_in(kind: Array, *names: str) -> Array:
    """Whether the number is that of one of these KINDS."""
    return jnp.asarray([name in names for name in KINDS])[kind.astype(int)]


def map_normalized(f: Callable[..., dict], params: Any, *others: Any) -> Any:
    """`f(layer, *others)` for each layer that has a norm; params of `models.stack` or of `resnet`, others likewise."""
    if isinstance(params, list):
        mapped = [f(layer, *rest) for layer, *rest in zip(params, *others, strict=False) if "norm" in layer]
        return [*mapped, *(layer for layer in params if "norm" not in layer)]
    return {name: f(p, *(o[name] for o in others)) if "norm" in p else p for name, p in params.items()}


def map_kernels(f: Callable[[Array], Array], params: Any) -> Any:
    """`f(kernel)` in place of the kernel of each layer that has a norm."""

    def one(layer: dict) -> dict:
        if "layer" in layer:
            return {**layer, "layer": {**layer["layer"], "kernel": f(layer["layer"]["kernel"])}}
        return {**layer, "kernel": f(layer["kernel"])}

    return map_normalized(one, params)


def feature_axis(shape: models.Shape) -> int:
    """Where a kernel has its features: dense [features, inputs], convolution [height, width, inputs, features]."""
    return 0 if len(shape) == 2 else -1


def fans(shape: models.Shape) -> tuple[int, int]:
    """The number of inputs of a unit, and of units that an input reaches."""
    outputs, inputs = (shape[0], shape[1]) if len(shape) == 2 else (shape[-1], shape[-2])
    positions = np.prod(shape[:-2], dtype=int)
    return int(positions * inputs), int(positions * outputs)


def he_over_xavier(shape: models.Shape) -> float:
    """Deviation of He et al. 2015, sqrt(2 / inputs), over Glorot and Bengio's of 2010, sqrt(2 / (inputs + outputs))."""
    inputs, outputs = fans(shape)
    return float(np.sqrt((inputs + outputs) / inputs))


def unit_rows(kernel: Array) -> Array:
    """Weight norm's kernel with a gain of 1."""
    axis = feature_axis(kernel.shape)
    return jaxbn.weight_norm(kernel, jnp.ones(kernel.shape[axis], kernel.dtype), feature_axis=axis)


HE = models.Weights(jax.random.normal, lambda shape: float(np.sqrt(2 / fans(shape)[0])))


class Sizes(NamedTuple):
    """Of the networks.

    Attributes:
      halved: whether they see images of half the height and width.
      stages: of the residual network; it has 2 stages + 2 layers.
      width: number of filters of its first stage; each further stage has twice as many.
    """

    halved: bool
    stages: int
    width: int


def mlp(sizes: Sizes, norm: jaxbn.Normalizer) -> models.Network:
    """Three hidden layers of 100 units."""
    return models.mlp((100, 100, 100), norm, use_bias=False, activation=jax.nn.relu, weights=HE)


def lenet(sizes: Sizes, norm: jaxbn.Normalizer) -> models.Network:
    """LeNet-5 with ReLU; for halved images without its second pooling, since 3 x 3 pixels are left there."""
    second, third = conv5x5(16, padding=0), models.dense(120, use_bias=False)
    layers = [
        conv5x5(6, padding=2),
        models.after_pooling(second),
        third if sizes.halved else models.after_pooling(third),
    ]
    layers.append(models.dense(84, use_bias=False))
    return models.stack(layers, models.dense(10, use_bias=True), norm, jax.nn.relu, HE)


def resnet(sizes: Sizes, norm: jaxbn.Normalizer) -> models.Network:
    """A residual network with one block in each stage."""
    depth = 2 * sizes.stages + 2
    return small_resnet(depth, norm, width=sizes.width, stages=sizes.stages, convolve=patch_convolve)


NETWORKS = {"MLP": mlp, "LeNet": lenet, "ResNet-8": resnet}


def conv5x5(features: int, *, padding: int) -> models.Layer:
    """A 5 x 5 convolution as one matrix product, which is faster inside loops on a CPU: see `models.patches3x3`."""

    def apply(weights: dict, x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
        rows, columns = (length - 4 for length in x.shape[1:3])
        # First along the columns, then along the rows: 10 slices instead of 25, which compile faster.
        x = jnp.concatenate([x[:, :, j : j + columns] for j in range(5)], -1)
        x = jnp.concatenate([x[:, i : i + rows] for i in range(5)], -1)
        return x @ weights["kernel"].reshape(-1, features)

    return models.Layer(lambda shape: (5, 5, shape[-1], features), apply, features, use_bias=False)


class Rivals:
    """A network under the normalizer, the initial weights and the inputs of each run.

    A run holds "kind", a number in KINDS, and "he" and "standardized", 1 or 0: whether initial weights are He's, else
    Xavier's, and whether images are standardized by one mean and one deviation of all training pixels. The head starts
    alike in all runs. Weight norm starts as its authors have it: gain and bias standardize every unit on `first`.
    Kind and "standardized" lie among the statistics, since `apply` is given nothing else of a run.
    """

    def __init__(
        self,
        build: Callable[[Sizes, jaxbn.Normalizer], models.Network],
        sizes: Sizes,
        first: np.ndarray,
        moments: tuple[float, float],
    ):
        """Images [n, height, width, channels] in [0, 1] to start from; mean and deviation of the pixels of all."""
        self.build, self.halved = partial(build, sizes), sizes.halved
        self.first, self.moments = first, moments
        self._measure = jax.jit(self._measured)

    def init(self, run: dict, key: Array, x: Array) -> dict:
        """Variables of a run; x: [batch, height, width, channels]."""
        kind = run["kind"]
        variables = self.build(switched(kind)).init(key, self._seen(x, run["standardized"]))

        def start(kernel: Array) -> Array:
            return jnp.where(run["he"] > 0, 1.0, 1 / he_over_xavier(kernel.shape)) * kernel

        params = map_kernels(start, variables["params"])
        measured = self._measure(params, variables["batch_stats"], run["standardized"])
        weight = kind == KINDS.index(WEIGHT)

        def with_start(layer: dict, found: Pair) -> dict:
            of_norm = layer["norm"]
            moments = jaxbn.Moments(jnp.ones(()), *found)
            scale, bias = jaxbn.weight_norm_init(of_norm["scale"], of_norm["bias"], moments)
            norm = {"scale": jnp.where(weight, scale, 1.0), "bias": jnp.where(weight, bias, 0.0)}
            return {**layer, "norm": norm}

        # Copies: a training step consumes the state that it is given, and these are the run's own.
        numbers = {name: jnp.array(run[name], jnp.float32) for name in ("kind", "standardized")}
        stats = {"norms": variables["batch_stats"], "run": numbers}
        return {"params": map_normalized(with_start, params, measured), "batch_stats": stats}

    def apply(self, variables: dict, x: Array, *, train: bool) -> tuple[Array, dict]:
        """Logits and the moved statistics."""
        logits, stats = self._run(lambda norm: norm, variables, x, train)
        return logits, {**variables["batch_stats"], "norms": stats}

    def look(self, variables: dict, x: Array, train: Array) -> tuple[Array, Array]:
        """Logits, and the standard deviation of what each activation gets, root mean square over units: [layers]."""

        def deviation(x: Array, y: Array) -> Array:
            return jnp.sqrt(jnp.mean(jnp.var(y, tuple(range(y.ndim - 1)))))

        logits, found = self._run(lambda norm: models.watched(norm, deviation), variables, x, train)
        return logits, jnp.stack(jax.tree.leaves(found))

    def _run(self, lift: Callable, variables: dict, x: Array, train: bool | Array) -> tuple[Array, Any]:
        run = variables["batch_stats"]["run"]
        weight = run["kind"] == KINDS.index(WEIGHT)
        params = map_kernels(lambda kernel: jnp.where(weight, unit_rows(kernel), kernel), variables["params"])
        network = self.build(lift(switched(run["kind"])))
        own = {"params": params, "batch_stats": variables["batch_stats"]["norms"]}
        return network.apply(own, self._seen(x, run["standardized"]), train=train)

    def _seen(self, x: Array, standardized: Array) -> Array:
        """Images as the network sees them."""
        mean, deviation = self.moments
        x = models.pool2x2(x) if self.halved else x
        return jnp.where(standardized > 0, (x - mean) / deviation, x)

    def _measured(self, params: Any, stats: Any, standardized: Array) -> Any:
        """Mean and variance of every feature on the first images, by layer, where all below are standardized."""
        watched = models.watched(switched(jnp.asarray(KINDS.index(BATCH))), lambda x, y: _of_features(x))
        variables = {"params": map_kernels(unit_rows, params), "batch_stats": stats}
        seen = self._seen(jnp.asarray(self.first), standardized)
        return self.build(watched).apply(variables, seen, train=True)[1]


def _of_features(x: Array) -> Pair:
    return tuple(part[0] for part in over_examples(*by_position(x)))
