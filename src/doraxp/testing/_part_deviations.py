"""Known mistakes in convolutions, embeddings, other updates, sums, and other optimizers.

name in words: {quantity of the part's formulas: its wrong formula}
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from doraxp.testing._changes import Changes, original
from doraxp.testing._deviations import KEPT_NORMS
from doraxp.testing._update_cases import kron


def by_place(d: Any, number: Any) -> Any:
    """Return columns (in·kernel) as two axes (in, kernel)."""
    *lead, columns = number.value.shape
    return number.reshape(*lead, columns // d.kernel, d.kernel)


def flat(number: Any) -> Any:
    """Return the last two axes as one."""
    *lead, inner, kernel = number.value.shape
    return number.reshape(*lead, inner * kernel)


def spread(number: Any, shape: tuple[int, ...]) -> Any:
    """Return numbers that are repeated along their axes of length 1."""
    return type(number)(*(np.broadcast_to(part, shape) for part in (number.value, number.error)))


def turned(d: Any, number: Any) -> Any:
    """Return the places of the kernel in the reverse order."""
    return flat(by_place(d, number)[..., ::-1])


def kernel_first(d: Any, number: Any) -> Any:
    """Return columns that are (kernel, in) as columns (in, kernel)."""
    *lead, columns = number.value.shape
    return flat(number.reshape(*lead, d.kernel, columns // d.kernel).mT)


def kernel_last(d: Any, number: Any) -> Any:
    """Return columns that are (in, kernel) as columns (kernel, in)."""
    return flat(by_place(d, number).mT)


def over_inputs(d: Any, terms: Any) -> Any:
    """Return the sums over the inputs of each place, repeated for every column."""
    terms = by_place(d, terms)
    return flat(spread(terms.sum(-2, keepdims=True), terms.value.shape))


def length_by_place(d: Any) -> Any:
    """Return ‖V‖ over the inputs of each place, repeated for every column."""
    v = by_place(d, d.v)
    return flat(spread(v.norms(-2), v.value.shape))


def of_first_group(d: Any, name: str, formula: Any) -> Any:
    """Return a quantity made of the first group's A, or the right one where there is one group."""
    return formula(d.a[:1]) if d.a.value.ndim > 2 else original(name)(d)


def summed_into_first(number: Any) -> Any:
    """Return the sum over the groups in the first of them, and zeros in the others."""
    first = np.zeros((len(number.value), 1, 1))
    first[0] = 1.0
    return spread(number.sum(0, keepdims=True), number.value.shape) * type(number).exact(first)


def last_of_each(d: Any) -> Any:
    """Return the tokens of an embedding, and zeros where the same id comes again later."""
    ids = np.argmax(d.x.value, axis=-1)
    last = {int(token): place for place, token in enumerate(ids)}
    keep = np.isin(np.arange(len(ids)), list(last.values()))
    return d.seen * type(d.seen).exact(keep[:, None])


CONVOLUTION: dict[str, Changes] = {
    "each place of the kernel has a norm of its own": {
        "length": length_by_place,
        "dgain": lambda d: d.through_gain,
        "dm": lambda d: d.dgain.over(d.n).sum(-1),
        "dnorm": lambda d: over_inputs(d, -((d.gain * d.dgain).over(d.n))),
    },
    "the kernel is turned around": {
        "acting": lambda d: turned(d, d.merged),
        "dmerged": lambda d: turned(d, original("dmerged")(d)),
        "beside": lambda d: turned(d, original("beside")(d)),
        "dbeside": lambda d: 0.0 if d.mask is None else turned(d, original("dbeside")(d)),
    },
    "B A has the axes of the kernel before that of the inputs": {
        "update": lambda d: kernel_first(d, original("update")(d)),
        "da": lambda d: d.s * (d.b.mT @ kernel_last(d, d.dv)),
        "db": lambda d: d.s * (kernel_last(d, d.dv) @ d.a.mT),
    },
    "every group has the A of the first one": {
        "update": lambda d: of_first_group(d, "update", lambda a: d.s * (d.b @ a)),
        "db": lambda d: of_first_group(d, "db", lambda a: d.s * (d.dv @ a.mT)),
        "da": lambda d: of_first_group(d, "da", lambda _: summed_into_first(original("da")(d))),
    },
}

_SCALED_APART: Changes = {
    "acting": lambda d: d.gain * (d.base_scale * d.base + d.update_scale * d.update),
    "through_gain": lambda d: d.dmerged * (d.base_scale * d.base + d.update_scale * d.update),
    "dbase": lambda d: d.dv + (d.base_scale - 1) * (d.gain * d.dmerged),
    "dupdate": lambda d: d.dv + (d.update_scale - 1) * (d.gain * d.dmerged),
    "da": lambda d: d.s * (d.b.mT @ d.dupdate),
    "db": lambda d: d.s * (d.dupdate @ d.a.mT),
}
EMBEDDING: dict[str, Changes] = {
    "the scale is left out": {
        "base_scale": lambda d: 1 / d.scale,
        "update_scale": lambda d: 1 / d.scale,
        **_SCALED_APART,
    },
    "the scale multiplies W alone": {"update_scale": lambda d: 1 / d.scale, **_SCALED_APART},
    "the scale multiplies the update alone": {
        "base_scale": lambda d: 1 / d.scale,
        **_SCALED_APART,
    },
    "the scale is applied twice": {
        "base_scale": lambda d: d.scale,
        "update_scale": lambda d: d.scale,
        **_SCALED_APART,
    },
    "an id that comes again keeps its last gradient alone": {
        "dmerged": lambda d: d.dy.mT @ last_of_each(d)
    },
}

