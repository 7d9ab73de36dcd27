"""DoRA by the dense formulas in PyTorch, with its own gradients: what the kit must find right."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional

from peers.layers import Arrays, as_numpy, as_torch

CONVOLVE = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
NAMES = ("x", "weight", "lora_a", "lora_b", "magnitude", "bias")


def parts(norm_gradient: str, dropout: str | None) -> SimpleNamespace:
    return SimpleNamespace(
        convolution=Convolution(norm_gradient, dropout), embedding=Embedding(norm_gradient)
    )


def gain_of(v: torch.Tensor, magnitude: torch.Tensor, norm_gradient: str) -> torch.Tensor:
    """Return m/‖V‖ by rows, and 0 for a row of zeros."""
    squares = (v * v).sum(-1)
    norm = torch.where(squares > 0, squares, torch.ones_like(squares)).sqrt()
    norm = norm.detach() if norm_gradient == "detached" else norm
    return torch.where(squares > 0, magnitude / norm, torch.zeros_like(norm))


class Layer:
    """The functions that convolutions and embeddings share."""

    def __init__(self, norm_gradient: str, dropout: str | None = None) -> None:
        self.norm_gradient, self.dropout = norm_gradient, dropout

    def leaves(self, arrays: Arrays) -> Arrays:
        return {
            name: as_torch(array).requires_grad_()
            if array.dtype.kind == "f"
            else torch.tensor(array)
            for name, array in arrays.items()
            if isinstance(array, np.ndarray)
        }

    def forward(self, **arrays: Any) -> np.ndarray:
        numbers = {name: each for name, each in arrays.items() if not isinstance(each, np.ndarray)}
        return as_numpy(self.result(self.leaves(arrays), **numbers), arrays["weight"])

    def gradients(self, dy: np.ndarray, **arrays: Any) -> Arrays:
        numbers = {name: each for name, each in arrays.items() if not isinstance(each, np.ndarray)}
        leaves = self.leaves(arrays)
        self.result(leaves, **numbers).backward(as_torch(dy))
        asked = {name: leaf for name, leaf in leaves.items() if name in NAMES}
        return {name: leaf.grad.numpy() for name, leaf in asked.items() if leaf.grad is not None}


class Convolution(Layer):
    def matrices(self, weight: Any, lora_a: Any, groups: int) -> Any:
        return weight.reshape(*lora_a.shape[:-2], len(weight) // groups, -1)

    def parts_of(self, leaves: Arrays, groups: int, scaling: float) -> tuple[Any, Any, Any]:
        """Return the base and V as matrices, and the gain."""
        base = self.matrices(leaves["weight"], leaves["lora_a"], groups)
        v = base + scaling * (leaves["lora_b"] @ leaves["lora_a"])
        gain = gain_of(v, leaves["magnitude"], self.norm_gradient)
        return base, v, gain[..., None]

    def init(self, weight: np.ndarray, groups: int) -> np.ndarray:
        rows = weight.reshape(groups, len(weight) // groups, -1)
        norms = np.sqrt((rows * rows).sum(-1))
        return norms if groups > 1 else norms[0]

    def merge(
        self, weight: np.ndarray, groups: int, scaling: float, **adapter: np.ndarray
    ) -> np.ndarray:
        leaves = self.leaves({"weight": weight, **adapter})
        _, v, gain = self.parts_of(leaves, groups, scaling)
        return as_numpy((gain * v).reshape(weight.shape), weight)

    def result(
        self, leaves: Arrays, groups: int, scaling: float, stride: Any, padding: Any,
        dilation: Any, bias: Any = None, dropout_mask: Any = None,
    ) -> torch.Tensor:  # fmt: skip
        del bias, dropout_mask  # None: otherwise they are leaves
        x, mask = leaves["x"], leaves.get("dropout_mask")
        base, v, gain = self.parts_of(leaves, groups, scaling)
        convolve = CONVOLVE[x.ndim - 2]

        def product(x: Any, matrix: Any) -> Any:
            weight = matrix.reshape(leaves["weight"].shape)
            return convolve(x, weight, None, stride, padding, dilation, groups)

        y = product(x if mask is None else mask * x, gain * v)
        if mask is not None:
            beside = gain * base if self.dropout == "low_rank" else base
            y = y + product(x - mask * x, beside)
        if "bias" in leaves:
            y = y + leaves["bias"].reshape(-1, *(1,) * (x.ndim - 2))
        return y


class Embedding(Layer):
    def parts_of(self, leaves: Arrays, scaling: float) -> tuple[Any, Any]:
        v = leaves["weight"].T + scaling * (leaves["lora_b"] @ leaves["lora_a"])
        return v, gain_of(v, leaves["magnitude"], self.norm_gradient)

    def init(self, weight: np.ndarray) -> np.ndarray:
        return np.sqrt((weight * weight).sum(0))

    def merge(self, weight: np.ndarray, scaling: float, **adapter: np.ndarray) -> np.ndarray:
        v, gain = self.parts_of(self.leaves({"weight": weight, **adapter}), scaling)
        return as_numpy((gain[:, None] * v).T, weight)

    def result(self, leaves: Arrays, scaling: float, scale: float) -> torch.Tensor:
        v, gain = self.parts_of(leaves, scaling)
        return scale * functional.embedding(leaves["x"], (gain[:, None] * v).T)
