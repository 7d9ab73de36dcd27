"""Convolutions and embeddings with DoRA: the time of a call, divided by that of another.

    OMP_NUM_THREADS=2 OPENBLAS_NUM_THREADS=2 python benchmarks/operators.py --threads 1 2

The convolution has 64 channels in and out, a kernel of 3×3, and x of 16×64×32×32; the embedding a
table of 30,000×384 and 512 ids; both rank 8, in float32. A step is a forward and a backward with a
frozen base and an adapter that has changed since the last step. The two calls of a line take turns
in one process, and a ratio is taken in each round; the table has the medians. Needs PyTorch and
PEFT. The exit status is 1 if an accelerated step takes more than its goal.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import dated
import numpy as np
import peft
import threadpoolctl
import torch

import doraxp
from doraxp import Adapter, Config, Convolution, Embedding
from doraxp.torch import accelerate

BATCH, CHANNELS, SIZE, KERNEL = 16, 64, 32, 3
TOKENS, DIM, IDS = 30_000, 384, 512
RANK, ROUNDS, GOAL = 8, 25, 0.75


class Pair(NamedTuple):
    """Two calls, of which the first is divided by the second."""

    name: str
    ours: Callable[[], object]
    other: Callable[[], object]
    reset: Callable[[], object] = lambda: None
    """Changes the adapter before a call of `ours`. It is not measured."""
    goal: float | None = None


class Times(NamedTuple):
    """Median seconds of both calls, and the median of the ratios of the rounds."""

    ours: float
    other: float
    ratio: float


def main() -> int:
    """Print the tables; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    arguments = parser.parse_args()
    met = True
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        with threadpoolctl.threadpool_limits(threads, "blas"):
            met &= show(threads, arguments.rounds)
    dated.write(arguments.json)
    return 0 if met else 1


def show(threads: int, rounds: int) -> bool:
    """Print a line for each pair; return whether each ratio is within its goal."""
    print(f"{threads} thread{'s' * (threads > 1)}")
    print(f"  {'':64} {'ms':>8} {'÷ ms':>8} {'ratio':>6}")
    met = True
    for pair in (*of_convolution(), *of_embedding()):
        times = measured(pair, rounds)
        line = f"  {pair.name:64} {1e3 * times.ours:8.2f} {1e3 * times.other:8.2f}"
        line += f" {times.ratio:6.2f}"
        if pair.goal is not None:
            is_met = times.ratio <= pair.goal
            met &= is_met
            line += f"   ≤ {pair.goal}  {'ok' if is_met else 'MISSED'}"
        print(line, flush=True)
        case = f"{threads} thread{'s' * (threads > 1)}"
        dated.note(
            pair.name.strip(), value=times.ratio, goal=pair.goal, case=case, **times._asdict()
        )
    return met


def measured(pair: Pair, rounds: int) -> Times:
    """Call both in turns, and return the medians. The first two rounds do not count."""
    ours, other = [], []
    gc.collect()
    for _ in range(rounds + 2):
        pair.reset()
        ours.append(seconds(pair.ours))
        other.append(seconds(pair.other))
    ratios = [a / b for a, b in zip(ours[2:], other[2:], strict=True)]
    return Times(*map(statistics.median, (ours[2:], other[2:], ratios)))


