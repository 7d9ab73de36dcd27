"""DoRA around a layer that the caller has, as an object with a state.

    W (out, in)   A (rank, in)   B (out, rank)   m (out,)      y = x W'ᵀ + bias

The layer remembers one forward for the backward, and adds gradients up. The math is in
`doraxp._core.linear`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from doraxp._base.scalars import check_flag
from doraxp._base.types import Array, Config
from doraxp._base.words import counted
from doraxp._core.adapter import InitMethod, init, merge
from doraxp._core.decomposition import MagnitudeDirectionChange, magnitude_direction_change
from doraxp._core.kinds import LayerKind
from doraxp._core.linear import backward, forward
from doraxp._core.operators import Operator
from doraxp.backends import is_by_rows, operations
from doraxp.layers._base_layer import (
    WeightLayout,
    bias_of,
    check_bias_of,
    check_no_other_bias,
    copy_with,
    other_layout,
    stored_as,
    weight_of,
)
from doraxp.layers._dropout import Dropout
from doraxp.layers._linear import add_to
from doraxp.layers._trained import TrainedArrays

_ERRORS = (TypeError, ValueError, RuntimeError, IndexError)


class Diagnostics(NamedTuple):
    """The result of `DoRALayer.diagnostics`."""

    shapes: dict[str, tuple[int, ...]]
    """Shapes of weight (*stack, out, in), bias, lora_a, lora_b and magnitude."""
    rank: int
    """Rank of the update B A."""
    scaling: float
    """The factor s."""
    change: MagnitudeDirectionChange
    """Change from the weight that the layer was made with to W'."""
    gradient_norms: dict[str, Array]
    """‖gradient‖ of each trained array, shape (); empty without gradients."""


