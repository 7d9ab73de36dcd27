"""The base of a DoRA layer: any object with a `weight` and perhaps a `bias`.

"out_in"   the base stores its weight (*stack, out, in), as DoRA computes with it
"in_out"   the base stores its weight (*stack, in, out)
"""

from __future__ import annotations

import copy
from typing import Any, Literal, TypeAlias, get_args

from doraxp._base.types import Array
from doraxp.backends import array_namespace

WeightLayout: TypeAlias = Literal["out_in", "in_out"]


def check_base(base: Any, layout: WeightLayout) -> None:
    """Raise unless `base` has a weight and the layout is known."""
    if getattr(base, "weight", None) is None:
        raise TypeError(f"base must be a layer with a weight, got {type(base).__name__}")
    if layout not in get_args(WeightLayout):
        raise ValueError(f"weight_layout must be one of {get_args(WeightLayout)}, got {layout!r}")


def swap(weight: Array, layout: WeightLayout) -> Array:
    """Return a weight of the base's layout as (*stack, out, in), or the reverse."""
    if layout == "out_in":
        return weight
    return array_namespace(weight).matrix_transpose(weight)


def copy_with(base: Any, arrays: dict[str, Array]) -> Any:
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
