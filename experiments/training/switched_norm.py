"""Batch norm, p-norms, frozen statistics and no norm as one normalizer: all train in one compiled program."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import stop_gradient

import jaxbn

SIZES = ("standard deviation", "l1", "l2", "l-infinity")  # what a feature may be divided by
DECAY, EPSILON = 0.9, 1e-5


def kind(size: str = SIZES[0], *, normalize: bool = True, frozen: bool = False) -> dict[str, int]:
    """The numbers of a run that say which normalizer it has, for `switched`.

    Args:
      size: one of SIZES. A p-norm is that of a feature over the batch and all positions, averaged:
        (mean |x|^p)^(1/p), taken before the mean is subtracted.
      normalize: else only a bias is added.
      frozen: whether the statistics are those of the first training batch for ever, and no gradient flows through them.
    """
    return {"size": SIZES.index(size), "normalize": int(normalize), "frozen": int(frozen)}


def sizes(x: Array, mean: Array) -> Array:
    """The SIZES of every feature, [sizes, features]; x: [..., features], mean: [features]."""
    axes = tuple(range(x.ndim - 1))
    centered = x - jnp.expand_dims(mean, axes)
    standard, l2 = (jnp.sqrt(jnp.mean(v**2, axes) + EPSILON) for v in (centered, x))
    return jnp.stack([standard, jnp.mean(jnp.abs(x), axes) + EPSILON, l2, jnp.max(jnp.abs(x), axes) + EPSILON])


def switched(run: dict) -> jaxbn.Normalizer:
    """`y = scale (x - mean) / size + bias` by the batch in training, by running statistics else.

    The numbers of `kind` lie among the statistics, since `apply` is given nothing else of a run; so does "spread": how
    far the standard deviations of the normalized features were apart in the last batch, as the standard deviation of
    their logarithms.
    """

    def init(key: Array, x: Array) -> dict:
        features = x.shape[-1:]
        stats = {
            "mean": jnp.zeros(features),
            "size": jnp.ones(features),
            "count": jnp.zeros(()),
            "spread": jnp.zeros(()),
        }
        # Copies: each norm's own, since a training step consumes the state that it is given.
        stats["kind"] = {name: jnp.array(run[name], jnp.float32) for name in kind()}
        return {"params": {"scale": jnp.ones(features), "bias": jnp.zeros(features)}, "batch_stats": stats}

    def apply(variables: dict, x: Array, *, train: bool) -> tuple[Array, dict]:
        stats = variables["batch_stats"]
        used, moved = by_batch(stats, x) if train else (stats, stats)
        on = stats["kind"]["normalize"] > 0
        mean, size, scale = (
            jnp.where(on, value, without)
            for value, without in ((used["mean"], 0.0), (used["size"], 1.0), (variables["params"]["scale"], 1.0))
        )
        axes = tuple(range(x.ndim - 1))
        factor, shift = scale / size, variables["params"]["bias"] - scale / size * mean
        y = x * jnp.expand_dims(factor, axes) + jnp.expand_dims(shift, axes)
        if train:
            log_std = jnp.log(used["std"]) - jnp.log(size)
            moved = {**moved, "spread": jnp.std(log_std)}
        return y, moved

    return jaxbn.Normalizer(init, apply)


def freeze(variables: dict) -> dict:
    """A network of `switched` whose statistics are those of its next training batch, with no gradient through them."""

    def one(stats: dict) -> dict:
        return {**stats, "kind": {**stats["kind"], "frozen": jnp.ones(())}, "count": jnp.zeros(())}

    return {**variables, "batch_stats": [one(stats) for stats in variables["batch_stats"]]}


def by_batch(stats: dict, x: Array) -> tuple[dict, dict]:
    """What a training batch is normalized by, with its "std", and the moved running statistics."""
    kind = stats["kind"]
    mean = jnp.mean(x, tuple(range(x.ndim - 1)))
    every = sizes(x, mean)
    batch = {"mean": mean, "size": jax.nn.one_hot(kind["size"].astype(int), len(SIZES)) @ every}
    first = stats["count"] == 0
    frozen, used, moved = kind["frozen"] > 0, {"std": every[0]}, dict(stats)
    for name, value in batch.items():
        held = jnp.where(first, stop_gradient(value), stats[name])
        used[name] = jnp.where(frozen, held, value)
        moved[name] = jnp.where(frozen, held, DECAY * held + (1 - DECAY) * value)
    return used, {**moved, "count": stats["count"] + 1}
