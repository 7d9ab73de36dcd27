"""The catalogue's sums of adapters, each with a strength.

    W' = W + Σ tᵢ (W'ᵢ − W)        W'ᵢ is the merge of adapter i alone, with m or without it

Two adapters add up in W', and not in V.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from doraxp._base.types import Config
from doraxp.testing._cases import ADAPTER, FULL, rounded
from doraxp.testing._formulas import Arrays, Formula, deviating
from doraxp.testing._reference import Expected, Results, bounded
from doraxp.testing._rounding import Rounded
from doraxp.testing._update_cases import UpdateFormulas


@dataclass(frozen=True, eq=False)
class SumCase:
    """One weight with some adapters and their strengths, as NumPy arrays.

    Parameters
    ----------
    name : str
    reason : str
    configs : tuple of Config
        One for each adapter.
    strengths : tuple of float
        t of each adapter.
    arrays : mapping of str to array
        weight, and for each adapter "lora_a 1", "lora_b 1" and "magnitude 1", counted from 1;
        without its magnitude an adapter is plain LoRA.
    since : int
        The version of the catalogue that brought the case.
    """

    name: str
    reason: str
    configs: tuple[Config, ...]
    strengths: tuple[float, ...]
    arrays: Mapping[str, Any] = field(repr=False)
    dtypes: tuple[str, ...] = FULL
    since: int = 4

    def stored(self, dtype: str) -> Arrays:
        """Return the arrays in a dtype."""
        return {name: array.astype(dtype) for name, array in self.arrays.items()}

    def adapters(self, dtype: str) -> list[dict[str, Any]]:
        """Return lora_a, lora_b and magnitude of each adapter; None for a magnitude that lacks."""
        arrays = self.stored(dtype)
        return [
            {name: arrays.get(f"{name} {i}") for name in ADAPTER}
            for i in range(1, len(self.configs) + 1)
        ]


def sum_catalogue() -> tuple[SumCase, ...]:
    """Return the cases that are sums of adapters.

    Returns
    -------
    tuple of SumCase

    Examples
    --------
    >>> [case.strengths for case in sum_catalogue()][:2]
    [(1.0,), (0.5,)]
    """
    return (
        _case("one adapter", "at strength 1 the sum is the merge", 1.0),
        _case("half strength", "W' moves on a straight line, and V does not", 0.5),
        _case("no strength", "the base comes back", 0.0),
        _case("negative strength", "what an adapter added is taken away", -0.75),
        _case("two adapters", "each has its own norm", 1.0, 1.0),
        _case("two strengths", "none is that of the other", 0.25, 1.5),
        _case("two ranks", "factors do not add up", 0.5, 1.0, ranks=(2, 3)),
        _case("dora and lora", "one has a norm, the other has none", 1.0, 0.5, plain=(2,)),
        _case("three adapters", "the base counts once", 0.5, -0.25, 1.0),
    )


def _case(
    name: str,
    reason: str,
    *strengths: float,
    ranks: tuple[int, ...] = (2, 2, 2),
    plain: tuple[int, ...] = (),
) -> SumCase:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    arrays = {"weight": rng.standard_normal((7, 6))}
    for i, rank in enumerate(ranks[: len(strengths)], start=1):
        arrays[f"lora_a {i}"] = rng.standard_normal((rank, 6))
        arrays[f"lora_b {i}"] = rng.standard_normal((7, rank))
        if i not in plain:
            arrays[f"magnitude {i}"] = np.abs(rng.standard_normal(7)) + 0.5
    arrays = {key: rounded(array, "float16").astype(float) for key, array in arrays.items()}
    configs = tuple(
        Config(rank, 3.0 + i) for i, rank in enumerate(ranks[: len(strengths)], start=1)
    )
    return SumCase(name, reason, configs, strengths, arrays)


class OneOfSum(UpdateFormulas):
    """The merge of one adapter alone."""

    @cached_property
    def delta(self) -> Any:
        return self.inputs["lora_b"] @ self.inputs["lora_a"]


class SumFormulas:
    """The sum, from the merges of all adapters."""

    def __init__(self, case: SumCase, dtype: str, number: Formula, one: type) -> None:
        weight = case.stored(dtype)["weight"]
        self.w, self.given = number(weight), case.strengths
        adapters = [
            {name: array for name, array in adapter.items() if array is not None}
            for adapter in case.adapters(dtype)
        ]
        self.layers = [
            one(config, {"weight": weight, **adapter}, number)
            for config, adapter in zip(case.configs, adapters, strict=True)
        ]

    @cached_property
    def strengths(self) -> tuple[float, ...]:
        return self.given

    @cached_property
    def changes(self) -> list[Any]:
        """W'ᵢ − W of each adapter."""
        return [layer.merged - self.w for layer in self.layers]

    @cached_property
    def total(self) -> Any:
        total = self.w
        for strength, change in zip(self.strengths, self.changes, strict=True):
            total = total + strength * change
        return total


def expected_of_sum(case: SumCase, dtype: str) -> dict[str, Expected]:
    """Return the expected merge of a case with a bound on its rounding errors.

    Parameters
    ----------
    case : SumCase
    dtype : {"float32", "float64"}

    Returns
    -------
    dict of str to Expected
        merged, (out, in).

    Examples
    --------
    >>> case = sum_catalogue()[2]
    >>> merged = expected_of_sum(case, "float64")["merged"]
    >>> merged.share(case.arrays["weight"])
    0.0
    """
    return {"merged": sum_results(case, dtype).of("merged")}


def sum_results(
    case: SumCase,
    dtype: str,
    changes: Mapping[str, Formula] | None = None,
    number: Formula = Rounded.exact,
) -> Results:
    """Return the results of a case, by the reference or by one that deviates."""
    one, whole = (
        deviating(reference, changes) if changes else reference
        for reference in (OneOfSum, SumFormulas)
    )
    total = whole(case, dtype, number, one)
    shape = case.arrays["weight"].shape
    return Results(("merged",), lambda name: bounded(name, total.total, shape, dtype))
