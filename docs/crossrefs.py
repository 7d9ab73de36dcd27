"""A Sphinx extension: a name of the API in a page or a docstring is a link to its own page.

`doraxp.forward`, `doraxp.forward(...)`    anywhere
`forward`, and a type such as "Adapter"    in docstrings, where the name is not ambiguous
"""

from __future__ import annotations

import re
from typing import Any

from api_tables import API, ROW
from docutils import nodes
from sphinx import addnodes

PAGE = re.compile(r"docs/(\S+)\.md")


def entries() -> list[str]:
    """Return the full names that the reference describes, in its order."""
    return ROW.findall(API.read_text("utf-8"))


class Names:
    """The names of the reference, to look one up by its full name or by its last part."""

    def __init__(self, full: list[str]) -> None:
        self.full = set(full)

    def find(self, text: str, module: str | None) -> str | None:
        """Return the full name that a text in a docstring of a module means, or None.

        Outside of docstrings, module is None, and only full names are found.
        """
        text = text.removesuffix("()").removesuffix("(...)")
        if text in self.full:
            return text
        if module is None or "." in text:
            return None
        # `merge` means doraxp.jax.merge in that module, and doraxp.merge elsewhere.
        known = [name for name in self.full if name.rpartition(".")[2] == text]
        for name in (f"{module}.{text}", f"doraxp.{text}", known[0] if len(known) == 1 else None):
            if name in self.full:
                return name
        return None


def link_names(app: Any, doctree: nodes.document) -> None:
    """Put a link around each name of the API in a page."""
    names = Names(entries())
    described = app.env.get_domain("py").objects
    for node in list(doctree.findall(nodes.literal)):
        text = node.astext()
        module, own = described_by(node)
        if inside(node, nodes.reference, addnodes.pending_xref):
            continue
        if page := PAGE.fullmatch(text):
            node.replace_self(link(f"/{page[1]}", node, app.env.docname, "std", "doc"))
        elif module and (member := f"{module}.{own.split('.')[0]}.{text}") in described:
            node.replace_self(link(member, node, app.env.docname))
        elif (found := names.find(text, module)) and found != f"{module}.{own}":
            node.replace_self(link(found, node, app.env.docname))
    for node in list(doctree.findall(nodes.emphasis)):
        module, _ = described_by(node)
        if module and inside(node, nodes.field):
            node.replace_self([*linked_types(node.astext(), names, module, app.env.docname)])


def linked_types(text: str, names: Names, module: str, page: str) -> list[nodes.Node]:
    """Return the type of a parameter or a result, with links."""
    parts = re.split(r"\b([A-Z]\w+)\b", text)
    return [
        link(found, nodes.emphasis("", part), page)
        if (found := names.find(part, module))
        else nodes.emphasis("", part)
        for part in parts
        if part
    ]


def link(
    name: str, content: nodes.Node, page: str, domain: str = "py", kind: str = "obj"
) -> addnodes.pending_xref:
    """Return a link to the page of a name, which Sphinx resolves when it has read all pages."""
    return addnodes.pending_xref(
        "", content.deepcopy(), refdomain=domain, reftype=kind, reftarget=name, refdoc=page,
        refexplicit=True, refwarn=True,
    )  # fmt: skip


def described_by(node: nodes.Node) -> tuple[str | None, str]:
    """Return the module of the object whose docstring has a node, and its name there."""
    while node is not None:
        if isinstance(node, addnodes.desc):
            signature = node.next_node(addnodes.desc_signature)
            return signature["module"], signature["fullname"]
        node = node.parent
    return None, ""


def inside(node: nodes.Node, *kinds: type[nodes.Node]) -> bool:
    """Return whether a node is somewhere in a node of one of these kinds."""
    return node.parent is not None and (
        isinstance(node.parent, kinds) or inside(node.parent, *kinds)
    )


def setup(app: Any) -> dict[str, Any]:
    """Let Sphinx call `link_names` with each page."""
    app.connect("doctree-read", link_names)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
