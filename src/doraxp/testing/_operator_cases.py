"""The catalogue's layers that are not matrices: convolutions and embeddings.

convolution  x (batch, in, *size)  weight (out, in/groups, *kernel)  y (batch, out, *positions)
embedding    x ids (...)           weight (tokens, dim)              y (..., dim)
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np

from doraxp._base.types import Config, Dropout
from doraxp._core.kinds import LayerKind
from doraxp._core.operators import Convolution, Embedding
from doraxp.backends import Windows
from doraxp.testing._cases import FULL, rounded

Arrays: TypeAlias = dict[str, Any]


@dataclass(frozen=True, eq=False)
class OperatorCase:
    """One convolution or embedding with its inputs, as NumPy arrays.

    Parameters
    ----------
    name : str
    reason : str
    config : Config
    kind : {"convolution", "embedding"}
    numbers : mapping
        Of a convolution `stride`, `padding` and `dilation`, a number for each dimension, and
        `groups`; of an embedding `scale`.
    arrays : mapping of str to array
        x, weight, lora_a, lora_b, magnitude and dy; in some cases also bias and dropout_mask.
    extreme : bool
        Whether the formulas as written divide 0 by 0.
    since : int
        The version of the catalogue that brought the case.
    """

    name: str
    reason: str
    config: Config
    kind: Literal["convolution", "embedding"]
    numbers: Mapping[str, Any]
    arrays: Mapping[str, Any] = field(repr=False)
    dtypes: tuple[str, ...] = FULL
    extreme: bool = False
    since: int = 3

    @property
    def windows(self) -> Windows:
        """The windows of a convolution."""
        size, kernel = self.arrays["x"].shape[2:], self.arrays["weight"].shape[2:]
        each = {name: tuple(self.numbers[name]) for name in ("stride", "padding", "dilation")}
        return Windows(size, kernel, **each)

    @property
    def layer_kind(self) -> LayerKind:
        """How the weight is stored."""
        if self.kind == "embedding":
            return LayerKind("embedding")
        return LayerKind("conv", groups=self.numbers["groups"])

    @property
    def operator(self) -> Convolution | Embedding:
        """How the weight acts."""
        if self.kind == "embedding":
            return Embedding(self.numbers["scale"])
        return Convolution(
            **{name: self.numbers[name] for name in ("stride", "padding", "dilation")}
        )

    def stored(self, dtype: str) -> Arrays:
        """Return the arrays in a dtype; ids as they are."""
        return {
            name: array if array.dtype.kind == "i" else array.astype(dtype)
            for name, array in self.arrays.items()
        }


def operator_catalogue() -> tuple[OperatorCase, ...]:
    """Return the cases that are convolutions and embeddings.

    Returns
    -------
    tuple of OperatorCase

    Examples
    --------
    >>> len({case.name for case in operator_catalogue()}) == len(operator_catalogue())
    True
    """
    return (
        _convolution("convolution", "a norm for each output, over inputs and kernel", padding=1),
        _convolution(
            "convolution, 1 dimension", "dilation spreads the kernel", (9,), (3,), dilation=2
        ),
        _convolution(
            "convolution, 3 dimensions", "the kernel has three axes", (3, 4, 3), (2, 1, 2)
        ),
        _convolution(
            "strided convolution", "windows that leave numbers out", stride=2, padding=(0, 2)
        ),
        _convolution("grouped convolution", "a group has its own A", groups=2, padding=1),
        _convolution("convolution, direction form", "V = W/‖W‖ + s B A", form="direction"),
        _convolution("convolution, detached", "n is a constant", norm_gradient="detached"),
        _convolution(
            "convolution, dropout", "the mask has the shape of x", dropout="input", padding=1
        ),
        _convolution("convolution, low-rank dropout", "A has the dropped x", dropout="low_rank"),
        _embedding("embedding", "a norm for each dimension, over the tokens"),
        _embedding("scaled embedding", "scale multiplies W and the update", scale=1.5),
        _embedding("embedding, direction form", "columns of length 1", form="direction"),
        _embedding("embedding, detached", "most columns of dA are 0", norm_gradient="detached"),
        _embedding(
            "embedding, zero dimension",
            "‖v‖ = 0 in a column of the table",
            edit=_zero_row,
            extreme=True,
        ),
    )


def _zero_row(arrays: Arrays) -> Arrays:
    weight, b = arrays["weight"].copy(), arrays["lora_b"].copy()
    weight[:, 2] = b[2] = 0
    return {**arrays, "weight": weight, "lora_b": b}


def _convolution(
    name: str, reason: str, size: tuple[int, ...] = (5, 4), kernel: tuple[int, ...] = (3, 2), *,
    groups: int = 1, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    dropout: Dropout | None = None, **choices: Any,
) -> OperatorCase:  # fmt: skip
    rng, dims = np.random.default_rng(zlib.crc32(name.encode())), len(size)
    each = {"stride": stride, "padding": padding, "dilation": dilation}
    each = {key: (n,) * dims if isinstance(n, int) else n for key, n in each.items()}
    windows = Windows(size, kernel, **each)
    shapes = {
        "x": (2, 4, *size),
        "weight": (6, 4 // groups, *kernel),
        "bias": (6,),
        "dy": (2, 6, *windows.positions),
    }
    arrays = _drawn(rng, shapes, LayerKind("conv", groups=groups))
    if dropout is not None:
        arrays["dropout_mask"] = np.where(rng.uniform(size=shapes["x"]) < 0.2, 0.0, 1.25)
        choices["dropout"] = dropout
    numbers = {**{key: list(n) for key, n in each.items()}, "groups": groups}
    return OperatorCase(name, reason, Config(2, 3.0, **choices), "convolution", numbers, arrays)


def _embedding(
    name: str, reason: str, *, scale: float = 1.0, edit: Callable[[Arrays], Arrays] = dict,
    extreme: bool = False, **choices: Any,
) -> OperatorCase:  # fmt: skip
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    shapes = {"weight": (9, 5), "dy": (2, 3, 5)}
    arrays = {
        "x": np.asarray([[3, 0, 3], [8, 3, 1]]),
        **_drawn(rng, shapes, LayerKind("embedding")),
    }
    config = Config(2, 3.0, **choices)
    numbers = {"scale": scale}
    return OperatorCase(name, reason, config, "embedding", numbers, edit(arrays), extreme=extreme)


def _drawn(rng: np.random.Generator, shapes: dict[str, Any], kind: LayerKind) -> Arrays:
    *stack, out, inner = kind.matrix_shape(shapes["weight"])
    shapes = {
        **shapes,
        "lora_a": (*stack, 2, inner),
        "lora_b": (*stack, out, 2),
        "magnitude": (*stack, out),
    }
    arrays = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    arrays["magnitude"] = np.abs(arrays["magnitude"]) + 0.5
    return {name: rounded(array, "float16").astype(float) for name, array in arrays.items()}
