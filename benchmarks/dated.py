"""The date and the machine of a run, for the JSON from which `pages.py` makes a page."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path
from typing import Any


def conditions() -> dict[str, Any]:
    """Return today's date, the processor and the number of cores that this process may use."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
    }


def _processor() -> str:
    """Return the model of the processor as Linux names it, else its architecture."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
