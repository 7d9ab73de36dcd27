"""PEFT's linear layer with another forward. The one module that knows PEFT's insides.

The class of a layer is swapped, not its `forward`: so copies of it compute with their own arrays.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear

from doraxp._base.types import Adapter, Array, Config, NormGradient
from doraxp.torch._function import dora_linear

AGAIN = "it is accelerated already"
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class AcceleratedLinear(Linear):
    """PEFT's linear layer: its DoRA computed by `dora_linear`, all else by itself."""

    _norm_gradient: NormGradient

    def forward(self, x: Array, *args: Any, **kwargs: Any) -> Array:
        """Return what PEFT's does."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        dora = [name for name in names if name in self.lora_magnitude_vector]
        if self.disable_adapters or self.merged or args or kwargs or not dora:
            return super().forward(x, *args, **kwargs)
        if len(names) > 1:
            raise ValueError(
                f"one adapter at a time can be active in an accelerated layer, got {names}"
            )
        if hooked := _hooked(self):
            raise ValueError(f"an accelerated layer must be restored first, but {hooked}")
        return self._adapted(x, *names)

    def _adapted(self, x: Array, name: str) -> Array:
        base, dropout = self.get_base_layer(), self.lora_dropout[name]
        lora_a, lora_b = self.lora_A[name].weight, self.lora_B[name].weight
        # PEFT's s may be anything, 0 too; a Config's is positive.
        adapter = Adapter(
            lora_a, self.scaling[name] * lora_b, self.lora_magnitude_vector[name].weight
        )
        config = Config(lora_a.shape[0], norm_gradient=self._norm_gradient)
        if isinstance(dropout, torch.nn.Identity) or not self.training:
            return dora_linear(x, base.weight, adapter, config, base.bias)
        # PEFT drops the x of the correction only: y = base(x) + (W' − W) x̃ = base(x − x̃) + W' x̃.
        kept = dropout(self._cast_input_dtype(x, lora_a.dtype))
        rest = base(x - kept.to(x.dtype))
        return (rest + dora_linear(kept, base.weight, adapter, config)).to(rest.dtype)


def has_dora(layer: Any) -> bool:
    """Say whether it is a layer of PEFT's with a DoRA adapter."""
    return isinstance(layer, LoraLayer) and len(layer.lora_magnitude_vector) > 0


def why_not(layer: Any) -> str | None:
    """Return why a layer cannot be swapped, or None where it can."""
    if type(layer) is AcceleratedLinear:
        return AGAIN
    if type(layer) is not Linear:
        return f"it is a {type(layer).__name__}, not a Linear"
    base = layer.get_base_layer()
    if type(base) is not torch.nn.Linear:
        return f"its base is a {type(base).__name__}, not a torch.nn.Linear"
    if hooked := _hooked(layer):
        return hooked
    rank, most = max(layer.r[name] for name in layer.lora_magnitude_vector), min(base.weight.shape)
    if rank > most:
        return f"its rank {rank} is above min(out, in) = {most}"
    return None


def _hooked(layer: Any) -> str | None:
    """Return which part that PEFT calls, and `AcceleratedLinear` does not, has hooks."""
    parts = {
        "base layer": [layer.get_base_layer()],
        "lora_A": layer.lora_A.values(),
        "lora_B": layer.lora_B.values(),
        "magnitude": layer.lora_magnitude_vector.values(),
    }
    for name, modules in parts.items():
        for module in modules:
            # Offloading puts another forward in the place of the class's.
            if "forward" in vars(module) or any(getattr(module, hooks) for hooks in HOOKS):
                return f"its {name} has hooks, which would not be called"
    return None


def swap(layer: Any, norm_gradient: NormGradient) -> None:
    """Make PEFT's layer one of ours."""
    layer.__class__ = AcceleratedLinear
    layer._norm_gradient = norm_gradient


def unswap(layer: Any) -> None:
    """Make it PEFT's again."""
    del layer._norm_gradient
    layer.__class__ = Linear
