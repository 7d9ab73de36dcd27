"""Write the descriptions of docs/reference/api.md from the docstrings: `python docs/api_tables.py`.

A row of that page is | `doraxp.name` | the first sentence of its docstring |. To add a name, add
`| doraxp.name | |` with backquotes, and run this script. tests/test_public_names.py fails where a
description is an old one.

As a Sphinx extension it makes the page of each name, and puts them into the navigation.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
API = DOCS / "reference" / "api.md"
SRC = DOCS.parent / "src"
ROW = re.compile(r"^\| `(doraxp[\w.]*)` \|.*\|$", re.MULTILINE)
TABLE = re.compile(r"(?:^\| `doraxp[\w.]*` \|.*\|\n)+", re.MULTILINE)


def file_of(module: str) -> Path:
    """Return the file of a module of doraxp."""
    path = SRC.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def docstring(name: str) -> str:
    """Return the docstring of a name, from the source: the bridges need PyTorch and JAX."""
    if file_of(name).exists():
        return ast.get_docstring(ast.parse(file_of(name).read_text("utf-8"))) or ""
    module, _, last = name.rpartition(".")
    body = ast.parse(file_of(module).read_text("utf-8")).body
    for place, node in enumerate(body):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == last:
            return ast.get_docstring(node) or ""
        if isinstance(node, ast.Assign | ast.AnnAssign) and last in ast.unparse(node).split("=")[0]:
            after = body[place + 1]  # the docstring of a value stands below it
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                return str(after.value.value)
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == last:
                    return docstring(f"{node.module}.{alias.name}")
    raise LookupError(f"{name} is not in {file_of(module)}")


def first_sentence(text: str) -> str:
    """Return the first sentence of a docstring as a cell of a table in Markdown."""
    paragraph = " ".join(text.split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.])\s+(?=[A-Z`])", paragraph)[0]
    return re.sub(r"`+", "`", sentence).replace("|", r"\|")


def page() -> str:
    """Return api.md with the descriptions of today."""
    return ROW.sub(
        lambda row: f"| `{row[1]}` | {first_sentence(docstring(row[1]))} |", API.read_text("utf-8")
    )


def with_pages(app: Any, name: str, source: list[str]) -> None:
    """Let the tables of the reference lead to the pages of their names."""
    if name == "reference/api":
        source[0] = TABLE.sub(lambda table: table[0] + directive("toctree", table[0]), source[0])


def directive(kind: str, table: str) -> str:
    """Return a hidden list of the pages of a table."""
    pages = "\n".join(f"generated/{name}" for name in ROW.findall(table))
    return f"\n```{{{kind}}}\n:hidden:\n\n{pages}\n```\n"


def write_pages(app: Any) -> None:
    """Write the source of the page of each name."""
    from sphinx.ext.autodoc.mock import mock
    from sphinx.ext.autosummary.generate import generate_autosummary_docs

    folder = API.parent / "generated"
    folder.mkdir(exist_ok=True)
    names = "\n".join(f"   {name}" for name in ROW.findall(API.read_text("utf-8")))
    listing = folder / "names.txt"
    listing.write_text(f".. autosummary::\n   :toctree: {folder}\n\n{names}\n", "utf-8")
    with mock(app.config.autosummary_mock_imports):
        generate_autosummary_docs(
            [str(listing)], suffix=".rst", base_path=str(DOCS), app=app, encoding="utf-8",
            imported_members=app.config.autosummary_imported_members,
        )  # fmt: skip


def setup(app: Any) -> dict[str, Any]:
    """Let Sphinx call the functions above."""
    app.connect("builder-inited", write_pages)
    app.connect("source-read", with_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


if __name__ == "__main__":
    API.write_text(page(), "utf-8")
