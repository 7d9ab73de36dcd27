"""`CheckpointError`, the one error that a file's content can cause."""

from __future__ import annotations

_LIMIT = 1000


class CheckpointError(ValueError):
    """A file cannot be used. The message is one short line, whatever the file contains."""

    def __init__(self, message: str) -> None:
        line = "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in message)
        if len(line) > _LIMIT:
            line = f"{line[: _LIMIT - 40]}… of {len(line)} letters"
        super().__init__(line)
