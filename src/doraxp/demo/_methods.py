"""The methods that adapt a network, each with its forward and its backward in one layer.

    W (out, in) or (out, in, *kernel)   A (rank, in·kernel)   B (out, rank)   y = apply(x, W') + b

    full fine-tuning   W' = W          trains W and bias
    LoRA               W' = W + s B A  trains A and B
    DoRA               W' = g⊙V        trains A, B and m, by `doraxp.forward` and `backward`

apply(x, W) is that of the layer's operator: x Wᵀ or a convolution. A ReLU follows every layer
except the last, which a softmax and the cross-entropy follow.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol, TypeAlias, cast

from array_api_compat import array_namespace

import doraxp
from doraxp import Operator
from doraxp._base.types import Array
from doraxp.backends import transpose
from doraxp.demo._networks import Layer, Network, Operators, reshaped

LayerParameters: TypeAlias = Any
"""The parameters that a method trains in one layer, or their gradients: a NamedTuple of arrays."""
Parameters: TypeAlias = dict[str, LayerParameters]
"""The same for the whole network, by name of layer."""


class LowRank(NamedTuple):
    """The parameters that LoRA trains in one layer."""

    lora_a: Array
    """A, shape (rank, in·kernel)."""
    lora_b: Array
    """B, shape (out, rank)."""


class Method(Protocol):
    """A way to adapt one layer, whose weight acts through `operator`."""

    def start(self, operator: Operator, base: Layer, *, seed: int) -> LayerParameters:
        """Return the trained parameters as they are before the first step."""

    def forward(
        self, operator: Operator, x: Array, base: Layer, trained: LayerParameters
    ) -> tuple[Array, Any]:
        """Return y and the cache that `backward` needs."""

    def backward(self, operator: Operator, dy: Array, cache: Any) -> tuple[Array, LayerParameters]:
        """Return dx and the gradients of the trained parameters."""

    def merge(self, operator: Operator, base: Layer, trained: LayerParameters) -> Layer:
        """Return the plain layer that acts as the adapted one does."""


class FullFineTuning:
    """Trains every weight and bias. The base itself is trained so."""

    def start(self, operator: Operator, base: Layer, *, seed: int) -> Layer:
        """Start at the base."""
        return base

    def forward(
        self, operator: Operator, x: Array, base: Layer, trained: Layer
    ) -> tuple[Array, Any]:
        """Return y = apply(x, W) + bias."""
        return _biased(operator.apply(x, trained.weight), trained.bias, operator), (x, trained)

    def backward(self, operator: Operator, dy: Array, cache: Any) -> tuple[Array, Layer]:
        """Return dx, dW and dbias = Σ_tokens dy."""
        x, trained = cache
        weight = operator.weight_gradient(dy, x, trained.weight.shape)
        bias = array_namespace(dy).sum(_tokens(dy, operator), axis=0)
        return operator.transpose(dy, trained.weight, x.shape), Layer(weight, bias)

    def merge(self, operator: Operator, base: Layer, trained: Layer) -> Layer:
        """Return the trained layer: there is nothing to merge."""
        return trained


class LoRA:
    """Trains A and B: DoRA with a gain of 1. A acts as a weight with `rank` outputs."""

    def __init__(self, config: doraxp.Config) -> None:
        self.config = config

    def start(self, operator: Operator, base: Layer, *, seed: int) -> LowRank:
        """Start at the A and B that DoRA starts at."""
        adapter = doraxp.init(base.weight, self.config, seed=seed, kind=operator.kind)
        return LowRank(adapter.lora_a, adapter.lora_b)

    def forward(
        self, operator: Operator, x: Array, base: Layer, trained: LowRank
    ) -> tuple[Array, Any]:
        """Return y = apply(x, W) + s L Bᵀ + bias with L = apply(x, A)."""
        kind = operator.kind
        a = kind.restore(trained.lora_a, kind.shape_with(base.weight.shape, self.config.rank))
        low_rank = operator.apply(x, a)
        update = self.config.scaling * _mixed(low_rank, transpose(trained.lora_b), operator)
        y = _biased(operator.apply(x, base.weight) + update, base.bias, operator)
        return y, (x, low_rank, a, base, trained)

    def backward(self, operator: Operator, dy: Array, cache: Any) -> tuple[Array, LowRank]:
        """Return dx, dA, which both pass through s (dy B), and dB = s dyᵀ L."""
        x, low_rank, a, base, trained = cache
        d = self.config.scaling * _mixed(dy, trained.lora_b, operator)  # in low_rank's shape
        tokens, low_tokens = (_tokens(array, operator) for array in (dy, low_rank))
        db = self.config.scaling * (transpose(tokens) @ low_tokens)
        da = operator.kind.matrix(operator.weight_gradient(d, x, a.shape))
        dx = operator.transpose(dy, base.weight, x.shape) + operator.transpose(d, a, x.shape)
        return dx, LowRank(da, db)

    def merge(self, operator: Operator, base: Layer, trained: LowRank) -> Layer:
        """Return W' = W + s B A with the base's bias."""
        update = self.config.scaling * (trained.lora_b @ trained.lora_a)
        return Layer(base.weight + operator.kind.restore(update, base.weight.shape), base.bias)


class DoRA:
    """Trains A, B and m, by doraxp."""

    def __init__(self, config: doraxp.Config) -> None:
        self.config = config

    def start(self, operator: Operator, base: Layer, *, seed: int) -> doraxp.Adapter:
        """Start at W' = W."""
        return doraxp.init(base.weight, self.config, seed=seed, kind=operator.kind)

    def forward(
        self, operator: Operator, x: Array, base: Layer, trained: doraxp.Adapter
    ) -> tuple[Array, Any]:
        """Return y = g⊙apply(x, V) + bias."""
        return doraxp.forward(
            x, base.weight, trained, self.config, bias=base.bias, operator=operator
        )

    def backward(self, operator: Operator, dy: Array, cache: Any) -> tuple[Array, doraxp.Adapter]:
        """Return dx and the gradients of A, B and m."""
        gradients = doraxp.backward(dy, cache)
        return gradients.x, gradients.adapter

    def merge(self, operator: Operator, base: Layer, trained: doraxp.Adapter) -> Layer:
        """Return W' = g⊙V with the base's bias."""
        weight = doraxp.merge(base.weight, trained, self.config, kind=operator.kind)
        return Layer(weight, base.bias)


