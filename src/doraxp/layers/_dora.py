"""DoRA around a layer that the caller has, as an object with a state.

    W (out, in)   A (rank, in)   B (out, rank)   m (out,)      y = x W'ᵀ + bias

The layer remembers one forward for the backward, and adds gradients up. Arrays of parameters are
replaced, never written to. The math is in `doraxp._core.linear`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from doraxp._base.scalars import check_flag, check_number
from doraxp._base.types import Adapter, Array, Config, Namespace
from doraxp._core.adapter import InitMethod, init, merge
from doraxp._core.checks import check_bias, check_weight
from doraxp._core.decomposition import MagnitudeDirectionChange, magnitude_direction_change
from doraxp._core.linear import Cache, backward, forward
from doraxp._core.prepared import Prepared, prepare
from doraxp.backends import array_namespace, as_dtype, compute_dtype, is_by_rows, operations
from doraxp.layers._base_layer import WeightLayout, check_base, copy_with, swap
from doraxp.layers._linear import add_to
from doraxp.layers._parameters import as_vector, count, from_vector, updated


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


class DoRALayer:
    """A given layer with a DoRA adapter: y = x W'ᵀ + bias with W' = (m / n)⊙(ρ⊙W + s B A).

    The layer computes with the arrays of the base and never changes the base. Do not write to the
    base's weight in place while the layer is in use: the layer keeps a norm made from it. Use a
    layer from one thread at a time.

    Parameters
    ----------
    base : object
        Any object with a `weight` and, if it has one, a `bias`. The weight may be a `RowWeight`,
        such as a `QuantisedWeight`: it stays as it is, and the merged layer has an array.
    config : Config
    seed : int
        Draws A, see `doraxp.init`.
    train_base : bool
        Train the weight and the bias too. The layer has its own, which start equal to the base's.
        They keep their dtype: in float16 or bfloat16, steps below its resolution are lost.
    weight_layout : {"out_in", "in_out"}
        How the base stores its weight. The vector, the state, the gradients and the merged layer
        have the same layout. `layer.weight` is always (out, in).
    method : {"kaiming", "gaussian"}
        How A is drawn, see `doraxp.init`.

    Attributes
    ----------
    adapter : Adapter
        May be assigned to. The layer then drops its forward and its gradients.
    weight, bias : array
        The arrays that the layer computes with; the weight may be a RowWeight, the bias None.
    gradients : dict of str to array, or None
        The gradients by the names of the state, in the compute dtype; None before a backward.

    Raises
    ------
    TypeError
        The base has no weight, the arrays are of two libraries, or a dtype is not floating.
    ValueError
        The shapes do not fit, the devices differ, the rank is above min(out, in), or a choice is
        unknown.

    Examples
    --------
    >>> import numpy as np
    >>> from doraxp import Linear
    >>> base = Linear(np.array([[3.0, 4.0], [0.0, 5.0]]))
    >>> layer = DoRALayer(base, Config(rank=1), seed=0)
    >>> layer.forward(np.array([1.0, 2.0])), layer.backward(np.array([1.0, 0.0]))
    (array([11., 10.]), array([3., 4.]))
    >>> layer.update_parameters(0.1)
    >>> layer.adapter.magnitude
    array([4.78, 5.  ])
    """

    gradients: dict[str, Array] | None = None
    _cache: Cache | None = None
    _prepared: Prepared | None = None
    _graded: Prepared | None = None  # of the parameters that the gradients belong to

    def __init__(
        self,
        base: Any,
        config: Config,
        *,
        seed: int,
        train_base: bool = False,
        weight_layout: WeightLayout = "out_in",
        method: InitMethod = "kaiming",
    ) -> None:
        check_base(base, weight_layout)
        check_flag("train_base", train_base)
        weight, bias = base.weight, getattr(base, "bias", None)
        if is_by_rows(weight) and (train_base or weight_layout != "out_in"):
            raise ValueError(
                "train_base must be False and weight_layout 'out_in' for a weight that is given by "
                "rows"
            )
        ops = operations(weight=weight, bias=bias)
        check_weight(weight)
        self.base, self.config, self.train_base = base, config, train_base
        self.weight_layout = weight_layout
        self.weight = self._swap(ops.detached(weight))
        self.bias = None if bias is None else ops.detached(bias)
        check_bias(self.weight, bias)
        self.adapter = init(self.weight, config, seed=seed, method=method)
        self._initial_weight = self.weight

    def forward(self, x: Array, dropout_mask: Array | None = None) -> Array:
        """Return y = x W'ᵀ + bias in x's dtype, and remember the forward for `backward`.

        See `doraxp.forward`, also for the mask: it has the shape of x and the values 0 and
        1/(1 − p).
        """
        prepared, previous = self._known()
        y, self._cache = forward(
            x,
            self.weight,
            self.adapter,
            self.config,
            bias=self.bias,
            prepared=prepared,
            previous=previous,
            dropout_mask=dropout_mask,
        )
        self._prepared = self._cache.prepared
        return y

    def backward(self, dy: Array) -> Array:
        """Return dx, as `doraxp.backward` does, and add the parameters' gradients up.

        One forward serves any number of backwards. RuntimeError without a forward of the current
        parameters.
        """
        if self._cache is None or self._cache.prepared is not self._current():
            raise RuntimeError(
                "backward needs a forward with the current parameters: call forward first, and "
                "again after the parameters change or the state is reset"
            )
        dx, adapter, weight, bias = backward(dy, self._cache, train_base=self.train_base)
        old, new = self._live_gradients() or {}, self._named(weight, bias, adapter)
        self.gradients = {name: add_to(old.get(name), gradient) for name, gradient in new.items()}
        self._graded = self._cache.prepared
        return dx

    def update_parameters(self, learning_rate: float) -> None:
        """Replace each trained array p by p − learning_rate · gradient, and drop the gradients.

        RuntimeError without gradients of the current parameters.
        """
        gradients = self._live_gradients()
        if gradients is None:
            raise RuntimeError(
                "update_parameters needs gradients of the current parameters: call backward "
                "first, and again after every step"
            )
        rate = check_number("learning_rate", learning_rate)
        new = {}
        for name, old in self.state_dict().items():
            step = rate * gradients[name]
            wide = as_dtype(old, step.dtype, xp=self._xp)
            new[name] = as_dtype(wide - step, old.dtype, xp=self._xp)
        self._replace(new)

    @property
    def parameter_count(self) -> int:
        """rank·(in + out) + out; with `train_base` also the sizes of weight and bias."""
        return count(self.state_dict())

    def get_parameters(self) -> Array:
        """Return all trained arrays as one vector in the compute dtype.

        ::

            [base weight, base bias if trained][A][B][m]      each row-major
        """
        return self._vector(self.state_dict())

    def set_parameters(self, vector: Array) -> None:
        """Replace the parameters by those of a vector like `get_parameters` returns.

        The layer drops its gradients and its forward. TypeError or ValueError where the library,
        the dtype, the device or the length is wrong; then nothing has changed.
        """
        self.load_state_dict(from_vector(vector, self.state_dict(), xp=self._xp))

    def get_parameter_gradients(self) -> Array:
        """Return the gradients in the order of `get_parameters`; zeros before a backward."""
        gradients = self._live_gradients()
        if gradients is None:
            return self._xp.zeros_like(self.get_parameters())
        return self._vector(gradients)

    def clear_gradients(self) -> None:
        """Drop the gradients."""
        self.gradients = None

    def reset_state(self) -> None:
        """Drop the gradients and the forward; keep the parameters."""
        self._cache = self._prepared = self._graded = self.gradients = None

    def merge_to_original_layer(self) -> Any:
        """Return a copy of the base with W' as its weight and a copy of the layer's bias.

        The copy shares no array with the base. TypeError where `copy.deepcopy` cannot copy the
        base, or its weight or bias cannot be assigned.
        """
        new = {"weight": self._swap(self._merged())}
        if self.bias is not None:
            new["bias"] = self._xp.astype(self.bias, self.bias.dtype)
        return copy_with(self.base, new)

    def state_dict(self) -> dict[str, Array]:
        """Return the trained arrays by name: the adapter's; with `train_base` weight and bias too.

        These are the layer's own arrays. Do not write to them: with `train_base` they are also the
        base's arrays until the first step.
        """
        return self._named(self.weight, self.bias, self.adapter)

    def load_state_dict(self, state: Mapping[str, Array], strict: bool = True) -> None:
        """Replace the parameters by copies of the arrays in `state`, cast to the layer's dtypes.

        The layer drops its gradients and its forward. TypeError for an array of another library or
        of a dtype that is not floating. ValueError that lists all wrong shapes, all missing and
        all unexpected names. After an error nothing has changed. With `strict=False` missing
        arrays keep their values and unexpected ones are ignored.
        """
        self._replace(updated(self.state_dict(), state, strict=strict, xp=self._xp))

    def diagnostics(self) -> Diagnostics:
        """Return shapes, numbers, gradient norms, and the change from the initial weight to W'."""
        xp = self._xp
        arrays = {"weight": self.weight, "bias": self.bias, **self.adapter._asdict()}
        return Diagnostics(
            {name: tuple(array.shape) for name, array in arrays.items() if array is not None},
            self.config.rank,
            self.config.scaling,
            magnitude_direction_change(self._initial_weight, self._merged()),
            {name: xp.sqrt(xp.sum(g * g)) for name, g in (self._live_gradients() or {}).items()},
        )

    @property
    def _xp(self) -> Namespace:
        return array_namespace(self.adapter.lora_a)

    def _known(self) -> tuple[Prepared | None, Prepared | None]:
        """Return the `Prepared` of the current parameters or None, and an earlier one or None.

        The earlier one has the same weight and another adapter or config. At most one of the two
        is given; after the weight has been replaced, neither is.
        """
        then = self._prepared
        if then is None or then.weight is not self.weight:
            return None, None
        unchanged = operations(weight=self.weight).unchanged
        same = unchanged(then.snapshot, then.adapter, self.adapter) and then.config == self.config
        return (then, None) if same else (None, then)

    def _current(self) -> Prepared:
        """Return the `Prepared` of the current parameters, computed anew only after a change."""
        prepared, previous = self._known()
        if prepared is None:
            prepared = prepare(self.weight, self.adapter, self.config, previous=previous)
            self._prepared = prepared
        return prepared

    def _live_gradients(self) -> dict[str, Array] | None:
        """Return the gradients, or None where they belong to earlier parameters."""
        if self.gradients is None or self._graded is not self._current():
            return None
        return self.gradients

    def _merged(self) -> Array:
        return merge(self.weight, self.adapter, self.config, prepared=self._current())

    def _named(
        self, weight: Array | None, bias: Array | None, adapter: Adapter
    ) -> dict[str, Array]:
        """Return the trained arrays by name, in the order of the vector and the base's layout."""
        if weight is None or not self.train_base:
            return adapter._asdict()
        biases = {} if bias is None else {"bias": bias}
        return {"weight": self._swap(weight), **biases, **adapter._asdict()}

    def _replace(self, new: dict[str, Array]) -> None:
        if self.train_base:
            self.weight, self.bias = self._swap(new["weight"]), new.get("bias")
        self.adapter = Adapter(*(new[name] for name in Adapter._fields))
        self._cache = self._graded = self.gradients = None

    def _swap(self, weight: Array) -> Array:
        """Return a weight of the base's layout as (out, in), or the reverse."""
        return swap(weight, self.weight_layout)

    def _vector(self, arrays: dict[str, Array]) -> Array:
        xp = self._xp
        return as_vector(arrays, compute_dtype(self.weight, xp=xp), xp=xp)
