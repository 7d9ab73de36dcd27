"""How the parameters of a kernel are declared, and how a launch passes arguments to them.

A declaration is a NamedTuple class: `OverNorm` declares the kernel `over_norm`. It has a field for
each parameter, of the same name and in the same order. A launch creates an instance with named
arguments, so Python and mypy report a missing or a misspelt name. None stands for a null pointer.
"""

from __future__ import annotations

import ctypes
import functools
import re
import struct
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
"""An array of bool, or of uint8."""
Marks: TypeAlias = Annotated[Array, "unsigned char*"]
ConstInts: TypeAlias = Annotated[Array, "const int*"]
Ints: TypeAlias = Annotated[Array, "int*"]
ConstTile: TypeAlias = Annotated[Array, "const Tile*"]
Tile: TypeAlias = Annotated[Array, "Tile*"]
Index: TypeAlias = Annotated[int, "index_t"]
Int: TypeAlias = Annotated[int, "int"]
Number: TypeAlias = Annotated[float, "compute_t"]

LEAVES = 36
"""The most leaves of a launch of AdamW. The arguments of a launch have room for 4096 bytes."""
LEAF = struct.Struct("7Q2q2i2d")
"""`Leaf` of kernels/adamw.cu: the addresses of p, g, mu, nu and of the new p, mu and nu; the size
and the first block; the dtypes of p and g by their numbers there; η and λ."""
Leaves: TypeAlias = Annotated[bytes, "Leaves"]
"""`Leaves` of kernels/adamw.cu: leaves one after the other, packed by `LEAF`."""

_CODES = {"index_t": "q", "int": "i", "Leaves": f"{LEAVES * LEAF.size}s"}
"""The codes of Python's `struct` for the types that are not pointers, except `compute_t`."""


class Parameter(NamedTuple):
    """One parameter of a kernel."""

    name: str
    c_type: str
    nullable: bool

    @property
    def is_array(self) -> bool:
        """Whether the argument is an array, whose address the kernel gets."""
        return self.c_type.endswith("*")

    def accepts(self, value: Any) -> bool:
        """Return whether an argument that is not None can be passed."""
        if self.is_array:
            return value is None or hasattr(getattr(value, "data", None), "ptr")
        try:
            struct.pack(_CODES.get(self.c_type, "d"), value)
        except struct.error:
            return False
        return True


def kernel_name(declared: type) -> str:
    """Return the name in the source of the kernel that a class declares."""
    return re.sub("(?<=[a-z])(?=[A-Z])", "_", declared.__name__).lower()


@functools.cache
def parameters_of(declared: type) -> tuple[Parameter, ...]:
    """Return the parameters of the kernel that a class declares, in order."""
    found = []
    for name, hint in get_type_hints(declared, include_extras=True).items():
        nullable = get_origin(hint) is Union
        if nullable:
            hint = next(each for each in get_args(hint) if each is not type(None))
        found.append(Parameter(name, hint.__metadata__[0], nullable))
    return tuple(found)


def _code(c_type: str, types: Types) -> str:
    """Return the code of Python's `struct` for a parameter."""
    if c_type == "compute_t":
        return "d" if types.compute == "float64" else "f"
    return _CODES.get(c_type, "P")


class Arguments:
    """The memory from which the driver reads the arguments of a launch of one kernel.

    It is laid out once, and written by each launch. The driver has copied it when the launch
    returns.
    """

    def __init__(self, declared: type, types: Types) -> None:
        self._kernel, self._parameters = kernel_name(declared), parameters_of(declared)
        codes = [_code(each.c_type, types) for each in self._parameters]
        pointers = [(place, each) for place, each in enumerate(self._parameters) if each.is_array]
        self._needed = [place for place, each in pointers if not each.nullable]
        self._nullable = [place for place, each in pointers if each.nullable]
        # "0q" moves on to the next multiple of 8 bytes, where any type may begin.
        laid = struct.Struct("0q".join(codes))
        self._memory = ctypes.create_string_buffer(laid.size)
        self._write = functools.partial(laid.pack_into, self._memory, 0)
        start = ctypes.addressof(self._memory)
        starts = (struct.calcsize("0q".join((*codes[:i], ""))) for i in range(len(codes)))
        self._places = (ctypes.c_void_p * len(codes))(*(start + offset for offset in starts))
        self.address = ctypes.addressof(self._places)
        """The address of an array with the address of each argument, as the driver expects it."""

    def store(self, arguments: tuple[Any, ...]) -> None:
        """Write the arguments of a launch: the addresses of arrays, and numbers as they are."""
        values = list(arguments)
        try:
            for place in self._needed:
                values[place] = values[place].data.ptr
            for place in self._nullable:
                array = values[place]
                values[place] = 0 if array is None else array.data.ptr
            self._write(*values)
        except (AttributeError, struct.error):
            raise self._error(arguments) from None

    def _error(self, arguments: tuple[Any, ...]) -> TypeError:
        """Return the error that names the first argument of another type than the declared."""
        for each, value in zip(self._parameters, arguments, strict=True):
            what = f"argument {each.name} of the kernel {self._kernel} must"
            if value is None and not each.nullable:
                return TypeError(f"{what} not be None")
            if not each.accepts(value):
                return TypeError(f"{what} be of type {each.c_type}, got {value!r}")
        raise AssertionError(arguments)
