"""What was tried before gradients flowed through the statistics: a penalty, renormalizing, stopped gradients.

Goodfellow, Bengio and Courville, Deep Learning, section 8.7.1, and Ioffe and Szegedy 2015, section 2. A network comes
as `build(norm) -> Network`; its hidden layers have weights and a bias {"kernel", "bias"} below the normalizer.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.lax import stop_gradient

import jaxbn
from experiments.training import loop, models

Build = Callable[[jaxbn.Normalizer], models.Network]


def stopped(norm: jaxbn.Normalizer) -> jaxbn.Normalizer:
    """Batch norm that takes mean and variance of the batch for constants: no gradient flows through them."""

    def apply(variables: dict, x: Array, *, train: bool) -> tuple[Array, dict]:
        if not train:
            return norm.apply(variables, x, train=False)
        batch = jaxbn.moments(stop_gradient(x), 0)
        y, _ = norm.apply({**variables, "batch_stats": {"mean": batch.mean, "var": batch.var}}, x, train=False)
        return y, norm.apply(variables, x, train=True)[1]

    return jaxbn.Normalizer(norm.init, apply)


def renormalizing(build: Build, epsilon: float) -> Callable[[dict, Array], dict]:
    """`after` of a `loop.Task`: weights and biases such that each pre-activation has mean 0, variance 1 on the batch.

    Scales and biases above the pre-activations are those of `jaxbn.batch_norm`.
    """
    measuring = build(models.watched(jaxbn.batch_norm(epsilon=epsilon), lambda x, y: jaxbn.moments(x, 0)))

    def renormalize(layer: dict, batch: jaxbn.Moments) -> dict:
        changed = jaxbn.renormalize_after_step(layer["kernel"], layer["bias"], batch, feature_axis=0, epsilon=epsilon)
        return dict(zip(("kernel", "bias"), changed, strict=True))

    def after(variables: dict, images: Array) -> dict:
        # A batch-normalized forward pass measures each layer through those already renormalized.
        _, batch = measuring.apply(variables, images, train=True)
        *hidden, head = variables["params"]
        hidden = [{**p, "layer": renormalize(p["layer"], one)} for p, one in zip(hidden, batch, strict=True)]
        return {**variables, "params": [*hidden, head]}

    return after


def penalized(build: Build, norm: jaxbn.Normalizer, weight: float) -> tuple[Callable, Callable]:
    """`apply` and `loss` of a `loop.Task`: the loss has `weight * jaxbn.penalty` of each pre-activation added."""
    network, watched = build(norm), build(models.watched(norm, lambda x, y: jaxbn.penalty(x)))

    def apply(variables: dict, x: Array, *, train: bool) -> tuple:
        if not train:
            return network.apply(variables, x, train=False)
        logits, penalties = watched.apply(variables, x, train=True)
        return (logits, sum(penalties)), variables["batch_stats"]

    def loss(outputs: tuple[Array, Array], labels: Array) -> Array:
        logits, penalty = outputs
        return loop.softmax_loss(logits, labels) + weight * penalty

    return apply, loss


def delivered(network: models.Network, through: models.Network, variables: dict, images: Array, labels: Array) -> Array:
    """The share of the forecast decrease of the loss that a small step on all hidden weights and biases brings about.

    The network's own gradient g forecasts a decrease of g.g times the rate. The normalization by the batch that follows
    the step leaves g.G times the rate, with G the gradient through the statistics.
    """

    def gradient(one: models.Network) -> list:
        def loss(params: list) -> Array:
            return loop.softmax_loss(one.apply({**variables, "params": params}, images, train=True)[0], labels)

        return [param["layer"] for param in jax.grad(loss)(variables["params"])[:-1]]

    own, whole = gradient(network), gradient(through)
    return optax.tree.vdot(own, whole) / optax.tree.vdot(own, own)


def bias_alone(u: Array, head: Array, labels: Array, *, stop: Array, rate: float, steps: int) -> tuple[Array, Array]:
    """The loss and the length of b, [steps + 1] each, of logits `(u + b - mean(u + b)) head` where b alone is learned.

    Args:
      u: [batch, units].
      head: [units, classes].
      labels: int [batch].
      stop: bool; whether the gradient takes the mean for a constant.
      rate: of gradient descent on the whole batch.
      steps: of it.
    """

    def loss(b: Array) -> Array:
        h = u + b[None]
        mean = jnp.mean(h, 0, keepdims=True)
        return loop.softmax_loss((h - jnp.where(stop, stop_gradient(mean), mean)) @ head, labels)

    def update(b: Array, _: None) -> tuple[Array, tuple]:
        value, gradient = jax.value_and_grad(loss)(b)
        return b - rate * gradient, (value, jnp.linalg.norm(b))

    return jax.lax.scan(update, jnp.zeros(u.shape[1], u.dtype), None, steps + 1)[1]
