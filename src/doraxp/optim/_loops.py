"""Optimizers with a state of their own, for loops: each calls the pure functions of this room."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, fields
from numbers import Real
from typing import Any, Protocol, TypeAlias, runtime_checkable

from doraxp._base.scalars import check_count, check_flag, check_kind, check_number
from doraxp._base.types import Array
from doraxp.optim._adamw import AdamWState, adamw_init, adamw_step
from doraxp.optim._clipping import clip_by_global_norm
from doraxp.optim._per_leaf import PerLeaf
from doraxp.optim._scaling import scaled_gradients
from doraxp.optim._schedules import Schedule
from doraxp.optim._sgd import SGDState, check_momentum, sgd_init, sgd_step
from doraxp.optim._trees import Params

LearningRate: TypeAlias = PerLeaf | Schedule | Callable[[int], Any]


@runtime_checkable
class Optimizer(Protocol):
    """An object that takes the steps of a training loop: `AdamW`, `SGD`, or a class of yours."""

    steps: int
    """Number of steps taken."""
    last_norm: Array | None
    """‖g‖ before the clipping of the last step; None without a step or without clipping."""

    @property
    def state(self) -> Any:
        """The state of the functions below, such as an `AdamWState`; None before the first step."""

    @state.setter
    def state(self, state: Any) -> None: ...

    def step(self, params: Params, grads: Params) -> Params:
        """Return the parameters after one step."""

    def settings(self) -> dict[str, Any]:
        """Return values that JSON has, from which `optimizer_from_settings` makes an equal one."""


class _Loop(ABC):
    """The parts that the optimizers share."""

    learning_rate: LearningRate
    lora_plus: float
    max_norm: float | None
    damping: float | None
    steps: int = 0
    last_norm: Array | None = None
    _state: Any = None

    def _check(self, **numbers: dict[str, Any]) -> None:
        """Check the numbers that are not trees, with the given limits, and keep them as floats."""
        limits = {"lora_plus": {"positive": True}, **numbers}
        if self.max_norm is not None:
            limits["max_norm"] = {"positive": True}
        if self.damping is not None:
            limits["damping"] = {}
        for name in ("learning_rate", "weight_decay"):
            if isinstance(getattr(self, name), Real):
                limits[name] = {}
        for name, limit in limits.items():
            setattr(self, name, check_number(name, getattr(self, name), **limit))

    @property
    def state(self) -> Any:
        """The state of the pure functions; None before the first step. May be assigned."""
        return self._state

    @state.setter
    def state(self, state: Any) -> None:
        self._state = state if state is None else self._checked(state)

    def step(self, params: Params, grads: Params) -> Params:
        """Return the parameters after one step.

        Parameters
        ----------
        params, grads : tree of arrays

        Returns
        -------
        params : the structure and dtypes of `params`

        Raises
        ------
        TypeError, ValueError
            As in the pure functions. After an error the optimizer has not changed.
        """
        norm = None
        if self.max_norm is not None:
            grads, norm = clip_by_global_norm(grads, self.max_norm)
        if self.damping is not None:
            grads = scaled_gradients(params, grads, damping=self.damping)
        rate = self.learning_rate
        params, state = self._stepped(params, grads, rate(self.steps) if callable(rate) else rate)
        self._state, self.steps, self.last_norm = state, self.steps + 1, norm
        return params

    def settings(self) -> dict[str, Any]:
        """Return values that JSON has, from which `optimizer_from_settings` makes an equal one.

        TypeError for a learning rate that is a function of yours, or has keys that are not str.
        """
        names = (field.name for field in fields(self))  # type: ignore[arg-type]
        plain = {name: _plain(name, getattr(self, name)) for name in names}
        return {"optimizer": type(self).__name__, **plain}

    @abstractmethod
    def _checked(self, state: Any) -> Any:
        """Return a state that is assigned, or raise TypeError."""

    @abstractmethod
    def _stepped(self, params: Params, grads: Params, rate: Any) -> tuple[Params, Any]:
        """Return the parameters and the state after a step."""


@dataclass(eq=False)
class AdamW(_Loop):
    """AdamW for a training loop: `adamw_step` with a state that it keeps.

    ::

        g ← g min(1, max_norm / ‖g‖)      with `max_norm`, see `clip_by_global_norm`
        g ← scaled g                      with `damping`, see `scaled_gradients`
        p ← p after a step along g, see `adamw_step`

    Parameters
    ----------
    learning_rate : number, one per leaf, Schedule, or callable int -> float
        η. A schedule is read at `steps`, the number of steps taken.
    beta1, beta2, eps, weight_decay, lora_plus, donate
        See `adamw_step`.
    max_norm : float, optional
        Above 0. The gradients are clipped first.
    damping : float, optional
        δ, at least 0. The clipped gradients are scaled.

    Attributes
    ----------
    steps : int
        Number of steps taken. May be assigned, to read the schedule from there.
    state : AdamWState or None
        None before the first step. May be assigned; then `steps` is the step of that state.
    last_norm : array, shape (), or None
        ‖g‖ before the last clipping; None without `max_norm`. It is not read on the host.

    Raises
    ------
    TypeError
        An argument that must be a number is not one, or `donate` is not a bool.
    ValueError
        A number is out of range.

    Examples
    --------
    >>> import numpy as np
    >>> params = {"lora_a": np.ones((1, 2)), "lora_b": np.ones((2, 1)), "magnitude": np.ones(2)}
    >>> optimizer = AdamW(0.125, weight_decay=0, lora_plus=4)
    >>> params = optimizer.step(params, params)
    >>> params["lora_a"].round(6), params["lora_b"].round(6), optimizer.steps
    (array([[0.875, 0.875]]), array([[0.5],
           [0.5]]), 1)
    """

    learning_rate: LearningRate
    _: KW_ONLY
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: PerLeaf = 0.01
    lora_plus: float = 1.0
    max_norm: float | None = None
    damping: float | None = None
    donate: bool = False

    def __post_init__(self) -> None:
        check_flag("donate", self.donate)
        self._check(beta1={"below": 1}, beta2={"below": 1}, eps={"positive": True})

    def _checked(self, state: AdamWState) -> AdamWState:
        check_kind("state", state, AdamWState)
        self.steps = check_count("state.step", state.step)
        return state

    def _stepped(self, params: Params, grads: Params, rate: Any) -> tuple[Params, AdamWState]:
        return adamw_step(
            params,
            grads,
            adamw_init(params) if self.state is None else self.state,
            learning_rate=rate,
            beta1=self.beta1,
            beta2=self.beta2,
            eps=self.eps,
            weight_decay=self.weight_decay,
            lora_plus=self.lora_plus,
            donate=self.donate,
        )


@dataclass(eq=False)
class SGD(_Loop):
    """SGD for a training loop: `sgd_step` with a state that it keeps.

    ::

        g ← g min(1, max_norm / ‖g‖)      with `max_norm`, see `clip_by_global_norm`
        g ← scaled g                      with `damping`, see `scaled_gradients`
        p ← p after a step along g, see `sgd_step`

    Parameters
    ----------
    learning_rate : number, one per leaf, Schedule, or callable int -> float
        η. A schedule is read at `steps`, the number of steps taken.
    momentum, nesterov, weight_decay, lora_plus
        See `sgd_step`.
    max_norm : float, optional
        Above 0. The gradients are clipped first.
    damping : float, optional
        δ, at least 0. The clipped gradients are scaled.

    Attributes
    ----------
    steps : int
        Number of steps taken. May be assigned, to read the schedule from there.
    state : SGDState or None
        None before the first step. May be assigned.
    last_norm : array, shape (), or None
        ‖g‖ before the last clipping; None without `max_norm`. It is not read on the host.

    Raises
    ------
    TypeError
        An argument that must be a number is not one, or `nesterov` is not a bool.
    ValueError
        A number is out of range, or `nesterov` comes with a momentum of 0.

    Examples
    --------
    >>> import numpy as np
    >>> from doraxp import linear_schedule
    >>> optimizer = SGD(linear_schedule(0.5, total_steps=2))
    >>> params = {"bias": np.ones(2)}
    >>> for _ in range(2):
    ...     params = optimizer.step(params, {"bias": np.ones(2)})
    >>> params
    {'bias': array([0.25, 0.25])}
    """

    learning_rate: LearningRate
    _: KW_ONLY
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: PerLeaf = 0.0
    lora_plus: float = 1.0
    max_norm: float | None = None
    damping: float | None = None

    def __post_init__(self) -> None:
        check_momentum(self.momentum, self.nesterov)
        self._check(momentum={"below": 1})

    def _checked(self, state: SGDState) -> SGDState:
        check_kind("state", state, SGDState)
        return state

    def _stepped(self, params: Params, grads: Params, rate: Any) -> tuple[Params, SGDState]:
        return sgd_step(
            params,
            grads,
            sgd_init(params) if self.state is None else self.state,
            learning_rate=rate,
            momentum=self.momentum,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
            lora_plus=self.lora_plus,
        )


def _plain(name: str, value: Any) -> Any:
    """Return a setting as a value that JSON has."""
    if isinstance(value, Schedule):
        return value.settings()
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Real):
        return float(value)
    entries = value._asdict() if hasattr(value, "_asdict") else value
    if isinstance(entries, dict) and all(isinstance(key, str) for key in entries):
        return {key: _plain(f"{name}[{key!r}]", entry) for key, entry in entries.items()}
    raise TypeError(
        f"{name} must be a number, numbers by names, or a Schedule to be in settings, got "
        f"{value!r}: make a schedule by constant_schedule, linear_schedule or cosine_schedule"
    )
