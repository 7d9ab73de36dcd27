"""The handwritten digits in the package, and their split. In NumPy, on the host."""

from __future__ import annotations

import importlib.resources
from typing import NamedTuple

import numpy as np

from doraxp._base.types import HostArray

TEST_DIGITS = 400
VALIDATION_DIGITS = 400


class Digits(NamedTuple):
    """Scans and the digits that they show."""

    images: HostArray
    """Grey levels 0..1, float32, shape (digits, 8, 8)."""
    labels: HostArray
    """0..9, int32, shape (digits,)."""

    def turned(self) -> Digits:
        """Return the digits turned by 90°, counter-clockwise."""
        return self._replace(images=np.rot90(self.images, axes=(1, 2)))

    def inputs(self, x_shape: tuple[int, ...]) -> HostArray:
        """Return the images as inputs of a network, shape (digits, *x_shape)."""
        return np.ascontiguousarray(self.images).reshape(-1, *x_shape)

    def targets(self) -> HostArray:
        """Return 1 at each digit's class and 0 elsewhere, float32, shape (digits, 10)."""
        return np.eye(10, dtype=np.float32)[self.labels]


def load_digits() -> Digits:
    """Return all 1,797 digits, in the order of the source."""
    path = importlib.resources.files("doraxp.demo") / "data" / "digits.npz"
    with path.open("rb") as file, np.load(file) as data:
        return Digits(data["images"].astype(np.float32) / 16, data["labels"].astype(np.int32))


def split_digits(*, validate: bool) -> tuple[Digits, Digits]:
    """Return the digits to train on and the digits to measure on.

    The digits to measure on are the test digits. With `validate` they are a part of the other
    digits: a learning rate that is chosen by them has not seen the test digits. Both splits are
    fixed.
    """
    training, test = _hold_out(load_digits(), TEST_DIGITS)
    return _hold_out(training, VALIDATION_DIGITS) if validate else (training, test)


def _hold_out(digits: Digits, count: int) -> tuple[Digits, Digits]:
    order = np.random.default_rng(0).permutation(len(digits.labels))
    kept, held_out = order[count:], order[:count]
    return Digits(*(part[kept] for part in digits)), Digits(*(part[held_out] for part in digits))
