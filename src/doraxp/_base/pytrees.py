"""`Config` and other classes as parts of JAX's trees of arrays."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any

from doraxp._base.types import Config


def register_config() -> None:
    """Register `Config` as static with JAX, unless that is done already.

    A `Prepared` and a `Cache` contain it. They may then be arguments and results of a jitted
    function. `import doraxp` does not do this: JAX refuses a second registration, and a user may
    make the first one after the import.
    """
    import jax

    with contextlib.suppress(ValueError):  # registered already
        jax.tree_util.register_static(Config)


def register_static(kind: type[Any]) -> None:
    """Register a class as static with JAX, if JAX is imported: its objects hold no arrays."""
    jax = sys.modules.get("jax")
    if jax is not None:
        with contextlib.suppress(ValueError):  # registered already
            jax.tree_util.register_static(kind)


def register_tree(
    kind: type[Any], arrays: Callable[[Any], Any], made_of: Callable[[Any, Any], Any]
) -> None:
    """Register a class of objects that hold arrays with JAX, if JAX is imported.

    `arrays` returns the arrays of an object and the rest; `made_of` takes the rest and arrays.
    """
    jax = sys.modules.get("jax")
    if jax is not None:
        with contextlib.suppress(ValueError):  # registered already
            jax.tree_util.register_pytree_node(kind, arrays, made_of)
