"""Time whole models with DoRA: PEFT's, and the same model accelerated.

    python benchmarks/models.py [--dtype float32] [--rounds 9] [--threads N] [--json FILE]

A model is a Llama that transformers builds from a config, with random weights. PEFT adapts all its
linear layers except the last. Two models are measured, each in two ways:

    step         forward with the loss, and backward. The optimizer's step before it is not timed:
                 it changes the adapters, so each step computes the norms anew.
    generation   a token with a KV cache, without gradients, in evaluation mode. The prompt, and the
                 first token after it, are not timed.

PEFT and doraxp compute the same model in turn, in one process, in random order; doraxp is swapped
in and out. The base alone, with its adapters disabled, is what both add to. A ratio is taken in
each round, and its median is printed, with the project's goals. The results are compared before
anything is timed. The exit status is 1 if they differ.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import transformers
from peft.helpers import DoraCaching

from doraxp.bench import quartiles
from doraxp.torch import accelerate

TOKENS_TIMED = 8
"""The number of generated tokens in one sample."""
TOLERANCES = {"float32": 1e-3, "bfloat16": 6e-2}
"""The largest difference of logits and gradients to allow, relative to the largest value of each.
Rounding errors of one layer grow in the next ones."""


class Model(NamedTuple):
    """The sizes of a Llama, and of the work."""

    layers: int
    width: int
    rank: int = 16
    tokens: int = 128

    def __str__(self) -> str:
        return f"Llama of {self.layers} layers, width {self.width}, rank {self.rank}"


MODELS = (Model(8, 1024), Model(2, 64))
REFERENCES = {"step": ("PEFT",), "generation": ("PEFT", "PEFT, DoraCaching")}
"""The contestants that all are compared with."""
GOALS = {
    (MODELS[0], "step", "accelerated, exact", "PEFT"): 0.5,
    (MODELS[0], "generation", "accelerated", "PEFT, DoraCaching"): 0.9,
    (MODELS[1], "step", "accelerated, exact", "PEFT"): 1.0,
    (MODELS[1], "generation", "accelerated", "PEFT"): 1.0,
}
"""The ratios that the project wants to reach: of a contestant's time to a reference's."""
Way = Callable[[Any], contextlib.AbstractContextManager[Any]]
"""Makes the block in which a contestant computes a model."""


@contextlib.contextmanager
def without_adapters(model: Any) -> Iterator[None]:
    """Compute the base model alone: no way to compute its adapters takes less time."""

    def require_gradients(module: Any, args: Any, embedded: Any) -> Any:
        return embedded.requires_grad_() if torch.is_grad_enabled() else embedded

    # So that the backward goes down to the first layer, as with adapters.
    hook = model.get_input_embeddings().register_forward_hook(require_gradients)
    with hook, model.disable_adapter():
        yield


STEPS: dict[str, Way] = {
    "base alone": without_adapters,
    "PEFT": lambda model: contextlib.nullcontext(),
    "accelerated, exact": lambda model: accelerate(model, "exact"),
    "accelerated, detached": lambda model: accelerate(model, "detached"),
}
GENERATIONS: dict[str, Way] = {
    "base alone": without_adapters,
    "PEFT": lambda model: contextlib.nullcontext(),
    "PEFT, DoraCaching": lambda model: DoraCaching(),
    "accelerated": accelerate,
}


def main(arguments: list[str] | None = None, models: tuple[Model, ...] = MODELS) -> int:
    """Print a table for each model; return the exit status."""
    options = read(arguments)
    # A release of transformers warns of the names of the next one.
    warnings.simplefilter("ignore", FutureWarning)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    print(f"{options.dtype}, PyTorch {torch.__version__}, PEFT {peft.__version__}, "
          f"transformers {transformers.__version__}, {torch.get_num_threads()} threads, "
          f"medians of {options.rounds} rounds")  # fmt: skip
    figures = []
    for sizes in models:
        model = build(sizes, options.dtype)
        steps = Steps(sizes, model)
        tokens = Tokens(sizes, model)
        if (wrong := steps.wrong(TOLERANCES[options.dtype])) is not None:
            print(f"models: error: {sizes}: {wrong}", file=sys.stderr)
            return 1
        parts = (("step", STEPS, steps.seconds), ("generation", GENERATIONS, tokens.seconds))
        for task, ways, seconds in parts:
            figures.append(Figures(sizes, task, time_all(model, ways, seconds, options.rounds)))
            print("\n".join(figures[-1].lines()), flush=True)
    if options.json is not None:
        table = [one.figures() for one in figures]
        options.json.write_text(json.dumps(table, indent=1) + "\n", "utf-8")
    return 0


def read(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the arguments."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dtype", choices=TOLERANCES, default="float32")
    parser.add_argument("--rounds", type=int, default=9, metavar="N")
    parser.add_argument("--threads", type=int, metavar="N", help="of PyTorch")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all times")
    return parser.parse_args(arguments)


def build(sizes: Model, dtype: str) -> Any:
    """Return a Llama with DoRA in its linear layers, whose B is not zero."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=sizes.width,
        intermediate_size=sizes.width * 43 // 16,
        num_hidden_layers=sizes.layers,
        num_attention_heads=max(1, sizes.width // 64),
        vocab_size=8 * sizes.width,
    )
    base = transformers.LlamaForCausalLM(config).to(getattr(torch, dtype))
    adapter = peft.LoraConfig(
        r=sizes.rank, use_dora=True, target_modules="all-linear", init_lora_weights=False
    )
    return peft.get_peft_model(base, adapter)


