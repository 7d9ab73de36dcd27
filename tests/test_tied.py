"""Tied embeddings, rows of single tokens, and a vocabulary that has grown."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from checkpoints import (
    PREFIX,
    assert_merged,
    audit,
    check,
    dense,
    draw,
    merge,
    near,
    read_folder,
    refused,
    write_base,
    write_json,
    write_peft,
)
from language_model import (
    EMBED,
    HEAD,
    QUERY,
    TIED,
    TOKENS,
    WIDTH,
    config_of,
    embedding,
    model,
    query,
)
from safetensors.numpy import save_file


@pytest.fixture
def rng():
    return np.random.default_rng(11)


# Tied embeddings


@pytest.mark.parametrize(
    "trained", ["embed_tokens", "both", "DoRA on embed_tokens", "DoRA on lm_head", "DoRA on both"]
)
def test_a_change_of_one_of_two_tied_weights_unties_them(tmp_path, rng, trained):
    """The head gets a tensor of its own, which is the trained one or the one of before."""
    base = write_base(tmp_path / "base", model(rng), **TIED)
    leaves, changed = query(rng, base)
    whole, changed[HEAD] = {}, base[EMBED]
    if trained in ("embed_tokens", "both"):
        whole[f"{PREFIX}{EMBED}"] = changed[EMBED] = draw(rng, TOKENS, WIDTH)
    if trained == "both":
        whole[f"{PREFIX}{HEAD}"] = changed[HEAD] = draw(rng, TOKENS, WIDTH)
    if trained in ("DoRA on embed_tokens", "DoRA on both"):
        own, changed[EMBED] = embedding(rng, base[EMBED])
        whole |= {f"{PREFIX}model.embed_tokens.{end}": tensor for end, tensor in own.items()}
    if trained in ("DoRA on lm_head", "DoRA on both"):
        leaves["lm_head"] = near(rng, base[EMBED])
        changed[HEAD] = dense(base[EMBED], *leaves["lm_head"])
    write_peft(tmp_path / "adapter", leaves, whole)
    check(tmp_path, base, changed)
    assert config_of(tmp_path) == TIED | {"tie_word_embeddings": False}


def test_weights_that_were_tied_in_the_training_stay_tied(tmp_path, rng):
    base = write_base(tmp_path / "base", model(rng), **TIED)
    leaves, changed = query(rng, base)
    changed[EMBED] = draw(rng, TOKENS, WIDTH)
    whole = {f"{PREFIX}{name}": changed[EMBED] for name in (EMBED, HEAD)}
    write_peft(tmp_path / "adapter", leaves, whole, ensure_weight_tying=True)
    check(tmp_path, base, changed)
    assert config_of(tmp_path) == TIED


@pytest.mark.parametrize("adapted", [False, True])
def test_the_head_is_untied_where_the_file_does_not_have_it(tmp_path, rng, adapted):
    """PEFT ties with ensure_weight_tying only the models that it knows to be tied."""
    base = write_base(tmp_path / "base", model(rng), **TIED)
    leaves, changed = query(rng, base)
    if adapted:
        own, changed[EMBED] = embedding(rng, base[EMBED])
        whole = {f"{PREFIX}model.embed_tokens.{end}": tensor for end, tensor in own.items()}
    else:
        changed[EMBED] = draw(rng, TOKENS, WIDTH)
        whole = {f"{PREFIX}{EMBED}": changed[EMBED]}
    write_peft(tmp_path / "adapter", leaves, whole, ensure_weight_tying=True)
    check(tmp_path, base, changed | {HEAD: base[EMBED]})


HEADS = [
    ("BertForMaskedLM", "bert", "bert.embeddings.word_embeddings", "cls.predictions.decoder"),
    ("BertForPreTraining", "bert", "bert.embeddings.word_embeddings", "cls.predictions.decoder"),
    ("RobertaForCausalLM", "roberta", "roberta.embeddings.word_embeddings", "lm_head.decoder"),
    ("ElectraForMaskedLM", "electra", "electra.embeddings.word_embeddings", "generator_lm_head"),
    ("ModernBertDecoderForCausalLM", "modernbert-decoder", "model.tok_embeddings", "decoder"),
    ("BioGptForCausalLM", "biogpt", "biogpt.embed_tokens", "output_projection"),
    ("MoonshineForConditionalGeneration", "moonshine", "model.decoder.embed_tokens", "proj_out"),
    ("T5GemmaForConditionalGeneration", "t5gemma", "model.embed_tokens", "lm_head.out_proj"),
    ("GPT2DoubleHeadsModel", "gpt2", "transformer.wte", "lm_head"),
    ("CTRLLMHeadModel", "ctrl", "transformer.w", "lm_head"),
    ("XLMWithLMHeadModel", "xlm", "transformer.embeddings", "pred_layer.proj"),
]
"""Classes, model types, embeddings and heads of transformers."""


@pytest.mark.parametrize(("architecture", "family", "embed", "head"), HEADS)
def test_the_family_tells_the_name_of_the_head(tmp_path, rng, architecture, family, embed, head):
    embed, head = f"{embed}.weight", f"{head}.weight"
    base = {embed: draw(rng, TOKENS, WIDTH), QUERY: draw(rng, 6, WIDTH)}
    base = write_base(tmp_path / "base", base, architectures=[architecture], model_type=family)
    leaves, changed = query(rng, base)
    changed |= {embed: draw(rng, TOKENS, WIDTH), head: base[embed]}
    write_peft(tmp_path / "adapter", leaves, {f"{PREFIX}{embed}": changed[embed]})
    check(tmp_path, base, changed)


@pytest.mark.parametrize("architecture", ["ElectraForPreTraining", "BertModel"])
def test_a_class_without_a_head_gets_none(tmp_path, rng, architecture):
    base = write_base(tmp_path / "base", model(rng), architectures=[architecture])
    leaves, changed = query(rng, base)
    changed[EMBED] = draw(rng, TOKENS, WIDTH)
    write_peft(tmp_path / "adapter", leaves, {f"{PREFIX}{EMBED}": changed[EMBED]})
    check(tmp_path, base, changed)


WORDS, OUTPUT = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
BIAS, OUTPUT_BIAS = "cls.predictions.bias", "cls.predictions.decoder.bias"


def masked(folder, rng):
    """Write a masked language model whose head shares its weight and its bias."""
    base = {WORDS: draw(rng, TOKENS, WIDTH), BIAS: draw(rng, TOKENS), QUERY: draw(rng, 6, WIDTH)}
    return write_base(folder, base, architectures=["BertForMaskedLM"], model_type="bert")


def test_an_untied_head_gets_its_bias_too(tmp_path, rng):
    """Transformers ties both or none of them, so it would load a bias of zeros."""
    base = masked(tmp_path / "base", rng)
    leaves, changed = query(rng, base)
    changed |= {WORDS: draw(rng, TOKENS, WIDTH), OUTPUT: base[WORDS], OUTPUT_BIAS: base[BIAS]}
    write_peft(tmp_path / "adapter", leaves, {f"{PREFIX}{WORDS}": changed[WORDS]})
    check(tmp_path, base, changed)


def test_a_head_that_grew_without_its_shared_bias_is_refused_until_the_base_has_it(
    tmp_path, rng, capsys
):
    base = masked(tmp_path / "base", rng)
    leaves, changed = query(rng, base)
    changed |= {name: grown(rng, WIDTH) for name in (WORDS, OUTPUT)}
    whole = {PREFIX + name: changed[name] for name in (WORDS, OUTPUT)}
    write_peft(tmp_path / "adapter", leaves, whole)
    error = refused(tmp_path, capsys)
    assert f"{BIAS} has {TOKENS}: give the BASE whose embeddings have the new size" in error
    base |= {WORDS: grown(rng, WIDTH), BIAS: grown(rng)}
    save_file(base, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    check(tmp_path, base, changed | {OUTPUT_BIAS: base[BIAS]})


@pytest.mark.parametrize("is_apart", [False, True])
def test_a_bias_that_was_trained_under_both_names_is_one(tmp_path, rng, is_apart):
    base = masked(tmp_path / "base", rng)
    leaves, changed = query(rng, base)
    changed[BIAS] = draw(rng, TOKENS)
    whole = {f"{PREFIX}{BIAS}": changed[BIAS], f"{PREFIX}{OUTPUT_BIAS}": changed[BIAS]}
    if is_apart:
        whole[f"{PREFIX}{OUTPUT_BIAS}"] = changed[OUTPUT_BIAS] = draw(rng, TOKENS)
        changed[OUTPUT] = base[WORDS]
    write_peft(tmp_path / "adapter", leaves, whole, bias="all")
    check(tmp_path, base, changed)


@pytest.mark.parametrize("trained", ["weight", "bias", "both"])
def test_a_head_that_was_trained_in_full_has_its_own_bias(tmp_path, rng, trained):
    base = masked(tmp_path / "base", rng)
    leaves, changed = query(rng, base)
    own = {
        "weight": {OUTPUT: draw(rng, TOKENS, WIDTH), OUTPUT_BIAS: base[BIAS]},
        "bias": {OUTPUT: base[WORDS], OUTPUT_BIAS: draw(rng, TOKENS)},
        "both": {OUTPUT: draw(rng, TOKENS, WIDTH), OUTPUT_BIAS: draw(rng, TOKENS)},
    }[trained]
    whole = {f"{PREFIX}{name}": tensor for name, tensor in own.items()}
    write_peft(tmp_path / "adapter", leaves, whole, modules_to_save=["decoder"])
    check(tmp_path, base, changed | own)


def in_file(folder, rng, embed=EMBED, others=(HEAD,), **config):
    """Write a model whose file has the embeddings under several names."""
    base = {embed: draw(rng, TOKENS, WIDTH), QUERY: draw(rng, 6, WIDTH)}
    base |= dict.fromkeys(others, base[embed])
    return write_base(folder, base, **config)


def test_a_bias_of_the_head_alone_stays_its_own(tmp_path, rng):
    base = masked(tmp_path / "base", rng)
    base |= {OUTPUT: base[WORDS], OUTPUT_BIAS: draw(rng, TOKENS)}
    save_file(base, tmp_path / "base" / "model.safetensors")
    leaves, changed = query(rng, base)
    changed[WORDS] = draw(rng, TOKENS, WIDTH)
    write_peft(tmp_path / "adapter", leaves, {PREFIX + WORDS: changed[WORDS]})
    check(tmp_path, base, changed)


def test_a_head_elsewhere_in_the_file_is_not_that_of_the_embeddings(tmp_path, rng):
    base = model(rng, **{"draft.lm_head.weight": draw(rng, TOKENS, WIDTH)})
    write_base(tmp_path / "base", base, **TIED, model_type="llama")
    leaves, changed = query(rng, base)
    changed[EMBED] = draw(rng, TOKENS, WIDTH)
    write_peft(tmp_path / "adapter", leaves, {PREFIX + EMBED: changed[EMBED]})
    check(tmp_path, base, changed)


def test_a_classifier_keeps_the_embeddings_of_its_encoder(tmp_path, rng):
    base = {SHARED: draw(rng, TOKENS, WIDTH), QUERY: draw(rng, 6, WIDTH)}
    config = {"architectures": ["BartForConditionalGeneration"], "model_type": "bart"}
    write_base(tmp_path / "base", base, **config)
    leaves, changed = query(rng, base)
    changed |= {"score.weight": draw(rng, 3, WIDTH), SHARED: draw(rng, TOKENS, WIDTH)}
    whole = {PREFIX + name: changed[name] for name in ("score.weight", SHARED)}
    saved = {"modules_to_save": ["score", "shared"], "task_type": "SEQ_CLS"}
    write_peft(tmp_path / "adapter", leaves, whole, **saved)
    check(tmp_path, base, changed | dict.fromkeys((HEAD, *SIDES), base[SHARED]))


def test_shared_embeddings_of_an_untied_model_get_no_copies(tmp_path, rng):
    base = {SHARED: draw(rng, TOKENS, WIDTH), HEAD: draw(rng, TOKENS, WIDTH)}
    base[QUERY] = draw(rng, 6, WIDTH)
    write_base(tmp_path / "base", base, model_type="bart", tie_word_embeddings=False)
    leaves, changed = query(rng, base)
    changed[SHARED] = draw(rng, TOKENS, WIDTH)
    whole = {PREFIX + SHARED: changed[SHARED]}
    write_peft(tmp_path / "adapter", leaves, whole, modules_to_save=["shared"])
    check(tmp_path, base, changed)


FAMILY = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}


@pytest.mark.parametrize("config", [TIED, FAMILY])
@pytest.mark.parametrize("trained", ["rows", "embeddings", "head"])
def test_equal_tensors_of_the_file_that_the_configuration_ties_are_one(
    tmp_path, rng, config, trained
):
    """Transformers ties them as it loads them, and PEFT trains their rows as one."""
    base = in_file(tmp_path / "base", rng, **config)
    leaves, changed = query(rng, base)
    rows, changes, is_tied = draw(rng, 2, WIDTH), {}, trained == "rows"
    if is_tied:
        whole, changes = {PREFIX + DELTA: rows}, {"trainable_token_indices": [1, 3]}
        changed[EMBED] = base[EMBED].copy()
        changed[EMBED][[1, 3]] = rows
        changed[HEAD] = changed[EMBED]
    else:
        name = EMBED if trained == "embeddings" else HEAD
        changed[name] = draw(rng, TOKENS, WIDTH)
        whole = {f"{PREFIX}{name}": changed[name]}
    write_peft(tmp_path / "adapter", leaves, whole, **changes)
    check(tmp_path, base, changed)
    assert config_of(tmp_path) == config | ({} if is_tied else {"tie_word_embeddings": False})


def test_rows_change_alone_where_the_head_of_the_file_is_not_tied(tmp_path, rng):
    config = TIED | {"tie_word_embeddings": False}
    base = in_file(tmp_path / "base", rng, **config)
    leaves, changed = query(rng, base)
    changed[EMBED] = base[EMBED].copy()
    changed[EMBED][[1, 3]] = rows = draw(rng, 2, WIDTH)
    whole = {PREFIX + DELTA: rows}
    write_peft(tmp_path / "adapter", leaves, whole, trainable_token_indices=[1, 3])
    check(tmp_path, base, changed)
    assert config_of(tmp_path) == config


def test_rows_of_tied_tensors_that_differ_are_refused_until_all_were_trained(tmp_path, rng, capsys):
    """Transformers does not tie tensors that differ, and PEFT trains them as if it did."""
    base = write_base(tmp_path / "base", model(rng, **{HEAD: draw(rng, TOKENS, WIDTH)}), **TIED)
    leaves, changed = query(rng, base)
    whole = {PREFIX + DELTA: draw(rng, 2, WIDTH)}
    write_peft(tmp_path / "adapter", leaves, whole, trainable_token_indices=[1, 3])
    error = refused(tmp_path, capsys)
    assert f"{EMBED} and {HEAD} differ in BASE, and PEFT trains single rows as if" in error
    assert "with modules_to_save in place of trainable_token_indices" in error
    shutil.rmtree(tmp_path / "adapter")
    changed[EMBED] = draw(rng, TOKENS, WIDTH)
    whole = {PREFIX + EMBED: changed[EMBED]}
    write_peft(tmp_path / "adapter", leaves, whole, modules_to_save=["embed_tokens"])
    check(tmp_path, base, changed)
    assert config_of(tmp_path) == TIED | {"tie_word_embeddings": False}


def test_a_head_of_the_file_has_the_bias_that_it_lacks_there(tmp_path, rng):
    base = masked(tmp_path / "base", rng)
    base[OUTPUT] = base[WORDS]
    save_file(base, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    leaves, changed = query(rng, base)
    changed |= {WORDS: draw(rng, TOKENS, WIDTH), OUTPUT_BIAS: base[BIAS]}
    write_peft(tmp_path / "adapter", leaves, {f"{PREFIX}{WORDS}": changed[WORDS]})
    check(tmp_path, base, changed)


SHARED = "shared.weight"
SIDES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


@pytest.mark.parametrize("trained", ["rows", SHARED, SIDES[0], "new tokens"])
def test_shared_embeddings_of_the_file_change_together_or_alone(tmp_path, rng, trained):
    config = {"architectures": ["T5ForConditionalGeneration"], "model_type": "mt5"}
    names = (SHARED, *SIDES, HEAD)
    base = in_file(tmp_path / "base", rng, SHARED, names[1:], **config)
    leaves, changed = query(rng, base)
    changes, whole = {}, {}
    if trained in names:
        changed[trained] = draw(rng, TOKENS, WIDTH)
        whole[PREFIX + trained] = changed[trained]
    else:
        before = base[SHARED].copy()
        if trained == "new tokens":
            before = grown(rng, WIDTH)
            whole[f"{PREFIX}shared.token_adapter.base_layer.weight"] = before
        whole[f"{PREFIX}shared.token_adapter.trainable_tokens_delta"] = draw(rng, 2, WIDTH)
        changes["trainable_token_indices"] = {"shared": [1, 3]}
        merged = before.copy()
        merged[[1, 3]] = whole[f"{PREFIX}shared.token_adapter.trainable_tokens_delta"]
        changed |= dict.fromkeys(names, merged)
    write_peft(tmp_path / "adapter", leaves, whole, **changes)
    check(tmp_path, base, changed)
    assert ("tie_word_embeddings" in config_of(tmp_path)) == (trained in names)


@pytest.mark.parametrize("family", ["t5", "umt5", "longt5"])
@pytest.mark.parametrize("entry", [None, True, False])
def test_an_untied_head_of_t5_keeps_its_scale(tmp_path, rng, family, entry):
    """Without that entry, transformers scales the logits unless tie_word_embeddings is false."""
    config = {"architectures": ["T5ForConditionalGeneration"], "model_type": family}
    config |= {} if entry is None else {"scale_decoder_outputs": entry}
    base = {SHARED: draw(rng, TOKENS, WIDTH), QUERY: draw(rng, 6, WIDTH)}
    base = write_base(tmp_path / "base", base, **config)
    leaves, changed = query(rng, base)
    changed |= dict.fromkeys((*SIDES, HEAD), base[SHARED])
    changed[SHARED] = draw(rng, TOKENS, WIDTH)
    write_peft(tmp_path / "adapter", leaves, {PREFIX + SHARED: changed[SHARED]})
    check(tmp_path, base, changed)
    scale = {"scale_decoder_outputs": entry is not False}
    assert config_of(tmp_path) == config | scale | {"tie_word_embeddings": False}


def flan(folder, rng, **config):
    """Write a T5 whose head is not its embeddings, and which has no scale."""
    base = {SHARED: draw(rng, TOKENS, WIDTH), HEAD: draw(rng, TOKENS, WIDTH)}
    base[QUERY] = draw(rng, 6, WIDTH)
    return write_base(folder, base, model_type="t5", tie_word_embeddings=False, **config)


def test_a_head_of_t5_that_was_not_tied_gets_no_scale(tmp_path, rng):
    base = flan(tmp_path / "base", rng)
    leaves, changed = query(rng, base)
    changed[HEAD] = draw(rng, TOKENS, WIDTH)
    write_peft(tmp_path / "adapter", leaves, {PREFIX + HEAD: changed[HEAD]})
    check(tmp_path, base, changed)
    assert config_of(tmp_path) == {"model_type": "t5", "tie_word_embeddings": False}


def test_a_head_of_t5_that_is_equal_to_its_embeddings_is_tied(tmp_path, rng):
    """Transformers ties them whatever the configuration says."""
    config = {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}
    config["tie_word_embeddings"] = False
    base = in_file(tmp_path / "base", rng, SHARED, **config)
    leaves, changed = query(rng, base)
    changed |= dict.fromkeys(SIDES, base[SHARED])
    changed[HEAD] = draw(rng, TOKENS, WIDTH)
    write_peft(tmp_path / "adapter", leaves, {PREFIX + HEAD: changed[HEAD]})
    check(tmp_path, base, changed)
    assert config_of(tmp_path) == config


def test_embeddings_of_t5_without_a_head_are_tied(tmp_path, rng):
    """Whatever the configuration says."""
    config = {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}
    config["tie_word_embeddings"] = False
    base = in_file(tmp_path / "base", rng, SHARED, (), **config)
    leaves, changed = query(rng, base)
    changed |= dict.fromkeys((*SIDES, HEAD), base[SHARED])
    changed[SHARED] = draw(rng, TOKENS, WIDTH)
    write_peft(tmp_path / "adapter", leaves, {PREFIX + SHARED: changed[SHARED]})
    check(tmp_path, base, changed)
    assert config_of(tmp_path) == config


@pytest.mark.parametrize("trained", ["DoRA", "in full"])
def test_the_shared_embeddings_of_t5_are_not_those_of_its_encoder(tmp_path, rng, trained):
    base = flan(tmp_path / "base", rng)
    leaves, changed = query(rng, base)
    changed |= dict.fromkeys(SIDES, base[SHARED])
    if trained == "DoRA":
        own, changed[SHARED] = embedding(rng, base[SHARED])
        whole = {f"{PREFIX}shared.{end}": tensor for end, tensor in own.items()}
    else:
        changed[SHARED] = draw(rng, TOKENS, WIDTH)
        whole = {PREFIX + SHARED: changed[SHARED]}
    saved = [] if trained == "DoRA" else ["shared"]
    write_peft(tmp_path / "adapter", leaves, whole, modules_to_save=saved)
    check(tmp_path, base, changed)


def test_resized_embeddings_of_t5_are_those_of_its_encoder_too(tmp_path, rng):
    base = flan(tmp_path / "base", rng)
    leaves, changed = query(rng, base)
    changed |= {name: grown(rng, WIDTH) for name in (SHARED, HEAD)}
    whole = {PREFIX + name: changed[name] for name in (SHARED, HEAD)}
    write_peft(tmp_path / "adapter", leaves, whole)
    check(tmp_path, base, changed)


def test_a_head_whose_scale_would_be_lost_is_refused_until_it_was_trained_tied(
    tmp_path, rng, capsys
):
    """The advice is followed: PEFT saves two equal tensors then."""
    config = TIED | {"model_type": "switch_transformers"}
    base = {SHARED: draw(rng, TOKENS, WIDTH), QUERY: draw(rng, 6, WIDTH)}
    base = write_base(tmp_path / "base", base, **config)
    leaves, changed = query(rng, base)
    changed[SHARED] = draw(rng, TOKENS, WIDTH)
    whole = {PREFIX + SHARED: changed[SHARED]}
    write_peft(tmp_path / "adapter", leaves, whole)
    error = refused(tmp_path, capsys)
    assert "switch_transformers scales its logits only where tie_word_embeddings is true" in error
    assert "train the adapter with ensure_weight_tying=True" in error
    shutil.rmtree(tmp_path / "adapter")
    whole[PREFIX + HEAD] = changed[SHARED]
    write_peft(tmp_path / "adapter", leaves, whole, ensure_weight_tying=True)
    check(tmp_path, base, changed)
    assert config_of(tmp_path) == config


@pytest.mark.parametrize("is_in_file", [False, True])
def test_the_language_model_beside_an_encoder_is_untied_alone(tmp_path, rng, is_in_file):
    embed, head = "decoder.transformer.wte.weight", "decoder.lm_head.weight"
    config = {"model_type": "vision-encoder-decoder", "tie_word_embeddings": False}
    config |= {"architectures": ["VisionEncoderDecoderModel"], "decoder": {"model_type": "gpt2"}}
    base = in_file(tmp_path / "base", rng, embed, (head,) * is_in_file, **config)
    leaves, changed = query(rng, base)
    changed |= {embed: draw(rng, TOKENS, WIDTH), head: base[embed]}
    write_peft(tmp_path / "adapter", leaves, {f"{PREFIX}{embed}": changed[embed]})
    check(tmp_path, base, changed)
    untied = {"model_type": "gpt2", "tie_word_embeddings": False}
    assert config_of(tmp_path) == config | {"decoder": untied}


def test_rows_of_the_decoder_of_t5gemma_are_not_those_of_its_head(tmp_path, rng):
    """PEFT ties those of the input embeddings, which are the encoder's."""
    embed = "model.decoder.embed_tokens"
    config = {"architectures": ["T5GemmaForConditionalGeneration"], "model_type": "t5gemma"}
    base = in_file(tmp_path / "base", rng, f"{embed}.weight", (), **config)
    leaves, changed = query(rng, base)
    whole = {f"{PREFIX}{embed}.token_adapter.trainable_tokens_delta": draw(rng, 2, WIDTH)}
    changed["lm_head.out_proj.weight"] = base[f"{embed}.weight"]
    changed[f"{embed}.weight"] = base[f"{embed}.weight"].copy()
    (changed[f"{embed}.weight"][[1, 3]],) = whole.values()
    write_peft(tmp_path / "adapter", leaves, whole, trainable_token_indices=[1, 3])
    check(tmp_path, base, changed)


