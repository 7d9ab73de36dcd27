"""Write docs/reference/cli.md from the parser of the command line.

    python docs/command_line.py

A test compares the page with this script's: the page cannot drift from the parser.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from doraxp.cli._parser import EPILOG, GROUPS, module_of, new_parser, statuses_of, usage

PAGE = Path(__file__).parent / "reference" / "cli.md"
GUIDES = {
    "demo": "../tutorials/demo.md",
    "doctor": "../howto/doctor.md",
    "inspect": "../howto/merge.md",
    "merge": "../howto/merge.md",
    "audit": "../howto/audit.md",
    "convert": "../howto/merge.md",
    "extract": "../howto/extract.md",
    "verify": "../howto/testing.md",
    "conform": "../howto/conform.md",
    "vectors": "vectors.md",
    "bench": "../explanation/cost.md",
}
"""The page that explains a command."""
VALUES = "lora|stochastic|torch"
"""The values that stand behind an option in a text of help."""
HEAD = """\
# Command line

The package installs the command `doraxp`. `python -m doraxp` is the same command.

```text
doraxp COMMAND [options]
```

{epilog} `doraxp` alone lists the
commands, and `doraxp --version` prints the version. `python docs/command_line.py` writes this page
from the texts of `--help`.

| purpose | command | result |
|---|---|---|
{commands}

## Exit status

| status | meaning |
|---|---|
{statuses}

An error is one line on the standard error. It begins with the name of the command. A model, an
adapter or a JSON file is written whole or not at all. After Ctrl-C, the same `doraxp merge` goes on
where it stopped.

## Shell completion

`doraxp completion` prints a script that completes commands, options, their values and files. It
needs the extra `completion`. Save the script where the shell looks for it:

| shell | command |
|---|---|
| bash | `doraxp completion bash > ~/.local/share/bash-completion/completions/doraxp` |
| zsh | `doraxp completion zsh > ~/.zfunc/_doraxp` |
| fish | `doraxp completion fish > ~/.config/fish/completions/doraxp.fish` |

zsh looks in `~/.zfunc` if the file `~/.zshrc` has `fpath+=~/.zfunc` before `compinit`.

"""
TAIL = """\
## All examples

The tests run the examples of this page, in this order. The first lines make a small model, an
adapter of it, and an implementation of DoRA.

```sh
work=$(mktemp -d)
python benchmarks/checkpoint_model.py "$work/m" --width 64 --gigabytes 0.0003 --rank 4
cd "$work/m"
cat > mine.py <<'EOF'
import numpy as np


def merge(weight, lora_a, lora_b, magnitude, scaling):
    v = weight + scaling * lora_b @ lora_a
    return (magnitude / np.linalg.norm(v, axis=1))[:, None] * v
EOF
{examples}
```
"""


def page() -> str:
    """Return the page."""
    commands = {action.dest: action for action in new_parser()._actions}["command"].choices
    assert commands is not None
    rows = (_listed(title, names) for title, names in GROUPS.items())
    everything = {
        status: text for name in commands for status, text in statuses_of(module_of(name)).items()
    }
    everything[1] = "the check found something wrong: " + ", ".join(
        f"[{name}](#doraxp-{name})" for name in commands if module_of(name).STATUS_1 is not None
    )
    statuses = "\n".join(f"| {status} | {everything[status]} |" for status in sorted(everything))
    head = HEAD.format(epilog=_code(EPILOG), commands="\n".join(rows), statuses=statuses)
    sections = (_section(name, commands[name]) for name in commands)
    examples = "\n".join(module_of(name).EXAMPLE for name in commands)
    return f"{head}{''.join(sections)}{TAIL.format(examples=examples)}"


def _listed(title: str, names: tuple[str, ...]) -> str:
    """Return the rows of the commands of one purpose, which the first row has."""
    titles = (title, *[""] * (len(names) - 1))
    return "\n".join(
        f"| {first} | [{name}](#doraxp-{name}) | {module_of(name).SUMMARY} |"
        for first, name in zip(titles, names, strict=True)
    )


def _linked(path: str) -> str:
    """Return a link to a page, with its title."""
    first, *_ = (PAGE.parent / path).read_text("utf-8").splitlines()
    return f"[{first.removeprefix('# ')}]({path})"


def _section(name: str, command: argparse.ArgumentParser) -> str:
    """Return the section of a command."""
    module = module_of(name)
    parts = [f"## doraxp {name}", _code(f"{module.SUMMARY} {module.DETAILS}")]
    if name in GUIDES:
        parts[-1] += f" Explained in {_linked(GUIDES[name])}."
    parts.append(f"```text\n{usage(command)}\n```")
    for group in command._action_groups:
        rows = [_row(action, command) for action in group._group_actions]
        if rows and rows != [""]:
            title = _TITLES.get(group.title or "", group.title)
            if group.description:
                parts.append(_sentence(group.description))
            parts.append(f"| {title} | meaning |\n|---|---|\n{''.join(rows)}".rstrip())
    if module.STATUS_1 is not None:
        parts.append(f"Exit status 1: {module.STATUS_1}.")
    parts.append(f"Example:\n\n```text\n{module.EXAMPLE}\n```")
    return "\n\n".join(parts) + "\n\n"


_TITLES = {"positional arguments": "argument", "options": "option", "conventions": "option"}


def _row(action: argparse.Action, command: argparse.ArgumentParser) -> str:
    """Return the row of an argument; that of --help is nothing."""
    if "--help" in action.option_strings:
        return ""
    help_text = (action.help or "") % {**vars(action), "prog": command.prog}
    meaning = _sentence(_code(help_text))
    value = "" if action.nargs == 0 else _value(action)
    if isinstance(action, argparse.BooleanOptionalAction):
        value = ""
    if value == "CHOICE":
        meaning += f" Choices: {', '.join(f'`{one}`' for one in action.choices or ())}."
    if action.required and action.option_strings:
        meaning += " Required."
    names = action.option_strings or [value]
    words = [
        f"`{name} {value}`" if action.option_strings and value else f"`{name}`" for name in names
    ]
    return f"| {', '.join(words)} | {meaning} |\n"


def _value(action: argparse.Action) -> str:
    """Return the name of the value of an argument."""
    more = " …" if action.nargs == "+" else ""
    if isinstance(action.metavar, str) and not action.metavar.startswith("{"):
        return action.metavar + more
    if action.choices is not None or action.metavar is not None:
        return "CHOICE" if action.choices is not None else f"NAME{more}"
    return action.dest.upper() + more


def _sentence(text: str) -> str:
    """Return a text with a large first letter and a full stop, in one line."""
    text = " ".join(text.split())
    first = text if re.match(r"[\w-]*[A-Z_=`(]", text) else text[:1].upper() + text[1:]
    return first if first.endswith((".", ":")) else f"{first}."


def _code(text: str) -> str:
    """Return a text with its options and commands as code, and with signs of Markdown escaped."""
    text = text.replace("|", "\\|").replace("<", "\\<").replace("*", "\\*")
    text = re.sub(rf"(?<![\w`-])(--[a-z][a-z-]*(?: (?:{VALUES}))?)", r"`\1`", text)
    return re.sub(r"doraxp COMMAND `--help`", "`doraxp COMMAND --help`", text)


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