class Steps:
    """The steps of a model on one batch."""

    def __init__(self, sizes: Model, model: Any) -> None:
        self._model = model
        self._batch = torch.randint(8 * sizes.width, (1, sizes.tokens))
        self._trained = [leaf for leaf in model.parameters() if leaf.requires_grad]
        self._optimizer = torch.optim.SGD(self._trained, lr=1e-4)

    def seconds(self) -> float:
        """Return the time of a step, after one of the optimizer."""
        self._model.train()
        self._optimizer.step()
        self._optimizer.zero_grad()
        began = time.perf_counter()
        self._loss().backward()
        return time.perf_counter() - began

    def wrong(self, tolerance: float) -> str | None:
        """Return a message if loss or gradients of "detached" differ from PEFT's."""
        self._model.train()
        found = []
        for name in ("PEFT", "accelerated, detached"):
            with STEPS[name](self._model):
                loss = self._loss()
                found.append([loss.detach(), *torch.autograd.grad(loss, self._trained)])
        for theirs, ours in zip(*found, strict=True):
            error = float((ours - theirs).abs().max() / theirs.abs().max())
            if not error <= tolerance:  # NaN too
                return f"loss and gradients must be within {tolerance} of PEFT's, got {error:.3g}"
        return None

    def _loss(self) -> Any:
        return self._model(input_ids=self._batch, labels=self._batch).loss


class Tokens:
    """The generation of tokens by a model."""

    def __init__(self, sizes: Model, model: Any) -> None:
        self._model = model
        self._prompt = torch.randint(8 * sizes.width, (1, sizes.tokens))

    def seconds(self) -> float:
        """Return the time of one token, as the mean of several."""
        self._model.eval()
        with torch.no_grad():
            tokens = self._generate()
            next(tokens)  # the first one, which also prepares and caches
            began = time.perf_counter()
            for _ in range(TOKENS_TIMED):
                next(tokens)
            return (time.perf_counter() - began) / TOKENS_TIMED

    def _generate(self) -> Iterator[Any]:
        """Yield the tokens after the prompt, each the likeliest one."""
        cache = transformers.DynamicCache(config=self._model.config)
        last = self._prompt
        while True:
            made = self._model(input_ids=last, past_key_values=cache, use_cache=True)
            last = made.logits[:, -1:].argmax(-1)
            yield last


def time_all(
    model: Any, ways: dict[str, Way], seconds: Callable[[], float], rounds: int
) -> dict[str, list[float]]:
    """Return the seconds of each contestant in each round, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    order = random.Random(0)
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds + 1):
            for name in order.sample(list(ways), len(ways)):
                with ways[name](model):
                    taken = seconds()
                if number:
                    times[name].append(taken)
            gc.collect()
    finally:
        gc.enable()
    return times


class Figures(NamedTuple):
    """The times of a model at one kind of work."""

    sizes: Model
    task: str
    times: dict[str, list[float]]

    def ratio(self, name: str, reference: str) -> float:
        """Return the median of time ÷ the reference's time, round by round."""
        pairs = zip(self.times[name], self.times[reference], strict=True)
        return quartiles([one / other for one, other in pairs])[1]

    def lines(self) -> Iterator[str]:
        """Yield the lines of a table."""
        references = REFERENCES[self.task]
        what = f"{self.sizes.tokens} tokens" if self.task == "step" else "one token, KV cache"
        yield f"{self.sizes}: {self.task}, {what}"
        yield f"  {'':22} {'ms':>8}" + "".join(f"  ÷ {name}" for name in references)
        for name, seconds in self.times.items():
            line = f"  {name:22} {1e3 * quartiles(seconds)[1]:8.4g}"
            for reference in references:
                ratio = self.ratio(name, reference)
                line += f"  {ratio:{len(reference) + 2}.2f}"
                goal = GOALS.get((self.sizes, self.task, name, reference))
                if goal is not None:
                    line += f" ≤ {goal:g}: {'met' if ratio <= goal else 'missed'}"
            yield line

    def figures(self) -> dict[str, Any]:
        """Return all figures in the types of JSON."""
        ratios = {
            name: {reference: self.ratio(name, reference) for reference in REFERENCES[self.task]}
            for name in self.times
        }
        case = {**self.sizes._asdict(), "task": self.task}
        return {**case, "seconds": self.times, "ratios": ratios}


if __name__ == "__main__":
    sys.exit(main())
