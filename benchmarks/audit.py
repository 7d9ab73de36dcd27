"""Audit merged models with planted faults, and time it: `python benchmarks/audit.py FOLDER`.

It writes small models of each kind of layer, dtype and size of the update, with one fault in each,
and a model of 1 GB for the time (`--gigabytes`). With PEFT installed, PEFT's own merges are audited
too. The exit status is 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import checkpoint_model
import dated
import ml_dtypes  # noqa: F401  makes NumPy know bfloat16
import numpy as np
from safetensors.numpy import save_file

from doraxp import AdaptedLayer, Adapter, Config, LayerKind
from doraxp.checkpoint import Options, audit, plan_merge, run_merge, save_adapters

ROUNDS = 5
MIB = 1 << 20
IMPORTS = "import doraxp.checkpoint, rich.progress; print(open('/proc/self/status').read())"
DTYPES = ("float32", "bfloat16", "float16")
UPDATES = (0.3, 3e-3, 3e-4)
"""Sizes of the update, as parts of the weight."""
RANK, ALPHA = 4, 12.0
KINDS = {
    "linear": LayerKind(),
    "square": LayerKind(),
    "conv": LayerKind("conv"),
    "embed_tokens": LayerKind("embedding"),
}
SHAPES = {
    "linear": (96, 80),
    "square": (72, 72),
    "conv": (48, 10, 3, 2),
    "embed_tokens": (150, 64),
    "c_attn": (64, 120),
    "c_proj": (80, 80),
}
GPT = {"c_attn": LayerKind("transposed"), "c_proj": LayerKind("transposed")}
FAULTS = {
    "unchanged": "unchanged",
    "no m": "plain LoRA",
    "twice": "merged twice",
    "s²": "scaled by s²",
    "α": "α instead of s",
    "base norm": "base norm",
    "other": "another adapter",
}
"""The faults of any weight, and the verdict that names each."""


class Model(NamedTuple):
    """A base, its adapters, and what a merge computes in."""

    tensors: dict[str, np.ndarray]
    layers: dict[str, AdaptedLayer]
    dtype: str


def model(kinds: Mapping[str, LayerKind], dtype: str, update: float, seed: int = 0) -> Model:
    """Return a base of one layer of each kind, with adapters whose update has a given size."""
    rng = np.random.default_rng(seed)
    tensors, layers = {}, {}
    for name, kind in kinds.items():
        shape = SHAPES[name]
        weight = (0.05 * rng.standard_normal(shape)).astype(dtype)
        matrix = np.asarray(kind.matrix(weight.astype(np.float64)))
        out, inner = matrix.shape
        a = rng.standard_normal((RANK, inner)) / inner**0.5
        b = rng.standard_normal((out, RANK))
        b *= update * np.linalg.norm(matrix) / (ALPHA / RANK * np.linalg.norm(b @ a))
        m = np.linalg.norm(matrix, axis=1) * (1 + update * rng.standard_normal(out))
        adapter = Adapter(*(leaf.astype(np.float32) for leaf in (a, b, m)))
        path = f"model.{name}"
        layers[path] = AdaptedLayer(adapter, Config(RANK, ALPHA), kind, shape)
        tensors[f"{path}.weight"] = weight
        if kind.name != "embedding":
            tensors[f"{path}.bias"] = rng.standard_normal(out).astype(dtype)
    tensors["model.norm.weight"] = (1 + 0.1 * rng.standard_normal(30)).astype(dtype)
    return Model(tensors, layers, dtype)


def merged(one: Model, path: str, fault: str = "", *, steps: bool = False) -> np.ndarray:
    """Return a merged weight, right or with a fault.

    With `steps`, every step of the merge is rounded to the dtype of the weight.
    """
    layer, stored = one.layers[path], one.tensors[f"{path}.weight"]
    weight = np.asarray(layer.kind.matrix(stored.astype(np.float64)))
    adapter, s = layer.adapter, ALPHA / RANK
    if fault == "unchanged":
        return stored
    if fault == "other":
        adapter = (
            model({path.removeprefix("model."): layer.kind}, one.dtype, size_of(one, path), 1)
            .layers[path]
            .adapter
        )
    s = {"s²": s**2, "α": ALPHA}.get(fault, s)

    def cast(x: np.ndarray) -> np.ndarray:
        return x.astype(one.dtype).astype(np.float64) if steps else x

    a, b, m = (cast(np.asarray(leaf, np.float64)) for leaf in adapter)
    for _ in range(2 if fault == "twice" else 1):
        v = cast(weight + cast(s * cast(b @ a)))
        norm = cast(np.linalg.norm(v, axis=1))
        gain = cast(m / norm)[:, None]
        if fault == "no m":
            gain = np.ones_like(gain)
        elif fault == "base norm":
            gain = cast(m / cast(np.linalg.norm(weight, axis=1)))[:, None]
        elif fault == "axis":
            gain = cast(m / cast(np.linalg.norm(v, axis=0)))[None, :]
        weight = (gain * v).astype(one.dtype).astype(np.float64)
    return np.asarray(layer.kind.restore(weight, stored.shape)).astype(one.dtype)


def size_of(one: Model, path: str) -> float:
    """Return the size of the update of a layer, as a part of its weight."""
    layer = one.layers[path]
    a, b, _ = (np.asarray(leaf, np.float64) for leaf in layer.adapter)
    weight = one.tensors[f"{path}.weight"].astype(np.float64)
    return float(ALPHA / RANK * np.linalg.norm(b @ a) / np.linalg.norm(weight))


def planted(one: Model, *, steps: bool) -> Iterator[tuple[str, str, dict[str, np.ndarray]]]:
    """Yield each fault: its tensor, the verdict that names it, and the tensors of the model."""
    right = dict(one.tensors)
    for path in one.layers:
        right[f"{path}.weight"] = merged(one, path, steps=steps)
    yield "", "", right
    yield "", "", dict(right)
    for path, layer in one.layers.items():
        name, bias = f"{path}.weight", f"{path}.bias"
        for fault, verdict in FAULTS.items():
            yield name, verdict, {**right, name: merged(one, path, fault, steps=steps)}
        if layer.shape == layer.shape[::-1]:
            wrong = merged(one, path, "axis", steps=steps)
            yield name, "norm over the other axis", {**right, name: wrong}
        if len(layer.shape) == 2:
            yield name, "transposed", {**right, name: np.ascontiguousarray(right[name].T)}
        if bias in right:
            matrix = np.asarray(layer.kind.matrix(one.tensors[name].astype(np.float64)))
            a, b, m = (np.asarray(leaf, np.float64) for leaf in layer.adapter)
            gain = m / np.linalg.norm(matrix + ALPHA / RANK * (b @ a), axis=1)
            scaled = (gain * right[bias].astype(np.float64)).astype(one.dtype)
            yield bias, "bias scaled", {**right, bias: scaled}
    norm = "model.norm.weight"
    yield norm, "changed", {**right, norm: right[norm] * right[norm]}
    yield norm, "missing", {name: tensor for name, tensor in right.items() if name != norm}
    yield "model.more.weight", "extra", {**right, "model.more.weight": right[norm]}
    if "model.embed_tokens" in one.layers:
        yield "lm_head.weight", "", {**right, "lm_head.weight": right["model.embed_tokens.weight"]}
        old = one.tensors["model.embed_tokens.weight"]
        yield "lm_head.weight", "tied head changed", {**right, "lm_head.weight": old}


def write_model(folder: Path, tensors: Mapping[str, np.ndarray], shards: int) -> None:
    """Write a model's folder."""
    folder.mkdir()
    names, weight_map = sorted(tensors), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: np.ascontiguousarray(tensors[name]) for name in names[shard::shards]}
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": True}), "utf-8")


