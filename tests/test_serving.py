"""The commands of docs/tutorials/serving.md, run on a Llama whose adapter PEFT trained.

`nox -s serving` runs this file with transformers and llama.cpp, and `nox -s "serving(vllm)"` with
vLLM.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = "tutorials/serving.md"

pytestmark = pytest.mark.filterwarnings("ignore")  # of the engines


def run(folder, *lines):
    """Run commands of a page in a folder."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for line in lines:
        done = subprocess.run(
            ["bash", "-euc", line],
            cwd=folder,
            env=os.environ | {"PATH": path},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"


@pytest.fixture
def merged(torch, peft, transformers, tmp_path):
    """A base and an adapter, merged by the commands of the page."""
    import served

    model = served.write_llama(tmp_path)
    run(tmp_path, *served.commands(PAGE, "sh", "doraxp "))
    return model


def block(start):
    """Return the only block of the page that begins so."""
    import served

    (found,) = [one for one in served.blocks(PAGE, "text") if one.startswith(start)]
    return found


def test_transformers_computes_as_pefts_merge(merged, monkeypatch, capsys):
    import served

    monkeypatch.chdir(merged.folder)
    names = {}
    exec(block("from transformers"), names)
    model, tokenizer = names["model"], names["tokenizer"]
    tokens = tokenizer(served.PROMPT, return_tensors="pt")["input_ids"]
    assert tokens.tolist() == merged.tokens.tolist()
    logits = model(tokens).logits[0]
    assert served.distance(merged.base_logits, merged.logits) > 0.1
    assert served.distance(logits, merged.logits) < 1e-5
    assert model.generation_config.max_new_tokens == 6
    assert tokenizer.chat_template
    assert len(capsys.readouterr().out) > len(served.PROMPT)
