"""Findings in smaller packages, whose layers import without the rest of their needs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from peers.checks import findings, meant, names, not_finite, offered

pytestmark = pytest.mark.filterwarnings("ignore")  # from their imports

SINGLE = ("float32",)
AS_A_MATRIX = {("forward", "one token", "y"), ("gradients", "one token", "all")}
DROPS_ALL = ("the dropout mask touches the base product too",)
ZERO_ROW = {("forward", "y"), *(("gradients", name) for name in ("dx", "da", "db", "dm"))}


@pytest.fixture
def made(torch):
    from peers import registry

    return registry


def test_gbra_is_right_after_its_norm_is_refreshed(published, made, reported):
    published("gbra")
    report = reported("gbra", "linear", made.Gbra(), meant(dtypes=SINGLE))
    assert findings(report) == set()
    assert not_finite(report, "zero row") == {*ZERO_ROW, ("merge", "merged")}


def test_nemo_automodel_has_the_findings_of_peft(published, made, reported):
    published("nemo_automodel")
    report = reported("nemo-automodel", "linear", made.NemoAutomodel(), meant())
    assert findings(report) == {
        *AS_A_MATRIX,
        ("gradients", "one row", "dx"),
        ("gradients", "rows of all sizes", "dm"),
    }
    assert not_finite(report, "zero row") == ZERO_ROW


def test_nemo_automodel_rounds_the_magnitude_on_a_bf16_base(published, made, reported):
    published("nemo_automodel")
    peer = SimpleNamespace(init=made.NemoAutomodel().stored_magnitude)
    report = reported("nemo-automodel", "init, bfloat16", peer, meant(dtypes=("bfloat16",)))
    assert names(report) == {("init",): ("the magnitude is rounded to bfloat16 at init",)}


@pytest.mark.parametrize("package", ["omg-hybridomga", "socket-lm"])
def test_they_drop_the_base_product_too(published, made, reported, package):
    module, peer = made.DROPPING[package]
    published(module)
    exact = {"norm_gradient": "exact", "dtypes": SINGLE}
    report = reported(package, "linear, dropout", peer(), meant(dropout="input", **exact))
    assert set(names(report).values()) == {DROPS_ALL}
    report = reported(package, "linear", peer(), meant(**exact))
    assert findings(report) == set()
    zero = not_finite(report, "zero row")
    assert zero == (set() if package == "omg-hybridomga" else {*ZERO_ROW, ("merge", "merged")})


def test_bidora_draws_the_first_magnitude(published, made, reported):
    """A fresh adapter is not the identity: m is that of a weight that the layer drew."""
    published("bidora")
    exact = {"norm_gradient": "exact", "norm_axis": "input", "dtypes": SINGLE}
    report = reported("bidora", "init", offered(made.Bidora(), "init"), meant(**exact))
    assert {quantity for *_, quantity in findings(report)} == {"initial"}
    trained = offered(made.Bidora(), "forward", "gradients", "merge")
    report = reported("bidora", "linear, norm over inputs", trained, meant(**exact))
    assert findings(report) == set()
    assert not_finite(report, "zero row") == set()


def test_mlx_vlm_has_the_findings_of_mlx_lm(published, reported, torch):
    published("mlx_vlm.trainer.peft.dora_layers")
    from peers import layers

    peer = layers.MlxLm("mlx_vlm.trainer.peft.dora_layers")
    report = reported("mlx-vlm", "linear", peer, meant(dropout="low_rank"))
    assert findings(report) == set()
    assert not_finite(report, "zero row") == {*ZERO_ROW, ("merge", "merged")}
