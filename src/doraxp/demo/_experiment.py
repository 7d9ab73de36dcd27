"""The demo's experiment: a frozen network learns turned digits.

For each seed, a network is trained on upright digits and frozen. Then each method adapts it to the
digits turned by 90°: from the same base, on the same batches, for as many steps. Then the result is
merged into a plain network.

Without adaptation, the base reads every turned digit as a 4.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from array_api_compat import array_namespace

from doraxp import Operator, magnitude_direction_change
from doraxp._base.types import Array
from doraxp._terminal.runtimes import runtime
from doraxp.demo._digits import Digits, split_digits
from doraxp.demo._methods import (
    FullFineTuning,
    Method,
    Parameters,
    adapted_logits,
    loss_and_gradients,
    merged,
    methods,
    parameter_count,
    plain_logits,
)
from doraxp.demo._networks import PLANS, Layer, Network, Operators, Plan
from doraxp.demo._results import BaseRun, Results, Run, Settings
from doraxp.optim import AdamWState, adamw_init, adamw_step, cosine_schedule

BATCH = 16
"""Digits of a step: so few that OpenBLAS computes the products on one thread. With 64 it uses two
threads, and on a busy machine the demo then takes ten times as long."""
CHECKPOINTS = 10
BASE_RATE = 0.005

AsArray: TypeAlias = Callable[[Array], Array]
Compile: TypeAlias = Callable[[Callable[..., Any]], Callable[..., Any]]
Batches: TypeAlias = list[tuple[Array, Array]]
"""x (digits, *x_shape) and targets (digits, 10) of each step."""
OnStep: TypeAlias = Callable[[str, int], None]
"""Called after each step with the name of what is trained and with the seed."""


def experiment(settings: Settings, on_step: OnStep = lambda what, seed: None) -> Results:
    """Train and measure each method with each seed."""
    plan = PLANS[settings.network]
    training, held_out = split_digits(validate=settings.validate)
    _, asarray, compiled, _ = runtime(settings.backend)
    upright, turned = (
        asarray(digits.inputs(plan.x_shape)) for digits in (held_out, held_out.turned())
    )
    labels = asarray(held_out.labels)
    makes_base = _Trainer(FullFineTuning(), plan.operators, BASE_RATE, compiled)
    trainers = {
        name: _Trainer(method, plan.operators, settings.rate(name), compiled)
        for name, method in methods(settings.rank).items()
    }
    base_runs: list[BaseRun] = []
    runs: dict[str, list[Run]] = {name: [] for name in trainers}

    for seed in range(settings.seed, settings.seed + settings.seeds):
        rng = np.random.default_rng(seed)
        network = plan.draw(rng, asarray)
        batches = _batches(training, plan, settings.steps, rng, asarray)
        trained = makes_base.train(network, batches, 0, partial(on_step, "base", seed))
        base = trained.checkpoints[-1]
        read, misread = (
            accuracy(plain_logits(plan.operators, base, x), labels) for x in (upright, turned)
        )
        base_runs.append(BaseRun(read, misread, trained.seconds))

        batches = _batches(training.turned(), plan, settings.steps, rng, asarray)
        start = int(rng.integers(2**31))
        for name, trainer in trainers.items():
            trained = trainer.train(base, batches, start, partial(on_step, name, seed))
            runs[name].append(_measure(trainer, base, trained, turned, labels))
    return Results(settings, len(training.labels), len(held_out.labels), base_runs, runs)


def accuracy(logits: Array, labels: Array) -> float:
    """Return the share of digits whose largest logit is at their label, 0..1."""
    xp = array_namespace(logits)
    hits = xp.argmax(logits, axis=-1) == labels
    return int(xp.sum(xp.astype(hits, xp.int32))) / int(labels.shape[0])


class _Training(NamedTuple):
    checkpoints: list[Parameters]
    losses: list[float]
    seconds: float


class _Trainer:
    """A method with its learning rate and its compiled step."""

    def __init__(
        self, method: Method, operators: Operators, learning_rate: float, compiled: Compile
    ) -> None:
        self.method = method
        self.operators = operators
        self.learning_rate = learning_rate
        self.step = compiled(partial(_step, method, operators))

    def train(
        self, base: Network, batches: Batches, seed: int, on_step: Callable[[], None]
    ) -> _Training:
        """Take a step for each batch. The rate warms up for a tenth of them and then falls."""
        began = time.perf_counter()
        steps = len(batches)
        rate = cosine_schedule(self.learning_rate, total_steps=steps, warmup_steps=steps // 10)
        keep = {steps * part // CHECKPOINTS for part in range(1, CHECKPOINTS + 1)}
        trained = {
            # With one seed for all, layers of one size would start with the same A.
            name: self.method.start(self.operators[name], layer, seed=seed + index)
            for index, (name, layer) in enumerate(base.items())
        }
        state = adamw_init(trained)
        losses, checkpoints = [], []
        for count, (x, targets) in enumerate(batches, 1):
            loss, trained, state = self.step(base, trained, state, x, targets, rate(count - 1))
            losses.append(loss)
            if count in keep:
                checkpoints.append(trained)
            on_step()
        # The losses are read after the last step: to read one, the host waits for the GPU's queue.
        values = [float(loss) for loss in losses]
        return _Training(checkpoints, values, time.perf_counter() - began)


def _step(
    method: Method,
    operators: Operators,
    base: Network,
    trained: Parameters,
    state: AdamWState,
    x: Array,
    targets: Array,
    rate: float,
) -> tuple[Array, Parameters, AdamWState]:
    """Return the loss, and the trained parameters and the optimizer's state after one step."""
    loss, gradients = loss_and_gradients(method, operators, base, trained, x, targets)
    trained, state = adamw_step(trained, gradients, state, learning_rate=rate, weight_decay=0.0)
    return loss, trained, state


def _measure(trainer: _Trainer, base: Network, training: _Training, x: Array, labels: Array) -> Run:
    method, operators, trained = trainer.method, trainer.operators, training.checkpoints[-1]
    networks = [merged(method, operators, base, each) for each in training.checkpoints]
    adapted = adapted_logits(method, operators, base, trained, x)
    run = Run(
        accuracy=accuracy(adapted, labels),
        merged_accuracy=None,
        largest_difference=None,
        trainable_parameters=parameter_count(trained),
        seconds=training.seconds,
        losses=training.losses,
        changes={
            name: [_change(operators[name], layer, network[name]) for network in networks]
            for name, layer in base.items()
        },
    )
    if isinstance(method, FullFineTuning):
        return run
    xp = array_namespace(x)
    plain = plain_logits(operators, networks[-1], x)
    difference = float(xp.max(xp.abs(plain - adapted)))
    return replace(run, merged_accuracy=accuracy(plain, labels), largest_difference=difference)


def _change(operator: Operator, before: Layer, after: Layer) -> tuple[float, float]:
    matrix = operator.kind.matrix
    change = magnitude_direction_change(matrix(before.weight), matrix(after.weight))
    return float(change.magnitude), float(change.direction)


def _batches(
    digits: Digits, plan: Plan, steps: int, rng: np.random.Generator, asarray: AsArray
) -> Batches:
    """Draw the digits of every step."""
    rows = rng.integers(len(digits.labels), size=(steps, BATCH))
    x = asarray(digits.inputs(plan.x_shape)[rows])  # (steps, digits, *x_shape)
    targets = asarray(digits.targets()[rows])  # (steps, digits, 10)
    return [(x[step, ...], targets[step, ...]) for step in range(steps)]
