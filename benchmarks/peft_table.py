"""Print the figures of `doraxp bench --backend torch` as the tables of docs/benchmarks/peft.md.

    doraxp bench --backend torch --tasks step evaluation --json figures.json ...
    python benchmarks/peft_table.py FILE...

There is a table for each task and dtype: a row for each shape, and a column for each number of
tokens. A cell has ratios of the accelerated layer, from their medians:

    step          time ÷ PEFT's, ÷ the bare products, and its peak of memory ÷ PEFT's
    evaluation    time ÷ PEFT's, ÷ PEFT's with DoraCaching, and ÷ the bare product
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

Result: TypeAlias = dict[str, Any]
"""A result in a report of `doraxp bench`."""
Case: TypeAlias = dict[str, Result]
"""The results of one workload and task, by contestant."""
TASKS = {
    "step": "÷ PEFT / ÷ bare / memory ÷ PEFT",
    "evaluation": "÷ PEFT / ÷ DoraCaching / ÷ bare",
}
LEAST = 1 << 20
"""Bytes: below this peak, memory is a matter of pages and no ratio is shown."""


def main(paths: list[str]) -> int:
    """Print all tables."""
    if not paths:
        print(__doc__, file=sys.stderr)
        return 2
    reports = [json.loads(Path(path).read_text("utf-8")) for path in paths]
    results = [result for report in reports for result in report["results"]]
    print("\n\n".join("\n".join(lines) for lines in tables(results)))
    return 0


def tables(results: Iterable[Result]) -> Iterator[list[str]]:
    """Yield the lines of each table. Of a case that was measured twice, the last result counts."""
    found: dict[tuple[str, str, int], dict[str, dict[int, Case]]] = {}
    for result in results:
        case = result["case"]
        autocast = " under bfloat16 autocast" if case["autocast"] else ""
        key = (result["task"], case["dtype"] + autocast, case["rank"])
        rows = found.setdefault(key, {})
        row = rows.setdefault(f"{case['out']}×{case['inner']}", {})
        row.setdefault(case["tokens"], {})[result["contestant"]] = result
    for (task, dtype, rank), rows in found.items():
        if task not in TASKS:
            continue
        tokens = sorted({number for row in rows.values() for number in row})
        yield [
            f"{task}, {dtype}, rank {rank}: {TASKS[task]}",
            "",
            "| | " + " | ".join(counted(number) for number in tokens) + " |",
            "|---" * (len(tokens) + 1) + "|",
            *(
                f"| {shape} | "
                + " | ".join(cell(task, row[n]) if n in row else "–" for n in tokens)
                + " |"
                for shape, row in rows.items()
            ),
        ]


def counted(tokens: int) -> str:
    """Return "1 token" or "2 tokens"."""
    return f"{tokens} token" + "s" * (tokens > 1)


def cell(task: str, case: Case) -> str:
    """Return the ratios of a case."""
    theirs = case["DoRA"]
    if task == "step":
        ours = case["accelerated, exact"]
        peaks = ours["peak_bytes"], theirs["peak_bytes"]
        known = None not in peaks and peaks[1] >= LEAST
        memory = shown(peaks[0] / peaks[1]) if known else "–"
        return f"{over(ours, theirs)} / {shown(ours['over_own_bare'][1])} / {memory}"
    ours, cached = case["accelerated"], case["DoRA, DoraCaching"]
    bare = shown(ours["over_own_bare"][1])
    return f"{over(ours, theirs)} / {over(ours, cached)} / {bare}"


def over(one: Result, other: Result) -> str:
    """Return the median of the ratios of two times, which are of the same round."""
    ratios = sorted(a / b for a, b in zip(one["seconds"], other["seconds"], strict=True))
    low, high = ratios[(len(ratios) - 1) // 2], ratios[len(ratios) // 2]
    return shown((low + high) / 2)


def shown(ratio: float) -> str:
    """Return a ratio with two or three digits."""
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
