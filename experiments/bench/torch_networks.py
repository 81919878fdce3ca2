"""The networks of the benchmarks in torch, with its own batch norm; to be called only where torch is installed."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.nn import Module

CLASSES = 10


def mlp(widths: Sequence[int] = (784, 100, 100, 100)) -> "Module":
    """`widths` inputs and hidden units, and an output of CLASSES."""
    import torch.nn as nn

    layers = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs, momentum=0.01), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], CLASSES))


def lenet() -> "Module":
    """LeNet-5 for images of 28 x 28, with means for pooling."""
    import torch.nn as nn

    def after(layer, norm):
        return [layer, norm(layer.weight.shape[0], momentum=0.01), nn.ReLU()]

    return nn.Sequential(
        *after(nn.Conv2d(1, 6, 5, padding=2, bias=False), nn.BatchNorm2d),
        nn.AvgPool2d(2),
        *after(nn.Conv2d(6, 16, 5, bias=False), nn.BatchNorm2d),
        nn.AvgPool2d(2),
        nn.Flatten(),
        *after(nn.Linear(400, 120, bias=False), nn.BatchNorm1d),
        *after(nn.Linear(120, 84, bias=False), nn.BatchNorm1d),
        nn.Linear(84, CLASSES),
    )


def resnet20() -> "Module":
    """The residual network of 20 layers for images of 32 x 32, no weights in its shortcuts."""
    import torch
    import torch.nn as nn

    def unit(inputs, outputs, stride):
        convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(outputs, momentum=0.01))

    class Block(nn.Module):
        def __init__(self, inputs, outputs):
            super().__init__()
            self.stride = 1 if inputs == outputs else 2
            self.first, self.second = unit(inputs, outputs, self.stride), unit(outputs, outputs, 1)

        def forward(self, x):
            y = self.second(torch.relu(self.first(x)))
            shortcut = x[:, :, :: self.stride, :: self.stride]
            missing = y.shape[1] - x.shape[1]
            return torch.relu(y + nn.functional.pad(shortcut, (0, 0, 0, 0, 0, missing)))

    widths = (16, 16, 16, 16, 32, 32, 32, 64, 64, 64)
    blocks = [Block(inputs, outputs) for inputs, outputs in itertools.pairwise(widths)]
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES)
    return nn.Sequential(unit(3, 16, 1), nn.ReLU(), *blocks, *head)
