"""The rows of a fused tensor that each of its modules has: queries, keys and values, gate and up.

::

    qkv_proj (q + k + v, in)      rows 0..q of q_proj, then those of k_proj, then those of v_proj
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

_QKV, _GATE_UP = ("q", "k", "v"), ("gate", "up")
_ORDERS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("qkv", "Wqkv", "w_qkv", "wqkv", "qkv_proj", "att_proj"), _QKV),
    **dict.fromkeys(("in_proj_weight", "in_proj_bias", "in_proj"), _QKV),
    "gqkv_proj": ("gate", *_QKV),
    **dict.fromkeys(("gate_up_proj", "w12"), _GATE_UP),
    **dict.fromkeys(("up_gate_proj", "ff_proj"), ("up", "gate")),
}
"""By the last part of a fused tensor's name: its modules, in the order of their rows."""
_LINEAR_ATTENTION = ("qkv", "z", "b", "a")
_PART = re.compile(r"(?:^|[._])(?P<part>qkv|query|key|value|gate|up|[qkvzba])(?:_proj|_lin)?$")
_SHORT = {"query": "q", "key": "k", "value": "v"}


def rows_of_modules(tensor: str, size: int, modules: Mapping[str, int]) -> dict[str, slice] | None:
    """Return the rows of each module in a fused tensor; None where they are not known.

    Parameters
    ----------
    tensor : str
        The fused tensor's module, such as ``layers.0.attn.qkv``.
    size : int
        The number of its rows.
    modules : mapping of str to int
        The rows of each module that has an adapter, by path.
    """
    own = tensor.rpartition(".")[2]
    parts = {path: _part(path) if path.rpartition(".")[2] != own else None for path in modules}
    order = _ORDERS.get(tensor.rpartition(".")[2], ())
    if tensor.endswith(".in_proj") and not set(_QKV) & set(parts.values()):
        order = _LINEAR_ATTENTION
    if len(set(parts.values())) < len(parts) or not set(parts.values()) <= set(order):
        return None
    sizes = _sizes(order, size, {str(parts[path]): rows for path, rows in modules.items()})
    if sizes is None:
        return None
    starts = dict(zip(order, _starts(sizes), strict=True))
    return {
        path: slice(starts[str(part)], starts[str(part)] + modules[path])
        for path, part in parts.items()
    }


def _part(path: str) -> str | None:
    match = _PART.search(path)
    return None if match is None else _SHORT.get(match["part"], match["part"])


def _starts(sizes: Sequence[int]) -> list[int]:
    return [sum(sizes[:place]) for place in range(len(sizes))]


def _sizes(order: Sequence[str], size: int, known: Mapping[str, int]) -> list[int] | None:
    """Return the rows of every part: keys are as many as values, and gates as many as ups."""
    known = dict(known)
    for one, other in (("k", "v"), ("v", "k"), ("gate", "up"), ("up", "gate")):
        if one in known and other in order:
            known.setdefault(other, known[one])
    missing = [part for part in order if part not in known]
    rest = size - sum(known.values())
    if missing == ["k", "v"] and rest % 2 == 0:
        known |= {"k": rest // 2, "v": rest // 2}
    elif len(missing) == 1:
        known[missing[0]] = rest
    elif missing:
        return None
    sizes = [known[part] for part in order]
    return sizes if min(sizes) > 0 and sum(sizes) == size else None
