"""`CheckpointError`, the one error that a file's content can cause."""

from __future__ import annotations

from doraxp._base.printable import printable

_LIMIT = 1000


class CheckpointError(ValueError):
    """A file cannot be used. The message is one short line, whatever the file contains."""

    def __init__(self, message: str) -> None:
        line = printable(message)
        if len(line) > _LIMIT:
            line = f"{line[: _LIMIT - 40]}… of {len(line)} letters"
        super().__init__(line)
