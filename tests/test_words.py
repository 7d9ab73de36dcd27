"""The words of messages: a number agrees with its noun, and a noun with its article."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import numpy as np
import pytest

import doraxp
from doraxp._base.words import counted, first_of, nearest, with_article

SRC = Path(__file__).parents[1] / "src"
NUMBER_AND_NOUN = re.compile(r"\{(?!counted)[^{}]*\blen\([^{}]*\} (?:\w+ )?\w+s\b")
ARTICLE = re.compile(r"\b[aA]n? \{")
RIGHT = ("{len(pattern)} letters", "{len(line)} letters")
"""Where the number is never 1: it is above a limit."""


def texts(path: Path) -> list[str]:
    """Return the f-strings of a module, each with its expressions in braces."""
    return [
        "".join(
            str(part.value) if isinstance(part, ast.Constant) else f"{{{ast.unparse(part.value)}}}"
            for part in node.values
        )
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.JoinedStr)
    ]


@pytest.mark.parametrize("path", sorted(SRC.rglob("*.py")), ids=lambda path: path.stem)
def test_no_message_has_a_number_beside_a_plural_or_an_article_beside_a_name(path):
    found = [
        match[0]
        for text in texts(path)
        for match in (*NUMBER_AND_NOUN.finditer(text), *ARTICLE.finditer(text))
    ]
    assert [one for one in found if one not in RIGHT] == [], "use counted or with_article"


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (counted(0, "file"), "0 files"),
        (counted(1, "file"), "1 file"),
        (counted(1234, "other tensor"), "1,234 other tensors"),
        (counted(1, "tensor", "is"), "1 tensor is"),
        (counted(2, "matrix", "has"), "2 matrices have"),
        (counted(2, "other matrix"), "2 other matrices"),
        (counted(2, "number", "differs"), "2 numbers differ"),
        (counted(2, "tensor", "changes"), "2 tensors change"),
        (counted(1, "tensor", "is", of=3), "1 of 3 tensors is"),
        (with_article("Embedding"), "an Embedding"),
        (with_article("Linear"), "a Linear"),
        (first_of(["a"], "case"), "a"),
        (first_of(["a", "b", "a", "c"], "case"), "a; b; c"),
        (first_of(["a", "b", "c", "d"], "case"), "a; b; c; and 1 other case"),
        (first_of("abcde", "case"), "a; b; c; and 2 other cases"),
        (nearest("merg", ["demo", "merge"]), ": the nearest is merge"),
        (nearest("xyz", ["demo", "merge"]), ""),
    ],
)
def test_words_agree(text, want):
    assert text == want


def test_a_layer_and_a_model_count_their_parts_in_their_text():
    weight = np.ones((1, 1))
    config = doraxp.Config(rank=1)
    model = doraxp.adapt_layers({"fc": doraxp.Linear(weight)}, ["fc"], config, seed=0)
    assert repr(model).startswith("<AdaptedModel 1 of 1 layer adapted, ")
    with pytest.raises(TypeError, match="base must be a layer with an embedding, got Linear"):
        doraxp.DoRALayer(doraxp.Linear(weight), config, seed=0, weight="embedding")
    with pytest.raises(ValueError, match=r"must match one of 1 module; the nearest is fc$"):
        doraxp.adapt_layers({"fc": doraxp.Linear(weight)}, ["fd"], config, seed=0)
