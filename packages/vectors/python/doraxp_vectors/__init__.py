"""Golden vectors of DoRA: inputs, right results, and how far rounding may lead from them.

    for case in doraxp_vectors.cases("float32", kinds=["layer"]):
        problems = case.wrong({"merged": my_merge(case.entry, **case.inputs)})

A number is right where |actual − expected| ≤ bound. The files are in the folder `DATA`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np

FORMAT = 2
DATA = files(__package__) / "data"
_CHECKSUMS = "SHA256SUMS"
_DTYPES = {"F64": "<f8", "F32": "<f4", "I32": "<i4"}


class Case(NamedTuple):
    """One case: its entry in the manifest, and its arrays by name."""

    entry: dict[str, Any]
    inputs: dict[str, Any]
    expected: dict[str, Any]
    bound: dict[str, Any]

    def wrong(self, found: Mapping[str, Any]) -> list[str]:
        """Return a line for each array of `found` that has a number outside its bound."""
        lines = []
        for name, values in found.items():
            _check("array", name, self.expected)
            actual, wanted, bound = np.asarray(values), self.expected[name], self.bound[name]
            what = f"{self.entry['name']}, {name}:"
            if actual.shape != wanted.shape:
                lines.append(f"{what} shape must be {wanted.shape}, got {actual.shape}")
            elif len(bad := np.argwhere(~(np.abs(actual - wanted) <= bound))):  # NaN is bad
                at = tuple(map(int, bad[0]))
                rule = f"must be {wanted[at]} ± {bound[at]}, got {actual[at]}"
                lines.append(f"{what} number {at} {rule}; {len(bad)} of {wanted.size} are wrong")
        return lines


def manifest(folder: Any = DATA) -> dict[str, Any]:
    """Return the manifest; raise ValueError where it is damaged or has another format."""
    found: dict[str, Any] = json.loads(_read(folder, "manifest.json"))
    if found["format"] != FORMAT:
        raise ValueError(f"manifest.json: format must be {FORMAT}, got {found['format']}")
    return found


def cases(
    dtype: str = "float64", kinds: Iterable[str] | None = None, folder: Any = DATA
) -> list[Case]:
    """Return the cases with inputs in a dtype, float32 or float64: those of some kinds, or all.

    Raises
    ------
    ValueError
        No case has the dtype or one of the kinds, or a file is damaged.
    """
    told = manifest(folder)
    known = sorted({entry["kind"] for entry in told["cases"]})
    chosen = known if kinds is None else list(kinds)
    _check("dtype", dtype, told["files"])
    for kind in chosen:
        _check("kind", kind, known)
    arrays = _arrays(_read(folder, told["files"][dtype]))
    groups = {"inputs": "inputs", "expected": "expected", "bound": "expected"}
    return [
        Case(entry, *({name: arrays[f"{entry['name']}/{group}/{name}"] for name in entry[names]}
                      for group, names in groups.items()))
        for entry in told["cases"] if entry["kind"] in chosen
    ]  # fmt: skip


def _check(name: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _read(folder: Any, name: str) -> bytes:
    """Return the bytes of a file, and compare them with their checksum."""
    lines = (folder / _CHECKSUMS).read_text("utf-8").splitlines()
    wanted = {listed: digest for digest, _, listed in (line.partition("  ") for line in lines)}
    raw: bytes = (folder / name).read_bytes()
    found = hashlib.sha256(raw).hexdigest()
    if found != wanted.get(name):
        message = f"its SHA-256 must be {wanted.get(name)}, as {_CHECKSUMS} says, got {found}"
        raise ValueError(f"{name}: {message}; install the vectors again")
    return raw


def _arrays(raw: bytes) -> dict[str, Any]:
    """Return the arrays of a safetensors file by name. They cannot be written to."""
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        flat = np.frombuffer(raw[start + first : start + last], _DTYPES[entry["dtype"]])
        found[name] = flat.reshape(entry["shape"])
    return found
