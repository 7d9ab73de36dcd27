"""Check a merge of DoRA into fused experts against the golden files beside this one.

    python examples/experts/check.py [MERGED.safetensors]

MERGED is the merge of `adapter` into `base.safetensors` by another program; without it the formula
below is compared with `merged.safetensors`. It needs NumPy alone. docs/howto/experts.md describes
the files. The exit status is 1 where a number is wrong.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
PREFIX = "base_model.model."


def read(path):
    """Return the header's metadata and the tensors of a safetensors file, in float64."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    metadata, tensors = header.pop("__metadata__", {}), {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        numbers = np.frombuffer(raw[start + first : start + last], {"F32": "<f4"}[entry["dtype"]])
        tensors[name] = numbers.reshape(entry["shape"]).astype(np.float64)
    return metadata, tensors


def merged_by_formula():
    """Return W' of all parameters of experts, expert by expert."""
    _, base = read(HERE / "base.safetensors")
    metadata, adapter = read(HERE / "adapter" / "adapter_model.safetensors")
    config = json.loads((HERE / "adapter" / "adapter_config.json").read_text("utf-8"))
    layout = json.loads(metadata["doraxp"])["experts"]
    assert layout["version"] == 1
    s = config["lora_alpha"] / config["r"]
    for name, kind in layout["modules"].items():
        ends = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
        stacks = [adapter[f"{PREFIX}{name}.{end}"] for end in ends]
        for e, (a, b, m) in enumerate(zip(*stacks, strict=True)):
            stored = base[name][e]
            w = stored.T if kind == "transposed_experts" else stored  # (out, in)
            v = w + s * b @ a
            new = (m / np.linalg.norm(v, axis=1))[:, None] * v
            base[name][e] = new.T if kind == "transposed_experts" else new
    return base


def main():
    """Compare; return the exit status."""
    golden = HERE / "merged.safetensors"
    _, right = read(golden)
    found = read(Path(sys.argv[1]))[1] if len(sys.argv) > 1 else merged_by_formula()
    wrong = [
        name
        for name, tensor in right.items()
        if name not in found
        or found[name].shape != tensor.shape
        or not (np.abs(found[name] - tensor) <= 1e-6 * np.abs(tensor).max()).all()
    ]
    print(f"{len(right)} tensors: {len(wrong)} are wrong", *wrong)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
