"""Lines for the terminal: each stays one line, whatever names it contains, in any encoding."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import sys
from collections.abc import Iterator

from doraxp._base.printable import printable

_IN_ASCII = {
    "Δ": "d", "–": "-", "─": "-", "━": "=", "╸": "=", "╺": " ", "│": "|", "±": "+-", "×": "x",
    "÷": "/", "·": "*", "‖": "|", "′": "'", "°": " deg", "…": "...", "≤": "<=", "≥": ">=",
    "−": "-", "²": "^2", "ᵖ": "^p", "ᵀ": "^T",
}  # fmt: skip


def accept_any_encoding() -> None:
    """Let the output streams replace a sign that their encoding lacks, instead of failing.

    A finished merge must not end with an error because a terminal has no Δ.
    """
    codecs.register_error("doraxp", _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="doraxp")


@contextlib.contextmanager
def output_that_may_fail(command: str) -> Iterator[None]:
    """Warn where what is printed cannot be written: the work is done, and its exit status stands.

    There is no warning if the program that reads the output, such as `head`, has ended.
    """
    try:
        yield
        sys.stdout.flush()
    except SystemExit:
        pass  # of rich, where the reader has gone
    except OSError as error:
        drop_output()
        if not isinstance(error, BrokenPipeError):
            print_warning(command, f"what it prints could not be written: {error.strerror}")


def drop_output() -> None:
    """Send nowhere the output that is flushed when the process ends: it cannot be written."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def print_interrupted(command: str, advice: str) -> None:
    """Print that Ctrl-C stopped a command, and how to go on if there is a way."""
    _print_message(command, f"interrupted{'; ' if advice else ''}{advice}")


def print_error(command: str, error: object) -> None:
    """Print why a command failed."""
    _print_message(command, f"error: {reason(error)}")


def reason(error: object) -> str:
    """Return the text of an error; that of the system begins with the file that it is about."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def print_warning(command: str, message: str) -> None:
    """Print a warning."""
    _print_message(command, f"warning: {message}")


def _print_message(command: str, message: str) -> None:
    print(f"{command}: {printable(message)}", file=sys.stderr)


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    """Return ASCII letters for the signs that an encoding lacks, and where they end."""
    assert isinstance(error, UnicodeEncodeError)  # output streams do not decode
    lacking = error.object[error.start : error.end]
    return "".join(_IN_ASCII.get(sign) or ascii(sign)[1:-1] for sign in lacking), error.end
