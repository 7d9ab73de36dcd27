"""`Config` as a part of JAX's trees of arrays."""

from __future__ import annotations

import contextlib

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
