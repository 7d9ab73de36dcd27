"""A small NumPy framework, and the class that adds doraxp's DoRA to it.

    python examples/own_framework.py

The framework stores weights (in, out). Its optimizer reads `parameters` and `gradients` by name,
and passes new values to `assign`. A network learns to tell two spirals apart, is frozen, and is
then adapted to spirals that are turned by 90°.
"""

from __future__ import annotations

import numpy as np

import doraxp


class Dense:
    """y = x W + b, with W (in, out)."""

    def __init__(self, rng, inputs, outputs):
        self.weight = rng.standard_normal((inputs, outputs)) * np.sqrt(2 / inputs)
        self.bias = 0.1 * rng.standard_normal(outputs)

    def forward(self, x):
        self.x = x
        return x @ self.weight + self.bias

    def backward(self, dy):
        self.gradients = {"weight": self.x.T @ dy, "bias": dy.sum(axis=0)}
        return dy @ self.weight.T

    @property
    def parameters(self):
        return {"weight": self.weight, "bias": self.bias}

    def assign(self, values):
        self.weight, self.bias = values["weight"], values["bias"]


class Relu:
    """y = max(x, 0)."""

    def __init__(self):
        self.parameters = {}

    def forward(self, x):
        self.positive = x > 0
        return x * self.positive

    def backward(self, dy):
        return dy * self.positive


class Adapted:
    """A frozen Dense layer with a DoRA adapter. Only this class knows both libraries."""

    def __init__(self, dense, config, seed):
        self.dora = doraxp.DoRALayer(dense, config, seed=seed, weight_layout="in_out")
        self.forward = self.dora.forward
        self.assign = self.dora.load_state_dict
        self.merged = self.dora.merge_to_original_layer

    def backward(self, dy):
        self.dora.clear_gradients()  # doraxp adds to the gradients; this framework replaces them
        return self.dora.backward(dy)

    @property
    def parameters(self):
        return self.dora.state_dict()

    @property
    def gradients(self):
        return self.dora.gradients


class Momentum:
    """Stochastic gradient descent with momentum."""

    def __init__(self, layers, rate):
        self.layers, self.rate = [layer for layer in layers if layer.parameters], rate
        self.velocity = [dict.fromkeys(layer.parameters, 0.0) for layer in self.layers]

    def step(self):
        for layer, velocity in zip(self.layers, self.velocity, strict=True):
            for name, gradient in layer.gradients.items():
                velocity[name] = 0.9 * velocity[name] - self.rate * gradient
            layer.assign({name: p + velocity[name] for name, p in layer.parameters.items()})


def predict(layers, x):
    """Return the scores (tokens, classes)."""
    for layer in layers:
        x = layer.forward(x)
    return x


def train(layers, x, labels, steps, rate):
    """Lower the cross-entropy on all of x."""
    optimizer = Momentum(layers, rate)
    for _ in range(steps):
        scores = predict(layers, x)
        likely = np.exp(scores - scores.max(axis=1, keepdims=True))
        dy = likely / likely.sum(axis=1, keepdims=True)
        dy[np.arange(len(x)), labels] -= 1
        dy /= len(x)
        for layer in reversed(layers):
            dy = layer.backward(dy)
        optimizer.step()


def spirals(rng, count):
    """Return points (count, 2) on two arms, and the number of each point's arm."""
    labels = rng.integers(2, size=count)
    length = rng.uniform(0.3, 1, count)
    angle = 2 * np.pi * length + np.pi * labels
    points = length[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return points + 0.03 * rng.standard_normal(points.shape), labels


def main():
    """Train, freeze, adapt, merge; print the accuracy on unseen points after each."""
    rng = np.random.default_rng(0)
    turn = np.array([[0.0, -1.0], [1.0, 0.0]])
    (x, labels), (unseen, answers) = spirals(rng, 400), spirals(rng, 1000)

    def accuracy(layers, points):
        return 100 * np.mean(predict(layers, points).argmax(axis=1) == answers)

    network = [Dense(rng, 2, 64), Relu(), Dense(rng, 64, 64), Relu(), Dense(rng, 64, 2)]
    train(network, x, labels, steps=300, rate=0.1)
    print(f"trained:          {accuracy(network, unseen):5.1f} %")
    print(f"turned, frozen:   {accuracy(network, unseen @ turn):5.1f} %")

    adapted = [
        Adapted(layer, doraxp.Config(rank=2, alpha=4), seed=i) if layer.parameters else layer
        for i, layer in enumerate(network)
    ]
    train(adapted, x @ turn, labels, steps=300, rate=0.1)
    print(f"turned, adapted:  {accuracy(adapted, unseen @ turn):5.1f} %")

    merged = [layer.merged() if isinstance(layer, Adapted) else layer for layer in adapted]
    print(f"turned, merged:   {accuracy(merged, unseen @ turn):5.1f} %")
    trained, frozen = (
        sum(p.size for layer in layers for p in layer.parameters.values())
        for layers in (adapted, network)
    )
    print(f"parameters trained: {trained}, beside {frozen} frozen")


if __name__ == "__main__":
    main()
