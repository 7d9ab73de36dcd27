"""PEFT's linear layers with another forward, and the swap of all layers of a model.

    y = x W'ᵀ + bias      by `dora_linear`, with the parameters of PEFT's layer
                          or by `around_base`, where the base is quantised

`doraxp.torch._peft_operated` has the other layers. No other module knows PEFT's internals.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from peft.tuners import lora
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.torchao import TorchaoLoraLinear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor

from doraxp._base.types import Adapter, Config, NormGradient
from doraxp.torch._around import around_base
from doraxp.torch._function import dora_linear
from doraxp.torch._peft_layer import Found, Swapped, one_active, why_hooked, why_not_plain
from doraxp.torch._peft_operated import (
    AcceleratedConv1d,
    AcceleratedConv2d,
    AcceleratedConv3d,
    AcceleratedEmbedding,
)
from doraxp.torch._quantised import dequantised, is_quantised


class _Parts(NamedTuple):
    """The parts of a layer for one call."""

    base: Any
    dropout: Any
    lora_a: Tensor
    lora_b: Tensor
    magnitude: Tensor
    scaling: Any  # a number; a tensor after PEFT prepared the layer for hot-swapping
    is_quantised: bool


class AcceleratedLayer(Swapped):
    """A linear layer with DoRA, before PEFT's class."""

    @staticmethod
    def why_never(base: Any) -> str | None:
        """Return the reason why a layer around this base cannot be accelerated, or None."""
        reason = is_quantised(base)
        return reason if isinstance(reason, str) else None

    def _find(self) -> Found:
        layer: Any = self  # torch does not know the types of a module's parts
        modules: dict[str, Any] = layer._modules
        known = modules["lora_A"]._modules
        name, reason = one_active(layer, known, DoraLinearVariant)
        if reason is not None:
            return reason
        base, a, b = modules["base_layer"], known[name], modules["lora_B"]._modules[name]
        magnitude = modules["lora_magnitude_vector"]._modules[name]
        quantised = is_quantised(base)
        if isinstance(quantised, str):
            return quantised
        if type(a) is not torch.nn.Linear or type(b) is not torch.nn.Linear:
            return f"its lora_A and lora_B must be of torch.nn.Linear, got {type(a)} and {type(b)}"
        if type(magnitude) is not DoraLinearLayer:
            return f"its magnitude must be of PEFT's class, got {type(magnitude)}"
        leaves: Any = (each._parameters["weight"] for each in (a, b, magnitude))
        of_a, of_b, of_m = leaves = tuple(leaves)
        reason = why_hooked(base, a, b, magnitude) or why_not_plain(leaves)
        if reason is not None:
            return reason
        if not quantised and (high := _too_high(of_a.shape[0], base)) is not None:
            return high
        dropout = modules["lora_dropout"]._modules[name]
        return _Parts(base, dropout, of_a, of_b, of_m, layer.scaling[name], quantised)

    def _compute(self, x: Tensor, parts: _Parts) -> Tensor:
        return self._quantised(x, parts) if parts.is_quantised else self._plain(x, parts)

    def _plain(self, x: Tensor, parts: _Parts) -> Tensor:
        layer: Any = self  # torch does not know the types of a module's parts
        base, dropout, lora_a, lora_b, magnitude, scaling, _ = parts
        weight, bias = base._parameters["weight"], base._parameters["bias"]
        rank, norm_gradient = lora_a.shape[0], self._norm_gradient
        config = None
        if scaling.__class__ is float and 0 < scaling < math.inf:
            config = _config(rank, scaling * rank, norm_gradient)
        if config is None:  # PEFT's s may be any number, and a tensor; a Config's is positive
            lora_b, config = scaling * lora_b, Config(rank, norm_gradient=norm_gradient)
        adapter = Adapter(lora_a, lora_b, magnitude)
        if dropout.__class__ is torch.nn.Identity or not layer.training:
            return dora_linear(x, weight, adapter, config, bias)
        # PEFT applies dropout to the x of the correction only, with x̃ = dropout(x):
        # y = base(x) + (W' − W) x̃ = base(x − x̃) + W' x̃.
        kept = dropout(layer._cast_input_dtype(x, lora_a.dtype))
        rest: Tensor = base(x - kept.to(x.dtype))
        return (rest + dora_linear(kept, weight, adapter, config)).to(rest.dtype)

    def _quantised(self, x: Tensor, parts: _Parts) -> Tensor:
        layer: Any = self
        base, dropout, lora_a, lora_b, magnitude, scaling, _ = parts
        dropped = None
        if layer.training and not isinstance(dropout, torch.nn.Identity):
            dropped = dropout(layer._cast_input_dtype(x, lora_a.dtype))
        scaled_b, exact = scaling * lora_b, self._norm_gradient == "exact"
        return around_base(
            x, dropped, base, partial(dequantised, base),
            lora_a, scaled_b, magnitude, exact=exact,
        )  # fmt: skip


class AcceleratedLinear(AcceleratedLayer, lora.Linear):
    """PEFT's linear layer, accelerated."""


class AcceleratedTorchaoLinear(AcceleratedLayer, TorchaoLoraLinear):
    """PEFT's linear layer around a weight of torchao, accelerated."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Do the same as PEFT's merge, with a warning where PEFT merges DoRA as plain LoRA."""
        names = self.active_adapters if adapter_names is None else adapter_names
        if any(name in self.lora_magnitude_vector for name in names):
            warnings.warn(
                "PEFT merges DoRA into a weight of torchao as plain LoRA, so the merged layer "
                "computes something else: merge into the weight before it is quantised",
                stacklevel=2,
            )
        super().merge(safe_merge, adapter_names)


