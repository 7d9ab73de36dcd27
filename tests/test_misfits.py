"""Files that fit a base in no way, or in two: right or refused, never wrong."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from checkpoints import (
    PREFIX,
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
from language_model import EMBED, HEAD, QUERY, query
from safetensors.numpy import load_file, save_file

from doraxp.checkpoint import load_adapters
from doraxp.cli import main


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def kohya(rng, names):
    """Return the tensors of adapters of weights by their flat names."""
    tensors = {}
    for name, weight in names.items():
        leaves = near(rng, weight)
        for end, leaf in zip(
            ("lora_down.weight", "lora_up.weight", "dora_scale"), leaves, strict=True
        ):
            tensors[f"{name}.{end}"] = leaf.reshape(-1, 1) if end == "dora_scale" else leaf
    return tensors


def write_kohya(folder, tensors):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "a.safetensors")
    return [str(folder / "base"), str(folder / "a.safetensors"), "--out", str(folder / "out")]


# Heads


@pytest.mark.parametrize(
    ("architecture", "family"),
    [("XForMaskedLM", "x"), ("XForCausalLM", "x"), ("XForMaskedLM", "deberta-v2")],
)
def test_a_tied_head_of_unknown_name_is_refused(tmp_path, rng, capsys, architecture, family):
    """DeBERTa's head, unless it is the old one, reads the embeddings and has no weight."""
    config = {"architectures": [architecture], "model_type": family, "legacy": False}
    base = {EMBED: draw(rng, 9, 5), QUERY: draw(rng, 6, 5)}
    write_base(tmp_path / "base", base, **config)
    leaves, _ = query(rng, base)
    write_peft(tmp_path / "adapter", leaves, {f"{PREFIX}{EMBED}": draw(rng, 9, 5)})
    assert "the name of the head in a model of this type is not known" in refused(tmp_path, capsys)


@pytest.mark.parametrize("is_written", [True, False])
def test_a_tied_head_without_the_embeddings_is_refused_until_the_base_has_both(
    tmp_path, rng, capsys, is_written
):
    """OpenAIGPTDoubleHeadsModel ties the embeddings to the head, and its file has the head."""
    config = {"model_type": "openai-gpt"} | ({"tie_word_embeddings": True} if is_written else {})
    base = {HEAD: draw(rng, 9, 5), QUERY: draw(rng, 6, 5)}
    write_base(tmp_path / "base", base, **config)
    leaves, changed = query(rng, base)
    changed[HEAD] = draw(rng, 9, 5)
    write_peft(tmp_path / "adapter", leaves, {f"{PREFIX}{HEAD}": changed[HEAD]})
    assert f"{HEAD} is the embeddings too, and BASE does not have them" in refused(tmp_path, capsys)
    shutil.rmtree(tmp_path / "base")
    base[EMBED] = base[HEAD]
    write_base(tmp_path / "base", base, **config | {"tie_word_embeddings": False})
    check(tmp_path, base, changed)


def test_the_flag_is_false_where_tied_tensors_are_both_in_the_file(tmp_path, rng):
    base = {name: draw(rng, 9, 5) for name in (EMBED, HEAD)} | {QUERY: draw(rng, 6, 5)}
    write_base(tmp_path / "base", base, tie_word_embeddings=True)
    leaves, changed = query(rng, base)
    changed[EMBED] = draw(rng, 9, 5)
    write_peft(tmp_path / "adapter", leaves, {f"{PREFIX}{EMBED}": changed[EMBED]})
    check(tmp_path, base, changed)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"tie_word_embeddings": False}


def test_without_a_configuration_changed_embeddings_are_warned_of(tmp_path, rng, capsys):
    base = {EMBED: draw(rng, 9, 5), QUERY: draw(rng, 6, 5)}
    save_file(base, tmp_path / "base")
    leaves, _ = query(rng, base)
    write_peft(tmp_path / "adapter", leaves, {f"{PREFIX}{EMBED}": draw(rng, 9, 5)})
    assert merge(tmp_path) == 0
    assert "if its head is tied to them, give the folder" in capsys.readouterr().err


def test_the_embeddings_are_not_advised_for_a_head(tmp_path, rng, capsys):
    base = {EMBED: draw(rng, 9, 5)}
    save_file(base, tmp_path / "base")
    write_peft(tmp_path / "adapter", {"lm_head": near(rng, base[EMBED])})
    error = refused(tmp_path, capsys)
    assert "if the embeddings are the head too, give the folder" in error
    assert "--rename" not in error


