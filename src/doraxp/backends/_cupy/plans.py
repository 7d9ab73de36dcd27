"""Plans of launches: all that the shapes and dtypes of the arrays alone decide.

A training loop makes the same launches again and again. The plan of a launch is made the first time
that its shapes and dtypes occur, and kept. No value, address or device has a part in it.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from doraxp.backends._cupy.arrays import Together
from doraxp.backends._cupy.source import THREADS, Types

planned = functools.lru_cache(maxsize=1024)
"""Marks a function that makes plans, from shapes, dtypes and choices alone. Keeps the latest."""


class Plan(NamedTuple):
    """All about a launch that the shapes and dtypes of its arrays alone decide."""

    types: Types
    grid: tuple[int, int, int]
    numbers: dict[str, Any]
    """The kernel's sizes, counts and flags, by name."""
    made: Together
    """The arrays that the launch writes and the call keeps; None for one that is not needed."""
    scratch: Together = Together(0, ())
    """The arrays that it writes for other launches of the call."""
    threads: int = THREADS
