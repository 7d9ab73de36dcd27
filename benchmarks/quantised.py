"""Measure merges into quantised models, or write such a model.

    python benchmarks/quantised.py FOLDER [--gigabytes 4] [--formats fp8 nf4 int4 mlx]
    python benchmarks/quantised.py FOLDER --updates
    python benchmarks/quantised.py FOLDER --write nf4 --gigabytes 0.001 --width 256

The first command writes a model of each format to FOLDER, with random codes and an adapter for all
linear layers, and merges into it with `doraxp merge`. It needs an idle machine and 20 GB free in
FOLDER. The exit status is 1 if a goal is missed. The second one prints how much of an update is
left after quantising again: `kept` and `cosine` of a matrix (1024, 1024) of normal numbers, by the
size of the update as a part of the weight (root mean square). The third one writes `base` and
`adapter` alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import dated
import ml_dtypes
import numpy as np
import safetensors
from checkpoint import IMPORTS, MERGE, MIB, met, resident, timed
from checkpoint_model import linear_shapes

from doraxp import AdaptedLayer, Adapter, Config, LayerKind
from doraxp.checkpoint import Change, Options, open_model, plan_merge, run_merge, save_adapters

ROUNDS, BLOCK = 3, 128
RANK, SHARD = 16, 1 << 30
UPDATES, NAME, SIDE = (1e-1, 1e-2, 1e-3, 1e-4), "model.layers.0.q_proj", 1024
QUANTISED = "Quantised models"
"""The case of the figures here, on the page of merges."""
CONFIGS = {
    "fp8": {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "fmt": "e4m3"},
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int4": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "int", "symmetric": True, "group_size": 32,
                            "strategy": "group"},
            }
        },
    },
    "mlx": None,
}  # fmt: skip
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022833334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip
"""The numbers of nf4: arXiv:2305.14314, appendix E."""


def main() -> int:
    """Print each measured value with its goal and a verdict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=4)
    parser.add_argument("--formats", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--targets", nargs="+", default=["bf16", "same"])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--updates", action="store_true")
    parser.add_argument("--write", choices=CONFIGS)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    arguments = parser.parse_args()
    folder, good = arguments.folder, []
    if arguments.write:
        write(folder, arguments.write, arguments.gigabytes, arguments.width)
        return 0
    for name in arguments.formats:
        if arguments.updates:
            print_updates(folder / name, name)
            continue
        write(folder / name, name, arguments.gigabytes, arguments.width)
        for target in arguments.targets:
            good += measure(folder / name, name, target, arguments.jobs)
        shutil.rmtree(folder / name)
    dated.write(arguments.json)
    return 0 if all(good) else 1


def print_updates(folder: Path, name: str) -> None:
    """Print how much of an update is left when a weight is quantised again."""
    rng = np.random.default_rng(0)
    tensors = stored(name, NAME, SIDE, SIDE, rng)
    (folder / "codes").mkdir(parents=True)
    save(folder / "codes" / "model.safetensors", tensors, name)
    write_config(folder / "codes", name)
    options = Options(targets="same")
    weight = np.float32(0.02) * rng.standard_normal((SIDE, SIDE), np.float32)
    a, b = np.eye(SIDE, dtype=np.float32), weight - read(folder / "codes")
    merge_one(folder, "codes", a, b, np.linalg.norm(weight, axis=1), options, "base")
    weight = read(folder / "base")
    for update in UPDATES:
        a = rng.standard_normal((RANK, SIDE), np.float32)
        b = np.float32(0.02 * update / RANK**0.5) * rng.standard_normal((SIDE, RANK), np.float32)
        m = np.linalg.norm(weight + b @ a, axis=1)
        change = merge_one(folder, "base", a, b, m, options, f"out-{update}")
        print(f"{name:6}{update:8.0e}  kept {change.kept:6.3f}  cosine {change.cosine:6.3f}")
    shutil.rmtree(folder)


def merge_one(
    folder: Path, base: str, a: np.ndarray, b: np.ndarray, m: np.ndarray, options: Options, out: str
) -> Change:
    """Merge an adapter into the one weight of a model, and return the change."""
    layer = AdaptedLayer(Adapter(a, b, m), Config(len(a)), LayerKind(), (SIDE, SIDE))
    save_adapters(folder / f"adapter-{out}", {NAME: layer})
    plan = plan_merge(folder / base, folder / f"adapter-{out}", options)
    (change,) = run_merge(plan, folder / out).values()
    return change


def read(folder: Path) -> np.ndarray:
    """Return the one weight of a model, dequantised."""
    source = open_model(folder).sources()[f"{NAME}.weight"]
    return np.asarray(source.read()).astype(np.float32)