@pytest.mark.parametrize("has_new", [False, True])
def test_rows_of_the_language_model_beside_an_encoder_are_those_of_its_embeddings(
    tmp_path, rng, has_new
):
    """PEFT looks at the configuration of the whole model, which does not tie them."""
    embed, head = "decoder.transformer.wte", "decoder.lm_head.weight"
    decoder = {"model_type": "gpt2", "vocab_size": TOKENS}
    config = {"model_type": "vision-encoder-decoder", "decoder": decoder}
    base = in_file(tmp_path / "base", rng, f"{embed}.weight", (), **config)
    leaves, changed = query(rng, base)
    whole = {f"{PREFIX}{embed}.token_adapter.trainable_tokens_delta": draw(rng, 2, WIDTH)}
    (rows,) = whole.values()
    changed[head] = base[f"{embed}.weight"]
    if has_new:
        changed[head] = grown(rng, WIDTH)
        whole[f"{PREFIX}{embed}.token_adapter.base_layer.weight"] = changed[head]
    changed[f"{embed}.weight"] = changed[head].copy()
    changed[f"{embed}.weight"][[1, 3]] = rows
    write_peft(tmp_path / "adapter", leaves, whole, trainable_token_indices={"wte": [1, 3]})
    check(tmp_path, base, changed)
    sizes = {"tie_word_embeddings": False, "vocab_size": TOKENS + 2 * has_new}
    decoder = config["decoder"] | sizes
    assert config_of(tmp_path) == config | {"tie_word_embeddings": False, "decoder": decoder}


