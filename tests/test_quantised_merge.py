"""Merges into quantised models: dense tensors, tensors that are quantised again, and copies."""

from __future__ import annotations

import json
import re
import shutil

import ml_dtypes
import numpy as np
import pytest
import quantised_bases
from checkpoints import (
    ALPHA,
    PREFIX,
    RANK,
    audit,
    dense,
    draw,
    merge,
    near,
    peft_config,
    refused,
    write_peft,
)
from quantised_bases import BFLOAT16, CONFIGS, MATRICES, write

from doraxp import Adapter, Config, backward, forward
from doraxp.checkpoint import (
    CheckpointError,
    Options,
    _model,
    _run,
    load_quantised,
    open_model,
    plan_merge,
    run_merge,
)
from doraxp.checkpoint._quantised.declared import declared, undeclared
from doraxp.checkpoint._quantised.fp8 import Fp8Quantiser
from doraxp.checkpoint._requantise import Piece, _whole_groups
from doraxp.checkpoint._rows import Block
from doraxp.checkpoint._safetensors import Reader, are_equal
from doraxp.checkpoint._survival import Survival
from doraxp.cli import main

FORMATS = list(MATRICES)
OUT, IN = 48, 64
ADAPTED = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj")
LEFT = ("model.layers.0.self_attn.k_proj",)
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def base(rng, format, folder=None, shard_of=None, out=OUT, **config):
    """A model with three quantised weights; returns its tensors on disk and its weights."""
    tensors, weights = {}, {}
    for module in (*ADAPTED, *LEFT):
        own, weights[module] = MATRICES[format](rng, f"{module}.weight", out, IN)
        tensors |= own
    tensors |= {
        HEAD: draw(rng, 10, IN, dtype=ml_dtypes.bfloat16),
        EMBEDDING: draw(rng, 10, IN, dtype=ml_dtypes.bfloat16),
        "model.norm.weight": draw(rng, IN, dtype=ml_dtypes.bfloat16),
    }
    if folder is not None:
        write(folder, tensors, shard_of, **{**CONFIGS[format], **config})
    return tensors, weights


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def adapter(rng, folder, weights, modules=ADAPTED, **changes):
    leaves = {module: near(rng, weights[module]) for module in modules}
    write_peft(folder, leaves, **changes)
    return leaves


