"""Run the demo and draw its picture twice, for light and for dark pages.

    python docs/figures/demo.py
    python docs/figures/demo.py --network convolutional

It writes docs/images/demo.png and demo-dark.png, or demo-convolutional.png and
demo-convolutional-dark.png, in about half a minute. `--json FILE` writes the figures, as `doraxp
demo --json FILE` does.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from doraxp.demo import PLANS, Settings, experiment, report, save_picture

IMAGES = Path(__file__).resolve().parents[1] / "images"
NAMES = {"linear": "demo", "convolutional": "demo-convolutional"}


def main() -> int:
    """Train, draw and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--network", choices=PLANS, default="linear")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    results = experiment(Settings(network=arguments.network), lambda what, seed: None)
    for dark, ending in ((False, ""), (True, "-dark")):
        name = f"{NAMES[arguments.network]}{ending}.png"
        save_picture(results, IMAGES / name, dark=dark)
    if arguments.json is not None:
        text = json.dumps(report(results), indent=1)
        arguments.json.write_text(text + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