def test_rows_beside_an_encoder_change_alone_where_the_head_of_the_file_differs(tmp_path, rng):
    embed, head = "decoder.transformer.wte.weight", "decoder.lm_head.weight"
    config = {"model_type": "vision-encoder-decoder", "decoder": {"model_type": "gpt2"}}
    base = {name: draw(rng, TOKENS, WIDTH) for name in (embed, head)}
    base = write_base(tmp_path / "base", base | {QUERY: draw(rng, 6, WIDTH)}, **config)
    leaves, changed = query(rng, base)
    changed[embed] = base[embed].copy()
    changed[embed][[1, 3]] = rows = draw(rng, 2, WIDTH)
    own = f"{PREFIX}decoder.transformer.wte.token_adapter.trainable_tokens_delta"
    write_peft(tmp_path / "adapter", leaves, {own: rows}, trainable_token_indices=[1, 3])
    check(tmp_path, base, changed)
    assert config_of(tmp_path) == config


def test_a_bias_of_the_language_model_beside_an_encoder_is_untied_too(tmp_path, rng):
    whole = {f"decoder.{name}" for name in (WORDS, BIAS)}
    base = {name: draw(rng, TOKENS, *(WIDTH,) * name.endswith("weight")) for name in sorted(whole)}
    base[QUERY] = draw(rng, 6, WIDTH)
    config = {"model_type": "encoder-decoder", "decoder": {"model_type": "bert"}}
    base = write_base(tmp_path / "base", base, **config)
    leaves, changed = query(rng, base)
    words, bias = f"decoder.{WORDS}", f"decoder.{BIAS}"
    changed |= {f"decoder.{OUTPUT}": base[words], f"decoder.{OUTPUT_BIAS}": base[bias]}
    changed[words] = draw(rng, TOKENS, WIDTH)
    write_peft(tmp_path / "adapter", leaves, {f"{PREFIX}{words}": changed[words]})
    check(tmp_path, base, changed)