def raw(folder):
    """Return the bytes of all tensors in a folder, with their dtypes and shapes."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        reader = Reader(file)
        for name, entry in reader.tensors.items():
            octets = b"".join(bytes(chunk) for chunk in reader.chunks(name))
            found[name] = (entry.dtype, entry.shape, octets)
    return found


def dequantised(folder):
    """Return all weights of a model in float64, as its own formats have them."""
    sources = open_model(folder).sources()
    return {name: source.read().astype(np.float64) for name, source in sources.items()}


@pytest.mark.parametrize("format", FORMATS)
def test_adapted_tensors_become_dense_and_all_others_are_copied(tmp_path, rng, format):
    _, weights = base(rng, format, tmp_path / "base")
    leaves = adapter(rng, tmp_path / "adapter", weights)
    assert merge(tmp_path, "--verify") == 0
    before, after = raw(tmp_path / "base"), raw(tmp_path / "out")
    own = {name for name in before if name.startswith(ADAPTED)}
    assert after.keys() == before.keys() - own | {f"{module}.weight" for module in ADAPTED}
    assert all(after[name] == before[name] for name in before if name not in own)
    for module, (a, b, m) in leaves.items():
        dtype, shape, octets = after[f"{module}.weight"]
        assert (dtype, shape) == ("BF16", (OUT, IN))
        merged = np.frombuffer(octets, ml_dtypes.bfloat16).reshape(shape).astype(np.float64)
        np.testing.assert_allclose(merged, dense(weights[module], a, b, m), rtol=2.0**-8)
    assert audit(tmp_path) == 0


@pytest.mark.parametrize("format", FORMATS)
def test_the_dense_modules_are_named_in_the_words_of_the_format(tmp_path, rng, format):
    _, weights = base(rng, format, tmp_path / "base")
    adapter(rng, tmp_path / "adapter", weights)
    assert merge(tmp_path) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    named = {*ADAPTED, "lm_head"}
    if format == "mlx":
        for key in ("quantization", "quantization_config"):
            assert config[key] == CONFIGS["mlx"][key] | dict.fromkeys(ADAPTED, False)
        return
    key = {"fp8": "modules_to_not_convert", "int4": "ignore"}.get(format, "llm_int8_skip_modules")
    assert set(config["quantization_config"].pop(key)) == named
    before = CONFIGS[format]["quantization_config"]
    assert config["quantization_config"] == {k: v for k, v in before.items() if k != key}


@pytest.mark.parametrize("format", FORMATS)
def test_the_same_targets_have_the_same_tensors(tmp_path, rng, format):
    _, weights = base(rng, format, tmp_path / "base")
    leaves = adapter(rng, tmp_path / "adapter", weights)
    assert merge(tmp_path, "--targets", "same", "--verify", "--json", str(tmp_path / "a.json")) == 0
    before, after = raw(tmp_path / "base"), raw(tmp_path / "out")
    assert list(after) == list(before)
    assert all(after[name][:2] == before[name][:2] for name in before)
    assert {name for name in before if before[name] != after[name]} <= {
        name for name in before if name.startswith(ADAPTED)
    }
    figures = json.loads((tmp_path / "a.json").read_text())["changed"]
    stored = dequantised(tmp_path / "out")
    for module, (a, b, m) in leaves.items():
        name = f"{module}.weight"
        exact, w = dense(weights[module], a, b, m), weights[module]
        error = np.linalg.norm(stored[name] - exact) / np.linalg.norm(exact)
        assert error < {"fp8": 0.04, "int8": 0.01}.get(format, 0.15)
        update, change = exact - w, stored[name] - w
        cosine = np.vdot(update, change) / np.linalg.norm(update) / np.linalg.norm(change)
        assert figures[name]["cosine"] == pytest.approx(cosine, abs=1e-3)
        assert figures[name]["kept"] == pytest.approx(
            np.vdot(update, change) / np.vdot(update, update), abs=2e-3
        )
    config = [(tmp_path / part / "config.json").read_text() for part in ("base", "out")]
    assert json.loads(config[0]) == json.loads(config[1])
    assert audit(tmp_path) == 0


@pytest.mark.parametrize("format", ["fp8", "nf4", "int4"])
@pytest.mark.parametrize("targets", ["bf16", "same"])
def test_scales_may_be_in_another_shard(tmp_path, rng, format, targets):
    def shard_of(name):
        is_scale = name.endswith(("scale_inv", "absmax", "weight_scale"))
        return f"model-{1 + is_scale}.safetensors"

    _, weights = base(rng, format, tmp_path / "base", shard_of)
    adapter(rng, tmp_path / "adapter", weights)
    assert merge(tmp_path, "--targets", targets, "--verify") == 0
    (tmp_path / "apart").mkdir()
    (tmp_path / "base").rename(tmp_path / "apart" / "base")
    write(tmp_path / "base", base(np.random.default_rng(7), format)[0], **CONFIGS[format])
    (tmp_path / "out").rename(tmp_path / "apart" / "out")
    assert merge(tmp_path, "--targets", targets) == 0
    assert raw(tmp_path / "apart" / "out") == raw(tmp_path / "out")


@pytest.mark.parametrize("targets", ["bf16", "same"])
@pytest.mark.parametrize("format", FORMATS)
def test_each_tensor_begins_at_a_multiple_of_its_size(tmp_path, rng, format, targets):
    tensors, weights = base(rng, format, out=OUT + 1 if format == "int8" else OUT)
    odd = {"model.mask": np.zeros(3, np.uint8)}  # before the codes in the file of BASE
    write(tmp_path / "base", odd | tensors, **CONFIGS[format])
    adapter(rng, tmp_path / "adapter", weights)
    assert merge(tmp_path, "--targets", targets) == 0
    sizes = {"F32": 4, "I32": 4, "U32": 4, "BF16": 2, "I64": 8}
    reader = Reader(tmp_path / "out" / "model.safetensors")
    for name, entry in reader.tensors.items():
        assert reader._starts[name] % sizes.get(entry.dtype, 1) == 0


def test_dtype_does_not_touch_scales(tmp_path, rng):
    _, weights = base(rng, "nf4", tmp_path / "base")
    adapter(rng, tmp_path / "adapter", weights)
    assert merge(tmp_path, "--dtype", "float32", "--verify") == 0
    before, after = raw(tmp_path / "base"), raw(tmp_path / "out")
    assert all(after[name] == before[name] for name in before if name.startswith(LEFT))
    assert {after[f"{module}.weight"][0] for module in ADAPTED} == {"F32"}
    assert after[HEAD][0] == "F32"


def test_an_adapter_beside_quantised_weights_leaves_them_and_the_configuration(tmp_path, rng):
    tensors, _ = base(rng, "int4", tmp_path / "base")
    write_peft(tmp_path / "adapter", {"lm_head": near(rng, tensors[HEAD])})
    assert merge(tmp_path, "--verify") == 0
    before, after = raw(tmp_path / "base"), raw(tmp_path / "out")
    assert {name for name in before if after[name] != before[name]} == {HEAD}
    texts = [(tmp_path / part / "config.json").read_text() for part in ("base", "out")]
    assert texts[0] == texts[1]


def test_a_small_update_is_reported_as_lost(tmp_path, rng, capsys):
    _, weights = base(rng, "int4", tmp_path / "base")
    leaves = {}
    for module in ADAPTED:
        a, b, _ = near(rng, weights[module])
        leaves[module] = a, 1e-3 * b, np.linalg.norm(weights[module], axis=1).astype("f4")
    write_peft(tmp_path / "adapter", leaves)
    assert merge(tmp_path, "--targets", "same") == 0
    error = capsys.readouterr().err
    assert "quantising again lost part of the update in 2 of 2 tensors" in error
    assert "--targets bf16 keeps them dense" in error
    assert "rounding lost" not in error
    assert audit(tmp_path) == 1
    assert "lost in quantising" in capsys.readouterr().out


def test_a_sum_and_a_whole_tensor_are_quantised_again(tmp_path, rng):
    _, weights = base(rng, "fp8", tmp_path / "base")
    first, second = (adapter(rng, tmp_path / name, weights) for name in ("adapter", "other"))
    whole = {f"base_model.model.{LEFT[0]}.weight": draw(rng, OUT, IN)}
    shutil.rmtree(tmp_path / "other")
    write_peft(tmp_path / "other", second, whole, modules_to_save=["k_proj"])
    adapters = [f"--adapter={tmp_path / name}" for name in ("adapter", "other:0.5")]
    out = str(tmp_path / "out")
    arguments = [*adapters, "--out", out, "--targets", "same", "--verify"]
    assert main(["merge", str(tmp_path / "base"), *arguments]) == 0
    stored = dequantised(tmp_path / "out")
    w = {module: weights[module] for module in (*ADAPTED, *LEFT)}
    for module in ADAPTED:
        desired = dense(w[module], *first[module])
        desired += 0.5 * (dense(w[module], *second[module]) - w[module])
        error = np.linalg.norm(stored[f"{module}.weight"] - desired) / np.linalg.norm(desired)
        assert error < 0.04
    new = w[LEFT[0]] + 0.5 * (whole[f"base_model.model.{LEFT[0]}.weight"] - w[LEFT[0]])
    assert np.linalg.norm(stored[f"{LEFT[0]}.weight"] - new) < 0.04 * np.linalg.norm(new)


@pytest.mark.parametrize("targets", ["bf16", "same"])
def test_the_rows_of_one_module_in_a_fused_tensor(tmp_path, rng, targets):
    """A block of scales may have rows of two modules."""
    name = "encoder.layer.0.attention.qkv_proj.weight"
    tensors, weight = quantised_bases.fp8(rng, name, 24 + 12 + 12, 64)
    write(tmp_path / "base", tensors, **CONFIGS["fp8"])
    parts = {"q_proj": slice(0, 24), "v_proj": slice(36, 48)}
    leaves = {f"layers.0.self_attn.{part}": near(rng, weight[rows]) for part, rows in parts.items()}
    write_peft(tmp_path / "adapter", leaves)
    figures = tmp_path / "figures.json"
    assert merge(tmp_path, "--targets", targets, "--verify", "--json", str(figures)) == 0
    desired = weight.copy()
    for part, rows in parts.items():
        desired[rows] = dense(weight[rows], *leaves[f"layers.0.self_attn.{part}"])
    stored = dequantised(tmp_path / "out")[name]
    changed = json.loads(figures.read_text())["changed"]
    for part, rows in parts.items():
        update, change = desired[rows] - weight[rows], stored[rows] - weight[rows]
        kept = np.vdot(update, change) / np.vdot(update, update)
        own = changed[f"{name} (layers.0.self_attn.{part})"]
        assert own["kept"] == pytest.approx(kept, abs=2e-3)
    error = np.linalg.norm(stored - desired, axis=1) / np.linalg.norm(desired, axis=1)
    assert error.max() < (2.0**-8 if targets == "bf16" else 0.05)
    assert audit(tmp_path) == 0


def test_a_merge_that_was_interrupted_goes_on(tmp_path, rng, monkeypatch):
    _, weights = base(rng, "fp8", tmp_path / "base", lambda name: f"{name[14:16]}.safetensors")
    adapter(rng, tmp_path / "adapter", weights)
    options = Options(targets="same")
    run_merge(plan_merge(tmp_path / "base", tmp_path / "adapter", options), tmp_path / "whole")
    done = []

    def stop(count):
        done.append(count)
        if len(done) == 9:
            raise KeyboardInterrupt

    merging = plan_merge(tmp_path / "base", tmp_path / "adapter", options)
    with pytest.raises(KeyboardInterrupt):
        run_merge(merging, tmp_path / "out", on_bytes=stop)
    run_merge(merging, tmp_path / "out")
    assert raw(tmp_path / "out") == raw(tmp_path / "whole")


def test_inspect_and_the_plan_tell_how_a_weight_is_quantised(tmp_path, rng, capsys):
    _, weights = base(rng, "nf4", tmp_path / "base")
    adapter(rng, tmp_path / "adapter", weights)
    assert merge(tmp_path, "--dry-run") == 0
    text = capsys.readouterr().out
    assert "nf4" in text
    assert "Quantised in BASE: 1 copied as they are, 2 dense in OUT" in text
    assert merge(tmp_path, "--dry-run", "--targets", "same") == 0
    assert "2 quantised again" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "adapter"), "--base", str(tmp_path / "base")]) == 0
    assert "nf4" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_hint_about_an_adapter_of_a_quantised_copy(tmp_path, rng, capsys):
    w = draw(rng, OUT, IN)
    write(tmp_path / "base", {"q.weight": w})
    name = "unsloth/tiny-bnb-4bit"
    write_peft(tmp_path / "adapter", {"q": near(rng, w)}, base_model_name_or_path=name)
    assert merge(tmp_path) == 0
    assert f"ADAPTER was trained on {name}" in capsys.readouterr().err


# Refusals


def without_scales(tensors):
    del tensors[f"{ADAPTED[0]}.weight_scale_inv"]


def other_scales(tensors):
    name = f"{ADAPTED[0]}.weight_scale_inv"
    tensors[name] = tensors[name][:-1]


@pytest.mark.parametrize("damage", [without_scales, other_scales])
def test_a_damaged_weight_is_refused_by_its_name(tmp_path, rng, capsys, damage):
    tensors, weights = base(rng, "fp8")
    damage(tensors)
    write(tmp_path / "base", tensors, **CONFIGS["fp8"])
    adapter(rng, tmp_path / "adapter", weights)
    assert f"{ADAPTED[0]}.weight is quantised" in refused(tmp_path, capsys)


@pytest.mark.parametrize("damage", [without_scales, other_scales])
def test_a_damaged_weight_that_no_adapter_is_for_is_copied(tmp_path, rng, damage):
    tensors, weights = base(rng, "fp8")
    damage(tensors)
    write(tmp_path / "base", tensors, **CONFIGS["fp8"])
    adapter(rng, tmp_path / "adapter", weights, modules=ADAPTED[1:])
    assert merge(tmp_path, "--verify") == 0
    before, after = raw(tmp_path / "base"), raw(tmp_path / "out")
    assert all(after[name] == before[name] for name in before if name.startswith(ADAPTED[0]))


# Experts


def experts(rng, folder, format="fp8"):
    tensors, weights = {}, {}
    for layer in range(2):
        for expert in range(3):
            for part in ("gate_proj", "up_proj", "down_proj"):
                module = f"model.layers.{layer}.mlp.experts.{expert}.{part}"
                own, weights[module] = MATRICES[format](rng, f"{module}.weight", 32, 32)
                tensors |= own
    write(folder, tensors, model_type="qwen3_moe", **CONFIGS[format])
    return weights


def test_all_experts_of_a_layer_are_dense_if_one_is(tmp_path, rng):
    weights = experts(rng, tmp_path / "base")
    module = "model.layers.0.mlp.experts.1.up_proj"
    leaves = adapter(rng, tmp_path / "adapter", weights, modules=[module])
    assert merge(tmp_path, "--verify") == 0
    entries = Reader(tmp_path / "out" / "model.safetensors").tensors
    dtypes = {name: entry.dtype for name, entry in entries.items() if name.endswith(".weight")}
    assert {dtypes[n] for n in dtypes if n.startswith("model.layers.0")} == {"BF16"}
    assert {dtypes[n] for n in dtypes if n.startswith("model.layers.1")} == {"F8_E4M3"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    names = config["quantization_config"]["modules_to_not_convert"]
    assert names == ["lm_head", "model.layers.0.mlp.experts"]
    stored = dequantised(tmp_path / "out")
    for name, weight in weights.items():
        desired = dense(weight, *leaves[name]) if name == module else weight
        np.testing.assert_allclose(stored[f"{name}.weight"], desired, rtol=2.0**-8)
    assert audit(tmp_path) == 0


def test_dense_experts_that_transformers_cannot_load_are_warned_of(tmp_path, rng, capsys):
    weights = experts(rng, tmp_path / "base", "int4")
    module = "model.layers.0.mlp.experts.1.up_proj"
    adapter(rng, tmp_path / "adapter", weights, modules=[module])
    warning = "model.layers.0.mlp.experts are dense in OUT, and transformers loads no dense experts"
    assert merge(tmp_path, "--dry-run") == 0
    assert warning in capsys.readouterr().err
    assert merge(tmp_path, "--dry-run", "--targets", "same") == 0
    assert warning not in capsys.readouterr().err


# config.json


@pytest.mark.parametrize("method", ["bitsandbytes", "compressed-tensors", "fp8"])
@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("language_model.model.layers.0.q_proj", "model.language_model.layers.0.q_proj"),
        ("language_model.lm_head", "lm_head"),
        ("model.layers.0.q_proj", "model.language_model.layers.0.q_proj"),
        ("model.visual.q_proj", "model.visual.q_proj"),
        ("vision_tower.q_proj", "model.vision_tower.q_proj"),
    ],
)
def test_a_model_of_several_has_other_names_in_memory(method, name, other):
    config = {"text_config": {}, "quantization_config": {"quant_method": method}}
    (names,) = (
        value
        for key, value in declared(config, [name])["quantization_config"].items()
        if key != "quant_method"
    )
    assert set(names) == {"lm_head", name, other}


@pytest.mark.parametrize(
    ("words", "left"),
    [
        (None, ["a.q_proj", "a.b.gate"]),  # a library leaves the head dense by itself
        ([], ["a.q_proj", "a.b.gate", "lm_head"]),
        (["lm_head", "q_proj", "a.b"], []),  # the end of a name, and a module around it
        (["lm_head", "proj", "a"], []),
        (["lm_head", "b.gat", "a.q"], ["a.q_proj", "a.b.gate"]),
    ],
)
def test_the_modules_that_a_configuration_must_name(words, left):
    entries = {"quant_method": "fp8"} | ({} if words is None else {"modules_to_not_convert": words})
    modules = ["a.q_proj", "a.b.gate", "lm_head"]
    assert undeclared({"quantization_config": entries}, modules) == left


def test_compressed_tensors_compares_full_names():
    entries = {"quant_method": "compressed-tensors", "ignore": ["lm_head", "layers.0.gate"]}
    modules = ["model.layers.0.gate", "lm_head", "model.lm_head"]
    left = undeclared({"quantization_config": entries}, modules)
    assert left == ["model.layers.0.gate", "model.lm_head"]


def test_words_that_are_there_stay():
    config = {"quantization_config": {"quant_method": "fp8", "modules_to_not_convert": ["lm_head"]}}
    names = declared(config, ["a", "lm_head"])["quantization_config"]["modules_to_not_convert"]
    assert names == ["lm_head", "a"]


def test_experts_of_compressed_tensors_are_named_one_by_one():
    config = {"quantization_config": {"quant_method": "compressed-tensors"}}
    names = declared(config, ["layers.0.mlp.experts"])["quantization_config"]["ignore"]
    assert names == ["lm_head", "layers.0.mlp.experts", r"re:layers\.0\.mlp\.experts[.].*"]
    assert re.match(names[2].removeprefix("re:"), "layers.0.mlp.experts.12.up_proj")


def test_the_configuration_of_the_language_model_may_have_the_words():
    part = {"quantization_config": {"quant_method": "fp8"}}
    edited = declared({"text_config": part}, ["a"])["text_config"]["quantization_config"]
    assert edited["modules_to_not_convert"] == ["lm_head", "a", "model.a"]


@pytest.mark.parametrize("targets", ["bf16", "same"])
def test_a_dense_module_that_the_base_does_not_declare_is_named(tmp_path, rng, targets):
    tensors, weights = base(rng, "nf4")
    tensors["model.layers.0.mlp.gate.weight"] = draw(rng, 4, IN, dtype=BFLOAT16)
    write(tmp_path / "base", tensors, **CONFIGS["nf4"])
    adapter(rng, tmp_path / "adapter", weights)
    assert merge(tmp_path, "--targets", targets) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    names = config["quantization_config"]["llm_int8_skip_modules"]
    made = ADAPTED if targets == "bf16" else ()
    assert set(names) == {"lm_head", "model.layers.0.mlp.gate", *made}


def test_the_words_of_an_unknown_method_stay():
    config = {"quantization_config": {"quant_method": "new"}}
    assert declared(config, ["a"]) == config


# The verification


@pytest.mark.parametrize("spoil", [lambda weight: weight[::-1], lambda weight: 1.4 * weight])
def test_verify_finds_wrong_codes(tmp_path, rng, capsys, monkeypatch, spoil):
    _, weights = base(rng, "fp8", tmp_path / "base")
    adapter(rng, tmp_path / "adapter", weights)
    right = Fp8Quantiser.quantise

    def wrong(self, rows, weight):
        return right(self, rows, spoil(weight))

    monkeypatch.setattr(Fp8Quantiser, "quantise", wrong)
    error = refused(tmp_path, capsys, "--targets", "same", "--verify")
    assert "is not the result of a dense merge" in error


def test_verify_finds_wrong_codes_of_rows_without_an_adapter(tmp_path, rng, capsys, monkeypatch):
    name = "encoder.layer.0.attention.qkv_proj.weight"
    tensors, weight = quantised_bases.fp8(rng, name, 48, 64)
    write(tmp_path / "base", tensors, **CONFIGS["fp8"])
    parts = {"q_proj": slice(0, 24), "v_proj": slice(36, 48)}
    leaves = {f"layers.0.self_attn.{one}": near(rng, weight[rows]) for one, rows in parts.items()}
    write_peft(tmp_path / "adapter", leaves)
    right = Fp8Quantiser.quantise

    def wrong(self, rows, weight):
        spoilt = weight.copy()
        spoilt[25 - rows.start if rows.start <= 25 < rows.stop else 0] *= -1
        return right(self, rows, spoilt if rows.start <= 25 < rows.stop else weight)

    monkeypatch.setattr(Fp8Quantiser, "quantise", wrong)
    error = refused(tmp_path, capsys, "--targets", "same", "--verify")
    assert f"{name} is not a copy of {name}" in error


# The audit


def spoilt(folder, name, change):
    """Copy OUT, with other values of a weight's scales."""
    reader = Reader(folder / "out" / "model.safetensors")
    tensors = {}
    for tensor, entry in reader.tensors.items():
        array = reader.read(tensor)
        if entry.dtype == "F8_E4M3":
            array = array.view(ml_dtypes.float8_e4m3fn)
        tensors[tensor] = change(array) if tensor == name else array
    quantised_bases.save(folder / "out" / "model.safetensors", tensors)


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        (lambda scales: scales * np.float32(1.5), "another weight"),
        (lambda scales: scales * np.float32(np.nan), "NaN or infinity"),
    ],
)
def test_the_audit_finds_wrong_scales(tmp_path, rng, capsys, change, verdict):
    _, weights = base(rng, "fp8", tmp_path / "base")
    adapter(rng, tmp_path / "adapter", weights)
    assert merge(tmp_path, "--targets", "same") == 0
    spoilt(tmp_path, f"{ADAPTED[0]}.weight_scale_inv", change)
    capsys.readouterr()
    assert audit(tmp_path) == 1
    assert verdict in capsys.readouterr().out


