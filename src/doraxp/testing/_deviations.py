"""Known mistakes of implementations of DoRA: each deviation as the formulas that it replaces.

    name in words: {quantity of `DenseFormulas` or `AdamW`: its wrong formula}

Every quantity that depends on a replaced one changes with it. So a deviation of the forward also
has the wrong gradients that autograd would give.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from doraxp.testing._cases import HALF, rounded
from doraxp.testing._changes import BY_N, Changes, multiplied, original, transformed
from doraxp.testing._rounding import Rounded

EPS = (1e-12, 1e-8, 1e-7, 2.0**-23, 1.2e-7, 1e-6, 1e-5, 1e-4, 2.0**-10)
"""Numbers that are added to norms; 2⁻²³ and 2⁻¹⁰ are ε of float32 and float16."""

DETACHED = "the norm is detached"
KEPT_NORMS = "the rows keep the norms of W, as in DoRA with m = ‖W‖"
"""Plain LoRA becomes this where a magnitude is made up for it."""


def through_norm(d: Any) -> Any:
    """Return the part of dV that comes from the norm."""
    return d.dv - d.gain * d.dmerged


def bias_gain(d: Any) -> Any:
    """Return the part of the gain's gradient that comes from a bias multiplied by the gain."""
    return (d.dy * d.bias).sum(-2)[..., None]


def eps(size: float) -> Changes:
    """Return the change that adds a number to the norm, whatever the norm is of."""
    return {"eps": lambda d: size}


def eps_under_root(size: float) -> Changes:
    """Return the change that adds a number to the square whose root is the norm."""
    return {"eps_in_root": lambda d: size}


def rounded_at_init(dtype: str) -> Changes:
    """Return the change that computes a fresh magnitude in float32 and then rounds it."""

    def formula(d: Any) -> Any:
        m = original("initial")(d)
        slack = 2.0**-24 * m.error
        with np.errstate(over="ignore"):  # float16 ends at 65504
            low, high = (
                rounded(end, dtype).astype(float) for end in (m.value - slack, m.value + slack)
            )
        # Near a tie the number may be rounded up or down, so its bound is infinite.
        return Rounded(low, np.where(low == high, 0.0, np.inf))

    return {"initial": formula}


def per_token(d: Any) -> float:
    """Return one over the number of tokens."""
    return float(1 / max(1, d.dy.value.shape[-2]))


