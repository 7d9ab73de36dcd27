"""The time of a call on a device that works through a queue, between two events of that queue.

The queue is held while the host fills it: otherwise a short call would take as long as Python needs
for it. The time that the host needs is measured too. `Queue` is the device, by any library.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

QUEUED = 8
"""The number of calls made while the queue is held. The queue has room for about a thousand
launches."""
TRIES = 4
"""Each try holds the queue twice as long as the one before. After the last one a call that waits
for the device, or fills the queue, is measured as it is: with the time of the host in it."""
Call: TypeAlias = Callable[[], Any]


class Queue(Protocol):
    """A device that works through what the host gives it, in order."""

    def event(self) -> Any:
        """Return an event, put at the end of the queue."""

    def has_passed(self, event: Any) -> bool:
        """Return whether the device has come to the event, without waiting for it."""

    def wait(self, event: Any) -> None:
        """Wait until the device has come to the event."""

    def seconds(self, first: Any, last: Any) -> float:
        """Return the time of the device from one event to another."""

    def hold(self, seconds: float) -> None:
        """Let the device do nothing for about so long."""


class _Timed(NamedTuple):
    device: float
    """Seconds of all calls on the device."""
    host: float
    """Seconds that the host needed to put them into the queue."""
    filled: bool
    """Whether the host had filled the queue before the device began with the first call."""


def seconds(queue: Queue, call: Call, repeats: int, reset: Call | None = None) -> float:
    """Return the mean seconds of a call on the device, whose queue is never empty between calls."""
    hold = 2 * _timed(queue, call, reset, 1, 0.0).host + 1e-5
    total, left = 0.0, repeats
    while left > 0:
        count = min(QUEUED, left)
        for attempt in range(TRIES):
            timed = _timed(queue, call, reset, count, 2**attempt * hold)
            if timed.filled:
                break
        total += timed.device
        left -= count
    return total / repeats


def host_seconds(queue: Queue, call: Call, reset: Call | None = None) -> float:
    """Return the median seconds that the host needs to put a call into the queue."""
    samples = [_timed(queue, call, reset, QUEUED, 0.0).host / QUEUED for _ in range(5)]
    return statistics.median(samples)


def _timed(queue: Queue, call: Call, reset: Call | None, count: int, hold: float) -> _Timed:
    """Return the times of `count` calls, with the queue first held for `hold` seconds a call.

    With `reset` two events enclose each call; without, two events enclose all of them.
    """
    host, pairs = 0.0, []
    if hold:
        queue.hold(hold * count)
    held = queue.event()
    for number in range(count):
        if reset is not None:
            reset()
        if reset is not None or number == 0:
            first = queue.event()
        began = time.perf_counter()
        call()
        host += time.perf_counter() - began
        if reset is not None or number == count - 1:
            pairs.append((first, queue.event()))
    filled = not queue.has_passed(held)
    queue.wait(pairs[-1][1])
    return _Timed(sum(queue.seconds(*pair) for pair in pairs), host, filled)
