"""Files of llama.cpp: refused by name in each place, with the way to one."""

from __future__ import annotations

import numpy as np
import pytest
from checkpoints import draw, factors, write_base, write_peft

from doraxp.cli import main


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    write_base(tmp_path / "base", {"q.weight": draw(rng, 7, 5)})
    write_peft(tmp_path / "adapter", {"q": factors(rng, (7, 5))})
    (tmp_path / "llama").mkdir()
    for name in ("model.gguf", "MODEL.GGUF", "renamed.safetensors", "llama/model-q4_0.gguf"):
        (tmp_path / name).write_bytes(b"GGUF\3\0\0\0" + bytes(64))
    return tmp_path


COMMANDS = {
    "base": ("merge", "model.gguf", "adapter", "--out", "out"),
    "base in capitals": ("merge", "MODEL.GGUF", "adapter", "--out", "out"),
    "base with another name": ("merge", "renamed.safetensors", "adapter", "--out", "out"),
    "base in a folder": ("merge", "llama", "adapter", "--out", "out"),
    "adapter": ("merge", "base", "model.gguf", "--out", "out"),
    "adapter in a folder": ("merge", "base", "llama", "--out", "out"),
    "summand": ("merge", "base", "--adapter", "model.gguf:0.5", "--out", "out"),
    "out": ("merge", "base", "adapter", "--out", "out.gguf"),
    "merged": ("audit", "base", "adapter", "model.gguf"),
    "source": ("convert", "model.gguf", "--to", "peft", "--out", "out"),
    "target": ("convert", "adapter", "--to", "peft", "--out", "out.gguf"),
    "inspected": ("inspect", "model.gguf"),
    "tuned": ("extract", "base", "model.gguf", "--rank", "2", "--out", "out"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_a_gguf_file_is_refused_by_name(folder, monkeypatch, capsys, case):
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    assert main(COMMANDS[case]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    named = [part for part in COMMANDS[case] if part.lower().endswith(("gguf", ".gguf:0.5"))]
    name = named[0].removesuffix(":0.5") if named else "model-q4_0.gguf"
    assert (name if "another" not in case else "renamed.safetensors") in error
    assert "then make a GGUF file from OUT with the converter of the engine" in error
    assert sorted(folder.rglob("*")) == before
