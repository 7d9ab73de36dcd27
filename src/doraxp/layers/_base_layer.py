"""The base of a DoRA layer: any object with a weight and perhaps a bias.

    stored   the weight as the base has it
    taken    the weight as the layer computes with it: the matrix, or for a convolution, an
             embedding and so on the stored array

`weight_layout` "in_out" is short for the transposed kinds.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from doraxp._base.types import Array
from doraxp._base.words import with_article
from doraxp._core.checks import check_weight
from doraxp._core.kinds import LayerKind
from doraxp._core.operated import resolved
from doraxp._core.operators import Operator
from doraxp.backends import array_namespace, is_by_rows, operations

WeightLayout: TypeAlias = Literal["out_in", "in_out"]
OTHER_WEIGHT = "pass weight= for an attribute of another name"
"""The advice for layers without the attribute that has the weight."""
_TURNED = {"linear": LayerKind("transposed"), "experts": LayerKind("transposed_experts")}


class Stored(NamedTuple):
    """How the base stores its weight, and the operator that the layer applies."""

    kind: LayerKind
    operator: Operator | None
    """None for a matrix product."""
    shape: tuple[int, ...]

    @property
    def is_matrix(self) -> bool:
        """Whether the layer computes with the matrix itself."""
        return self.operator is None

    @property
    def of_weight(self) -> dict[str, Any]:
        """The arguments of those functions of the core that take no x."""
        return {} if self.is_matrix else {"kind": self.kind}

    @property
    def of_call(self) -> dict[str, Any]:
        """The arguments of the core's forward."""
        return {} if self.is_matrix else {"kind": self.kind, "operator": self.operator}

    def taken(self, weight: Array) -> Array:
        """Return a stored weight as the layer computes with it."""
        return self.kind.matrix(weight) if self._is_turned else weight

    def restored(self, weight: Array) -> Array:
        """Return a taken weight as the base stores it."""
        return self.kind.restore(weight, self.shape) if self._is_turned else weight

    @property
    def _is_turned(self) -> bool:
        return self.is_matrix and self.kind.is_transposed

    def matrix(self, weight: Array) -> Array:
        """Return the matrix (*stack, out, in) of a taken weight."""
        return weight if self.is_matrix else self.kind.matrix(weight)

    @property
    def bias_shape(self) -> tuple[int, ...]:
        """The shape of the bias: a number for each output."""
        if self.kind.name == "conv":
            return self.shape[:1]
        return self.kind.matrix_shape(self.shape)[:-1]

    def settings(self) -> dict[str, Any]:
        """Return kind, groups, shape and operator as values of JSON."""
        operator: Any = self.operator
        is_data = dataclasses.is_dataclass(operator) and not isinstance(operator, type)
        fields = dataclasses.asdict(operator) if is_data else getattr(operator, "__dict__", {})
        named = None if operator is None else {"name": type(operator).__name__, **fields}
        kind = {"kind": self.kind.name, "groups": self.kind.groups}
        found: dict[str, Any] = {**kind, "shape": self.shape, "operator": named}
        as_json: dict[str, Any] = json.loads(json.dumps(found, default=_described))
        return as_json


