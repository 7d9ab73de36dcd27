"""AdamW, as a pure function.

    p  parameter    g  gradient    mu, nu  running means of g and g²    t  step, from 1
    η  learning_rate    λ  weight_decay

Here the arguments are checked; `Operations.adamw` computes the step.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import array_api_compat

from doraxp._base.scalars import check_count, check_flag, check_kind, check_number
from doraxp._base.types import AdamWLeaves, AdamWNumbers, Array, DType, Namespace
from doraxp.backends import Operations, array_namespace, as_dtype, compute_dtype
from doraxp.optim._per_leaf import PerLeaf, learning_rates, per_leaf
from doraxp.optim._trees import Aligned, Params, align, zeros_like


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
    params : tree of arrays

    Returns
    -------
    AdamWState

    Raises
    ------
    TypeError
        `params` is neither a NamedTuple of arrays nor a dict, the arrays are of two libraries, or
        a dtype is not floating.
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
    lora_plus: float = 1.0,
    donate: bool = False,
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
    params, grads : tree of arrays
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
    lora_plus : float
        η of each leaf named `lora_b` is this many times the given one; above 0.
    donate : bool
        Give up the arrays of `params` and `state`: do not read them after the call. NumPy and CuPy
        write the results into them and return them, which saves the memory of new ones. The result
        is a new array where the given one cannot be used: a NumPy array that is read-only, a CuPy
        array that is not in C order, or a moment that is not in the compute dtype. No two arrays
        may share memory: views of one memory are not noticed. Other libraries return new arrays
        always. Under ``jax.jit``, pass ``donate_argnums`` to it instead.

    Returns
    -------
    params : the structure and dtypes of `params`
    state : AdamWState

    Raises
    ------
    TypeError
        The arrays are of two libraries, a dtype is not floating, or an argument that must be a
        number is not one, or `donate` is not a bool.
    ValueError
        Structures, shapes or devices differ, a number is out of range, or with `donate` an array
        occurs twice.

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
    check_flag("donate", donate)
    beta1 = check_number("beta1", beta1, below=1)
    beta2 = check_number("beta2", beta2, below=1)
    eps = check_number("eps", eps, positive=True)
    trees = {"params": params, "grads": grads, "state.mu": state.mu, "state.nu": state.nu}
    aligned = align(**trees)
    if donate:
        _check_distinct(aligned)
    ops = aligned.ops
    rates = learning_rates(learning_rate, lora_plus, aligned)
    decays = per_leaf("weight_decay", weight_decay, aligned, spared="magnitude")
    step = _count_of(state, ops=ops) + 1
    leaves = _in_compute_dtype(AdamWLeaves(*aligned.columns), eps, xp=ops.xp)
    numbers = AdamWNumbers(
        beta1, 1 - beta1, beta2, 1 - beta2, eps,
        *(_bias_correction(beta, step, leaves, xp=ops.xp) for beta in (beta1, beta2)),
    )  # fmt: skip
    p, mu, nu = ops.adamw(leaves, rates, decays, numbers, donate=donate)
    state = AdamWState(step, aligned.build("state.mu", mu), aligned.build("state.nu", nu))
    return cast(Params, aligned.build("params", p)), state


def _check_distinct(aligned: Aligned) -> None:
    """Refuse an array that occurs twice: its second use would read results of the first."""
    if len(set(map(id, aligned.leaves))) == len(aligned.leaves):
        return
    seen: dict[int, str] = {}
    for name, leaf in aligned.named().items():
        other = seen.setdefault(id(leaf), name)
        if other != name:
            raise ValueError(
                f"with donate each array must occur once, but {other} and {name} are the same one"
            )


def _in_compute_dtype(leaves: AdamWLeaves, eps: float, *, xp: Namespace) -> AdamWLeaves:
    """Return the leaves with the moments in the compute dtype of each, and check ε for it."""
    params, grads, mu, nu = leaves
    dtypes = [p.dtype for p in params]
    distinct = params[:1] if dtypes.count(dtypes[0]) == len(dtypes) else params
    wide = {p.dtype: compute_dtype(p, xp=xp) for p in distinct}
    for dtype, other in wide.items():
        _check_eps(eps, other, xp=xp)
        if dtype == other:
            wide[dtype] = dtype  # compares faster with the moments' than its equal of `xp`
    wanted = list(wide.values()) * len(params) if len(wide) == 1 else [wide[d] for d in dtypes]
    return AdamWLeaves(params, grads, _cast(mu, wanted, xp=xp), _cast(nu, wanted, xp=xp))


def _cast(column: Sequence[Array], dtypes: list[DType], *, xp: Namespace) -> Sequence[Array]:
    """Return each array in its dtype: the same list if all are."""
    if [array.dtype for array in column] == dtypes:
        return column
    return [as_dtype(*pair, xp=xp) for pair in zip(column, dtypes, strict=True)]


def _check_eps(eps: float, dtype: DType, *, xp: Namespace) -> None:
    """Raise ValueError where ε would round to 0: then 0/0 is NaN where a gradient is 0."""
    least = _smallest_normal(xp, dtype.__class__, dtype)
    if eps < least:
        name = "float64" if dtype == xp.float64 else "float32"
        raise ValueError(f"eps must be at least {least} in {name}, got {eps}")


def _count_of(state: AdamWState, *, ops: Operations) -> int | Array:
    """Return `state.step`: an int, or a 0-d array of an integer dtype; raise for anything else."""
    step = state.step
    if array_api_compat.is_array_api_obj(step):
        known = array_namespace(step) is ops.xp
        if known and step.ndim == 0 and ops.xp.isdtype(step.dtype, "integral"):
            traced: Array = step
            return traced
    return check_count("state.step", step)


@functools.cache
def _smallest_normal(xp: Namespace, kind: type, dtype: DType) -> float:
    # The type is a part of the key: array-api-strict warns if its dtypes are compared to NumPy's.
    return float(xp.finfo(dtype).smallest_normal)


def _bias_correction(
    beta: float, step: int | Array, leaves: AdamWLeaves, *, xp: Namespace
) -> float | Array:
    """Return 1 − βᵗ as −expm1(t log β): in float32, 1 − βᵗ itself loses digits where β is near 1.

    A float where the step is an int; else a 0-d array of the widest compute dtype.
    """
    log_beta = math.log(beta) if beta > 0 else -math.inf
    if isinstance(step, int):
        return -math.expm1(step * log_beta)
    return -xp.expm1(xp.astype(step, compute_dtype(*leaves.params, xp=xp)) * log_beta)