def test_embeddings_that_the_training_left_alone_stay_tied(tmp_path, rng):
    """PEFT saves them with save_embedding_layers."""
    base = write_base(tmp_path / "base", model(rng), **TIED)
    leaves, changed = query(rng, base)
    write_peft(tmp_path / "adapter", leaves, {f"{PREFIX}{EMBED}": base[EMBED]})
    check(tmp_path, base, changed)
    assert config_of(tmp_path) == TIED


def test_an_adapter_of_neither_leaves_them_tied(tmp_path, rng):
    base = write_base(tmp_path / "base", model(rng), **TIED)
    leaves, changed = query(rng, base)
    write_peft(tmp_path / "adapter", leaves)
    check(tmp_path, base, changed)
    assert config_of(tmp_path) == TIED


def test_an_adapter_of_the_head_unties_weights_that_its_configuration_ties(tmp_path, rng):
    base = write_base(tmp_path / "base", model(rng), **TIED)
    leaves = {"lm_head": near(rng, base[EMBED])}
    write_peft(tmp_path / "adapter", leaves, ensure_weight_tying=True)
    check(tmp_path, base, {HEAD: dense(base[EMBED], *leaves["lm_head"])})
    assert config_of(tmp_path)["tie_word_embeddings"] is False


@pytest.mark.parametrize("end", ["modules_to_save.default.weight", "modules_to_save.weight"])
def test_two_equal_tensors_of_one_name_are_one(tmp_path, rng, capsys, end):
    other = f"{PREFIX}model.embed_tokens.{end}"
    base = write_base(tmp_path / "base", model(rng), **TIED)
    leaves, changed = query(rng, base)
    changed |= {EMBED: draw(rng, TOKENS, WIDTH), HEAD: base[EMBED]}
    whole = {f"{PREFIX}{EMBED}": changed[EMBED], other: changed[EMBED]}
    write_peft(tmp_path / "adapter", leaves, whole)
    check(tmp_path, base, changed)
    shutil.rmtree(tmp_path / "out")
    shutil.rmtree(tmp_path / "adapter")
    write_peft(tmp_path / "adapter", leaves, whole | {other: changed[EMBED] + 1})
    assert f"are both for {EMBED}, and differ" in refused(tmp_path, capsys)


