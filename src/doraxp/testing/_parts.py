"""The parts of an implementation that the kit calls, with their cases and known mistakes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

from doraxp.testing._calls import call_layer, call_operator, call_step, call_sum, call_update
from doraxp.testing._cases import OptimizerCase
from doraxp.testing._catalogue import catalogue
from doraxp.testing._changes import Changes
from doraxp.testing._conventions import AnyCase
from doraxp.testing._deviations import (
    BACKWARD,
    FORWARD,
    LOW_RANK,
    NOT_AS_DECLARED,
    STEP,
)
from doraxp.testing._operator_cases import OperatorCase, operator_catalogue
from doraxp.testing._operator_reference import operator_results
from doraxp.testing._optimizer_cases import optimizer_catalogue
from doraxp.testing._part_deviations import (
    CONVOLUTION,
    EMBEDDING,
    LOHA,
    LOKR,
    LORA_PLUS,
    SCALED,
    SUM,
)
from doraxp.testing._reference import Results, layer_results, step_results
from doraxp.testing._sum_cases import SumCase, sum_catalogue, sum_results
from doraxp.testing._update_cases import UpdateCase, update_catalogue, update_results

LAYER = ("init", "forward", "gradients", "merge")


class Part(NamedTuple):
    """Functions of one object that have the same cases."""

    path: str
    """The attribute that holds the functions; empty for the implementation itself."""
    functions: tuple[str, ...]
    cases: tuple[AnyCase, ...]
    call: Callable[..., dict[str, Any]]
    known: Mapping[str, Changes]
    keeps_conventions: bool = True
    """Whether the conventions change the formulas."""

    def found_in(self, impl: Any) -> dict[str, Any]:
        """Return the functions that an implementation has, by their names in a report."""
        owner = getattr(impl, self.path, None) if self.path else impl
        prefix = f"{self.path}." if self.path else ""
        return {
            f"{prefix}{name}": getattr(owner, name)
            for name in self.functions
            if hasattr(owner, name)
        }


@cache
def parts() -> tuple[Part, ...]:
    """Return all parts, in the order of a report."""
    layers = {**FORWARD, **NOT_AS_DECLARED, **LOW_RANK, **BACKWARD}
    operators, updates = operator_catalogue(), update_catalogue()
    return (
        Part("", LAYER, catalogue(), call_layer, layers),
        _steps("step", "adamw", {}),
        _steps("loraplus_step", "loraplus", LORA_PLUS),
        _steps("scaled_step", "scaled_adamw", SCALED),
        _of_kind("convolution", LAYER, operators, call_operator, {**layers, **CONVOLUTION}),
        _of_kind("embedding", LAYER, operators, call_operator, {**layers, **EMBEDDING}),
        _of_kind("loha", ("merge",), updates, call_update, {**FORWARD, **LOHA}),
        _of_kind("lokr", ("merge",), updates, call_update, {**FORWARD, **LOKR}),
        Part("sums", ("merge",), sum_catalogue(), call_sum, {**FORWARD, **SUM}),
    )


def _steps(name: str, optimizer: str, known: Mapping[str, Changes]) -> Part:
    cases = tuple(case for case in optimizer_catalogue() if case.optimizer == optimizer)
    return Part("", (name,), cases, call_step, {**STEP, **known}, keeps_conventions=False)


def _of_kind(
    kind: str,
    functions: tuple[str, ...],
    cases: tuple[OperatorCase, ...] | tuple[UpdateCase, ...],
    call: Callable[..., dict[str, Any]],
    known: Mapping[str, Changes],
) -> Part:
    """Return a part whose cases are those of a kind."""
    return Part(kind, functions, tuple(case for case in cases if case.kind == kind), call, known)


def functions_of(impl: Any) -> tuple[str, ...]:
    """Return the names of the functions that `check_implementation` calls.

    Parameters
    ----------
    impl : object
        An implementation of DoRA.

    Returns
    -------
    tuple of str
        Those of a part with its name, such as "convolution.forward". Empty without any.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> functions_of(SimpleNamespace(merge=max, loha=SimpleNamespace(merge=max)))
    ('merge', 'loha.merge')
    """
    return tuple(name for part in parts() for name in part.found_in(impl))


def results_of(case: AnyCase, dtype: str, changes: Changes) -> Results:
    """Return the results of a case, by the reference or by one that deviates."""
    if isinstance(case, OptimizerCase):
        return step_results(case, dtype, changes)
    if isinstance(case, OperatorCase):
        return operator_results(case, dtype, changes)
    if isinstance(case, UpdateCase):
        return update_results(case, dtype, changes)
    if isinstance(case, SumCase):
        return sum_results(case, dtype, changes)
    return layer_results(case, dtype, changes)
