"""The modules of a model that get an adapter.

    path      of a module; its weight is named PATH.weight
    target    a path, the end of one, a regular expression, or "all-linear"
    outside   a module outside of the numbered layers: no part of its path is a number

"all-linear" leaves out embeddings and output heads. It finds them by their names, by the tie of a
head to an embedding, and by their shapes: a vocabulary has more rows than all else.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeAlias, cast

from doraxp._base.types import Array, RowWeight
from doraxp._core.kinds import LayerKind
from doraxp.backends import check_shaped

Modules: TypeAlias = str | Iterable[str]

_LINEAR = ("linear", "experts", "transposed", "transposed_experts")
_VOCABULARY, _RATIO = 16_384, 1.5
"""The least rows of a vocabulary that is found by its shape alone, absolute and beside others."""
# Each word stands for modules of the models in transformers.
_EMBEDDINGS = frozenset(
    (
        *("shared", "wte", "wpe", "relative_attention_bias", "mask_tokens", "iou_token", "pe_k"),
        *("hq_token", "obj_score_token", "presence_token", "audio_bos_eos_token", "bias_values"),
        *("column_embedder", "row_embedder", "queries_embedder", "hashbucketcodepointembedder"),
        *("input_embeds_layer", "position_embeds_layer", "codebook", "embed_tokens_per_layer"),
        *("query_feat", "queries_features"),
    )
)
_EMBEDDING = re.compile(r"(.*_)?(embed(s|ding|dings|_\w+)?|emb)(_table)?|.*embed.*tokens?")
_LIST_OF_EMBEDDINGS = re.compile(r".*embeddings|embed_tokens|embed_\w+_tokens|input_embeds_layers")
# Linear modules with such names: `patch_embedding`, `embedding_proj`, `class_embed` of detectors.
_LINEAR_AFTER_ALL = re.compile(
    r".*(patch|vision|predictor|state|action|return|proj|dense|linear|transform|mapping|unitseq2)"
    r".*|.*_layer|(enc_out_)?class_embed|relative_pos_embeddings|decoder_embed"
)
_HEAD = re.compile(
    r"(.*\.)?(lm_heads?(\.\d+)?|lm_head\.(decoder|out_proj)|(predictions|mlm_score)\.decoder"
    r"|generator_lm_head|lm_loss|embed_out|output_projection|vocab_projector|pred_layer\.proj"
    r"|unembed|unembedding)"
)
_CLASSIFIER = re.compile(r"classifier|score|head")
_BESIDE_THE_MODEL = re.compile(
    r"((model|transformer|decoder|language_model|backbone)\.)?(output|output_layer|decoder|head)"
)


class Targets(NamedTuple):
    """The modules that `target_modules` and `exclude_modules` select, and those that they do not.

    All paths are in the order of the weights.
    """

    paths: list[str]
    """The modules that get an adapter."""
    excluded: list[str]
    """The targets that `exclude_modules` takes out."""
    left_out: dict[str, str]
    """By path, why "all-linear" leaves out a weight of two axes: "embedding", "output head", "tied
    to PATH", "rows of a vocabulary" or "parameter". Empty for other targets."""
    unmatched: dict[str, list[str]]
    """By target that matches no module, the paths or ends of paths whose names are nearest."""
    unused: dict[str, list[str]]
    """The same of the exclusions."""


