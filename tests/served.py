"""Models for the pages on serving: a base, an adapter that PEFT trained, and the right outputs.

It needs PyTorch, transformers and PEFT, so a test imports it where it asks for these.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import peft
import sentencepiece
import torch
import transformers

PROMPT = "the base learns"
TEXTS = (
    "a frozen network learns", "the disk is full", "rows have norms and directions",
    "merge the adapter into the base",
)  # fmt: skip
LLAMA = {
    "hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip


class Served(NamedTuple):
    """A folder with `base` and `adapter`, the tokens of the prompt, and the logits of PEFT."""

    folder: Path
    tokens: torch.Tensor
    logits: torch.Tensor
    base_logits: torch.Tensor


def write_tokenizer(folder: Path) -> transformers.PreTrainedTokenizerBase:
    """Train a tokenizer, and write it as models have it: tokenizer.model and tokenizer.json."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 4), model_writer=model, vocab_size=320, model_type="bpe",
        byte_fallback=True, character_coverage=1.0, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return tokenizer


def train(model: Any, tokens: torch.Tensor) -> None:
    """Take a few steps, large ones: the outputs must move by more than the bounds of the tests."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=2e-2)
    for _ in range(8):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()


def write_llama(folder: Path, *, tied: bool = False) -> Served:
    """Write a Llama with its tokenizer as `base`, and train a DoRA adapter of it by PEFT.

    Where the embeddings are tied to the output layer, the adapter changes the embeddings alone, and
    the right logits are those before PEFT's merge, which changes both.
    """
    torch.manual_seed(0)
    base = folder / "base"
    base.mkdir()
    tokenizer = write_tokenizer(base)
    sizes = {**LLAMA, "vocab_size": len(tokenizer), "tie_word_embeddings": tied}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.5 / parameter.shape[1] ** 0.5)
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=1, eos_token_id=2, do_sample=False, max_new_tokens=6
    )
    model.save_pretrained(base, max_shard_size="300KB")
    tokens = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        before = model(tokens).logits[0]
    targets = ["q_proj", "down_proj", "embed_tokens"] if tied else "all-linear"
    lora = peft.LoraConfig(
        r=4, lora_alpha=8, use_dora=True, target_modules=targets, task_type="CAUSAL_LM"
    )
    tuned = peft.get_peft_model(model, lora)
    train(tuned, tokenizer(TEXTS[3], return_tensors="pt")["input_ids"])
    tuned.eval().save_pretrained(folder / "adapter")
    with torch.no_grad():
        logits = (tuned if tied else tuned.merge_and_unload())(tokens).logits[0]
    return Served(folder, tokens, logits, before)


def distance(got: torch.Tensor, right: torch.Tensor) -> float:
    """Return the largest difference as a part of the largest number."""
    return float((got - right).abs().max() / right.abs().max())
