"""Several adapters on one layer of PEFT, and one adapter of LyCORIS with a strength."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch

from peers.layers import Given, Lycoris, as_numpy, as_torch, linear

__all__ = ["Given", "LycorisStrength", "OneOf", "PeftMerges", "PeftWeighted", "model_with"]


def model_with(weight: np.ndarray, adapters: list[dict[str, Any]], scalings: list[float]) -> Any:
    """Return a PEFT model of one linear layer with the adapters "0", "1" and so on."""
    peft = importlib.import_module("peft")
    model: Any = torch.nn.Sequential(linear(weight, None))
    for i, (adapter, s) in enumerate(zip(adapters, scalings, strict=True)):
        rank = len(adapter["lora_a"])
        config = peft.LoraConfig(
            r=rank, lora_alpha=s * rank, target_modules=["0"],
            use_dora=adapter["magnitude"] is not None,
        )  # fmt: skip
        if i == 0:
            model = peft.get_peft_model(model, config, "0", autocast_adapter_dtype=False)
        else:
            model.add_adapter(str(i), config, autocast_adapter_dtype=False)
        layer = model.base_model.model[0]
        layer.lora_A[str(i)].weight.data = as_torch(adapter["lora_a"])
        layer.lora_B[str(i)].weight.data = as_torch(adapter["lora_b"])
        if adapter["magnitude"] is not None:
            layer.lora_magnitude_vector[str(i)].weight.data = as_torch(adapter["magnitude"])
    return model


class PeftWeighted:
    """PEFT's `add_weighted_adapter`, and the merge of the adapter that it makes."""

    def __init__(self, combination: str) -> None:
        self.combination = combination

    def merge(self, weight: np.ndarray, adapters: Any, strengths: Any, scalings: Any) -> np.ndarray:
        ranks = [len(adapter["lora_a"]) for adapter in adapters]
        if self.combination == "linear" and len(set(ranks)) > 1:
            raise NotImplementedError  # PEFT raises ValueError
        model = model_with(weight, adapters, scalings)
        names = [str(i) for i in range(len(adapters))]
        options = {"svd_rank": sum(ranks)} if self.combination == "svd" else {}
        tuner = model.base_model
        tuner.add_weighted_adapter(names, strengths, "all", self.combination, **options)
        layer = tuner.model[0]
        layer.merge(adapter_names=["all"])
        return as_numpy(layer.base_layer.weight, weight)


class PeftMerges:
    """PEFT's merge of several adapters at once; `set_scale` sets each strength."""

    def merge(self, weight: np.ndarray, adapters: Any, strengths: Any, scalings: Any) -> np.ndarray:
        layer = model_with(weight, adapters, scalings).base_model.model[0]
        for i, strength in enumerate(strengths):
            layer.set_scale(str(i), strength)
        layer.merge(adapter_names=[str(i) for i in range(len(adapters))])
        return as_numpy(layer.base_layer.weight, weight)


class OneOf:
    """The merge of one adapter, by an implementation that merges several."""

    def __init__(self, peer: Any) -> None:
        self.peer = peer

    def merge(self, adapters: Any, **others: Any) -> np.ndarray:
        if len(adapters) > 1:
            raise NotImplementedError
        return self.peer.merge(adapters=adapters, **others)


class LycorisStrength(Lycoris):
    """The merge of one LoCon of LyCORIS with a multiplier."""

    def merge(self, weight: np.ndarray, adapters: Any, strengths: Any, scalings: Any) -> np.ndarray:
        if len(adapters) > 1 or adapters[0]["magnitude"] is None:
            raise NotImplementedError
        layer = self.filled(weight=weight, bias=None, scaling=scalings[0], **adapters[0])
        layer.merge_to(strengths[0])
        return layer.org_module[0].weight.detach().numpy()
