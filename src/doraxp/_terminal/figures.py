"""Figures as JSON files."""

from __future__ import annotations

import json
import math
import uuid
from pathlib import Path
from typing import Any


def write_json(path: Path, report: Any) -> None:
    """Write nested figures as JSON, which has neither NaN nor infinity: null stands for them.

    The file is written whole or not at all.
    """
    write_text(path, json.dumps(_finite(report), indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8, whole or not at all."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        part.write_text(text, "utf-8")
        part.replace(path)
    except OSError as error:
        raise OSError(f"{path}: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