# Beside the products of a linear layer, moving an axis takes long: -1 is where it has to be.


def _biased(y: Array, bias: Array, operator: Operator) -> Array:
    """Return y with the bias of each channel added."""
    if operator.channel_axis == -1:
        return y + bias
    return y + reshaped(bias, (-1, *[1] * (y.ndim - 1 - operator.channel_axis)))


def _mixed(y: Array, matrix: Array, operator: Operator) -> Array:
    """Return y with its channels multiplied by a matrix (channels, others)."""
    if operator.channel_axis == -1:
        return y @ matrix
    mixed = _channels_last(y, operator) @ matrix
    return cast(Array, array_namespace(y).moveaxis(mixed, -1, operator.channel_axis))


def _tokens(y: Array, operator: Operator) -> Array:
    """Return y as (tokens, channels)."""
    if operator.channel_axis == -1:
        return y
    y = _channels_last(y, operator)
    return reshaped(y, (-1, y.shape[-1]))


def _channels_last(y: Array, operator: Operator) -> Array:
    return cast(Array, array_namespace(y).moveaxis(y, operator.channel_axis, -1))


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


def adapted_logits(
    method: Method, operators: Operators, base: Network, trained: Parameters, x: Array
) -> Array:
    """Return the adapted network's outputs before the softmax, (digits, 10)."""
    logits, *_ = _forward(method, operators, base, trained, x)
    return logits


def plain_logits(operators: Operators, network: Network, x: Array) -> Array:
    """Return a plain network's outputs before the softmax, (digits, 10)."""
    return adapted_logits(FullFineTuning(), operators, network, network, x)


def merged(method: Method, operators: Operators, base: Network, trained: Parameters) -> Network:
    """Return the plain network that acts as the adapted one does."""
    return {
        name: method.merge(operators[name], layer, trained[name]) for name, layer in base.items()
    }


def parameter_count(trained: Parameters) -> int:
    """Return the number of trained parameters."""
    return sum(math.prod(array.shape) for leaves in trained.values() for array in leaves)


def loss_and_gradients(
    method: Method,
    operators: Operators,
    base: Network,
    trained: Parameters,
    x: Array,
    targets: Array,
) -> tuple[Array, Parameters]:
    """Return the mean cross-entropy and its gradients by the trained parameters.

    `targets` is 1 at each digit's class and 0 elsewhere, shape (digits, 10).
    """
    xp = array_namespace(x)
    logits, inputs, caches = _forward(method, operators, base, trained, x)
    digits = x.shape[0]
    shifted = logits - xp.max(logits, axis=-1, keepdims=True)
    log_softmax = shifted - xp.log(xp.sum(xp.exp(shifted), axis=-1, keepdims=True))
    loss = -xp.sum(targets * log_softmax) / digits

    d = (xp.exp(log_softmax) - targets) / digits  # (digits, 10)
    gradients = {}
    for name in reversed(base):
        d, gradients[name] = method.backward(operators[name], d, caches[name])
        d = xp.where(inputs[name] > 0, d, 0.0)  # the ReLU before this layer
    return loss, gradients


def _forward(
    method: Method, operators: Operators, base: Network, trained: Parameters, x: Array
) -> tuple[Array, dict[str, Array], dict[str, Any]]:
    """Return the last layer's y, and the input and the cache of each layer."""
    xp = array_namespace(x)
    inputs, caches = {}, {}
    for name, layer in base.items():
        inputs[name] = x
        y, caches[name] = method.forward(operators[name], x, layer, trained[name])
        x = xp.where(y > 0, y, 0.0)
    return y, inputs, caches
