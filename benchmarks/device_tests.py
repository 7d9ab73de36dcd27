"""A plugin of pytest for `benchmarks/device.sh`: it runs the tests that fit into a time.

    export DEVICE_FOLDER=FOLDER DEVICE_UNTIL=SECONDS
    PYTHONPATH=src:benchmarks python -m pytest -p device_tests --backend cupy

After DEVICE_UNTIL, in seconds since 1970, the tests that are left are skipped, with the reason. The
tests of the kernels come first. The first failures are printed whole, as soon as they are known.
The counts are added to FOLDER/figures.jsonl.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path

import pytest
from device_figures import append

FIRST = (
    "test_operations", "test_skinny", "test_mixed_precision", "test_reduced_precision",
    "test_linear", "test_gradients", "test_layer", "test_numerics", "test_decomposition",
    "test_optimizers", "test_kinds", "test_operators",
)  # fmt: skip
"""Files whose tests come before those of the others, in this order."""
LEFT = "no time is left"
SHOWN = 5
"""Failures that are printed whole."""


def pytest_configure(config: pytest.Config) -> None:
    """Register the counts, except in the workers of xdist: their controller has all reports."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Counts(), "device_counts")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of the kernels first."""
    places = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(FIRST)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Skip a test for which no time is left."""
    if time.time() > float(os.environ["DEVICE_UNTIL"]):
        pytest.skip(LEFT)


class Counts:
    """Counts the outcomes, and prints failures when they are reported."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.counts: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count the outcome of a test; print a failure."""
        if report.failed:
            self.counts["failed"] += 1
            if self.counts["failed"] <= SHOWN:
                print(f"\nFAILED {report.nodeid}\n{report.longreprtext}", flush=True)
        elif report.skipped:
            self.counts["left" if LEFT in report.longreprtext else "skipped"] += 1
        elif report.when == "call":
            self.counts["passed"] += 1

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        """Print the counts and keep them as a figure."""
        counts = {name: self.counts[name] for name in ("passed", "failed", "skipped", "left")}
        seconds = round(time.monotonic() - self.began, 1)
        print("\n" + ", ".join(f"{count} {name}" for name, count in counts.items()), flush=True)
        append(Path(os.environ["DEVICE_FOLDER"]), "tests", **counts, seconds=seconds)
