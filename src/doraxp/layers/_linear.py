"""A plain linear layer with a backward.

W (out, in)      y = x Wᵀ + bias
"""

from __future__ import annotations

from typing import Any

from doraxp._base.types import Array
from doraxp._core.checks import check_bias, check_input, check_output_gradient, check_weight
from doraxp._core.matrix import as_tokens
from doraxp.backends import as_dtype, compute_dtype, is_by_rows, operations


class Linear:
    """A linear layer, y = x Wᵀ + bias, for use as the base of a `DoRALayer`.

    Parameters
    ----------
    weight : array, shape (*stack, out, in)
    bias : array, shape (*stack, out), optional

    Examples
    --------
    >>> import numpy as np
    >>> layer = Linear(np.array([[3.0, 4.0], [0.0, 5.0]]), np.array([0.0, 1.0]))
    >>> layer.forward(np.array([1.0, 2.0])), layer.backward(np.array([1.0, 0.0]))
    (array([11., 11.]), array([3., 4.]))
    >>> layer.weight_gradient
    array([[1., 2.],
           [0., 0.]])
    """

    weight_gradient: Array | None = None
    bias_gradient: Array | None = None
    _cache: tuple[Array, Array] | None = None

    def __init__(self, weight: Array, bias: Array | None = None) -> None:
        operations(weight=weight, bias=bias)
        if is_by_rows(weight):
            raise TypeError("weight must be an array: the layer makes its gradient")
        check_weight(weight)
        check_bias(weight, bias)
        self.weight = weight
        self.bias = bias

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for a copy, which starts without a forward and without gradients."""
        return self.__dict__ | {"_cache": None, "weight_gradient": None, "bias_gradient": None}

    def forward(self, x: Array) -> Array:
        """Return y = x Wᵀ + bias in x's dtype: (*stack, ..., in) -> (*stack, ..., out)."""
        weight, bias = self.weight, self.bias
        ops = operations(x=x, weight=weight, bias=bias)
        xp = ops.xp
        check_input(weight, x)
        dtype = compute_dtype(weight, xp=xp)
        y = ops.product(as_tokens(x, weight, dtype, xp=xp), xp.matrix_transpose(weight))
        if bias is not None:
            y += as_dtype(bias, dtype, xp=xp)[..., None, :]
        self._cache = x, weight
        return xp.reshape(as_dtype(y, x.dtype, xp=xp), (*x.shape[:-1], weight.shape[-2]))

    __call__ = forward

    def backward(self, dy: Array) -> Array:
        """Return dx = dy W; add dyᵀ x to `weight_gradient` and Σ_tokens dy to `bias_gradient`."""
        if self._cache is None:
            raise RuntimeError("backward needs a forward: call forward first")
        x, weight = self._cache
        ops = operations(dy=dy, x=x)
        xp = ops.xp
        check_output_gradient(dy, (*x.shape[:-1], weight.shape[-2]))
        dtype = compute_dtype(weight, xp=xp)
        d = as_tokens(dy, weight, dtype, xp=xp)  # (*stack, tokens, out)
        dweight = ops.product(xp.matrix_transpose(d), as_tokens(x, weight, dtype, xp=xp))
        self.weight_gradient = add_to(self.weight_gradient, dweight)
        if self.bias is not None:
            self.bias_gradient = add_to(self.bias_gradient, xp.sum(d, axis=-2))
        dx = ops.product(d, weight)
        return xp.reshape(as_dtype(dx, x.dtype, xp=xp), x.shape)

    def clear_gradients(self) -> None:
        """Drop the gradients: they are None until the next backward."""
        self.weight_gradient = self.bias_gradient = None


def add_to(total: Array | None, gradient: Array) -> Array:
    """Return total + gradient, where a total of None is 0."""
    return gradient if total is None else total + gradient
