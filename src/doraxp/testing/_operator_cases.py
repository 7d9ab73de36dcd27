"""The catalogue's layers that are not matrices: convolutions and embeddings, by the dense formulas.

    convolution  x (batch, in, *size)  weight (out, in/groups, *kernel)  y (batch, out, *positions)
    embedding    x ids (...)           weight (tokens, dim)              y (..., dim)

Each is a linear layer of other inputs. The windows of x are the tokens of a convolution. The tokens
of an embedding are rows of zeros with `scale` at the id. A weight of groups is a stack.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import array_api_compat.numpy
import numpy as np

from doraxp._base.types import Config, Dropout
from doraxp._core.kinds import LayerKind
from doraxp._core.operators import Convolution, Embedding
from doraxp.backends import Windows, sources, unfolded
from doraxp.testing._cases import FULL, rounded
from doraxp.testing._formulas import QUANTITIES, DenseFormulas, Formula
from doraxp.testing._reference import Expected, bounded
from doraxp.testing._rounding import Rounded

Arrays: TypeAlias = dict[str, Any]
_NUMPY: Any = array_api_compat.numpy
NAMES = (*QUANTITIES, "initial", "gain")


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
    """

    name: str
    reason: str
    config: Config
    kind: Literal["convolution", "embedding"]
    numbers: Mapping[str, Any]
    arrays: Mapping[str, Any] = field(repr=False)
    dtypes: tuple[str, ...] = FULL

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
        _embedding("embedding, zero dimension", "‖v‖ = 0 in a column of the table", edit=_zero_row),
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
    return OperatorCase(name, reason, Config(2, 4.0, **choices), "convolution", numbers, arrays)


def _embedding(
    name: str, reason: str, *, scale: float = 1.0, edit: Callable[[Arrays], Arrays] = dict,
    **choices: Any,
) -> OperatorCase:  # fmt: skip
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    shapes = {"weight": (9, 5), "dy": (2, 3, 5)}
    arrays = {
        "x": np.asarray([[3, 0, 3], [8, 3, 1]]),
        **_drawn(rng, shapes, LayerKind("embedding")),
    }
    config = Config(2, 4.0, **choices)
    return OperatorCase(name, reason, config, "embedding", {"scale": scale}, edit(arrays))


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


def expected_of_operator(
    case: OperatorCase, dtype: str, number: Formula = Rounded.exact
) -> dict[str, Expected]:
    """Return the expected results of a case with bounds on their rounding errors.

    Parameters
    ----------
    case : OperatorCase
    dtype : {"float32", "float64"}
    number : callable, optional
        Returns the numbers in which the formulas are evaluated.

    Returns
    -------
    dict of str to Expected
        norm, merged, y, dx, da, db, dm, dw, dbias, initial and gain; an embedding has no dx, and
        only a case with a bias has dbias. merged and dw are as the weight is stored.

    Examples
    --------
    >>> found = expected_of_operator(operator_catalogue()[0], "float32")
    >>> found["y"].value.shape
    (2, 6, 5, 5)
    """
    inputs = case.stored(dtype)
    layer = DenseFormulas(case.config, _as_linear(case, inputs), number)
    found = {}
    for name in NAMES:
        if (name == "dx" and case.kind == "embedding") or (
            name == "dbias" and "bias" not in inputs
        ):
            continue
        value, shape = _as_stored(case, name, getattr(layer, name), inputs)
        found[name] = bounded(name, value, shape, dtype)
    return found


def _as_linear(case: OperatorCase, inputs: Arrays) -> Arrays:
    """Return the inputs of the linear layer."""
    matrix = case.layer_kind.matrix(inputs["weight"])
    *stack, out, inner = matrix.shape
    linear = {**inputs, "weight": matrix}
    if case.kind == "embedding":
        tokens = np.zeros((inputs["x"].size, inner))
        tokens[np.arange(len(tokens)), inputs["x"].ravel()] = case.numbers["scale"]
        return {**linear, "x": tokens, "dy": inputs["dy"].reshape(-1, out)}
    groups = case.numbers["groups"]
    for name in {"x", "dropout_mask"} & inputs.keys():
        columns = unfolded(inputs[name], _windows(case), groups, xp=_NUMPY)
        linear[name] = _NUMPY.reshape(columns, (*stack, *columns.shape[1:]))
    dy = inputs["dy"]
    by_group = dy.reshape(len(dy), groups, out, -1).transpose(1, 0, 3, 2)
    linear["dy"] = by_group.reshape(*stack, -1, out)
    linear["bias"] = inputs["bias"].reshape(*stack, out)
    return linear


def _windows(case: OperatorCase) -> Windows:
    size, kernel = case.arrays["x"].shape[2:], case.arrays["weight"].shape[2:]
    each = {name: tuple(case.numbers[name]) for name in ("stride", "padding", "dilation")}
    return Windows(size, kernel, **each)


def _as_stored(
    case: OperatorCase, name: str, value: Any, inputs: Arrays
) -> tuple[Any, tuple[int, ...]]:
    """Return a quantity of the linear layer as the operator has it, and its shape."""
    like = {
        "merged": "weight", "dw": "weight", "y": "dy", "dx": "x", "da": "lora_a", "db": "lora_b",
        "dbias": "bias",
    }  # fmt: skip
    shape = inputs[like.get(name, "magnitude")].shape
    if case.kind == "embedding":
        return (value.mT if name in ("merged", "dw") else value), shape
    if name == "y":
        batch, groups, out = shape[0], case.numbers["groups"], shape[1] // case.numbers["groups"]
        split = value.reshape(groups, batch, math.prod(shape[2:]), out)
        return _permuted(split, (1, 0, 3, 2)), shape
    if name == "dx":
        return _folded(value, _windows(case), shape), shape
    return value, shape


def _permuted(number: Any, axes: tuple[int, ...]) -> Any:
    return type(number)(number.value.transpose(axes), number.error.transpose(axes))


def _folded(columns: Any, windows: Windows, shape: tuple[int, ...]) -> Any:
    """Return the sum of windows where they came from, in the shape of x."""
    batch, channels, kernel = *shape[:2], math.prod(windows.kernel)
    positions = math.prod(windows.positions)
    inner = columns.value.shape[-1] // kernel
    groups = channels // inner
    split = columns.reshape(groups, batch, positions, inner, kernel)
    flat = _permuted(split, (1, 0, 3, 4, 2)).reshape(batch, channels, kernel * positions)
    pad = ((0, 0), (0, 0), (0, 1))
    with_zero = type(flat)(np.pad(flat.value, pad), np.pad(flat.error, pad))
    return with_zero[..., sources(windows)].sum(2)
