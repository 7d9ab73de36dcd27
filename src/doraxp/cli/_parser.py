"""The parser of the command line, and the texts that --help and the reference page show.

A command is a module with the texts `SUMMARY`, one line, and `DETAILS`; an `EXAMPLE`; the meaning
of exit status 1 as `STATUS_1`, or None; and with `add_arguments(parser)` and `run(arguments)`,
which returns the exit status.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any, NoReturn

import doraxp
from doraxp._base.words import nearest
from doraxp._terminal.messages import print_error

GROUPS: Mapping[str, tuple[str, ...]] = {
    "see it work": ("demo",),
    "adapters and models on disk": (
        "doctor", "inspect", "merge", "audit", "convert", "extract",
    ),
    "tests and measurements": ("verify", "conform", "vectors", "bench"),
    "the shell": ("completion",),
}  # fmt: skip
"""The commands by purpose, in the order in which a user meets them."""
COMMANDS = tuple(name for names in GROUPS.values() for name in names)
DESCRIPTION = "DoRA, weight-decomposed low-rank adaptation, on any array."
EPILOG = "doraxp COMMAND --help has the options of a command and an example."
STATUSES = {
    0: "the command has done its work",
    2: "an argument or a file does not fit, or a library is missing: the error says which",
    130: "Ctrl-C",
}
"""The exit statuses of all commands, except 1."""
_OF_MANY = "COMMAND"


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are one line, as those of the commands are.

    It takes no abbreviation of an option: --base would be --base-is-residual.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Print the error without the usage, which --help has, and leave with status 2."""
        if message.startswith("the following arguments are required"):
            message = f"{message}: {self.prog} --help describes them"
        print_error(self.prog, message)
        sys.exit(2)


class _AllCommands(CommandParser):
    """The parser of `doraxp` itself, whose help has the commands by purpose."""

    def format_help(self) -> str:
        """Return the usage, a line for each command, and the options."""
        formatter = argparse.HelpFormatter(self.prog, max_help_position=16)
        formatter.add_usage("doraxp COMMAND [options]", (), ())
        formatter.add_text(self.description)
        for title, names in GROUPS.items():
            formatter.start_section(title)
            formatter.add_arguments(
                argparse.Action([], name, metavar=name, help=module_of(name).SUMMARY)
                for name in names
            )
            formatter.end_section()
        formatter.start_section("options")
        formatter.add_arguments(action for action in self._actions if action.option_strings)
        formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()


def module_of(name: str) -> ModuleType:
    """Return the module of a command."""
    return import_module(f"doraxp.cli.{name}")


def new_parser(names: Iterable[str] = COMMANDS) -> argparse.ArgumentParser:
    """Return the parser of `doraxp` with some commands, whose modules are imported."""
    parser = _AllCommands(prog="doraxp", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument(
        "--version",
        action="version",
        version=f"doraxp {doraxp.__version__}",
        help="show the version and exit",
    )
    commands = parser.add_subparsers(
        metavar=_OF_MANY, required=True, parser_class=CommandParser, dest="command"
    )
    for name in names:
        module = module_of(name)
        command = commands.add_parser(
            name,
            help=module.SUMMARY,
            description=f"{module.SUMMARY} {module.DETAILS}".strip(),
            epilog="\n".join(_epilog(module)),
            formatter_class=_Help,
        )
        module.add_arguments(command)
        command.usage = usage(command)
        command.set_defaults(run=module.run, parser=command)
    return parser


class _Help(argparse.HelpFormatter):
    """The format of a command's help: the lines of its epilog stay apart."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(
            super(_Help, self)._fill_text(one, width, indent) for one in text.split("\n")
        )


def _epilog(module: ModuleType) -> Iterator[str]:
    yield f"example: {module.EXAMPLE}"
    if module.STATUS_1 is not None:
        yield f"exit status 1: {module.STATUS_1}"


def statuses_of(module: ModuleType) -> dict[int, str]:
    """Return the meaning of each exit status of a command."""
    own = {} if module.STATUS_1 is None else {1: module.STATUS_1}
    return dict(sorted((STATUSES | own).items()))


def usage(command: argparse.ArgumentParser) -> str:
    """Return the arguments that a command needs, in one line: "doraxp vectors --out DIR [options]".

    argparse would list all options, in five lines or more.
    """
    words = [command.prog]
    for action in command._actions:
        if action.required:
            value = action.metavar or "{" + ",".join(map(str, action.choices or ())) + "}"
            words.append(
                f"{action.option_strings[0]} {value}" if action.option_strings else f"{value}"
            )
    return " ".join([*words, "[options]"])


def unknown_command(name: str) -> str:
    """Return the error message for a word that is not a command."""
    return f"COMMAND must be one that doraxp --help lists, got {name!r}{nearest(name, COMMANDS)}"


def unknown_arguments(parser: argparse.ArgumentParser, words: list[str]) -> str:
    """Return the error message for arguments that a command does not have."""
    first = next((word for word in words if word.startswith("-")), None)
    if first is None:
        return f"an argument is left over: {' '.join(words)}; {parser.prog} --help lists all"
    for action in parser._actions:
        if not action.option_strings and first.lstrip("-").upper() == action.metavar:
            return f"{action.metavar} has no name before it, got {first!r}: write {parser.usage}"
    options = [option for action in parser._actions for option in action.option_strings]
    near = nearest(first.partition("=")[0], options)
    return f"an option must be one that {parser.prog} --help lists, got {first!r}{near}"
