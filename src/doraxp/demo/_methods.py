"""The methods that adapt a network of linear layers, each with its forward and its backward.

    x (tokens, in)   W (out, in)   A (rank, in)   B (out, rank)   y = x W'ᵀ + bias

    full fine-tuning   W' = W          trains W and bias
    LoRA               W' = W + s B A  trains A and B
    DoRA               W' = g⊙V        trains A, B and m, by `doraxp.forward` and `backward`

A ReLU follows every layer except the last, which a softmax and the cross-entropy follow.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol, TypeAlias

from array_api_compat import array_namespace

import doraxp
from doraxp._base.types import Array
from doraxp.backends import transpose

LayerParameters: TypeAlias = Any
"""The parameters that a method trains in one layer, or their gradients: a NamedTuple of arrays."""
Parameters: TypeAlias = dict[str, LayerParameters]
"""The same for the whole network, by name of layer."""


class Layer(NamedTuple):
    """A plain linear layer, y = x Wᵀ + bias."""

    weight: Array
    """W, shape (out, in)."""
    bias: Array
    """Shape (out,)."""


Network: TypeAlias = dict[str, Layer]


class LowRank(NamedTuple):
    """The parameters that LoRA trains in one layer."""

    lora_a: Array
    """A, shape (rank, in)."""
    lora_b: Array
    """B, shape (out, rank)."""


class Method(Protocol):
    """A way to adapt one layer."""

    def start(self, base: Layer, *, seed: int) -> LayerParameters:
        """Return the trained parameters as they are before the first step."""

    def forward(self, x: Array, base: Layer, trained: LayerParameters) -> tuple[Array, Any]:
        """Return y and the cache that `backward` needs."""

    def backward(self, dy: Array, cache: Any) -> tuple[Array, LayerParameters]:
        """Return dx and the gradients of the trained parameters."""

    def merge(self, base: Layer, trained: LayerParameters) -> Layer:
        """Return the plain layer that acts as the adapted one does."""


class FullFineTuning:
    """Trains every weight and bias. The base itself is trained so."""

    def start(self, base: Layer, *, seed: int) -> Layer:
        """Start at the base."""
        return base

    def forward(self, x: Array, base: Layer, trained: Layer) -> tuple[Array, Any]:
        """Return y = x Wᵀ + bias."""
        return x @ transpose(trained.weight) + trained.bias, (x, trained)

    def backward(self, dy: Array, cache: Any) -> tuple[Array, Layer]:
        """Return dx = dy W, dW = dyᵀ x and dbias = Σ_tokens dy."""
        x, trained = cache
        xp = array_namespace(dy)
        return dy @ trained.weight, Layer(transpose(dy) @ x, xp.sum(dy, axis=0))

    def merge(self, base: Layer, trained: Layer) -> Layer:
        """Return the trained layer: there is nothing to merge."""
        return trained


class LoRA:
    """Trains A and B: DoRA with a gain of 1."""

    def __init__(self, config: doraxp.Config) -> None:
        self.config = config

    def start(self, base: Layer, *, seed: int) -> LowRank:
        """Start at the A and B that DoRA starts at."""
        adapter = doraxp.init(base.weight, self.config, seed=seed)
        return LowRank(adapter.lora_a, adapter.lora_b)

    def forward(self, x: Array, base: Layer, trained: LowRank) -> tuple[Array, Any]:
        """Return y = x Wᵀ + s L Bᵀ + bias with L = x Aᵀ."""
        low_rank = x @ transpose(trained.lora_a)  # (tokens, rank)
        update = self.config.scaling * (low_rank @ transpose(trained.lora_b))  # (tokens, out)
        return x @ transpose(base.weight) + update + base.bias, (x, low_rank, base, trained)

    def backward(self, dy: Array, cache: Any) -> tuple[Array, LowRank]:
        """Return dx = dy W + s (dy B) A, dA = s (dy B)ᵀ x and dB = s dyᵀ L."""
        x, low_rank, base, trained = cache
        d = self.config.scaling * (dy @ trained.lora_b)  # (tokens, rank)
        db = self.config.scaling * (transpose(dy) @ low_rank)  # (out, rank)
        return dy @ base.weight + d @ trained.lora_a, LowRank(transpose(d) @ x, db)

    def merge(self, base: Layer, trained: LowRank) -> Layer:
        """Return W' = W + s B A with the base's bias."""
        update = self.config.scaling * (trained.lora_b @ trained.lora_a)
        return Layer(base.weight + update, base.bias)


class DoRA:
    """Trains A, B and m, by doraxp."""

    def __init__(self, config: doraxp.Config) -> None:
        self.config = config

    def start(self, base: Layer, *, seed: int) -> doraxp.Adapter:
        """Start at W' = W."""
        return doraxp.init(base.weight, self.config, seed=seed)

    def forward(self, x: Array, base: Layer, trained: doraxp.Adapter) -> tuple[Array, Any]:
        """Return y = g⊙(x Vᵀ) + bias."""
        return doraxp.forward(x, base.weight, trained, self.config, bias=base.bias)

    def backward(self, dy: Array, cache: Any) -> tuple[Array, doraxp.Adapter]:
        """Return dx and the gradients of A, B and m."""
        gradients = doraxp.backward(dy, cache)
        return gradients.x, gradients.adapter

    def merge(self, base: Layer, trained: doraxp.Adapter) -> Layer:
        """Return W' = g⊙V with the base's bias."""
        return Layer(doraxp.merge(base.weight, trained, self.config), base.bias)


