"""`benchmarks/checkpoint_model.py`, which writes the model and the adapter of several pages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "checkpoint_model.py"

pytestmark = pytest.mark.once


@pytest.mark.parametrize("name", ["base", "adapter"])
def test_a_folder_with_a_model_is_exit_status_2_and_one_line(tmp_path, name):
    for module in ("ml_dtypes", "safetensors"):
        pytest.importorskip(module)
    (tmp_path / "small" / name).mkdir(parents=True)
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "small"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    path = Path("small", name)
    assert run.stderr == (
        f"checkpoint_model.py: error: {path} already exists: remove the folder small, or give "
        "another FOLDER\n"
    )
    assert run.returncode == 2
    assert not list((tmp_path / "small" / name).iterdir())
