"""A module that adds a DoRA adapter to a torch.nn.Linear.

W (out, in) frozen     A (rank, in)     B (out, rank)     m (out,)     y = x W'ᵀ + bias
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter, functional

from doraxp._base.scalars import check_flag, check_kind, check_number
from doraxp._base.types import Adapter, Config
from doraxp._core.adapter import init, merge
from doraxp.torch._definition import over, row_norms
from doraxp.torch._function import dora_linear
from doraxp.torch._gain import gain


class DoRALinear(torch.nn.Module):
    """A `torch.nn.Linear` with a DoRA adapter: y = x W'ᵀ + bias with W' = (m / n)⊙(ρ⊙W + s B A).

    The state consists of ``weight``, ``bias`` if the base has one, ``lora_a``, ``lora_b`` and
    ``magnitude``. The base is never changed. Frozen, weight and bias share the base's memory; with
    `train_base` they are copies.

    In training with dropout, the rate p replaces numbers of x by 0 and divides the others by
    1 − p, which gives x̃, and by ``config.dropout``::

        "input":     y = x̃ W'ᵀ + (x − x̃) Wᵀ + bias
        "low_rank":  y = x W'ᵀ + (m / n)⊙(s (x̃ − x) Aᵀ Bᵀ) + bias

    Parameters
    ----------
    base : torch.nn.Linear
    config : Config
    seed : int
        Draws A, see `doraxp.init`.
    train_base : bool
        Train the weight and the bias too.
    dropout : float
        The rate p, at least 0 and below 1. PyTorch's generator draws, and `eval` turns it off.

    Raises
    ------
    TypeError
        `base` is not a `torch.nn.Linear`, or `dropout` is not a number.
    ValueError
        The rank is above min(out, in), or `dropout` is not in its range.

    Examples
    --------
    >>> import torch
    >>> from doraxp import Config
    >>> base = torch.nn.Linear(4, 3)
    >>> layer = DoRALinear(base, Config(rank=2, alpha=4), seed=0)
    >>> layer
    DoRALinear(in=4, out=3, bias=True, rank=2, scaling=2.0)
    >>> torch.equal(layer.merge().weight, base.weight)
    True
    """

    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    magnitude: Tensor

    def __init__(
        self, base: torch.nn.Linear, config: Config, *, seed: int, train_base: bool = False,
        dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        check_kind("base", base, torch.nn.Linear)
        check_flag("train_base", train_base)
        self.config = config
        self.dropout = check_number("dropout", dropout, below=1)

        def own(array: Tensor) -> Parameter:
            array = array.detach()
            return Parameter(array.clone() if train_base else array, requires_grad=train_base)

        self.weight = own(base.weight)
        self.register_parameter("bias", None if base.bias is None else own(base.bias))
        for name, leaf in init(self.weight, config, seed=seed)._asdict().items():
            self.register_parameter(name, Parameter(leaf))

    @property
    def adapter(self) -> Adapter:
        """A, B and m: the parameters, not copies."""
        return Adapter(self.lora_a, self.lora_b, self.magnitude)

    def forward(self, x: Tensor) -> Tensor:
        """Return y: (..., in) -> (..., out). Without dropout, y = x W'ᵀ + bias by `dora_linear`."""
        if not self.training or self.dropout == 0:
            return dora_linear(x, self.weight, self.adapter, self.config, self.bias)
        dropped = functional.dropout(x, self.dropout)
        if self.config.dropout == "input":
            y = dora_linear(dropped, self.weight, self.adapter, self.config)
            return y + _linear(x - dropped, self.weight, self.bias).to(y.dtype)
        y = dora_linear(x, self.weight, self.adapter, self.config, self.bias)
        scaled_b = self.config.scaling * self.lora_b
        exact = self.config.norm_gradient == "exact"
        g = gain(self._direction(), self.lora_a, scaled_b, self.magnitude, exact=exact)
        update = _linear(_linear(dropped - x, self.lora_a), scaled_b)
        return y + (g * update).to(y.dtype)

    def _direction(self) -> Tensor:
        """Return ρ⊙W, the part of V that does not depend on the adapter."""
        if self.config.form == "weight":
            return self.weight
        weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        norm, _ = row_norms(weight)
        return over(weight, norm[:, None])

    def merge(self) -> torch.nn.Linear:
        """Return a new `torch.nn.Linear` with W' and a copy of the bias."""
        out, inner = self.weight.shape
        linear = torch.nn.Linear(inner, out, bias=self.bias is not None, device="meta")
        with torch.no_grad():
            merged: Any = merge(self.weight, self.adapter, self.config)
            linear.weight = Parameter(merged)
            if self.bias is not None:
                linear.bias = Parameter(self.bias.clone())
        return linear

    def extra_repr(self) -> str:
        """Return the sizes, the rank and the scaling for the module's repr."""
        (out, inner), config = self.weight.shape, self.config
        sizes = f"in={inner}, out={out}, bias={self.bias is not None}"
        dropout = f", dropout={self.dropout} ({config.dropout})" if self.dropout else ""
        return f"{sizes}, rank={config.rank}, scaling={config.scaling}{dropout}"


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x Wᵀ + bias in the wider dtype of x and the weight, or in autocast's."""
    dtype = torch.promote_types(x.dtype, weight.dtype)
    bias = None if bias is None else bias.to(dtype)
    return functional.linear(x.to(dtype), weight.to(dtype), bias)
