"""Print the figures of `benchmarks/device.sh` beside the project's goals, and write its report.

    python benchmarks/device_report.py FOLDER                 print the goals, write the report
    python benchmarks/device_report.py FOLDER add FILE        add a file of FILES to the figures
    python benchmarks/device_report.py FOLDER skip NAME WHY   add a part that could not run

The report is named after the device, as h200.json. It is a report of `doraxp bench` with a list for
each other part: see `device_figures`. This script needs the standard library alone.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from device_figures import FILES, add, append, name_of_device, read, whole
from device_goals import table

PICTURE = "bench.png"


def main(arguments: list[str]) -> int:
    """Add to the figures of a folder, or print its goals and write its report."""
    folder, *rest = arguments
    match rest:
        case ["add", file]:
            add(Path(folder), Path(file).name)
        case ["skip", name, reason]:
            append(Path(folder), "skipped", name=name, reason=reason)
        case []:
            conclude(Path(folder))
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


def conclude(folder: Path) -> None:
    """Print the goals, and write the report; name it and the picture after the device."""
    for file in FILES:  # of a part that was stopped
        add(folder, file)
    figures = read(folder)
    print("\n".join(table(figures)))
    if not any(figure["part"] == "machine" for figure in figures):
        return
    report, picture = (folder / f"{name_of_device(figures)}.{kind}" for kind in ("json", "png"))
    report.write_text(json.dumps(whole(figures), indent=1) + "\n", "utf-8")
    if (folder / PICTURE).exists():
        (folder / PICTURE).replace(picture)
    print(f"Figures: {report}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
