"""The command line: `doraxp COMMAND`, or `python -m doraxp COMMAND`.

`main` imports the module of the command that is called, and all of them only to list them. A
command imports the modules that an extra installs only when it runs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from doraxp._terminal.messages import (
    accept_any_encoding,
    drop_output,
    print_error,
    print_interrupted,
)
from doraxp.cli._parser import (
    COMMANDS,
    new_parser,
    unknown_arguments,
    unknown_command,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command of `doraxp`.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments; by default those of the process.

    Returns
    -------
    int
        The exit status. Bad arguments leave with SystemExit and status 2, as argparse does.
    """
    accept_any_encoding()
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["help"]:  # as in git: doraxp help merge
        words = [*words[1:], "--help"]
    called = words[0] if words else ""
    prog = f"doraxp {called}" if called in COMMANDS else "doraxp"
    try:
        return _run(words, called)
    except BrokenPipeError:  # the program that read the output has ended, as head does
        drop_output()
        return 0
    except OSError as error:  # a disk that is full, say
        print_error(prog, error)
        return 2
    except KeyboardInterrupt as stopped:
        print_interrupted(prog, str(stopped))
        return 130  # 128 + SIGINT, as shells have it


def _run(words: list[str], called: str) -> int:
    """Parse the arguments, run the command and return its exit status."""
    if not words:  # a call that does nothing must not look like success in a script
        print(new_parser().format_help(), end="", file=sys.stderr)
        return 2
    if called not in COMMANDS and not called.startswith("-"):
        print_error("doraxp", unknown_command(called))
        sys.exit(2)
    parser = new_parser((called,) if called in COMMANDS else COMMANDS)
    arguments, rest = parser.parse_known_args(words)
    if rest:
        command = arguments.parser
        command.error(unknown_arguments(command, rest))
    status: int = arguments.run(arguments)
    return status
