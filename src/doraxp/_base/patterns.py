"""Regular expressions for the ends of module paths, read as PEFT reads `rank_pattern`.

A pattern matches "layers.0.q_proj" where it matches the whole path or all that follows a dot:
"q_proj" and "0.q_proj" match it, "proj" does not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

Value = TypeVar("Value")


def values_by_path(patterns: Mapping[str, Value], paths: Iterable[str]) -> dict[str, Value]:
    """Return the value of the first pattern that matches, for each path that one matches."""
    left = list(paths)
    found: dict[str, Value] = {}
    for pattern, value in patterns.items():
        end = _end(pattern)
        found |= {path: value for path in left if end.match(path)}
        left = [path for path in left if path not in found]
    return found


def matches_any(pattern: str, paths: Iterable[str]) -> bool:
    """Return True where the pattern matches at least one of the paths."""
    end = _end(pattern)
    return any(end.match(path) for path in paths)


def _end(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")
