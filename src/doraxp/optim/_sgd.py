"""SGD with momentum, as a pure function.

p  parameter    g  gradient    v  velocity    β  momentum    η  learning_rate    λ  weight_decay
"""

from __future__ import annotations

from typing import Any, NamedTuple

from doraxp._base.scalars import check_flag, check_kind, check_number
from doraxp._base.types import Namespace
from doraxp.backends import as_dtype, compute_dtype
from doraxp.optim._per_leaf import PerLeaf, learning_rates, per_leaf
from doraxp.optim._trees import Params, align, zeros_like


class SGDState(NamedTuple):
    """The state that `sgd_step` takes and returns."""

    velocity: Any
    """v, in the structure of the parameters and in the compute dtype."""


def sgd_init(params: Any) -> SGDState:
    """Return the state before the first step, v = 0.

    Parameters
    ----------
    params : tree of arrays

    Returns
    -------
    SGDState

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
    >>> sgd_init(Adapter(np.ones((1, 2)), np.ones((3, 1)), np.ones(3))).velocity.magnitude
    array([0., 0., 0.])
    """
    return SGDState(zeros_like(params))


def sgd_step(
    params: Params,
    grads: Params,
    state: SGDState,
    *,
    learning_rate: PerLeaf,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: PerLeaf = 0.0,
    lora_plus: float = 1.0,
) -> tuple[Params, SGDState]:
    """Return the parameters and the state after one step of SGD with momentum.

    ::

        g ← g + λ p                the decay is coupled: it enters the momentum
        v ← β v + g                v = 0 before the first step
        p ← p − η v                plain
        p ← p − η (g + β v)        nesterov

    This is torch.optim.SGD without dampening.

    Parameters
    ----------
    params, grads : tree of arrays
    state : SGDState
        From `sgd_init` or from the previous step.
    learning_rate : number, or one per leaf
        η, at least 0; see `doraxp.optim`.
    momentum : float
        β, in 0 ≤ β < 1.
    nesterov : bool
        Look ahead along v. Needs a momentum above 0.
    weight_decay : number, or one per leaf
        λ, at least 0. One number does not decay `magnitude`; see `doraxp.optim`.
    lora_plus : float
        η of each leaf named `lora_b` is this many times the given one; above 0.

    Returns
    -------
    params : the structure and dtypes of `params`
    state : SGDState

    Raises
    ------
    TypeError
        The arrays are of two libraries, a dtype is not floating, or an argument that must be a
        number is not one.
    ValueError
        Structures, shapes or devices differ, a number is out of range, or `nesterov` comes with a
        momentum of 0.

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
    momentum = check_momentum(momentum, nesterov)
    aligned = align(params=params, grads=grads, **{"state.velocity": state.velocity})
    xp = aligned.ops.xp
    rates = learning_rates(learning_rate, lora_plus, aligned)
    decays = per_leaf("weight_decay", weight_decay, aligned, spared="magnitude")
    stepped, velocity = [], []
    for param, *given in zip(*aligned.columns, rates, decays, strict=True):
        p, g, v, rate, decay = _widened(param, *given, xp=xp)
        g = g + decay * p
        v = momentum * v + g
        p = p - rate * (g + momentum * v if nesterov else v)
        stepped.append(as_dtype(p, param.dtype, xp=xp))
        velocity.append(v)
    return aligned.build("params", stepped), SGDState(aligned.build("state.velocity", velocity))


def check_momentum(momentum: float, nesterov: bool) -> float:
    """Return the momentum as a float, and raise an error unless the two fit each other."""
    check_flag("nesterov", nesterov)
    momentum = check_number("momentum", momentum, below=1)
    if nesterov and momentum == 0:
        raise ValueError("nesterov must come with a momentum above 0, got 0.0")
    return momentum


def _widened(*values: Any, xp: Namespace) -> tuple[Any, ...]:
    """Return arrays in the compute dtype of the first, and floats as they are."""
    dtype = compute_dtype(values[0], xp=xp)
    return tuple(
        value if isinstance(value, float) else as_dtype(value, dtype, xp=xp) for value in values
    )