class LoraModel(lora.LoraModel):  # PEFT reports the class's name, so it stays
    """PEFT's tuner, which accelerates the layers that a new adapter brings."""

    _norm_gradient: NormGradient

    def inject_adapter(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        """Do the same as PEFT's function, then accelerate the new layers."""
        super().inject_adapter(model, *args, **kwargs)
        if "_norm_gradient" in self.__dict__:  # else it is restored
            swap(model, self._norm_gradient)


_configs: dict[tuple[int, float, NormGradient], Config] = {}
_CLASSES: dict[type, type[Swapped]] = {
    lora.Linear: AcceleratedLinear,
    TorchaoLoraLinear: AcceleratedTorchaoLinear,
    lora.layer.Conv1d: AcceleratedConv1d,
    lora.layer.Conv2d: AcceleratedConv2d,
    lora.layer.Conv3d: AcceleratedConv3d,
    lora.layer.Embedding: AcceleratedEmbedding,
}


def _config(rank: int, alpha: float, norm_gradient: NormGradient) -> Config | None:
    """Return the same Config for the same numbers: evaluations are planned for one object.

    None where torch.compile meets it first: the number may be a symbol for it, which no Config is.
    """
    key = rank, alpha, norm_gradient
    config = _configs.get(key)  # torch.compile warns of `functools.cache`
    if config is None and not torch.compiler.is_compiling():
        config = _configs[key] = Config(rank, alpha, norm_gradient=norm_gradient)
    return config


def _accelerated(kind: type) -> type[Swapped] | None:
    """Return the accelerated class of a class of PEFT's layers, or None where there is none."""
    if kind.__module__ == "peft.tuners.lora.bnb":  # its import needs bitsandbytes
        from doraxp.torch._bitsandbytes import CLASSES

        return CLASSES.get(kind)
    return _CLASSES.get(kind)


def dora_layers(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the names and layers of a model that have a DoRA adapter."""
    for name, module in model.named_modules():
        if isinstance(module, lora.LoraLayer) and len(module.lora_magnitude_vector) > 0:
            yield name, module


def swap(model: torch.nn.Module, norm_gradient: NormGradient) -> None:
    """Accelerate the DoRA layers and the tuners of a model; the choice applies to all of them."""
    for _, layer in dora_layers(model):
        if why_never(layer) is None:
            if not isinstance(layer, Swapped):
                layer.__class__ = _accelerated(type(layer))
            layer._norm_gradient = norm_gradient
    tuner: Any  # torch takes every attribute of a module for a tensor
    for tuner in model.modules():
        if type(tuner) in (lora.LoraModel, LoraModel):
            tuner.__class__ = LoraModel
            tuner._norm_gradient = norm_gradient


def restore(model: torch.nn.Module) -> None:
    """Make the layers and the tuners of a model PEFT's again.

    A layer whose class was derived from an accelerated one since, as FSDP does, keeps that class,
    and PEFT computes it.
    """
    for module in model.modules():
        if isinstance(module, (Swapped, LoraModel)):
            module.__dict__.pop("_norm_gradient", None)
            if type(module).__module__.startswith("doraxp."):
                module.__class__ = type(module).__bases__[-1]


def why_never(layer: Any) -> str | None:
    """Return the reason why a DoRA layer of PEFT's cannot be accelerated, or None."""
    if isinstance(layer, Swapped):
        return None
    swapped = _accelerated(type(layer))
    if swapped is None:
        name = type(layer).__name__
        order = ": call accelerate before fully_shard" if name.startswith("FSDP") else ""
        return f"its class must be Linear, Conv1d, Conv2d, Conv3d or Embedding, got {name}{order}"
    base = layer._modules["base_layer"]
    if type(base._parameters.get("weight")).__name__ == "DTensor":
        return None  # FSDP2 makes it a plain tensor in each forward
    return swapped.why_never(base)


def why_no_rank(layer: Any) -> str | None:
    """Return the reason why all adapters of a DoRA layer have too high a rank, or None.

    A later adapter may have a lower rank, so such a layer is accelerated beside others.
    """
    base = layer._modules["base_layer"]
    if isinstance(layer, Swapped) or _accelerated(type(layer)) is not AcceleratedLinear:
        return None
    if is_quantised(base):
        return None
    known = layer._modules["lora_A"]._modules
    of_a = [known[name] for name in layer.lora_magnitude_vector if name in known]
    ranks = [one.weight.shape[0] for one in of_a if type(one) is torch.nn.Linear]
    return _too_high(min(ranks), base) if ranks else None


def _too_high(rank: int, base: Any) -> str | None:
    """Return the reason against a rank of a layer around this base, or None."""
    most = min(base._parameters["weight"].shape)
    return None if rank <= most else f"its rank must be at most min(out, in) = {most}, got {rank}"


def why_not(layer: Any) -> str | None:
    """Return the reason why PEFT computes a DoRA layer now, or None where doraxp computes it."""
    if isinstance(layer, Swapped):
        parts = layer._find()
        return parts if isinstance(parts, str) else None
    return why_never(layer) or "it is not accelerated: call accelerate again"
