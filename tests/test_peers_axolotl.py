"""Findings in axolotl's functions for layers of PEFT: `nox -s "peers(axolotl)"`."""

from __future__ import annotations

import pytest
from peers.checks import findings, meant, not_finite

pytestmark = pytest.mark.filterwarnings("ignore")  # from its imports


@pytest.fixture
def kernels(torch, published):
    published("axolotl")
    from peers import kernels

    return kernels


def test_axolotls_gradient_of_a_zero_magnitude_is_nan(kernels, reported):
    """It divides by m. It cannot reshape a batch without tokens."""
    report = reported("axolotl", "linear", kernels.Axolotl(), meant(dropout="low_rank"))
    assert findings(report) == {
        ("gradients", "zero magnitude", "dm"),
        ("forward", "no tokens", "all"),
        ("gradients", "no tokens", "all"),
    }
    assert not_finite(report, "zero magnitude") == {("gradients", "dm")}


def test_axolotls_dropout_is_not_that_of_peft(kernels, reported):
    """It drops the x of A alone, and PEFT's layer the x of both products."""
    report = reported(
        "axolotl", "linear, PEFT's dropout", kernels.Axolotl(), meant(dropout="input")
    )
    assert any("dropout" in case for _, case, _ in findings(report))