FORWARD: dict[str, Changes] = {
    "the bias is scaled by m/n, so that forward is not merge": {
        "y": lambda d: d.product + d.bias * d.gain.mT,
        "dbias": lambda d: (d.dy * d.gain.mT).sum(-2),
        "dgain": lambda d: original("dgain")(d) + bias_gain(d),
    },
    "the bias is left out": {"y": lambda d: d.product},
    "the bias is subtracted": {
        "y": lambda d: d.product - d.bias,
        "dbias": lambda d: -original("dbias")(d),
    },
    "the norm runs over the input axis": {
        "length": lambda d: d.v.norms(-2),
        "norm": lambda d: d.n[..., 0, :],
        "gain": lambda d: d.m.mT.over(d.n),
        "dgain": lambda d: d.through_gain.sum(-2, keepdims=True),
        "dm": lambda d: d.dgain.over(d.n)[..., 0, :],
        "initial": lambda d: d.w.norms(-2)[..., 0, :],
    },
    "the norm of a column scales the row": {
        "length": lambda d: d.v.norms(-2).mT,
        "through_norm": lambda d: (d.dlength.mT * d.v).over(d.length.mT),
    },
    "each column is divided by its own norm": {
        "length": lambda d: d.v.norms(-2),
        "dgain": lambda d: d.through_gain,
        "dm": lambda d: d.dgain.over(d.n).sum(-1),
        "dnorm": lambda d: -((d.gain * d.dgain).over(d.n).sum(-2, keepdims=True)),
    },
    "the norm is that of the base weight": {
        "length": lambda d: d.base.norms(),
        "slope": lambda d: d.base.over(d.length),
        "dv": lambda d: d.gain * d.dmerged,
        "dbase": lambda d: original("dbase")(d) + d.through_norm,
    },
    "the norm is that of the update": {
        "length": lambda d: d.update.norms(),
        "slope": lambda d: d.update.over(d.length),
        "dbase": lambda d: original("dbase")(d) - d.through_norm,
    },
    "the norm is that of the whole matrix": {
        "length": lambda d: d.v.norms().norms(-2),
        "norm": lambda d: (d.n + 0.0 * d.m)[..., 0],
        "dnorm": lambda d: -((d.gain * d.dgain).over(d.n).sum(-2, keepdims=True)),
    },
    "the norm is not rooted": {
        "length": lambda d: d.v.norms() * d.v.norms(),
        "slope": lambda d: 2.0 * d.v,
    },
    "the norm is a root mean square": {
        "length": lambda d: d.inner**-0.5 * d.v.norms(),
        "slope": lambda d: (1 / d.inner) * d.v.over(d.length),
    },
    **{f"{size:g} is added to the norm": eps(size) for size in EPS},
    **{f"{size:g} is added under the root of the norm": eps_under_root(size) for size in EPS},
    **{f"the magnitude is rounded to {dtype} at init": rounded_at_init(dtype) for dtype in HALF},
    "the magnitude is 1 at init": {"initial": lambda d: 0.0 * original("initial")(d) + 1.0},
    "the direction form": {"in_direction_form": lambda d: True},
    "the weight form": {"in_direction_form": lambda d: False},
    "alpha where s belongs": {"s": lambda d: d.config.alpha},
    "s is left out": {"s": lambda d: 1.0},
    "s is applied twice": {"s": lambda d: original("s")(d) ** 2},
    "1/s where s belongs": {"s": lambda d: 1 / original("s")(d)},
    "s = alpha/√rank": {"s": lambda d: d.config.alpha / d.rank**0.5},
    "the update is subtracted": {"s": lambda d: -original("s")(d)},
    "the update is left out": multiplied("update", lambda d: 0.0),
    "m is not divided by n": {
        "gain": lambda d: d.m,
        "dm": lambda d: d.dgain[..., 0],
        "through_norm": lambda d: 0.0,
    },
    "m/n is left out, as in LoRA": {
        "gain": lambda d: 0.0 * d.m + 1.0,
        "dm": lambda d: 0.0 * d.dgain[..., 0],
        "through_norm": lambda d: 0.0,
    },
    "m/n is applied twice": {
        "gain": lambda d: d.m.over(d.n) * d.m.over(d.n),
        "dm": lambda d: (2.0 * (d.m * d.dgain).over(d.n * d.n))[..., 0],
        "dnorm": lambda d: -2.0 * (d.gain * d.dgain).over(d.n),
    },
    "|m| where m belongs": {
        "gain": lambda d: abs(d.m).over(d.n),
        "dm": lambda d: (d.dgain * d.m.over(abs(d.m))).over(d.n)[..., 0],
    },
    "the dropout mask touches the low-rank product alone": {"low_rank_dropout": lambda d: True},
    "the dropout mask touches the whole correction": {"low_rank_dropout": lambda d: False},
    "the dropout mask touches the base product too": {
        "beside": lambda d: 0.0 * d.w,
        "dbeside": lambda d: 0.0 * d.dmerged,
    },
    "the dropout mask is left out": {"mask": lambda d: None},
    "the dropout mask lacks 1/(1 − p)": {
        "mask": lambda d: d.given_mask and d.given_mask.over(d.given_mask)
    },
}

NOT_AS_DECLARED: dict[str, Changes] = {
    "the bias is not scaled": {name: original(name) for name in ("y", "dbias", "dgain")},
    "no number is added to the norm": {"eps": lambda d: 0.0},
}
"""These change nothing unless the conventions declare the opposite."""

