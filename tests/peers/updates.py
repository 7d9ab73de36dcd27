"""LyCORIS's LoHa and LoKr, with a magnitude or without one."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch

from peers.layers import as_torch, linear


class LycorisUpdate:
    """A module of LyCORIS, and the weight that it has merged, or that it multiplies x by."""

    def __init__(self, *, merged: bool) -> None:
        self.merged = merged

    def weight_of(self, module: Any, weight: np.ndarray, names: dict[str, Any]) -> np.ndarray:
        for name, values in names.items():
            if values is not None:
                setattr(module, name, torch.nn.Parameter(as_torch(values)))
        if self.merged:
            module.merge_to()
            return module.org_module[0].weight.detach().numpy()
        eye = as_torch(np.eye(weight.shape[1], dtype=weight.dtype))
        return module(eye).detach().numpy().T


class LycorisLoha(LycorisUpdate):
    """The product of two products."""

    def merge(
        self, weight: Any, first_a: Any, first_b: Any, second_a: Any, second_b: Any,
        magnitude: Any, scaling: float,
    ) -> np.ndarray:  # fmt: skip
        loha = importlib.import_module("lycoris.modules.loha")
        rank = len(first_a)
        decomposed = magnitude is not None
        module = loha.LohaModule(
            "layer", linear(weight, None), 1.0, rank, scaling * rank, weight_decompose=decomposed
        )
        names = {
            "hada_w1_a": first_b, "hada_w1_b": first_a,
            "hada_w2_a": second_b, "hada_w2_b": second_a,
            "dora_scale": magnitude[:, None] if decomposed else None,
        }  # fmt: skip
        return self.weight_of(module, weight, names)


class LycorisLokr(LycorisUpdate):
    """The Kronecker product. It has no s where both factors are whole: here the left one has it."""

    def merge(
        self, weight: Any, left: Any, right: Any, right_a: Any, right_b: Any, magnitude: Any,
        scaling: float,
    ) -> np.ndarray:  # fmt: skip
        lokr = importlib.import_module("lycoris.modules.lokr")
        whole = right is not None
        rank = 1 if whole else len(right_a)
        alpha = scaling * rank
        module = lokr.LokrModule(
            "layer", linear(weight, None), 1.0, rank, alpha, full_matrix=whole,
            weight_decompose=magnitude is not None,
        )  # fmt: skip
        module.use_w2 = whole
        module.scale = 1.0 if whole else scaling
        left = left * left.dtype.type(scaling) if whole else left
        names = {
            "lokr_w1": left, "lokr_w2": right, "lokr_w2_a": right_b, "lokr_w2_b": right_a,
            "dora_scale": None if magnitude is None else magnitude[:, None],
        }  # fmt: skip
        return self.weight_of(module, weight, names)


KINDS = {"loha": LycorisLoha, "lokr": LycorisLokr}
