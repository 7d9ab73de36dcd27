"""The commands of docs/tutorials/serving.md, run on a Llama whose adapter PEFT trained.

`nox -s serving` runs this file with transformers and llama.cpp, and `nox -s "serving(vllm)"` with
vLLM.
"""

from __future__ import annotations

import pytest
from pages import block, commands, run

PAGE = "tutorials/serving.md"

pytestmark = pytest.mark.filterwarnings("ignore")  # of the engines


@pytest.fixture
def merged(torch, peft, transformers, tmp_path):
    """A base and an adapter, merged by the commands of the page."""
    import served

    model = served.write_llama(tmp_path)
    run(tmp_path, *commands(PAGE, "sh", "doraxp "))
    return model


def test_transformers_computes_as_pefts_merge(merged, monkeypatch, capsys):
    import served

    monkeypatch.chdir(merged.folder)
    names = {}
    exec(block(PAGE, "from transformers"), names)
    model, tokenizer = names["model"], names["tokenizer"]
    tokens = tokenizer(served.PROMPT, return_tensors="pt")["input_ids"]
    assert tokens.tolist() == merged.tokens.tolist()
    logits = model(tokens).logits[0]
    assert served.distance(merged.base_logits, merged.logits) > 0.1
    assert served.distance(logits, merged.logits) < 1e-5
    assert model.generation_config.max_new_tokens == 6
    assert tokenizer.chat_template
    assert len(capsys.readouterr().out) > len(served.PROMPT)
