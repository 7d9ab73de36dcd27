"""A Sphinx extension: a picture x.png that has an x-dark.png beside it follows the page's colours.

A page names x.png alone, in plain Markdown, so that it is also read well where its source is shown.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.transforms import SphinxTransform


class DarkPictures(SphinxTransform):
    """Put the dark picture beside each light one, and let the theme show one of the two."""

    default_priority = 400  # after include directives, before Sphinx collects the files

    def apply(self, **_: Any) -> None:
        """Change the pictures of one page."""
        for image in list(self.document.findall(nodes.image)):
            uri = Path(image["uri"])
            dark = uri.with_stem(f"{uri.stem}-dark")
            if not Path(self.env.relfn2path(str(dark))[1]).is_file():
                continue
            other = image.copy()
            other["uri"] = str(dark)
            image["classes"].append("only-light")
            other["classes"].append("only-dark")
            image.parent.insert(image.parent.index(image) + 1, other)


def setup(app: Any) -> dict[str, Any]:
    """Let Sphinx apply the transform to each page."""
    app.add_transform(DarkPictures)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