def find_targets(
    weights: Mapping[str, Array | RowWeight],
    target_modules: Modules,
    *,
    exclude_modules: Modules | None = None,
    kinds: Mapping[str, LayerKind] | None = None,
) -> Targets:
    """Return the modules that `adapt` gives an adapter, and the targets that match no module.

    ::

        paths = those that target_modules matches − those that exclude_modules matches

    Parameters
    ----------
    weights : mapping of str to array or RowWeight
        By name, as `adapt` takes them. Only their shapes are read. Any object with a `shape` will
        do.
    target_modules : str or iterable of str
        As `adapt` takes them.
    exclude_modules : str or iterable of str, optional
        Paths or ends of paths, or one regular expression for whole paths. They win over
        `target_modules`.
    kinds : mapping of str to LayerKind, optional
        By path.

    Returns
    -------
    Targets

    Raises
    ------
    TypeError
        A target that is not excluded has no shape. With "all-linear" each weight must have one.
    ValueError
        A string is not a regular expression.

    Notes
    -----
    "all-linear" leaves out, of the weights of two axes without a kind:

    - a name that embeddings have, such as ``wte``, ``shared`` or ``word_embeddings``;
    - a name that output heads have, such as ``lm_head`` and ``embed_out``. Names that other modules
      have too are heads only beside the model: ``output`` and ``output_layer``, and ``classifier``
      and ``score``, which PEFT leaves out for sequence classification;
    - a weight in the same memory as an embedding;
    - a weight outside of the numbered layers with more rows than columns and the shape of the
      largest embedding;
    - the weight, or weights of one shape, outside of the numbered layers that have the most rows:
      at least 16384, and 1.5 times those of all others;
    - names without ``.weight``, if other names have it.

    PEFT knows the classes of modules and leaves out the same ones. It also leaves out matrices that
    are not the weight of a linear module, such as the routers of experts.

    Examples
    --------
    >>> import numpy as np
    >>> from doraxp.layers import find_targets
    >>> weights = {"shared.weight": np.ones((9, 4)), "block.0.q.weight": np.ones((4, 4))}
    >>> found = find_targets(weights, "all-linear")
    >>> found.paths, found.left_out
    (['block.0.q'], {'shared': 'embedding'})
    """
    by_path = {name.removesuffix(".weight"): cast(Array, each) for name, each in weights.items()}
    targets = _listed("target_modules", target_modules)
    exclusions = _listed("exclude_modules", exclude_modules or [])
    left_out: dict[str, str] = {}
    unmatched: dict[str, list[str]] = {}
    if targets == "all-linear":
        kinds = kinds or {}
        _check_shaped(by_path)
        left_out = _left_out(weights, by_path, kinds)
        paths = [
            path
            for path, weight in by_path.items()
            if path not in left_out and _is_linear(path, weight, kinds)
        ]
    else:
        paths = [path for path in by_path if _matches(targets, path)]
        unmatched = _unmatched(targets, by_path)
    excluded = [path for path in paths if _matches(exclusions, path)]
    kept = [path for path in paths if path not in set(excluded)]
    _check_shaped({path: by_path[path] for path in kept})
    return Targets(kept, excluded, left_out, unmatched, _unmatched(exclusions, by_path))


def nearest(wanted: str, paths: Iterable[str]) -> list[str]:
    """Return the paths or ends of paths whose names are nearest; without such, the first paths."""
    paths = list(paths)
    names = dict.fromkeys([*paths, *(path.rpartition(".")[-1] for path in paths)])
    return difflib.get_close_matches(wanted, names, n=5, cutoff=0.5) or paths[:5]


def _check_shaped(weights: Mapping[str, object]) -> None:
    """Raise TypeError where a weight has no shape."""
    for path, weight in weights.items():
        try:
            check_shaped("weight", weight)
        except TypeError as error:
            raise TypeError(f"{path}: {error}") from None


def _listed(argument: str, modules: Modules) -> str | list[str]:
    if not isinstance(modules, str):
        return list(modules)
    try:
        re.compile(modules)
    except re.error as error:
        raise ValueError(
            f"{argument} must be a regular expression or a list, got {modules!r}: {error}"
        ) from None
    return modules


def _unmatched(modules: str | list[str], paths: Iterable[str]) -> dict[str, list[str]]:
    """Return the regular expression or the ends that match no path, each with the nearest paths."""
    paths = list(paths)
    each = {modules: modules} if isinstance(modules, str) else {end: [end] for end in modules}
    return {
        name: nearest(name, paths)
        for name, alone in each.items()
        if not any(_matches(alone, path) for path in paths)
    }


