"""`doraxp.jax` over a mesh of 8 devices: the results of one device, and few collectives."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("sharding.py")
FORMS = ("weight", "direction")
NORM_GRADIENTS = ("exact", "detached")
COLLECTIVES = {  # instructions of the compiled program; docs/parallel.md states them
    "column": {"forward": 0, "forward_and_norm": 0, "merged": 0, "step": 1},
    "row": {"forward": 1, "forward_and_norm": 2, "merged": 2, "step": 2},
    "data": {"forward": 0, "forward_and_norm": 0, "merged": 0, "step": 1},
}
MORE = {  # cases that take more collectives than COLLECTIVES says
    ("row", "direction"): {"forward_and_norm": 4, "merged": 4, "step": 5},
    ("data", "exact"): {"step": 11},
}


@functools.cache
def report():
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("split", COLLECTIVES)
@pytest.mark.parametrize("norm_gradient", NORM_GRADIENTS)
@pytest.mark.parametrize("form", FORMS)
class TestSharded:
    def test_results_equal_those_of_one_device(self, jax, form, norm_gradient, split):
        """Compares y, the loss, every gradient and W'; errors are relative to the largest value."""
        errors = report()[f"{form}-{norm_gradient}-{split}"]["errors"]
        assert errors.keys() == COLLECTIVES[split].keys()
        assert max(errors.values()) <= 1e-14

    def test_the_number_of_collectives_is_as_stated(self, jax, form, norm_gradient, split):
        counts = report()[f"{form}-{norm_gradient}-{split}"]["counts"]
        more = MORE.get((split, form), {}) | MORE.get((split, norm_gradient), {})
        totals = {name: sum(kinds.values()) for name, kinds in counts.items()}
        assert totals == COLLECTIVES[split] | more
