"""AdamW, as a pure function.

    p  parameter    g  gradient    mu, nu  running means of g and g²    t  step, from 1
    η  learning_rate    λ  weight_decay

Here the arguments are checked; `Operations.adamw` computes the step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import array_api_compat

from doraxp._base.scalars import check_count, check_kind, check_number
from doraxp._base.types import AdamWLeaf, AdamWNumbers, Array, DType, Namespace
from doraxp.backends import Operations, as_dtype, compute_dtype
from doraxp.optim._trees import Params, PerLeaf, align, build, per_leaf, zeros_like


class AdamWState(NamedTuple):
    """The state that `adamw_step` takes and returns."""

    step: Any
    """Number of steps taken: an int, or a 0-d array where it was traced."""
    mu: Any
    """Running mean of g, in the structure of the parameters and in the compute dtype."""
    nu: Any
    """Running mean of g², like `mu`."""


def adamw_init(params: Any) -> AdamWState:
    """Return the state before the first step: step = 0, mu = 0, nu = 0.

    Parameters
    ----------
    params : NamedTuple of arrays, or dict of NamedTuples

    Returns
    -------
    AdamWState

    Raises
    ------
    TypeError
        `params` is neither a NamedTuple of arrays nor a dict of NamedTuples, the arrays are of
        two libraries, or a dtype is not floating.
    ValueError
        The devices differ, or `params` holds no array.

    Examples
    --------
    >>> import numpy as np
    >>> from doraxp import Adapter
    >>> adamw_init(Adapter(np.ones((1, 2)), np.ones((3, 1)), np.ones(3))).mu.magnitude
    array([0., 0., 0.])
    """
    return AdamWState(0, zeros_like(params), zeros_like(params))


def adamw_step(
    params: Params,
    grads: Params,
    state: AdamWState,
    *,
    learning_rate: PerLeaf,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: PerLeaf = 0.01,
) -> tuple[Params, AdamWState]:
    """Return the parameters and the state after one step of AdamW.

    ::

        mu ← β₁ mu + (1 − β₁) g
        nu ← β₂ nu + (1 − β₂) g²
        p  ← p − η (m̂ / (√n̂ + ε) + λ p)     m̂ = mu / (1 − β₁ᵗ), n̂ = nu / (1 − β₂ᵗ)

    The decay is decoupled: it does not enter the moments. It is multiplied by η, as in
    torch.optim.AdamW. The paper multiplies it by the schedule alone.

    Parameters
    ----------
    params, grads : NamedTuple of arrays, or dict of NamedTuples
    state : AdamWState
        From `adamw_init` or from the previous step.
    learning_rate : number, or one per leaf
        η, at least 0; see `doraxp.optim`.
    beta1, beta2 : float
        β₁ and β₂, in 0 ≤ β < 1.
    eps : float
        ε, above 0. The first gradient of A is 0, because B is 0; with ε = 0 its first step would
        be 0/0.
    weight_decay : number, or one per leaf
        λ, at least 0. One number does not decay `magnitude`; see `doraxp.optim`.

    Returns
    -------
    params : the structure and dtypes of `params`
    state : AdamWState

    Raises
    ------
    TypeError
        The arrays are of two libraries, a dtype is not floating, or an argument that must be a
        number is not one.
    ValueError
        Structures, shapes or devices differ, or a number is out of range.

    References
    ----------
    arXiv:1711.05101, algorithm 2; arXiv:2402.12354 (LoRA+), which advises a learning rate for B
    16 times that of A.

    Examples
    --------
    >>> import numpy as np
    >>> from doraxp import Adapter
    >>> params = {"q_proj": Adapter(np.ones((1, 2)), np.ones((2, 1)), np.ones(2))}
    >>> rate = Adapter(lora_a=0.125, lora_b=0.5, magnitude=0.125)
    >>> params, state = adamw_step(
    ...     params, params, adamw_init(params), learning_rate=rate, weight_decay=0
    ... )
    >>> params["q_proj"].lora_a.round(6), params["q_proj"].lora_b.round(6), state.step
    (array([[0.875, 0.875]]), array([[0.5],
           [0.5]]), 1)
    """
    check_kind("state", state, AdamWState)
    beta1 = check_number("beta1", beta1, below=1)
    beta2 = check_number("beta2", beta2, below=1)
    eps = check_number("eps", eps, positive=True)
    ops, leaves = align(params=params, grads=grads, **{"state.mu": state.mu, "state.nu": state.nu})
    xp = ops.xp
    rates = per_leaf("learning_rate", learning_rate, params, ops=ops)
    decays = per_leaf("weight_decay", weight_decay, params, spared="magnitude", ops=ops)
    step = _count_of(state, ops=ops) + 1
    dtypes = {path: compute_dtype(p, xp=xp) for path, (p, *_) in leaves.items()}
    _check_eps(eps, dtypes.values(), xp=xp)
    widest = compute_dtype(*(p for p, *_ in leaves.values()), xp=xp)
    numbers = AdamWNumbers(
        beta1, 1 - beta1, beta2, 1 - beta2, eps,
        *(_bias_correction(beta, step, widest, xp=xp) for beta in (beta1, beta2)),
    )  # fmt: skip
    wide = {
        path: AdamWLeaf(p, g, *(as_dtype(mean, dtypes[path], xp=xp) for mean in means))
        for path, (p, g, *means) in leaves.items()
    }
    stepped = ops.adamw(wide, rates, decays, numbers)
    new = [{path: arrays[i] for path, arrays in stepped.items()} for i in range(3)]
    state = AdamWState(step, build(state.mu, new[1]), build(state.nu, new[2]))
    return build(params, new[0]), state


def _check_eps(eps: float, dtypes: Iterable[DType], *, xp: Namespace) -> None:
    """Raise ValueError where ε would round to 0: then 0/0 is NaN where a gradient is 0."""
    for dtype in dtypes:
        least = float(xp.finfo(dtype).smallest_normal)
        if eps < least:
            name = "float64" if dtype == xp.float64 else "float32"
            raise ValueError(f"eps must be at least {least} in {name}, got {eps}")


def _count_of(state: AdamWState, *, ops: Operations) -> int | Array:
    """Return `state.step`: an int, or a 0-d array of an integer dtype; raise for anything else."""
    step = state.step
    if array_api_compat.is_array_api_obj(step):
        known = array_api_compat.array_namespace(step) is ops.xp
        if known and step.ndim == 0 and ops.xp.isdtype(step.dtype, "integral"):
            traced: Array = step
            return traced
    return check_count("state.step", step)


def _bias_correction(
    beta: float, step: int | Array, dtype: DType, *, xp: Namespace
) -> float | Array:
    """Return 1 − βᵗ as −expm1(t log β): in float32, 1 − βᵗ itself loses digits where β is near 1.

    A float where the step is an int; else a 0-d array of the dtype.
    """
    log_beta = math.log(beta) if beta > 0 else -math.inf
    if isinstance(step, int):
        return -math.expm1(step * log_beta)
    return -xp.expm1(xp.astype(step, dtype) * log_beta)
