"""A module that adds a DoRA adapter to a torch.nn.Linear.

W (out, in) frozen     A (rank, in)     B (out, rank)     m (out,)     y = x W'ᵀ + bias
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from doraxp._base.scalars import check_flag, check_kind
from doraxp._base.types import Adapter, Config
from doraxp._core.adapter import init, merge
from doraxp.torch._function import dora_linear


class DoRALinear(torch.nn.Module):
    """A `torch.nn.Linear` with a DoRA adapter: y = x W'ᵀ + bias with W' = (m / n)⊙(ρ⊙W + s B A).

    The state consists of ``weight``, ``bias`` if the base has one, ``lora_a``, ``lora_b`` and
    ``magnitude``. The base is never changed. Frozen, weight and bias share the base's memory; with
    `train_base` they are copies.

    Parameters
    ----------
    base : torch.nn.Linear
    config : Config
    seed : int
        Draws A, see `doraxp.init`.
    train_base : bool
        Train the weight and the bias too.

    Raises
    ------
    TypeError
        `base` is not a `torch.nn.Linear`.
    ValueError
        The rank is above min(out, in).

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
        self, base: torch.nn.Linear, config: Config, *, seed: int, train_base: bool = False
    ) -> None:
        super().__init__()
        check_kind("base", base, torch.nn.Linear)
        check_flag("train_base", train_base)
        self.config = config

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
        """Return y = x W'ᵀ + bias: (..., in) -> (..., out). See `dora_linear`."""
        return dora_linear(x, self.weight, self.adapter, self.config, self.bias)

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
        return f"{sizes}, rank={config.rank}, scaling={config.scaling}"
