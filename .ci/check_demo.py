"""Compare `doraxp demo --json FILE` with the README's promises and docs/benchmarks/demo.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path

POINTS = 2.0
"""The largest difference to the accuracies of that run: another BLAS rounds differently."""

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

runs = json.loads(Path("docs/benchmarks/demo.json").read_text())
(run,) = (run for run in runs if run["arguments"]["network"] == figures["arguments"]["network"])
recorded = {"frozen base": run["base"]["turned_accuracy"]["mean"]}
recorded |= {name: method["accuracy"]["mean"] for name, method in run["methods"].items()}
assert list(recorded) == list(accuracies), (recorded, accuracies)
for name, accuracy in accuracies.items():
    assert 100 * abs(recorded[name] - accuracy) < POINTS, (name, recorded[name], accuracy)
print("the demo's figures are those of docs/benchmarks/demo.md")
