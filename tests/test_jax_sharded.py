"""`doraxp.jax` over a mesh of 8 devices: the results of one device, few collectives,
and derivatives under `jax.shard_map`."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("sharding.py")
CASES = [
    f"auto-{form}-{norm}" for form in ("weight", "direction") for norm in ("exact", "detached")
]
CASES += ["explicit-weight-exact", "explicit-direction-detached"]
COLLECTIVES = {  # instructions of the compiled program; docs/howto/distributed.md states them
    "column": {"forward": 0, "forward_and_norm": 0, "merged": 0, "step": 1},
    "row": {"forward": 1, "forward_and_norm": 2, "merged": 2, "step": 2},
    "data": {"forward": 0, "forward_and_norm": 0, "merged": 0, "step": 1},
}
MORE = {  # cases that take more collectives than COLLECTIVES says
    ("row", "direction"): {"forward_and_norm": 4, "merged": 4, "step": 5},
    ("data", "explicit"): {"step": 2},
}
SPLITS = [f"{kind}-{case}" for kind in ("auto", "explicit") for case in ("fresh", "axes of tokens")]
SPLITS += [f"auto-{split}" for split in ("W rows", "W columns, x columns", "ranks")]
SPLITS += [
    f"explicit-{split}"
    for split in (
        "W rows", "W rows, x columns", "W columns", "W columns, x columns", "W columns, x tokens",
        "B rows", "ranks", "bias",
    )
]  # fmt: skip
MAPS = [f"{kind}-{config}" for kind in ("auto", "explicit") for config in (
    "weight-exact", "direction-detached",
)]  # fmt: skip


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
@pytest.mark.parametrize("case", CASES)
class TestSharded:
    def test_results_equal_those_of_one_device(self, jax, case, split):
        """Compares y, the loss, every gradient and W'; errors are relative to the largest value."""
        errors = report()["collectives"][f"{case}-{split}"]["errors"]
        assert errors.keys() == COLLECTIVES[split].keys()
        assert max(errors.values()) <= 1e-14

    def test_the_number_of_collectives_is_as_stated(self, jax, case, split):
        kind, form, _ = case.split("-")
        counts = report()["collectives"][f"{case}-{split}"]["counts"]
        more = MORE.get((split, form), {}) | MORE.get((split, kind), {})
        totals = {name: sum(kinds.values()) for name, kinds in counts.items()}
        assert totals == COLLECTIVES[split] | more


@pytest.mark.parametrize("split", SPLITS)
def test_every_function_takes_arrays_that_are_split_in_any_way(jax, split):
    """Compares prepare, forward, backward, merge, and derivatives of all kinds, with one device."""
    errors = report()["splits"][split]
    assert len(errors) == {"fresh": 3, "axes of tokens": 1}.get(split.partition("-")[2], 7)
    assert max(errors.values()) <= 1e-14


@pytest.mark.parametrize("case", MAPS)
def test_derivatives_inside_and_outside_of_a_shard_map_are_those_of_one_device(jax, case):
    """With `check_vma` and without; a replicated adapter's gradient is the sum over the devices."""
    errors = report()["maps"][case]
    assert len(errors) == 6
    assert max(errors.values()) <= 1e-14


def test_each_case_of_the_script_has_a_test(jax):
    assert report()["collectives"].keys() == {f"{c}-{s}" for c in CASES for s in COLLECTIVES}
    assert report()["splits"].keys() == set(SPLITS)
    assert report()["maps"].keys() == set(MAPS)
