"""A deep convolutional GAN (Radford et al. 2016) for images of one channel, with batch norm where each run says so.

The generator projects noise to 4 x 4 pixels and doubles them three times to 32 x 32; the discriminator is its mirror
image. Hidden layers have `4 width`, `2 width` and `width` channels on the side of the noise, the middle and the image.
Kernels are 4 x 4 with stride 2. All runs differ in numbers alone and train in one program.
"""

import itertools
import math
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

import jaxbn
from experiments.training import loop

SIDE, START = 32, 4  # pixels of an image's side; where the generator starts
NOISE = 100  # numbers, uniform on +-1, from which an image is made
LEAK = 0.2
PUBLISHED_DEVIATION = 0.02  # of the initial weights
PLAYERS = GENERATOR, DISCRIMINATOR = "generator", "discriminator"


def arm(
    *,
    generator: bool = False,
    discriminator: bool = False,
    ends: bool = False,
    affine: bool = True,
    he: bool = False,
    rate: float = 2e-4,
) -> dict[str, float]:
    """The numbers of a run.

    Args:
      generator: whether the generator's layers are normalized, all but the output.
      discriminator: likewise, all but the first and the output, which says real or made.
      ends: whether the generator's output and the discriminator's first layer are normalized too.
      affine: whether batch norm is followed by a scale and a bias.
      he: whether initial weights have the variance 2 / inputs, else the published deviation.
      rate: of Adam.
    """
    switches = {"generator": generator, "discriminator": discriminator, "ends": ends, "affine": affine, "he": he}
    return {**{name: float(value) for name, value in switches.items()}, "rate": rate}


