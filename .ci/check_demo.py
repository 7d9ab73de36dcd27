"""Compare `doraxp demo --json FILE` with the README's promises and docs/tutorials/demo.md."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

POINTS = 2.0
"""The largest difference to the accuracies of the page: another BLAS rounds differently."""

figures = json.loads(Path(sys.argv[1]).read_text())
frozen = figures["base"]["turned_accuracy"]
assert max(frozen["values"]) < 0.40, frozen
accuracies = {"frozen base": frozen["mean"]}
for name, method in figures["methods"].items():
    accuracy = method["accuracy"]
    accuracies[name] = accuracy["mean"]
    if method["merged_accuracy"]:
        assert method["merged_accuracy"]["values"] == accuracy["values"], name
    if name.startswith("DoRA"):
        assert min(accuracy["values"]) > 0.90, (name, accuracy)

page = Path("docs/tutorials/demo.md").read_text()
for name, accuracy in accuracies.items():
    (printed,) = re.findall(rf"^{re.escape(name)} +([\d.]+) ±", page, re.MULTILINE)
    assert abs(float(printed) - 100 * accuracy) < POINTS, (name, printed, accuracy)
print("the demo's figures are those of the page")
