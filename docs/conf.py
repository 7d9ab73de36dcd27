"""How Sphinx builds these pages; warnings are errors."""

from __future__ import annotations

from typing import Any

import doraxp

project = "doraxp"
author = "the doraxp authors"
copyright = f"2026, {author}"
version = release = doraxp.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = f"doraxp {release}"
exclude_patterns = ["_build"]

myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_mock_imports = ["jax", "torch"]  # the bridges are described without them
autodoc_typehints = "none"  # the docstrings give shapes, which tell more
napoleon_google_docstring = False
napoleon_use_param = False
napoleon_use_rtype = False
napoleon_use_ivar = True

default_role = "code"  # `name` in a docstring
nitpick_ignore_regex = [("py:class", r".*")]
suppress_warnings = ["ref.python"]  # a `weight` is an attribute of several classes


def escape_stars(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Escape the star of (*stack, out, in) in docstrings: it would begin an emphasis."""
    lines[:] = [line.replace("(*stack", "(\\*stack") for line in lines]


def setup(app: Any) -> None:
    """Let Sphinx call `escape_stars` with each docstring."""
    app.connect("autodoc-process-docstring", escape_stars)
