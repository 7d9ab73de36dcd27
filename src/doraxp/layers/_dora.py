"""Layers with a state: a plain linear one, and DoRA around a layer of one's own.

    W (out, in)   A (rank, in)   B (out, rank)   m (out,)      y = x W'ᵀ + bias

They remember one forward for the backward and add gradients up. Parameters are replaced, never
written to. All of the math is in `linear`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import array_api_compat

from doraxp._base.scalars import check_flag, check_kind, check_number
from doraxp._base.types import Adapter, Array, Config
from doraxp._core.checks import check_bias, check_weight
from doraxp._core.decomposition import MagnitudeDirectionChange, magnitude_direction_change
from doraxp._core.linear import Cache, InitMethod, backward, forward, init, merge
from doraxp._core.prepared import Prepared, prepare
from doraxp.backends import as_dtype, compute_dtype, operations
from doraxp.layers._linear import add_to

WeightLayout: TypeAlias = Literal["out_in", "in_out"]


class Diagnostics(NamedTuple):
    """What `DoRALayer.diagnostics` returns."""

    shapes: dict[str, tuple[int, ...]]
    """Of weight (*stack, out, in), bias, lora_a, lora_b and magnitude."""
    rank: int
    """Of the update B A."""
    scaling: float
    """s."""
    change: MagnitudeDirectionChange
    """From the weight that the layer was made with to W'."""
    gradient_norms: dict[str, Array]
    """‖gradient‖ of each trained array, shape (); empty where there are no gradients."""