CONFIGS = [
    ({"tie_word_embeddings": True}, True),
    ({"architectures": ["Gemma3ForCausalLM"]}, True),  # true is its default, so it is not written
    ({"architectures": ["AForConditionalGeneration"]}, True),
    ({"text_config": {"tie_word_embeddings": True}}, True),
    ({"architectures": ["BertModel"], "tie_word_embeddings": True}, False),
    ({"architectures": ["AForCausalLM"], "tie_word_embeddings": False}, False),
    ({"text_config": {"tie_word_embeddings": False}}, False),
    ({}, False),
]


@pytest.mark.parametrize(("config", "is_tied"), CONFIGS)
def test_the_configuration_tells_whether_the_head_is_tied(tmp_path, rng, config, is_tied):
    base = write_base(tmp_path / "base", model(rng), **config)
    leaves, changed = query(rng, base)
    changed[EMBED] = draw(rng, TOKENS, WIDTH)
    changed |= {HEAD: base[EMBED]} if is_tied else {}
    write_peft(tmp_path / "adapter", leaves, {f"{PREFIX}{EMBED}": changed[EMBED]})
    check(tmp_path, base, changed)


def test_nested_parts_of_the_configuration_are_untied_too(tmp_path, rng):
    vision = {"tie_word_embeddings": True, "layers": 2, "deep": {"x": 1}}
    config = {"text_config": {"vocab_size": TOKENS}, "vision_config": vision, "x": {"y": 1}}
    base = write_base(tmp_path / "base", model(rng), tie_word_embeddings=True, **config)
    leaves, changed = query(rng, base)
    changed |= {EMBED: draw(rng, TOKENS, WIDTH), HEAD: base[EMBED]}
    write_peft(tmp_path / "adapter", leaves, {f"{PREFIX}{EMBED}": changed[EMBED]})
    check(tmp_path, base, changed)
    assert config_of(tmp_path) == {
        "tie_word_embeddings": False,
        "text_config": {"vocab_size": TOKENS, "tie_word_embeddings": False},
        "vision_config": vision | {"tie_word_embeddings": False},
        "x": {"y": 1},
    }


