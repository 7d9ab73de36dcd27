"""PEFT's DoRA layers, computed by `dora_linear`, in place and back."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from doraxp._base.scalars import check_kind
from doraxp._base.types import Config, NormGradient


class Accelerated:
    """What `accelerate` swapped. A context manager that swaps back at its end.

    Attributes
    ----------
    layers : tuple of str
        Names of the layers that are computed here.
    left : mapping of str to str
        The other DoRA layers of the model, which PEFT still computes, and why.
    """

    def __init__(self, swapped: Mapping[str, Any], left: Mapping[str, str]) -> None:
        self._swapped = dict(swapped)
        self.layers = tuple(swapped)
        self.left = MappingProxyType(dict(left))

    def restore(self) -> None:
        """Give the layers back to PEFT. A second call does nothing."""
        from doraxp.torch._peft import unswap

        while self._swapped:
            unswap(self._swapped.popitem()[1])

    def __enter__(self) -> Accelerated:
        """Return itself: the layers are swapped already."""
        return self

    def __exit__(self, *_: object) -> None:
        """Swap back."""
        self.restore()


def accelerate(model: Any, norm_gradient: NormGradient = "exact") -> Accelerated:
    """Compute the DoRA layers of a PEFT model here, in place.

    The parameters stay PEFT's: the optimizer, `state_dict` and `save_pretrained` see no
    difference, and merging is still PEFT's. Dropout is PEFT's, its random numbers too. Copies
    and pickles of the model are accelerated like it. A layer with two active adapters, or with
    hooks inside that came later, is an error when it is called.

    Parameters
    ----------
    model : torch.nn.Module
        That holds PEFT's layers, as `peft.get_peft_model` returns it.
    norm_gradient : {"exact", "detached"}
        Whether the gradients go through the row norm. PEFT's do not: "detached" trains as PEFT
        does, "exact" does not.

    Returns
    -------
    Accelerated
        To swap back, by its `restore` or at the end of a ``with`` block.

    Raises
    ------
    TypeError
        `model` is no module.
    ValueError
        No DoRA layer around a plain `torch.nn.Linear` is in it, or some are accelerated already.

    Examples
    --------
    >>> import peft, torch
    >>> config = peft.LoraConfig(use_dora=True, target_modules=["0"], r=2)
    >>> model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), config)
    >>> with accelerate(model) as handle:
    ...     model(torch.ones(2, 4)).sum().backward()
    >>> handle.layers
    ('base_model.model.0',)
    """
    from doraxp.torch import _peft

    check_kind("model", model, torch.nn.Module)
    Config(1, norm_gradient=norm_gradient)  # holds it to the choices
    found, left = {}, {}
    for name, layer in model.named_modules():
        if _peft.has_dora(layer):
            reason = _peft.why_not(layer)
            if reason is None:
                found[name] = layer
            else:
                left[name] = reason
    if _peft.AGAIN in left.values():
        raise ValueError("the model must not be accelerated already: restore it first")
    if not found:
        raise ValueError(f"the model must have a DoRA layer that can be accelerated, got {left}")
    for layer in found.values():
        _peft.swap(layer, norm_gradient)
    return Accelerated(found, left)
