"""Findings in adapters and MoE-PEFT, which need transformers 4: `nox -s "peers(adapters)"`."""

from __future__ import annotations

import pytest
from peers.checks import findings, meant, names, not_finite, offered

pytestmark = pytest.mark.filterwarnings("ignore")  # from their imports

SINGLE = ("float32",)
BIAS = ("the bias is scaled by m/n, so that forward is not merge",)


@pytest.fixture
def made(torch):
    from peers import transformers_4

    return transformers_4


def test_adapters_merges_without_s(published, made, reported):
    published("adapters")
    peer = offered(made.Adapters(), "init", "merge")
    report = reported("adapters", "merge", peer, meant(dtypes=SINGLE))
    assert set(names(report).values()) == {("s is left out",)}
    assert not_finite(report, "zero row") == {("merge", "merged")}


def test_adapters_takes_the_norm_without_s(published, made, reported):
    """With s = 1 only the bias is wrong."""
    published("adapters")
    both = "forward", "gradients"
    exact = {"norm_gradient": "exact", "dropout": "low_rank", "dtypes": SINGLE}
    report = reported("adapters", "linear", offered(made.Adapters(), *both), meant(**exact))
    assert names(report) == {both: (*BIAS, "the norm lacks s")}
    one = made.WithoutScaling(made.Adapters())
    report = reported("adapters", "linear, s = 1", offered(one, "forward"), meant(**exact))
    assert names(report) == {("forward",): BIAS}
    meant_so = meant(bias_scaled=True, **exact)
    report = reported(
        "adapters", "linear, s = 1, the scaled bias is meant", offered(one, "forward"), meant_so
    )
    assert findings(report) == set()


def test_moe_peft_scales_the_bias(published, made, reported):
    published("moe_peft")
    report = reported("moe-peft", "linear", made.MoePeft(), meant(dtypes=SINGLE))
    assert set(names(report).values()) == {BIAS}
    scaled = meant(dtypes=SINGLE, bias_scaled=True)
    report = reported("moe-peft", "linear, the scaled bias is meant", made.MoePeft(), scaled)
    assert findings(report) == set()
