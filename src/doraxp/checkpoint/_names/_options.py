"""`rename_option`: the argument of `--rename` that gives a module another name."""

from __future__ import annotations

import re
from itertools import takewhile


def rename_option(old: str, new: str) -> str:
    """Return the argument that renames the leading components in which two names differ.

    It is "" where no argument can: the last = of an argument ends its regular expression.
    """
    if "=" in new:
        return ""
    ends = zip(reversed(old.split(".")), reversed(new.split(".")), strict=False)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], ends))
    one, other = (".".join(name.split(".")[: len(name.split(".")) - shared]) for name in (old, new))
    other = other.replace("\\", r"\\")
    if one and other:
        return f"^{re.escape(one)}={other}"
    return f"^={other}." if other else f"^{re.escape(one)}[.]="
