"""The commands of docs/tutorials/serving.md, run on a Llama whose adapter PEFT trained.

`nox -s serving` runs this file with transformers, `nox -s "serving(llama.cpp)"` with llama.cpp, and
`nox -s "serving(vllm)"` with vLLM.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
from page_blocks import block, commands, run

PAGE = "tutorials/serving.md"
BOUND, ROUGH = 1e-5, 2e-2
"""The second one is for weights in 16 bits."""

pytestmark = pytest.mark.filterwarnings("ignore")  # of the engines


@pytest.fixture
def llama(torch, peft, transformers, tmp_path):
    """A base, and an adapter of it that PEFT trained."""
    import served

    return served.write_llama(tmp_path)


@pytest.fixture(params=["plain", "tied", "grown"])
def merged(request, torch, peft, transformers, tmp_path):
    """A base and an adapter, merged by the commands of the page.

    The second adapter also trains embeddings that are tied to the output layer, and the third one
    the embeddings of a vocabulary with new tokens.
    """
    import served

    model = served.write_llama(tmp_path, request.param)
    old = model.base_logits.shape[1]
    assert served.distance(model.base_logits, model.logits[:, :old]) > 0.1
    run(tmp_path, *commands(PAGE, "sh", "doraxp "))
    return model


def greedy(torch, merged):
    """Return the tokens that transformers generates after the prompt."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(merged.folder / "merged")
    return model.generate(merged.tokens)[0, merged.tokens.shape[1] :].tolist()


def test_transformers_computes_as_the_adapted_model(merged, monkeypatch, capsys):
    import served

    monkeypatch.chdir(merged.folder)
    names = {}
    exec(block(PAGE, "from transformers"), names)
    model, tokenizer = names["model"], names["tokenizer"]
    tokens = tokenizer(served.PROMPT, return_tensors="pt")["input_ids"]
    assert tokens.tolist() == merged.tokens.tolist()
    assert served.distance(model(tokens).logits[0], merged.logits) < BOUND
    assert model.generation_config.max_new_tokens == 6
    assert tokenizer.chat_template
    assert len(capsys.readouterr().out) > len(served.PROMPT)


WIDE = ", type_k=kind, type_v=kind"
"""The arguments of the page that choose float32 for keys and values."""


def llama_cpp_logits(model, file, wide=WIDE, **options):
    """Return the logits of the prompt, by the page's code that compares numbers."""
    import llama_cpp
    import torch

    names, code = {}, block(PAGE, "import llama_cpp")
    assert WIDE in code
    with pytest.MonkeyPatch.context() as patch:
        quiet = functools.partial(llama_cpp.Llama, verbose=False, **options)
        patch.setattr(llama_cpp, "Llama", quiet)
        exec(code.replace("merged.gguf", file).replace(WIDE, wide), names)
    assert names["tokens"] == model.tokens[0].tolist()
    return torch.tensor(names["logits"])


def test_llama_cpp_computes_as_the_adapted_model(merged, llama_cpp, monkeypatch, capsys):
    import served

    monkeypatch.chdir(merged.folder)
    Path("llama.cpp").symlink_to(os.environ["LLAMA_CPP"])
    (convert,) = commands(PAGE, "text", "python llama.cpp/convert_hf_to_gguf.py")
    run(merged.folder, convert)
    names = {}
    exec(block(PAGE, "from llama_cpp"), names)
    assert capsys.readouterr().out.strip()
    if merged.logits.shape[1] > merged.base_logits.shape[1]:
        for place, token in enumerate(served.NEW_TOKENS, merged.base_logits.shape[1]):
            assert names["llama"].tokenize(token.encode(), special=True)[-1] == place

    run(merged.folder, convert.replace("f32", "auto").replace("merged.gguf", "rough.gguf"))
    for file, bound in {"merged.gguf": BOUND, "rough.gguf": ROUGH}.items():
        assert served.distance(llama_cpp_logits(merged, file), merged.logits) < bound, file
    by_default = llama_cpp_logits(merged, "merged.gguf", wide="")
    assert served.distance(by_default, merged.logits) > BOUND  # the page says so


