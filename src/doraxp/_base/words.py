"""Words of messages: a number with its noun, a noun with its article, and the nearest name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

_PLURALS = {"is": "are", "has": "have", "does": "do"}


def counted(count: int, noun: str, verb: str = "", *, of: int | None = None) -> str:
    """Return a number with its noun, and a verb: "1 file", "2 files are", "1 of 3 files is".

    The noun agrees with `of`, if that is given, and the verb with `count`.
    """
    total = count if of is None else of
    if total != 1:
        noun = f"{noun.removesuffix('ix')}ices" if noun.endswith("matrix") else f"{noun}s"
    if count != 1:
        verb = _PLURALS.get(verb, verb.removesuffix("s"))
    number = f"{count:,}" if of is None else f"{count:,} of {of:,}"
    return f"{number} {noun} {verb}".rstrip()


def first_of(names: Iterable[str], noun: str) -> str:
    """Return the first three names, each once, and the number of the others: "a; b; c; and …"."""
    first, rest = (every := [*dict.fromkeys(names)])[:3], len(every) - 3
    return "; ".join(first + ([f"and {counted(rest, f'other {noun}')}"] if rest > 0 else []))


def with_article(noun: str) -> str:
    """Return a noun behind its article: "a Linear", "an Embedding"."""
    return f"{'an' if noun[:1].lower() in 'aeio' else 'a'} {noun}"


def the_nearest(names: Sequence[str]) -> str:
    """Return "the nearest is a", or "the nearest are a, b"."""
    return f"the nearest {'is' if len(names) == 1 else 'are'} {', '.join(names)}"


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ": the nearest is …" for the known name that is most like `name`, or nothing."""
    found = difflib.get_close_matches(name, [*known], n=1)
    return f": {the_nearest(found)}" if found else ""
