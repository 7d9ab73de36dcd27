"""Fresh adapters for a whole dict of weights."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple, TypeVar

from doraxp._base.types import Adapter, Array, Config
from doraxp._core.adapter import init
from doraxp._core.kinds import LayerKind

Value = TypeVar("Value")
_END = r"(.*\.)?({})$"
_NOT_LINEAR = re.compile(r"(.*embed.*|wte|wpe|lm_head)")


class AdaptedLayer(NamedTuple):
    """The adapter of one layer, and what it takes to use it."""

    adapter: Adapter
    """A, B and m of the matrix that `kind` makes of the weight."""
    config: Config
    """Rank, alpha and the rest."""
    kind: LayerKind
    """How the layer stores its weight."""
    shape: tuple[int, ...]
    """The shape that the weight is stored in."""


def adapt(
    weights: Mapping[str, Array],
    target_modules: str | Iterable[str],
    config: Config,
    *,
    seed: int,
    kinds: Mapping[str, LayerKind] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
) -> dict[str, AdaptedLayer]:
    """Return a fresh adapter for each weight that is targeted: W' = W.

    Parameters
    ----------
    weights : mapping of str to array
        By name, as in a checkpoint: ``"model.layers.0.self_attn.q_proj.weight"``. The path of the
        module is the name without ``.weight``.
    target_modules : str or iterable of str
        Paths or ends of paths; or one regular expression for whole paths; or ``"all-linear"``:
        every weight of two axes, or whose kind is given as linear, experts or transposed, but no
        embedding and no ``lm_head``.
    config : Config
        Of all; the patterns say where rank and alpha differ.
    seed : int
        Each layer draws from its own seed, counted up from this one in the order of `weights`.
    kinds : mapping of str to LayerKind, optional
        By path or pattern. Without one, a weight of two axes is linear; one of more must be named.
    rank_pattern, alpha_pattern : mapping, optional
        Regular expressions for the end of a path, as in PEFT: the first that matches counts.

    Returns
    -------
    dict of str to AdaptedLayer
        By path.

    Raises
    ------
    ValueError
        A target or a pattern matches no weight, the kind of a weight is not known, or a rank is
        too large.

    Examples
    --------
    >>> import numpy as np
    >>> weights = {"encoder.q.weight": np.eye(4), "encoder.k.weight": np.eye(4)}
    >>> list(adapt(weights, ["q"], Config(rank=2), seed=0))
    ['encoder.q']
    """
    kinds, rank_pattern, alpha_pattern = kinds or {}, rank_pattern or {}, alpha_pattern or {}
    by_path = {name.removesuffix(".weight"): weight for name, weight in weights.items()}
    layers: dict[str, AdaptedLayer] = {}
    known = match_patterns(kinds, by_path)
    targets = _targets(by_path, target_modules, known)
    ranks = match_patterns(rank_pattern, targets)
    alphas = match_patterns(alpha_pattern, targets)
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
            raise ValueError(f"{path}: {error}") from None
        layers[path] = AdaptedLayer(adapter, own, kind, tuple(weight.shape))
    patterns = {"kinds": kinds, "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}
    for name, pattern in patterns.items():
        paths = by_path if name == "kinds" else layers
        for key in pattern:
            if not any(_matches(key, path) for path in paths):
                raise ValueError(_no_match(f"{name} {key!r}", key, paths))
    return layers


def match_patterns(pattern: Mapping[str, Value], paths: Iterable[str]) -> dict[str, Value]:
    """Return, by path, the value of the first key that matches its end, as PEFT looks it up."""
    left = list(paths)
    found: dict[str, Value] = {}
    for key, value in pattern.items():
        end = re.compile(_END.format(key))
        found |= {path: value for path in left if end.match(path)}
        left = [path for path in left if path not in found]
    return found


def _matches(key: str, path: str) -> bool:
    return re.match(_END.format(key), path) is not None


def _targets(
    by_path: Mapping[str, Array], targets: str | Iterable[str], kinds: Mapping[str, LayerKind]
) -> list[str]:
    if targets == "all-linear":
        return [path for path, weight in by_path.items() if _is_linear(path, weight, kinds)]
    if isinstance(targets, str):
        found = [path for path in by_path if re.fullmatch(targets, path)]
        if not found:
            raise ValueError(_no_match(f"target_modules {targets!r}", targets, by_path))
        return found
    targets = list(targets)
    for target in targets:
        if not any(_is_end(target, path) for path in by_path):
            raise ValueError(_no_match(f"target_modules {target!r}", target, by_path))
    return [path for path in by_path if any(_is_end(target, path) for target in targets)]


def _is_end(target: str, path: str) -> bool:
    return f".{path}".endswith(f".{target}")


def _is_linear(path: str, weight: Array, kinds: Mapping[str, LayerKind]) -> bool:
    kind = kinds.get(path)
    if kind is not None:
        return kind.name in ("linear", "experts", "transposed")
    return weight.ndim == 2 and not _NOT_LINEAR.fullmatch(path.rpartition(".")[-1])


def _kind(path: str, weight: Array, kinds: Mapping[str, LayerKind]) -> LayerKind:
    kind = kinds.get(path)
    if kind is None and weight.ndim != 2:
        raise ValueError(
            f"kinds must say what {path} is (conv, experts): its weight has shape "
            f"{tuple(weight.shape)}"
        )
    return kind or LayerKind()


def _no_match(what: str, wanted: str, paths: Iterable[str]) -> str:
    paths = list(paths)
    ends = {path.rpartition(".")[-1]: path for path in paths}
    near = difflib.get_close_matches(wanted, [*paths, *ends], n=5, cutoff=0.5) or paths[:5]
    return f"{what} matches none of {len(paths)} modules; near it are {', '.join(near)}"
