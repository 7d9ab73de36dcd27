"""A pytest plugin that runs the code in Markdown: `PYTHONPATH=docs pytest -p blocks README.md`.

    python   is run, in one namespace for each page; after >>> the output is compared
    sh       is run in the root of the project, with the Python that runs pytest; .ci/run runs the
             commands of README.md
    text     is not run: formulas and figures

A block of any other language fails. Otherwise it would be left out without a word.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sybil import Document, Example, Region, Sybil
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer
from sybil.parsers.myst import CodeBlockParser, PythonCodeBlockParser

ROOT = Path(__file__).resolve().parents[1]
KNOWN = ("python", "sh", "text")

sys.path.append(str(ROOT / "packages" / "vectors" / "python"))  # for reference/vectors.md

fences = RawFencedCodeBlockLexer(re.compile(r"(?P<language>.*)$\n", re.MULTILINE))


def find_others(document: Document) -> Iterator[Region]:
    """Yield the blocks of other languages. A block {name} is a directive, not code."""
    for region in fences(document):
        language = region.lexemes["language"].strip()
        if language not in KNOWN and not language.startswith("{"):
            yield Region(region.start, region.end, language, refuse)


def refuse(example: Example) -> str:
    """Return the error message for a block of another language."""
    return f"the language of a block must be one of {KNOWN}, got {example.parsed!r}"


def run_in_shell(example: Example) -> None:
    """Run commands in the root of the project, and remove the folders that `mktemp` makes."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            ["bash", "-euc", example.parsed],
            cwd=ROOT,
            check=True,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"PATH": path, "TMPDIR": folder},
        )


python = PythonCodeBlockParser()
pages = Sybil([python, CodeBlockParser("sh", run_in_shell), find_others], pattern="*.md")
readme = Sybil([python, find_others], filenames=["README.md", "CONTRIBUTING.md"], path=str(ROOT))

pytest_collect_file = (pages + readme).pytest()
