"""docs/unicode_math.py turns the formulas of docstrings into LaTeX, for the pages.

`help()` shows them as they are written: in Unicode.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from pathlib import Path

import pytest
from test_public_names import ENTRIES, SRC, file_of, origin

DOCS = Path(__file__).parents[1] / "docs"


def loaded(name):
    """Return a module of docs/, which is not a package."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


unicode_math = loaded("unicode_math")


def declared():
    """Return TEXT of docs/typeset.py, which needs Sphinx to be imported."""
    tree = ast.parse((DOCS / "typeset.py").read_text("utf-8"))
    (names,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "TEXT"
    )
    return ast.literal_eval(names)


def docstrings(entry):
    """Yield the name and the docstring of a public object and of its public methods."""
    if (SRC / Path(*entry.split("."))).is_dir():
        yield entry, ast.get_docstring(ast.parse(file_of(entry).read_text("utf-8")))
        return
    module, name = origin(*entry.rsplit(".", 1))
    for node in ast.parse(file_of(module).read_text("utf-8")).body:
        if getattr(node, "name", None) == name:
            yield entry, ast.get_docstring(node)
            for part in getattr(node, "body", []):
                if isinstance(part, ast.FunctionDef) and not part.name.startswith("_"):
                    yield f"{entry}.{part.name}", ast.get_docstring(part)


def literal_blocks(text):
    """Return the blocks of a docstring below a `::`, each without its margin."""
    found = re.findall(r"::\n\n((?:(?:    .*)?\n)+)", f"{text}\n")
    return [inspect.cleandoc(block) for block in found]


BLOCKS = [
    pytest.param(name, block, id=f"{name}-{number}")
    for entry in ENTRIES
    for name, text in docstrings(entry)
    for number, block in enumerate(literal_blocks(text or ""))
]


@pytest.mark.parametrize(("name", "block"), BLOCKS)
def test_a_literal_block_has_formulas_or_is_declared_as_text(name, block):
    for part in block.split("\n\n"):
        if name not in declared():
            assert unicode_math.aligned(part).startswith("\\begin{aligned}\n")


def test_the_blocks_are_found():
    names = {name for name, _ in (block.values for block in BLOCKS)}
    assert {"doraxp.forward", "doraxp.torch.dora_linear"} | declared() <= names


@pytest.mark.parametrize(
    ("text", "latex"),
    [
        ("z = ρ⊙(x Wᵀ) + s L Bᵀ", r"z= \rho \odot (xW^{\top})+sLB^{\top}"),
        ("‖w‖²", r"{\lVert w\rVert}^{2}"),
        ("|A_r·A_q|", r"{\lvert A_{r}\cdot A_{q}\rvert}"),
        ("Σ_tokens dy⊙z", r"\sum _{\text{tokens}}\mathrm{d}y\odot z"),
        ("dbias", r"\mathrm{d}\text{bias}"),
        ("x~ + x̃ + ẋ", r"\tilde{x}+\tilde{x}+\dot{x}"),
        ("m̂ / (√n̂ + ε)", r"\hat{m}/(\sqrt{\hat{n}}+\varepsilon )"),
        ("√(Σ (a b)²)", r"\sqrt{\sum (ab)^{2}}"),
        ("β₁ᵗ", r"\beta _{1}^{t}"),
        ("W'ᵀ + C′", r"{W'}^{\top}+{C'}"),
        ("rowsum(B⊙U) + bias", r"\text{rowsum}(B\odot U)+\text{bias}"),
        ("n = ‖V‖ by rows", r"n= {\lVert V\rVert}\text{ by rows}"),
        ("V of a `DoRALayer`, once", r"V\text{ of a DoRALayer, once}"),
        ("(*stack, out, in)", r"\text{(*stack, out, in)}"),
        ("x in dW too", r"x\text{ in }\mathrm{d}W\text{ too}"),
    ],
)
def test_a_formula_becomes_latex(text, latex):
    assert unicode_math.formula(text) == latex


def test_formulas_are_aligned_at_their_relations():
    block = "L = x Aᵀ        (tokens, rank)\ny  ← z\n    + bias"
    assert unicode_math.aligned(block) == (
        "\\begin{aligned}\n"
        "L & = xA^{\\top} &  & \\text{(tokens, rank)} \\\\\n"
        "y & \\leftarrow z \\\\\n"
        " & +\\text{bias}\n"
        "\\end{aligned}"
    )


def test_labels_have_a_column():
    block = "weight form:     V = W\nwithout m   V = D"
    assert unicode_math.aligned(block) == (
        "\\begin{aligned}\n"
        " & \\text{weight form:} & V & = W \\\\\n"
        " & \\text{without m} & V & = D\n"
        "\\end{aligned}"
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a ☃ b", "'☃' has no LaTeX"),
        ("n = ‖V", "a bar has no partner: 'n = ‖V'"),
        ("√(a", "a root has no end: '√(a'"),
    ],
)
def test_another_sign_is_refused(text, problem):
    with pytest.raises(unicode_math.FormulaError, match=re.escape(problem)):
        unicode_math.formula(text)
