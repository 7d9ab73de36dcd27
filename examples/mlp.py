"""Fine-tune a network of a home-made framework, be killed, and go on where the last save was.

    python examples/mlp.py FOLDER

The network has random weights, which stay frozen: adapters alone learn to tell two spirals apart.
Kill the script at any moment and run the command again: the result is the same, bit for bit.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

import doraxp
from doraxp.checkpoint import load_training, save_training

STEPS = 600


class Dense:
    """y = x W + b, with W (in, out)."""

    def __init__(self, rng, inputs, outputs):
        self.weight = rng.standard_normal((inputs, outputs)) * np.sqrt(2 / inputs)
        self.bias = 0.1 * rng.standard_normal(outputs)

    def forward(self, x):
        return x @ self.weight + self.bias


class Relu:
    """y = max(x, 0)."""

    def forward(self, x):
        self.positive = x > 0
        return x * self.positive

    def backward(self, dy):
        return dy * self.positive


class Network:
    """Three dense layers."""

    def __init__(self, rng, sizes=(2, 64, 64, 2)):
        fc1, fc2, fc3 = (Dense(rng, *sizes[i : i + 2]) for i in range(3))
        self.layers = {"fc1": fc1, "relu1": Relu(), "fc2": fc2, "relu2": Relu(), "fc3": fc3}

    def forward(self, x):
        for layer in self.layers.values():
            x = layer.forward(x)
        return x

    def backward(self, dy):
        for layer in reversed(self.layers.values()):
            dy = layer.backward(dy)


def cross_entropy(scores, labels):
    """Return the mean loss, and its gradient by the scores."""
    likely = np.exp(scores - scores.max(axis=1, keepdims=True))
    likely /= likely.sum(axis=1, keepdims=True)
    hot = np.eye(scores.shape[1])[labels]
    return float(-np.log((likely * hot).sum(axis=1)).mean()), (likely - hot) / len(labels)


def spirals(rng, count):
    """Return points (count, 2) on two arms, and the number of each point's arm."""
    labels, length = rng.integers(2, size=count), rng.uniform(0.3, 1, count)
    angle = 2 * np.pi * length + np.pi * labels
    points = length[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return points + 0.03 * rng.standard_normal(points.shape), labels


def main(folder):
    """Adapt, train with saves, evaluate, merge."""
    rng = np.random.default_rng(0)
    network, (x, labels), (unseen, answers) = Network(rng), spirals(rng, 400), spirals(rng, 1000)
    model = network.layers = doraxp.adapt_layers(
        network.layers, "all-linear", doraxp.Config(rank=2), seed=0, weight_layout="in_out"
    )
    print(model.summary())
    schedule = doraxp.cosine_schedule(0.02, total_steps=STEPS, warmup_steps=20)
    optimizer = doraxp.AdamW(schedule, max_norm=1.0)
    if (folder / "training.json").exists():
        training = load_training(folder)
        optimizer, rng = training.resume(model), training.generator
    for step in range(optimizer.steps, STEPS):
        batch = rng.integers(len(x), size=64)
        loss, dscores = cross_entropy(network.forward(x[batch]), labels[batch])
        network.backward(dscores)
        model.step(optimizer)
        if step % 20 == 19:
            save_training(folder, model, optimizer, generator=rng, extra={"loss": loss})
    model.eval()
    for name, layers in (("adapted", model), ("merged", model.merge())):
        network.layers = layers
        right = network.forward(unseen).argmax(axis=1) == answers
        print(f"{name}: {100 * right.mean():.1f} %")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
