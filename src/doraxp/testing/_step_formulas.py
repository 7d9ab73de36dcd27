"""The reference of the optimizers: one step for one array, with a name for every intermediate."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, TypeAlias

from doraxp.testing._formulas import Arrays

Numbers: TypeAlias = Mapping[str, float]


class AdamW:
    """One step for one array p: its gradient g, the moments mu and nu, and t, counted from 1."""

    def __init__(
        self, name: str, p: Any, g: Any, state: tuple[Any, Any], t: int, numbers: Numbers
    ) -> None:
        self.name, self.p, self.g, self.t = name, p, g, t
        self.mu_before, self.nu_before = state
        self.beta1, self.beta2, self.eps = (numbers[key] for key in ("beta1", "beta2", "eps"))
        self.learning_rate, self.decay = numbers["learning_rate"], numbers["weight_decay"]
        self.ratio = numbers.get("ratio", 1.0)

    @cached_property
    def rate(self) -> float:
        """The learning rate; in LoRA+ that of B is `ratio` times as large."""
        return self.learning_rate * (self.ratio if self.name == "lora_b" else 1.0)

    @cached_property
    def gradient(self) -> Any:
        return self.g

    @cached_property
    def mu(self) -> Any:
        return self.beta1 * self.mu_before + (1 - self.beta1) * self.gradient

    @cached_property
    def nu(self) -> Any:
        return self.beta2 * self.nu_before + (1 - self.beta2) * (self.gradient * self.gradient)

    @cached_property
    def corrections(self) -> tuple[float, float]:
        return 1 - self.beta1**self.t, 1 - self.beta2**self.t

    @cached_property
    def mean(self) -> Any:
        return self.mu * (1 / self.corrections[0])

    @cached_property
    def square(self) -> Any:
        return self.nu * (1 / self.corrections[1])

    @cached_property
    def divisor(self) -> Any:
        return self.square.sqrt() + self.eps

    @cached_property
    def pull(self) -> Any:
        return 0.0 if self.name == "magnitude" else self.decay * self.p

    @cached_property
    def start(self) -> Any:
        """The parameter. If it decays, it may be rounded in p (1 − rate·decay) before the step."""
        return self.p if self.name == "magnitude" else 1.0 * self.p

    @cached_property
    def stepped(self) -> Any:
        return self.start - self.rate * (self.mean.over(self.divisor) + self.pull)

    @cached_property
    def state(self) -> tuple[Any, Any]:
        return self.mu, self.nu


class SGD:
    """One step with momentum for one array p: its gradient g and the velocity."""

    def __init__(
        self, name: str, p: Any, g: Any, state: tuple[Any], t: int, numbers: Numbers
    ) -> None:
        del t
        self.p, self.rate, self.momentum = p, numbers["learning_rate"], numbers["momentum"]
        self.gradient = g if name == "magnitude" else g + numbers["weight_decay"] * p
        self.state = (self.momentum * state[0] + self.gradient,)

    @cached_property
    def stepped(self) -> Any:
        return self.p - self.rate * self.state[0]


class ScaledGradients:
    """The gradients of A and B over the Gram matrix of the other factor, as in arXiv:2402.02347."""

    def __init__(self, params: Arrays, grads: Arrays, damping: float) -> None:
        self.a, self.b = params["lora_a"], params["lora_b"]
        self.da, self.db = grads["lora_a"], grads["lora_b"]
        self.given_damping = damping

    @cached_property
    def damping(self) -> float:
        return self.given_damping

    @cached_property
    def gram_of_a(self) -> Any:
        return self.a @ self.a.mT

    @cached_property
    def gram_of_b(self) -> Any:
        return self.b.mT @ self.b

    @cached_property
    def scaled_da(self) -> Any:
        return self.da.divided_by(self.gram_of_b, self.damping)

    @cached_property
    def scaled_db(self) -> Any:
        return self.db.mT.divided_by(self.gram_of_a, self.damping).mT

    @cached_property
    def gradients(self) -> Arrays:
        return {"lora_a": self.scaled_da, "lora_b": self.scaled_db}


OPTIMIZERS = {  # the step, and the number of arrays in its state
    "adamw": (AdamW, 2),
    "sgd": (SGD, 1),
    "loraplus": (AdamW, 2),
    "scaled_adamw": (AdamW, 2),
}
