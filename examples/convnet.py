"""A convolutional NumPy network of a home-made framework, and DoRA around its layers.

    python examples/convnet.py

The network learns to read handwritten digits, and is frozen. Adapters around its convolutions and
its linear layer then learn digits that are turned by 90°, and are merged into plain layers.
"""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

import doraxp
from doraxp.demo import split_digits

STEPS = 800


class Conv:
    """A convolution with kernels of (3, 3): x (batch, in, size, size) is padded by a zero."""

    def __init__(self, rng, inputs, outputs, stride):
        self.weight = rng.standard_normal((outputs, inputs, 3, 3)) * np.sqrt(2 / (9 * inputs))
        self.bias, self.stride = np.zeros(outputs), stride

    def forward(self, x):
        self.padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        each = slice(None, None, self.stride)
        self.windows = sliding_window_view(self.padded, (3, 3), axis=(2, 3))[:, :, each, each]
        y = np.tensordot(self.windows, self.weight, axes=((1, 4, 5), (1, 2, 3)))
        return np.moveaxis(y + self.bias, -1, 1)

    def backward(self, dy):
        self.dweight = np.tensordot(dy, self.windows, axes=((0, 2, 3), (0, 2, 3)))
        self.dbias = dy.sum(axis=(0, 2, 3))
        dwindows = np.tensordot(self.weight, dy, axes=(0, 1))  # (in, 3, 3, batch, ...)
        dx = np.zeros_like(self.padded)
        reach = self.stride * dy.shape[2]
        for i, j in np.ndindex(3, 3):
            part = dx[:, :, i : i + reach : self.stride, j : j + reach : self.stride]
            part += np.moveaxis(dwindows[:, i, j], 0, 1)
        return dx[:, :, 1:-1, 1:-1]


class Dense:
    """y = x Wᵀ + b, with W (out, in)."""

    def __init__(self, rng, inputs, outputs):
        self.weight = rng.standard_normal((outputs, inputs)) * np.sqrt(2 / inputs)
        self.bias = np.zeros(outputs)

    def forward(self, x):
        self.x = x
        return x @ self.weight.T + self.bias

    def backward(self, dy):
        self.dweight, self.dbias = dy.T @ self.x, dy.sum(axis=0)
        return dy @ self.weight


class Relu:
    """y = max(x, 0)."""

    def forward(self, x):
        self.positive = x > 0
        return x * self.positive

    def backward(self, dy):
        return dy * self.positive


class Flatten:
    """Each digit's numbers as one row."""

    def forward(self, x):
        self.shape = x.shape
        return x.reshape(len(x), -1)

    def backward(self, dy):
        return dy.reshape(self.shape)


def predict(layers, x):
    """Return the scores (digits, classes) of (digits, 8, 8)."""
    x = x[:, None]
    for layer in layers.values():
        x = layer.forward(x)
    return x


def train(layers, digits, rng, step):
    """Lower the cross-entropy, with a batch of 32 digits for each step."""
    for _ in range(STEPS):
        batch = rng.integers(len(digits.labels), size=32)
        scores = predict(layers, digits.images[batch])
        likely = np.exp(scores - scores.max(axis=1, keepdims=True))
        likely /= likely.sum(axis=1, keepdims=True)
        dy = (likely - digits.targets()[batch]) / len(batch)
        for layer in reversed(layers.values()):
            dy = layer.backward(dy)
        step()


def descend(layers, rate=0.1):
    """Take a step of gradient descent with the layers that have a weight."""
    for layer in layers.values():
        if hasattr(layer, "weight"):
            layer.weight -= rate * layer.dweight
            layer.bias -= rate * layer.dbias


def adapted(layers):
    """Return the layers with DoRA around those that have a weight."""
    return doraxp.adapt_layers(
        layers,
        ["conv1", "conv2", "head"],
        doraxp.Config(rank=4),
        seed=0,
        operators={
            "conv1": doraxp.Convolution(padding=1),
            "conv2": doraxp.Convolution(stride=2, padding=1),
        },
    )


def main():
    """Train, freeze, adapt, merge; print the accuracy on unseen digits after each."""
    rng = np.random.default_rng(0)
    training, unseen = split_digits(validate=False)
    turned = unseen.turned()

    def accuracy(layers, digits):
        return 100 * np.mean(predict(layers, digits.images).argmax(axis=1) == digits.labels)

    layers = {
        "conv1": Conv(rng, 1, 8, stride=1),
        "relu1": Relu(),
        "conv2": Conv(rng, 8, 16, stride=2),
        "relu2": Relu(),
        "flatten": Flatten(),
        "head": Dense(rng, 256, 10),
    }
    train(layers, training, rng, lambda: descend(layers))
    print(f"upright, trained: {accuracy(layers, unseen):5.1f} %")
    print(f"turned, frozen:   {accuracy(layers, turned):5.1f} %")

    model = adapted(layers)
    print(model.summary())
    optimizer = doraxp.AdamW(doraxp.cosine_schedule(0.04, total_steps=STEPS))
    train(model, training.turned(), rng, lambda: model.step(optimizer))
    print(f"turned, adapted:  {accuracy(model, turned):5.1f} %")
    print(f"turned, merged:   {accuracy(model.merge(), turned):5.1f} %")


if __name__ == "__main__":
    main()
