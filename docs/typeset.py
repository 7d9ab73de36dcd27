"""A Sphinx extension: formulas become MathML when the pages are built, so no script draws them.

docutils translates LaTeX to MathML. docs/unicode_math.py makes LaTeX of the literal blocks in
docstrings, which stay readable in `help()`.
"""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging
from unicode_math import FormulaError, aligned

TEXT = {
    "doraxp.checkpoint.check_merge_files",
    "doraxp.optim",
    "doraxp.testing.check_implementation",
}
"""The objects whose literal blocks are code or text. All others have formulas there."""

logger = logging.getLogger(__name__)


def mathml(latex: str, *, block: bool) -> str:
    """Return a formula of LaTeX as MathML."""
    result = tex2mathml(latex, as_block=block)
    result = re.sub(r">\n\s*", ">", result)
    # docutils stretches the bars of a norm, sets a prime apart, and begins a cell with a prefix.
    bar = r'<mo stretchy="false" lspace="0" rspace="0">\1</mo>'
    result = re.sub(r'<mo(?: class="mathopen")?>([‖|])</mo>', bar, result)
    result = result.replace("<mo>'</mo>", '<mo lspace="0" rspace="0">′</mo>')
    return result.replace("<mtd><mo>", '<mtd><mo form="infix">')


def visit(translator: Any, node: nodes.math | nodes.math_block) -> None:
    """Write a formula as MathML; a fault in its LaTeX is a warning."""
    block = isinstance(node, nodes.math_block)
    try:
        text = mathml(node.astext(), block=block)
    except MathError as error:
        logger.warning("docutils cannot translate %r: %s", node.astext(), error, location=node)
        raise nodes.SkipNode from error
    if block:
        names = "".join(f' id="{name}"' for name in node["ids"][:1])
        text = f'<div class="math" tabindex="0"{names}>{text}</div>\n'
    elif "sign" in node:
        text = f'<span class="unbroken">{text}{node["sign"]}</span>'
    translator.body.append(text)
    raise nodes.SkipNode


def join_signs(app: Any, doctree: nodes.document) -> None:
    """Move a comma or a full stop behind a formula into it: browsers break lines between them."""
    for node in list(doctree.findall(nodes.math)):
        after = node.next_node(nodes.Text, descend=False, siblings=True)
        if after is node.next_node(descend=False, siblings=True) and after and after[0] in ",.;:)":
            node["sign"] = after[0]
            after.parent.replace(after, nodes.Text(after[1:]))


def typeset_docstring(
    app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Replace the literal blocks of a docstring, in place, with formulas."""
    try:
        lines[:] = typeset(lines, text=name in TEXT)
    except FormulaError as error:
        advice = "write a formula, or name the object in TEXT of docs/typeset.py"
        logger.warning("%s has a literal block that is not a formula; %s: %s", name, advice, error)


def typeset(lines: list[str], *, text: bool = False) -> list[str]:
    """Return the lines of a docstring, with formulas for its literal blocks except for `text`.

    Elsewhere the star of (*stack, out, in) is escaped: it would begin an emphasis.
    """
    result, place = [], 0
    while place < len(lines):
        line = lines[place]
        margin = line[: len(line) - len(line.lstrip())]
        place += 1
        if not line.rstrip().endswith("::") or line.lstrip().startswith(".. "):
            result.append(line.replace("(*stack", "(\\*stack"))
            continue
        end = place
        while end < len(lines) and (not lines[end].strip() or lines[end].startswith(f"{margin} ")):
            end += 1
        block, place = lines[place:end], end
        if text:
            result += [line, *block]
        else:
            result += ["" if line.strip() == "::" else line.rstrip()[:-1], *math(block, margin)]
    return result


def math(block: list[str], margin: str) -> list[str]:
    """Return a block as directives of formulas, one for each part between empty lines."""
    result = []
    for part in re.split(r"\n\s*\n", "\n".join(block).strip("\n")):
        directive = [".. math::", "", *(f"   {line}" for line in aligned(part).splitlines())]
        result += ["", *(f"{margin}{line}" for line in directive), ""]
    return result


def setup(app: Any) -> dict[str, Any]:
    """Register the renderer and the conversion of docstrings with Sphinx."""
    app.add_html_math_renderer("mathml", (visit, None), (visit, None))
    app.connect("doctree-read", join_signs)
    # Napoleon comes first: it makes sections of the underlined titles.
    app.connect("autodoc-process-docstring", typeset_docstring, priority=600)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
