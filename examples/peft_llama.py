"""Train a small Llama with PEFT's DoRA and `doraxp.torch.accelerate`, then merge.

    python examples/peft_llama.py

The weights are random, so no file is needed. The model learns to count in steps of three.
"""

from __future__ import annotations

import peft
import torch
import transformers

from doraxp.torch import accelerate


def main(steps=100):
    """Train the adapters, then compare the merged model with them."""
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
            num_attention_heads=4, initializer_range=0.1,
        )
    )  # fmt: skip
    config = peft.LoraConfig(r=8, lora_alpha=16, use_dora=True, target_modules="all-linear")
    model = peft.get_peft_model(base, config)
    handle = accelerate(model)  # the one line that PEFT's own training does not have
    print(f"layers accelerated: {len(handle.layers)}, left to PEFT: {len(handle.left)}")

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for step in range(steps):
        ids = (torch.randint(64, (16, 1)) + 3 * torch.arange(12)) % 64
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (0, steps - 1):
            print(f"loss at step {step}: {loss.item():.3f}")

    with torch.no_grad():
        adapted = model(input_ids=ids).logits
        merged = model.merge_and_unload()(input_ids=ids).logits
    print(f"merged: {(merged - adapted).abs().max() / adapted.abs().max():.0e} off")


if __name__ == "__main__":
    main()
