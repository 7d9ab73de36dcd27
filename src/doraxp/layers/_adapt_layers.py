"""DoRA around the layers of a model: `adapt_layers`.

path   of a layer, "encoder.0.fc1": a key of a mapping, or a name that an accessor gives
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

from doraxp._base.patterns import matches_any, values_by_path
from doraxp._base.types import Config
from doraxp._base.words import with_article
from doraxp._core.adapter import InitMethod
from doraxp._core.kinds import LayerKind
from doraxp._core.operators import Operator
from doraxp.layers._adapt import chosen, no_match, of_layer
from doraxp.layers._base_layer import (
    OTHER_WEIGHT,
    WeightLayout,
    check_no_other_bias,
    is_array,
    with_arrays,
)
from doraxp.layers._dora import DoRALayer
from doraxp.layers._model import AdaptedModel, Setter
from doraxp.layers._targets import Modules

Accessor: TypeAlias = Callable[[Any], Iterable[tuple[str, Any, Setter]]]
"""Yields the path and the layer at each place of a model, and a function that puts another layer
there."""


def adapt_layers(
    layers: Any,
    target_modules: Modules,
    config: Config,
    *,
    seed: int,
    exclude_modules: Modules | None = None,
    kinds: Mapping[str, LayerKind] | None = None,
    operators: Mapping[str, Operator] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    dropout: float = 0.0,
    train_base: bool = False,
    weight: str = "weight",
    bias: str | None = "bias",
    weight_layout: WeightLayout = "out_in",
    method: InitMethod = "kaiming",
    accessor: Accessor | None = None,
) -> AdaptedModel:
    """Return a model with a `DoRALayer` around each layer that `target_modules` selects.

    Parameters
    ----------
    layers : mapping of str to layer, or any object with `accessor`
        A layer is an object with a weight and, if it has one, a bias. Objects without a weight
        pass through.
    target_modules, config, exclude_modules, rank_pattern, alpha_pattern
        As in `doraxp.adapt`.
    seed : int
        Each layer draws from its own seed, counted up from this one in the order of `layers`.
    kinds : mapping of str to LayerKind, optional
        By path, or by a regular expression for the end of a path, as in `doraxp.adapt`.
    operators : mapping of str to Operator, optional
        By path or regular expression, like `kinds`. A layer that has an operator and is not in
        `kinds` is of the operator's kind.
    dropout, train_base, weight, bias, weight_layout, method
        For all layers, see `DoRALayer`. Where one target has the bias of this name, others may
        lack it, if they have no other array that may be a bias.
    accessor : callable, optional
        ``accessor(layers)`` yields ``(path, layer, put)`` for each layer, where ``put(new)`` puts
        another layer in its place. The adapted layers are put there, and so are the plain ones
        after `AdaptedModel.merge`.

    Returns
    -------
    AdaptedModel

    Raises
    ------
    TypeError
        `layers` is not a mapping and `accessor` is None, or the errors of `DoRALayer`.
    ValueError
        No layer has a weight, a target or a pattern matches no layer, or the errors of
        `DoRALayer`. Then no layer was replaced.

    Examples
    --------
    >>> import numpy as np
    >>> from doraxp import Linear
    >>> layers = {"encoder.q": Linear(np.eye(4)), "encoder.k": Linear(np.eye(4))}
    >>> adapt_layers(layers, ["q"], Config(rank=2), seed=0)["encoder.q"]
    <DoRALayer encoder.q: linear (4, 4), rank 2, scaling 1, dropout 0, 20 trained parameters>
    """
    found, setters = _walked(layers, accessor)
    weights = {
        path: array
        for path, layer in found.items()
        if (array := getattr(layer, weight, None)) is not None
    }
    if not weights:
        got = _without(found.values())
        raise ValueError(f"layers must have a layer with {with_article(weight)}{got}")
    known_operators = values_by_path(operators or {}, weights)
    known_kinds = {
        path: operator.kind
        for path, operator in known_operators.items()
        if hasattr(operator, "kind")  # DoRALayer refuses the others
    }
    known_kinds |= values_by_path(kinds or {}, weights)
    by_name = {f"{path}.weight": array for path, array in weights.items()}
    targets = chosen(by_name, target_modules, exclude_modules, known_kinds)
    if not targets:
        raise ValueError(f"target_modules must select a layer, got {target_modules!r}")
    ranks = values_by_path(rank_pattern or {}, targets)
    alphas = values_by_path(alpha_pattern or {}, targets)
    _check_used({"kinds": kinds, "operators": operators}, weights)
    _check_used({"rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}, targets)
    adapted: dict[str, DoRALayer] = {}
    with_bias = {path for path in targets if bias is None or hasattr(found[path], bias)}
    for path in targets:
        rank, alpha = ranks.get(path, config.rank), alphas.get(path, config.alpha)
        is_without = bias != "bias" and bool(with_bias) and path not in with_bias
        try:
            layer = adapted[path] = DoRALayer(
                found[path], replace(config, rank=rank, alpha=alpha), seed=seed + len(adapted),
                kind=known_kinds.get(path), operator=known_operators.get(path), dropout=dropout,
                weight=weight, bias=None if is_without else bias, train_base=train_base,
                weight_layout=weight_layout, method=method,
            )  # fmt: skip
            if is_without:
                check_no_other_bias(found[path], weight, layer._stored)
        except (TypeError, ValueError) as error:
            raise type(error)(of_layer(path, error)) from None
        layer.name = path
    places = {path: setters[path] for path in adapted if path in setters}
    for path, put in places.items():
        put(adapted[path])
    return AdaptedModel({**found, **adapted}, setters=places, weight=weight, bias=bias)


def _walked(layers: Any, accessor: Accessor | None) -> tuple[dict[str, Any], dict[str, Setter]]:
    """Return the layers by path, and the setters of their places."""
    if accessor is None:
        if not isinstance(layers, Mapping):
            raise TypeError(
                f"layers must be a mapping of paths to layers, got {type(layers).__name__}: pass "
                "accessor= for another object"
            )
        return dict(layers), {}
    found, setters = {}, {}
    for path, layer, put in accessor(layers):
        if path in found:
            raise ValueError(f"accessor must yield each path once, got {path!r} twice")
        found[path], setters[path] = layer, put
    return found, setters


def _without(layers: Collection[Any]) -> str:
    """Return the end of the message for layers without a weight."""
    if any(is_array(layer) for layer in layers):
        return ", got arrays: wrap each in doraxp.Linear, or use doraxp.adapt"
    arrays = with_arrays(layers)
    return f"{arrays and f', got layers{arrays}'}: {OTHER_WEIGHT}"


def _check_used(patterns: Mapping[str, Mapping[str, Any] | None], paths: Iterable[str]) -> None:
    """Raise ValueError for a pattern that matches no path."""
    paths = list(paths)
    for name, pattern in patterns.items():
        for key in pattern or {}:
            if not matches_any(key, paths):
                raise ValueError(no_match(f"{name} {key!r}", key, paths))
