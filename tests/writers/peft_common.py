"""Models of transformers with random weights, and adapters of PEFT that are unlike fresh ones."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from writers.matrix import Trial, read_tensors

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

IDS = torch.arange(3, 13)[None]
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def model(name: str, **changes: Any) -> Any:
    """Return a model of the class `name` with random weights."""
    cls = getattr(transformers, name)
    return randomise(cls(cls.config_class(**changes)))


def text_model(name: str, **changes: Any) -> Any:
    return model(name, **TEXT, **changes)


@torch.no_grad()
def randomise(model: Any) -> Any:
    """Draw weights whose rows have unlike norms; no bias is zero, and no norm's weight is one."""
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape)
        if parameter.ndim > 1:
            rows = 0.5 + torch.rand(len(parameter), *[1] * (parameter.ndim - 1))
            parameter.copy_(noise * rows * 0.8 / (parameter[0].numel() ** 0.5))
        else:
            parameter.add_(0.1 * noise)
    return model.eval()


@torch.no_grad()
def train(tuned: Any) -> Any:
    """Change the trainable parameters. A trained magnitude stays near the norms of W."""
    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape).to(parameter.dtype)
            if "magnitude" in name:
                parameter.mul_(1 + 0.1 * noise)
            else:
                parameter.add_(0.2 * noise if "lora_" in name else 0.1 * noise)
    return tuned.eval()


def adapt(model: Any, **changes: Any) -> Any:
    """Return a PEFT model with a trained DoRA adapter."""
    config = {"r": 4, "lora_alpha": 6, "use_dora": True, **changes}
    return train(peft.get_peft_model(model, peft.LoraConfig(**config)))


@torch.no_grad()
def outputs(model: Any, **inputs: Any) -> torch.Tensor:
    """Return the first output: logits, or hidden states of a model without a head."""
    return model(**(inputs or text_inputs(model))).to_tuple()[0].clone()


def text_inputs(model: Any) -> dict[str, torch.Tensor]:
    inputs = {"input_ids": IDS}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = IDS[:, :5]
    return inputs


def reload(folder: Path, name: str | None = None) -> Any:
    """Load a folder in float32, by the class `name` or by the class that its config.json names."""
    if name is None:
        (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    return getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()


def peft_trial(
    folder: Path,
    make: Callable[[], Any],
    inputs: Callable[[Any], dict[str, Any]] = text_inputs,
    **changes: Any,
) -> Trial:
    """Save a base and an adapter; the right merge is PEFT's `merge_and_unload`."""
    base = make()
    base.save_pretrained(folder / "base")
    tuned = adapt(base, **changes)
    return finish(folder, tuned, inputs)


def finish(
    folder: Path,
    tuned: Any,
    inputs: Callable[[Any], dict[str, Any]] = text_inputs,
    save: dict[str, Any] | None = None,
) -> Trial:
    """Save the adapter, then PEFT's merge of it, and return the trial."""
    wanted = outputs(tuned, **inputs(tuned.base_model.model))
    tuned.save_pretrained(folder / "adapter", **(save or {}))
    merged = tuned.merge_and_unload()
    merged.save_pretrained(folder / "right")
    load = functools.partial(reload, name=type(merged).__name__)
    return Trial(
        folder / "base",
        folder / "adapter",
        read_tensors(folder / "right"),
        lambda out: outputs(merged := load(out), **inputs(merged)),
        wanted,
    )
