"""The trained arrays of an adapted layer: as one vector, as a state, with gradients and steps.

    arrays     {"weight": W, "bias": b} with `train_base`, and {"lora_a", "lora_b", "magnitude"}
    prepared   of these arrays: the gradients belong to the parameters that it was made of

Arrays are replaced, never written to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from doraxp._base.scalars import check_kind, check_number
from doraxp._base.types import Adapter, Array, Config, Namespace
from doraxp._core.matrix import Cache
from doraxp._core.prepared import Prepared, prepare
from doraxp.backends import array_namespace, as_dtype, compute_dtype, operations
from doraxp.layers._base_layer import Stored
from doraxp.layers._dropout import Dropout
from doraxp.layers._parameters import as_vector, count, from_vector, updated
from doraxp.optim import Optimizer


class TrainedArrays:
    """The parameters of a `DoRALayer`, which adds the forward and the backward."""

    gradients: dict[str, Array] | None = None
    config: Config
    train_base: bool
    weight: Array
    bias: Array | None
    adapter: Adapter
    _stored: Stored
    _dropout: Dropout
    _cache: Cache | None = None
    _prepared: Prepared | None = None
    _previous: Prepared | None = None  # of earlier parameters with the same weight
    _graded: Prepared | None = None  # of the parameters that the gradients belong to
    _renews: bool = False  # whether the next forward computes the norm, also where it is known

    def step(self, optimizer: Optimizer) -> None:
        """Replace the trained arrays by those after one step of an optimizer; drop the gradients.

        RuntimeError without gradients of the current parameters. TypeError for an object without
        a method `step`.
        """
        check_optimizer(optimizer)
        gradients = self._needed_gradients("step")
        self._replace(optimizer.step(self.state_dict(), gradients))

    def update_parameters(self, learning_rate: float) -> None:
        """Replace each trained array p by p − learning_rate · gradient, and drop the gradients.

        RuntimeError without gradients of the current parameters.
        """
        gradients = self._needed_gradients("update_parameters")
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
        self._cache = self._prepared = self._previous = self._graded = self.gradients = None
        self._renews = False

    def state_dict(self) -> dict[str, Array]:
        """Return the trained arrays by name: the adapter's; with `train_base` weight and bias too.

        These are the layer's own arrays, and not the base's. Do not write to them.
        """
        return self._named(self.weight, self.bias, self.adapter)

    def load_state_dict(self, state: Mapping[str, Array], strict: bool = True) -> None:
        """Replace the parameters by copies of the arrays in `state`, cast to the layer's dtypes.

        The layer drops its gradients and its forward. TypeError for an array of another library or
        of a dtype that is not floating. ValueError that lists all wrong shapes, all missing and
        all unexpected names. After an error nothing has changed. With `strict=False` missing
        arrays keep their values and unexpected ones are ignored.
        """
        self._replace(self._fitting(state, strict=strict))

    def settings(self) -> dict[str, Any]:
        """Return config, kind, operator, shape and dropout rate as values of JSON."""
        return {
            **self._stored.settings(),
            "config": asdict(self.config),
            "dropout": self._dropout.rate,
            "train_base": self.train_base,
        }

    def state(self) -> dict[str, Any]:
        """Return the trained arrays, the settings, and the state of the generator of masks.

        `load_state` takes it: a layer made in the same way then goes on as this one does. If the
        layer has no gradients, its next forward computes the norm anew, as that layer's does.
        """
        if self.gradients is None:  # else the next backward must add to gradients of this norm
            self._renew()
        return {
            "settings": self.settings(),
            "parameters": self.state_dict(),
            "generator": self._dropout.state,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Replace the parameters and the state of the generator by those of `state`.

        ValueError where a setting differs, and the errors of `load_state_dict`; after an error
        nothing has changed.
        """
        new = self._checked_state(state)
        self._dropout.state = state["generator"]
        self._replace(new)
        self._renew()

    def _renew(self) -> None:
        """Let the next forward compute the norm as the forward after a step does.

        It makes W Aᵀ in one product with its own x, and kernels of BLAS round a product by its
        shape. So a saved layer and a loaded one go on with the same bits.
        """
        self._renews = True
        if self._prepared is None and self._previous is None and not self.train_base:
            self._previous = prepare(
                self.weight, self.adapter, self.config, **self._stored.of_weight
            )

    def _checked_state(self, state: Mapping[str, Any]) -> dict[str, Array]:
        """Return the new parameters of a state, and raise where it does not fit the layer."""
        check_kind("state", state, Mapping)
        absent = [name for name in ("settings", "parameters", "generator") if name not in state]
        if absent:
            raise ValueError(f"state must have the entry {absent[0]!r}, as `state()` returns it")
        own, given = self.settings(), state["settings"]
        for name, value in _flat(own).items():
            other = _flat(given).get(name)
            if other != value:
                raise ValueError(
                    f"{name} must be that of the state, {other!r}, got {value!r}: make the layer "
                    "with the same choices"
                )
        self._dropout.check(state["generator"])
        return self._fitting(state["parameters"], strict=True)

    def _fitting(self, state: Mapping[str, Array], *, strict: bool) -> dict[str, Array]:
        return updated(self.state_dict(), state, strict=strict, xp=self._xp)

    @property
    def _xp(self) -> Namespace:
        return array_namespace(self.adapter.lora_a)

    def _known(self) -> tuple[Prepared | None, Prepared | None]:
        """Return the `Prepared` of the current parameters or None, and an earlier one or None.

        The earlier one has the same weight and another adapter or config. At most one of the two
        is given; after the weight has been replaced, neither is.
        """
        then = self._prepared or self._previous
        if then is None or then.weight is not self.weight:
            return None, None
        if self.adapter is not then.adapter:  # it may have been assigned
            check_kind("adapter", self.adapter, Adapter)
            operations(weight=self.weight, **self.adapter._asdict())
        unchanged = operations(weight=self.weight).unchanged
        same = then is self._prepared and then.config == self.config
        same = same and unchanged(then.snapshot, then.adapter, self.adapter)
        return (then, None) if same else (None, then)

    def _current(self) -> Prepared:
        """Return the `Prepared` of the current parameters, computed anew only after a change."""
        prepared, previous = self._known()
        if prepared is None:
            kind = self._stored.of_weight
            prepared = prepare(self.weight, self.adapter, self.config, previous=previous, **kind)
            self._prepared = prepared
        return prepared

    def _live_gradients(self) -> dict[str, Array] | None:
        """Return the gradients, or None where they belong to earlier parameters."""
        if self.gradients is None or self._graded is not self._current():
            return None
        return self.gradients

    def _needed_gradients(self, caller: str) -> dict[str, Array]:
        gradients = self._live_gradients()
        if gradients is None:
            raise RuntimeError(
                f"{caller} needs gradients of the current parameters: call backward first, and "
                "again after every step"
            )
        return gradients

    def _named(
        self, weight: Array | None, bias: Array | None, adapter: Adapter
    ) -> dict[str, Array]:
        """Return the trained arrays by name, in the order of the vector and the base's layout."""
        if weight is None or not self.train_base:
            return adapter._asdict()
        biases = {} if bias is None else {"bias": bias}
        return {"weight": self._stored.restored(weight), **biases, **adapter._asdict()}

    def _replace(self, new: Mapping[str, Array]) -> None:
        if self.train_base:
            self.weight, self.bias = self._stored.taken(new["weight"]), new.get("bias")
        self.adapter = Adapter(*(new[name] for name in Adapter._fields))
        # A step may have written into the old arrays and returned them, which cannot be noticed.
        self._previous = None if self.train_base else self._prepared or self._previous
        self._prepared = self._cache = self._graded = self.gradients = None

    def _vector(self, arrays: dict[str, Array]) -> Array:
        xp = self._xp
        return as_vector(arrays, compute_dtype(self.weight, xp=xp), xp=xp)


def check_optimizer(optimizer: Any) -> None:
    """Raise TypeError for an object without a method `step`, such as a learning rate."""
    if not callable(getattr(optimizer, "step", None)):
        raise TypeError(
            f"optimizer must have a step, such as doraxp.AdamW(0.01), got {optimizer!r}"
        )


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with the entries of `config` beside the others: "config.rank"."""
    config = {f"config.{name}": value for name, value in settings["config"].items()}
    return config | {name: value for name, value in settings.items() if name != "config"}
