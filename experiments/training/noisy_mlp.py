"""An MLP whose norm may be noisy: how it is built and trained, and what is measured of it afterwards."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import optax
from jax import Array

import jaxbn
from experiments.training import data, loop, models, uncertainty
from experiments.training.noisy_statistics import NOISY, at_sample, start

SEEN = 1000  # images of either kind, known and unknown, on which probabilities are judged


def build(width: int, norm: jaxbn.Normalizer) -> models.Network:
    """Two hidden layers of `width` units with this norm, ReLU after it, on means over 2 x 2 pixels."""
    layers = [models.after_pooling(models.dense(width, use_bias=False)), models.dense(width, use_bias=False)]
    return models.stack(layers, models.dense(10, use_bias=True), norm, jax.nn.relu, models.glorot_weights())


def decay_of_scales(strength: Array) -> optax.GradientTransformation:
    """Adds the gradient of `strength` times the sum of squares of all scales."""

    def update(path: tuple, gradient: Array, param: Array) -> Array:
        return gradient + 2 * strength * param if path[-1] == jax.tree_util.DictKey("scale") else gradient

    return optax.stateless(partial(jax.tree_util.tree_map_with_path, update))


@cache
def task(width: int) -> loop.Task:
    """The network of a run's `noisy_statistics.kind` under SGD at its "rate", with its "decay" of the scales.

    Metrics: "training_loss", of SEEN training images, and "test_loss", both in evaluation mode.
    """
    network = build(width, NOISY)

    def metrics(run: dict, state: dict, arrays: dict) -> dict[str, Array]:
        index = data.spread(SEEN, len(arrays["train_labels"]))
        parts = {"training": loop.take(arrays, index)}
        parts["test"] = data.pixels(arrays["test_images"]), arrays["test_labels"]
        found = {}
        for name, (images, labels) in parts.items():
            logits, _ = network.apply(state["variables"], images, train=False)
            found[f"{name}_loss"] = loop.softmax_loss(logits, labels)
        return found

    def optimizer(run: dict) -> optax.GradientTransformation:
        return optax.chain(decay_of_scales(run["decay"]), optax.sgd(run["rate"], momentum=0.9))

    return loop.Task(partial(start, network), network.apply, optimizer, metrics=metrics)


@partial(jax.jit, static_argnums=0)
def recalibrated(width: int, params: list, arrays: dict) -> Array:
    """Test accuracy with the exact statistics of all training images, without noise or dropout, of many networks.

    Args:
      width: of the networks.
      params: theirs, leaves [runs, ...].
      arrays: of `loop.on_device`.

    Returns:
      [runs]; it means nothing where a network has no norm.
    """
    network = build(width, jaxbn.batch_norm(decay=0.0))  # running statistics are those of the last batch
    images, _ = loop.take(arrays, jnp.arange(len(arrays["train_labels"])))

    def one(params: list) -> Array:
        variables = {**network.init(jax.random.key(0), images[:2]), "params": params}
        _, stats = network.apply(variables, images, train=True)
        variables = {"params": params, "batch_stats": stats}
        return loop.accuracy(network.apply, variables, arrays["test_images"], arrays["test_labels"])

    return jax.lax.map(one, params)


@partial(jax.jit, static_argnums=(0, 1, 2))
def judge_probabilities(
    width: int, samples: int, group: int | None, variables: dict, seed: Array, arrays: dict, unknown: Array
) -> Array:
    """How far the probabilities of a network with NOISY can be trusted: [3, 3].

    Args:
      width: of the network.
      samples: over how many its probabilities are averaged.
      group: each sample has the statistics of so many training images; None: each has dropout instead.
      variables: of the network.
      seed: draws the samples.
      arrays: of `loop.on_device`.
      unknown: SEEN images of other things: uint8 [n, height, width, channels].

    Returns:
      For the probabilities as they are, softened by one temperature chosen on validation, and averaged over samples:
      log likelihood, calibration error, and the probability that an unknown image has a higher entropy than a known
      one.
    """
    network, index = build(width, NOISY), data.spread(SEEN, len(arrays["test_labels"]))
    labels = arrays["test_labels"][index]
    images = data.pixels(jnp.concatenate([arrays["test_images"][index], unknown]))
    logits, _ = network.apply(variables, images, train=False)
    on_validation, _ = network.apply(variables, data.pixels(arrays["validation_images"]), train=False)
    temperature = uncertainty.best_temperature(on_validation, arrays["validation_labels"])

    def dropped(number: Array) -> Array:
        return network.apply(at_sample(variables, number), images, train=True)[0]

    if group is None:
        sampled = uncertainty.mean_probabilities(dropped, jnp.arange(samples))
    else:
        drawn = loop.batch_indices(seed, 0, samples, group, len(arrays["train_labels"]))
        batches = loop.take(arrays, drawn.ravel())[0].reshape(*drawn.shape, *images.shape[1:])
        key = jax.random.fold_in(jax.random.key(seed), 2)
        sampled = uncertainty.monte_carlo_batch_norm(partial(build, width), variables["params"], batches, images, key)

    def figures(probabilities: Array) -> Array:
        known, other = probabilities[:SEEN], probabilities[SEEN:]
        doubt = uncertainty.auroc(uncertainty.entropy(known), uncertainty.entropy(other))
        likelihood = uncertainty.log_likelihood(known, labels)
        return jnp.stack([likelihood, uncertainty.calibration_error(known, labels), doubt])

    return jnp.stack([figures(p) for p in (jax.nn.softmax(logits), jax.nn.softmax(logits / temperature), sampled)])
