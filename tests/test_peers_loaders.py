"""DoRA files in other formats than its own, in the loaders of diffusers: `nox -s peers`."""

from __future__ import annotations

import logging

import pytest
from peers.checks import findings, meant, names

pytestmark = pytest.mark.filterwarnings("ignore")  # from its imports

SINGLE = {"norm_gradient": "exact", "dtypes": ("float32",)}


@pytest.fixture
def loaders(torch, published):
    published("diffusers")
    from peers import loaders

    return loaders


def test_diffusers_loads_a_dora_file_as_lora_and_logs_a_warning(loaders, reported, caplog):
    logging.getLogger("diffusers").addHandler(caplog.handler)
    peer = loaders.Diffusers(pipeline=True)
    report = reported("diffusers", "Stable Diffusion's loader", peer, meant(**SINGLE))
    assert names(report) == {("merge",): ("m/n is left out, as in LoRA",)}
    assert any("dora_scale" in one.message for one in caplog.records)


def test_every_loader_of_diffusers_drops_the_magnitude(loaders, noted):
    read = loaders.read_by_every_loader()
    assert len(read) == 33
    assert all(not any("dora" in key for key in keys) for keys in read.values())
    noted("diffusers", "all loaders", f"dora_scale is dropped by {len(read)} of {len(read)}")


def test_diffusers_conversion_keeps_the_magnitude_in_a_shape_that_peft_refuses(loaders, reported):
    peer = loaders.Diffusers(pipeline=False)
    report = reported("diffusers", "the conversion alone", peer, meant(**SINGLE))
    assert {quantity for *_, quantity in findings(report)} == {"all"}
    assert all("size mismatch" in one.problem for one in report.findings)


def test_diffusers_is_right_with_a_file_in_pefts_format(loaders, reported):
    peer = loaders.DiffusersPeft()
    report = reported("diffusers", "a file in PEFT's format", peer, meant(**SINGLE))
    assert findings(report) == set()
