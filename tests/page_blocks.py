"""The commands and the code of a page, so that a test runs them on models of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def blocks(page: str, language: str) -> list[str]:
    """Return the blocks of a page in one language."""
    text = (DOCS / page).read_text("utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def block(page: str, start: str) -> str:
    """Return the only block of a page that begins so."""
    (found,) = (one for one in blocks(page, "text") if one.startswith(start))
    return found


def commands(page: str, language: str, start: str) -> list[str]:
    """Return the lines of a page's blocks that begin with a command."""
    lines = "".join(blocks(page, language)).splitlines()
    found = [line for line in lines if line.startswith(start)]
    assert found, f"{page} has no line that begins with {start!r}"
    return found


def run(folder: Path, *lines: str) -> None:
    """Run commands in a folder, with the Python that runs pytest."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for line in lines:
        done = subprocess.run(
            ["bash", "-euc", line],
            cwd=folder,
            env=os.environ | {"PATH": path},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
