"""The figures of a script as JSON, with the date, the machine and the versions of the run.

A script calls `note` with each figure and `write` at its end. A long one also calls `write` after
each part: the file then has all figures so far. `pages.py` makes a page of the JSON.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

PACKAGES = ("doraxp", "numpy", "torch", "peft", "transformers")
FIGURES: list[dict[str, Any]] = []
"""All figures of this process, in their order."""


def note(what: str, **figure: Any) -> None:
    """Keep a figure: `value`, a `goal` with `at_least`, or other names."""
    FIGURES.append({"what": what, **figure})


def write(path: Path | None) -> None:
    """Write all figures of this process, unless `path` is None."""
    if path is not None:
        report = {"run": conditions(), "versions": versions(), "figures": FIGURES}
        path.write_text(json.dumps(report, indent=1) + "\n", "utf-8")


def conditions() -> dict[str, Any]:
    """Return today's date, the processor, the cores of this process and the kernels of the BLAS."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
    }
    try:
        from doraxp.bench import blas_kernels

        return found | {"blas": ", ".join(blas_kernels().values())}
    except ImportError:  # threadpoolctl is not installed
        return found


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    """Return the model of the processor as Linux names it, else its architecture."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
