"""Swap the DoRA layers of a PEFT model to `dora_linear`, in place, and swap them back.

layers   the layers of PEFT's that doraxp computes
left     the DoRA layers that PEFT computes, with the reasons
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from doraxp._base.scalars import check_kind
from doraxp._base.types import Config, NormGradient
from doraxp._base.words import counted


class Accelerated:
    """An accelerated model. As a context manager it calls `restore` at its end.

    `layers` and `left` look at the model anew each time: a layer that PEFT must compute for a
    while, such as one with two active adapters, is in `left` for that while.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model

    def __repr__(self) -> str:
        layers = counted(len(self.layers), "layer")
        return f"<Accelerated: {layers} by doraxp, {len(self.left)} left to PEFT>"

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that doraxp computes now."""
        return tuple(name for name, reason in self._reasons().items() if reason is None)

    @property
    def left(self) -> Mapping[str, str]:
        """Names of the DoRA layers that PEFT computes now, each with the reason."""
        reasons = self._reasons().items()
        return MappingProxyType({name: reason for name, reason in reasons if reason is not None})

    def _reasons(self) -> dict[str, str | None]:
        from doraxp.torch._peft import dora_layers, why_not

        return {name: why_not(layer) for name, layer in dora_layers(self._model)}

    def restore(self) -> None:
        """Let PEFT compute all layers again, see `doraxp.torch.restore`."""
        restore(self._model)

    def __enter__(self) -> Accelerated:
        """Return this object; the layers are swapped already."""
        return self

    def __exit__(self, *_: object) -> None:
        """Call `restore`."""
        self.restore()


def accelerate(model: Any, norm_gradient: NormGradient = "exact") -> Accelerated:
    """Let doraxp compute the DoRA layers of a PEFT model, in place.

    The parameters stay PEFT's: the optimizer, `state_dict` and `save_pretrained` see no
    difference. PEFT still merges, and still draws the dropout with the same random numbers. PEFT
    also computes each call that doraxp does not, such as that of a layer with two active adapters,
    with a merged one or with a hook inside. That raises nothing, because it may change: look at the
    handle's `left`, which says why.

    Layers that a later adapter brings are accelerated too, if `model` contains PEFT's tuner. Copies
    and pickles of the model stay accelerated. A second call changes nothing but `norm_gradient`,
    for the whole model.

    The layers may be linear ones, convolutions and embeddings. Around a weight that bitsandbytes or
    torchao quantised, the products with W are the base's own.

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
        Names the layers. Its `restore`, or the end of a ``with`` block, lets PEFT compute them
        again.

    Raises
    ------
    TypeError
        `model` is not a module.
    ValueError
        The model has no layer with DoRA, or each of them has a property for which doraxp never
        takes it, such as its class or a rank above min(out, in). The message has the reasons.

    Examples
    --------
    >>> import peft, torch
    >>> config = peft.LoraConfig(use_dora=True, target_modules=["0"], r=2)
    >>> model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), config)
    >>> with accelerate(model) as handle:
    ...     model(torch.ones(2, 4)).sum().backward()
    ...     print(handle.layers)
    ('base_model.model.0',)
    """
    from doraxp.torch import _peft

    check_kind("model", model, torch.nn.Module)
    Config(1, norm_gradient=norm_gradient)  # raises for an unknown choice
    layers = _peft.dora_layers(model)
    never = {name: _peft.why_never(one) or _peft.why_no_rank(one) for name, one in layers}
    if not never:
        raise ValueError(
            "the model must have a layer with DoRA, has none: give use_dora=True to LoraConfig"
        )
    if None not in never.values():
        raise ValueError(
            f"one of the model's {counted(len(never), 'layer')} with DoRA must be fit for doraxp, "
            "none is: "
            + "; ".join(f"{name}: {reason}" for reason, name in _first_of_each(never).items())
        )
    _peft.swap(model, norm_gradient)
    return Accelerated(model)


def _first_of_each(reasons: Mapping[str, str | None]) -> dict[str | None, str]:
    """Return each reason with the name of the first layer that has it."""
    first: dict[str | None, str] = {}
    for name, reason in reasons.items():
        first.setdefault(reason, name)
    return first


def restore(model: Any) -> None:
    """Let PEFT compute all layers of a model again, in place.

    It undoes `accelerate` for the model, and for a copy or a pickle of an accelerated model. A
    model that is not accelerated stays as it is.

    Parameters
    ----------
    model : torch.nn.Module

    Raises
    ------
    TypeError
        `model` is not a module.

    Examples
    --------
    >>> import copy, peft, torch
    >>> config = peft.LoraConfig(use_dora=True, target_modules=["0"], r=2)
    >>> model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), config)
    >>> handle = accelerate(model)
    >>> copied = copy.deepcopy(model)
    >>> restore(copied)
    >>> type(copied.base_model.model[0]) is peft.tuners.lora.Linear
    True
    """
    check_kind("model", model, torch.nn.Module)
    from doraxp.torch import _peft

    _peft.restore(model)
