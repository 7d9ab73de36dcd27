"""Advice for an error about names: the nearest tensor, and the argument of `--rename`."""

from __future__ import annotations

import re
from itertools import takewhile

from doraxp.checkpoint._names._places import Shapes, Wanted, fits


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


def nearest(one: Wanted, shapes: Shapes) -> str | None:
    """Return the tensor whose name ends most like the one that is wanted, of those that fit."""
    parts = one.name.split(".")

    def shared(name: str) -> int:
        pairs = zip(reversed(parts), reversed(name.split(".")), strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    fitting = [name for name, shape in shapes.items() if fits(one.shape, shape)]
    best = max(fitting, key=shared, default=None)
    return best if best is not None and shared(best) > 1 else None
