"""The optimizers of `peft.optimizers`, with AdamW."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch

from peers.layers import Arrays, Peft, as_torch, linear


class PeftOptimizers:
    """LoRA+ and the Riemannian preconditioner. The state is the optimizer with its model."""

    def loraplus_step(
        self, params: Arrays, grads: Arrays, state: Any, ratio: float, weight_decay: float,
        **numbers: float,
    ) -> tuple[Arrays, Any]:  # fmt: skip
        def make(model: Any, **options: Any) -> Any:
            optimizers = importlib.import_module("peft.optimizers")
            return optimizers.create_loraplus_optimizer(
                model, torch.optim.AdamW, loraplus_lr_ratio=ratio,
                loraplus_weight_decay=weight_decay, **options,
            )  # fmt: skip

        return step(make, params, grads, state, **numbers)

    def scaled_step(
        self, params: Arrays, grads: Arrays, state: Any, damping: float, weight_decay: float,
        **numbers: float,
    ) -> tuple[Arrays, Any]:  # fmt: skip
        def make(model: Any, **options: Any) -> Any:
            optimizers = importlib.import_module("peft.optimizers")
            return optimizers.create_riemannian_optimizer(
                model, torch.optim.AdamW, reg=damping, weight_decay=weight_decay, **options
            )

        return step(make, params, grads, state, **numbers)


def step(
    make: Any, params: Arrays, grads: Arrays, state: Any, learning_rate: float, beta1: float,
    beta2: float, eps: float,
) -> tuple[Arrays, Any]:  # fmt: skip
    """Return the parameters after one step, and the optimizer with the parameters of its model."""
    if state is None:
        peft = importlib.import_module("peft")
        rank, inner = params["lora_a"].shape
        weight = np.ones((len(params["lora_b"]), inner), params["lora_a"].dtype)
        config = peft.LoraConfig(r=rank, target_modules=["0"], use_dora=True)
        base = torch.nn.Sequential(linear(weight, None))
        model = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
        trained = Peft().parameters(model.base_model.model[0])
        for name, parameter in trained.items():
            parameter.data = as_torch(params[name])
        state = make(model, lr=learning_rate, betas=(beta1, beta2), eps=eps), trained
    optimizer, trained = state
    for name, parameter in trained.items():
        parameter.grad = as_torch(grads[name])
    optimizer.step()
    return {name: value.detach().numpy().copy() for name, value in trained.items()}, state
