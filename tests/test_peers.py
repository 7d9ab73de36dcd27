"""The findings of the yardstick in published implementations. `nox -s peers` runs these tests."""

from __future__ import annotations

import numpy as np
import pytest
from peers.checks import findings, meant, names, not_finite, offered

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from their imports

FULL = ("float32", "float64")
AS_A_MATRIX = {("forward", "one token", "y"), ("gradients", "one token", "all")}
"""For a vector x they return a matrix of one row."""
ZERO_ROW = {
    ("forward", "y"),
    ("merge", "merged"),
    *(("gradients", name) for name in ("dx", "da", "db", "dm")),
}


@pytest.fixture
def made(torch):
    """The module of the implementations, which needs PyTorch."""
    from peers import layers

    return layers


def test_pefts_float_layer_has_three_findings_and_nan_for_a_zero_row(peft, made, reported):
    report = reported("peft", "linear", made.Peft(), meant(dropout="input"))
    assert findings(report) == {
        *AS_A_MATRIX,
        ("gradients", "one row", "dx"),  # computes g W as W + (g - 1) W
        ("gradients", "rows of all sizes", "dm"),  # adds the bias and subtracts it again
    }
    assert report.diagnoses == ()
    assert not_finite(report, "zero row") == ZERO_ROW


def test_pefts_init_rounds_the_magnitude_on_a_bf16_base(peft, made, reported):
    report = reported(
        "peft", "init, bfloat16", offered(made.Peft(), "init"), meant(dtypes=("bfloat16",))
    )
    assert names(report) == {("init",): ("the magnitude is rounded to bfloat16 at init",)}
    errors = [float(one.problem.split()[-1]) for one in report.findings]
    assert max(errors) == 0.0035  # 0.35 %
    right = reported("peft", "init", offered(made.Peft(), "init"), meant())
    assert findings(right) == set()


def test_peft_rounds_intermediates_to_bf16(peft, made, reported):
    report = reported(
        "peft", "linear, bfloat16", offered(made.Peft(), "forward"), meant(dtypes=("bfloat16",))
    )
    assert findings(report) == {
        ("forward", "half storage", "y"),
        ("forward", "half storage, small update", "y"),
    }


def test_torchtune_scales_the_bias_so_that_its_forward_is_not_its_merge(torchtune, made, reported):
    peer = made.Torchtune()
    report = reported("torchtune", "linear", peer, meant(dropout="low_rank"))
    assert names(report)[("forward",)] == (
        "the bias is scaled by m/n, so that forward is not merge",
    )
    assert not {case for function, case, _ in findings(report) if function == "merge"}
    scaled = reported(
        "torchtune",
        "linear, the scaled bias is meant",
        peer,
        meant(dropout="low_rank", bias_scaled=True),
    )
    assert findings(scaled) == {
        *AS_A_MATRIX,
        ("forward", "low-rank dropout, one token", "y"),
        ("gradients", "low-rank dropout, one token", "all"),
        ("gradients", "one row", "dx"),
    }
    assert not_finite(report, "zero row") >= {("forward", "y"), ("merge", "merged")}


@pytest.mark.parametrize("dtype", FULL)
def test_lycoris_is_right_with_its_eps(lycoris, made, dtype, reported):
    eps = float(np.finfo(dtype).eps)
    choices = {"norm_gradient": "exact", "dtypes": (dtype,)}
    report = reported(
        "lycoris-lora", f"LoCon, linear, {dtype}", made.Lycoris(), meant(eps=eps, **choices)
    )
    rounding = {("forward", "rows of all sizes", "y"), ("gradients", "one row", "dx")}
    assert findings(report) == (rounding if dtype == "float32" else set())
    assert not_finite(report, "zero row") == set()


def test_mlx_lm_is_right_but_returns_nan_for_a_zero_row(mlx_lm, made, reported):
    report = reported("mlx-lm", "linear", made.MlxLm(), meant(dropout="low_rank"))
    assert findings(report) == set()
    assert not_finite(report, "zero row") == ZERO_ROW
