"""JSON files from strangers: limited in size and in the number of values, no name twice."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TypeAlias

from doraxp.checkpoint._errors import CheckpointError

JsonObject: TypeAlias = dict[str, object]
# A mixture of experts with 70,000 adapted matrices, as the largest ones have, needs 32 MB and
# 1.6 million values. A file at the limits takes less than 1 GiB of memory and some seconds.
SIZE_LIMIT, _VALUES_LIMIT = 64 << 20, 3_000_000


def read_json(path: Path) -> JsonObject:
    """Return the JSON object in a file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    size = path.stat().st_size
    if size > SIZE_LIMIT:
        raise CheckpointError(f"{path}: must have at most {SIZE_LIMIT} bytes, got {size}")
    raw = path.read_bytes()
    check_values(raw, path)
    return parse_json(raw, path)


def check_values(raw: bytes, path: Path) -> None:
    """Refuse JSON with so many values that they would fill the memory."""
    if sum(raw.count(sign) for sign in (b",", b"[", b"{")) > _VALUES_LIMIT:
        raise CheckpointError(
            f"{path}: JSON must have at most {_VALUES_LIMIT} values; it is not the file of a model"
        )


def parse_json(raw: bytes, path: Path) -> JsonObject:
    """Return the JSON object in `raw`, and refuse an object that has a name twice."""

    def unique(pairs: list[tuple[str, object]]) -> JsonObject:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            counts = Counter(name for name, _ in pairs)
            twice = next(name for name, count in counts.items() if count > 1)
            raise CheckpointError(f"{path}: the name {twice!r} occurs twice")
        return entries

    try:
        value = json.loads(raw, object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must be a JSON object, got {type(value).__name__}")
    return value
