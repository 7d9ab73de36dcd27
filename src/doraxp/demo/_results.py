"""The settings of the demo's experiment, its results, and the results in the types of JSON."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from doraxp._terminal.runtimes import versions

RATES = {
    "linear": {
        "LoRA": 0.03, "DoRA detached": 0.03, "DoRA exact": 0.03, "full fine-tuning": 0.02,
    },
    "convolutional": {
        "LoRA": 0.03, "DoRA detached": 0.02, "DoRA exact": 0.02, "full fine-tuning": 0.03,
    },
}  # fmt: skip
"""Peak learning rates, by network: each method's best of a sweep with `Settings.validate`."""


@dataclass(frozen=True)
class Settings:
    """The inputs of the experiment: they decide its outcome."""

    network: str = "linear"
    """One of `PLANS`."""
    backend: str = "numpy"
    seed: int = 0
    """The first of `seeds` successive ones."""
    seeds: int = 3
    rank: int = 4
    steps: int = 500
    """Of AdamW, for the base and for each method."""
    learning_rate: float | None = None
    """Of every method; None for those in `RATES`."""
    validate: bool = False
    """Measure on a part of the training digits, instead of the test digits."""

    def rate(self, method: str) -> float:
        """Return a method's peak learning rate."""
        own = RATES[self.network][method]
        return own if self.learning_rate is None else self.learning_rate

    @property
    def total_steps(self) -> int:
        """How often the experiment calls its `on_step`."""
        return self.seeds * (1 + len(RATES[self.network])) * self.steps


@dataclass(frozen=True)
class BaseRun:
    """How good the base is, for one seed, on digits that it was not trained on."""

    upright_accuracy: float
    turned_accuracy: float
    seconds: float


@dataclass(frozen=True)
class Run:
    """The outcome of one method, for one seed."""

    accuracy: float
    """Of the adapted network, on turned digits that it was not trained on; 0..1."""
    merged_accuracy: float | None
    """Of the merged network, on the same digits; None for a method without a merge."""
    largest_difference: float | None
    """Between the logits of these two networks; None likewise."""
    trainable_parameters: int
    seconds: float
    losses: list[float]
    """Cross-entropy of the batch, at each step."""
    changes: dict[str, list[tuple[float, float]]]
    """ΔM and ΔD of each layer, at `CHECKPOINTS` equally spaced steps."""


@dataclass(frozen=True)
class Results:
    """All runs; each list has one for each seed."""

    settings: Settings
    training_digits: int
    held_out_digits: int
    base: list[BaseRun]
    methods: dict[str, list[Run]]

    def spread(self, method: str, name: str) -> Spread | None:
        """Return the spread, over a method's runs, of one field of `Run`."""
        values = [getattr(run, name) for run in self.methods[method]]
        return None if None in values else spread(values)


class Spread(NamedTuple):
    """The values of one figure, one for each seed, with their mean."""

    mean: float
    deviation: float
    """Standard deviation of the sample."""
    values: list[float]


def spread(values: Iterable[float]) -> Spread:
    """Return the mean and the standard deviation of two or more values."""
    values = list(values)
    return Spread(float(np.mean(values)), float(np.std(values, ddof=1)), values)


def report(results: Results) -> dict[str, Any]:
    """Return all figures, in the types of JSON."""
    settings = results.settings
    return {
        "arguments": asdict(settings),
        "versions": versions("numpy", settings.backend),
        "digits": {"training": results.training_digits, "held out": results.held_out_digits},
        "base": {
            name: spread(getattr(run, name) for run in results.base)._asdict()
            for name in ("upright_accuracy", "turned_accuracy", "seconds")
        },
        "methods": {name: _method_report(results, name) for name in results.methods},
    }


def _method_report(results: Results, method: str) -> dict[str, Any]:
    runs = results.methods[method]
    fields: dict[str, Any] = {
        "learning_rate": results.settings.rate(method),
        "trainable_parameters": runs[0].trainable_parameters,
    }
    for name in ("accuracy", "seconds", "merged_accuracy", "largest_difference"):
        value = results.spread(method, name)
        fields[name] = None if value is None else value._asdict()
    fields["layers"] = {
        layer: {
            name: spread(run.changes[layer][-1][index] for run in runs)._asdict()
            for index, name in enumerate(("magnitude_change", "direction_change"))
        }
        for layer in runs[0].changes
    }
    return fields
