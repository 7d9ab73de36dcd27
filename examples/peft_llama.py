"""Train a small Llama with PEFT's DoRA and `doraxp.torch.accelerate`, then merge.

    python examples/peft_llama.py

The weights are random, so no file is needed. The model learns to count in steps of three.
"""

import peft
import torch
import transformers

from doraxp.torch import accelerate


def main():
    """Train the adapters, then compare the merged model with them."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 256,
             "initializer_range": 0.1}  # fmt: skip
    llama = transformers.LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=4)
    config = peft.LoraConfig(r=8, lora_alpha=16, use_dora=True, target_modules="all-linear")
    model = peft.get_peft_model(transformers.LlamaForCausalLM(llama), config)
    handle = accelerate(model)  # the one line that PEFT's own training does not have
    print(f"layers accelerated: {len(handle.layers)}, left to PEFT: {len(handle.left)}")

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(100):
        ids = (torch.randint(64, (16, 1)) + 3 * torch.arange(12)) % 64
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (0, 99):
            print(f"loss at step {step}: {loss.item():.3f}")

    with torch.no_grad():
        adapted = model(input_ids=ids).logits
        merged = model.merge_and_unload()(input_ids=ids).logits
    print(f"merged: {(merged - adapted).abs().max() / adapted.abs().max():.0e} off")


if __name__ == "__main__":
    main()