def _matches(modules: str | list[str], path: str) -> bool:
    if isinstance(modules, str):
        return re.fullmatch(modules, path) is not None
    return any(f".{path}".endswith(f".{end}") for end in modules)


def _is_linear(path: str, weight: Array, kinds: Mapping[str, LayerKind]) -> bool:
    kind = kinds.get(path)
    return len(weight.shape) == 2 if kind is None else kind.name in _LINEAR


def _left_out(
    weights: Mapping[str, Array | RowWeight],
    by_path: Mapping[str, Array],
    kinds: Mapping[str, LayerKind],
) -> dict[str, str]:
    """Return why "all-linear" leaves out a weight of two axes, for each that it does."""
    shapes = {
        path: (weight.shape[0], weight.shape[1])
        for path, weight in by_path.items()
        if path not in kinds and len(weight.shape) == 2
    }
    is_named = any(name.endswith(".weight") for name in weights)
    parameters = [path for path in shapes if is_named and path in weights]
    found = dict.fromkeys(parameters, "parameter")
    shapes = {path: shape for path, shape in shapes.items() if path not in found}
    embeddings = [path for path in shapes if _is_embedding(path)]
    found |= dict.fromkeys(embeddings, "embedding")
    found |= {path: "output head" for path, shape in shapes.items() if _is_head(path, shape)}
    places = {_place(by_path[path]): path for path in reversed(embeddings)}
    largest = max((shapes[path] for path in embeddings), default=None)
    vocabulary = _vocabulary(shapes)
    for path, shape in shapes.items():
        if path in found:
            continue
        if _place(by_path[path]) in places:
            found[path] = f"tied to {places[_place(by_path[path])]}"
        elif path in vocabulary or (shape == largest and shape[0] > shape[1] and _is_outside(path)):
            found[path] = "rows of a vocabulary"
    return found


def _is_embedding(path: str) -> bool:
    *before, last = path.lower().split(".")
    if last.isdecimal() and before:
        return _LIST_OF_EMBEDDINGS.fullmatch(before[-1]) is not None
    if last == "w":  # of CTRL; elsewhere it is a usual name of a matrix
        return before[-1:] == ["transformer"]
    word = re.sub(r"_\d+$", "", last)
    is_named = word in _EMBEDDINGS or _EMBEDDING.fullmatch(word) is not None
    return is_named and (word in _EMBEDDINGS or not _LINEAR_AFTER_ALL.fullmatch(word))


def _is_head(path: str, shape: tuple[int, int]) -> bool:
    if _HEAD.fullmatch(path):
        return True
    if shape[0] == shape[1]:  # a projection: Siglip has `head`
        return False
    return bool(_CLASSIFIER.fullmatch(path)) or (
        shape[0] > shape[1] and bool(_BESIDE_THE_MODEL.fullmatch(path))
    )


def _is_outside(path: str) -> bool:
    return not any(part.isdecimal() for part in path.split("."))


def _vocabulary(shapes: Mapping[str, tuple[int, int]]) -> set[str]:
    """Return the weights with the most rows, if their number is that of a vocabulary."""
    outside = {path: shape for path, shape in shapes.items() if _is_outside(path)}
    most = max(outside.values(), default=(0, 0))
    found = {path for path, shape in outside.items() if shape == most}
    others = [shape[0] for path, shape in shapes.items() if path not in found]
    is_long = most[0] >= _VOCABULARY and most[0] > most[1]
    return found if is_long and others and most[0] >= _RATIO * max(others) else set()


def _place(weight: Array) -> tuple[object, ...]:
    """Return a value that two names of the same memory share."""
    shape = tuple(weight.shape)
    if hasattr(weight, "data_ptr"):  # of PyTorch; 0 on the device "meta"
        return weight.data_ptr() or id(weight), shape
    for name in ("__array_interface__", "__cuda_array_interface__"):
        interface = getattr(weight, name, None)
        if interface is not None:
            return interface["data"][0], shape
    return id(weight), shape
