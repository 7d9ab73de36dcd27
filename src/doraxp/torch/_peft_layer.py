"""An accelerated layer of PEFT's of any kind, and the reasons why PEFT must compute a call.

The class of a layer is swapped, not its `forward`, because copies then use their own arrays. Each
call reads the layer anew: PEFT and its users change a layer at any time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from doraxp._base.types import NormGradient

Found = tuple[Any, ...] | str
"""The parts of a layer for one call, or the reason why PEFT must compute it."""


class Swapped:
    """The first base of an accelerated layer, before PEFT's class."""

    _norm_gradient: NormGradient

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the same as PEFT's forward, which computes all that doraxp does not."""
        # In torch.jit.trace, a rank is a tensor.
        parts = "" if args or kwargs or torch._C._get_tracing_state() else self._find()
        y: Tensor | None = None
        if not isinstance(parts, str):
            y = self._compute(x, parts)
        if y is None:
            y = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        return y

    @staticmethod
    def why_never(base: Any) -> str | None:
        """Return the reason why a layer around this base cannot be accelerated, or None."""
        raise NotImplementedError

    def _find(self) -> Found:
        """Return the parts of the active adapter, or the reason why PEFT must compute this call.

        Every call of a layer comes here. A module's parts are read from its dictionaries, because
        ``module.part`` takes ten times as long.
        """
        raise NotImplementedError

    def _compute(self, x: Tensor, parts: Any) -> Tensor | None:
        """Return y, or None where PEFT must compute it for this x."""
        raise NotImplementedError


def one_active(layer: Any, known: Any, variant: type) -> tuple[str, str | None]:
    """Return the name of the active adapter among those known, and a reason against it or None."""
    if "_norm_gradient" not in layer.__dict__:
        return "", "it is not accelerated: call accelerate again"
    if layer._disable_adapters:
        return "", "its adapters are disabled"
    if layer.merged_adapters:
        return "", "its adapters are merged"
    active = layer._active_adapter
    names = [name for name in ([active] if active.__class__ is str else active) if name in known]
    if len(names) != 1:
        return "", f"it must have one active adapter, has {names}"
    (name,) = names
    if type(layer.lora_variant.get(name)) is not variant:
        return name, f"its active adapter must be DoRA, {name!r} is not"
    return name, None


def why_not_plain(leaves: tuple[Any, ...]) -> str | None:
    """Return the reason against the tensors of an adapter, or None."""
    for leaf in leaves:
        if leaf.__class__ is not torch.nn.Parameter and leaf.__class__ is not Tensor:
            return f"its adapter must consist of plain tensors, got {type(leaf).__name__}"
    return None


def why_not_weight(weight: Any) -> str | None:
    """Return the reason against the weight of a base that must not be quantised, or None."""
    kind = type(weight)
    if kind is torch.nn.Parameter or kind is Tensor:
        return None
    later = " (FSDP2 makes it plain in each forward)" if kind.__name__ == "DTensor" else ""
    return f"its weight must be a plain tensor, got {kind.__name__}{later}"


def is_hooked(module: Any) -> bool:
    """Return whether a module has a hook."""
    # Offloading sets a forward on the instance instead of registering a hook.
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def why_hooked(base: Any, a: Any, b: Any, magnitude: Any) -> str | None:
    """Return the reason against the parts of a layer that have hooks, or None."""
    if is_hooked(base) or is_hooked(a) or is_hooked(b) or is_hooked(magnitude):
        hooked = {"base layer": base, "lora_A": a, "lora_B": b, "magnitude": magnitude}
        part = next(part for part, module in hooked.items() if is_hooked(module))
        return f"its {part} has hooks, which would not be called"
    return None