def methods(rank: int) -> dict[str, Method]:
    """Return the methods that the demo compares, all with s = 1."""
    exact = doraxp.Config(rank)
    detached = doraxp.Config(rank, norm_gradient="detached")
    return {
        "LoRA": LoRA(exact),
        "DoRA detached": DoRA(detached),
        "DoRA exact": DoRA(exact),
        "full fine-tuning": FullFineTuning(),
    }


def adapted_logits(method: Method, base: Network, trained: Parameters, x: Array) -> Array:
    """Return the adapted network's outputs before the softmax: (tokens, in) -> (tokens, 10)."""
    logits, *_ = _forward(method, base, trained, x)
    return logits


def plain_logits(network: Network, x: Array) -> Array:
    """Return a plain network's outputs before the softmax: (tokens, in) -> (tokens, 10)."""
    return adapted_logits(FullFineTuning(), network, network, x)


def merged(method: Method, base: Network, trained: Parameters) -> Network:
    """Return the plain network that acts as the adapted one does."""
    return {name: method.merge(layer, trained[name]) for name, layer in base.items()}


def parameter_count(trained: Parameters) -> int:
    """Return the number of trained parameters."""
    return sum(math.prod(array.shape) for leaves in trained.values() for array in leaves)


def loss_and_gradients(
    method: Method, base: Network, trained: Parameters, x: Array, targets: Array
) -> tuple[Array, Parameters]:
    """Return the mean cross-entropy and its gradients by the trained parameters.

    `targets` is 1 at each token's class and 0 elsewhere, shape (tokens, 10).
    """
    xp = array_namespace(x)
    logits, inputs, caches = _forward(method, base, trained, x)
    tokens = x.shape[0]
    shifted = logits - xp.max(logits, axis=-1, keepdims=True)
    log_softmax = shifted - xp.log(xp.sum(xp.exp(shifted), axis=-1, keepdims=True))
    loss = -xp.sum(targets * log_softmax) / tokens

    d = (xp.exp(log_softmax) - targets) / tokens  # (tokens, 10)
    gradients = {}
    for name in reversed(base):
        d, gradients[name] = method.backward(d, caches[name])
        d = xp.where(inputs[name] > 0, d, 0.0)  # the ReLU before this layer
    return loss, gradients


def _forward(
    method: Method, base: Network, trained: Parameters, x: Array
) -> tuple[Array, dict[str, Array], dict[str, Any]]:
    """Return the last layer's y, and the input and the cache of each layer."""
    xp = array_namespace(x)
    inputs, caches = {}, {}
    for name, layer in base.items():
        inputs[name] = x
        y, caches[name] = method.forward(x, layer, trained[name])
        x = xp.where(y > 0, y, 0.0)
    return y, inputs, caches
