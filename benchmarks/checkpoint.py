"""Measure `doraxp merge` against the project's goals: `python benchmarks/checkpoint.py FOLDER`.

It needs an idle machine, with PEFT installed, 20 GB free in FOLDER and 16 GB of memory. It
writes two models of `checkpoint_model.py` to FOLDER, one of 4 GB in bfloat16 and one of 1 GB in
float32, and keeps them for the next run. The exit status is 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import checkpoint_model
import dated
import ml_dtypes  # noqa: F401  makes NumPy know bfloat16
import numpy as np
from safetensors import safe_open

from doraxp import LowRank, UpdateAdapter
from doraxp.checkpoint import AdaptedLayer, UpdatedLayer, load_adapters, save_adapters

ROUNDS, KILLS = 3, 50
MIB = 1 << 20
DENSE = "Dense models"
"""The case of the figures here, on the page of merges."""
MERGE = [sys.executable, "-m", "doraxp", "merge"]
IMPORTS = "import doraxp.checkpoint, rich.progress; print(open('/proc/self/status').read())"
PEFT = """
import sys, time
import peft, torch, transformers
base, adapter, out, dtype = sys.argv[1:]
start = time.perf_counter()
model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
model = peft.PeftModel.from_pretrained(model, adapter)
model.merge_and_unload().save_pretrained(out)
print(time.perf_counter() - start)
"""


def main() -> int:
    """Print each measured value with its goal and a verdict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=4)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    folder, gigabytes, path = vars(parser.parse_args()).values()
    large, wide, small = (folder / name for name in ("bfloat16", "float32", "small"))
    if not large.exists():
        checkpoint_model.write(large, gigabytes)
        checkpoint_model.write(wide, gigabytes / 4, width=1024, dtype="float32")
        checkpoint_model.write(small, gigabytes / 20, width=1024)
    write_plain(large)
    good = [*speed(large), *memory(large), *accuracy(large, "bfloat16"), *accuracy(wide, "float32")]
    good += kills(small)
    dated.write(path)
    return 0 if all(good) else 1


def met(
    figure: str, value: float, bound: float, *, at_least: bool = False, case: str = DENSE
) -> bool:
    """Print a line about one goal; return True if it is met."""
    good = value >= bound if at_least else value <= bound
    dated.note(figure, value=value, goal=bound, at_least=at_least, case=case)
    sign, verdict = "≥" if at_least else "≤", "ok" if good else "MISSED"
    print(f"{figure:60} {value:9.6g}  goal {sign} {bound:<6g} {verdict}", flush=True)
    return good


