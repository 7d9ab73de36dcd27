"""The files beside the weights that engines read: those of a tokenizer that grew."""

from __future__ import annotations

import numpy as np
import pytest
from checkpoints import PREFIX, draw, merge, write_base, write_peft
from language_model import EMBED, HEAD, TOKENS, WIDTH, model, query


@pytest.fixture
def grown(tmp_path):
    """A base with two files of a tokenizer, and an adapter of two tokens more."""
    rng = np.random.default_rng(12)
    untied = model(rng, **{HEAD: draw(rng, TOKENS, WIDTH)})
    base = write_base(tmp_path / "base", untied, vocab_size=TOKENS)
    for name in ("tokenizer.json", "tokenizer.model", "special_tokens_map.json"):
        (tmp_path / "base" / name).write_text("of the base")
    leaves, _ = query(rng, base)
    whole = {f"{PREFIX}{name}": draw(rng, TOKENS + 2, WIDTH) for name in (EMBED, HEAD)}
    write_peft(tmp_path / "adapter", leaves, whole)
    return tmp_path


def test_a_tokenizer_json_that_grew_takes_the_place_of_a_tokenizer_model(grown, capsys):
    """The converter of llama.cpp reads tokenizer.model first, which lacks the new tokens."""
    (grown / "adapter" / "tokenizer.json").write_text("of the adapter")
    assert merge(grown) == 0
    assert (grown / "out" / "tokenizer.json").read_text() == "of the adapter"
    assert not (grown / "out" / "tokenizer.model").exists()
    assert "Left out: tokenizer.model" in capsys.readouterr().out


@pytest.mark.parametrize("own", [{"tokenizer.json", "tokenizer.model"}, {"added_tokens.json"}])
def test_a_tokenizer_model_stays_where_the_adapter_has_one_or_has_new_tokens_only(grown, own):
    for name in own:
        (grown / "adapter" / name).write_text("of the adapter")
    assert merge(grown) == 0
    source = "adapter" if "tokenizer.model" in own else "base"
    assert (grown / "out" / "tokenizer.model").read_text() == f"of the {source}"


def test_the_special_tokens_of_a_tokenizer_that_grew_are_the_adapters(grown):
    (grown / "adapter" / "special_tokens_map.json").write_text("of the adapter")
    assert merge(grown) == 0
    assert (grown / "out" / "special_tokens_map.json").read_text() == "of the adapter"
