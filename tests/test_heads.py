"""Heads and embeddings: tied ones, new tokens, new classifiers, residual bases, square weights."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from checkpoints import (
    ALPHA,
    PREFIX,
    RANK,
    assert_merged,
    audit,
    check,
    dense,
    draw,
    merge,
    near,
    peft_config,
    read_folder,
    refused,
    write_base,
    write_json,
    write_peft,
)
from safetensors.numpy import load_file, save_file

EMBED, HEAD, QUERY = (
    "model.embed_tokens.weight",
    "lm_head.weight",
    "model.layers.0.self_attn.q_proj.weight",
)
TIED = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
TOKENS, WIDTH = 10, 5


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def model(rng, **others):
    return {EMBED: draw(rng, TOKENS, WIDTH), QUERY: draw(rng, 6, WIDTH), **others}


def query(rng, base):
    """Return A, B and m of the query's adapter, and its merged weight."""
    leaves = near(rng, base[QUERY])
    return {QUERY.removesuffix(".weight"): leaves}, {QUERY: dense(base[QUERY], *leaves)}


def embedding(rng, weight):
    """Return PEFT's tensors of an embedding's adapter by their ends, and the merged weight."""
    a, b, m = near(rng, weight.T)
    names = ("lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
    return dict(zip(names, (a, b, m), strict=True)), dense(weight.T, a, b, m).T


def config_of(folder):
    return json.loads((folder / "out" / "config.json").read_text())


# Tied embeddings


@pytest.mark.parametrize(
    "trained", ["embed_tokens", "both", "DoRA on embed_tokens", "DoRA on lm_head"]
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
    if trained == "DoRA on embed_tokens":
        own, changed[EMBED] = embedding(rng, base[EMBED])
        whole |= {f"{PREFIX}model.embed_tokens.{end}": tensor for end, tensor in own.items()}
    if trained == "DoRA on lm_head":
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


def test_a_new_head_is_in_the_index_of_shards(tmp_path, rng):
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


# New heads

BERT = {
    "embeddings.word_embeddings.weight": (8, 6),
    "encoder.layer.0.attention.self.query.weight": (6, 6),
    "encoder.layer.0.attention.self.query.bias": (6,),
    "pooler.dense.weight": (6, 6),
}
ATTENTION = "encoder.layer.0.attention.self.query"


def classifier(folder, rng, *, architectures=("BertModel",), size=3, prefix="bert.", **changes):
    """Write a base without a head, and an adapter with one; return tensors and changes."""
    base = {name: draw(rng, *shape) for name, shape in BERT.items()}
    write_base(
        folder / "base", base, architectures=list(architectures), num_labels=2, _num_labels=2
    )
    leaves = {f"{prefix}{ATTENTION}": near(rng, base[f"{ATTENTION}.weight"])}
    head = {"classifier.weight": draw(rng, size, 6), "classifier.bias": draw(rng, size)}
    whole = {f"{PREFIX}{name}": tensor for name, tensor in head.items()}
    config = {"modules_to_save": ["classifier", "score"], "task_type": "SEQ_CLS", **changes}
    write_peft(folder / "adapter", leaves, whole, **config)
    merged = dense(base[f"{ATTENTION}.weight"], *leaves[f"{prefix}{ATTENTION}"])
    changed = {f"{prefix}{ATTENTION}.weight": merged, **head}
    return {f"{prefix}{name}": tensor for name, tensor in base.items()}, changed


@pytest.mark.parametrize(
    ("task", "given", "architecture"),
    [
        ("SEQ_CLS", "BertModel", "BertForSequenceClassification"),
        ("SEQ_CLS", "BertForMaskedLM", "BertForSequenceClassification"),
        ("TOKEN_CLS", "BertPreTrainedModel", "BertForTokenClassification"),
        ("QUESTION_ANS", "GPT2LMHeadModel", "GPT2ForQuestionAnswering"),
        ("SEQ_CLS", "Gemma3ForCausalLM", "Gemma3TextForSequenceClassification"),
    ],
)
def test_a_new_head_gives_the_model_its_class_and_its_labels(
    tmp_path, rng, task, given, architecture
):
    """All names get the prefix that the class with the head has."""
    base, changed = classifier(tmp_path, rng, architectures=[given], task_type=task)
    check(tmp_path, base, changed)
    config = config_of(tmp_path)
    assert config["architectures"] == [architecture]
    assert config["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    assert config["label2id"] == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
    assert not {"num_labels", "_num_labels"} & config.keys()


@pytest.mark.parametrize(
    ("task", "given"), [("OTHER", "BertModel"), (None, "BertModel"), ("SEQ_CLS", "bert")]
)
def test_a_new_head_of_a_class_that_no_file_tells_needs_the_option(
    tmp_path, rng, capsys, task, given
):
    base, changed = classifier(tmp_path, rng, architectures=[given], task_type=task)
    assert "name it with --architecture" in refused(tmp_path, capsys)
    check(tmp_path, base, changed, "--architecture", "BertForMine")
    assert config_of(tmp_path)["architectures"] == ["BertForMine"]


@pytest.mark.parametrize(
    ("given", "task", "architecture"),
    [
        ("BertForTokenClassification", "SEQ_CLS", "BertForSequenceClassification"),
        ("BertForSequenceClassification", "SEQ_CLS", "BertForSequenceClassification"),
        ("BertForMultipleChoice", "CAUSAL_LM", "BertForMultipleChoice"),
        ("BertForMultipleChoice", None, "BertForMultipleChoice"),
    ],
)
def test_a_head_of_one_name_for_two_tasks_is_that_of_the_adapters_task(
    tmp_path, rng, given, task, architecture
):
    base = model(rng, **{"classifier.weight": draw(rng, 3, WIDTH)})
    write_base(tmp_path / "base", base, architectures=[given])
    leaves, changed = query(rng, base)
    changed["classifier.weight"] = draw(rng, 3, WIDTH)
    whole = {f"{PREFIX}classifier.weight": changed["classifier.weight"]}
    saved = {"modules_to_save": ["classifier"], "task_type": task}
    write_peft(tmp_path / "adapter", leaves, whole, **saved)
    check(tmp_path, base, changed)
    assert config_of(tmp_path) == {"architectures": [architecture]}
    before, after = ((tmp_path / name / "config.json").read_bytes() for name in ("base", "out"))
    assert (before == after) == (given == architecture)


def test_embeddings_that_were_trained_do_not_change_the_class(tmp_path, rng):
    base = write_base(tmp_path / "base", model(rng), architectures=["BertModel"])
    leaves, changed = query(rng, base)
    changed[EMBED] = draw(rng, TOKENS, WIDTH)
    saved = {"modules_to_save": ["embed_tokens"], "task_type": "SEQ_CLS"}
    write_peft(tmp_path / "adapter", leaves, {f"{PREFIX}{EMBED}": changed[EMBED]}, **saved)
    check(tmp_path, base, changed)
    assert config_of(tmp_path) == {"architectures": ["BertModel"]}


def test_a_module_is_saved_whose_name_ends_with_one_that_peft_was_told(tmp_path, rng):
    """DistilBERT's pre_classifier ends with classifier."""
    base, changed = classifier(tmp_path, rng)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    changed["pre_classifier.weight"] = draw(rng, 6, 6)
    whole = {f"{PREFIX}pre_classifier.weight": changed["pre_classifier.weight"]}
    save_file(load_file(file) | whole, file)
    check(tmp_path, base, changed)
    assert len(config_of(tmp_path)["id2label"]) == 3


@pytest.mark.parametrize(
    ("family", "name", "classes"),
    [
        ("yolos", "class_labels_classifier.layers.1", 6),
        ("conditional_detr", "class_labels_classifier", 7),
        ("mask2former", "class_predictor", 6),
        ("yolos", "other", 7),
    ],
)
def test_a_detector_may_have_a_row_for_no_object(tmp_path, rng, family, name, classes):
    base = write_base(tmp_path / "base", model(rng), architectures=["A"], model_type=family)
    leaves, changed = query(rng, base)
    head = {f"{name}.weight": draw(rng, 7, WIDTH), "box.layers.0.weight": draw(rng, 9, WIDTH)}
    if name != "other":
        head["box.layers.1.weight"] = draw(rng, 4, 9)
    whole = {f"{PREFIX}{own}": tensor for own, tensor in head.items()}
    saved = [name.partition(".")[0], "box"]
    write_peft(tmp_path / "adapter", leaves, whole, modules_to_save=saved)
    check(tmp_path, base, changed | head, "--architecture", "B")
    assert len(config_of(tmp_path)["id2label"]) == classes


def test_a_new_head_of_letters_gives_their_number(tmp_path, rng):
    """Wav2Vec2ForCTC has an lm_head and no embeddings."""
    base = {QUERY: draw(rng, 6, WIDTH)}
    write_base(tmp_path / "base", base, architectures=["XModel"], vocab_size=32)
    leaves, changed = query(rng, base)
    changed[HEAD] = draw(rng, 40, WIDTH)
    mapping = {"base_model_class": "XForCTC"}
    saved = {"modules_to_save": ["lm_head"], "auto_mapping": mapping}
    write_peft(tmp_path / "adapter", leaves, {f"{PREFIX}{HEAD}": changed[HEAD]}, **saved)
    check(tmp_path, base, changed)
    assert config_of(tmp_path) == {"architectures": ["XForCTC"], "vocab_size": 40}


def test_names_that_a_class_with_the_new_head_does_not_have_are_refused(tmp_path, rng, capsys):
    """LlamaForQuestionAnswering has `transformer.` for `model.`."""
    base = write_base(tmp_path / "base", model(rng), architectures=["LlamaForCausalLM"])
    leaves, _ = query(rng, base)
    leaves = {f"transformer{path.removeprefix('model')}": own for path, own in leaves.items()}
    head = {f"{PREFIX}qa_outputs.weight": draw(rng, 2, WIDTH)}
    saved = {"modules_to_save": ["qa_outputs"], "task_type": "QUESTION_ANS"}
    write_peft(tmp_path / "adapter", leaves, head, **saved)
    error = refused(tmp_path, capsys)
    assert "a model with qa_outputs.weight has the name transformer.layers.0" in error


@pytest.mark.parametrize("saved", ["experts", "mlp"])
@pytest.mark.parametrize("there", ["mlp.experts.0.up_proj", "block_sparse_moe.experts.0.w1"])
def test_a_module_that_the_base_has_in_another_form_is_not_added(
    tmp_path, rng, capsys, there, saved
):
    there = f"model.layers.0.{there}.weight"
    base = write_base(tmp_path / "base", model(rng, **{there: draw(rng, 4, WIDTH)}))
    leaves, _ = query(rng, base)
    whole = {f"{PREFIX}model.layers.0.mlp.experts.gate_up_proj": draw(rng, 2, 8, WIDTH)}
    write_peft(tmp_path / "adapter", leaves, whole, modules_to_save=[saved])
    assert f"the base has {there} and other tensors for" in refused(tmp_path, capsys)


def test_a_module_of_a_block_that_the_base_lacks_is_added(tmp_path, rng):
    base = write_base(tmp_path / "base", model(rng))
    leaves, changed = query(rng, base)
    name = "model.layers.0.gate.weight"
    changed[name] = draw(rng, 2, WIDTH)
    whole = {f"{PREFIX}{name}": changed[name]}
    write_peft(tmp_path / "adapter", leaves, whole, modules_to_save=["gate"])
    check(tmp_path, base, changed)


@pytest.mark.parametrize(("own", "there"), [("weight", "gamma"), ("bias", "beta")])
def test_a_norm_has_other_names_in_old_files(tmp_path, rng, own, there):
    base = write_base(tmp_path / "base", model(rng, **{f"LayerNorm.{there}": draw(rng, 5)}))
    leaves, changed = query(rng, base)
    changed[f"LayerNorm.{there}"] = draw(rng, 5)
    whole = {f"{PREFIX}LayerNorm.{own}": changed[f"LayerNorm.{there}"]}
    write_peft(tmp_path / "adapter", leaves, whole, modules_to_save=["LayerNorm"])
    check(tmp_path, base, changed)


@pytest.mark.parametrize("is_new", [False, True])
def test_the_counter_of_a_batch_norm_is_copied(tmp_path, rng, is_new):
    name = "head.norm.num_batches_tracked"
    counter = {} if is_new else {name: np.array(7)}
    base = write_base(tmp_path / "base", model(rng, **counter))
    leaves, changed = query(rng, base)
    changed[name] = np.array(2**60 + 1)
    whole = {f"{PREFIX}{name}": changed[name]}
    write_peft(tmp_path / "adapter", leaves, whole, modules_to_save=["head"])
    check(tmp_path, base, changed)
    assert read_folder(tmp_path / "out")[name] == 2**60 + 1


def test_a_head_of_classes_needs_no_head_of_new_tokens(tmp_path, rng):
    base = model(rng, **{HEAD: draw(rng, TOKENS, WIDTH)})
    write_base(tmp_path / "base", base, architectures=["LlamaForCausalLM"])
    leaves, changed = query(rng, base)
    changed |= {"score.weight": draw(rng, 3, WIDTH), EMBED: draw(rng, TOKENS + 2, WIDTH)}
    whole = {f"{PREFIX}{name}": changed[name] for name in ("score.weight", EMBED)}
    saved = {"modules_to_save": ["score"], "task_type": "SEQ_CLS"}
    write_peft(tmp_path / "adapter", leaves, whole, **saved)
    check(tmp_path, base, changed)
    assert config_of(tmp_path)["architectures"] == ["LlamaForSequenceClassification"]


@pytest.mark.parametrize("rows", [TOKENS, TOKENS + 2])
def test_a_classifier_has_no_head_that_is_tied(tmp_path, rng, rows):
    base = write_base(tmp_path / "base", model(rng), **TIED)
    leaves, changed = query(rng, base)
    changed |= {"score.weight": draw(rng, 3, WIDTH), EMBED: draw(rng, rows, WIDTH)}
    whole = {f"{PREFIX}{name}": changed[name] for name in ("score.weight", EMBED)}
    saved = {"modules_to_save": ["score", "embed_tokens"], "task_type": "SEQ_CLS"}
    write_peft(tmp_path / "adapter", leaves, whole, **saved)
    check(tmp_path, base, changed)
    assert config_of(tmp_path)["tie_word_embeddings"]


def test_biases_of_tokens_that_did_not_grow_are_refused(tmp_path, rng, capsys):
    """BART has one number for each token in final_logits_bias."""
    bias = np.zeros((1, TOKENS), np.float32)
    base = write_base(tmp_path / "base", model(rng, final_logits_bias=bias))
    leaves, changed = query(rng, base)
    changed[EMBED] = draw(rng, TOKENS + 2, WIDTH)
    write_peft(tmp_path / "adapter", leaves, {f"{PREFIX}{EMBED}": changed[EMBED]})
    error = refused(tmp_path, capsys)
    assert f"final_logits_bias has {TOKENS}: give the BASE whose embeddings" in error
    base["final_logits_bias"] = np.zeros((1, TOKENS + 2), np.float32)
    save_file(base, tmp_path / "base" / "model.safetensors")
    check(tmp_path, base, changed)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save lm_head"),
        ({"modules_to_save": ["score", "head"]}, "modules_to_save head"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ],
)
def test_a_file_without_what_the_configuration_names_is_refused(
    tmp_path, rng, capsys, entries, message
):
    base = write_base(tmp_path / "base", model(rng))
    write_peft(tmp_path / "adapter", query(rng, base)[0], **entries)
    error = refused(tmp_path, capsys)
    assert f"adapter_config.json says {message}, but the file has no tensors of them" in error


def test_a_new_head_is_in_the_index_and_all_names_get_the_prefix(tmp_path, rng):
    base, changed = classifier(tmp_path, rng)
    (tmp_path / "base" / "model.safetensors").rename(tmp_path / "base" / "a.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(BERT, "a.safetensors")}
    write_json(tmp_path / "base" / "model.safetensors.index.json", index)
    check(tmp_path, base, changed)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == dict.fromkeys([*base, *changed], "a.safetensors")


def test_without_a_new_tensor_the_names_of_the_base_stay(tmp_path, rng):
    base, changed = classifier(tmp_path, rng)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({n: x for n, x in load_file(file).items() if "classifier" not in n}, file)
    (name,) = {name for name in changed if ATTENTION in name}
    own = {n.removeprefix("bert."): x for n, x in base.items()}
    check(tmp_path, own, {name.removeprefix("bert."): changed[name]})
    assert config_of(tmp_path) == {
        "architectures": ["BertModel"],
        "num_labels": 2,
        "_num_labels": 2,
    }


@pytest.mark.parametrize("source", ["options", "config.json", "auto_mapping"])
def test_a_class_that_is_given_is_that_of_the_result(tmp_path, rng, source):
    changes = {}
    if source == "auto_mapping":
        changes["auto_mapping"] = {"base_model_class": "BertForTokenClassification"}
    base, changed = classifier(tmp_path, rng, **changes)
    beside = {"architectures": ["BertForOther"], "id2label": {"0": "a", "1": "b", "2": "c"}}
    arguments = []
    if source == "config.json":
        write_json(tmp_path / "adapter" / "config.json", beside)
    if source == "options":
        write_json(tmp_path / "adapter" / "config.json", beside)
        arguments = ["--architecture", "BertForMine", "--labels", "no,maybe,yes"]
    check(tmp_path, base, changed, *arguments)
    config = config_of(tmp_path)
    expected = {
        "options": ("BertForMine", ["no", "maybe", "yes"]),
        "config.json": ("BertForOther", ["a", "b", "c"]),
        "auto_mapping": ("BertForTokenClassification", ["LABEL_0", "LABEL_1", "LABEL_2"]),
    }
    assert (config["architectures"], [*config["id2label"].values()]) == (
        [expected[source][0]],
        expected[source][1],
    )


def test_labels_of_another_number_than_the_rows_are_refused(tmp_path, rng, capsys):
    """The advice is followed: a name for each row."""
    base, changed = classifier(tmp_path, rng)
    error = refused(tmp_path, capsys, "--labels", "no,yes")
    assert "labels must have a name for each of the 3 classes of classifier.weight, got 2" in error
    check(tmp_path, base, changed, "--labels", "no,maybe,yes")


def test_options_change_the_configuration_without_a_new_head(tmp_path, rng):
    base = write_base(tmp_path / "base", model(rng), architectures=["A"])
    leaves, changed = query(rng, base)
    write_peft(tmp_path / "adapter", leaves)
    check(tmp_path, base, changed, "--architecture", "B", "--labels", "x,y")
    config = config_of(tmp_path)
    assert (config["architectures"], config["id2label"]) == (["B"], {"0": "x", "1": "y"})


def test_a_head_of_another_size_replaces_that_of_the_base(tmp_path, rng):
    base = {"classifier.weight": draw(rng, 2, WIDTH), "classifier.bias": draw(rng, 2)}
    base = write_base(tmp_path / "base", model(rng, **base), architectures=["BertForOther"])
    leaves, changed = query(rng, base)
    changed |= {"classifier.weight": draw(rng, 3, WIDTH), "classifier.bias": draw(rng, 3)}
    whole = {f"{PREFIX}{name}": tensor for name, tensor in changed.items() if "classifier" in name}
    write_peft(tmp_path / "adapter", leaves, whole, modules_to_save=["classifier"])
    check(tmp_path, base, changed)
    config = config_of(tmp_path)
    assert config["architectures"] == ["BertForOther"]
    assert len(config["id2label"]) == 3


def test_the_last_layer_of_a_head_gives_the_number_of_labels(tmp_path, rng):
    base, changed = classifier(tmp_path, rng, modules_to_save=["classifier"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    head = {"dense.weight": draw(rng, 2, 6), "out_proj.weight": draw(rng, 4, 2)}
    for name in ("weight", "bias"):
        tensors.pop(f"{PREFIX}classifier.{name}")
        changed.pop(f"classifier.{name}")
    save_file(tensors | {f"{PREFIX}classifier.{n}": x for n, x in head.items()}, file)
    changed |= {f"classifier.{name}": tensor for name, tensor in head.items()}
    check(tmp_path, base, changed)
    assert len(config_of(tmp_path)["id2label"]) == 4


@pytest.mark.parametrize(
    ("name", "modules", "message"),
    [
        ("classifier.weight", None, "the base has no tensor classifier.weight"),
        ("other.weight", ["classifier"], "the base has no tensor other.weight"),
        ("deep.dense.weight", ["dense"], "the base has no tensor deep.dense.weight"),
    ],
)
def test_a_tensor_that_is_not_of_a_new_head_is_not_added(
    tmp_path, rng, capsys, name, modules, message
):
    """`pooler.dense` of the base may be the tensor that `deep.dense` means."""
    classifier(tmp_path, rng, modules_to_save=modules)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {n: x for n, x in load_file(file).items() if "classifier" not in n}
    save_file(tensors | {f"{PREFIX}{name}": draw(rng, 6, 6)}, file)
    assert message in refused(tmp_path, capsys)


@pytest.mark.parametrize("entries", [{"layer_replication": [[0, 1]]}, {"lora_bias": True}])
def test_entries_that_change_the_layers_are_refused_by_name(tmp_path, rng, capsys, entries):
    base = write_base(tmp_path / "base", model(rng))
    leaves, _ = query(rng, base)
    write_peft(tmp_path / "adapter", leaves, **entries)
    (name,) = entries
    assert f"{name} cannot be merged with a DoRA adapter" in refused(tmp_path, capsys)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (
            np.ones((TOKENS, 4), np.float32),
            "(10, 4) does not fit model.embed_tokens.weight (10, 5)",
        ),
        (np.ones((TOKENS, WIDTH), np.int32), "must be of dtype F64, F32, F16, BF16, got I32"),
    ],
)
def test_a_whole_tensor_that_does_not_fit_is_refused(tmp_path, rng, capsys, tensor, message):
    base = write_base(tmp_path / "base", model(rng))
    leaves, _ = query(rng, base)
    write_peft(tmp_path / "adapter", leaves, {f"{PREFIX}{EMBED}": tensor})
    assert message in refused(tmp_path, capsys)


def test_a_layer_of_another_size_must_be_one_that_peft_saves_in_full(tmp_path, rng, capsys):
    base = write_base(tmp_path / "base", model(rng, **{"score.weight": draw(rng, 3, WIDTH)}))
    leaves, changed = query(rng, base)
    changed["score.weight"] = draw(rng, 4, WIDTH)
    whole = {f"{PREFIX}score.weight": changed["score.weight"]}
    write_peft(tmp_path / "adapter", leaves, whole)
    assert "(4, 5) does not fit score.weight (3, 5)" in refused(tmp_path, capsys)
    write_json(tmp_path / "adapter" / "adapter_config.json", peft_config(modules_to_save=["score"]))
    check(tmp_path, base, changed)


def test_a_whole_tensor_for_one_that_is_not_floating_is_refused(tmp_path, rng, capsys):
    base = write_base(tmp_path / "base", model(rng, ids=np.arange(4)))
    leaves, _ = query(rng, base)
    write_peft(tmp_path / "adapter", leaves, {f"{PREFIX}ids": draw(rng, 4)})
    assert "cannot replace ids of dtype I64: remove it from the adapter" in refused(
        tmp_path, capsys
    )
    shutil.rmtree(tmp_path / "adapter")
    leaves, changed = query(rng, base)
    write_peft(tmp_path / "adapter", leaves)
    check(tmp_path, base, changed)


@pytest.mark.parametrize("are_equal", [True, False])
def test_two_whole_tensors_for_one_of_the_base_must_be_equal(tmp_path, rng, capsys, are_equal):
    base = write_base(tmp_path / "base", model(rng) | {"x.weight": draw(rng, 4, 3)})
    leaves, changed = query(rng, base)
    one = draw(rng, 4, 3)
    other = one if are_equal else np.nextafter(one, np.float32(9))
    write_peft(tmp_path / "adapter", leaves, {f"{PREFIX}x.weight": one, f"{PREFIX}y.weight": other})
    rename = ("--rename", r"^y(?=\.|$)=x")
    if are_equal:
        check(tmp_path, base, {**changed, "x.weight": one}, *rename)
    else:
        assert "are both for x.weight, and differ" in refused(tmp_path, capsys, *rename)


# A residual base


SHARES = (0.03, 0.1, 0.5, 0.9, 0.98)


def pissa(folder, rng, *, base, m, **changes):
    """Write an adapter of PiSSA: s B A is the best approximation of W, m has the norms of W.

    `m` is "whole", "residual" or "neither", or the share of the residual's norms in m.
    """
    weight = draw(rng, 6, WIDTH)
    u, values, vt = np.linalg.svd(weight, full_matrices=False)
    a, b = vt[:RANK], RANK / ALPHA * u[:, :RANK] * values[:RANK]
    residual = weight - ALPHA / RANK * b @ a
    stored = {"whole": weight, "residual": residual}
    norms = {name: np.linalg.norm(matrix, axis=1) for name, matrix in stored.items()}
    norms["neither"] = 3 + rng.random(6)
    for share in SHARES:
        norms[share] = (1 - share) * norms["whole"] + share * norms["residual"]
    tensors = {QUERY: stored[base].astype("float32"), EMBED: draw(rng, TOKENS, WIDTH)}
    write_base(folder / "base", tensors)
    leaves = a, b, norms[m].astype("float32")
    changes = {"init_lora_weights": "pissa", **changes}
    write_peft(folder / "adapter", {QUERY.removesuffix(".weight"): leaves}, **changes)
    return tensors, {QUERY: dense(tensors[QUERY], *leaves)}


@pytest.mark.parametrize("name", ["pissa", "pissa_niter_4", "olora", "PiSSA"])
@pytest.mark.parametrize("arguments", [[], ["--base-is-residual"]])
def test_a_residual_base_is_known_by_its_norms(tmp_path, rng, capsys, name, arguments):
    base, changed = pissa(tmp_path, rng, base="residual", m="whole", init_lora_weights=name)
    check(tmp_path, base, changed, *arguments)
    assert "magnitudes do not tell" not in capsys.readouterr().err


def test_norms_of_neither_need_the_option(tmp_path, rng, capsys):
    base, changed = pissa(tmp_path, rng, base="residual", m="neither")
    error = refused(tmp_path, capsys)
    assert "initialised by pissa, which changed the base weights" in error
    assert "with --base-is-residual" in error
    check(tmp_path, base, changed, "--base-is-residual")


@pytest.mark.parametrize("base", ["whole", "residual"])
@pytest.mark.parametrize("share", SHARES)
def test_norms_tell_only_where_those_of_one_are_near(tmp_path, rng, capsys, base, share):
    """m between those of W and of W − s B A, as a training leaves it.

    V = W + s B A of the base in the file: an m near ‖W‖ is that of the base of before. An m that
    the training moved by a tenth tells nothing, though one of the two is nearer.
    """
    tensors, changed = pissa(tmp_path, rng, base=base, m=share)
    is_residual = base == "residual" and share == 0.03
    is_known_not_to_be = (base, share) in [("whole", 0.03), ("residual", 0.98)]
    if is_residual:
        check(tmp_path, tensors, changed)
        return
    assert "initialised by pissa" in refused(tmp_path, capsys)
    if is_known_not_to_be:
        assert "BASE is not the residual" in refused(tmp_path, capsys, "--base-is-residual")
    else:
        check(tmp_path, tensors, changed, "--base-is-residual")
        assert "magnitudes do not tell whether BASE is the residual base" in capsys.readouterr().err


def test_the_base_of_before_the_initialisation_is_refused(tmp_path, rng, capsys):
    """The advice is followed: the base that the training saved, with the option."""
    base, changed = pissa(tmp_path, rng, base="whole", m="whole")
    assert "merge into the base that the training saved" in refused(tmp_path, capsys)
    error = refused(tmp_path, capsys, "--base-is-residual")
    assert "BASE is not the residual base: the magnitudes are the row norms of its weights" in error
    residual = base | {}
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    a, b, m = tensors.values()
    a, b, m = (tensors[name] for name in sorted(tensors))
    residual[QUERY] = (base[QUERY] - ALPHA / RANK * b @ a).astype("float32")
    save_file(residual, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    changed = {QUERY: dense(residual[QUERY], a, b, m)}
    check(tmp_path, residual, changed, "--base-is-residual")


def test_a_weight_that_the_file_has_in_full_needs_no_residual_base(tmp_path, rng):
    base, _ = pissa(tmp_path, rng, base="whole", m="whole")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    a, b, m = (tensors[name] for name in sorted(tensors))
    residual = (base[QUERY] - ALPHA / RANK * b @ a).astype("float32")
    name = QUERY.removesuffix(".weight")
    save_file(tensors | {f"{PREFIX}{name}.base_layer.weight": residual}, file)
    check(tmp_path, base, {QUERY: dense(residual, a, b, m)})


def test_a_convolution_is_not_asked_for_a_residual_base(tmp_path, rng, capsys):
    """One convolution alone tells nothing, if its m has more axes than one."""
    weight = draw(rng, 4, 3, 2, 2)
    base = write_base(tmp_path / "base", {"conv.weight": weight})
    a, b, m = near(rng, weight)
    leaves = (a.reshape(RANK, 3, 2, 2), b.reshape(4, RANK, 1, 1), m)
    write_peft(tmp_path / "adapter", {"conv": leaves}, init_lora_weights="olora")
    assert "with --base-is-residual" in refused(tmp_path, capsys)
    changed = {"conv.weight": dense(weight.reshape(4, -1), a, b, m)}
    check(tmp_path, base, changed, "--base-is-residual")


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_were_trained_and_are_not_in_the_file_are_refused(tmp_path, rng, capsys, bias):
    own = f"{QUERY.removesuffix('weight')}bias"
    base = write_base(tmp_path / "base", model(rng, **{own: draw(rng, 6)}))
    leaves, changed = query(rng, base)
    write_peft(tmp_path / "adapter", leaves, bias=bias)
    assert f"says bias {bias}, but the file lacks {own}" in refused(tmp_path, capsys)
    shutil.rmtree(tmp_path / "adapter")
    changed[own] = draw(rng, 6)
    write_peft(tmp_path / "adapter", leaves, {PREFIX + own: changed[own]}, bias=bias)
    check(tmp_path, base, changed)


# A square weight of Conv1D beside one of Linear

ATTN, PROJ = "transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj"
LINEAR = "score"


def gpt2(rng, *, biases=True, wide=True):
    """Return the tensors of GPT-2's attention, (in, out), and of a square head, (out, in)."""
    base = {f"{PROJ}.weight": draw(rng, 4, 4), f"{LINEAR}.weight": draw(rng, 4, 4)}
    if wide:
        base[f"{ATTN}.weight"] = draw(rng, 4, 12)
    if biases:
        base[f"{PROJ}.bias"] = draw(rng, 4)
        base |= {f"{ATTN}.bias": draw(rng, 12)} if wide else {}
    return base


def adapt(rng, base, transposed):
    """Return A, B and m, and the merged weights, by module; some are stored (in, out)."""
    leaves, changed = {}, {}
    for path, is_transposed in transposed.items():
        weight = base[f"{path}.weight"]
        leaves[path] = near(rng, weight.T if is_transposed else weight)
        merged = dense(weight.T if is_transposed else weight, *leaves[path])
        changed[f"{path}.weight"] = merged.T if is_transposed else merged
    return leaves, changed


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize(
    ("config", "biases", "transposed"),
    [
        ({"model_type": "gpt2"}, True, {PROJ: True, LINEAR: False}),
        ({"model_type": "gpt2"}, False, {PROJ: True, LINEAR: False}),
        ({}, True, {PROJ: True, LINEAR: False}),
        ({}, True, {ATTN: True, PROJ: True}),
        ({}, True, {ATTN: True, PROJ: True, LINEAR: False}),
    ],
)
def test_the_base_tells_how_a_square_weight_is_stored(
    tmp_path, rng, flag, config, biases, transposed
):
    """PEFT's fan_in_fan_out is that of the last module, so it may have either value."""
    base = write_base(tmp_path / "base", gpt2(rng, biases=biases), **config)
    leaves, changed = adapt(rng, base, transposed)
    write_peft(tmp_path / "adapter", leaves, fan_in_fan_out=flag)
    check(tmp_path, base, changed)


@pytest.mark.parametrize("adapted", [(PROJ,), (PROJ, ATTN)])
@pytest.mark.parametrize("biases", [True, False])
def test_biases_and_shapes_come_before_the_model_type(tmp_path, rng, biases, adapted):
    """mlx-lm stores the weights of GPT-2 (out, in)."""
    tensors = {name: x.T.copy() for name, x in gpt2(rng, biases=biases).items()}
    base = write_base(tmp_path / "base", tensors, model_type="gpt2")
    is_known = biases or ATTN in adapted
    leaves, changed = adapt(rng, base, dict.fromkeys(adapted, not is_known))
    write_peft(tmp_path / "adapter", leaves)
    check(tmp_path, base, changed)


def test_weights_of_gpt2_that_are_stored_in_both_ways_are_refused(tmp_path, rng, capsys):
    tensors = gpt2(rng) | {"h.1.c_fc.weight": draw(rng, 16, 4), "h.1.c_fc.bias": draw(rng, 16)}
    base = write_base(tmp_path / "base", tensors, model_type="gpt2")
    write_peft(tmp_path / "adapter", adapt(rng, base, {PROJ: True})[0])
    error = refused(tmp_path, capsys)
    assert f"{PROJ}.weight is square" in error
    assert "give the model as its own library saves it" in error


@pytest.mark.parametrize("flag", [False, True])
def test_where_nothing_tells_the_flag_counts_for_modules_of_one_name_only(
    tmp_path, rng, capsys, flag
):
    """The advice is followed: the model's config.json tells."""
    base = write_base(tmp_path / "base", gpt2(rng, biases=False, wide=False))
    leaves, changed = adapt(rng, base, {PROJ: flag})
    write_peft(tmp_path / "adapter", leaves, fan_in_fan_out=flag)
    check(tmp_path, base, changed)
    for name in ("out", "adapter"):
        shutil.rmtree(tmp_path / name)
    leaves, changed = adapt(rng, base, {PROJ: True, LINEAR: False})
    write_peft(tmp_path / "adapter", leaves, fan_in_fan_out=True)
    error = refused(tmp_path, capsys)
    assert f"{PROJ}.weight is square, and fan_in_fan_out is that of the last" in error
    assert "put the model's config.json beside it" in error
    write_json(tmp_path / "base" / "config.json", {"model_type": "gpt2"})
    check(tmp_path, base, changed)


def test_without_a_flag_and_without_evidence_a_square_weight_is_that_of_a_linear(tmp_path, rng):
    base = write_base(tmp_path / "base", gpt2(rng, biases=False, wide=False))
    leaves, changed = adapt(rng, base, {PROJ: False, LINEAR: False})
    write_peft(tmp_path / "adapter", leaves)
    check(tmp_path, base, changed)


def test_neighbours_of_both_kinds_do_not_tell(tmp_path, rng, capsys):
    tensors = {"h.a.weight": draw(rng, 4, 12), "h.a.bias": draw(rng, 12)}
    tensors |= {"h.b.weight": draw(rng, 12, 4), "h.b.bias": draw(rng, 12)}
    tensors |= {"h.c.weight": draw(rng, 4, 4), "h.c.bias": draw(rng, 4)}
    write_base(tmp_path / "base", tensors)
    write_peft(tmp_path / "adapter", {"h.c": near(rng, tensors["h.c.weight"])})
    assert "h.c.weight is square" in refused(tmp_path, capsys)


def test_a_square_weight_without_a_bias_is_linear_where_each_conv1d_has_one(tmp_path, rng):
    base = {"h.a.weight": draw(rng, 4, 12), "h.a.bias": draw(rng, 12)}
    base |= {
        "h.b.weight": draw(rng, 12, 4),
        "h.b.bias": draw(rng, 12),
        "h.c.weight": draw(rng, 4, 4),
    }
    write_base(tmp_path / "base", base)
    leaves = near(rng, base["h.c.weight"])
    write_peft(tmp_path / "adapter", {"h.c": leaves})
    check(tmp_path, base, {"h.c.weight": dense(base["h.c.weight"], *leaves)})


def test_an_adapter_of_a_linear_and_a_conv1d_tells_by_their_shapes(tmp_path, rng):
    """Without biases, a neighbour whose shape tells counts."""
    tensors = {"h.0.a.weight": draw(rng, 4, 12), "h.0.b.weight": draw(rng, 4, 4)}
    tensors |= {"x.c.weight": draw(rng, 12, 4)}
    base = write_base(tmp_path / "base", tensors)
    leaves, changed = adapt(rng, base, {"h.0.a": True, "h.0.b": True, "x.c": False})
    write_peft(tmp_path / "adapter", leaves)
    check(tmp_path, base, changed)


def test_one_kind_alone_without_biases_does_not_tell(tmp_path, rng, capsys):
    tensors = {"h.0.a.weight": draw(rng, 4, 12), "h.0.b.weight": draw(rng, 4, 4)}
    base = write_base(tmp_path / "base", tensors)
    leaves, _ = adapt(rng, base, {"h.0.a": True, "h.0.b": True})
    write_peft(tmp_path / "adapter", leaves, fan_in_fan_out=True)
    assert "h.0.b.weight is square" in refused(tmp_path, capsys)


def test_a_square_weight_apart_from_all_others_is_stored_as_they_are(tmp_path, rng):
    base = {"a.b.weight": draw(rng, 4, 12), "a.b.bias": draw(rng, 12)}
    base |= {"c.d.weight": draw(rng, 4, 4), "c.d.bias": draw(rng, 4)}
    write_base(tmp_path / "base", base)
    leaves, changed = adapt(rng, base, {"c.d": True})
    write_peft(tmp_path / "adapter", leaves)
    check(tmp_path, base, changed)