def seconds(call: Callable[[], object]) -> float:
    """Return the time of a call, with that of freeing its results."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def of_convolution() -> Iterator[Pair]:
    """Yield the pairs of the convolution."""
    rng = np.random.default_rng(0)
    shape = BATCH, CHANNELS, SIZE, SIZE
    x, dy = (rng.standard_normal(shape, dtype=np.float32) for _ in range(2))
    base = torch.nn.Conv2d(CHANNELS, CHANNELS, KERNEL, padding=KERNEL // 2)
    theirs = peft_step(base, torch.from_numpy(x).requires_grad_(), torch.from_numpy(dy))
    yield from accelerated("convolution", theirs)

    weight = base.weight.detach().numpy()
    operator, config = Convolution(padding=KERNEL // 2), Config(RANK)
    forward_and_backward = core_step(x, dy, weight, config, operator, base.bias)

    def bare() -> object:
        return operator.apply(x, weight), operator.transpose(dy, weight, x.shape)

    def bare_training() -> object:
        return bare(), operator.weight_gradient(dy, x, weight.shape)

    yield Pair("NumPy's DoRA convolution ÷ its bare convolution", forward_and_backward, bare)
    yield Pair("  ÷ the same with the weight's gradient", forward_and_backward, bare_training)
    yield Pair("PEFT's DoRA convolution ÷ NumPy's", theirs.call, forward_and_backward)


def of_embedding() -> Iterator[Pair]:
    """Yield the pairs of the embedding."""
    rng = np.random.default_rng(0)
    ids, dy = rng.integers(0, TOKENS, IDS), rng.standard_normal((IDS, DIM), dtype=np.float32)
    base = torch.nn.Embedding(TOKENS, DIM)
    theirs = peft_step(base, torch.from_numpy(ids), torch.from_numpy(dy))
    yield from accelerated("embedding", theirs)

    weight, config, operator = base.weight.detach().numpy(), Config(RANK), Embedding()
    adapter = trained(doraxp.init(weight, config, seed=0, kind=operator.kind))
    prepared = doraxp.prepare(weight, adapter, config, kind=operator.kind)

    def forward() -> object:
        return doraxp.forward(ids, weight, adapter, config, prepared=prepared, operator=operator)

    yield Pair("NumPy's DoRA embedding, norm prepared ÷ weight[ids]", forward, lambda: weight[ids])


class Step(NamedTuple):
    """A step of a layer of PEFT's, and the same layer accelerated."""

    call: Callable[[], object]
    accelerated: Callable[[str], tuple[Callable[[], object], Callable[[], object]]]
    """Returns the step for a gradient of the norm, and the change of its adapter."""


def peft_step(base: torch.nn.Module, x: torch.Tensor, dy: torch.Tensor) -> Step:
    """Return the steps of PEFT's DoRA layer around a base."""
    options: dict[str, Any] = {"r": RANK, "use_dora": True, "target_modules": ["0"]}

    def layer() -> Any:
        config = peft.LoraConfig(init_lora_weights=False, **options)
        return peft.get_peft_model(torch.nn.Sequential(base), config).base_model.model[0]

    def step_of(made: Any) -> Callable[[], object]:
        inputs = [p for p in made.parameters() if p.requires_grad]
        if x.requires_grad:
            inputs.append(x)
        return lambda: torch.autograd.grad(made(x), inputs, dy)

    def accelerated(norm_gradient: str) -> tuple[Callable[[], object], Callable[[], object]]:
        made = layer()
        accelerate(made, norm_gradient)
        (leaf, *_) = (p for p in made.parameters() if p.requires_grad)

        def change() -> None:
            with torch.no_grad():
                leaf.neg_()

        return step_of(made), change

    return Step(step_of(layer()), accelerated)


def accelerated(name: str, theirs: Step) -> Iterator[Pair]:
    """Yield PEFT's step accelerated ÷ PEFT's, with both gradients of the norm."""
    for norm_gradient in ("exact", "detached"):
        ours, change = theirs.accelerated(norm_gradient)
        title = f"PEFT's DoRA {name} accelerated, {norm_gradient} ÷ PEFT's"
        yield Pair(title, ours, theirs.call, change, GOAL)


def core_step(
    x: Any, dy: Any, weight: Any, config: Config, operator: Any, bias: torch.Tensor | None
) -> Callable[[], object]:
    """Return a step of the core on NumPy, which has an earlier ‖w‖²."""
    adapter = trained(doraxp.init(weight, config, seed=0, kind=operator.kind))
    known = doraxp.prepare(weight, adapter, config, kind=operator.kind)
    wide = None if bias is None else bias.detach().numpy()

    def call() -> object:
        _, cache = doraxp.forward(
            x, weight, adapter, config, bias=wide, previous=known, operator=operator
        )
        return doraxp.backward(dy, cache)

    return call


def trained(adapter: Adapter) -> Adapter:
    """Return an adapter with a B that is not 0."""
    b = 0.1 * np.random.default_rng(1).standard_normal(adapter.lora_b.shape, dtype=np.float32)
    return adapter._replace(lora_b=b)


if __name__ == "__main__":
    sys.exit(main())
