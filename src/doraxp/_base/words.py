"""Words of messages: a number with its noun, a noun with its article, and the nearest name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_PLURALS = {"is": "are", "has": "have", "does": "do", "differs": "differ", "matrix": "matrices"}


def counted(count: int, noun: str, verb: str = "") -> str:
    """Return a number with its noun, and a verb: "1 file", "2 files", "1,234 tensors are"."""
    words = [word if count == 1 else _plural(word) for word in (noun, verb) if word]
    return " ".join((f"{count:,}", *words))


def with_article(noun: str) -> str:
    """Return a noun behind its article: "a Linear", "an Embedding"."""
    return f"{'an' if noun[:1].lower() in 'aeio' else 'a'} {noun}"


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ": the nearest is …" for the known name that is most like `name`, or nothing."""
    found = difflib.get_close_matches(name, [*known], n=1)
    return f": the nearest is {found[0]}" if found else ""


def _plural(words: str) -> str:
    """Return the plural of a verb, or of the last word of a noun."""
    first, space, last = words.rpartition(" ")
    return f"{first}{space}{_PLURALS.get(last, f'{last}s')}"
