"""Print the phrases that are hard to read, with advice; the exit status is 1 if there are any.

    python docs/plain_english.py                  reads the whole project
    python docs/plain_english.py src/doraxp/cli   reads one folder, or one file

Readers come from many countries, and must understand a sentence the first time they read it. This
script reads docstrings, comments, error messages and the names of tests. It knows a few phrases
that slow a reader down. It cannot judge whether a sentence is clear. `nox -s lint` runs it.
"""

from __future__ import annotations

import ast
import io
import os
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("src", "tests", "benchmarks", "examples", "packages", "docs", ".ci", "noxfile.py")
SLASHES = (
    ".cu",
    ".hpp",
    ".mjs",
    ".c",
    ".h",
    ".rs",
)  # files of languages whose comments begin with //
MESSAGES = ("message", "msg")  # the names of variables that hold an error message

BE = r"(?:is|are|was|were|be)"
COMPARATIVE = r"(?:more|less|fewer|longer|better|worse|different|\w+er than)\b"

# A space also matches the end of a line. \A is the start of the text.
PHRASES = {
    r"\A[Rr]eturns? what\b": "name the value that is returned",
    r"(?:\A|[.] )[Ww]hat\b(?![^.?]*[?])": "begin with the name of the thing",
    r"\A[Hh]old [^.,:;]*?(?<!reference)(?<!handle) to\b": "write 'Check that' or 'Refuse'",
    r"\A(?:[Ss]ay|[Tt]ell)s? (?:which|whether|what|where|how|why|if)\b": "write 'Return'",
    rf"\b{BE} held to\b": "write 'must equal', 'must be' or 'is compared with'",
    rf"(?<![Tt]here )\b{BE} no (?!{COMPARATIVE})[a-z]\w*": "write 'is not a' or 'there is no'",
    rf"(?<![Tt]here )\b{BE} none\b": "write 'is not one', or name the missing thing",
    r"\bbut for\b": "write 'except'",
    r"\bof one's own\b": "write 'your own', or name the owner",
    r"\bthat which\b": "name the thing",
}
RULES = [(re.compile(phrase), advice) for phrase, advice in PHRASES.items()]


class Text(NamedTuple):
    """One piece of prose, and the number of the line that it starts in."""

    line: int
    words: str


def in_python(source: str) -> Iterator[Text]:
    """Yield the docstrings, error messages, names of tests and comments of a Python file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            if isinstance(node.value.value, str):  # a docstring, also one below an attribute
                yield Text(node.lineno, node.value.value)
        elif isinstance(node, ast.Raise) or is_message(node):
            yield from strings(node)
        elif isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield Text(node.lineno, node.name.removeprefix("test_").replace("_", " "))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    yield from joined(
        (*token.start, token.string.lstrip("#: "))
        for token in tokens
        if token.type == tokenize.COMMENT
    )


def is_message(node: ast.AST) -> bool:
    """Return whether the node assigns to a variable that holds an error message."""
    return isinstance(node, ast.Assign) and any(
        isinstance(target, ast.Name) and target.id in MESSAGES for target in node.targets
    )


def strings(node: ast.AST) -> Iterator[Text]:
    """Yield the strings below a node, each with the parts of an f-string joined."""
    if isinstance(node, ast.JoinedStr):
        parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        yield Text(node.lineno, "".join(map(str, parts)))
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield Text(node.lineno, node.value)
    else:
        for child in ast.iter_child_nodes(node):
            yield from strings(child)


def in_slashes(source: str) -> Iterator[Text]:
    """Yield the comments of a file in C++, CUDA or JavaScript."""
    found = (
        (number, re.search(r"(?:^|\s)//\s*(.*)", line))
        for number, line in enumerate(source.splitlines(), start=1)
    )
    yield from joined((number, m.start(), m[1]) for number, m in found if m)


def joined(comments: Iterator[tuple[int, int, str]]) -> Iterator[Text]:
    """Yield comments given by line, column and words; those in lines below each other as one."""
    block: list[str] = []
    first = last = (0, 0)
    for line, column, words in comments:
        if block and (line, column) != (last[0] + 1, last[1]):
            yield Text(first[0], "\n".join(block))
            block = []
        if not block:
            first = line, column
        block.append(words)
        last = line, column
    if block:
        yield Text(first[0], "\n".join(block))


def problems(path: Path) -> Iterator[str]:
    """Yield a line for each phrase in a file: file, line, the phrase and the advice."""
    source = path.read_text("utf-8")
    texts = in_slashes(source) if path.suffix in SLASHES else in_python(source)
    for text in sorted(texts):
        lines = [line.strip() for line in text.words.split("\n")]
        words, before = " ".join(lines), "\n".join(lines)
        for phrase, advice in RULES:
            for match in phrase.finditer(words):
                line = text.line + before.count("\n", 0, match.start())
                yield f"{os.path.relpath(path)}:{line}: {match[0]!r}: {advice}"


def files(path: Path) -> list[Path]:
    """Return the source files at a path."""
    if path.is_file():
        return [path]
    return sorted(file for file in path.rglob("*") if file.suffix in (".py", *SLASHES))


def main(paths: list[str]) -> int:
    """Print the problems in files and folders; return the exit status."""
    found = [
        problem
        for path in paths or [str(ROOT / folder) for folder in FOLDERS]
        for file in files(Path(path))
        for problem in problems(file)
    ]
    print(*found, sep="\n", end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
