"""The catalogue's updates of other kinds: LoHa and LoKr, with a magnitude or without one.

loha  ΔW = (B₁ A₁) ⊙ (B₂ A₂)    first_a, second_a (rank, in)   first_b, second_b (out, rank)
lokr  ΔW = C ⊗ U                left C (p, q)                  right U (out/p, in/q), or
U = B A                        right_a (rank, in/q)
right_b (out/p, rank)

V = base + s ΔW                 W' = (m / n)⊙V                 without m, W' = V
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from doraxp._base.types import Config
from doraxp.testing._cases import FULL, rounded
from doraxp.testing._formulas import Arrays, DenseFormulas, Formula, deviating
from doraxp.testing._reference import Expected, Results, bounded
from doraxp.testing._rounding import Rounded

FACTORS = {
    "loha": ("first_a", "first_b", "second_a", "second_b"),
    "lokr": ("left", "right", "right_a", "right_b"),
}


@dataclass(frozen=True, eq=False)
class UpdateCase:
    """One weight with an update of another kind, as NumPy arrays.

    Parameters
    ----------
    name : str
    reason : str
    config : Config
    kind : {"loha", "lokr"}
        (B₁ A₁) ⊙ (B₂ A₂), and C ⊗ U.
    arrays : mapping of str to array
        The weight and the factors; without a magnitude, W' = V.
    since : int
        The version of the catalogue that brought the case.
    """

    name: str
    reason: str
    config: Config
    kind: Literal["loha", "lokr"]
    arrays: Mapping[str, Any] = field(repr=False)
    dtypes: tuple[str, ...] = FULL
    since: int = 4

    def stored(self, dtype: str) -> Arrays:
        """Return the arrays in a dtype."""
        return {name: array.astype(dtype) for name, array in self.arrays.items()}


def update_catalogue() -> tuple[UpdateCase, ...]:
    """Return the cases that are updates of other kinds.

    Returns
    -------
    tuple of UpdateCase

    Examples
    --------
    >>> sorted({case.kind for case in update_catalogue()})
    ['loha', 'lokr']
    """
    square, tall = {"weight": (6, 6)}, {"weight": (8, 6)}
    loha = {name: (3, 6) if name.endswith("a") else (8, 3) for name in FACTORS["loha"]}
    even = {name: (3, 6) if name.endswith("a") else (6, 3) for name in FACTORS["loha"]}
    whole = {"left": (2, 3), "right": (4, 2)}
    factored = {"left": (2, 3), "right_a": (2, 2), "right_b": (4, 2)}
    return (
        _case("loha", "two products, multiplied number by number", "loha", tall | loha),
        _case("loha, square", "no shape tells the axes apart", "loha", square | even),
        _case("loha, direction form", "V = W/‖W‖ + s ΔW", "loha", tall | loha, form="direction"),
        _case("loha without m", "W' = W + s ΔW", "loha", tall | loha, _without_magnitude),
        _case("lokr", "which factor is the outer one", "lokr", tall | whole),
        _case("lokr, square", "C and its transpose fit", "lokr",
              square | {"left": (2, 2), "right": (3, 3)}),
        _case("lokr, factored", "U = B A, which s multiplies once", "lokr", tall | factored),
        _case("lokr without m", "W' = W + s ΔW", "lokr", tall | whole, _without_magnitude),
        _case("lokr, zero row of W", "only ΔW is left in a row", "lokr", tall | whole, _zero_row),
    )  # fmt: skip


def _case(
    name: str, reason: str, kind: Literal["loha", "lokr"], shapes: Mapping[str, Any],
    edit: Callable[[Arrays], Arrays] = dict, **choices: Any,
) -> UpdateCase:  # fmt: skip
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    arrays = {key: rng.standard_normal(shape) for key, shape in shapes.items()}
    arrays["magnitude"] = np.abs(rng.standard_normal(len(arrays["weight"]))) + 0.5
    arrays = {key: rounded(array, "float16").astype(float) for key, array in arrays.items()}
    return UpdateCase(name, reason, Config(3, 4.0, **choices), kind, edit(arrays))


def _without_magnitude(arrays: Arrays) -> Arrays:
    return {name: array for name, array in arrays.items() if name != "magnitude"}


def _zero_row(arrays: Arrays) -> Arrays:
    weight = arrays["weight"].copy()
    weight[2] = 0
    return {**arrays, "weight": weight}


class UpdateFormulas(DenseFormulas):
    """W' of an update of another kind."""

    def __init__(self, config: Config, arrays: Mapping[str, Any], number: Formula) -> None:
        self.config, self.inputs = config, {name: number(x) for name, x in arrays.items()}
        self.w, m = self.inputs["weight"], self.inputs.get("magnitude")
        self.rank, self.inner = config.rank, arrays["weight"].shape[-1]
        self.m = None if m is None else m.reshape(-1, 1)

    @cached_property
    def first(self) -> Any:
        """B₁ A₁."""
        return self.inputs["first_b"] @ self.inputs["first_a"]

    @cached_property
    def second(self) -> Any:
        """B₂ A₂."""
        return self.inputs["second_b"] @ self.inputs["second_a"]

    @cached_property
    def left(self) -> Any:
        """C."""
        return self.inputs["left"]

    @cached_property
    def right(self) -> Any:
        """U."""
        if "right" in self.inputs:
            return self.inputs["right"]
        return self.inputs["right_b"] @ self.inputs["right_a"]

    @cached_property
    def delta(self) -> Any:
        """ΔW."""
        return self.first * self.second if "first_a" in self.inputs else kron(self.left, self.right)

    @cached_property
    def update(self) -> Any:
        return self.s * self.delta

    @cached_property
    def merged(self) -> Any:
        return self.v if self.m is None else self.gain * self.v


def kron(left: Any, right: Any) -> Any:
    """Return C ⊗ U."""
    blocks = left[:, None, :, None] * right[None, :, None, :]
    rows, height, columns, width = blocks.value.shape
    return blocks.reshape(rows * height, columns * width)


def expected_of_update(case: UpdateCase, dtype: str) -> dict[str, Expected]:
    """Return the expected results of a case with bounds on their rounding errors.

    Parameters
    ----------
    case : UpdateCase
    dtype : {"float32", "float64"}

    Returns
    -------
    dict of str to Expected
        v and merged, (out, in); with a magnitude also norm and gain, (out,).

    Examples
    --------
    >>> found = expected_of_update(update_catalogue()[0], "float32")
    >>> {name: want.value.shape for name, want in found.items()}
    {'v': (8, 6), 'merged': (8, 6), 'norm': (8,), 'gain': (8,)}
    """
    results = update_results(case, dtype)
    return {name: results.of(name) for name in results.names}


def update_results(
    case: UpdateCase,
    dtype: str,
    changes: Mapping[str, Formula] | None = None,
    number: Formula = Rounded.exact,
) -> Results:
    """Return the results of a case, by the reference or by one that deviates."""
    reference = deviating(UpdateFormulas, changes) if changes else UpdateFormulas
    layer = reference(case.config, case.stored(dtype), number)
    shape = case.arrays["weight"].shape
    like = {"v": shape, "merged": shape}
    if "magnitude" in case.arrays:
        like |= {"norm": shape[:1], "gain": shape[:1]}
    return Results(tuple(like), lambda name: bounded(name, getattr(layer, name), like[name], dtype))
