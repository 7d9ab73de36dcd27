"""Swap the DoRA layers of a PEFT model to `dora_linear`, in place, and swap them back.

swapped   a layer of PEFT's that `dora_linear` computes now
left      a DoRA layer that PEFT still computes
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from doraxp._base.scalars import check_kind
from doraxp._base.types import Config, NormGradient


class Accelerated:
    """The layers that `accelerate` swapped. As a context manager it swaps them back at its end.

    Attributes
    ----------
    layers : tuple of str
        Names of the layers that doraxp computes.
    left : mapping of str to str
        Names of the DoRA layers that PEFT still computes, each with the reason.
    """

    def __init__(self, swapped: Mapping[str, Any], left: Mapping[str, str]) -> None:
        self._swapped = dict(swapped)
        self.layers = tuple(swapped)
        self.left = MappingProxyType(dict(left))

    def restore(self) -> None:
        """Let PEFT compute the layers again. A second call does nothing."""
        from doraxp.torch._peft import unswap

        while self._swapped:
            unswap(self._swapped.popitem()[1])

    def __enter__(self) -> Accelerated:
        """Return this object; the layers are swapped already."""
        return self

    def __exit__(self, *_: object) -> None:
        """Call `restore`."""
        self.restore()


def accelerate(model: Any, norm_gradient: NormGradient = "exact") -> Accelerated:
    """Let doraxp compute the DoRA layers of a PEFT model, in place.

    The parameters stay PEFT's: the optimizer, `state_dict` and `save_pretrained` see no
    difference. PEFT still merges, and still draws the dropout with the same random numbers.
    Copies and pickles of the model are accelerated too. A call of a layer raises ValueError where
    the layer has two active adapters, or where a part of it was given a hook later.

    Parameters
    ----------
    model : torch.nn.Module
        A model with PEFT's layers, such as `peft.get_peft_model` returns.
    norm_gradient : {"exact", "detached"}
        Whether the gradients go through the row norm. With "detached" they do not, and the model
        trains as PEFT trains it. With "exact" they do.

    Returns
    -------
    Accelerated
        Its `restore`, or the end of a ``with`` block, lets PEFT compute the layers again.

    Raises
    ------
    TypeError
        `model` is not a module.
    ValueError
        The model has no DoRA layer around a plain `torch.nn.Linear`, or some of its layers are
        accelerated already.

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
    Config(1, norm_gradient=norm_gradient)  # raises for an unknown choice
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
