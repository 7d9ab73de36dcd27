"""PEFT's convolutions and embeddings with another forward.

    convolution   y = g⊙apply(x, V) + bias            by `dora_convolution`
    embedding     y = g⊙(h + s (A[ids] Bᵀ))           h = base(ids)

An embedding calls its base, so a base that multiplies its rows by a scale does so, and the update
gets the same scale. PEFT stores V of the whole table, and so do the graphs of its steps.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from peft.tuners import lora
from peft.tuners.lora import dora, variants
from torch import Tensor

from doraxp.torch._gain import kept_gain
from doraxp.torch._modes import without_autocast
from doraxp.torch._operated import TorchConvolution, dora_convolution
from doraxp.torch._peft_layer import (
    Found,
    Swapped,
    is_hooked,
    one_active,
    why_hooked,
    why_not_plain,
    why_not_weight,
)


class _Parts(NamedTuple):
    """The parts of a convolution for one call."""

    base: Any
    dropout: Any
    lora_a: Tensor
    lora_b: Tensor
    magnitude: Tensor
    scaling: Any
    operator: TorchConvolution


class AcceleratedConvolution(Swapped):
    """A convolution with DoRA, before PEFT's class."""

    _base: ClassVar[type]
    _variant: ClassVar[type]
    _magnitude: ClassVar[type]

    @staticmethod
    def why_never(base: Any) -> str | None:
        """Return the reason why a layer around this base cannot be accelerated, or None."""
        if base.padding_mode != "zeros":
            return f"its padding_mode must be 'zeros', got {base.padding_mode!r}"
        if base.groups != 1:
            return f"its groups must be 1, got {base.groups}: the norm that PEFT takes is another"
        pairs = zip(base.kernel_size, base.dilation, strict=True)
        if any(kernel > 1 and dilation > 1 for kernel, dilation in pairs):
            return (
                "its dilation must be 1 where its kernel has more than 1 number, got "
                f"{base.dilation}: PEFT's lora_A has no dilation"
            )
        if base.padding == "same" and any(kernel % 2 == 0 for kernel in base.kernel_size):
            return f"its kernel must be odd for padding 'same', got {base.kernel_size}"
        return None

    def _find(self) -> Found:
        layer: Any = self  # torch does not know the types of a module's parts
        modules: dict[str, Any] = layer._modules
        known = modules["lora_A"]._modules
        name, reason = one_active(layer, known, self._variant)
        if reason is not None:
            return reason
        base, a, b = modules["base_layer"], known[name], modules["lora_B"]._modules[name]
        magnitude = modules["lora_magnitude_vector"]._modules[name]
        kind: type = self._base
        if type(base) is not kind:
            return f"its base must be a torch.nn.{kind.__name__}, got {type(base).__name__}"
        if type(a) is not kind or type(b) is not kind:
            return (
                f"its lora_A and lora_B must be of torch.nn.{kind.__name__}, got {type(a)} and "
                f"{type(b)}"
            )
        if type(magnitude) is not self._magnitude:
            return f"its magnitude must be of PEFT's class, got {type(magnitude)}"
        parts: Any = a, b, magnitude
        of_a, of_b, of_m = leaves = tuple(each._parameters["weight"] for each in parts)
        reason = (
            why_not_weight(modules["base_layer"]._parameters.get("weight"))
            or why_hooked(base, a, b, magnitude)
            or why_not_plain(leaves)
            or self.why_never(base)
        )
        if reason is not None:
            return reason
        dropout = modules["lora_dropout"]._modules[name]
        return _Parts(base, dropout, of_a, of_b, of_m, layer.scaling[name], _operator(base))

    def _compute(self, x: Tensor, parts: _Parts) -> Tensor | None:
        layer: Any = self
        base, dropout, lora_a, lora_b, magnitude, scaling, operator = parts
        weight, bias = base._parameters["weight"], base._parameters["bias"]
        if x.ndim != weight.ndim:
            return None  # without a batch, PEFT's y has one
        others = lora_a, scaling * lora_b.flatten(1), magnitude.reshape(-1)
        exact = self._norm_gradient == "exact"
        if dropout.__class__ is torch.nn.Identity or not layer.training:
            return dora_convolution(x, weight, *others, bias, operator, exact=exact)
        # As in a linear layer: y = base(x − x̃) + W' x̃ with x̃ = dropout(x).
        kept = dropout(layer._cast_input_dtype(x, lora_a.dtype))
        rest: Tensor = base(x - kept.to(x.dtype))
        y = dora_convolution(kept, weight, *others, None, operator, exact=exact)
        return (rest + y).to(rest.dtype)


