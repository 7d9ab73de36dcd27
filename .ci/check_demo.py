"""Hold the figures of `doraxp demo --json FILE` to what the README promises."""

from __future__ import annotations

import json
import sys
from pathlib import Path

figures = json.loads(Path(sys.argv[1]).read_text())
frozen = figures["base"]["turned_accuracy"]["values"]
assert max(frozen) < 0.40, frozen
for name, method in figures["methods"].items():
    accuracy = method["accuracy"]["values"]
    if method["merged_accuracy"]:
        assert method["merged_accuracy"]["values"] == accuracy, name
    if name.startswith("DoRA"):
        assert min(accuracy) > 0.90, (name, accuracy)
print("the demo's figures are as promised")