class DoRALayer:
    """A layer of one's own, adapted: y = x W'ᵀ + bias with W' = (m / n)⊙(ρ⊙W + s B A).

    The base lends its arrays and is never changed. Do not write to its weight in place while the
    layer is in use: the norm made from it is kept. One layer is for one thread at a time.

    Parameters
    ----------
    base : object
        Anything with a `weight` and, unless there is none, a `bias`.
    config : Config
    seed : int
        Draws A, see `doraxp.init`.
    train_base : bool
        Train the weight and the bias too: the layer's own, which start as the base's. They keep
        their dtype: in float16 or bfloat16, steps below its resolution are lost.
    weight_layout : {"out_in", "in_out"}
        How the base stores its weight, and so how the vector, the state, the gradients and the
        merged layer have it. `layer.weight` has (out, in) in any case.
    method : {"kaiming", "gaussian"}
        How A is drawn, see `doraxp.init`.

    Attributes
    ----------
    adapter : Adapter
        May be assigned to: forward and gradients of the one before are then dropped.
    weight, bias : array
        What the layer computes with; the bias may be None.
    gradients : dict of str to array, or None
        By the names of the state, in the compute dtype; None where there are none.

    Raises
    ------
    TypeError
        The base has no weight, the arrays are not of one library, or a dtype is not floating.
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
    _graded: Prepared | None = None  # what the gradients belong to

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
        weight, bias = getattr(base, "weight", None), getattr(base, "bias", None)
        if weight is None:
            raise TypeError(f"base must be a layer with a weight, got {type(base).__name__}")
        if weight_layout not in get_args(WeightLayout):
            raise ValueError(
                f"weight_layout must be one of {get_args(WeightLayout)}, got {weight_layout!r}"
            )
        check_flag("train_base", train_base)
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
        """Return y = x W'ᵀ + bias in x's dtype, as `doraxp.forward`; remember it for `backward`.

        With a mask of x's shape, 0 or 1/(1 − p), `config.dropout` says what sees mask⊙x.
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
        """Return dx, as `doraxp.backward`, and add the parameters' gradients up.

        One forward may be gone back through many times. RuntimeError without a forward, or where
        the parameters have changed since.
        """
        if self._cache is None or self._cache.prepared is not self._current():
            raise RuntimeError(
                "backward needs a forward with the parameters as they are now: none was made, or "
                "it was dropped when they changed or the state was reset"
            )
        dx, adapter, weight, bias = backward(dy, self._cache, train_base=self.train_base)
        old, new = self._live_gradients() or {}, self._named(weight, bias, adapter)
        self.gradients = {name: add_to(old.get(name), gradient) for name, gradient in new.items()}
        self._graded = self._cache.prepared
        return dx

    def update_parameters(self, learning_rate: float) -> None:
        """Take the step p ← p − learning_rate · gradient on all that is trained.

        The gradients are used up: RuntimeError without a backward since the last step.
        """
        gradients = self._live_gradients()
        if gradients is None:
            raise RuntimeError(
                "update_parameters needs the gradients of a backward: none was made, or they "
                "were used up or dropped"
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
        """rank·(in + out) + out, and the sizes of weight and bias where the base is trained."""
        return sum(math.prod(array.shape) for array in self.state_dict().values())

    def get_parameters(self) -> Array:
        """Return all that is trained as one vector in the compute dtype.

        ::

            [base weight, base bias if trained][A][B][m]      each row-major
        """
        return self._vector(self.state_dict())

    def set_parameters(self, vector: Array) -> None:
        """Take the parameters from a vector as of `get_parameters`; drop gradients and forward.

        TypeError or ValueError where library, dtype, device or length are others; then nothing
        has changed.
        """
        operations(vector=vector, layer=self.weight)
        shape = (self.parameter_count,)
        if tuple(vector.shape) != shape:
            raise ValueError(
                f"vector must have shape (parameter_count,) = {shape}, got {tuple(vector.shape)}"
            )
        state, start = {}, 0
        for name, old in self.state_dict().items():
            stop = start + math.prod(old.shape)
            state[name] = self._xp.reshape(vector[start:stop], old.shape)
            start = stop
        self.load_state_dict(state)

    def get_parameter_gradients(self) -> Array:
        """Return the gradients in the order of `get_parameters`, zeros where there are none."""
        gradients = self._live_gradients()
        if gradients is None:
            return self._xp.zeros_like(self.get_parameters())
        return self._vector(gradients)

    def clear_gradients(self) -> None:
        """Forget the gradients that were added up."""
        self.gradients = None

    def reset_state(self) -> None:
        """Forget the gradients and the forward; keep the parameters."""
        self._cache = self._prepared = self._graded = self.gradients = None

    def merge_to_original_layer(self) -> Any:
        """Return a copy of the base with W' as its weight and a copy of the layer's bias.

        The base is untouched and shares no array with it. TypeError where the base cannot be
        copied by `copy.deepcopy`, or weight or bias not be assigned.
        """
        new = {"weight": self._swap(self._merged())}
        if self.bias is not None:
            new["bias"] = self._xp.astype(self.bias, self.bias.dtype)
        try:
            old = {name: getattr(self.base, name) for name in new}
            # What the memo knows is not copied. `old` stays alive, so that its ids stay its own.
            layer = copy.deepcopy(self.base, {id(old[name]): new[name] for name in new})
            if layer is self.base:
                raise TypeError("copy.deepcopy returned the base itself")
            for name, array in new.items():
                setattr(layer, name, array)
        except (TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"merge_to_original_layer needs a base that copy.deepcopy copies and that can be "
                f"assigned a {' and a '.join(new)}; {type(self.base).__name__} is none: {error}"
            ) from error
        return layer

    def state_dict(self) -> dict[str, Array]:
        """Return what is trained, by name: weight and bias with `train_base`; the adapter's.

        These are the layer's own arrays, which it never writes to; nor may you: with `train_base`
        they are the base's until the first step.
        """
        return self._named(self.weight, self.bias, self.adapter)

    def load_state_dict(self, state: Mapping[str, Array], strict: bool = True) -> None:
        """Take the parameters from arrays by name; drop gradients and forward.

        The arrays are copied and cast to the layer's dtypes. TypeError for another library or no
        floating dtype; ValueError that lists all names missing and unexpected and all wrong
        shapes; then nothing has changed. `strict=False` keeps what is missing and ignores the
        unexpected.
        """
        check_kind("state", state, Mapping)
        old = self.state_dict()
        given = {name: state[name] for name in old if state.get(name) is not None}
        operations(**given, layer=self.weight)
        problems = [
            f"{name} must have shape {tuple(old[name].shape)}, got {tuple(array.shape)}"
            for name, array in given.items()
            if tuple(array.shape) != tuple(old[name].shape)
        ]
        if strict:
            problems += [f"missing {name}" for name in old if name not in given]
            problems += [f"unexpected {name}" for name in state if name not in old]
        if problems:
            raise ValueError("state must fit the layer: " + "; ".join(problems))
        new = {name: self._xp.astype(array, old[name].dtype) for name, array in given.items()}
        self._replace(old | new)

    def diagnostics(self) -> Diagnostics:
        """Return shapes, numbers, gradient norms, and how far W' is from the initial weight."""
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
    def _xp(self) -> Any:
        return array_api_compat.array_namespace(self.weight)

    def _known(self) -> tuple[Prepared | None, Prepared | None]:
        """Return the norm of the parameters as they are now; else an earlier of this weight."""
        then = self._prepared
        if then is None or then.weight is not self.weight:
            return None, None
        unchanged = operations(weight=self.weight).unchanged
        same = unchanged(then.snapshot, then.adapter, self.adapter) and then.config == self.config
        return (then, None) if same else (None, then)

    def _current(self) -> Prepared:
        """Return the norm of the parameters as they are now, made only where they changed."""
        prepared, previous = self._known()
        if prepared is None:
            prepared = prepare(self.weight, self.adapter, self.config, previous=previous)
            self._prepared = prepared
        return prepared

    def _live_gradients(self) -> dict[str, Array] | None:
        """Return the gradients, where they are of the parameters as they are now."""
        if self.gradients is None or self._graded is not self._current():
            return None
        return self.gradients

    def _merged(self) -> Array:
        return merge(self.weight, self.adapter, self.config, prepared=self._current())

    def _named(
        self, weight: Array | None, bias: Array | None, adapter: Adapter
    ) -> dict[str, Array]:
        """Name what is trained, in the order of the vector, the weight in the base's layout."""
        if not self.train_base:
            return adapter._asdict()
        biases = {} if bias is None else {"bias": bias}
        return {"weight": self._swap(weight), **biases, **adapter._asdict()}

    def _replace(self, new: dict[str, Array]) -> None:
        if self.train_base:
            self.weight, self.bias = self._swap(new["weight"]), new.get("bias")
        self.adapter = Adapter(*(new[name] for name in Adapter._fields))
        self._cache = self._graded = self.gradients = None

    def _swap(self, weight: Array) -> Array:
        """Turn a weight from the base's layout to (out, in), or back."""
        if self.weight_layout == "out_in":
            return weight
        return array_api_compat.array_namespace(weight).matrix_transpose(weight)

    def _vector(self, arrays: dict[str, Array]) -> Array:
        xp = self._xp
        dtype = compute_dtype(self.weight, xp=xp)
        wide = [as_dtype(array, dtype, xp=xp) for array in arrays.values()]
        return xp.concat([xp.reshape(array, (-1,)) for array in wide])
