"""The scripts in examples/ do what docs/examples.md says of them."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def figures(text):
    """The first number of each line, by what stands before it."""
    lines = re.findall(r"^([^:\n]+):\s+([\d.]+)", text, re.MULTILINE)
    return {name: float(number) for name, number in lines}


class TestOwnFramework:
    def test_the_adapted_network_learns_what_the_frozen_one_cannot(self, capsys):
        load("own_framework").main()
        printed = figures(capsys.readouterr().out)
        assert printed["trained"] >= 99
        assert printed["turned, frozen"] <= 60
        assert printed["turned, adapted"] >= 99
        assert printed["turned, merged"] == printed["turned, adapted"]
