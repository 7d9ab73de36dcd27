"""The implementation that a command is given as MODULE:OBJECT, and its conventions."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import math
import os
import sys
from collections.abc import Callable
from pathlib import PurePath
from typing import Any, get_args, get_type_hints

from doraxp.testing import Conventions

_HELP = {
    "layout": "how the matrices of a layer are stored; "
    "out_in: weight (out, in), A (rank, in), B (out, rank); "
    "in_out: weight (in, out), A (in, rank), B (rank, out); "
    "weight_in_out: weight (in, out), A (rank, in), B (out, rank)",
    "form": "V = W + s B A, or W/‖W‖ + s B A",
    "norm_gradient": "whether the norm is a constant in the gradient",
    "norm_axis": "one norm for each output row, or for each input column",
    "bias_scaled": "whether the bias is multiplied by m/n",
    "eps": "a number that is added to the norm",
    "scaling": "the number that the argument `scaling` expects",
    "dropout": "the x that a dropout mask multiplies",
    "stacks": "whether weights may have leading axes",
    "dtypes": "a storage dtype to run in; repeatable",
}


def load_implementation(target: str) -> Any:
    """Import MODULE, and return OBJECT of it, or the module itself without OBJECT.

    A class is called without arguments. The current directory is searched first.

    Raises
    ------
    ValueError
        There is no such module or object, or the import or the call of the class fails.
    """
    name, colon, path = target.partition(":")
    parts = [*name.split("."), *(path.split(".") if colon else ())]
    if not all(part.isidentifier() for part in parts) or name.endswith(".py"):
        raise ValueError(
            "TARGET must be MODULE or MODULE:OBJECT, such as package.module:Class, got "
            f"{target!r}{_advice(name, colon + path)}"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    advice = "run this in the folder that has it, or install it"
    found = _result(f"MODULE must be importable: {advice}", name, importlib.import_module, name)
    for part in path.split(".") if colon else ():
        found = _result(f"OBJECT must be in {name}", target, getattr, found, part)
    if isinstance(found, type):
        advice = "make an object of it in MODULE, and name that"
        return _result(f"a class must take no arguments: {advice}", target, found)
    return found


def _advice(name: str, end: str) -> str:
    """Return the end of the message for a file in place of MODULE; `end` is ":OBJECT" or empty."""
    file = PurePath(name.removesuffix(".py"))
    is_elsewhere = file.is_absolute() or ".." in file.parts
    module = file.name if is_elsewhere else ".".join(file.parts)
    parts = [*module.split("."), *(end[1:].split(".") if end else ())]
    if not all(part.isidentifier() for part in parts):
        return ""
    return f": {'run this in its folder, and ' if is_elsewhere else ''}write {module}{end}"


def _result(rule: str, value: str, function: Callable[..., Any], *args: Any) -> Any:
    """Return the result of a call of other code, and raise ValueError where that fails."""
    try:
        return function(*args)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{rule}, got {value!r}, {type(error).__name__}: {error}") from error


def add_conventions(parser: argparse.ArgumentParser) -> None:
    """Declare an option for each field of `Conventions`. One that is not given has no value."""
    group = parser.add_argument_group(
        "conventions", "choices of the implementation, which win over its attribute `conventions`"
    )
    hints = get_type_hints(Conventions)
    for field in dataclasses.fields(Conventions):
        hint, name = hints[field.name], field.name.replace("_", "-")
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _HELP[field.name]}
        if hint is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif hint is float:
            options |= {"type": _number, "metavar": "E"}
        elif field.name == "dtypes":
            options |= {"action": "append", "metavar": "NAME", "dest": field.name}
            name = "dtype"
        else:
            options["choices"] = _choices(hint)
        group.add_argument(f"--{name}", **options)


def _choices(hint: Any) -> list[str]:
    """Return the texts of a type of literals, and "none" if it includes None."""
    found = []
    for part in get_args(hint):
        if isinstance(part, str):
            found.append(part)
        else:
            found += ["none"] if part is type(None) else _choices(part)
    return found


def _number(text: str) -> float:
    """Parse a number that is finite and not negative."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number, finite and at least 0, got {text!r}")
    return value


def conventions_of(impl: Any, arguments: argparse.Namespace) -> Conventions:
    """Return the attribute `conventions` of an implementation, changed as the options say.

    Raises
    ------
    TypeError
        The attribute is not of type `Conventions`, nor a dict of its arguments.
    ValueError
        A choice is not one of those that `Conventions` has.
    """
    declared = getattr(impl, "conventions", None)
    if isinstance(declared, dict):
        try:
            declared = Conventions(**declared)
        except TypeError as error:
            raise TypeError(f"conventions must be those of doraxp.testing: {error}") from None
    if not isinstance(declared, Conventions | None):
        raise TypeError(
            "conventions must be a doraxp.testing.Conventions or a dict of its arguments, got "
            f"{type(declared).__name__}"
        )
    given = {
        field.name: getattr(arguments, field.name)
        for field in dataclasses.fields(Conventions)
        if hasattr(arguments, field.name)
    }
    changes: dict[str, Any] = {
        key: None if value == "none" else value for key, value in given.items()
    }
    if "dtypes" in changes:
        changes["dtypes"] = tuple(changes["dtypes"])
    return dataclasses.replace(declared or Conventions(), **changes)
