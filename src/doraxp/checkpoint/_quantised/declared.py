"""The words in which config.json says which modules of a quantised model are dense.

::

    bitsandbytes         llm_int8_skip_modules     full names, or ends of names
    fp8, mxfp4           modules_to_not_convert    names, also of a module around them
    compressed-tensors   ignore                    full names, or re: and a regular expression
    mlx                  false under the name

A library that finds no such word makes a quantised module, for which the file has no scales. A list
replaces the library's own default, which has the output head, so the head is named too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from doraxp.checkpoint._json import JsonObject
from doraxp.checkpoint._quantised.settings import KEYS, PARTS

_LISTS = {
    "bitsandbytes": "llm_int8_skip_modules",
    "fp8": "modules_to_not_convert",
    "mxfp4": "modules_to_not_convert",
    "compressed-tensors": "ignore",
}
_IN_MEMORY = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head", "lm_head"),
    ("model.layers.", "model.language_model.layers."),
    ("model.", "model."),
    ("", "model."),
)
"""The leads of modules of a model with images or sound: on disk, and as transformers 5 has them."""


def undeclared(config: JsonObject, modules: Sequence[str]) -> list[str]:
    """Return those of the dense modules of a model that its configuration must name.

    A library without such a list leaves the head dense by itself. Regular expressions of the file
    are not tried, because they may run for ever; a module that is named twice does no harm.
    """
    found = dict(_places(config))
    named: set[str] = set()
    for entries in found.values():
        method = str(entries.get("quant_method"))
        key = _LISTS.get(method)
        if key is None or method == "mxfp4":
            return []  # mlx-lm looks for scales, and MXFP4 has experts alone
        value = entries.get(key)
        words = [str(one) for one in value] if isinstance(value, list) else ["lm_head"]
        named |= {name for name in modules if _is_named(name, words, method)}
    return [name for name in modules if found and name not in named]


def _is_named(name: str, words: Sequence[str], method: str) -> bool:
    if method == "compressed-tensors":
        return name in words
    return any(name.endswith(word) or name.startswith(f"{word}.") for word in words)


def declared(config: JsonObject, dense: Sequence[str]) -> JsonObject:
    """Return a configuration that names these dense modules too.

    Parameters
    ----------
    config : dict
        The content of config.json.
    dense : sequence of str
        Modules by their names on disk.
    """
    edited = dict(config)
    has_parts = any(isinstance(config.get(key), dict) for key in PARTS)
    names = list(dict.fromkeys(other for name in dense for other in _names(name, has_parts)))
    for (part, key), entries in _places(config):
        new = _declared(entries, dense, names)
        if part is None:
            edited[key] = new
        else:
            inner = edited[part]
            assert isinstance(inner, dict)  # as `_places` found
            edited[part] = inner | {key: new}
    return edited


def _places(config: JsonObject) -> Iterator[tuple[tuple[str | None, str], JsonObject]]:
    """Yield the words about quantising, with the part of the configuration and the key."""
    for part in (None, *PARTS):
        inner = config if part is None else config.get(part)
        for key in KEYS:
            entries = inner.get(key) if isinstance(inner, dict) else None
            if isinstance(entries, dict):
                yield (part, key), entries


def _names(name: str, has_parts: bool) -> list[str]:
    """Return the names of a module on disk and in memory."""
    if not has_parts:
        return [name]
    lead, other = next(pair for pair in _IN_MEMORY if name.startswith(pair[0]))
    return [name, other + name.removeprefix(lead)]


def _declared(entries: JsonObject, dense: Sequence[str], names: Sequence[str]) -> JsonObject:
    method = entries.get("quant_method")
    if method is None:  # of mlx-lm
        return entries | dict.fromkeys(dense, False)
    key = _LISTS.get(str(method))
    if key is None:
        return entries
    before = entries.get(key)
    words = [str(one) for one in before] if isinstance(before, list) else ["lm_head"]
    words += names
    if method == "compressed-tensors":
        words += [f"re:{re.escape(name)}[.].*" for name in names if name.endswith(".experts")]
    return entries | {key: list(dict.fromkeys(words))}