def _described(value: Any) -> str:
    """Return the repr of a value without addresses in memory, which another process has not."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def weight_of(base: Any, name: str) -> Any:
    """Return the weight of a base. TypeError for an object without one, or with an adapter."""
    if hasattr(base, "merge_to_original_layer"):  # its weight alone would leave out its adapter
        raise TypeError(
            f"base must be a layer without an adapter, got {type(base).__name__}: merge it first, "
            "with merge_to_original_layer()"
        )
    weight = getattr(base, name, None)
    if weight is None:
        got = type(base).__name__
        if is_array(base) or type(base) in (list, tuple):  # a NamedTuple may be a layer
            advice = "wrap an array in doraxp.Linear"
        else:
            got, advice = f"{got}{with_arrays([base])}", OTHER_WEIGHT
        raise TypeError(f"base must be a layer with {with_article(name)}, got {got}: {advice}")
    return weight


def bias_of(base: Any, name: str | None) -> Any:
    """Return the bias of a base, or None. ValueError for a name that was chosen and is missing."""
    if name not in (None, "bias") and not hasattr(base, name):
        raise ValueError(
            f"base must be a layer with {with_article(str(name))}, got {type(base).__name__}"
            f"{with_arrays([base])}: pass bias= for an attribute of another name, or bias=None if "
            "the layer has no bias"
        )
    return None if name is None else getattr(base, name, None)


def check_no_other_bias(
    base: Any, weight: str, stored: Stored, *, layout_is_known: bool = True
) -> None:
    """Raise ValueError where a base that seems to have no bias has an array that may be one.

    A number for each input may be the bias of a matrix that is stored (in, out), unless
    `layout_is_known`.
    """
    lengths = {stored.bias_shape: ""}
    if not layout_is_known and stored.kind == LayerKind():
        advice = " and weight_layout='in_out' if the weight is stored (in, out)"
        lengths.setdefault(stored.shape[1:], advice)
    for shape, advice in lengths.items():
        for name, array in arrays_of(base).items():
            if name == weight or tuple(array.shape) != shape:
                continue
            try:
                operations(weight=getattr(base, weight), bias=array)
            except (TypeError, ValueError):  # a bias must be of the library and floating
                continue
            raise ValueError(
                f"{type(base).__name__} has an array {name!r} of shape {shape} that nothing uses: "
                f"pass bias={name!r}{advice}, or bias=None if it is not a bias"
            )


def arrays_of(base: Any) -> dict[str, Any]:
    """Return the arrays that are attributes of a base and have public names.

    They are those of its `__dict__` and of its slots, and for a module of PyTorch also its
    parameters. Properties are not looked at, because each may compute something.
    """
    slots = (vars(each).get("__slots__", ()) for each in type(base).__mro__)
    names = [name for own in slots for name in ((own,) if isinstance(own, str) else own)]
    attributes = {name: getattr(base, name, None) for name in names if name != "__dict__"}
    attributes |= getattr(base, "__dict__", {})
    if "_parameters" in attributes and hasattr(base, "named_parameters"):
        attributes |= base.named_parameters(recurse=False)
    return {
        name: value
        for name, value in attributes.items()
        if not name.startswith("_") and is_array(value)
    }


def with_arrays(bases: Iterable[Any]) -> str:
    """Return " with the array 'a'", " with the arrays 'a', 'b'", or "": those that bases have."""
    names = [repr(name) for name in sorted({name for base in bases for name in arrays_of(base)})]
    return f" with the array{'s' if len(names) > 1 else ''} {', '.join(names)}" if names else ""


def is_array(value: Any) -> bool:
    """Return whether a value is an array, or a weight that is given by rows."""
    try:
        array_namespace(value)
    except TypeError:
        return is_by_rows(value)
    return hasattr(value, "shape")


def stored_as(weight: Array, kind: LayerKind | None, operator: Any, layout: WeightLayout) -> Stored:
    """Return how a weight is stored, and refuse a choice that does not fit its shape."""
    if layout not in get_args(WeightLayout):
        raise ValueError(f"weight_layout must be one of {get_args(WeightLayout)}, got {layout!r}")
    axes = "in, out" if layout == "in_out" else "out, in"
    shape = tuple(check_weight(weight, axes=axes))
    if kind is None and operator is None:
        if len(shape) > 2:
            raise ValueError(
                f"kind must be given for a weight of shape {shape}: pass kind=LayerKind('experts') "
                "for a stack of matrices, or operator=doraxp.Convolution(stride=..., padding=..., "
                "dilation=...) for a convolution"
            )
        kind = LayerKind()
    kind, operator = resolved(kind, operator)
    if layout == "in_out":
        if kind.name not in _TURNED:
            raise ValueError(
                f"weight_layout must be 'out_in' for a layer of kind {kind.name!r}: give "
                "kind=LayerKind('transposed') to the layers that store (in, out) instead"
            )
        kind = _TURNED[kind.name]
    kind.matrix_shape(shape)
    return Stored(kind, operator, shape)


def check_bias_of(stored: Stored, bias: Array | None) -> None:
    """Refuse a bias that does not have one number for each output of the layer."""
    if bias is None or tuple(bias.shape) == stored.bias_shape:
        return
    raise ValueError(
        f"bias must have shape {stored.bias_shape}, a number for each output of a weight of kind "
        f"{stored.kind.name!r} and shape {stored.shape}, got {tuple(bias.shape)}"
        + other_layout(stored, bias.shape[-1:], axis=-2)
    )


def other_layout(stored: Stored, length: tuple[int, ...], *, axis: int) -> str:
    """Return advice where the length of an argument's last axis fits the other layout alone.

    `axis` is the axis of the matrix (*stack, out, in) that must have this length.
    """
    if not stored.is_matrix:
        return ""
    shape = stored.kind.matrix_shape(stored.shape)
    fits, other = shape[axis], shape[-3 - axis]
    if length != (other,) or fits == other:
        return ""
    stored_now, layout = ("(in, out)", "out_in") if stored.kind.is_transposed else (
        "(out, in)", "in_out"
    )  # fmt: skip
    return f"; it would fit if the weight were not stored {stored_now}: weight_layout={layout!r}"


def copy_with(base: Any, arrays: Mapping[str, Array]) -> Any:
    """Return a deep copy of `base` with `arrays` as its attributes; it shares no array with it."""
    try:
        old = {name: getattr(base, name) for name in arrays}
        # deepcopy takes what the memo has instead of copying it. The memo goes by id, so `old`
        # must stay alive until the copy is made.
        layer = copy.deepcopy(base, {id(old[name]): arrays[name] for name in arrays})
        if layer is base:
            raise TypeError("copy.deepcopy returned the base itself")
        for name, array in arrays.items():
            setattr(layer, name, array)
    except (TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"merge_to_original_layer needs a base that copy.deepcopy copies and whose "
            f"{' and '.join(arrays)} can be assigned, got {type(base).__name__}: {error}"
        ) from error
    return layer
