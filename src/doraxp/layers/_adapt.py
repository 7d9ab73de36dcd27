"""Fresh adapters for the weights of a model.

    path     of a module, "layers.0.q_proj"; its weight is named "layers.0.q_proj.weight"
    target   a module that gets an adapter
    kind     how a module stores its weight: `LayerKind`

Targets, kinds, ranks and alphas are looked up by path.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple, cast

from doraxp._base.patterns import matches_any, values_by_path
from doraxp._base.types import Adapter, Array, Config, RowWeight
from doraxp._base.words import counted, the_nearest
from doraxp._core.adapter import init
from doraxp._core.kinds import LayerKind
from doraxp.layers._targets import Modules, find_targets, nearest


class AdaptedLayer(NamedTuple):
    """The adapter of one layer, with the numbers and shapes that are needed to use it."""

    adapter: Adapter
    """A, B and m, for the matrix `kind.matrix(weight)`."""
    config: Config
    """Rank, alpha and the rest."""
    kind: LayerKind
    """How the layer stores its weight."""
    shape: tuple[int, ...]
    """The shape that the weight is stored in."""


def adapt(
    weights: Mapping[str, Array | RowWeight],
    target_modules: Modules,
    config: Config,
    *,
    seed: int,
    exclude_modules: Modules | None = None,
    kinds: Mapping[str, LayerKind] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
) -> dict[str, AdaptedLayer]:
    """Return a fresh adapter, W' = W, for each weight that `target_modules` selects.

    Parameters
    ----------
    weights : mapping of str to array or RowWeight
        By name, as in a checkpoint: ``"model.layers.0.self_attn.q_proj.weight"``. The path of the
        module is the name without ``.weight``.
    target_modules : str or iterable of str
        Paths or ends of paths; or one regular expression for whole paths; or ``"all-linear"``.
        The latter selects each weight of a kind that `kinds` gives as linear, transposed
        or a stack of experts. Of the weights without a given kind it selects those of two axes,
        except embeddings and output heads: `doraxp.layers.find_targets` has the rules.
    config : Config
        For all layers; the patterns give other ranks and alphas to some.
    seed : int
        Each layer draws from its own seed, counted up from this one in the order of `weights`.
    exclude_modules : str or iterable of str, optional
        Paths or ends of paths, or one regular expression for whole paths. They win over
        `target_modules`, as in PEFT.
    kinds : mapping of str to LayerKind, optional
        By path, or by a regular expression for the end of a path. A weight of two axes that is
        not in it is linear. A target of more axes must be in it.
    rank_pattern, alpha_pattern : mapping, optional
        By regular expression for the end of a path, as in PEFT: the first that matches counts.

    Returns
    -------
    dict of str to AdaptedLayer
        By path.

    Raises
    ------
    ValueError
        A target, an exclusion or a pattern matches no weight, no target is left, `kinds` lacks a
        weight that is not a matrix, or a rank is too large.

    Examples
    --------
    >>> import numpy as np
    >>> weights = {"encoder.q.weight": np.eye(4), "encoder.k.weight": np.eye(4)}
    >>> list(adapt(weights, ["q"], Config(rank=2), seed=0))
    ['encoder.q']
    """
    kinds, rank_pattern, alpha_pattern = kinds or {}, rank_pattern or {}, alpha_pattern or {}
    by_path = {name.removesuffix(".weight"): cast(Array, each) for name, each in weights.items()}
    layers: dict[str, AdaptedLayer] = {}
    known = values_by_path(kinds, by_path)
    targets = chosen(weights, target_modules, exclude_modules, known)
    ranks = values_by_path(rank_pattern, targets)
    alphas = values_by_path(alpha_pattern, targets)
    for path in targets:
        weight = by_path[path]
        kind = _kind(path, weight, known)
        try:
            own = replace(
                config,
                rank=ranks.get(path, config.rank),
                alpha=alphas.get(path, config.alpha),
            )
            adapter = init(kind.matrix(weight), own, seed=seed + len(layers))
        except ValueError as error:
            raise ValueError(of_layer(path, error)) from None
        layers[path] = AdaptedLayer(adapter, own, kind, tuple(weight.shape))
    patterns = {"kinds": kinds, "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}
    for name, pattern in patterns.items():
        paths = by_path if name == "kinds" else layers
        for key in pattern:
            if not matches_any(key, paths):
                raise ValueError(no_match(f"{name} {key!r}", key, paths))
    return layers


def chosen(
    weights: Mapping[str, Array | RowWeight],
    target_modules: Modules,
    exclude_modules: Modules | None,
    kinds: Mapping[str, LayerKind],
) -> list[str]:
    """Return the paths of the targets; raise ValueError where a name does not select."""
    found = find_targets(weights, target_modules, exclude_modules=exclude_modules, kinds=kinds)
    paths = [name.removesuffix(".weight") for name in weights]
    arguments = {"target_modules": found.unmatched, "exclude_modules": found.unused}
    for argument, missing in arguments.items():
        for name in missing:
            raise ValueError(no_match(f"{argument} {name!r}", name, paths))
    if found.excluded and not found.paths:
        raise ValueError(
            f"exclude_modules must leave at least one target, got {exclude_modules!r}, which "
            f"excludes all {len(found.excluded)}"
        )
    return found.paths


def _kind(path: str, weight: Array, kinds: Mapping[str, LayerKind]) -> LayerKind:
    kind = kinds.get(path)
    if kind is None and len(weight.shape) != 2:
        raise ValueError(
            f"kinds must have an entry for {path}, such as conv or experts: its weight has shape "
            f"{tuple(weight.shape)}"
        )
    return kind or LayerKind()


def of_layer(path: str, error: Exception) -> str:
    """Return the message of an error with the path of its layer, and advice for a large rank."""
    limit = re.match(r"rank must be in 1\.\.(\d+) ", str(error))
    advice = "" if limit is None else (
        f": give this layer another rank, with rank_pattern={{{path!r}: {limit[1]}}}"
    )  # fmt: skip
    return f"{path}: {error}{advice}"


def no_match(argument: str, wanted: str, paths: Iterable[str]) -> str:
    """Return an error message that lists the paths whose names are nearest to `wanted`."""
    paths = list(paths)
    near = nearest(wanted, paths)
    modules = counted(len(paths), "module")
    return f"{argument} must match one of {modules}; {the_nearest(near)}"
