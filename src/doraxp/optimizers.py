"""Optimizers, as pure functions: (params, grads, state) -> (params, state).

    p  parameter    g  gradient    η  learning_rate    λ  weight_decay    t  step, from 1

`params` is a NamedTuple of arrays, as `Adapter` is, or a dict of such by name; `grads` and what
the state holds have its structure. Each array is a leaf, and is stepped by itself.

`learning_rate` and `weight_decay` are one number, or one per leaf: a NamedTuple of numbers like
`params`, or like each entry of a dict; or a dict of either. A larger η for B than for A is LoRA+::

    learning_rate=Adapter(lora_a=1e-4, lora_b=1.6e-3, magnitude=1e-4)

A `weight_decay` of one number is for every leaf but those named `magnitude`. Decaying A and B
draws the layer back to its base weight; decaying m draws it, and its output, to 0. One per leaf
says so for m too, and does decay it. Neither the paper nor PEFT has a rule.

Under a compiler that traces, a learning rate, a weight decay and AdamW's step may be 0-d arrays.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeAlias, TypeVar

import array_api_compat

from doraxp._scalars import check_count, check_flag, check_kind, check_number
from doraxp._trees import align, build, per_leaf
from doraxp._types import Array
from doraxp.backends import Operations, as_dtype, compute_dtype

Params = TypeVar("Params")
PerLeaf: TypeAlias = Any
"""A number or 0-d array; a NamedTuple of them; or a dict of either."""


class SGDState(NamedTuple):
    """What `sgd_step` carries from step to step."""

    velocity: Any
    """v, in the structure of the parameters and in the compute dtype."""


class AdamWState(NamedTuple):
    """What `adamw_step` carries from step to step."""

    step: Any
    """How many steps were taken: an int, or a 0-d array where it was traced."""
    mu: Any
    """Running mean of g, in the structure of the parameters and in the compute dtype."""
    nu: Any
    """Running mean of g², like `mu`."""


def sgd_init(params: Any) -> SGDState:
    """Return the state before the first step, v = 0.

    Parameters
    ----------
    params : NamedTuple of arrays, or dict of them

    Returns
    -------
    SGDState

    Raises
    ------
    TypeError
        `params` is no NamedTuple of arrays nor a dict of them, they are not of one library, or a
        dtype is not floating.
    ValueError
        The devices differ, or there is no array.

    Examples
    --------
    >>> import numpy as np
    >>> from doraxp import Adapter
    >>> sgd_init(Adapter(np.ones((1, 2)), np.ones((3, 1)), np.ones(3))).velocity.magnitude
    array([0., 0., 0.])
    """
    return SGDState(_zeros(params))


def sgd_step(
    params: Params,
    grads: Params,
    state: SGDState,
    *,
    learning_rate: PerLeaf,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: PerLeaf = 0.0,
) -> tuple[Params, SGDState]:
    """Return the parameters and the state after one step of SGD, with momentum β.

    ::

        g ← g + λ p                the decay is coupled: it enters the momentum
        v ← β v + g                v = 0 before the first step
        p ← p − η v                plain
        p ← p − η (g + β v)        nesterov

    This is torch.optim.SGD without dampening.

    Parameters
    ----------
    params, grads : NamedTuple of arrays, or dict of them
    state : SGDState
        From `sgd_init` or the step before.
    learning_rate : number, or one per leaf
        η, at least 0; see the top of this module.
    momentum : float
        β, in 0 ≤ β < 1.
    nesterov : bool
        Look ahead along v. Needs a momentum.
    weight_decay : number, or one per leaf
        λ, at least 0. One number leaves `magnitude` alone.

    Returns
    -------
    params : as given, each leaf in its dtype
    state : SGDState

    Raises
    ------
    TypeError
        The arrays are not of one library, a dtype is not floating, or a number is none.
    ValueError
        Structures, shapes or devices differ, a number is out of range, or `nesterov` has no
        momentum.

    References
    ----------
    Sutskever et al., "On the importance of initialization and momentum in deep learning", 2013.

    Examples
    --------
    >>> import numpy as np
    >>> from doraxp import Adapter
    >>> params = Adapter(np.ones((1, 2)), np.ones((2, 1)), np.ones(2))
    >>> params, state = sgd_step(params, params, sgd_init(params), learning_rate=0.25)
    >>> params.magnitude
    array([0.75, 0.75])
    """
    check_kind("state", state, SGDState)
    check_flag("nesterov", nesterov)
    momentum = check_number("momentum", momentum, below=1)
    if nesterov and momentum == 0:
        raise ValueError("nesterov must come with a momentum above 0, got 0.0")
    ops, leaves = align(params=params, grads=grads, **{"state.velocity": state.velocity})
    xp = ops.xp
    rates = per_leaf("learning_rate", learning_rate, params, ops=ops)
    decays = per_leaf("weight_decay", weight_decay, params, spared="magnitude", ops=ops)
    stepped, velocity = {}, {}
    for path, arrays in leaves.items():
        p, g, v, rate, decay = _wide(*arrays, rates[path], decays[path], xp=xp)
        g = g + decay * p
        v = momentum * v + g
        p = p - rate * (g + momentum * v if nesterov else v)
        stepped[path] = as_dtype(p, arrays[0].dtype, xp=xp)
        velocity[path] = v
    return build(params, stepped), SGDState(build(state.velocity, velocity))


def adamw_init(params: Any) -> AdamWState:
    """Return the state before the first step: step = 0, mu = 0, nu = 0.

    Parameters
    ----------
    params : NamedTuple of arrays, or dict of them

    Returns
    -------
    AdamWState

    Raises
    ------
    TypeError
        `params` is no NamedTuple of arrays nor a dict of them, they are not of one library, or a
        dtype is not floating.
    ValueError
        The devices differ, or there is no array.

    Examples
    --------
    >>> import numpy as np
    >>> from doraxp import Adapter
    >>> adamw_init(Adapter(np.ones((1, 2)), np.ones((3, 1)), np.ones(3))).mu.magnitude
    array([0., 0., 0.])
    """
    return AdamWState(0, _zeros(params), _zeros(params))


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
    torch.optim.AdamW; in the paper by the schedule alone.

    Parameters
    ----------
    params, grads : NamedTuple of arrays, or dict of them
    state : AdamWState
        From `adamw_init` or the step before.
    learning_rate : number, or one per leaf
        η, at least 0; see the top of this module.
    beta1, beta2 : float
        β₁ and β₂, in 0 ≤ β < 1.
    eps : float
        ε, above 0: A's first gradient is 0, as B is, and 0/0 would be its first step.
    weight_decay : number, or one per leaf
        λ, at least 0. One number leaves `magnitude` alone.

    Returns
    -------
    params : as given, each leaf in its dtype
    state : AdamWState

    Raises
    ------
    TypeError
        The arrays are not of one library, a dtype is not floating, or a number is none.
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
    for leaf, *_ in leaves.values():
        dtype = compute_dtype(leaf, xp=xp)
        least = float(xp.finfo(dtype).smallest_normal)
        if eps < least:  # it would vanish, and 0/0 be NaN where a gradient is 0
            name = "float64" if dtype == xp.float64 else "float32"
            raise ValueError(f"eps must be at least {least} in {name}, got {eps}")
    stepped, first, second, fused = {}, {}, {}, None
    if isinstance(step, int):
        corrections = (_bias_correction(beta, step, None, xp=xp) for beta in (beta1, beta2))
        numbers = beta1, 1 - beta1, beta2, 1 - beta2, eps, *corrections
        fused = ops.adamw(leaves, rates, decays, numbers)
    for path, arrays in leaves.items():
        if fused is not None:
            stepped[path], first[path], second[path] = fused[path]
            continue
        p, g, mu, nu, rate, decay = _wide(*arrays, rates[path], decays[path], xp=xp)
        mu = beta1 * mu + (1 - beta1) * g
        nu = beta2 * nu + (1 - beta2) * (g * g)
        mean = mu / _bias_correction(beta1, step, p.dtype, xp=xp)
        square = nu / _bias_correction(beta2, step, p.dtype, xp=xp)
        p = p - rate * (mean / (xp.sqrt(square) + eps) + decay * p)
        stepped[path] = as_dtype(p, arrays[0].dtype, xp=xp)
        first[path], second[path] = mu, nu
    state = AdamWState(step, build(state.mu, first), build(state.nu, second))
    return build(params, stepped), state


def clip_by_global_norm(grads: Params, max_norm: float) -> tuple[Params, Array]:
    """Return the gradients times min(1, max_norm / norm), and the norm that they had.

    ::

        norm = √(Σ g²)      over all leaves together

    Gradients within `max_norm` come back bit for bit. There is no ε, unlike in torch's
    `clip_grad_norm_`. Where a gradient is not finite, all come back as they are and the norm is
    NaN.

    Parameters
    ----------
    grads : NamedTuple of arrays, or dict of them
    max_norm : float
        Above 0.

    Returns
    -------
    grads : as given, each leaf in its dtype
    norm : array, shape (), in the compute dtype
        Before the clipping. It is not read on the host.

    Raises
    ------
    TypeError
        The arrays are not of one library, a dtype is not floating, or `max_norm` is no number.
    ValueError
        The devices differ, or `max_norm` is not above 0.

    References
    ----------
    arXiv:1211.5063, algorithm 1.

    Examples
    --------
    >>> import numpy as np
    >>> from doraxp import Adapter
    >>> grads = Adapter(np.array([[0.0, 2.0]]), np.array([[4.0]]), np.array([4.0]))
    >>> clipped, norm = clip_by_global_norm(grads, max_norm=3.0)
    >>> float(norm), clipped.lora_a
    (6.0, array([[0., 1.]]))
    """
    max_norm = check_number("max_norm", max_norm, positive=True)
    ops, leaves = align(grads=grads)
    xp = ops.xp
    dtype = compute_dtype(*(leaf for (leaf,) in leaves.values()), xp=xp)
    wide = {path: as_dtype(leaf, dtype, xp=xp) for path, (leaf,) in leaves.items()}
    # Squares of what is left of a scaled loss overflow long before their root does.
    flat = xp.concat([xp.reshape(leaf, (-1,)) for leaf in wide.values()])
    norm = ops.safe_row_norms(flat)
    over = norm > max_norm
    factor = xp.where(over, max_norm / xp.where(over, norm, 1.0), 1.0)
    clipped = {
        path: as_dtype(factor * wide[path], leaf.dtype, xp=xp) for path, (leaf,) in leaves.items()
    }
    return build(grads, clipped), norm


def _wide(*values: Any, xp: Any) -> tuple[Any, ...]:
    """Return arrays in the compute dtype of the first, and floats as they are."""
    dtype = compute_dtype(values[0], xp=xp)
    return tuple(
        value if isinstance(value, float) else as_dtype(value, dtype, xp=xp) for value in values
    )


def _zeros(params: Params) -> Params:
    """Return zeros for each leaf, in its compute dtype."""
    ops, leaves = align(params=params)
    xp = ops.xp
    zeros = {
        path: xp.zeros_like(leaf, dtype=compute_dtype(leaf, xp=xp))
        for path, (leaf,) in leaves.items()
    }
    return build(params, zeros)


def _count_of(state: AdamWState, *, ops: Operations) -> Any:
    """Return how many steps were taken, held to an int, or to a 0-d array of an integer dtype."""
    step = state.step
    if array_api_compat.is_array_api_obj(step):
        known = array_api_compat.array_namespace(step) is ops.xp
        if known and step.ndim == 0 and ops.xp.isdtype(step.dtype, "integral"):
            return step
    return check_count("state.step", step)


def _bias_correction(beta: float, step: Any, dtype: Any, *, xp: Any) -> Any:
    """Return 1 − βᵗ as −expm1(t log β), which keeps in float32 the digits that 1 − β loses."""
    log_beta = math.log(beta) if beta > 0 else -math.inf
    if isinstance(step, int):
        return -math.expm1(step * log_beta)
    return -xp.expm1(xp.astype(step, dtype) * log_beta)
