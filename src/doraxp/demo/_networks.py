"""The demo's networks: how each layer's weight acts, and the shapes of the weights.

::

    linear           64 -> 128 -> 128 -> 10
    convolutional    (1, 8, 8) -> (16, 8, 8) -> (32, 4, 4) -> 10, with kernels of (3, 3)

A ReLU follows every layer except the last.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple, TypeAlias, cast

import numpy as np
from array_api_compat import array_namespace

from doraxp import Convolution, LayerKind, MatMul, Operator
from doraxp._base.types import Array
from doraxp.backends import transpose


class Layer(NamedTuple):
    """A plain layer, y = apply(x, W) + bias."""

    weight: Array
    """W, as the layer's operator has it."""
    bias: Array
    """Shape (out,)."""


Network: TypeAlias = dict[str, Layer]
Operators: TypeAlias = dict[str, Operator]
"""The operator of each layer, by name. Compiled functions take the arrays of a network alone."""


class Product(MatMul):
    """x Wᵀ without the checks of MatMul: they would take half of the time of LoRA's small steps."""

    def apply(self, x: Array, weight: Array) -> Array:
        """Return x Wᵀ: (digits, in) and (out, in) -> (digits, out)."""
        return x @ transpose(weight)

    def transpose(self, dy: Array, weight: Array, x_shape: tuple[int, ...]) -> Array:
        """Return dy W, (digits, in)."""
        return dy @ weight

    def weight_gradient(self, dy: Array, x: Array, weight_shape: tuple[int, ...]) -> Array:
        """Return dyᵀ x, (out, in)."""
        return transpose(dy) @ x


class Flat:
    """x Wᵀ where x is the output of a convolution: x is flattened."""

    kind: ClassVar[LayerKind] = LayerKind("linear")
    channel_axis: ClassVar[int] = -1

    def apply(self, x: Array, weight: Array) -> Array:
        """Return x Wᵀ: (digits, ...) and (out, in) -> (digits, out)."""
        return reshaped(x, (x.shape[0], -1)) @ transpose(weight)

    def transpose(self, dy: Array, weight: Array, x_shape: tuple[int, ...]) -> Array:
        """Return dy W, in `x_shape`."""
        return reshaped(dy @ weight, x_shape)

    def weight_gradient(self, dy: Array, x: Array, weight_shape: tuple[int, ...]) -> Array:
        """Return dyᵀ x, (out, in)."""
        return transpose(dy) @ reshaped(x, (x.shape[0], -1))


def reshaped(array: Array, shape: tuple[int, ...]) -> Array:
    """Return an array in another shape."""
    return cast(Array, array_namespace(array).reshape(array, shape))


class Plan(NamedTuple):
    """A network without its numbers. JAX sorts the names of the layers: they are in that order."""

    x_shape: tuple[int, ...]
    """The shape of one digit."""
    operators: Operators
    shapes: dict[str, tuple[int, ...]]
    """The shape of each weight: (out, in), or (out, in, *kernel)."""

    @property
    def rank_limit(self) -> int:
        """The largest rank that every layer takes."""
        return min(min(shape[0], math.prod(shape[1:])) for shape in self.shapes.values())

    def draw(self, rng: np.random.Generator, asarray: Callable[[Array], Array]) -> Network:
        """Draw weights of variance 2/in, which keeps the scale through a ReLU; zero biases."""
        network = {}
        for name, shape in self.shapes.items():
            weight = rng.standard_normal(shape) * math.sqrt(2 / math.prod(shape[1:]))
            bias = np.zeros(shape[0], np.float32)
            network[name] = Layer(asarray(weight.astype(np.float32)), asarray(bias))
        return network


PLANS = {
    "linear": Plan(
        (64,),
        {"layer 1": Product(), "layer 2": Product(), "layer 3": Product()},
        {"layer 1": (128, 64), "layer 2": (128, 128), "layer 3": (10, 128)},
    ),
    "convolutional": Plan(
        (1, 8, 8),
        {
            "convolution 1": Convolution(padding=1),
            "convolution 2": Convolution(stride=2, padding=1),
            "linear": Flat(),
        },
        {"convolution 1": (16, 1, 3, 3), "convolution 2": (32, 16, 3, 3), "linear": (10, 512)},
    ),
}
"""The networks, by the name that `--network` takes."""