def test_new_embeddings_are_not_added_beside_those_of_another_name(tmp_path, rng, capsys):
    base = {"model.tokens.weight": draw(rng, 9, 5), QUERY: draw(rng, 6, 5)}
    write_base(tmp_path / "base", base)
    whole = {f"{PREFIX}{EMBED}": draw(rng, 9, 5)}
    write_peft(tmp_path / "adapter", query(rng, base)[0], whole, modules_to_save=["embed_tokens"])
    assert f"the base has no tensor {EMBED}" in refused(tmp_path, capsys)


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod."])
def test_a_wrapper_is_in_no_name_of_a_new_head(tmp_path, rng, wrapper):
    base = {QUERY: draw(rng, 6, 5)}
    write_base(tmp_path / "base", base, architectures=["LlamaModel"])
    leaves, changed = query(rng, base)
    changed["score.weight"] = draw(rng, 3, 5)
    own = {f"{wrapper}{path}": value for path, value in leaves.items()}
    name = f"{PREFIX}{wrapper}score.weight"
    write_peft(
        tmp_path / "adapter",
        own,
        {name: changed["score.weight"]},
        modules_to_save=["score"],
        task_type="SEQ_CLS",
    )
    check(tmp_path, base, changed)


def test_a_nested_head_of_a_state_dict_replaces_the_bases(tmp_path, rng):
    base = {QUERY: draw(rng, 6, 5)} | {f"head.{x}.weight": draw(rng, 5, 5) for x in ("a", "b")}
    write_base(tmp_path / "base", base)
    leaves, changed = query(rng, base)
    whole = {}
    for name in ("a", "b"):
        changed[f"head.{name}.weight"] = draw(rng, 5, 5)
        whole[f"{PREFIX}head.modules_to_save.default.{name}.weight"] = changed[
            f"head.{name}.weight"
        ]
        whole[f"{PREFIX}head.original_module.{name}.weight"] = base[f"head.{name}.weight"]
    write_peft(tmp_path / "adapter", leaves, whole, modules_to_save=["head"])
    check(tmp_path, base, changed)


def test_the_head_of_another_adapter_in_the_file_is_left_out(tmp_path, rng):
    base = {QUERY: draw(rng, 6, 5), "score.weight": draw(rng, 3, 5)}
    write_base(tmp_path / "base", base)
    (tmp_path / "adapter").mkdir()
    tensors, wanted = {}, {}
    for own in ("a", "b"):
        ((path, leaves),) = query(rng, base)[0].items()
        ends = (
            f"lora_A.{own}.weight",
            f"lora_B.{own}.weight",
            f"lora_magnitude_vector.{own}.weight",
        )
        tensors |= {f"{PREFIX}{path}.{end}": x for end, x in zip(ends, leaves, strict=True)}
        head = draw(rng, 3, 5)
        tensors[f"{PREFIX}score.modules_to_save.{own}.weight"] = head
        wanted[own] = {QUERY: dense(base[QUERY], *leaves), "score.weight": head}
    write_peft(tmp_path / "other", {})
    (tmp_path / "other" / "adapter_config.json").rename(
        tmp_path / "adapter" / "adapter_config.json"
    )
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    check(tmp_path, base, wanted["b"], "--adapter-name", "b")


@pytest.mark.parametrize("labels", [{"1": "b", "0": "a", "2": "c"}, {"x": "a"}, ["a"]])
def test_labels_are_in_the_order_of_their_numbers(tmp_path, rng, labels):
    base = {QUERY: draw(rng, 6, 5)}
    write_base(tmp_path / "base", base, architectures=["LlamaForCausalLM"])
    leaves, changed = query(rng, base)
    changed["score.weight"] = draw(rng, 3, 5)
    whole = {f"{PREFIX}score.weight": changed["score.weight"]}
    write_peft(tmp_path / "adapter", leaves, whole, modules_to_save=["score"], task_type="SEQ_CLS")
    write_json(tmp_path / "adapter" / "config.json", {"id2label": labels})
    check(tmp_path, base, changed)
    names = ["a", "b", "c"] if "0" in labels else [f"LABEL_{place}" for place in range(3)]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {str(place): name for place, name in enumerate(names)}