LOW_RANK: dict[str, Changes] = {
    "the norm lacks s": {
        "unscaled": lambda d: d.base + d.b @ d.a,
        "length": lambda d: d.unscaled.norms(),
        "slope": lambda d: d.unscaled.over(d.length),
        "da": lambda d: d.s * (d.b.mT @ (d.gain * d.dmerged)) + d.b.mT @ through_norm(d),
        "db": lambda d: d.s * ((d.gain * d.dmerged) @ d.a.mT) + through_norm(d) @ d.a.mT,
    },
    "B meets A in the reverse order of ranks": {
        "update": lambda d: d.s * (d.b[..., ::-1] @ d.a),
        "da": lambda d: d.s * (d.b[..., ::-1].mT @ d.dv),
        "db": lambda d: d.s * (d.dv @ d.a.mT)[..., ::-1],
    },
}


def by_parts(d: Any) -> Any:
    """Return the weight that multiplies dy in dx as a product, for deviations of its parts."""
    return d.back_gain * d.back_rows


BACKWARD: dict[str, Changes] = {
    DETACHED: {"through_norm": lambda d: 0.0},
    "the norm is not detached": {"through_norm": lambda d: d.dlength * d.slope},
    "the gradient through the norm has the wrong sign": multiplied("through_norm", lambda d: -1.0),
    "the gradient through the norm has V/n where V/‖V‖ belongs": BY_N,
    "the gradient through the norm lacks m/n": {"dnorm": lambda d: -(d.dgain.over(d.n))},
    "the gradient through the norm lacks 1/n": {"dnorm": lambda d: -(d.gain * d.dgain)},
    "the gradients of A, B and W lack m/n": {
        "dv": lambda d: d.dmerged + original("dv")(d) - d.gain * d.dmerged
    },
    "dA lacks m/n": {"da": lambda d: d.s * (d.b.mT @ (d.dmerged + through_norm(d)))},
    "dB lacks m/n": {"db": lambda d: d.s * ((d.dmerged + through_norm(d)) @ d.a.mT)},
    "dA lacks s": multiplied("da", lambda d: 1 / d.s),
    "dB lacks s": multiplied("db", lambda d: 1 / d.s),
    "dA has s twice": multiplied("da", lambda d: d.s),
    "dB has s twice": multiplied("db", lambda d: d.s),
    "dA has the wrong sign": multiplied("da", lambda d: -1.0),
    "dB has the wrong sign": multiplied("db", lambda d: -1.0),
    "dA and dB have the wrong sign": {
        **multiplied("da", lambda d: -1.0),
        **multiplied("db", lambda d: -1.0),
    },
    "dm has the wrong sign": multiplied("dm", lambda d: -1.0),
    "dx has the wrong sign": multiplied("dx", lambda d: -1.0),
    "dA lacks the gradient through the norm": {
        "da": lambda d: d.s * (d.b.mT @ (d.gain * d.dmerged))
    },
    "dB lacks the gradient through the norm": {
        "db": lambda d: d.s * ((d.gain * d.dmerged) @ d.a.mT)
    },
    "dW lacks the gradient through the norm": {
        "dbase": lambda d: original("dbase")(d) - d.through_norm
    },
    "dA's part through the norm lacks s": {
        "da": lambda d: d.s * (d.b.mT @ (d.gain * d.dmerged)) + d.b.mT @ through_norm(d)
    },
    "dB's part through the norm lacks s": {
        "db": lambda d: d.s * ((d.gain * d.dmerged) @ d.a.mT) + through_norm(d) @ d.a.mT
    },
    "dx lacks m/n": {"back": by_parts, "back_gain": lambda d: 1.0},
    "dx lacks the update": {"back": by_parts, "back_rows": lambda d: d.base},
    "dx lacks the base": {"back": by_parts, "back_rows": lambda d: d.update},
    "dx lacks the dropout mask": {"dx": lambda d: d.dy @ d.back},
    "dx lacks what passes beside the mask": {
        "dx": lambda d: d.dy @ d.back if d.mask is None else d.mask * (d.dy @ d.back)
    },
    "dA has the whole x": {"da": lambda d: d.s * (d.b.mT @ (d.dv + d.gain * d.dbeside))},
    "dB has the whole x": {"db": lambda d: d.s * ((d.dv + d.gain * d.dbeside) @ d.a.mT)},
    "dm is not divided by n": {"dm": lambda d: d.dgain[..., 0]},
    "dm is divided by n twice": transformed("dm", lambda d, dm: dm.over(d.norm)),
    "dm is made from y, bias and all": {
        "dm": lambda d: (d.dgain.over(d.n) + bias_gain(d).over(d.m))[..., 0]
    },
    "dm has m once more": multiplied("dm", lambda d: d.m[..., 0]),
    "dm has m/n once more": multiplied("dm", lambda d: d.gain[..., 0]),
    "dbias is scaled by m/n": multiplied("dbias", lambda d: d.gain[..., 0]),
    "dA, dB, dm and dbias are means over the tokens": {
        **multiplied("dmerged", per_token),
        **multiplied("dbeside", per_token),
        **multiplied("dbias", per_token),
    },
    "dA, dB and dm are means over the tokens": {
        **multiplied("dmerged", per_token),
        **multiplied("dbeside", per_token),
    },
    "dbias is a mean over the tokens": multiplied("dbias", per_token),
    "dm is a mean over the tokens": multiplied("dm", per_token),
    "dW is that of the weight form": {"through_base": lambda d: d.dbase},
    "dW lacks its projection": {"through_base": lambda d: d.dbase.over(d.w.norms())},
}

