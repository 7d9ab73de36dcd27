"""The figures of `benchmarks/device.sh`: a folder with one file of them, and a report of all.

FOLDER/figures.jsonl has one JSON object in each line, whose "part" says what it is. A line is
written as soon as its figure is known. This module needs the standard library alone.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

FIGURES = "figures.jsonl"
LISTED = (
    "ceilings", "tests", "libraries", "probe", "kernels", "quantised", "counters", "sanitizer",
    "skipped",
)  # fmt: skip
"""The parts that the report has lists of, beside the results of the benchmark."""
UNITS = {
    "byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9,
    "nsecond": 1e-3, "usecond": 1, "msecond": 1e3, "second": 1e6,
    "ns": 1e-3, "us": 1, "ms": 1e3, "s": 1e6,
}  # fmt: skip
"""Factors from ncu's units to bytes and microseconds."""
METRICS = {
    "gpu__time_duration.sum": "microseconds",
    "dram__bytes_read.sum": "bytes_read",
    "dram__bytes_write.sum": "bytes_written",
    "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_ld.ratio": "sectors_per_load",
    "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_st.ratio": "sectors_per_store",
}
"""Our names for ncu's metrics. A warp that loads or stores 16 bytes a thread needs 16 sectors."""
Figure: TypeAlias = dict[str, Any]


def append(folder: Path, part: str, **figure: Any) -> None:
    """Write one figure. It is in the file when this returns, even if the process is killed."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FIGURES
    # A killed process may have left half a line.
    ended = not path.exists() or path.read_bytes()[-1:] in (b"", b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write(("" if ended else "\n") + json.dumps({"part": part, **figure}) + "\n")


def read(folder: Path) -> list[Figure]:
    """Return all figures. A line that a killed process left unfinished is passed over."""
    path = folder / FIGURES
    found = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            print(f"{path}: an unfinished line was passed over: {line[:60]}", file=sys.stderr)
    return found


def of_bench(path: Path) -> Iterator[Figure]:
    """Yield the report of one run of `doraxp bench`."""
    yield {"report": json.loads(path.read_text("utf-8"))}


def of_comparison(path: Path) -> Iterator[Figure]:
    """Yield, for each library and dtype, the number of figures, the worst and those that are wrong.

    `doraxp verify` wrote the file. A share is an error in units of its bound: above 1 is wrong.
    """
    groups: dict[tuple[str, str], list[Figure]] = {}
    for one in json.loads(path.read_text("utf-8")).get("figures", ()):
        groups.setdefault((one["backend"], one["dtype"]), []).append(one)
    for (library, dtype), ones in groups.items():
        shares = [one["share"] for one in ones if one["share"] is not None]
        wrong = [
            f"{one['case']}, {one['quantity']}: {one['failure'] or one['share']}"
            for one in ones
            if not one["ok"]
        ]
        counts = {"figures": len(ones), "worst_share": max(shares, default=None)}
        yield {"library": library, "dtype": dtype, **counts, "wrong": wrong[:20]}


def of_counters(path: Path) -> Iterator[Figure]:
    """Yield, for each launch in ncu's CSV, the kernel's name and its metrics, in our units.

    In the long form of the CSV each metric has a row. Lines before its heading are ncu's messages.
    """
    lines = path.read_text("utf-8").splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith('"ID"')]
    launches: dict[str, Figure] = {}
    for row in csv.DictReader(lines[starts[0] :]) if starts else ():
        if row["Metric Name"] in METRICS:
            launch = launches.setdefault(row["ID"], {"kernel": row["Kernel Name"].split("(")[0]})
            launch[METRICS[row["Metric Name"]]] = number(row["Metric Value"], row["Metric Unit"])
    yield from launches.values()


def number(text: str, unit: str) -> float | None:
    """Return a value of ncu in bytes, microseconds or its own unit; None for "n/a"."""
    try:
        return float(text.replace(",", "")) * UNITS.get(unit, 1)
    except ValueError:
        return None


def of_sanitizer(path: Path) -> Iterator[Figure]:
    """Yield the tool and the number of errors from its summary: None if it did not get that far."""
    text = path.read_text("utf-8", errors="replace")
    found = re.search(r"SUMMARY: (\d+) (?:error|hazard)", text)
    yield {"tool": path.stem, "errors": None if found is None else int(found[1])}


FILES: dict[str, tuple[str, Callable[[Path], Iterator[Figure]]]] = {
    "bench.json": ("bench", of_bench),
    "verify.json": ("libraries", of_comparison),
    "counters.csv": ("counters", of_counters),
    "racecheck.log": ("sanitizer", of_sanitizer),
    "memcheck.log": ("sanitizer", of_sanitizer),
}
"""The files that other programs write into the folder: their part, and how to read them."""


def add(folder: Path, file: str) -> None:
    """Add a file of `FILES` to the figures, if it is there, and remove it."""
    path, (part, of) = folder / file, FILES[file]
    if not path.exists():
        return
    for figure in of(path):
        append(folder, part, **figure)
        if part != "bench":
            print("  " + ", ".join(f"{key} {value}" for key, value in figure.items()))
    path.unlink()


def whole(figures: Iterable[Figure]) -> Figure:
    """Return a report of `doraxp bench` with the results of all runs and a list for each part."""
    figures = list(figures)
    runs = [figure["report"] for figure in figures if figure["part"] == "bench"]
    machine = next((figure for figure in figures if figure["part"] == "machine"), {})
    head = {"versions": machine.get("versions"), "device": machine.get("device")}
    for run in reversed(runs):
        head |= {key: value for key, value in run.items() if key != "results"}
    lists = {
        part: [
            {key: value for key, value in figure.items() if key != "part"}
            for figure in figures
            if figure["part"] == part
        ]
        for part in LISTED
    }
    return {**head, "results": results(figures), **lists}


def name_of_device(figures: Iterable[Figure]) -> str:
    """Return "h200" for an NVIDIA H200, and "device" where no figure has the name."""
    names = (figure["device"]["name"] for figure in figures if figure["part"] == "machine")
    name = next(names, "device").lower().removeprefix("nvidia ")
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def results(figures: Iterable[Figure]) -> list[Figure]:
    """Return the results of all runs of `doraxp bench`, in order."""
    runs = (figure["report"] for figure in figures if figure["part"] == "bench")
    return [result for run in runs for result in run["results"]]
