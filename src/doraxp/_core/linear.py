"""`forward` and `backward` of a layer with a DoRA adapter: the checks, and the way to compute.

    x (tokens, in)   W (out, in) frozen   A (rank, in)   B (out, rank)   m (out,)   ρ (out,)
    V = ρ⊙W + s B A      n = ‖V‖ by rows      g = m / n      y = g⊙(x Vᵀ) + bias

`doraxp._core.matrix` computes with a matrix, and `doraxp._core.operated` through an operator.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from doraxp._base.pytrees import register_static
from doraxp._base.scalars import check_flag, check_kind
from doraxp._base.types import (
    Adapter,
    Array,
    Config,
    Gradients,
    Reduce,
    RowWeight,
)
from doraxp._core.checks import check_call, check_operated, check_output_gradient
from doraxp._core.kinds import LayerKind
from doraxp._core.matrix import Cache, backward_checked, forward_checked
from doraxp._core.operated import Layer, Through, gradients, outputs, resolved
from doraxp._core.operators import Operator
from doraxp._core.prepared import (
    Prepared,
    check_prepared,
    check_previous,
    check_same_reduce,
    check_unwritten,
    matrix_of,
    prepare_checked,
    stored_as,
)
from doraxp.backends import (
    Operations,
    as_dtype,
    by_rows,
    is_by_rows,
    is_integer,
    operations,
)


def forward(
    x: Array,
    weight: Array | RowWeight,
    adapter: Adapter,
    config: Config,
    *,
    bias: Array | None = None,
    prepared: Prepared | None = None,
    previous: Prepared | None = None,
    dropout_mask: Array | None = None,
    reduce: Reduce | None = None,
    kind: LayerKind | None = None,
    operator: Operator | None = None,
) -> tuple[Array, Cache]:
    """Return y = g⊙(x Vᵀ) + bias, and the cache for the backward.

    ::

        L = x Aᵀ                   (tokens, rank)
        z = ρ⊙(x Wᵀ) + s L Bᵀ      (tokens, out)
        y = g⊙z + bias             the bias is never scaled

    With a dropout mask, x~ = mask⊙x, and by `config.dropout`::

        "input":     y = g⊙(x~ Vᵀ) + (x − x~) Wᵀ + bias
        "low_rank":  z = ρ⊙(x Wᵀ) + s (x~ Aᵀ) Bᵀ
                     y = g⊙z + bias

    "input" is PEFT's rule: the base gets the whole x, and the adapter's part gets x~. It costs a
    second product with W, (tokens, out) in the forward and (tokens, in) in the backward, each with
    a temporary of that shape. "low_rank" costs one more product of rank columns in the backward.
    With a fresh adapter, "low_rank" gives the same bits as no mask; "input" differs by rounding.

    Parameters
    ----------
    x : array, shape (*stack, ..., in)
        The compute dtype is that of weight and adapter: a float64 x does not widen a float32
        layer.
    weight : array, shape (*stack, out, in), or RowWeight, shape (out, in)
        Or as a layer of `kind` stores it. A RowWeight is read once, and once more in the backward;
        without `prepared` and `previous` three times in the forward.
    adapter : Adapter
    config : Config
    bias : array, shape (*stack, out), optional
    prepared : Prepared, optional
        From `doraxp.prepare` with this weight, adapter and config. It saves computing the norm.
    previous : Prepared, optional
        An earlier result for the same `weight` object, for a call without `prepared`. Its ‖w‖² is
        used again, and one product makes W Aᵀ and x Wᵀ. It may round in another order than a
        product of x alone. `cache.prepared` is the new result.
    dropout_mask : array, shape of x, optional
        0 where a number of x is dropped, 1/(1 − p) where it is kept. The caller draws it. The norm
        does not depend on the mask, and the mask has no gradient.
    reduce : callable, optional
        Returns the sum of an array over the ranks, if the input axis of x, W and A is split among
        ranks; see `docs/howto/distributed.md`. `prepared`, `previous` and the cache remember it.
    kind : LayerKind, optional
        How the weight is stored, as in `doraxp.prepare`. None means `operator.kind`.
    operator : Operator, optional
        How the weight acts: `doraxp.MatMul()`, which None means, `doraxp.Convolution(...)`,
        `doraxp.Embedding()`, or a framework's own. x and y then have the shapes of the operator,
        and its `apply(x, W)` stands for x Wᵀ. Ids take no dropout mask, and y is then in the
        weight's dtype. An operator takes no `reduce`.

    Returns
    -------
    y : array, shape (*stack, ..., out), in x's dtype
    cache : Cache
        For `doraxp.backward`. It holds x and the mask themselves: do not write to them before the
        backward.

    Raises
    ------
    TypeError
        The arrays are not of one library, or a dtype is not floating.
    ValueError
        The shapes do not fit, the devices differ, `prepared` or `previous` belongs to other
        arguments or another `reduce`, or `reduce` returns another shape or dtype.

    References
    ----------
    arXiv:2402.09353, equation 5. Dropout: PEFT 0.21.2, ``lora/variants.py`` and ``lora/dora.py``;
    mlx-lm, ``tuner/dora.py``.

    Examples
    --------
    >>> import numpy as np
    >>> import doraxp
    >>> weight, config = np.array([[3.0, 4.0], [0.0, 5.0]]), doraxp.Config(rank=1)
    >>> adapter = doraxp.init(weight, config, seed=0)
    >>> y, cache = forward(np.array([1.0, 2.0]), weight, adapter, config)
    >>> y
    array([11., 10.])
    """
    stored = cast(Array, weight)
    given = kind
    if operator is not None or kind is not None:
        given, operator = resolved(kind, operator)
    kind, matrix = matrix_of(stored, given, previous if prepared is None else prepared)
    if operator is not None:
        ops, dtype = check_operated(x, matrix, adapter, config, bias, dropout_mask, kind)
    else:
        ops, dtype = check_call(x, matrix, adapter, config, bias, dropout_mask)
    remembered = check_previous(previous, stored, reduce, kind)
    if prepared is not None:
        check_prepared(prepared, stored, adapter, config, kind, ops=ops)
        check_same_reduce("prepared", prepared, reduce)
        remembered = prepared.reduce
    if operator is not None:
        if remembered is not None:
            raise ValueError("reduce must be None with an operator")
        if prepared is None:
            prepared = prepare_checked(matrix, adapter, config, previous, None, dtype, ops=ops)
            prepared = stored_as(prepared, stored, kind)
        through = Through(operator, cast(LayerKind, given))
        return _forward_operated(x, bias, prepared, dropout_mask, through, ops=ops)
    y, cache = forward_checked(
        x, matrix, adapter, config, bias, prepared, previous, dropout_mask, remembered, dtype,
        ops=ops,
    )  # fmt: skip
    if kind is not None:
        cache = cache._replace(prepared=stored_as(cache.prepared, stored, kind))
    return y, cache


def _forward_operated(
    x: Array, bias: Array | None, prepared: Prepared, mask: Array | None, through: Through,
    *, ops: Operations,
) -> tuple[Array, Cache]:  # fmt: skip
    """Return the results of `forward` through an operator."""
    gain = prepared.gain
    wide = None
    if bias is not None:
        wide = ops.xp.reshape(as_dtype(bias, gain.dtype, xp=ops.xp), gain.shape)
    layer = Layer(through.operator, through.kind, prepared, ops)
    y, low, z = outputs(layer, x, mask, wide)
    y = as_dtype(y, prepared.weight.dtype if is_integer(x) else x.dtype, xp=ops.xp)
    register_static(Through)
    return y, Cache(x, bias, low, z, prepared, mask, replace(through, y_shape=tuple(y.shape)))


def backward(dy: Array, cache: Cache, *, train_base: bool = False) -> Gradients:
    """Return the gradients of x, A, B, m, and with `train_base` of W and the bias.

    ::

        dz = g⊙dy
        e  = Σ_tokens dy⊙z         (out,)
        dm = e / n
        q  = −m e / n³             0 with a detached norm
        dx = dz V
        dB = s dzᵀ L       + s q⊙(V Aᵀ)
        dA = s (dz B)ᵀ x   + s (q⊙B)ᵀ V
        dbias = Σ_tokens dy

        weight form:     dW = dzᵀ x + q⊙V
        direction form:  dW = ρ⊙(dD − D⊙rowsum(D⊙dD))
                         D  = ρ⊙W
                         dD = dzᵀ x + q⊙V

    The q terms are the gradient through the norm; the paper's section 4.3 and PEFT drop them.
    The gradients of a row with n = 0 are 0.

    With a dropout mask, x~ = mask⊙x replaces x in dA, L and z, and::

        "input":     dx = mask⊙(dz V) + (1 − mask)⊙(dy W)
                     dW is that of x~ plus dyᵀ (x − x~)
        "low_rank":  dx = dz V + (mask − 1)⊙(s (dz B) A)

    Parameters
    ----------
    dy : array, shape and library of y
    cache : Cache
        From `doraxp.forward`.
    train_base : bool
        Also return the gradients of the weight and of the bias. This stores V for a while.

    Returns
    -------
    Gradients

    Raises
    ------
    TypeError
        `dy` is of another library than the cache, or its dtype is not floating.
    ValueError
        `dy` does not have y's shape, the adapter was changed after the forward, or `train_base` is
        given for a RowWeight.

    References
    ----------
    arXiv:2402.09353, equations 6 to 11. `docs/explanation/math.md` derives the exact terms.

    Examples
    --------
    >>> import numpy as np
    >>> import doraxp
    >>> weight, config = np.array([[3.0, 4.0], [0.0, 5.0]]), doraxp.Config(rank=1)
    >>> y, cache = forward(np.eye(2), weight, doraxp.init(weight, config, seed=0), config)
    >>> backward(np.ones((2, 2)), cache).x
    array([[3., 9.],
           [3., 9.]])
    """
    check_kind("cache", cache, Cache)
    check_flag("train_base", train_base)
    through = cache.through
    if through is not None:
        ops = operations(dy=dy, z=cache.z)
        check_output_gradient(dy, through.y_shape)
        check_unwritten(cache.prepared, ops=ops)
        return _backward_operated(dy, cache, through, train_base=train_base, ops=ops)
    ops = operations(dy=dy, x=cache.x)
    if is_by_rows(cache.prepared.weight):
        if train_base:
            raise ValueError("train_base must be False for a weight that is given by rows")
        ops = by_rows(ops)
    check_output_gradient(dy, (*cache.x.shape[:-1], cache.prepared.matrix.shape[-2]))
    check_unwritten(cache.prepared, ops=ops)
    found = backward_checked(dy, cache, train_base=train_base, ops=ops)
    kind, dweight = cache.prepared.kind, found.weight
    if kind is None or dweight is None:
        return found
    return found._replace(weight=kind.restore(dweight, tuple(cache.prepared.weight.shape)))


def _backward_operated(
    dy: Array, cache: Cache, through: Through, *, train_base: bool, ops: Operations
) -> Gradients:
    """Return the results of `backward` through an operator."""
    x, bias, low_rank, z, prepared, mask, _ = cache
    layer = Layer(through.operator, through.kind, prepared, ops)
    found = gradients(
        layer, dy, x, low_rank, z, mask, train_base=train_base,
        with_bias=train_base and bias is not None,
    )  # fmt: skip
    if bias is None or found.bias is None:
        return found
    return found._replace(bias=ops.xp.reshape(found.bias, tuple(bias.shape)))
