"""Running statistics of a trained network where its inputs are no longer those that it was trained on."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

import jaxbn
from experiments.training.models import Network

Build = Callable[[jaxbn.Normalizer], Network]


def blending(norm: jaxbn.Normalizer, seen: Array, prior_count: Array | float) -> jaxbn.Normalizer:
    """The normalizer by its running statistics blended with the moments of some examples; see `jaxbn.blend`.

    Args:
      norm: whose variables it takes.
      seen: [batch] bool: the examples that count.
      prior_count: how many examples the running statistics are worth.

    Returns:
      A Normalizer that gives back the blended statistics as those that moved, in both modes. All examples are
      normalized by them, so that each layer is measured on what it gets with blended statistics below it.
    """

    def apply(variables: dict, x: Array, *, train: bool) -> tuple[Array, dict]:
        del train
        where = seen.reshape(-1, *(1,) * (x.ndim - 1))
        found = jaxbn.moments(x, range(x.ndim - 1), where=where)
        blended = jaxbn.blend(variables["batch_stats"], found, prior_count=prior_count, count=jnp.sum(seen))
        return norm.apply({**variables, "batch_stats": blended}, x, train=False)

    return jaxbn.Normalizer(norm.init, apply)


def adapted(
    build: Build, norm: jaxbn.Normalizer, variables: dict, images: Array, seen: Array, prior_count: Array | float
) -> dict:
    """The variables with statistics blended with those of the images that are `seen`, layer by layer; no labels."""
    _, batch_stats = build(blending(norm, seen, prior_count)).apply(variables, images, train=False)
    return {**variables, "batch_stats": batch_stats}


def with_norms(build: Build, variables: dict, images: Array, epsilon: float) -> dict:
    """The variables of a network with batch norms that have no effect, for those of one without.

    Their running statistics are those of the images, and their scale and bias undo them: the function is the same, and
    can be adapted as that of a network that had them all along (Jordan, kellerjordan.github.io/posts/adapt_bn).

    Args:
      build: of both networks.
      variables: of the one without, built with `jaxbn.identity()`.
      images: of the source.
      epsilon: of the batch norms.
    """

    def measure(variables: dict, x: Array, *, train: bool) -> tuple[Array, dict]:
        del train
        found = jaxbn.moments(x, range(x.ndim - 1))
        return x, jaxbn.unfold(found.mean, found.var, epsilon=epsilon)

    _, layers = build(jaxbn.identity()._replace(apply=measure)).apply(variables, images, train=False)
    *below, head = variables["params"]
    params = [{**param, "norm": layer["params"]} for param, layer in zip(below, layers, strict=True)]
    return {"params": [*params, head], "batch_stats": [layer["batch_stats"] for layer in layers]}


def freezable(norm: jaxbn.Normalizer) -> jaxbn.Normalizer:
    """The normalizer that in training stands still where its statistics say so: {"norm": of norm, "frozen": 0 or 1}.

    Frozen and moving statistics then train in one compiled program.
    """

    def init(key: Array, x: Array) -> dict:
        variables = norm.init(key, x)
        return {**variables, "batch_stats": {"norm": variables["batch_stats"], "frozen": jnp.zeros(())}}

    def apply(variables: dict, x: Array, *, train: bool) -> tuple[Array, dict]:
        stats = variables["batch_stats"]
        own = {**variables, "batch_stats": stats["norm"]}
        still, _ = norm.apply(own, x, train=False)
        if not train:
            return still, stats
        y, moved = norm.apply(own, x, train=True)
        frozen = stats["frozen"] > 0
        kept = jax.tree.map(lambda old, new: jnp.where(frozen, old, new), stats["norm"], moved)
        return jnp.where(frozen, still, y), {**stats, "norm": kept}

    return jaxbn.Normalizer(init, apply)


def freeze(variables: dict, frozen: Array | float) -> dict:
    """The variables of a network with `norm` as those of one with `freezable(norm)`; batch_stats: a list of layers."""
    flag = jnp.asarray(frozen, jnp.float32)
    return {**variables, "batch_stats": [{"norm": stats, "frozen": flag} for stats in variables["batch_stats"]]}


def melt(variables: dict) -> dict:
    """The way back from `freeze`."""
    return {**variables, "batch_stats": [stats["norm"] for stats in variables["batch_stats"]]}
