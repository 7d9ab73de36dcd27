"""Names from strangers' files, made harmless for a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    """Return `text` with an escape for each sign that a terminal may obey or cannot show.

    So it stays one line, cannot move the cursor or set a title, and shows in its own order.
    """
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)
