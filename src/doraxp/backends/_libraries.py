"""The array libraries that doraxp is tested on, and whether each can be used here."""

from __future__ import annotations

import importlib
import importlib.util
from typing import NamedTuple

from doraxp.backends._cupy import operations as _cupy

_LIBRARIES = {  # name: the module to import
    "numpy": "numpy",
    "cupy": "cupy",
    "torch": "torch",
    "jax": "jax",
    "dask": "dask.array",
    "array_api_strict": "array_api_strict",
}


class Status(NamedTuple):
    """Whether an array library can be used here."""

    name: str
    """The name in `pip install`, but array_api_strict has its name in `import`."""
    usable: bool
    """True if it can be imported and, for CuPy, finds a device that it can use."""
    detail: str
    """The version, or the reason why it cannot be used."""


def available() -> list[Status]:
    """List the array libraries that doraxp is tested on, and whether each can be used here.

    Returns
    -------
    list of Status
        numpy, cupy, torch, jax, dask and array_api_strict, in that order. Others may
        work too: a library that computes in another way than the standard says is refused.

    Examples
    --------
    >>> available()[0].name, available()[0].usable
    ('numpy', True)
    """
    return [_status(name) for name in _LIBRARIES]


def _status(name: str) -> Status:
    reason = _cupy.why_not() if name == "cupy" else _why_not(name)
    if reason is not None:
        return Status(name, False, reason)
    return Status(name, True, str(importlib.import_module(name).__version__))


def _why_not(name: str) -> str | None:
    if importlib.util.find_spec(name) is None:
        return f"not installed: pip install {name.replace('_', '-')}"
    try:
        importlib.import_module(_LIBRARIES[name])
    except Exception as error:  # a broken installation raises more than ImportError
        return f"installed, but the import failed: {type(error).__name__}: {error}"
    return None
