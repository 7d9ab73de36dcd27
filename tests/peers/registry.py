"""Linear layers of smaller packages."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch

from peers.layers import Arrays, Peer, as_numpy, as_torch, linear


class Gbra(Peer):
    """gbra's linear layer, with its stored norm refreshed before each use."""

    def layer(self, weight: Any, bias: Any, scaling: float, rank: int) -> Any:
        gbra = importlib.import_module("gbra")
        return gbra.GBRALinear(linear(weight, bias), rank, scaling * rank)

    def parameters(self, layer: Any) -> Arrays:
        return {"lora_a": layer.A, "lora_b": layer.B, "magnitude": layer.m}

    def filled(self, *args: Any, **arrays: Any) -> Any:
        layer = super().filled(*args, **arrays)
        layer.refresh_norm()
        return layer

    def init(self, weight: np.ndarray) -> np.ndarray:
        return self.layer(weight, None, 1.0, 1).m.detach().numpy()

    def merge(self, **arrays: Any) -> np.ndarray:
        gbra = importlib.import_module("gbra")
        model = torch.nn.Sequential(self.filled(bias=None, **arrays))
        with torch.no_grad():
            merged = gbra.merge_gbra(model, as_torch_dtype(arrays["weight"]))
        return as_numpy(merged[0].weight, arrays["weight"])


class NemoAutomodel(Peer):
    """NeMo AutoModel's linear layer. It cannot merge."""

    def layer(self, weight: Any, bias: Any, scaling: float, rank: int) -> Any:
        module = importlib.import_module("nemo_automodel.components._peft.lora")
        base = linear(weight, bias)
        return module.patch_linear_module(base, rank, scaling * rank, use_dora=True)

    def parameters(self, layer: Any) -> Arrays:
        return {
            "lora_a": layer.lora_A.weight,
            "lora_b": layer.lora_B.weight,
            "magnitude": layer.lora_magnitude,
        }

    def init(self, weight: np.ndarray) -> np.ndarray:
        return self.layer(weight, None, 1.0, 1).lora_magnitude.detach().numpy()

    def stored_magnitude(self, weight: np.ndarray) -> np.ndarray:
        """Return the magnitude of a bfloat16 base, which is stored in its dtype, in float32."""
        return self.layer(weight, None, 1.0, 1).lora_magnitude.detach().float().numpy()


class OmgHybridOMGa(Peer):
    """omg-hybridomga's linear layer, which computes in float32."""

    def layer(self, weight: Any, bias: Any, scaling: float, rank: int) -> Any:
        omg = importlib.import_module("omg_hybridomga")
        return omg.DoRALinear(linear(weight, bias), rank, scaling * rank)

    def parameters(self, layer: Any) -> Arrays:
        return {
            "lora_a": layer.lora_A.weight,
            "lora_b": layer.lora_B.weight,
            "magnitude": layer.magnitude,
        }

    def drop(self, layer: Any, dropout: torch.nn.Module) -> None:
        layer.dropout = dropout

    def init(self, weight: np.ndarray) -> np.ndarray:
        return self.layer(weight, None, 1.0, 1).magnitude.detach().numpy()[:, 0]

    def merge(self, **arrays: Any) -> np.ndarray:
        return as_numpy(self.filled(bias=None, **arrays).merge().weight, arrays["weight"])


class SocketLm(Peer):
    """socket-lm's linear layer."""

    def layer(self, weight: Any, bias: Any, scaling: float, rank: int) -> Any:
        module = importlib.import_module("socketimport.core.lora")
        config = module.LoRAConfig(r=rank, alpha=scaling * rank, use_dora=True)
        return module.LoRALinear(linear(weight, bias), config)

    def parameters(self, layer: Any) -> Arrays:
        return {"lora_a": layer.lora_A, "lora_b": layer.lora_B, "magnitude": layer.magnitude}

    def drop(self, layer: Any, dropout: torch.nn.Module) -> None:
        layer.dropout = dropout

    def init(self, weight: np.ndarray) -> np.ndarray:
        return self.layer(weight, None, 1.0, 1).magnitude.detach().numpy()

    def merge(self, **arrays: Any) -> np.ndarray:
        layer = self.filled(bias=None, **arrays)
        layer.merge()
        return as_numpy(layer.base.weight, arrays["weight"])


class Bidora(Peer):
    """bidora's linear layer, with one norm for each input column."""

    def layer(self, weight: Any, bias: Any, scaling: float, rank: int) -> Any:
        layers = importlib.import_module("bidora.layers")
        model = torch.nn.Sequential(linear(weight, bias))
        layers.replace_linear_with_bidora(model, rank, scaling * rank, target_modules=["0"])
        return model[0]

    def parameters(self, layer: Any) -> Arrays:
        return {"lora_a": layer.lora_A, "lora_b": layer.lora_B, "magnitude": layer.magnitude}

    def drop(self, layer: Any, dropout: torch.nn.Module) -> None:
        layer.dropout = dropout

    def init(self, weight: np.ndarray) -> np.ndarray:
        torch.manual_seed(0)  # the magnitude depends on numbers that the layer draws
        return self.layer(weight, None, 1.0, 1).magnitude.detach().numpy()

    def merge(self, **arrays: Any) -> np.ndarray:
        merged = self.filled(bias=None, **arrays).get_bidora_weights()
        return as_numpy(merged, arrays["weight"])


class UnslothZoo:
    """The merge of unsloth-zoo, in float32. It is not a public function."""

    def merge(
        self, weight: np.ndarray, lora_a: Any, lora_b: Any, magnitude: Any, scaling: float
    ) -> np.ndarray:
        saving = importlib.import_module("unsloth_zoo.saving_utils")
        adapter = (as_torch(array) for array in (lora_a, lora_b))
        stats = saving.LoraStats(None, *adapter, scaling, as_torch(magnitude))
        merged = saving._merge_lora(as_torch(weight), stats, "layer")
        return as_numpy(merged.cpu(), weight)


DROPPING = {
    "omg-hybridomga": ("omg_hybridomga", OmgHybridOMGa),
    "socket-lm": ("socketimport.core.lora", SocketLm),
}
"""The layers that drop the x of both products, with the modules to import."""


def as_torch_dtype(array: np.ndarray) -> torch.dtype:
    return getattr(torch, array.dtype.name)
