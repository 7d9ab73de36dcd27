"""axolotl's function for a linear layer of PEFT, which brings its own gradients."""

from __future__ import annotations

import importlib
import math
from typing import Any

import numpy as np
import torch

from peers.layers import Given, Peft, as_torch


class Axolotl(Peft):
    """The layer is PEFT's; forward and gradients are axolotl's. They take tokens of three axes."""

    def run(
        self, x: np.ndarray, dropout_mask: np.ndarray | None = None, **arrays: Any
    ) -> tuple[Any, torch.Tensor, torch.Tensor]:
        kernels = importlib.import_module("axolotl.kernels.lora")
        layer, leaf = self.filled(**arrays), as_torch(x).requires_grad_()
        *batch, inner = x.shape
        tokens = math.prod(batch)
        if dropout_mask is not None:
            self.drop(layer, Given(as_torch(dropout_mask).reshape(1, tokens, inner)))
        y = kernels.apply_lora_linear(layer, leaf.reshape(1, tokens, inner))
        return layer, leaf, y.reshape(*batch, y.shape[-1])
