"""Two blocks that choose the precision of products: exact ones, and those with TF32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

_REDUCED: ContextVar[bool] = ContextVar("reduced", default=False)
_EXACT: ContextVar[bool] = ContextVar("exact", default=False)


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Ask CuPy's and PyTorch's products with a 16-bit weight to round no factor.

    Without it, where x, dy and W have one 16-bit dtype, z and g⊙dy are rounded to it: mixed
    precision. Inside the block both are float32, and the product of g⊙dy and W takes two or three
    times as long. A backward is as exact as its forward was. The block has no effect on other
    dtypes and on other libraries, nor on a CPU that does not multiply 16-bit numbers itself.
    PyTorch's gradient checkpointing computes the forward again: give the checkpoint
    ``context_fn=lambda: (exact_products(), exact_products())``.

    Examples
    --------
    >>> import doraxp
    >>> with doraxp.backends.exact_products():
    ...     pass  # forward and backward
    """
    token = _EXACT.set(True)
    try:
        yield
    finally:
        _EXACT.reset(token)


@contextlib.contextmanager
def reduced_precision() -> Iterator[None]:
    """Allow CuPy's products of float32 arrays to round their factors to TF32.

    TF32 has 10 bits, and runs on the tensor cores. Sums are in float32 in any case. The block has
    no effect on weights of other dtypes and on other libraries.
    """
    token = _REDUCED.set(True)
    try:
        yield
    finally:
        _REDUCED.reset(token)


def is_exact() -> bool:
    """Return whether products with a 16-bit weight must not round their factors here."""
    return _EXACT.get()


def is_reduced() -> bool:
    """Return whether products of float32 arrays may use TF32 here."""
    return _REDUCED.get()