def low_rank_logits(llama):
    """Convert the adapter to plain LoRA by the command of the page; return PEFT's logits of it."""
    import peft
    import served
    import torch
    import transformers

    (convert,) = commands(PAGE, "text", "doraxp convert adapter")
    run(llama.folder, convert)
    base = transformers.AutoModelForCausalLM.from_pretrained(llama.folder / "base")
    model = peft.PeftModel.from_pretrained(base, llama.folder / "plain-lora").eval()
    with torch.no_grad():
        logits = model(llama.tokens).logits[0]
    assert served.distance(logits, llama.logits) < 0.5 * served.distance(
        llama.base_logits, llama.logits
    )
    return logits


def test_peft_loads_the_plain_lora(llama):
    low_rank_logits(llama)


def test_llama_cpp_computes_with_the_plain_lora(llama, llama_cpp, monkeypatch):
    import served

    right = low_rank_logits(llama)
    monkeypatch.chdir(llama.folder)
    Path("llama.cpp").symlink_to(os.environ["LLAMA_CPP"])
    (convert,) = commands(PAGE, "text", "python llama.cpp/convert_hf_to_gguf.py")
    (adapter,) = commands(PAGE, "text", "python llama.cpp/convert_lora_to_gguf.py")
    base = convert.replace("merged.gguf", "base.gguf").replace("merged", "base")
    run(llama.folder, base, f"{adapter} --outtype f32")
    got = llama_cpp_logits(llama, "base.gguf", lora_path="plain-lora.gguf")
    assert served.distance(got, right) < BOUND


def test_llama_cpp_refuses_the_adapter(llama, llama_cpp):
    """The page says so. Where this test fails, llama.cpp has learnt DoRA: change the page."""
    script = Path(os.environ["LLAMA_CPP"]) / "convert_lora_to_gguf.py"
    done = subprocess.run(
        [sys.executable, script, "adapter", "--base", "base"],
        cwd=llama.folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "lora_magnitude_vector" in done.stderr


def test_vllm_computes_as_the_adapted_model(merged, torch, vllm, monkeypatch):
    import served

    monkeypatch.chdir(merged.folder)
    for name, value in {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
    }.items():
        monkeypatch.setenv(name, value)
    small = {"dtype": "float32", "max_model_len": 64, "max_num_seqs": 1, "enforce_eager": True}
    monkeypatch.setattr(vllm, "LLM", functools.partial(vllm.LLM, **small))
    names = {}
    exec(block(PAGE, "from vllm"), names)
    settings = vllm.SamplingParams(temperature=0, max_tokens=6, prompt_logprobs=5)
    (answer,) = names["llm"].generate(served.PROMPT, settings)
    assert list(answer.outputs[0].token_ids) == greedy(torch, merged)
    assert answer.prompt_token_ids == merged.tokens[0].tolist()
    right = torch.log_softmax(merged.logits, -1)
    for row, found in zip(right, answer.prompt_logprobs[1:], strict=False):
        for token, one in found.items():
            assert abs(one.logprob - float(row[token])) < BOUND * float(right.abs().max())


def test_vllm_refuses_the_adapter_and_takes_the_plain_lora(llama, vllm):
    """The page says so. Where this test fails, vLLM has learnt DoRA: change the page."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora.peft_helper import PEFTHelper

    helper = PEFTHelper.from_local_dir(str(llama.folder / "adapter"), 64)
    with pytest.raises(ValueError, match="does not yet support DoRA"):
        helper.validate_legal(LoRAConfig(max_lora_rank=16))
    low_rank_logits(llama)
    PEFTHelper.from_local_dir(str(llama.folder / "plain-lora"), 64).validate_legal(
        LoRAConfig(max_lora_rank=16)
    )
