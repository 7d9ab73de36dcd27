"""How the parameters of a kernel are declared, and how a launch passes arguments to them.

A declaration is a NamedTuple class: `OverNorm` declares the kernel `over_norm`. It has a field for
each parameter, of the same name and in the same order. A launch creates an instance with named
arguments, so Python and mypy report a missing or a misspelt name. None stands for a null pointer.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import (
    Annotated,
    Any,
    NamedTuple,
    TypeAlias,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import numpy as np

from doraxp._base.types import Array
from doraxp.backends._cupy.source import Types

ConstStorage: TypeAlias = Annotated[Array, "const storage_t*"]
Storage: TypeAlias = Annotated[Array, "storage_t*"]
ConstProduct: TypeAlias = Annotated[Array, "const product_t*"]
Product: TypeAlias = Annotated[Array, "product_t*"]
ConstCompute: TypeAlias = Annotated[Array, "const compute_t*"]
Compute: TypeAlias = Annotated[Array, "compute_t*"]
ConstVoid: TypeAlias = Annotated[Array, "const void*"]
"""An array of storage_t or of compute_t: an `int` beside it says which."""
Void: TypeAlias = Annotated[Array, "void*"]
ConstMarks: TypeAlias = Annotated[Array, "const unsigned char*"]
"""An array of bool."""
Marks: TypeAlias = Annotated[Array, "unsigned char*"]
ConstInts: TypeAlias = Annotated[Array, "const int*"]
Ints: TypeAlias = Annotated[Array, "int*"]
ConstTile: TypeAlias = Annotated[Array, "const Tile*"]
Tile: TypeAlias = Annotated[Array, "Tile*"]
ConstLeaf: TypeAlias = Annotated[Array, "const Leaf*"]
Index: TypeAlias = Annotated[int, "index_t"]
Int: TypeAlias = Annotated[int, "int"]
Number: TypeAlias = Annotated[float, "compute_t"]

_NULL = np.intp(0)
# The same sizes come again in every call, and a look-up takes a fraction of a conversion's time.
_index, _int = (functools.lru_cache(maxsize=4096)(kind) for kind in (np.int64, np.int32))


class Parameter(NamedTuple):
    """One parameter of a kernel."""

    name: str
    c_type: str
    nullable: bool


def kernel_name(declared: type) -> str:
    """Return the name in the source of the kernel that a class declares."""
    return re.sub("(?<=[a-z])(?=[A-Z])", "_", declared.__name__).lower()


def parameters_of(declared: type) -> tuple[Parameter, ...]:
    """Return the parameters of the kernel that a class declares, in order."""
    found = []
    for name, hint in get_type_hints(declared, include_extras=True).items():
        nullable = get_origin(hint) is Union
        if nullable:
            hint = next(each for each in get_args(hint) if each is not type(None))
        found.append(Parameter(name, hint.__metadata__[0], nullable))
    return tuple(found)


def packer(declared: type, types: Types) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """Return the function that turns the arguments of a kernel into the values that CuPy takes.

    It converts each number to the C type of its parameter, and None to a null pointer. The caller
    keeps it for all launches of this kernel with these types: the declaration is read once.
    """
    converters: dict[str, Callable[[Any], Any]] = {
        "index_t": _index, "int": _int, "compute_t": np.dtype(types.compute).type,
    }  # fmt: skip
    places = list(enumerate(parameters_of(declared)))
    nullable = [place for place, each in places if each.nullable]
    needed = [place for place, each in places if not each.nullable]
    numbers = [(place, converters[p.c_type]) for place, p in places if p.c_type in converters]

    def pack(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        for place in needed:
            if arguments[place] is None:
                raise TypeError(
                    f"argument {places[place][1].name} of the kernel {kernel_name(declared)} must "
                    "not be None"
                )
        values = list(arguments)
        for place in nullable:
            if values[place] is None:
                values[place] = _NULL
        for place, convert in numbers:
            values[place] = convert(values[place])
        return tuple(values)

    return pack
