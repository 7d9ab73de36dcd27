"""`Digest`: a check sum of a shard that takes a small part of the time of its merge.

::

    sᵢ = Σ of the 512 words of piece i, mod 2⁶⁴
    digest = BLAKE2b(s₀, s₁, …, the bytes after the last whole piece)

A cryptographic sum of all bytes takes as long as the merge. This one finds the faults of disks, not
those of an adversary: pages that are lost, zero, old or at another place, and single bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

PIECE = 4096
"""Bytes of a piece, as many as a page of the system's memory has."""


class Digest:
    """Takes bytes in blocks of any sizes; the digest does not depend on the sizes."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self._rest = b""

    def update(self, raw: memoryview) -> None:
        """Add bytes."""
        if self._rest:
            missing = PIECE - len(self._rest)
            self._rest, raw = self._rest + raw[:missing], raw[missing:]
            if len(self._rest) < PIECE:
                return
            self._add(memoryview(self._rest))
        whole = len(raw) // PIECE * PIECE
        self._add(raw[:whole])
        self._rest = bytes(raw[whole:])

    def hexdigest(self) -> str:
        """Return the digest of all bytes so far, in hexadecimal digits."""
        last = self._hash.copy()
        last.update(self._rest)
        return last.hexdigest()

    def _add(self, pieces: memoryview) -> None:
        octets = np.frombuffer(pieces, np.uint8)
        if octets.ctypes.data % 8:
            octets = octets.copy()  # NumPy adds words at odd addresses 10 times as slowly
        words = octets.view("<u8").reshape(-1, PIECE // 8)
        self._hash.update(np.add.reduce(words, axis=1).astype("<u8", copy=False).data)


class Digests:
    """A digest of each tensor of a file. The tensors may take turns."""

    def __init__(self) -> None:
        self._of: dict[str, Digest] = {}

    def update(self, name: str, raw: memoryview) -> None:
        """Add bytes of a tensor."""
        self._of.setdefault(name, Digest()).update(raw)

    def hexdigest(self, names: Iterable[str]) -> str:
        """Return one digest of all bytes so far of these tensors, in this order."""
        parts = (self._of.get(name, Digest()).hexdigest() for name in names)
        return hashlib.blake2b("".join(parts).encode(), digest_size=16).hexdigest()
