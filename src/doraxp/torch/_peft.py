"""PEFT's linear layer with another forward. No other module reads PEFT's internals.

    W' x + bias      by `dora_linear`, with the parameters of PEFT's layer

The class of a layer is swapped, not its `forward`, because copies then use their own arrays.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear
from torch import Tensor

from doraxp._base.types import Adapter, Config, NormGradient
from doraxp.torch._function import dora_linear

AGAIN = "it is accelerated already"
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class AcceleratedLinear(Linear):
    """PEFT's linear layer, with DoRA computed by `dora_linear` and everything else by PEFT."""

    _norm_gradient: NormGradient

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the same as PEFT's forward."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        dora = [name for name in names if name in self.lora_magnitude_vector]
        if self.disable_adapters or self.merged or args or kwargs or not dora:
            return super().forward(x, *args, **kwargs)
        if len(names) > 1:
            raise ValueError(f"an accelerated layer must have one active adapter, got {names}")
        if hooked := _hooked(self):
            raise ValueError(
                f"an accelerated layer must not have hooks inside; restore it first: {hooked}"
            )
        return self._adapted(x, *names)

    def _adapted(self, x: Tensor, name: str) -> Tensor:
        layer: Any = self  # torch does not know the types of a module's parts
        base, dropout = layer.get_base_layer(), layer.lora_dropout[name]
        lora_a, lora_b = layer.lora_A[name].weight, layer.lora_B[name].weight
        magnitude = layer.lora_magnitude_vector[name].weight
        # PEFT's s may be any number; a Config's is positive.
        adapter = Adapter(lora_a, layer.scaling[name] * lora_b, magnitude)
        config = Config(lora_a.shape[0], norm_gradient=self._norm_gradient)
        if isinstance(dropout, torch.nn.Identity) or not self.training:
            return dora_linear(x, base.weight, adapter, config, base.bias)
        # PEFT applies dropout to the x of the correction only, with x̃ = dropout(x):
        # y = base(x) + (W' − W) x̃ = base(x − x̃) + W' x̃.
        kept = dropout(self._cast_input_dtype(x, lora_a.dtype))
        rest: Tensor = base(x - kept.to(x.dtype))
        return (rest + dora_linear(kept, base.weight, adapter, config)).to(rest.dtype)


def has_dora(layer: Any) -> bool:
    """Return True for a layer of PEFT's with a DoRA adapter."""
    return isinstance(layer, LoraLayer) and len(layer.lora_magnitude_vector) > 0


def why_not(layer: Any) -> str | None:
    """Return the reason why a layer cannot be swapped, or None where it can."""
    if type(layer) is AcceleratedLinear:
        return AGAIN
    if type(layer) is not Linear:
        return f"its class must be Linear, got {type(layer).__name__}"
    base = layer.get_base_layer()
    if type(base) is not torch.nn.Linear:
        return f"its base must be a torch.nn.Linear, got {type(base).__name__}"
    if hooked := _hooked(layer):
        return hooked
    rank, most = max(layer.r[name] for name in layer.lora_magnitude_vector), min(base.weight.shape)
    if rank > most:
        return f"its rank must be at most min(out, in) = {most}, got {rank}"
    return None


def _hooked(layer: Any) -> str | None:
    """Return a message that names a part with hooks, which `AcceleratedLinear` would not call."""
    parts = {
        "base layer": [layer.get_base_layer()],
        "lora_A": layer.lora_A.values(),
        "lora_B": layer.lora_B.values(),
        "magnitude": layer.lora_magnitude_vector.values(),
    }
    for name, modules in parts.items():
        for module in modules:
            # Offloading sets a forward on the instance instead of registering a hook.
            if "forward" in vars(module) or any(getattr(module, hooks) for hooks in HOOKS):
                return f"its {name} has hooks, which would not be called"
    return None


def swap(layer: Any, norm_gradient: NormGradient) -> None:
    """Make a layer of PEFT's an `AcceleratedLinear`."""
    layer.__class__ = AcceleratedLinear
    layer._norm_gradient = norm_gradient


def unswap(layer: Any) -> None:
    """Make an `AcceleratedLinear` a layer of PEFT's again."""
    del layer._norm_gradient
    layer.__class__ = Linear