def _operator(base: Any) -> TorchConvolution:
    """Return how the weight of a convolution acts."""
    padding = base.padding
    if padding == "same":
        padding = tuple(kernel // 2 for kernel in base.kernel_size)
    elif padding == "valid":
        padding = (0,) * len(base.kernel_size)
    return TorchConvolution(base.stride, padding, base.dilation)


class AcceleratedConv1d(AcceleratedConvolution, lora.layer.Conv1d):
    """PEFT's convolution over one dimension, accelerated."""

    _base, _variant = torch.nn.Conv1d, variants.DoraConv1dVariant
    _magnitude = dora.DoraConv1dLayer


class AcceleratedConv2d(AcceleratedConvolution, lora.layer.Conv2d):
    """PEFT's convolution over two dimensions, accelerated."""

    _base, _variant = torch.nn.Conv2d, variants.DoraConv2dVariant
    _magnitude = dora.DoraConv2dLayer


class AcceleratedConv3d(AcceleratedConvolution, lora.layer.Conv3d):
    """PEFT's convolution over three dimensions, accelerated."""

    _base, _variant = torch.nn.Conv3d, variants.DoraConv3dVariant
    _magnitude = dora.DoraConv3dLayer


class _Table(NamedTuple):
    """The parts of an embedding for one call."""

    base: Any
    lora_a: Tensor
    lora_b: Tensor
    magnitude: Tensor
    scaling: Any


class AcceleratedEmbedding(Swapped, lora.layer.Embedding):
    """PEFT's embedding, accelerated."""

    @staticmethod
    def why_never(base: Any) -> str | None:
        """Return the reason why a layer around this base cannot be accelerated, or None."""
        if not isinstance(base, torch.nn.Embedding):
            return f"its base must be a torch.nn.Embedding, got {type(base).__name__}"
        return None

    def _find(self) -> Found:
        layer: Any = self
        modules: dict[str, Any] = layer._modules
        known = modules["lora_embedding_A"]._parameters
        name, reason = one_active(layer, known, variants.DoraEmbeddingVariant)
        if reason is not None:
            return reason
        base, magnitude = modules["base_layer"], modules["lora_magnitude_vector"]._modules[name]
        if type(magnitude) is not dora.DoraEmbeddingLayer:
            return f"its magnitude must be of PEFT's class, got {type(magnitude)}"
        if is_hooked(magnitude):
            return "its magnitude has hooks, which would not be called"
        a, b = known[name], modules["lora_embedding_B"]._parameters[name]
        of_m: Any = magnitude._parameters["weight"]
        reason = (
            why_not_weight(base._parameters.get("weight"))
            or why_not_plain((a, b, of_m))
            or self.why_never(base)
        )
        return _Table(base, a, b, of_m, layer.scaling[name]) if reason is None else reason

    def _compute(self, x: Tensor, parts: _Table) -> Tensor:
        layer: Any = self
        base, lora_a, lora_b, magnitude, scaling = parts
        h: Tensor = base(x)
        weight, scaled_b = base._parameters["weight"], scaling * lora_b
        exact = self._norm_gradient == "exact"
        gain = kept_gain(weight, weight.mT, lora_a, scaled_b, magnitude, exact=exact)
        with without_autocast(h):
            update = layer._embed(x, lora_a.mT) @ scaled_b.mT
        scale = layer._get_embed_scale()
        if scale is not None:
            update = update * scale.to(update.dtype)
        y: Tensor = (gain * (h + update)).to(h.dtype)
        return y