class DoRALayer(TrainedArrays):
    """A given layer with a DoRA adapter: y = x W'ᵀ + bias with W' = (m / n)⊙(ρ⊙W + s B A).

    The layer computes with the arrays of the base and never changes the base. Do not write to the
    base's weight in place while the layer is in use: the layer keeps a norm made from it. Use a
    layer from one thread at a time.

    Parameters
    ----------
    base : object
        Any object with a weight and, if it has one, a bias. The weight may be a `RowWeight`,
        such as a `QuantisedWeight`: it stays as it is, and the merged layer has an array.
    config : Config
    seed : int
        Draws A, see `doraxp.init`, and the masks of dropout.
    kind : LayerKind, optional
        How the base stores its weight. None takes that of `operator`; without one the weight must
        have two axes, and is linear. Stacks need LayerKind("experts").
    operator : Operator, optional
        How the weight acts: `doraxp.Convolution(...)`, `doraxp.Embedding()` or your own. None is
        the matrix product.
    dropout : float
        p, in 0 ≤ p < 1. While `training` is True, each forward draws a mask, see `doraxp.forward`;
        `config.dropout` is the part of the layer that gets the dropped x. NumPy draws the masks on
        the host, so every backend gets the same ones.
    weight, bias : str
        Names of the base's attributes. In the state and in the gradients the names are always
        "weight" and "bias". A base may lack the attribute "bias"; another name it must have. None
        stands for no bias, whatever attributes the base has. With a `weight` of another name and
        no bias, an array of the shape of a bias is an error: it may be a bias that was forgotten.
        For a matrix without a `kind` or a `weight_layout`, the bias may be of either layout.
    train_base : bool
        Train the weight and the bias too. The layer has its own, which start equal to the base's.
        They keep their dtype: in float16 or bfloat16, steps below its resolution are lost.
    weight_layout : {"out_in", "in_out"}
        How the base stores its weight; "in_out" is the same as the kinds "transposed" and
        "transposed_experts". The vector, the state, the gradients and the merged layer have the
        base's layout. `layer.weight` is always (*stack, out, in).
    method : {"kaiming", "gaussian"}
        How A is drawn, see `doraxp.init`.

    Attributes
    ----------
    adapter : Adapter
        May be assigned to. The layer then drops its forward and its gradients.
    weight : array or RowWeight
        The weight that the layer computes with. For a convolution or an embedding it has the shape
        that the base stores.
    bias : array or None
        The bias that the layer computes with.
    gradients : dict of str to array, or None
        The gradients by the names of the state, in the compute dtype; None before a backward.
    training : bool
        Whether dropout is on, see `train` and `eval`.
    name : str
        The path in a model. Errors begin with it.

    Raises
    ------
    TypeError
        The base has no weight, the arrays are of two libraries, or a dtype is not floating.
    ValueError
        The base has no bias of the name, or has an array that may be a forgotten one; or the
        shapes do not fit, the devices differ, the rank is above min(out, in), a choice is
        unknown, or a kind or an operator is missing.

    Examples
    --------
    >>> import numpy as np
    >>> from doraxp import Linear
    >>> base = Linear(np.array([[3.0, 4.0], [0.0, 5.0]]))
    >>> layer = DoRALayer(base, Config(rank=1), seed=0)
    >>> layer(np.array([1.0, 2.0])), layer.backward(np.array([1.0, 0.0]))
    (array([11., 10.]), array([3., 4.]))
    >>> layer.update_parameters(0.1)
    >>> layer.adapter.magnitude
    array([4.78, 5.  ])
    """

    training: bool = True
    name: str = ""

    def __init__(
        self,
        base: Any,
        config: Config,
        *,
        seed: int,
        kind: LayerKind | None = None,
        operator: Operator | None = None,
        dropout: float = 0.0,
        weight: str = "weight",
        bias: str | None = "bias",
        train_base: bool = False,
        weight_layout: WeightLayout = "out_in",
        method: InitMethod = "kaiming",
    ) -> None:
        given, own_bias = weight_of(base, weight), bias_of(base, bias)
        check_flag("train_base", train_base)
        if is_by_rows(given) and (train_base or weight_layout != "out_in"):
            raise ValueError(
                "train_base must be False and weight_layout 'out_in' for a weight that is given by "
                "rows"
            )
        ops = operations(weight=given, bias=own_bias)
        stored = stored_as(given, kind, operator, weight_layout)
        check_bias_of(stored, own_bias)
        if weight != "weight" and bias is not None and not hasattr(base, bias):
            check_no_other_bias(base, weight, stored, layout_is_known=kind is not None)
        self._dropout = Dropout(dropout, seed)
        if dropout and stored.kind.name == "embedding":
            raise ValueError(
                f"dropout must be 0 for an embedding, whose input is token ids, got {dropout}"
            )
        self.base, self.config, self.train_base = base, config, train_base
        self._stored, self._attributes = stored, {"weight": weight, "bias": str(bias)}
        frozen = ops.detached(given)
        own_bias = None if own_bias is None else ops.detached(own_bias)
        self.weight, self.bias = stored.taken(frozen), own_bias
        self._initial_weight = self.weight
        if train_base:  # an optimizer may write into the arrays that it steps
            self.weight = stored.taken(ops.xp.astype(frozen, frozen.dtype))
            if own_bias is not None:
                self.bias = ops.xp.astype(own_bias, own_bias.dtype)
        self.adapter = init(self.weight, config, seed=seed, method=method, **stored.of_weight)

    @property
    def kind(self) -> LayerKind:
        """How the base stores its weight."""
        return self._stored.kind

    @property
    def operator(self) -> Operator | None:
        """How the weight acts; None for a matrix product."""
        return self._stored.operator

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape in which the base stores its weight."""
        return self._stored.shape

    @property
    def dropout(self) -> float:
        """The rate p."""
        return self._dropout.rate

    def __repr__(self) -> str:
        name = f"{self.name}: " if self.name else ""
        operator = "" if self.operator is None else f", {self.operator!r}"
        bias = "" if self.bias is None else ", bias"
        return (
            f"<DoRALayer {name}{self.kind.name} {self.stored_shape}{bias}{operator}, "
            f"rank {self.config.rank}, scaling {self.config.scaling:g}, dropout {self.dropout:g}, "
            f"{counted(self.parameter_count, 'trained parameter')}>"
        )

    def train(self) -> None:
        """Turn dropout on, as it is in a new layer."""
        self.training = True

    def eval(self) -> None:
        """Turn dropout off."""
        self.training = False

    def forward(self, x: Array, dropout_mask: Array | None = None) -> Array:
        """Return y = x W'ᵀ + bias in x's dtype, and remember the forward for `backward`.

        See `doraxp.forward`, also for the mask: it has the shape of x and the values 0 and
        1/(1 − p). A mask that is given counts instead of one that the layer draws.
        """
        masks = self._dropout.state
        try:
            return self._forward(x, dropout_mask)
        except _ERRORS as error:
            self._dropout.state = masks
            self._explain(error, x)
            raise

    __call__ = forward

    def _forward(self, x: Array, mask: Array | None) -> Array:
        prepared, previous = self._known()
        if self._renews and prepared is not None:
            prepared, previous = None, None if self.train_base else prepared
        if mask is None and self.training and self._dropout.rate:
            mask = self._dropout.mask_of(x)
        y, self._cache = forward(
            x,
            self.weight,
            self.adapter,
            self.config,
            bias=self.bias,
            prepared=prepared,
            previous=previous,
            dropout_mask=mask,
            **self._stored.of_call,
        )
        self._prepared, self._renews = self._cache.prepared, False
        return y

    def backward(self, dy: Array) -> Array:
        """Return dx, as `doraxp.backward` does, and add the parameters' gradients up.

        One forward serves any number of backwards. RuntimeError without a forward of the current
        parameters. None instead of dx where x were ids.
        """
        try:
            return self._backward(dy)
        except _ERRORS as error:
            self._explain(error)
            raise

    def _backward(self, dy: Array) -> Array:
        if self._cache is None or self._cache.prepared is not self._current():
            raise RuntimeError(
                "backward needs a forward with the current parameters: call forward first, and "
                "again after the parameters change or the state is reset"
            )
        dx, adapter, weight, bias = backward(dy, self._cache, train_base=self.train_base)
        old, new = self._live_gradients() or {}, self._named(weight, bias, adapter)
        self.gradients = {name: add_to(old.get(name), gradient) for name, gradient in new.items()}
        self._graded, self._renews = self._cache.prepared, False
        return dx

    def merge_to_original_layer(self) -> Any:
        """Return a copy of the base with W' as its weight and a copy of the layer's bias.

        The copy shares no array with the base. TypeError where `copy.deepcopy` cannot copy the
        base, or its weight or bias cannot be assigned.
        """
        new = {self._attributes["weight"]: self._stored.restored(self._merged())}
        if self.bias is not None:
            new[self._attributes["bias"]] = self._xp.astype(self.bias, self.bias.dtype)
        return copy_with(self.base, new)

    def diagnostics(self) -> Diagnostics:
        """Return shapes, numbers, gradient norms, and the change from the initial weight to W'."""
        xp, matrix = self._xp, self._stored.matrix
        arrays = {"weight": self.weight, "bias": self.bias, **self.adapter._asdict()}
        return Diagnostics(
            {name: tuple(array.shape) for name, array in arrays.items() if array is not None},
            self.config.rank,
            self.config.scaling,
            magnitude_direction_change(matrix(self._initial_weight), matrix(self._merged())),
            {name: xp.sqrt(xp.sum(g * g)) for name, g in (self._live_gradients() or {}).items()},
        )

    def _merged(self) -> Array:
        return merge(
            self.weight, self.adapter, self.config, prepared=self._current(),
            **self._stored.of_weight,
        )  # fmt: skip

    def _explain(self, error: Exception, x: Array | None = None) -> None:
        """Raise an error of the core again, with the layer's name and advice about the layout."""
        advice = ""
        if x is not None and str(error).startswith("x must have shape"):
            advice = other_layout(self._stored, tuple(x.shape[-1:]), axis=-1)
        if type(error) in _ERRORS and (self.name or advice):
            prefix = f"{self.name}: " if self.name else ""
            raise type(error)(f"{prefix}{error}{advice}") from error