def hidden(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> bool:
    """Return whether rounding hides a fault: it changes fewer than 10 numbers of the model."""
    if [(name, one[name].shape) for name in sorted(one)] != [
        (name, other[name].shape) for name in sorted(other)
    ]:
        return False
    return sum(int(np.count_nonzero(one[name] != other[name])) for name in one) < 10


class Count(NamedTuple):
    """The verdicts on planted faults and on right tensors."""

    planted: int = 0
    found: int = 0
    named: int = 0
    right: int = 0
    alarms: int = 0

    def plus(self, **numbers: int) -> Count:
        """Return the sums."""
        return Count(*(one + numbers.get(name, 0) for name, one in self._asdict().items()))


def faults(folder: Path) -> Count:
    """Audit every planted fault; the other tensors of its model are right."""
    count = Count()
    for kinds, dtype, update in itertools.product((KINDS, GPT), DTYPES, UPDATES):
        one = model(kinds, dtype, update)
        write_model(folder / "base", one.tensors, 2)
        save_adapters(folder / "adapter", one.layers)
        merge = plan_merge(folder / "base", folder / "adapter", Options())
        run_merge(merge, folder / "ours")
        count = right(count, merge, folder / "ours", f"ours {dtype} {update:g}")
        for steps in (False,) if dtype == "float32" else (False, True):
            where = f"{dtype} {update:g}{' in steps' if steps else ''}"
            cases = planted(one, steps=steps)
            _, _, whole = next(cases)
            for number, (name, verdict, tensors) in enumerate(cases):
                if not verdict or not hidden(tensors, whole):
                    write_model(folder / "case", tensors, 1 + number % 3)
                    count = judge(count, name, verdict, audit(merge, folder / "case"), where)
                    shutil.rmtree(folder / "case")
        for name in ("base", "adapter", "ours"):
            shutil.rmtree(folder / name)
    return count


def judge(count: Count, name: str, verdict: str, found: Mapping[str, Any], where: str) -> Count:
    """Count one model with at most one fault; print a line for each wrong verdict."""
    if verdict:
        is_found = not found[name].right and found[name].verdict != "kept in part"
        is_named = verdict in found[name].verdict.split(" or ")
        if not is_named:
            print(f"  {where}: {name}: {verdict}, but the audit says {found[name]}")
        count = count.plus(planted=1, found=is_found, named=is_named)
    for other, result in found.items():
        if other != name or not verdict:
            alarm = not result.right and result.verdict != "kept in part"
            if alarm:
                print(f"  {where}: {other}: right, but the audit says {result}")
            count = count.plus(right=1, alarms=alarm)
    return count


def right(count: Count, merge: Any, folder: Path, where: str) -> Count:
    """Count a model without a fault."""
    return judge(count, "", "", audit(merge, folder), where)


def peft_merges(count: Count, folder: Path) -> Count:
    """Audit what PEFT's `merge_and_unload` makes, with adapters in each dtype."""
    import peft
    import torch
    from safetensors.torch import save_file as save_tensors
    from transformers.pytorch_utils import Conv1D

    makers = {
        "linear": lambda: torch.nn.Linear(80, 96),
        "square": lambda: torch.nn.Linear(72, 72),
        "conv": lambda: torch.nn.Conv2d(10, 48, (3, 2)),
        "embed_tokens": lambda: torch.nn.Embedding(150, 64),
        "c_attn": lambda: Conv1D(120, 64),
        "c_proj": lambda: Conv1D(80, 80),
    }
    warnings.simplefilter("ignore")  # PEFT's, on models that are not of transformers
    for names in (("linear", "square", "conv"), ("embed_tokens",), ("c_attn", "c_proj")):
        for dtype, update, own in itertools.product(DTYPES, UPDATES, DTYPES):
            torch.manual_seed(0)
            net = torch.nn.ModuleDict({name: makers[name]() for name in names})
            net = net.to(getattr(torch, dtype))
            case = folder / "peft"
            case.mkdir()
            tensors = {name: tensor.clone() for name, tensor in net.state_dict().items()}
            save_tensors(tensors, case / "base.safetensors")
            config = peft.LoraConfig(
                r=RANK,
                lora_alpha=ALPHA,
                target_modules=list(names),
                use_dora=True,
                fan_in_fan_out="c_attn" in names,
            )
            adapted = peft.get_peft_model(net, config, autocast_adapter_dtype=False)
            with torch.no_grad():
                for name, parameter in adapted.named_parameters():
                    noise = torch.randn_like(parameter, dtype=torch.float32)
                    if "lora_magnitude" in name:
                        noise = (1 + update * noise) * parameter
                    elif "lora_" in name:
                        noise *= 0.1 * update**0.5
                    else:
                        continue
                    parameter.data = noise.to(getattr(torch, own))
            adapted.save_pretrained(case / "adapter")
            whole = adapted.merge_and_unload().state_dict()
            tensors = {name: tensor.contiguous().clone() for name, tensor in whole.items()}
            save_tensors(tensors, case / "merged.safetensors")
            merge = plan_merge(case / "base.safetensors", case / "adapter", Options())
            where = f"PEFT {dtype} {update:g}, adapter in {own}"
            count = right(count, merge, case / "merged.safetensors", where)
            shutil.rmtree(case)
    return count


def speed(folder: Path, gigabytes: float) -> Iterator[bool]:
    """Compare time and memory with those of the merge: medians of interleaved rounds."""
    model = folder / "bfloat16"
    if not model.exists():
        checkpoint_model.write(model, gigabytes)
    base, adapter, ours, other = (str(model / n) for n in ("base", "adapter", "ours", "other"))
    commands = {
        "merge": ["merge", base, adapter, "--out", str(model / "out")],
        "audit of our merge": ["audit", base, adapter, ours],
        "audit of a merge computed in float64": ["audit", base, adapter, other],
    }
    for out, compute in ((ours, "float32"), (other, "float64")):
        if not Path(out).exists():
            run(["merge", base, adapter, "--out", out, "--compute", compute])
    times: dict[str, list[float]] = {name: [] for name in commands}
    peaks = dict.fromkeys(commands, 0.0)
    for _ in range(ROUNDS):
        for name, command in commands.items():
            for file in Path(base).parent.rglob("*.safetensors"):
                file.read_bytes()  # the files are in the system's cache for each command
            subprocess.run(["sync"], check=True)
            seconds, peak = run(command)
            times[name].append(seconds)
            peaks[name] = max(peaks[name], peak)
            shutil.rmtree(model / "out", ignore_errors=True)
    status = subprocess.run(
        [sys.executable, "-c", IMPORTS], check=True, capture_output=True, text=True
    )
    merging = statistics.median(times["merge"])
    for name, seconds in times.items():
        print(f"{name:38} seconds: {', '.join(f'{one:.1f}' for one in seconds)}")
        if name != "merge":
            yield met(f"time of the {name} ÷ merge", statistics.median(seconds) / merging, 1.2)
            beyond = peaks[name] - resident(status.stdout)
            yield met(f"peak memory of the {name} beyond the imports, MiB", beyond / MIB, 60)


def run(command: list[str]) -> tuple[float, float]:
    """Run `doraxp`; return its seconds and its peak of memory in bytes. This needs Linux."""
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(
        [sys.executable, "-m", "doraxp", *command], stdout=subprocess.DEVNULL
    )
    while process.poll() is None:
        peak = max(peak, resident(Path(f"/proc/{process.pid}/status").read_text()))
        time.sleep(0.01)
    if process.returncode:
        raise SystemExit(f"doraxp {' '.join(command)} ended with {process.returncode}")
    return time.perf_counter() - start, peak


def resident(status: str) -> int:
    """Return the highest resident memory so far, in bytes, from the text of a process's status."""
    lines = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(lines[0].split()[1]) * 1024 if lines else 0


def met(figure: str, value: float, bound: float, *, at_least: bool = False) -> bool:
    """Print a line about one goal; return True if it is met."""
    good = value >= bound if at_least else value <= bound
    dated.note(figure, value=value, goal=bound, at_least=at_least)
    sign, verdict = "≥" if at_least else "≤", "ok" if good else "MISSED"
    print(f"{figure:75} {value:9.3g}  goal {sign} {bound:<6g} {verdict}", flush=True)
    return good


def main() -> int:
    """Print each measured value with its goal and a verdict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        count = faults(Path(folder))
        if importlib.util.find_spec("peft") and importlib.util.find_spec("transformers"):
            count = peft_merges(count, Path(folder))
        else:
            print("PEFT is not installed: its merges are not audited")
    print(f"{count.planted} faults, {count.right} right tensors")
    good = [
        met("faults", count.planted, 100, at_least=True),
        met("faults that are not found", count.planted - count.found, 0),
        met("part of the faults that is named", count.named / count.planted, 0.9, at_least=True),
        met("false alarms", count.alarms, 0),
        *speed(arguments.folder, arguments.gigabytes),
    ]
    dated.note("right tensors", value=count.right)
    dated.write(arguments.json)
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
