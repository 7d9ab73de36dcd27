"""The words in which config.json says which modules of a quantised model are dense.

::

    bitsandbytes         llm_int8_skip_modules     full names, or ends of names
    fp8, mxfp4           modules_to_not_convert    names, also of a module around them
    compressed-tensors   ignore                    full names, or re: and a regular expression
    mlx                  false under the name

A library that finds no such words makes a quantised module, for which the file has no scales. A
list replaces the library's own default, which has the output head, so the head is named too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from doraxp.checkpoint._json import JsonObject
from doraxp.checkpoint._quantised.settings import KEYS, PARTS

_LISTS = {
    "bitsandbytes": "llm_int8_skip_modules",
    "fp8": "modules_to_not_convert",
    "mxfp4": "modules_to_not_convert",
    "compressed-tensors": "ignore",
}
_ALSO_OWN_NAMES = ("bitsandbytes", "compressed-tensors")
"""Methods that compare the names of modules in memory, which may have other leading components."""


def declared(config: JsonObject, dense: Sequence[str], packed: Iterable[str]) -> JsonObject:
    """Return a configuration that names the dense modules.

    Parameters
    ----------
    config : dict
        The content of config.json.
    dense : sequence of str
        The modules of the result that are dense, by their names on disk.
    packed : iterable of str
        Those that are quantised.
    """
    edited = dict(config)
    for key in PARTS:
        part = config.get(key)
        if isinstance(part, dict) and any(isinstance(part.get(own), dict) for own in KEYS):
            edited[key] = declared(part, dense, packed)
    is_of_several = any(isinstance(config.get(key), dict) for key in PARTS)
    for key in KEYS:
        entries = config.get(key)
        if isinstance(entries, dict):
            edited[key] = _declared(entries, dense, list(packed), is_of_several=is_of_several)
    return edited


def _declared(
    entries: JsonObject, dense: Sequence[str], packed: Sequence[str], *, is_of_several: bool
) -> JsonObject:
    method = entries.get("quant_method")
    if method is None:  # of mlx-lm
        return entries | dict.fromkeys(dense, False)
    key = _LISTS.get(str(method))
    if key is None:
        return entries
    before = entries.get(key)
    names = [str(one) for one in before] if isinstance(before, list) else []
    names += dense
    if method == "compressed-tensors":
        names += [f"re:{re.escape(name)}[.].*" for name in dense if name.endswith(".experts")]
    if is_of_several and method in _ALSO_OWN_NAMES:
        ends = (_end(name, packed) for name in dense)
        is_exact = method == "compressed-tensors"
        names += [f"re:.*{re.escape(end)}$" if is_exact else end for end in ends if end]
    return entries | {key: list(dict.fromkeys(names))}


def _end(name: str, packed: Sequence[str]) -> str:
    """Return the end of a name from its block on, if no quantised module has that end."""
    match = re.search(r"[^.]+\.\d+\..*", name)
    end = match[0] if match else name.rpartition(".")[2]
    return "" if any(other.endswith(end) for other in packed) else end
