"""The extensions of the pages: docstrings get formulas, and names of the API are links."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
CONF = f"""
import sys
sys.path.insert(0, {str(DOCS)!r})
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "crossrefs", "typeset"]
html_math_renderer = "mathml"
napoleon_use_param = False
default_role = "code"
"""


@pytest.fixture
def build(sphinx, tmp_path):
    """Return a function that builds a page of sources by name, and returns page and warnings."""

    def run(**sources):
        (tmp_path / "conf.py").write_text(CONF)
        (tmp_path / "own.py").write_text(sources.get("own", ""))
        (tmp_path / "index.rst").write_text(f"Title\n=====\n\n{sources['index']}\n")
        line = [sys.executable, "-m", "sphinx", "-q", ".", "out"]
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=True)
        return html.unescape((tmp_path / "out" / "index.html").read_text("utf-8")), done.stderr

    return run


def described(page, name):
    """Return the part of a page that describes an object."""
    return page.partition(f'id="{name}"')[2].partition('<dt class="sig')[0]


def linked(text):
    """Return the names that have a link in a part of a page."""
    return re.findall(r'<a class="reference internal" href="#([\w.]+)"', text)


def test_the_blocks_of_a_docstring_are_formulas_except_those_that_are_text(build):
    names = ("doraxp.backward", "doraxp.testing.check_implementation")
    page, _ = build(index="\n\n".join(f".. autofunction:: {name}" for name in names))
    formulas, text = (described(page, name) for name in names)
    assert formulas.count('<div class="math" tabindex="0"><math') == 3
    assert "dz = g⊙dy" not in formulas
    assert "::" not in formulas
    assert "<strong>dy</strong>" in formulas  # the sections are those of napoleon
    assert "<math" not in text
    assert '<div class="highlight' in text


OWN = '''
def one():
    """Return 1.

    .. math::

        x_1

    ::

        y = ‖v‖ + x'
          + bias
    """


def two():
    """Return 2.

    That is::

        a ☃ b
    """
'''


def test_a_directive_of_a_docstring_stays_and_a_block_of_another_sign_is_a_warning(build):
    page, warnings = build(own=OWN, index=".. autofunction:: own.one\n\n.. autofunction:: own.two")
    one = described(page, "own.one")
    assert one.count("<math") == 2
    assert ":" not in re.sub(r"<[^>]*>", "", one)
    assert '<mo stretchy="false" lspace="0" rspace="0">‖</mo>' in one
    assert '<mo form="infix">' in one
    assert "own.two has a literal block that is not a formula" in warnings
    assert "'☃' has no LaTeX" in warnings


def test_a_formula_and_the_sign_behind_it_are_on_one_line(build):
    page, _ = build(index="Let :math:`a`, or :math:`b` and *c*, be 1.")
    formulas = re.findall(r"<p>Let .*</p>", page)
    assert len(formulas) == 1
    text = re.sub(r"</?(?!span class=.unbroken|/span)(?:math|mi|mrow|em|p)[^>]*>", "", formulas[0])
    assert text == 'Let <span class="unbroken">a,</span> or b and c, be 1.'


def test_a_name_of_the_api_is_a_link_where_it_has_one_meaning(build):
    texts = {
        "doraxp.merge": "``merge``",
        "doraxp.jax.merge": "``merge``",
        "doraxp.backends.Factored": "``Config``",
        "doraxp.checkpoint.Factored": "``Case``",
        "doraxp.Config": "``merge()`` or ``Factored``",
        "doraxp.testing.Case": "``Config``",
    }
    index = "``doraxp.merge(...)`` and ``merge`` in a page.\n\n"
    for name, text in texts.items():
        module, _, short = name.rpartition(".")
        index += f".. py:class:: {short}\n   :module: {module}\n\n   {text}\n\n"
    page, _ = build(index=index)
    before, *_ = page.partition('<dt class="sig')
    assert linked(before.partition("<h1>")[2]) == ["doraxp.merge"]
    assert {name: linked(described(page, name)) for name in texts} == {
        "doraxp.merge": [],  # not to itself
        "doraxp.jax.merge": [],
        "doraxp.backends.Factored": ["doraxp.Config"],
        "doraxp.checkpoint.Factored": ["doraxp.testing.Case"],
        "doraxp.Config": ["doraxp.merge"],  # Factored is a class of two modules
        "doraxp.testing.Case": ["doraxp.Config"],
    }