@pytest.mark.parametrize(
    ("embed", "head", "config"),
    [
        ("model.language_model.embed_tokens.weight", "lm_head.weight", {}),
        ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight", {}),
        ("transformer.wte.weight", "lm_head.weight", {}),
        ("wte.weight", "lm_head.weight", {}),
        ("gpt_neox.embed_in.weight", "embed_out.weight", {"model_type": "gpt_neox"}),
        ("backbone.embeddings.word_embeddings.weight", "lm_head.weight", {}),
    ],
)
def test_the_head_is_beside_the_part_with_the_embeddings(tmp_path, rng, embed, head, config):
    base = {embed: draw(rng, TOKENS, WIDTH), QUERY: draw(rng, 6, WIDTH)}
    base = write_base(tmp_path / "base", base, **TIED, **config)
    leaves, changed = query(rng, base)
    changed |= {embed: draw(rng, TOKENS, WIDTH), head: base[embed]}
    write_peft(tmp_path / "adapter", leaves, {f"{PREFIX}{embed}": changed[embed]})
    check(tmp_path, base, changed)


def test_encoder_and_decoder_that_share_embeddings_get_their_own(tmp_path, rng):
    """Transformers ties neither of them if the embeddings are not tied to the head."""
    base = {"model.shared.weight": draw(rng, TOKENS, WIDTH), QUERY: draw(rng, 6, WIDTH)}
    base = write_base(tmp_path / "base", base, **TIED)
    leaves, changed = query(rng, base)
    old, sides = base["model.shared.weight"], ("encoder", "decoder")
    changed |= {f"model.{side}.embed_tokens.weight": old for side in sides} | {HEAD: old}
    changed["model.shared.weight"] = draw(rng, TOKENS, WIDTH)
    whole = {f"{PREFIX}model.shared.weight": changed["model.shared.weight"]}
    write_peft(tmp_path / "adapter", leaves, whole)
    check(tmp_path, base, changed)


def test_the_embeddings_of_the_shortest_path_are_those_of_the_head(tmp_path, rng):
    other = "model.a.tower.embed_tokens.weight"
    base = write_base(tmp_path / "base", model(rng, **{other: draw(rng, 3, WIDTH)}), **TIED)
    leaves, changed = query(rng, base)
    changed |= {EMBED: draw(rng, TOKENS, WIDTH), HEAD: base[EMBED]}
    write_peft(tmp_path / "adapter", leaves, {f"{PREFIX}{EMBED}": changed[EMBED]})
    check(tmp_path, base, changed)