def speed(model: Path) -> Iterator[bool]:
    """Compare the time with those of `cp -r` and PEFT: medians of interleaved rounds."""
    ways: dict[str, Callable[[], float]] = {
        "cp -r": lambda: timed(["cp", "-r", str(model / "base"), str(model / "out")]),
        "doraxp merge": lambda: timed(merge_command(model)),
        "plain LoRA": lambda: timed(merge_command(model, "lora")),
        "a sum": lambda: timed(sum_command(model)),
        "PEFT": lambda: peft(model, "bfloat16"),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, run in ways.items():
            for file in (model / "base").iterdir():
                file.read_bytes()  # the files are in the system's cache for each way
            subprocess.run(["sync"], check=True)
            times[name].append(run())
            shutil.rmtree(model / "out")
    for name, seconds in times.items():
        print(f"{name:12} seconds: {', '.join(f'{one:.1f}' for one in seconds)}")
        dated.note(
            f"{name}: seconds", value=statistics.median(seconds), seconds=seconds, case=DENSE
        )
    copy, ours, plain, both, theirs = map(statistics.median, times.values())
    size = sum(file.stat().st_size for file in (model / "base").iterdir())
    print(f"bytes per second: {size / ours / 1e9:.2f} GB")
    yield met("time ÷ cp -r", ours / copy, 3)
    yield met("plain LoRA: time ÷ cp -r", plain / copy, 3)
    print(f"{'a sum of both adapters: time ÷ cp -r':60} {both / copy:9.6g}")
    dated.note("a sum of both adapters: time ÷ cp -r", value=both / copy, case=DENSE)
    yield met(
        "time of PEFT (load, merge, save; no imports) ÷ ours", theirs / ours, 3, at_least=True
    )


def write_plain(model: Path) -> None:
    """Write the factors of `adapter` as plain LoRA, beside it."""
    if not (model / "lora").exists():
        layers = {}
        for path, layer in load_adapters(model / "adapter").items():
            a, b, _ = layer.adapter
            own = UpdateAdapter(LowRank(a, b))
            layers[path] = UpdatedLayer(own, layer.config, layer.kind, layer.shape)
        save_adapters(model / "lora", layers)


def merge_command(model: Path, adapter: str = "adapter") -> list[str]:
    """Return the command that merges `model`."""
    paths = [str(model / name) for name in ("base", adapter, "out")]
    return [*MERGE, *paths[:2], "--out", paths[2]]


def sum_command(model: Path) -> list[str]:
    """Return the command that adds parts of the changes by both adapters."""
    both = [f"--adapter={model / 'adapter'}:0.7", f"--adapter={model / 'lora'}:0.4"]
    return [*MERGE, str(model / "base"), *both, "--out", str(model / "out")]


def timed(command: list[str]) -> float:
    """Run a command and return its seconds."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def peft(model: Path, dtype: str) -> float:
    """Merge with PEFT into `out`; return its seconds without those of the imports."""
    paths = [str(model / name) for name in ("base", "adapter", "out")]
    command = [sys.executable, "-c", PEFT, *paths, dtype]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def memory(model: Path) -> Iterator[bool]:
    """Compare the peak of memory with that of the imports alone. This needs Linux."""
    status = subprocess.run(
        [sys.executable, "-c", IMPORTS], check=True, capture_output=True, text=True
    )
    process = subprocess.Popen(merge_command(model), stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, resident(Path(f"/proc/{process.pid}/status").read_text()))
        time.sleep(0.01)
    shutil.rmtree(model / "out")
    print(f"peak memory {peak / MIB:.0f} MiB")
    yield met("peak memory beyond the imports, MiB", (peak - resident(status.stdout)) / MIB, 60)


def resident(status: str) -> int:
    """Return the highest resident memory so far, in bytes, from the text of a process's status."""
    lines = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(lines[0].split()[1]) * 1024 if lines else 0


def accuracy(model: Path, dtype: str) -> Iterator[bool]:
    """Compare every merged tensor with PEFT's and with a dense merge in float64."""
    peft(model, dtype)
    (model / "out").rename(model / "peft")
    timed(merge_command(model))
    adapters = load_adapters(model / "adapter")
    differences, ratios = [], []
    for path, layer in adapters.items():
        base, ours, theirs = (tensor(model / name, path) for name in ("base", "out", "peft"))
        exact = dense(base, layer)
        differences.append(np.abs(ours - theirs).max() / np.abs(theirs).max())
        ratios.append(np.abs(ours - exact).max() / np.abs(theirs - exact).max())
    shutil.rmtree(model / "out")
    shutil.rmtree(model / "peft")
    if dtype == "float32":
        yield met(
            f"difference from PEFT's, {dtype}, largest of {len(ratios)}", max(differences), 1e-6
        )
    yield met(f"error beside float64 ÷ PEFT's, {dtype}, largest", max(ratios), 1)


def tensor(folder: Path, path: str) -> np.ndarray:
    """Return the weight of a module, in float64, from a model's folder."""
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "numpy") as opened:
            if f"{path}.weight" in opened.keys():  # noqa: SIM118  not a mapping
                return opened.get_tensor(f"{path}.weight").astype(np.float64)
    raise KeyError(path)


def dense(weight: np.ndarray, layer: AdaptedLayer) -> np.ndarray:
    """Return the merged weight by the formula, in float64."""
    a, b, m = (leaf.astype(np.float64) for leaf in layer.adapter)
    v = weight + layer.config.scaling * (b @ a)
    return m[:, None] * v / np.linalg.norm(v, axis=1, keepdims=True)


def kills(model: Path) -> Iterator[bool]:
    """Kill merges at random moments: each must leave no OUT or a complete one."""
    whole = timed(merge_command(model))
    right = digests(model / "out")
    shutil.rmtree(model / "out")
    rng, complete, wrong = np.random.default_rng(0), 0, 0
    for delay in 1.2 * whole * rng.random(KILLS):
        process = subprocess.Popen(merge_command(model), stdout=subprocess.DEVNULL)
        killer = threading.Timer(delay, process.kill)
        killer.start()
        process.wait()
        killer.cancel()
        if (model / "out").exists():
            complete += 1
            wrong += digests(model / "out") != right
            shutil.rmtree(model / "out")
    print(f"killed {KILLS} times: {complete} left a complete OUT, {KILLS - complete} no OUT")
    dated.note(f"killed {KILLS} times: left a complete OUT", value=complete, case=DENSE)
    yield met("OUT that is wrong or incomplete", wrong, 0)


def digests(folder: Path) -> dict[str, str]:
    """Return a digest of each file in a folder."""
    return {file.name: sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


if __name__ == "__main__":
    sys.exit(main())
