"""A contestant: one way to do a task, on one library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from doraxp._base.types import Array


class Contestant(NamedTuple):
    """One way to do a task, on one library, with the clock that times it."""

    name: str
    library: str
    kind: str
    """The kind of its answer: see `Truth`."""
    call: Callable[[], Any]
    """Does the task and waits for it."""
    answer: Callable[[Any], dict[str, Array]]
    """Names the arrays that `call` returned, as `Truth.answers` does."""
    reset: Callable[[], None] = lambda: None
    """Called before each `call`; not timed."""
    seconds: Callable[[int], float] | None = None
    """Returns the mean seconds of so many calls, by a clock other than the host's."""
    host_seconds: Callable[[], float] | None = None
    """Returns the seconds that the host needs for a call, where another device computes it."""
    peak: Callable[[], int] | None = None
    """Returns the peak bytes of a call, in memory other than the host's."""
    tolerance: float | None = None
    """The error to allow, where it is more than the dtype of the answer allows."""
    is_stored: bool = False
    """Whether its x and dy have the weight's dtype, as they have in training."""