def measure(folder: Path, name: str, target: str, jobs: int) -> Iterator[bool]:
    """Compare time with that of `cp` of the written bytes, and memory with that of the imports."""
    out = folder / "out"
    command = [*MERGE, str(folder / "base"), str(folder / "adapter"), "--out", str(out),
               "--targets", target, "--jobs", str(jobs)]  # fmt: skip
    status = subprocess.run(
        [sys.executable, "-c", IMPORTS], check=True, capture_output=True, text=True
    )
    times: dict[str, list[float]] = {"merge": [], "cp": []}
    peak = 0
    for _ in range(ROUNDS):
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            peak = max(peak, resident(Path(f"/proc/{process.pid}/status").read_text()))
            time.sleep(0.01)
        times["merge"].append(time.perf_counter() - start)
        copy = ["cp", "-r", str(out), str(folder / "copy")]
        times["cp"].append(timed(copy))
        shutil.rmtree(folder / "copy")
        shutil.rmtree(out)
    for way, seconds in times.items():
        print(f"{name} {target} {way}: {', '.join(f'{one:.1f}' for one in seconds)} s")
    ours, copy_time = (statistics.median(times[way]) for way in ("merge", "cp"))
    if target == "bf16":
        yield met(f"{name}, --targets bf16: time ÷ cp of OUT", ours / copy_time, 4, case=QUANTISED)
    else:
        print(f"{name}, --targets {target}: time ÷ cp of OUT {ours / copy_time:.2f}")
    beyond = (peak - resident(status.stdout)) / MIB
    what = f"{name}, --targets {target}: memory beyond the imports, MiB"
    yield met(what, beyond, 100, case=QUANTISED)


def write(folder: Path, name: str, gigabytes: float, width: int) -> None:
    """Write the base in shards of 1 GiB, and the adapter."""
    rng = np.random.default_rng(0)
    base = folder / "base"
    base.mkdir(parents=True)
    layers: dict[str, AdaptedLayer] = {}
    shard: dict[str, np.ndarray] = {}
    shards: dict[str, str] = {}
    written = size = number = 0
    while written < gigabytes * 1e9:
        for module, (out, inner) in linear_shapes(width).items():
            path = f"model.layers.{number}.{module}"
            tensors = stored(name, path, out, inner, rng)
            shard |= tensors
            size += sum(one.nbytes for one in tensors.values())
            layers[path] = adapter(out, inner, rng)
        number += 1
        if size >= SHARD or written + size >= gigabytes * 1e9:
            file = f"model-{len(set(shards.values())):05}.safetensors"
            save(base / file, shard, name)
            shards |= dict.fromkeys(shard, file)
            written, size, shard = written + size, 0, {}
    index = {"metadata": {"total_size": written}, "weight_map": shards}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    write_config(base, name)
    save_adapters(folder / "adapter", layers)


def write_config(base: Path, name: str) -> None:
    """Write the configuration of a model of a format."""
    config: dict[str, object] = {"model_type": "llama", "dtype": "bfloat16"}
    quantised = CONFIGS[name]
    if quantised is None:
        quantised = {"group_size": 64, "bits": 4, "mode": "affine"}
        config["quantization"] = quantised
    config["quantization_config"] = quantised
    (base / "config.json").write_text(json.dumps(config))


def adapter(out: int, inner: int, rng: np.random.Generator) -> AdaptedLayer:
    """Return an adapter with random factors and the norms of its weight."""
    a = rng.standard_normal((RANK, inner), np.float32) * np.float32(0.02)
    b = rng.standard_normal((out, RANK), np.float32) * np.float32(0.02)
    m = np.full(out, 0.02 * inner**0.5, np.float32)
    return AdaptedLayer(Adapter(a, b, m), Config(rank=RANK), LayerKind("linear"), (out, inner))


def stored(
    name: str, path: str, out: int, inner: int, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Return the tensors of one weight with random codes, of about the usual size."""
    octets = rng.integers(0, 256, (out, inner if name == "fp8" else inner // 2), np.uint8)
    weight = f"{path}.weight"
    if name == "fp8":
        octets &= 0xBF  # below 2, so that no code is NaN
        grid = (out // BLOCK, inner // BLOCK)
        return {weight: octets, f"{weight}_scale_inv": np.full(grid, 0.02, np.float32)}
    if name == "nf4":
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [out, inner]}
        text = np.frombuffer(json.dumps(state).encode(), np.uint8)
        return {
            weight: octets.reshape(-1, 1),
            f"{weight}.absmax": np.full(out * inner // 64, 0.05, np.float32),
            f"{weight}.quant_map": np.array(NF4, np.float32),
            f"{weight}.quant_state.bitsandbytes__nf4": text,
        }
    groups = inner // (32 if name == "int4" else 64)
    scales = np.full((out, groups), 0.005, ml_dtypes.bfloat16)
    if name == "int4":
        return {
            f"{path}.weight_packed": octets.view(np.int32),
            f"{path}.weight_scale": scales,
            f"{path}.weight_shape": np.array([out, inner], np.int64),
        }
    return {
        weight: octets.view(np.uint32),
        f"{path}.scales": scales,
        f"{path}.biases": (scales.astype(np.float32) * -8).astype(ml_dtypes.bfloat16),
    }


def save(file: Path, tensors: dict[str, np.ndarray], name: str) -> None:
    """Write a shard, the wider dtypes first."""
    order = dict(sorted(tensors.items(), key=lambda item: -item[1].itemsize))
    entries = {
        tensor: safetensors.TensorSpec(
            dtype="float8_e4m3fn" if name == "fp8" and array.dtype == "u1" else str(array.dtype),
            shape=array.shape,
            data_ptr=array.ctypes.data,
            data_len=array.nbytes,
        )
        for tensor, array in order.items()
    }
    safetensors.serialize_file(entries, file, {"format": "pt"})


if __name__ == "__main__":
    sys.exit(main())