def test_a_norm_of_another_length_is_refused(tmp_path, rng, capsys):
    base = {QUERY: draw(rng, 6, 5), "norm.weight": draw(rng, 16)}
    write_base(tmp_path / "base", base)
    whole = {f"{PREFIX}norm.weight": draw(rng, 8)}
    write_peft(tmp_path / "adapter", query(rng, base)[0], whole, modules_to_save=["norm"])
    assert "(8,) does not fit norm.weight (16,)" in refused(tmp_path, capsys)


def test_single_rows_and_an_adapter_of_one_weight_are_refused(tmp_path, rng, capsys):
    base = {EMBED: draw(rng, 9, 5)}
    write_base(tmp_path / "base", base)
    a, b, m = near(rng, base[EMBED].T)
    ends = {"lora_embedding_A": a, "lora_embedding_B": b, "lora_magnitude_vector": m}
    whole = {f"{PREFIX}model.embed_tokens.{end}": x for end, x in ends.items()}
    whole[f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"] = draw(rng, 1, 5)
    write_peft(tmp_path / "adapter", {}, whole, trainable_token_indices=[2])
    assert "has an adapter, and single rows" in refused(tmp_path, capsys)


ROWS = f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"


def test_tokens_of_a_state_dict_have_the_name_of_their_adapter(tmp_path, rng):
    base = {EMBED: draw(rng, 9, 5), QUERY: draw(rng, 6, 5)}
    write_base(tmp_path / "base", base)
    tensors, wanted = {}, {}
    for own in ("a", "b"):
        leaves, wanted[own] = query(rng, base)
        write_peft(tmp_path / own, leaves, trainable_token_indices={"embed_tokens": [4, 2]})
        for name, value in load_file(tmp_path / own / "adapter_model.safetensors").items():
            tensors[re.sub(r"(lora_\w+)(\.weight)?$", rf"\1.{own}", name)] = value
        rows = tensors[f"{ROWS}.{own}"] = draw(rng, 2, 5)
        wanted[own][EMBED] = base[EMBED].copy()
        wanted[own][EMBED][[4, 2]] = rows
    tensors[f"{PREFIX}model.embed_tokens.token_adapter.base_layer.weight"] = base[EMBED]
    (tmp_path / "a").rename(tmp_path / "adapter")
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    check(tmp_path, base, wanted["b"], "--adapter-name", "b")


def test_tokens_of_two_adapters_beside_one_are_refused(tmp_path, rng, capsys):
    base = {EMBED: draw(rng, 9, 5), QUERY: draw(rng, 6, 5)}
    write_base(tmp_path / "base", base)
    whole = {f"{ROWS}.{name}": draw(rng, 1, 5) for name in "ab"}
    leaves, _ = query(rng, base)
    write_peft(tmp_path / "adapter", leaves, whole, trainable_token_indices=[2])
    error = refused(tmp_path, capsys)
    assert f"{ROWS}.a and {ROWS}.b are both for model.embed_tokens: remove" in error


def test_whole_tensors_may_be_found_by_dropped_names(tmp_path, rng):
    base = {"q.weight": draw(rng, 6, 5), "n.weight": draw(rng, 4)}
    write_base(tmp_path / "base", base)
    leaves, changed = query(rng, base, "q.weight")
    changed["n.weight"] = draw(rng, 4)
    whole = {f"{PREFIX}model.n.weight": changed["n.weight"]}
    write_peft(tmp_path / "adapter", leaves, whole)
    check(tmp_path, base, changed)


def test_without_a_configuration_the_error_says_which_files_need_one(tmp_path, rng, capsys):
    base = {QUERY: draw(rng, 6, 5)}
    write_base(tmp_path / "base", base)
    write_peft(tmp_path / "adapter", query(rng, base)[0])
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    assert "put the configuration of the training beside it" in refused(tmp_path, capsys)


# Image trainers


def test_two_factors_for_one_part_of_an_adapter_are_refused(tmp_path, rng, capsys):
    base = {"m.weight": draw(rng, 6, 5)}
    write_base(tmp_path / "base", base)
    tensors = kohya(rng, {"lora_unet_m": base["m.weight"]})
    tensors["lora_unet_m.lora_A.weight"] = tensors["lora_unet_m.lora_down.weight"]
    assert main(["merge", *write_kohya(tmp_path, tensors)]) == 2
    assert "are the same part of one adapter" in capsys.readouterr().err


def test_an_adapter_and_a_difference_of_one_module_are_refused(tmp_path, rng, capsys):
    base = {"m.weight": draw(rng, 6, 5)}
    write_base(tmp_path / "base", base)
    tensors = kohya(rng, {"lora_unet_m": base["m.weight"]}) | {"lora_unet_m.b_norm": draw(rng, 6)}
    assert main(["merge", *write_kohya(tmp_path, tensors)]) == 2
    assert (
        "lora_unet_m has lora_unet_m.lora_down.weight of LoRA and lora_unet_m.b_norm of norm"
        in capsys.readouterr().err
    )


def test_two_differences_for_one_norm_are_refused(tmp_path, rng, capsys):
    base = {"m.weight": draw(rng, 6, 5), "n.weight": draw(rng, 4)}
    write_base(tmp_path / "base", base)
    tensors = kohya(rng, {"lora_unet_m": base["m.weight"]})
    tensors |= {"lora_unet_n.w_norm": draw(rng, 4), "unet.n.w_norm": draw(rng, 4)}
    assert main(["merge", *write_kohya(tmp_path, tensors)]) == 2
    assert "are both for n.weight" in capsys.readouterr().err


def test_norms_of_a_part_that_the_base_lacks_are_left_out(tmp_path, rng):
    base = {"m.weight": draw(rng, 6, 5)}
    write_base(tmp_path / "base", base)
    tensors = kohya(rng, {"lora_te1_m": base["m.weight"]}) | {"lora_unet_n.w_norm": draw(rng, 4)}
    assert main(["merge", *write_kohya(tmp_path, tensors), "--verify"]) == 0


def test_two_text_encoders_for_one_are_refused(tmp_path, rng, capsys):
    base = {f"{name}.weight": draw(rng, 6, 5) for name in ("m", "n")}
    write_base(tmp_path / "base", base)
    tensors = kohya(rng, {"lora_te1_m": base["m.weight"], "lora_te2_n": base["n.weight"]})
    assert main(["merge", *write_kohya(tmp_path, tensors)]) == 2
    assert "of the adapter both fit the base" in capsys.readouterr().err


def pipeline(folder, rng, *parts):
    """Write a pipeline whose parts have one layer each; return the weights."""
    weights = {}
    for part in parts:
        (folder / "base" / part).mkdir(parents=True)
        weights[part] = draw(rng, 6, 5)
        save_file({"m.weight": weights[part]}, folder / "base" / part / "x.safetensors")
    write_json(folder / "base" / "model_index.json", {})
    return weights


def test_a_part_that_the_pipeline_has_is_never_left_out(tmp_path, rng, capsys):
    weights = pipeline(tmp_path, rng, "unet", "text_encoder")
    tensors = kohya(rng, {"lora_unet_z": weights["unet"], "lora_te_m": weights["text_encoder"]})
    assert main(["merge", *write_kohya(tmp_path, tensors)]) == 2
    assert "the base has no lora_unet_z.weight" in capsys.readouterr().err


def test_a_conversion_names_the_modules_that_it_leaves_out(tmp_path, rng, capsys):
    weights = pipeline(tmp_path, rng, "unet")
    tensors = kohya(rng, {"lora_unet_m": weights["unet"], "lora_te_m": draw(rng, 6, 5)})
    base, source, *_ = write_kohya(tmp_path, tensors)
    out = str(tmp_path / "converted")
    assert main(["convert", source, "--base", base, "--to", "peft", "--out", out]) == 0
    assert "SRC has 1 module for another part" in capsys.readouterr().err
    assert list(load_adapters(out)) == ["m"]


def test_only_diffusers_holds_adapters_of_several_parts(tmp_path, rng, capsys):
    weights = pipeline(tmp_path, rng, "unet", "text_encoder")
    tensors = kohya(rng, {"lora_unet_m": weights["unet"], "lora_te_m": weights["text_encoder"]})
    base, source, *_ = write_kohya(tmp_path, tensors)
    out = str(tmp_path / "converted")
    assert main(["convert", source, "--base", base, "--to", "peft", "--out", out]) == 2
    assert "has adapters for text_encoder, unet" in capsys.readouterr().err


def test_a_renamed_copy_writes_the_patterns_anew(tmp_path, rng):
    base = {"layers.0.q.weight": draw(rng, 6, 5), "layers.0.k.weight": draw(rng, 6, 5)}
    write_base(tmp_path / "base", base)
    leaves = {f"model.layers.0.{x}": near(rng, base[f"layers.0.{x}.weight"]) for x in "qk"}
    write_peft(tmp_path / "adapter", leaves, alpha_pattern={"model.layers.0.q": 7})
    source, out = str(tmp_path / "adapter"), str(tmp_path / "converted")
    command = ["convert", source, "--base", str(tmp_path / "base"), "--to", "peft", "--out", out]
    assert main([*command, "--rename", r"^model\.="]) == 0
    before, after = load_adapters(source), load_adapters(out)
    scalings = {path: layer.config.scaling for path, layer in after.items()}
    assert scalings == {p.removeprefix("model."): x.config.scaling for p, x in before.items()}


ON_DISK = {
    "language_model.model.layers.0.q.weight": (6, 5),
    "language_model.lm_head.weight": (9, 5),
}


def vision_language(folder, rng, **whole):
    """Write a model whose names on disk are not those in memory, and a PEFT adapter of it."""
    base = {name: draw(rng, *shape) for name, shape in ON_DISK.items()}
    write_base(folder / "base", base, model_type="llava", text_config={"model_type": "llama"})
    leaves = {"model.language_model.layers.0.q": near(rng, base[next(iter(base))])}
    pattern = {r"^model\.language_model\.layers\.0\.q": 7}
    saved = ["lm_head"] if whole else None
    write_peft(folder / "adapter", leaves, whole, alpha_pattern=pattern, modules_to_save=saved)


def convert(folder, to, *options):
    paths = ["--base", str(folder / "base"), "--out", str(folder / "converted")]
    return main(["convert", str(folder / "adapter"), "--to", to, *paths, *options])


def test_a_copy_keeps_the_names_that_modules_have_in_memory(tmp_path, rng):
    vision_language(tmp_path, rng, **{f"{PREFIX}lm_head.weight": draw(rng, 9, 5)})
    assert convert(tmp_path, "peft") == 0
    one, other = (
        load_file(tmp_path / name / "adapter_model.safetensors")
        for name in ("adapter", "converted")
    )
    assert one.keys() == other.keys()
    config = json.loads((tmp_path / "converted" / "adapter_config.json").read_text())
    assert config["alpha_pattern"] == {r"^model\.language_model\.layers\.0\.q": 7}
    assert config["modules_to_save"] == ["lm_head"]


def test_a_copy_is_compared_with_the_base(tmp_path, rng, capsys):
    vision_language(tmp_path, rng)
    write_base(tmp_path / "other", {QUERY: draw(rng, 7, 5)})
    shutil.rmtree(tmp_path / "base")
    (tmp_path / "other").rename(tmp_path / "base")
    assert convert(tmp_path, "peft") == 2
    assert "the base has no model.language_model.layers.0.q.weight" in capsys.readouterr().err


def test_a_renamed_copy_has_no_whole_tensors(tmp_path, rng, capsys):
    vision_language(tmp_path, rng, **{f"{PREFIX}lm_head.weight": draw(rng, 9, 5)})
    assert convert(tmp_path, "peft", "--rename", r"^model\.=") == 2
    error = capsys.readouterr().err
    assert "a PEFT file with new names of modules has no place for whole tensors" in error
    assert "also replaces lm_head.weight" in error


def test_mlx_has_no_module_for_a_tied_head(tmp_path, rng, capsys):
    """The advice works."""
    base = {EMBED: draw(rng, 9, 5), QUERY: draw(rng, 6, 5)}
    config = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    write_base(tmp_path / "base", base, **config)
    write_peft(tmp_path / "adapter", {"lm_head": near(rng, base[EMBED])})
    assert convert(tmp_path, "mlx") == 2
    error = capsys.readouterr().err
    assert "lm_head is tied to the embeddings in BASE, and mlx-lm has no module for it" in error
    assert merge(tmp_path) == 0


def test_wrappers_are_left_out_of_a_copy(tmp_path, rng):
    base = {QUERY: draw(rng, 6, 5), "module.k.weight": draw(rng, 6, 5)}
    write_base(tmp_path / "base", base)
    leaves = {
        "model._orig_mod.layers.0.module.self_attn.q_proj": near(rng, base[QUERY]),
        "module.k": near(rng, base["module.k.weight"]),
    }
    write_peft(tmp_path / "adapter", leaves)
    assert convert(tmp_path, "peft") == 0
    assert set(load_adapters(tmp_path / "converted")) == {QUERY.removesuffix(".weight"), "module.k"}


def test_a_file_of_another_format_has_no_names_for_peft_in_a_composed_model(tmp_path, rng, capsys):
    """The advice works."""
    vision_language(tmp_path, rng)
    assert convert(tmp_path, "mlx") == 0
    shutil.rmtree(tmp_path / "adapter")
    (tmp_path / "converted").rename(tmp_path / "adapter")
    assert convert(tmp_path, "peft") == 2
    error = capsys.readouterr().err
    assert "text_config in BASE" in error
    assert "merge it into its base instead" in error
    assert merge(tmp_path) == 0


def test_a_conversion_renames_only_with_a_base(tmp_path, rng, capsys):
    base = {QUERY: draw(rng, 6, 5)}
    write_peft(tmp_path / "adapter", query(rng, base)[0])
    command = ["convert", str(tmp_path / "adapter"), "--to", "peft", "--rename", "a=b"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 2
    assert "--rename finds modules in a model: give it, with --base" in capsys.readouterr().err


@pytest.mark.parametrize(
    "modules", [b'[{"path": "2_Dense"}]', b"[1]", b"[" * 100_000], ids=["listed", "odd", "deep"]
)
def test_a_large_module_that_sentence_transformers_lists_is_copied(tmp_path, rng, modules):
    base = {QUERY: draw(rng, 6, 5)}
    write_base(tmp_path / "base", base)
    (tmp_path / "base" / "2_Dense").mkdir()
    dense_layer = {"linear.weight": draw(rng, 50, 50)}
    save_file(dense_layer, tmp_path / "base" / "2_Dense" / "model.safetensors")
    (tmp_path / "base" / "modules.json").write_bytes(modules)
    write_peft(tmp_path / "adapter", query(rng, base)[0])
    assert merge(tmp_path) == 0
    copied = tmp_path / "out" / "2_Dense" / "model.safetensors"
    assert copied.exists() == (b"2_Dense" in modules)
    if copied.exists():
        np.testing.assert_array_equal(
            load_file(copied)["linear.weight"], dense_layer["linear.weight"]
        )


def test_the_sum_of_a_norm_is_rounded_once(tmp_path, rng):
    base = {"m.weight": draw(rng, 6, 5), "n.weight": draw(rng, 40, dtype="float16")}
    write_base(tmp_path / "base", base)
    tensors = kohya(rng, {"lora_unet_m": base["m.weight"]}) | {"lora_unet_n.w_norm": draw(rng, 40)}
    arguments = write_kohya(tmp_path, tensors)
    assert main(["merge", *arguments, "--dtype", "float32", "--verify"]) == 0
    total = base["n.weight"].astype(float) + tensors["lora_unet_n.w_norm"]
    result = read_folder(tmp_path / "out")["n.weight"]
    np.testing.assert_array_equal(result, total.astype("float32"))


def test_an_adapter_of_another_width_is_not_a_part_of_the_fused_weight(tmp_path, rng, capsys):
    name = "model.layers.0.mlp.gate_up_proj.weight"
    base = {name: draw(rng, 8, 5)}
    write_base(tmp_path / "base", base)
    write_peft(tmp_path / "adapter", {name.removesuffix(".weight"): near(rng, base[name][:4])})
    assert "has shape (8, 5), but its adapter is for (4, 5)" in refused(tmp_path, capsys)


def test_two_leading_names_that_fit_are_refused_whatever_else_the_base_has(tmp_path, rng, capsys):
    base = {f"{lead}.x.q.weight": draw(rng, 6, 5) for lead in ("a", "d")}
    base |= {f"{lead}.{place}.weight": draw(rng, 2, 2) for lead in "bce" for place in range(3)}
    write_base(tmp_path / "base", base)
    write_peft(tmp_path / "adapter", {"x.q": near(rng, base["a.x.q.weight"])})
    error = refused(tmp_path, capsys)
    assert "x.q.weight may be a.x.q.weight or d.x.q.weight in the base" in error