UPDATE: dict[str, Changes] = {
    KEPT_NORMS: {"merged": lambda d: (d.w.norms().over(d.n) if d.m is None else d.gain) * d.v},
}

LOHA: dict[str, Changes] = {
    **UPDATE,
    "the two products are added": {"delta": lambda d: d.first + d.second},
    "the first product is left out": {"delta": lambda d: d.second},
    "the second product is left out": {"delta": lambda d: d.first},
    "the two products are multiplied as matrices": {"delta": lambda d: d.first @ d.second},
    "B of one product meets A of the other": {
        "first": lambda d: d.inputs["first_b"] @ d.inputs["second_a"],
        "second": lambda d: d.inputs["second_b"] @ d.inputs["first_a"],
    },
}

LOKR: dict[str, Changes] = {
    **UPDATE,
    "the Kronecker product is the other way round": {"delta": lambda d: kron(d.right, d.left)},
    "the left factor is transposed": {"delta": lambda d: kron(d.left.mT, d.right)},
    "the right factor is transposed": {"delta": lambda d: kron(d.left, d.right.mT)},
    "the left factor is left out": {"delta": lambda d: kron(0.0 * d.left + 1.0, d.right)},
    "s multiplies a right factor of low rank once more": {
        "delta": lambda d: (d.s if "right_b" in d.inputs else 1.0) * kron(d.left, d.right)
    },
}


def normalised(v: Any, m: Any) -> Any:
    """Return (m / ‖V‖)⊙V, or V without m."""
    return v if m is None else m.over(v.norms()) * v


def summed(numbers: Any) -> Any:
    """Return the sum of numbers from left to right."""
    first, *others = numbers
    for other in others:
        first = first + other
    return first


def strengths_and_layers(d: Any) -> Any:
    """Return pairs of a strength and the formulas of its adapter."""
    return zip(d.strengths, d.layers, strict=True)


def under_one_norm(d: Any, m: Any) -> Any:
    """Return the merge of the sum of all updates with one magnitude."""
    v = summed([d.w, *(t * one.update for t, one in strengths_and_layers(d))])
    return normalised(v, m)


def one_after_the_other(d: Any) -> Any:
    """Return the result where each adapter is merged into the result of the one before."""
    total = d.w
    for t, one in strengths_and_layers(d):
        merged = normalised(total + one.update, one.m)
        total = total + t * (merged - total)
    return total


SUM: dict[str, Changes] = {
    **UPDATE,
    "the strengths are left out": {"strengths": lambda d: (1.0,) * len(d.given)},
    "the strengths are squared": {"strengths": lambda d: tuple(t * t for t in d.given)},
    "the strengths are rooted": {"strengths": lambda d: tuple(math.sqrt(t) for t in d.given)},
    "the strengths are divided by their sum": {
        "strengths": lambda d: tuple(t / sum(d.given) for t in d.given)
    },
    "the strength multiplies s": {
        "total": lambda d: summed(
            [
                d.w,
                *(
                    normalised(d.w + t * one.update, one.m) - d.w
                    for t, one in strengths_and_layers(d)
                ),
            ]
        )
    },
    "the updates add up under one norm, with the first magnitude": {
        "total": lambda d: under_one_norm(d, d.layers[0].m)
    },
    "the updates and the magnitudes add up, under one norm": {
        "total": lambda d: under_one_norm(
            d, summed([t * one.m for t, one in strengths_and_layers(d) if one.m is not None])
        )
    },
    "W is added again with each adapter": {
        "total": lambda d: summed([d.w, *(t * one.merged for t, one in strengths_and_layers(d))])
    },
    "W is left out of the sum": {
        "total": lambda d: summed([t * one.merged for t, one in strengths_and_layers(d)])
    },
    "each adapter is merged into the result of the one before": {"total": one_after_the_other},
    "the last adapter replaces the others": {
        "total": lambda d: d.w + d.strengths[-1] * d.changes[-1]
    },
}

LORA_PLUS: dict[str, Changes] = {
    "the ratio is left out": {"rate": lambda d: d.learning_rate},
    "the ratio raises the rate of A": {
        "rate": lambda d: d.learning_rate * (d.ratio if d.name == "lora_a" else 1)
    },
    "the ratio raises every rate": {"rate": lambda d: d.learning_rate * d.ratio},
    "the ratio raises the rate of m too": {
        "rate": lambda d: d.learning_rate * (1 if d.name == "lora_a" else d.ratio)
    },
    "the ratio divides the rate of A": {
        "rate": lambda d: d.learning_rate / (d.ratio if d.name == "lora_a" else 1)
    },
    "the decay of B lacks the ratio": {
        "stepped": lambda d: d.start - d.rate * d.mean.over(d.divisor) - d.learning_rate * d.pull
    },
}

SCALED: dict[str, Changes] = {
    "each gradient is divided by the Gram matrix of its own factor": {
        "gram_of_a": lambda d: d.b.mT @ d.b,
        "gram_of_b": lambda d: d.a @ d.a.mT,
    },
    "the gradients are multiplied by the Gram matrices": {
        "scaled_da": lambda d: d.gram_of_b @ d.da + d.damping * d.da,
        "scaled_db": lambda d: d.db @ d.gram_of_a + d.damping * d.db,
    },
    "the damping is left out": {"damping": lambda d: 0.0},
    "the gradients are not scaled": {"scaled_da": lambda d: d.da, "scaled_db": lambda d: d.db},
    "the gradient of B is not scaled": {"scaled_db": lambda d: d.db},
    "the gradient of A is not scaled": {"scaled_da": lambda d: d.da},
}