def test_the_audit_tells_an_unchanged_base(tmp_path, rng, capsys):
    _, weights = base(rng, "nf4", tmp_path / "base")
    adapter(rng, tmp_path / "adapter", weights)
    shutil.copytree(tmp_path / "base", tmp_path / "out")
    assert audit(tmp_path) == 1
    assert "unchanged" in capsys.readouterr().out


def test_the_audit_of_a_dense_base_whose_merge_was_quantised(tmp_path, rng, capsys):
    """Somebody merged into the 16-bit model, and quantised the result."""
    _, weights = base(rng, "fp8", tmp_path / "base")
    adapter(rng, tmp_path / "adapter", weights)
    assert merge(tmp_path, "--targets", "same") == 0
    (tmp_path / "base").rename(tmp_path / "packed")
    dense_base = {
        name: array.astype(ml_dtypes.bfloat16)
        for name, array in dequantised(tmp_path / "packed").items()
    }
    write(tmp_path / "base", dense_base)
    assert audit(tmp_path) == 0
    assert "quantised" in capsys.readouterr().out


# The stacks of gpt-oss

EXPERTS, HIDDEN, WIDE = 3, 96, 64
STACK = "model.layers.0.mlp.experts"


def gpt_oss(rng, folder):
    """A layer with experts in MXFP4 and a query in bfloat16, and PEFT's adapter of both."""
    up, w = quantised_bases.mxfp4(rng, f"{STACK}.gate_up_proj", EXPERTS, HIDDEN, WIDE)
    down, _ = quantised_bases.mxfp4(rng, f"{STACK}.down_proj", EXPERTS, WIDE // 2, HIDDEN)
    query = {"model.layers.0.self_attn.q_proj.weight": draw(rng, 8, HIDDEN, dtype=BFLOAT16)}
    write(folder / "base", up | down | query, **CONFIGS["mxfp4"])
    a, b = (0.2 * draw(rng, EXPERTS, *sides) for sides in ((2, HIDDEN), (WIDE, 2)))
    q = {"lora_A.weight": draw(rng, 2, HIDDEN), "lora_B.weight": draw(rng, 8, 2)}
    (folder / "adapter").mkdir(parents=True)
    tensors = {
        f"{PREFIX}{STACK}.lora_A.weight": a.reshape(-1, HIDDEN),
        f"{PREFIX}{STACK}.lora_B.weight": b.transpose(1, 2, 0).reshape(WIDE, -1),
    } | {f"{PREFIX}model.layers.0.self_attn.q_proj.{name}": one for name, one in q.items()}
    quantised_bases.save(folder / "adapter" / "adapter_model.safetensors", tensors)
    config = peft_config(
        use_dora=False, target_parameters=["mlp.experts.gate_up_proj"], target_modules=["q_proj"]
    )
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return w + ALPHA / RANK * (b @ a).swapaxes(1, 2).astype(np.float64)


@pytest.mark.parametrize("targets", ["bf16", "same"])
def test_experts_in_blocks_are_merged_into(tmp_path, rng, targets):
    exact = gpt_oss(rng, tmp_path)
    assert merge(tmp_path, "--targets", targets, "--verify") == 0
    before, after = raw(tmp_path / "base"), raw(tmp_path / "out")
    stored = dequantised(tmp_path / "out")[f"{STACK}.gate_up_proj"]
    error = np.linalg.norm(stored - exact) / np.linalg.norm(exact)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    if targets == "bf16":
        assert error < 2.0**-8
        assert {after[f"{STACK}.{one}"][:2] for one in ("gate_up_proj", "down_proj")} == {
            ("BF16", (EXPERTS, HIDDEN, WIDE)), ("BF16", (EXPERTS, WIDE // 2, HIDDEN))
        }  # fmt: skip
        assert STACK in config["quantization_config"]["modules_to_not_convert"]
    else:
        assert error < 0.12
        assert list(after) == list(before)
        assert all(after[name][:2] == before[name][:2] for name in before)
        assert config == json.loads((tmp_path / "base" / "config.json").read_text())
        own = [name for name in before if "down_proj" in name]
        assert all(after[name] == before[name] for name in own)
    assert audit(tmp_path) == 0


def test_an_adapter_of_the_attention_beside_experts_in_blocks(tmp_path, rng):
    gpt_oss(rng, tmp_path)
    shutil.rmtree(tmp_path / "adapter")
    name = "model.layers.0.self_attn.q_proj"
    w = dequantised(tmp_path / "base")[f"{name}.weight"]
    write_peft(tmp_path / "adapter", {name: near(rng, w)})
    assert merge(tmp_path, "--verify") == 0
    before, after = raw(tmp_path / "base"), raw(tmp_path / "out")
    assert {one for one in before if before[one] != after[one]} == {f"{name}.weight"}


# Weights in memory


@pytest.mark.parametrize("format", FORMATS)
def test_a_weight_in_memory_has_the_numbers_of_the_file(tmp_path, rng, format):
    _, weights = base(rng, format, tmp_path / "base")
    for module, w in weights.items():
        found = load_quantised(tmp_path / "base", f"{module}.weight")
        assert (found.shape, found.dtype) == (w.shape, np.float32)
        # The oracle rounds to bfloat16, of mlx the product too.
        np.testing.assert_allclose(found.rows(slice(0, OUT)), w, rtol=2.0**-8, atol=2.0**-9)
    numbers = open_model(tmp_path / "base").sources()[f"{LEFT[0]}.weight"].read()
    narrow = load_quantised(tmp_path / "base", f"{LEFT[0]}.weight", dtype=BFLOAT16)
    if format not in ("int8", "mlx"):  # these round once more on the way
        assert narrow.rows(slice(0, OUT)).tobytes() == numbers.tobytes()
    assert narrow.dtype == BFLOAT16


def test_a_step_on_a_weight_in_memory_is_that_of_its_numbers(tmp_path, rng):
    _, weights = base(rng, "nf4", tmp_path / "base")
    weight = load_quantised(tmp_path / "base", f"{LEFT[0]}.weight")
    config = Config(RANK, alpha=ALPHA)
    own = Adapter(*near(rng, weights[LEFT[0]]))
    x, dy = draw(rng, 5, IN), draw(rng, 5, OUT)
    results = []
    for one in (weight, weight.rows(slice(0, OUT))):
        y, cache = forward(x, one, own, config)
        gradients = backward(dy, cache)
        results.append([y, gradients.x, *gradients.adapter])
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_a_weight_that_cannot_be_loaded_is_named(tmp_path, rng):
    tensors, _ = base(rng, "fp8")
    without_scales(tensors)
    write(tmp_path / "base", tensors, **CONFIGS["fp8"])
    gpt_oss(rng, tmp_path / "stacks")
    for folder, name, message in [
        ("base", f"{ADAPTED[0]}.weight", "is quantised"),
        ("base", HEAD, "is not quantised"),
        ("base", "none.weight", "is not in the model"),
        ("stacks/base", f"{STACK}.down_proj", "is not a matrix"),
    ]:
        with pytest.raises(CheckpointError, match=f"{name}.* {message}"):
            load_quantised(tmp_path / folder, name)


# Scales that need all rows, and numbers at the edge


@pytest.mark.parametrize("targets", ["bf16", "same"])
def test_one_scale_for_all_rows_needs_two_passes(tmp_path, rng, targets):
    tensors, weights = {}, {}
    for module in ADAPTED:
        own, weights[module] = quantised_bases.fp8(rng, f"{module}.weight", OUT, IN, [OUT, IN])
        tensors |= own
    words = {"quant_method": "fp8", "weight_block_size": None}
    write(tmp_path / "base", tensors, quantization_config=words)
    leaves = adapter(rng, tmp_path / "adapter", weights)
    assert merge(tmp_path, "--targets", targets, "--verify") == 0
    for module, own in leaves.items():
        exact = dense(weights[module], *own)
        stored = dequantised(tmp_path / "out")[f"{module}.weight"]
        assert np.linalg.norm(stored - exact) < 0.04 * np.linalg.norm(exact)


def test_pieces_are_joined_to_whole_groups():
    memory = np.zeros((11, 1), int)  # each piece overwrites the one before, as blocks do

    def pieces():
        for start, stop in ((0, 3), (3, 5), (5, 6), (6, 17), (17, 18)):
            exact = memory[: stop - start]
            exact[:, 0] = range(start, stop)
            yield Piece(start, exact)

    groups = [
        np.concatenate([one.exact for one in group])[:, 0].tolist()
        for group in _whole_groups(pieces(), 4, 18)
    ]
    assert groups == [[0, 1, 2, 3], [4, 5, 6, 7], [*range(8, 16)], [16, 17]]


def test_the_cosine_of_no_change_and_of_numbers_that_are_too_large():
    def survival(weight, merged, stored):
        found = Survival(weight.shape)
        found.add(Block(slice(0, 1), weight, merged, None), stored)
        return found.cosine

    one = np.ones((1, 4))
    assert survival(one, one, one) == 1
    assert survival(one, 2 * one, one) == 0
    assert survival(0 * one, 1e-120 * one, 1e-120 * one) == pytest.approx(1)  # 1e-480 is 0
    with np.errstate(over="ignore"):
        assert np.isnan(survival(one, 1e200 * one, one))


def test_a_model_whose_names_cannot_be_read_says_where_it_is(tmp_path, rng, monkeypatch):
    base(rng, "fp8", tmp_path / "base")

    def refuse(*arguments):
        raise CheckpointError("no")

    monkeypatch.setattr(_model, "find", refuse)
    with pytest.raises(CheckpointError, match="base: no"):
        open_model(tmp_path / "base")


def test_a_large_weight_is_read_in_the_chunks_of_a_dense_one(tmp_path, rng):
    name, shape = f"{LEFT[0]}.weight", (1100, 1000)
    tensors, weight = quantised_bases.fp8(rng, name, *shape)
    write(tmp_path / "base", tensors, **CONFIGS["fp8"])
    write(tmp_path / "dense", {name: weight.astype(BFLOAT16)})
    packed, plain = (open_model(tmp_path / one).sources()[name] for one in ("base", "dense"))
    assert are_equal(packed, plain)
    assert are_equal(packed.rows(3, 1000), plain.rows(3, 1000))
    assert not are_equal(packed.rows(3, 1000), plain.rows(2, 999))


def test_a_stack_of_experts_cannot_be_packed_as_a_matrix(tmp_path, rng):
    gpt_oss(rng, tmp_path)
    weight = open_model(tmp_path / "base").readable[f"{STACK}.down_proj"]
    with pytest.raises(CheckpointError, match="is a stack of experts"):
        weight.quantisation.packed(weight.fetch)


def test_the_audit_names_a_quantised_weight_of_another_shape(tmp_path, rng, capsys):
    tensors, weights = base(rng, "fp8", tmp_path / "base")
    adapter(rng, tmp_path / "adapter", weights)
    other, _ = quantised_bases.fp8(rng, f"{ADAPTED[0]}.weight", OUT + 16, IN)
    write(tmp_path / "out", tensors | other, **CONFIGS["fp8"])
    assert audit(tmp_path) == 1
    assert f"another shape ({(OUT + 16, IN)} for {(OUT, IN)})" in capsys.readouterr().out


@pytest.mark.parametrize("format", ["nf4", "fp8"])
def test_the_component_of_a_pipeline_has_a_configuration_of_its_own(tmp_path, rng, format):
    name = "transformer_blocks.0.attn.to_q"
    tensors, weight = MATRICES[format](rng, f"{name}.weight", 40, IN)
    words = CONFIGS[format] | {"_class_name": "Tiny"}
    if format == "fp8":  # 40 rows are three blocks, which no file but the configuration tells
        assert tensors[f"{name}.weight_scale_inv"].shape == (3, 4)
    base = tmp_path / "base"
    write(base / "transformer", tensors, **words)
    write(base / "vae", {"decoder.weight": draw(rng, 4, 4)}, **CONFIGS["nf4"])
    (base / "model_index.json").write_text("{}")
    a, b, _ = near(rng, weight)
    pair = {"lora_A.weight": a, "lora_B.weight": b}
    (tmp_path / "adapter").mkdir()
    quantised_bases.save(
        tmp_path / "adapter" / "pytorch_lora_weights.safetensors",
        {f"transformer.{name}.{key}": leaf for key, leaf in pair.items()},
    )
    assert merge(tmp_path, "--verify") == 0
    configs = {
        part: json.loads((tmp_path / "out" / part / "config.json").read_text())
        for part in ("transformer", "vae")
    }
    assert configs["vae"] == json.loads((base / "vae" / "config.json").read_text())
    (names,) = (
        value
        for value in configs["transformer"]["quantization_config"].values()
        if isinstance(value, list) and "lm_head" in value
    )
    assert names == ["lm_head", name]
    stored = dequantised(tmp_path / "out")[f"transformer.{name}.weight"]
    np.testing.assert_allclose(stored, weight + b.astype("f8") @ a, rtol=2.0**-8, atol=1e-6)


def test_a_grown_vocabulary_is_dense_also_where_all_else_is_quantised_again(tmp_path, rng):
    tensors, weights = base(rng, "fp8")
    del tensors[EMBEDDING], tensors[HEAD]
    for name in (EMBEDDING, HEAD):
        tensors |= quantised_bases.fp8(rng, name, 16, IN)[0]
    write(tmp_path / "base", tensors, model_type="llama", vocab_size=16, **CONFIGS["fp8"])
    whole = {f"{PREFIX}{name}": draw(rng, 18, IN) for name in (EMBEDDING, HEAD)}
    leaves = {module: near(rng, weights[module]) for module in ADAPTED}
    write_peft(tmp_path / "adapter", leaves, whole, modules_to_save=["lm_head", "embed_tokens"])
    assert merge(tmp_path, "--targets", "same", "--verify") == 0
    after = raw(tmp_path / "out")
    assert {after[name][:2] for name in (EMBEDDING, HEAD)} == {("BF16", (18, IN))}
    assert after[f"{ADAPTED[0]}.weight"][0] == "F8_E4M3"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    names = config["quantization_config"]["modules_to_not_convert"]
    assert (config["vocab_size"], set(names)) == (18, {"lm_head", "model.embed_tokens"})
    assert audit(tmp_path) == 0


@pytest.mark.parametrize("targets", ["bf16", "same"])
def test_a_transposed_weight(tmp_path, rng, targets):
    """GPT-2 stores (in, out), so the norms run across the rows of the file."""
    name = "transformer.h.0.attn.c_attn"
    tensors, weight = quantised_bases.fp8(rng, f"{name}.weight", 32, 96)
    tensors[f"{name}.weight"][0] = weight[0] = 0  # the largest number is in another row
    write(tmp_path / "base", tensors, model_type="gpt2", **CONFIGS["fp8"])
    a, b, m = near(rng, weight.T)
    a[:, 0] = 0
    own = a, b, m
    write_peft(tmp_path / "adapter", {name: own}, fan_in_fan_out=True)
    assert merge(tmp_path, "--targets", targets, "--verify") == 0
    exact = dense(weight.T, *own).T
    stored = dequantised(tmp_path / "out")[f"{name}.weight"]
    assert np.linalg.norm(stored - exact) < 0.04 * np.linalg.norm(exact)
    assert audit(tmp_path) == 0


def test_the_arrays_of_a_weight_can_be_placed(tmp_path, rng):
    base(rng, "mlx", tmp_path / "base")
    placed = []

    def place(array):
        placed.append(array)
        return array

    weight = load_quantised(tmp_path / "base", f"{LEFT[0]}.weight", place=place)
    arrays = [array for array in weight.packed[:4] if array is not None]
    assert len(arrays) == len(placed) == 4  # codes, table, scale and bias
    assert all(any(one is other for other in placed) for one in arrays)


@pytest.mark.parametrize("targets", ["bf16", "same"])
def test_a_new_head_gives_all_names_a_lead(tmp_path, rng, targets):
    tensors, weights = {}, {}
    for module in ("layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj"):
        own, weights[module] = quantised_bases.fp8(rng, f"{module}.weight", OUT, IN)
        tensors |= own
    words = {"model_type": "llama", "architectures": ["LlamaModel"]}
    write(tmp_path / "base", tensors, **words, **CONFIGS["fp8"])
    module = "layers.0.self_attn.q_proj"
    whole = {f"{PREFIX}score.weight": draw(rng, 2, IN)}
    write_peft(
        tmp_path / "adapter", {f"model.{module}": near(rng, weights[module])}, whole,
        modules_to_save=["score"], task_type="SEQ_CLS",
    )  # fmt: skip
    assert merge(tmp_path, "--targets", targets, "--verify") == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    names = config["quantization_config"]["modules_to_not_convert"]
    made = [f"model.{module}"] if targets == "bf16" else []
    assert set(names) == {"lm_head", "score", *made}


def test_a_dense_weight_begins_at_an_even_byte_where_its_scales_are_apart(tmp_path, rng):
    tensors, weights = base(rng, "fp8")
    odd = {"model.mask": np.zeros(3, np.uint8)}
    write(
        tmp_path / "base", odd | tensors,
        lambda name: f"{name.endswith('scale_inv') or name == HEAD}.safetensors", **CONFIGS["fp8"],
    )  # fmt: skip
    adapter(rng, tmp_path / "adapter", weights)
    assert merge(tmp_path, "--verify") == 0
    reader = Reader(tmp_path / "out" / "False.safetensors")
    assert {reader._starts[f"{module}.weight"] % 2 for module in ADAPTED} == {0}


def test_numbers_that_the_format_cannot_store_are_refused(tmp_path, rng, capsys, monkeypatch):
    _, weights = base(rng, "fp8", tmp_path / "base")
    adapter(rng, tmp_path / "adapter", weights)
    right = Fp8Quantiser.quantise

    def wrong(self, rows, weight):
        found = right(self, rows, weight)
        return found._replace(weight=found.weight * np.float32(np.nan))

    monkeypatch.setattr(Fp8Quantiser, "quantise", wrong)
    error = refused(tmp_path, capsys, "--targets", "same")
    assert f"{ADAPTED[0]}.weight has values that its format cannot store" in error


def test_shards_of_other_blocks_are_made_anew(tmp_path, rng, monkeypatch):
    """Blocks of 17 rows have as many scales as those of 16, and other numbers."""
    folder = tmp_path / "base"
    _, weights = base(rng, "fp8", folder)
    adapter(rng, tmp_path / "adapter", weights)
    with monkeypatch.context() as patch:

        def stop(*arguments):
            raise OSError("stopped")

        patch.setattr(_run, "copy_others", stop)
        with pytest.raises(OSError, match="stopped"):
            run_merge(plan_merge(folder, tmp_path / "adapter", Options()), tmp_path / "out")
    words = {"quant_method": "fp8", "weight_block_size": [17, 16]}
    (folder / "config.json").write_text(
        json.dumps({"torch_dtype": "bfloat16", "quantization_config": words})
    )
    for out in ("out", "fresh"):
        run_merge(plan_merge(folder, tmp_path / "adapter", Options()), tmp_path / out)
    assert raw(tmp_path / "out") == raw(tmp_path / "fresh")