def test_a_new_head_is_in_the_index_of_shards(tmp_path, rng, capsys):
    base = model(rng)
    (tmp_path / "base").mkdir()
    weight_map = {}
    for place, (name, tensor) in enumerate(base.items()):
        weight_map[name] = f"model-{place}.safetensors"
        save_file({name: tensor}, tmp_path / "base" / weight_map[name], {"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    write_json(tmp_path / "base" / "model.safetensors.index.json", index)
    write_json(tmp_path / "base" / "config.json", TIED)
    leaves, changed = query(rng, base)
    changed |= {EMBED: draw(rng, TOKENS, WIDTH), HEAD: base[EMBED]}
    write_peft(tmp_path / "adapter", leaves, {f"{PREFIX}{EMBED}": changed[EMBED]})
    report = tmp_path / "report.json"
    assert merge(tmp_path, "--verify", "--json", str(report)) == 0
    assert_merged(read_folder(tmp_path / "out"), base, changed)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == weight_map | {HEAD: "model-1.safetensors"}
    sizes = [tensor.nbytes for tensor in (*base.values(), base[EMBED])]
    assert index["metadata"]["total_size"] == sum(sizes)
    report = json.loads(report.read_text())
    assert (report["added"], report["config"]) == ([HEAD], {"untied": True})
    assert "Changed in config.json: tie_word_embeddings: false\n" in capsys.readouterr().out


def test_the_audit_finds_a_head_that_was_changed_with_the_embedding(tmp_path, rng, capsys):
    """As PEFT's own merge does it."""
    base = write_base(tmp_path / "base", model(rng), **TIED)
    leaves, changed = query(rng, base)
    changed[EMBED] = draw(rng, TOKENS, WIDTH)
    write_peft(tmp_path / "adapter", leaves, {f"{PREFIX}{EMBED}": changed[EMBED]})
    merged = {name: np.asarray(tensor, np.float32) for name, tensor in (base | changed).items()}
    write_base(tmp_path / "out", merged, **TIED)
    assert audit(tmp_path) == 1
    assert "lm_head.weight: tied head changed" in capsys.readouterr().out


# Rows of single tokens

DELTA = "model.embed_tokens.token_adapter.trainable_tokens_delta"


@pytest.mark.parametrize("config", [{}, TIED])
@pytest.mark.parametrize("by_module", [False, True])
@pytest.mark.parametrize("indices", [[7, 0, 3], [9], [*range(TOKENS)]])
def test_rows_of_single_tokens_are_replaced(tmp_path, rng, config, by_module, indices):
    """PEFT trains them in a tied head too, so it stays tied."""
    base = write_base(tmp_path / "base", model(rng), **config)
    leaves, changed = query(rng, base)
    rows = draw(rng, len(indices), WIDTH)
    changed[EMBED] = base[EMBED].copy()
    changed[EMBED][indices] = rows
    given = {"embed_tokens": indices} if by_module else indices
    write_peft(tmp_path / "adapter", leaves, {PREFIX + DELTA: rows}, trainable_token_indices=given)
    check(tmp_path, base, changed)
    assert config_of(tmp_path) == config
    merged = read_folder(tmp_path / "out")
    merged[EMBED][indices[0]] += 1
    save_file(merged, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    assert audit(tmp_path) == 1


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("by_module", [True, False])
def test_rows_of_new_tokens_start_from_the_embeddings_in_the_file(
    tmp_path, rng, is_tied, by_module
):
    """PEFT saves a tied head too, which is equal to the embeddings."""
    others = {} if is_tied else {HEAD: draw(rng, TOKENS, WIDTH)}
    base = write_base(tmp_path / "base", model(rng, **others), **(TIED if is_tied else {}))
    before, rows = grown(rng, WIDTH), draw(rng, 2, WIDTH)
    leaves, changed = query(rng, base)
    names = ("model.embed_tokens", "lm_head") if is_tied else ("model.embed_tokens",)
    whole = {} if is_tied else {f"{PREFIX}{HEAD}": grown(rng, WIDTH)}
    changed |= {name.removeprefix(PREFIX): tensor for name, tensor in whole.items()}
    changed[EMBED] = before.copy()
    changed[EMBED][[TOKENS, 2]] = rows
    for name in names:
        whole[f"{PREFIX}{name}.token_adapter.base_layer.weight"] = before
        whole[f"{PREFIX}{name}.token_adapter.trainable_tokens_delta"] = rows
    indices = {"embed_tokens": [TOKENS, 2]} if by_module else [TOKENS, 2]
    write_peft(tmp_path / "adapter", leaves, whole, trainable_token_indices=indices)
    check(tmp_path, base, changed)
    assert config_of(tmp_path) == (TIED if is_tied else {}) | {"vocab_size": TOKENS + 2}


def test_rows_of_tied_embeddings_count_by_the_names_of_the_base(tmp_path, rng):
    """A vision-language model has other names in memory than in its file."""
    embed = "language_model.model.embed_tokens.weight"
    base = {embed: draw(rng, TOKENS, WIDTH), QUERY: draw(rng, 6, WIDTH)}
    base = write_base(tmp_path / "base", base, **TIED)
    leaves, changed = query(rng, base)
    changed[embed] = base[embed].copy()
    changed[embed][[1, 3]] = rows = draw(rng, 2, WIDTH)
    own = f"{PREFIX}model.language_{DELTA}"
    write_peft(tmp_path / "adapter", leaves, {own: rows}, trainable_token_indices=[1, 3])
    check(tmp_path, base, changed)
    assert config_of(tmp_path) == TIED


def test_rows_of_the_head_alone_untie_it(tmp_path, rng):
    base = write_base(tmp_path / "base", model(rng), **TIED)
    leaves, changed = query(rng, base)
    changed[HEAD] = base[EMBED].copy()
    changed[HEAD][[2, 4]] = rows = draw(rng, 2, WIDTH)
    whole = {f"{PREFIX}lm_head.token_adapter.trainable_tokens_delta": rows}
    write_peft(tmp_path / "adapter", leaves, whole, trainable_token_indices={"lm_head": [2, 4]})
    check(tmp_path, base, changed)
    assert config_of(tmp_path)["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("indices", "name", "shape", "message"),
    [
        ([1, 10], DELTA, (2, WIDTH), "is for token 10, but model.embed_tokens.weight has 10"),
        ([1, 2], DELTA, (3, WIDTH), "has shape (3, 5), which does not fit 2 tokens"),
        ([1, 2], DELTA, (2, 4), "has shape (2, 4), which does not fit 2 tokens"),
        ([1, 1], DELTA, (2, WIDTH), "trainable_token_indices must have the tokens of"),
        ([-1, 1], DELTA, (2, WIDTH), "trainable_token_indices must have the tokens of"),
        (
            {"x": [1, 2], "y": [3]},
            DELTA,
            (2, WIDTH),
            "trainable_token_indices must have the tokens of",
        ),
        (None, DELTA, (2, WIDTH), "trainable_token_indices must have the tokens of"),
        ([1, 2], f"x.{DELTA}", (2, WIDTH), None),
        ([1, 2], DELTA.replace("embed_tokens", "other"), (2, WIDTH), "the base has no tensor"),
    ],
)
def test_rows_of_tokens_that_do_not_fit_are_refused(
    tmp_path, rng, capsys, indices, name, shape, message
):
    base = write_base(tmp_path / "base", model(rng))
    leaves, _ = query(rng, base)
    whole = {PREFIX + name: draw(rng, *shape)}
    write_peft(tmp_path / "adapter", leaves, whole, trainable_token_indices=indices)
    assert (message or "the base has no tensor") in refused(tmp_path, capsys)


# A vocabulary that has grown


def grown(rng, *shape):
    return draw(rng, TOKENS + 2, *shape)


@pytest.mark.parametrize("text", [None, {"vocab_size": TOKENS}, {"layers": 2}])
@pytest.mark.parametrize("top", [{"vocab_size": TOKENS}, {}])
def test_a_grown_vocabulary_brings_its_size_and_its_tokenizer(tmp_path, rng, capsys, text, top):
    config = top | ({} if text is None else {"text_config": text})
    base = write_base(tmp_path / "base", model(rng, **{HEAD: draw(rng, TOKENS, WIDTH)}), **config)
    (tmp_path / "base" / "tokenizer.json").write_text("of the base")
    (tmp_path / "base" / "merges.txt").write_text("of the base")
    leaves, changed = query(rng, base)
    changed |= {EMBED: grown(rng, WIDTH), HEAD: grown(rng, WIDTH)}
    write_peft(
        tmp_path / "adapter", leaves, {f"{PREFIX}{name}": changed[name] for name in (EMBED, HEAD)}
    )
    for name in ("tokenizer.json", "added_tokens.json", "chat_template.jinja"):
        (tmp_path / "adapter" / name).write_text("of the adapter")
    check(tmp_path, base, changed)
    nested = {} if text is None else {"text_config": text}
    if text == {"vocab_size": TOKENS}:
        nested = {"text_config": {"vocab_size": TOKENS + 2}}
    first = top or text is None
    assert config_of(tmp_path) == ({"vocab_size": TOKENS + 2} if first else {}) | nested
    for name in ("tokenizer.json", "added_tokens.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_text() == "of the adapter"
    assert (tmp_path / "out" / "merges.txt").read_text() == "of the base"
    assert "OUT has" not in capsys.readouterr().err


def test_a_head_of_another_name_grows_with_the_embeddings(tmp_path, rng):
    embed, head = "model.decoder.embed_tokens.weight", "proj_out.weight"
    base = {embed: draw(rng, TOKENS, WIDTH), QUERY: draw(rng, 6, WIDTH)}
    base = write_base(tmp_path / "base", base, **TIED, model_type="whisper")
    leaves, changed = query(rng, base)
    changed |= {embed: grown(rng, WIDTH), head: grown(rng, WIDTH)}
    whole = {f"{PREFIX}{name}": changed[name] for name in (embed, head)}
    write_peft(tmp_path / "adapter", leaves, whole)
    check(tmp_path, base, changed)


def test_an_adapter_of_grown_embeddings_starts_from_those_in_its_file(tmp_path, rng):
    """PEFT saves them with save_embedding_layers, as `base_layer`."""
    base = write_base(tmp_path / "base", model(rng), **TIED, vocab_size=TOKENS)
    before = grown(rng, WIDTH)
    own, merged = embedding(rng, before)
    whole = {f"{PREFIX}model.embed_tokens.{end}": tensor for end, tensor in own.items()}
    whole[f"{PREFIX}model.embed_tokens.base_layer.weight"] = before
    leaves, changed = query(rng, base)
    whole[f"{PREFIX}{HEAD}"] = changed[HEAD] = grown(rng, WIDTH)
    write_peft(tmp_path / "adapter", leaves, whole)
    check(tmp_path, base, changed | {EMBED: merged})
    assert config_of(tmp_path)["vocab_size"] == TOKENS + 2


@pytest.mark.parametrize("lost", [EMBED, HEAD])
def test_embeddings_that_grew_without_the_head_are_refused_until_both_are_saved(
    tmp_path, rng, capsys, lost
):
    """The advice, save_embedding_layers=True, gives a file with both."""
    base = write_base(tmp_path / "base", model(rng, **{HEAD: draw(rng, TOKENS, WIDTH)}))
    leaves, changed = query(rng, base)
    changed |= {EMBED: grown(rng, WIDTH), HEAD: grown(rng, WIDTH)}
    whole = {f"{PREFIX}{name}": changed[name] for name in (EMBED, HEAD)}
    write_peft(
        tmp_path / "adapter", leaves, {n: x for n, x in whole.items() if not n.endswith(lost)}
    )
    error = refused(tmp_path, capsys)
    assert f"but {lost} has 10: save the adapter with save_embedding_layers=True" in error
    shutil.rmtree(tmp_path / "adapter")
    write_peft(tmp_path / "adapter", leaves, whole)
    check(tmp_path, base, changed)


@pytest.mark.parametrize("arguments", [{}, {"tie_word_embeddings": True}])
def test_embeddings_that_grew_without_their_tied_head_are_refused(tmp_path, rng, capsys, arguments):
    """The head would keep the tokens of before, and no library would load the result.

    The advice is followed: a base whose embeddings have the new size.
    """
    base = write_base(tmp_path / "base", model(rng), **TIED)
    leaves, changed = query(rng, base)
    changed[EMBED] = grown(rng, WIDTH)
    write_peft(tmp_path / "adapter", leaves, {f"{PREFIX}{EMBED}": changed[EMBED]})
    error = refused(tmp_path, capsys)
    assert f"the adapter has 12 tokens in {EMBED}, but lm_head.weight has those of BASE" in error
    assert "or give the BASE whose embeddings have the new size" in error
    shutil.rmtree(tmp_path / "base")
    base[EMBED] = grown(rng, WIDTH)
    write_base(tmp_path / "base", base, **TIED)
    check(tmp_path, base, changed | {HEAD: base[EMBED]})


def test_an_adapter_of_a_head_that_grew_brings_the_embeddings_too(tmp_path, rng):
    """PEFT saves the resized embeddings as the base layer of the head, which is tied to them."""
    base = write_base(tmp_path / "base", model(rng), **TIED)
    before = grown(rng, WIDTH)
    leaves, changed = query(rng, base)
    leaves["lm_head"] = near(rng, before)
    changed |= {EMBED: before, HEAD: dense(before, *leaves["lm_head"])}
    write_peft(tmp_path / "adapter", leaves, {f"{PREFIX}lm_head.base_layer.weight": before})
    check(tmp_path, base, changed)


def test_the_untrained_copy_of_grown_embeddings_is_the_tied_head(tmp_path, rng):
    base = write_base(tmp_path / "base", model(rng), **TIED)
    before, trained = grown(rng, WIDTH), grown(rng, WIDTH)
    leaves, changed = query(rng, base)
    module = f"{PREFIX}model.embed_tokens"
    whole = {f"{module}.weight": trained, f"{module}.original_module.weight": before}
    write_peft(tmp_path / "adapter", leaves, whole, modules_to_save=["embed_tokens"])
    check(tmp_path, base, changed | {EMBED: trained, HEAD: before})


def test_a_magnitude_that_the_file_has_twice_is_one(tmp_path, rng, capsys):
    """PEFT saves that of an embedding so with save_embedding_layers."""
    base = write_base(tmp_path / "base", model(rng))
    own, merged = embedding(rng, base[EMBED])
    whole = {f"{PREFIX}model.embed_tokens.{end}": tensor for end, tensor in own.items()}
    again = f"{PREFIX}model.embed_tokens.lora_magnitude_vector.weight"
    leaves, changed = query(rng, base)
    m = own["lora_magnitude_vector"]
    write_peft(tmp_path / "adapter", leaves, whole | {again: m + 1})
    assert "name the same tensor" in refused(tmp_path, capsys)
    shutil.rmtree(tmp_path / "adapter")
    write_peft(tmp_path / "adapter", leaves, whole | {again: m})
    check(tmp_path, base, changed | {EMBED: merged})


@pytest.mark.parametrize("is_adapted", [False, True])
def test_the_table_of_the_family_renames_whole_tensors_too(tmp_path, rng, capsys, is_adapted):
    """GPT-NeoX has its head in memory as lm_head, and in files as embed_out."""
    head, name = "embed_out.weight", "gpt_neox.layers.0.attention.dense"
    tensors = {head: draw(rng, TOKENS, WIDTH), f"{name}.weight": draw(rng, 6, WIDTH)}
    base = write_base(tmp_path / "base", tensors, model_type="gpt_neox")
    leaves = {name: near(rng, base[f"{name}.weight"])}
    changed = {f"{name}.weight": dense(base[f"{name}.weight"], *leaves[name])}
    whole = {f"{PREFIX}{HEAD}": draw(rng, TOKENS, WIDTH)}
    if is_adapted:
        whole = {f"{PREFIX}lm_head.base_layer.weight": base[head]}
        leaves["lm_head"] = near(rng, base[head])
        changed[head] = dense(base[head], *leaves["lm_head"])
    else:
        (changed[head],) = whole.values()
    write_peft(tmp_path / "adapter", leaves, whole, modules_to_save=["lm_head"])
    check(tmp_path, base, changed)
    shutil.rmtree(tmp_path / "out")
    write_json(tmp_path / "base" / "config.json", {})  # then nothing tells the family
    assert "lm_head" in refused(tmp_path, capsys)
    check(tmp_path, base, changed, "--rename", r"^lm_head(?![^.])=embed_out")


def test_the_tensor_of_before_the_training_is_left_out(tmp_path, rng, capsys):
    """PEFT saves `original_module` beside `modules_to_save` when it keeps the embeddings."""
    base = write_base(tmp_path / "base", model(rng))
    leaves, changed = query(rng, base)
    changed[EMBED] = draw(rng, TOKENS, WIDTH)
    before = {f"{PREFIX}model.embed_tokens.original_module.weight": base[EMBED]}
    trained = {f"{PREFIX}model.embed_tokens.modules_to_save.weight": changed[EMBED]}
    write_peft(tmp_path / "adapter", leaves, before)
    assert "the base has no tensor model.embed_tokens.original_module" in refused(tmp_path, capsys)
    shutil.rmtree(tmp_path / "adapter")
    write_peft(tmp_path / "adapter", leaves, before | trained)
    check(tmp_path, base, changed)
