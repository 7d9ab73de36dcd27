"""Compare the figures of `doraxp demo --json FILE` with those of the README and its page."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

POINTS = 2.0
"""How far the page's accuracies may be off: another BLAS rounds otherwise, and learns otherwise."""

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

page = Path("docs/demo.md").read_text()
for name, accuracy in accuracies.items():
    (said,) = re.findall(rf"^{re.escape(name)} +([\d.]+) ±", page, re.MULTILINE)
    assert abs(float(said) - 100 * accuracy) < POINTS, (name, said, accuracy)
print("the demo's figures are as promised")
