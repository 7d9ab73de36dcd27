"""unsloth-zoo's merge. Without a GPU it puts a stub in triton's place: run this file alone."""

from __future__ import annotations

import pytest
from peers.checks import findings, meant, not_finite

pytestmark = pytest.mark.filterwarnings("ignore")  # from its imports


def test_unsloth_zoo_merges_right(published, torch, reported, monkeypatch, tmp_path):
    monkeypatch.setenv("UNSLOTH_ZOO_DISABLE_GPU_INIT", "1")
    monkeypatch.setenv("UNSLOTH_COMPILE_LOCATION", str(tmp_path))  # it writes files when imported
    published("unsloth_zoo.saving_utils")
    from peers import registry

    report = reported("unsloth-zoo", "merge", registry.UnslothZoo(), meant(dtypes=("float32",)))
    assert findings(report) == set()
    assert not_finite(report, "zero row") == set()