def neighbourhoods(x: Array) -> Array:
    """The 4 x 4 neighbourhoods at stride 2, zeros outside: [batch, height / 2, width / 2, 16 channels].

    They are put together from cells of 2 x 2 pixels. A convolution is then one matrix product; see `models.patches3x3`.
    """
    batch, height, width, channels = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    cells = padded.reshape(batch, height // 2 + 1, 2, width // 2 + 1, 2, channels).transpose(0, 1, 3, 2, 4, 5)
    cells = cells.reshape(batch, height // 2 + 1, width // 2 + 1, 4 * channels)
    top, bottom = cells[:, :-1], cells[:, 1:]
    return jnp.concatenate([half[:, :, part] for half in (top, bottom) for part in (slice(-1), slice(1, None))], -1)


def halve(kernel: Array, x: Array) -> Array:
    """A convolution of 4 x 4 with stride 2; kernel: [16 channels, features]."""
    return neighbourhoods(x) @ kernel


def double(kernel: Array, x: Array) -> Array:
    """The transpose of `halve`, a "fractionally strided" convolution; kernel: [16 features, channels of x]."""
    batch, height, width, _ = x.shape
    image = jax.ShapeDtypeStruct((batch, 2 * height, 2 * width, len(kernel) // 16), x.dtype)
    return jax.linear_transpose(neighbourhoods, image)(x @ kernel.T)[0]


class Place(NamedTuple):
    """A layer: its kernel's shape, how many inputs a unit has, its features, and whether it is next to the images."""

    shape: tuple[int, int]
    inputs: int
    features: int
    end: bool = False


@cache
def places(width: int) -> dict[str, list[Place]]:
    """The layers of both players."""
    channels = [4 * width, 2 * width, width, 1]
    flat = START * START * channels[0]
    pairs = list(itertools.pairwise(channels))
    up = [Place((16 * out, into), 4 * into, out, end=out == 1) for into, out in pairs]
    down = [Place((16 * into, out), 16 * into, out, end=into == 1) for out, into in reversed(pairs)]
    return {
        GENERATOR: [Place((NOISE, flat), NOISE, channels[0]), *up],
        DISCRIMINATOR: [*down, Place((flat, 1), flat, 1)],
    }


def normalizer(batch_size: int) -> jaxbn.Normalizer:
    """Real and made images are normalized apart when they are judged together: each group by its own statistics."""
    return jaxbn.batch_norm(decay=0.9, epsilon=1e-5, group_size=batch_size)


def init(run: dict, width: int, key: Array) -> dict:
    """Both players, from one draw of weights."""
    every = places(width)
    flat = jax.random.normal(key, (sum(math.prod(place.shape) for name in PLAYERS for place in every[name]),))
    params, stats, start = {}, {}, 0
    for name in PLAYERS:
        params[name], stats[name] = [], []
        for place in every[name]:
            size = math.prod(place.shape)
            scale = jnp.where(run["he"] > 0, math.sqrt(2 / place.inputs), PUBLISHED_DEVIATION)
            kernel = scale * flat[start : start + size].reshape(place.shape)
            zeros, ones = jnp.zeros(place.features), jnp.ones(place.features)
            params[name].append({"kernel": kernel, "scale": ones, "bias": zeros})
            stats[name].append({"mean": jnp.zeros(place.features), "var": jnp.ones(place.features)})
            start += size
    return {"params": params, "batch_stats": stats}


def normalized(norm: jaxbn.Normalizer, run: dict, on: Array, variables: tuple, x: Array, train: bool) -> tuple:
    """Batch norm where it is on, else a bias alone; returns (y, moved statistics)."""
    params, stats = variables
    affine = run["affine"] > 0
    scale, bias = jnp.where(affine, params["scale"], 1.0), jnp.where(affine, params["bias"], 0.0)
    y, moved = norm.apply({"params": {"scale": scale, "bias": bias}, "batch_stats": stats}, x, train=train)
    return jnp.where(on > 0, y, x + jnp.expand_dims(params["bias"], range(x.ndim - 1))), moved


def generate(norm: jaxbn.Normalizer, run: dict, variables: tuple, noise: Array, *, train: bool) -> tuple[Array, list]:
    """Images in [-1, 1], [batch, 32, 32, 1], from noise [batch, NOISE]; and the moved statistics."""
    (first, *rest), moved = list(zip(*variables, strict=True)), []
    x = noise @ first[0]["kernel"]
    x = x.reshape(len(noise), START, START, -1)
    x, stats = normalized(norm, run, run[GENERATOR], first, x, train)
    moved.append(stats)
    for number, own in enumerate(rest):
        x = double(own[0]["kernel"], jax.nn.relu(x))
        last = number + 1 == len(rest)
        x, stats = normalized(norm, run, run[GENERATOR] * (run["ends"] if last else 1.0), own, x, train)
        moved.append(stats)
    return jnp.tanh(x), moved


def judge(norm: jaxbn.Normalizer, run: dict, variables: tuple, x: Array) -> tuple[Array, list]:
    """Logits that images are real, [batch], by the statistics of their group; and the moved statistics."""
    *hidden, (last, kept) = list(zip(*variables, strict=True))
    moved = []
    for number, own in enumerate(hidden):
        x = halve(own[0]["kernel"], x)
        x, stats = normalized(norm, run, run[DISCRIMINATOR] * (1.0 if number else run["ends"]), own, x, True)
        moved.append(stats)
        x = jax.nn.leaky_relu(x, LEAK)
    logits = (x.reshape(len(x), -1) @ last["kernel"])[:, 0] + last["bias"][0]
    return logits, [*moved, kept]


def descent(
    norm: jaxbn.Normalizer, run: dict, params: dict, stats: dict, real: Array, noise: Array
) -> tuple[dict, dict, Array]:
    """Each player's gradient of its own loss; the moved statistics; the losses of generator and discriminator, [2].

    The discriminator judges once: its gradient and that of the made images come from the same pass.
    """

    def make(params: list) -> tuple[Array, list]:
        return generate(norm, run, (params, stats[GENERATOR]), noise, train=True)

    def judge_both(params: list, made: Array) -> tuple[Array, list]:
        return judge(norm, run, (params, stats[DISCRIMINATOR]), jnp.concatenate([real, made]))

    made, back_to_noise, of_generator = jax.vjp(make, params[GENERATOR], has_aux=True)
    logits, back, of_discriminator = jax.vjp(judge_both, params[DISCRIMINATOR], made, has_aux=True)
    told_apart, by_logits = jax.value_and_grad(discriminator_loss)(logits)
    not_fooled, by_made = jax.value_and_grad(generator_loss)(logits)
    gradient = {DISCRIMINATOR: back(by_logits)[0], GENERATOR: back_to_noise(back(by_made)[1])[0]}
    moved = {GENERATOR: of_generator, DISCRIMINATOR: of_discriminator}
    return gradient, moved, jnp.stack([not_fooled, told_apart])


def discriminator_loss(logits: Array) -> Array:
    """Cross-entropy of real against made images; logits: [2 batch], the real ones first."""
    real, made = jnp.split(logits, 2)
    return jnp.mean(jax.nn.softplus(-real)) + jnp.mean(jax.nn.softplus(made))


def generator_loss(logits: Array) -> Array:
    """-log of the probability that made images are real (the loss "that does not saturate")."""
    return jnp.mean(jax.nn.softplus(-jnp.split(logits, 2)[1]))


def optimizer(run: dict) -> optax.GradientTransformation:
    """Adam with the published decay of its momentum."""
    return optax.adam(run["rate"], b1=0.5)


def as_images(images: Array) -> Array:
    """Digits in [0, 1], [batch, 28, 28, 1], as the generator makes them: in [-1, 1], with a rim of background."""
    rim = (SIDE - images.shape[1]) // 2
    return jnp.pad(2 * images - 1, ((0, 0), (rim, rim), (rim, rim), (0, 0)), constant_values=-1.0)


def as_digits(images: Array) -> Array:
    """What `as_images` was given, of made images: [0, 1], the rim cut off."""
    rim = (SIDE - loop.USUAL_SHAPE[0]) // 2
    return (images[..., rim:-rim, rim:-rim, :] + 1) / 2


def noise_of(seed: Array, step: Array | int, batch_size: int) -> Array:
    """The noise of one step; the same for all runs of a seed."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 2), step)
    return jax.random.uniform(key, (batch_size, NOISE), minval=-1.0)


@partial(jax.jit, static_argnames=("width",))
def start(runs: dict, seed: Array, width: int) -> dict:
    """The state of all runs of one seed before the first step; leaves [runs, ...]."""

    def one(run: dict) -> dict:
        variables = init(run, width, jax.random.fold_in(jax.random.key(seed), 0))
        return {"variables": variables, "optimizer": optimizer(run).init(variables["params"])}

    return jax.vmap(one)(runs)


@partial(jax.jit, donate_argnums=0)
def advance(states: dict, runs: dict, arrays: dict, seed: Array, first: Array, indices: Array) -> tuple[dict, Array]:
    """Train all runs of one seed, both players at each step; `indices` [steps, batch] from step number `first` on.

    Returns:
      The new states; the mean losses of generator and discriminator, [runs, 2].
    """
    batch_size = indices.shape[1]
    norm = normalizer(batch_size)

    def one(real: Array, noise: Array, state: dict, run: dict) -> tuple[dict, Array]:
        params, stats = state["variables"]["params"], state["variables"]["batch_stats"]
        gradient, moved, found = descent(norm, run, params, stats, real, noise)
        updates, adam = optimizer(run).update(gradient, state["optimizer"], params)
        variables = {"params": optax.apply_updates(params, updates), "batch_stats": moved}
        return {"variables": variables, "optimizer": adam}, found

    def body(states: dict, at: tuple[Array, Array]) -> tuple[dict, Array]:
        step, index = at
        real, _ = loop.take(arrays, index)
        return jax.vmap(partial(one, as_images(real), noise_of(seed, step, batch_size)))(states, runs)

    steps = first + jnp.arange(len(indices))
    states, found = jax.lax.scan(body, states, (steps, indices))
    return states, found.mean(0)


@partial(jax.jit, static_argnames=("batches", "batch_size", "train"))
def samples(variables: dict, runs: dict, seed: Array, *, batches: int, batch_size: int, train: bool) -> Array:
    """Digits that the generators of all runs of one seed make, [runs, batches batch_size, 28, 28, 1] in [0, 1].

    Args:
      variables: leaves [runs, ...].
      runs: their numbers, likewise.
      seed: of the noise.
      batches: how many batches are made.
      batch_size: images in each.
      train: whether each batch is normalized by its own statistics, else by running averages.
    """

    def one(number: Array) -> Array:
        # Steps of training are counted from 0 up: these are numbers that none of them has.
        noise = noise_of(seed, -1 - number, batch_size)

        def of_run(run: dict, params: list, stats: list) -> Array:
            return generate(normalizer(batch_size), run, (params, stats), noise, train=train)[0]

        made = jax.vmap(of_run)(runs, variables["params"][GENERATOR], variables["batch_stats"][GENERATOR])
        return as_digits(made)

    made = jnp.moveaxis(jax.lax.map(one, jnp.arange(batches)), 0, 1)
    return made.reshape(len(made), -1, *made.shape[3:])
