"""The catalogue: named cases that an implementation of DoRA must get right, and why each is there.

The name of a case is the seed of its random numbers, so a new case does not change the others. The
numbers are the same on every machine: no BLAS, power or logarithm is applied to them.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from doraxp._base.types import Config, Dropout
from doraxp.testing._cases import FULL, HALF, Case, rounded

VERSION = 4
"""The version of the catalogue. It goes up when a case is added or its numbers change."""


def catalogue() -> tuple[Case, ...]:
    """Return the cases that are layers.

    Returns
    -------
    tuple of Case

    Examples
    --------
    >>> len({case.name for case in catalogue()}) == len(catalogue())
    True
    """
    return (
        _case("tall", "more outputs than inputs", out=8, inner=5),
        _case("wide", "fewer outputs than inputs", out=5, inner=8),
        _case("square", "no shape tells the axes apart", out=6, inner=6),
        _case("one row", "an axis of length 1 broadcasts by accident", out=1, inner=6, rank=1),
        _case("one column", "a row of one number has no direction to move in", inner=1, rank=1),
        _case("rank 1", "matrices that are vectors", rank=1, alpha=2.0),
        _case("full rank", "rank = min(out, in)", rank=6),
        _case("no bias", "the bias is optional", bias=False),
        _case("one token", "x is a vector", tokens=()),
        _case("no tokens", "an empty batch has gradients of 0", tokens=(0,)),
        _case("batch", "x has two leading axes", tokens=(2, 3)),
        _case("alpha = rank", "s = 1 hides what s is left out of", alpha=3.0),
        _case("rslora", "s = alpha / √rank", rslora=True),
        _case("direction form", "V = W/‖W‖ + s B A", form="direction"),
        _case("detached", "n is taken for a constant", norm_gradient="detached"),
        _case(
            "direction form, detached",
            "both choices at once",
            form="direction",
            norm_gradient="detached",
        ),
        _case("fresh", "B = 0 and m = ‖w‖: y is the base product", edit=_fresh),
        _case(
            "zero row",
            "‖v‖ = 0: the output is the bias, no gradient, no NaN",
            edit=_zero_row,
            extreme=True,
        ),
        _case(
            "zero row, direction form",
            "0 / 0 in W/‖W‖",
            edit=_zero_row,
            extreme=True,
            form="direction",
        ),
        _case("zero row of W", "only B A is left in a row", edit=_zero_row_of_weight),
        _case("zero magnitude", "g = 0, and B and A of that row stay", edit=_zero_magnitude),
        _case("negative magnitude", "|m| turns a row around", edit=_negative_magnitude),
        _case(
            "cancelling rows",
            "B A takes W away to a hundredth: expanded squares lose their digits",
            out=24,
            inner=32,
            edit=_cancelling,
        ),
        _case("dependent A", "B A cancels within itself", out=8, inner=32, edit=_dependent),
        _case("huge", "squares overflow float32", edit=_huge, extreme=True),
        _case("tiny", "squares underflow float32", edit=_tiny, extreme=True),
        _case("rows of all sizes", "a row of 1e-6 beside one of 1e6", edit=_all_sizes),
        _case("long sums", "rounding adds up", out=40, inner=300, rank=8, tokens=(64,)),
        _case("stack", "experts of a mixture", stack=(2,)),
        _case("stack, direction form", "two leading axes", stack=(2, 2), form="direction"),
        _case(
            "dropout",
            "the base has the whole x, all else the dropped one",
            dropout="input",
            since=2,
        ),
        _case(
            "dropout, direction form",
            "the base is W, not W/‖W‖",
            dropout="input",
            since=2,
            form="direction",
        ),
        _case(
            "dropout, detached",
            "the norm has no part in it",
            dropout="input",
            since=2,
            norm_gradient="detached",
        ),
        _case(
            "dropout, fresh",
            "y is the base product, whatever drops",
            dropout="input",
            since=2,
            edit=_fresh,
        ),
        _case(
            "all dropped",
            "the adapter has no gradient",
            dropout="input",
            since=2,
            edit=_all_dropped,
        ),
        _case(
            "dropout, zero row of W",
            "the base gives nothing",
            dropout="input",
            since=2,
            edit=_zero_row_of_weight,
        ),
        _case(
            "dropout, stack",
            "the mask has x's leading axes",
            dropout="input",
            since=2,
            stack=(2,),
            tokens=(2, 3),
        ),
        _case(
            "low-rank dropout", "A has the dropped x, W the whole one", dropout="low_rank", since=2
        ),
        _case(
            "low-rank dropout, direction form",
            "W/‖W‖ has the whole one",
            dropout="low_rank",
            since=2,
            form="direction",
        ),
        _case(
            "low-rank dropout, detached",
            "nor is the norm in this one",
            dropout="low_rank",
            since=2,
            norm_gradient="detached",
        ),
        _case(
            "low-rank dropout, one token",
            "the mask is a vector",
            dropout="low_rank",
            since=2,
            tokens=(),
        ),
        _case(
            "low-rank dropout, negative magnitude",
            "g scales the base too",
            dropout="low_rank",
            since=2,
            edit=_negative_magnitude,
        ),
        _case(
            "low-rank dropout, stack",
            "each expert has its mask",
            dropout="low_rank",
            since=2,
            stack=(2,),
        ),
        _case("half storage", "V is formed in float32", inner=32, dtypes=HALF),
        _case("half storage, direction form", "‖w‖ too", form="direction", dtypes=HALF),
        _case(
            "half storage, fresh", "a rounded m / n is not 1", inner=64, edit=_fresh, dtypes=HALF
        ),
        _case(
            "half storage, dropout",
            "x − x~ is not rounded to half",
            dropout="input",
            since=2,
            dtypes=HALF,
        ),
        _case(
            "half storage, low-rank dropout", "nor is x~", dropout="low_rank", since=2, dtypes=HALF
        ),
        _case(
            "half storage, small update",
            "a merge keeps as much of the update as one rounding does",
            inner=64,
            edit=_small_update,
            dtypes=HALF,
            since=4,
        ),
    )


Arrays = dict[str, Any]


def _case(
    name: str,
    reason: str,
    *,
    stack: tuple[int, ...] = (),
    out: int = 7,
    inner: int = 6,
    rank: int = 3,
    tokens: tuple[int, ...] = (4,),
    alpha: float = 4.0,
    bias: bool = True,
    edit: Callable[[Arrays], Arrays] = dict,
    dtypes: tuple[str, ...] = FULL,
    extreme: bool = False,
    dropout: Dropout | None = None,
    since: int = 1,
    **choices: Any,
) -> Case:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    shapes = {
        "x": (*stack, *tokens, inner),
        "weight": (*stack, out, inner),
        "lora_a": (*stack, rank, inner),
        "lora_b": (*stack, out, rank),
        "magnitude": (*stack, out),
        "bias": (*stack, out),
        "dy": (*stack, *tokens, out),
    }
    arrays = {key: rng.standard_normal(shape) for key, shape in shapes.items()}
    arrays["magnitude"] = np.abs(arrays["magnitude"]) + 0.5
    # float16 holds each number exactly, so every storage dtype holds the same numbers.
    arrays = {key: rounded(array, "float16").astype(float) for key, array in arrays.items()}
    if not bias:
        del arrays["bias"]
    if dropout is not None:
        arrays["dropout_mask"] = np.where(rng.uniform(size=shapes["x"]) < 0.2, 0.0, 1.25)
        choices["dropout"] = dropout
    config = Config(rank, alpha, **choices)
    return Case(name, reason, config, edit(arrays), dtypes, extreme, since)


def _fresh(arrays: Arrays) -> Arrays:
    norms = np.sqrt(np.apply_along_axis(math.fsum, -1, arrays["weight"] ** 2))
    return {**arrays, "lora_b": 0 * arrays["lora_b"], "magnitude": norms}


def _small_update(arrays: Arrays) -> Arrays:
    """An update of about a step of bfloat16, so that rounding it first loses most of it."""
    return {**_fresh(arrays), "lora_b": 2**-9 * arrays["lora_b"]}


def _zero_row_of_weight(arrays: Arrays) -> Arrays:
    weight = arrays["weight"].copy()
    weight[..., 2, :] = 0
    return {**arrays, "weight": weight}


def _zero_row(arrays: Arrays) -> Arrays:
    b = arrays["lora_b"].copy()
    b[..., 2, :] = 0
    return {**_zero_row_of_weight(arrays), "lora_b": b}


def _zero_magnitude(arrays: Arrays) -> Arrays:
    magnitude = arrays["magnitude"].copy()
    magnitude[..., 1] = 0
    return {**arrays, "magnitude": magnitude}


def _negative_magnitude(arrays: Arrays) -> Arrays:
    signs = np.resize([-1.0, 1.0], arrays["magnitude"].shape)
    return {**arrays, "magnitude": signs * arrays["magnitude"]}


def _all_dropped(arrays: Arrays) -> Arrays:
    return {**arrays, "dropout_mask": 0 * arrays["dropout_mask"]}


def _cancelling(arrays: Arrays) -> Arrays:
    a, b = arrays["lora_a"], arrays["lora_b"]
    update = (4.0 / 3.0) * sum(b[:, k, None] * a[k] for k in range(3))  # s = alpha / rank
    weight = arrays["weight"].copy()
    weight[::2] = 0.01 * weight[::2] - update[::2]
    return {**arrays, "weight": weight.astype(np.float32).astype(float)}


def _dependent(arrays: Arrays) -> Arrays:
    a, b = arrays["lora_a"].copy(), arrays["lora_b"].copy()
    a[1] = a[0] + 2**-9 * np.round(a[1] * 8) / 8
    b[:, 1] = -b[:, 0]
    return {**arrays, "lora_a": a, "lora_b": 64 * b}


def _huge(arrays: Arrays) -> Arrays:
    return _sized(arrays, 1e25)


def _tiny(arrays: Arrays) -> Arrays:
    return _sized(arrays, 1e-25)


def _sized(arrays: Arrays, size: float) -> Arrays:
    return {
        **arrays,
        **{key: size * arrays[key] for key in ("weight", "lora_b", "magnitude", "bias")},
    }


def _all_sizes(arrays: Arrays) -> Arrays:
    sizes = np.asarray([1e-6, 1e-4, 1e-2, 1e0, 1e2, 1e4, 1e6])
    return {
        **arrays,
        "weight": sizes[:, None] * arrays["weight"],
        "lora_b": sizes[:, None] * arrays["lora_b"],
        "magnitude": sizes * arrays["magnitude"],
    }
