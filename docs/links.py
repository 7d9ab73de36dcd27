"""Check the links of the built pages without a network; the exit status is 1 if one is broken.

    python docs/links.py docs/_build/html

Sphinx checks the links that it resolves itself. This script reads the result: each link to a file
of the pages must find the file, and each `#fragment` an element with that id.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The ids of a page, and the targets of its links and pictures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = {"", "top"}
        self.targets: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the id of an element and the place that it leads to."""
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.ids.add(value)
            elif name in ("href", "src") and value is not None:
                self.targets.add(value)


def problems(root: Path) -> list[str]:
    """Return a line for each broken link in the pages below a folder."""
    pages = {path.resolve(): Page(path.read_text("utf-8")) for path in root.rglob("*.html")}
    found = []
    for path, page in sorted(pages.items()):
        for target in sorted(page.targets):
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue  # another host
            place = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            name = path.relative_to(root.resolve())
            if not place.exists():
                found.append(f"{name}: {target}: there is no such file")
            elif place in pages and unquote(parts.fragment) not in pages[place].ids:
                found.append(f"{name}: {target}: the page has no such id")
    return found


def main(folder: str) -> int:
    """Print the broken links in a folder; return the exit status."""
    root = Path(folder)
    if not any(root.rglob("*.html")):
        print(f"{folder} has no pages: build them first")
        return 1
    broken = problems(root)
    print(*broken, sep="\n", end="\n" if broken else "")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
