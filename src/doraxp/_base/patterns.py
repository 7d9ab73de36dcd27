"""Regular expressions for the ends of module paths. PEFT reads its `rank_pattern` the same way.

A pattern matches a path if it matches the whole path, or everything after one of the dots:
"q_proj" and "0.q_proj" match "layers.0.q_proj", and "proj" does not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

Value = TypeVar("Value")


def values_by_path(patterns: Mapping[str, Value], paths: Iterable[str]) -> dict[str, Value]:
    """Return a value for each path that a pattern matches: that of the first such pattern."""
    left = list(paths)
    found: dict[str, Value] = {}
    for pattern, value in patterns.items():
        end = _end(pattern)
        found |= {path: value for path in left if end.match(path)}
        left = [path for path in left if path not in found]
    return found


def matches_any(pattern: str, paths: Iterable[str]) -> bool:
    """Return whether the pattern matches at least one of the paths."""
    end = _end(pattern)
    return any(end.match(path) for path in paths)


def _end(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")
