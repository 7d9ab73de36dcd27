"""The links of the pages: in their source, and by docs/links.py in the built ones."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "docs" / "links.py"
SOURCES = [
    page
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))
    if page.parent.name != "generated"
]


def check(folder, **pages):
    """Write pages by name, and return the exit status and the output of the script."""
    for name, text in pages.items():
        (folder / f"{name}.html").write_text(text)
    done = subprocess.run([sys.executable, SCRIPT, folder], capture_output=True, text=True)
    return done.returncode, done.stdout


def test_links_that_work_are_silent(tmp_path):
    (tmp_path / "picture.png").touch()
    (tmp_path / "folder").mkdir()
    first = '<a href="two.html#here%C3%A9">x</a><a href="#">x</a><img src="picture.png">'
    first += '<a href="folder/">x</a><a href="two.html#old">x</a>'
    second = '<p id="hereé"></p><a name="old"></a><a href="one.html?q=1">x</a><a href="https://example.org/#x">x</a>'
    assert check(tmp_path, one=first, two=second) == (0, "")


def test_a_broken_link_is_named_with_its_page(tmp_path):
    status, output = check(
        tmp_path, one='<a href="two.html#gone">x</a><img src="gone.png">', two='<a href="#no">x</a>'
    )
    assert status == 1
    assert output.splitlines() == [
        "one.html: gone.png: there is no such file",
        "one.html: two.html#gone: the page has no such id",
        "two.html: #no: the page has no such id",
    ]


def test_a_folder_without_pages_is_an_error(tmp_path):
    assert check(tmp_path) == (1, f"{tmp_path} has no pages: build them first\n")


@pytest.mark.parametrize("page", SOURCES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_source_of_a_page_links_to_files_that_exist(page):
    """A clone is read without a build: its links are plain Markdown, with a text."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\[([^\]]*)\]\(([^)\s#:]+)(?:#[^)]*)?\)", text)
    assert [target for _, target in links if not (page.parent / target).exists()] == []
    assert [target for label, target in links if not label] == []
    assert "{doc}" not in text