STEP: dict[str, Changes] = {
    "the bias corrections are one step ahead": {
        "corrections": lambda d: (1 - d.beta1 ** (d.t + 1), 1 - d.beta2 ** (d.t + 1))
    },
    "there are no bias corrections": {"corrections": lambda d: (1.0, 1.0)},
    "mu has no bias correction": {"mean": lambda d: d.mu},
    "nu has no bias correction": {"square": lambda d: d.nu},
    "the bias corrections are those of step 1": {
        "corrections": lambda d: (1 - d.beta1, 1 - d.beta2)
    },
    "the betas are swapped": {
        "mu": lambda d: d.beta2 * d.mu_before + (1 - d.beta2) * d.gradient,
        "nu": lambda d: d.beta1 * d.nu_before + (1 - d.beta1) * (d.gradient * d.gradient),
        "corrections": lambda d: (1 - d.beta2**d.t, 1 - d.beta1**d.t),
    },
    "mu lacks 1 − β₁": {"mu": lambda d: d.beta1 * d.mu_before + d.gradient},
    "nu lacks 1 − β₂": {"nu": lambda d: d.beta2 * d.nu_before + d.gradient * d.gradient},
    "the moments are forgotten": {
        "mu": lambda d: (1 - d.beta1) * d.gradient,
        "nu": lambda d: (1 - d.beta2) * (d.gradient * d.gradient),
    },
    "the root of nu is left out": {"divisor": lambda d: d.square + d.eps},
    "eps is under the root": {"divisor": lambda d: (d.square + d.eps).sqrt()},
    "eps is added before the bias correction": {
        "divisor": lambda d: (d.nu.sqrt() + d.eps) * d.corrections[1] ** -0.5
    },
    "eps is left out": {"divisor": lambda d: d.square.sqrt()},
    "the decay is coupled, as in Adam": {
        "gradient": lambda d: d.g + original("pull")(d),
        "pull": lambda d: 0.0,
    },
    "the decay is coupled and decoupled": {"gradient": lambda d: d.g + original("pull")(d)},
    "the decay is left out": {"pull": lambda d: 0.0},
    "the decay is not multiplied by the learning rate": {
        "stepped": lambda d: d.start - d.rate * d.mean.over(d.divisor) - d.pull
    },
    "the magnitude decays too": {"start": lambda d: 1.0 * d.p, "pull": lambda d: d.decay * d.p},
    "the step goes uphill": {
        "stepped": lambda d: d.start + d.rate * (d.mean.over(d.divisor) + d.pull)
    },
}
