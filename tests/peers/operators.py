"""Convolutions and embeddings of PEFT, and convolutions of LyCORIS."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch

from peers.layers import Arrays, Peft, as_numpy, as_torch

CONVOLUTIONS = {1: torch.nn.Conv1d, 2: torch.nn.Conv2d, 3: torch.nn.Conv3d}


def convolution(weight: np.ndarray, bias: np.ndarray | None, groups: int, **sizes: Any) -> Any:
    out, inner, *kernel = weight.shape
    kind = CONVOLUTIONS[len(kernel)]
    layer = kind(groups * inner, out, kernel, groups=groups, bias=bias is not None, **sizes)
    layer.weight.data = as_torch(weight)
    if bias is not None:
        layer.bias.data = as_torch(bias)
    return layer


def without_groups(lora_a: np.ndarray, groups: int, inner: int, kernel: Any) -> np.ndarray:
    """Return A of all groups as a convolution over all inputs, with zeros between the groups."""
    *_, rank, _ = lora_a.shape
    whole = np.zeros((groups, rank, groups, inner, *kernel), lora_a.dtype)
    for group in range(groups):
        whole[group, :, group] = lora_a.reshape(groups, rank, inner, *kernel)[group]
    return whole.reshape(groups * rank, groups * inner, *kernel)


class PeftOperator(Peft):
    """PEFT's layer around another layer of PyTorch."""

    def adapted(self, base: Any, scaling: float, rank: int, autocast: bool = False) -> Any:
        peft = importlib.import_module("peft")
        config = peft.LoraConfig(
            r=rank, lora_alpha=scaling * rank, target_modules=["0"], use_dora=True
        )
        model = torch.nn.Sequential(base)
        model = peft.get_peft_model(model, config, autocast_adapter_dtype=autocast)
        return model.base_model.model[0]


class PeftConvolution(PeftOperator):
    """PEFT's convolutions. It has one A for all groups: zeros fill it between the groups."""

    def filled(
        self, weight: Any, lora_a: Any, lora_b: Any, magnitude: Any, scaling: float, groups: int,
        bias: Any = None, **sizes: Any,
    ) -> Any:  # fmt: skip
        base = convolution(weight, bias, groups, **sizes)
        whole = without_groups(lora_a, groups, *weight.shape[1:2], weight.shape[2:])
        layer = self.adapted(base, scaling, len(whole))
        given = {"lora_a": whole, "lora_b": lora_b, "magnitude": magnitude}
        for name, parameter in self.parameters(layer).items():
            parameter.data = as_torch(given[name]).reshape(parameter.shape)
        return layer

    def init(self, weight: np.ndarray, groups: int) -> np.ndarray:
        layer = self.adapted(convolution(weight, None, groups), 1.0, groups)
        magnitude = self.parameters(layer)["magnitude"].detach().numpy()
        return magnitude.reshape(groups, -1) if groups > 1 else magnitude.reshape(-1)

    def gradients(self, dy: np.ndarray, x: np.ndarray, **arrays: Any) -> Arrays:
        layer, leaf, y = self.run(x, **arrays)
        y.backward(as_torch(dy))
        grads = {name: value.grad.numpy() for name, value in self.parameters(layer).items()}
        groups, lora_a = arrays["groups"], arrays["lora_a"]
        inner, *kernel = arrays["weight"].shape[1:]
        whole = grads["lora_a"].reshape(groups, -1, groups, inner, *kernel)
        own = np.stack([whole[group, :, group] for group in range(groups)])
        shaped = {"lora_a": own, "lora_b": grads["lora_b"], "magnitude": grads["magnitude"]}
        found = {name: value.reshape(arrays[name].shape) for name, value in shaped.items()}
        return {"x": as_numpy(leaf.grad, x), **found, "lora_a": own.reshape(lora_a.shape)}

    def merge(self, groups: int, **arrays: Any) -> np.ndarray:
        if groups > 1:
            raise NotImplementedError  # as PEFT does
        return self.merge_of(self.filled(groups=groups, **arrays), arrays["weight"])


class ScaledEmbedding(torch.nn.Embedding):
    """An embedding that multiplies its result, as Gemma's does."""

    def __init__(self, *sizes: int, scale: float) -> None:
        super().__init__(*sizes)
        self.register_buffer("embed_scale", torch.tensor(scale))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)


class PeftEmbedding(PeftOperator):
    """PEFT's embedding."""

    def layer(self, weight: Any, scaling: float, rank: int, scale: float = 1.0, **_: Any) -> Any:
        base = ScaledEmbedding(*weight.shape, scale=scale)
        base.weight.data = as_torch(weight)
        return self.adapted(base, scaling, rank)

    def parameters(self, layer: Any) -> Arrays:
        return {
            "lora_a": layer.lora_embedding_A["default"],
            "lora_b": layer.lora_embedding_B["default"],
            "magnitude": layer.lora_magnitude_vector["default"].weight,
        }

    def init(self, weight: np.ndarray) -> np.ndarray:
        layer = self.layer(weight, 1.0, 1)
        return self.parameters(layer)["magnitude"].detach().numpy()

    def run(self, x: np.ndarray, **arrays: Any) -> tuple[Any, Any, torch.Tensor]:
        layer = self.filled(**arrays)
        return layer, None, layer(torch.tensor(x))

    def forward(self, x: np.ndarray, **arrays: Any) -> np.ndarray:
        return as_numpy(self.run(x, **arrays)[2], arrays["weight"])

    def gradients(self, dy: np.ndarray, x: np.ndarray, **arrays: Any) -> Arrays:
        layer, _, y = self.run(x, **arrays)
        y.backward(as_torch(dy))
        return {
            name: parameter.grad.numpy().reshape(arrays[name].shape)
            for name, parameter in self.parameters(layer).items()
        }


class LycorisConvolution(PeftConvolution):
    """LyCORIS's LoCon on a convolution without groups."""

    def adapted(self, base: Any, scaling: float, rank: int, autocast: bool = False) -> Any:
        locon = importlib.import_module("lycoris.modules.locon")
        alpha = scaling * rank
        return locon.LoConModule("layer", base, 1.0, rank, alpha, weight_decompose=True)

    def parameters(self, layer: Any) -> Arrays:
        return {
            "lora_a": layer.lora_down.weight,
            "lora_b": layer.lora_up.weight,
            "magnitude": layer.dora_scale,
        }

    def filled(self, groups: int, **others: Any) -> Any:
        if groups > 1:
            raise NotImplementedError
        return super().filled(groups=groups, **others)

    def merge_of(self, layer: Any, weight: np.ndarray) -> np.ndarray:
        merged, _ = layer.get_merged_weight()
        return merged.detach().numpy()
