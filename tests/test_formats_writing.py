"""Saving and converting adapters: the parts of a file that are kept, and the refusals."""

from __future__ import annotations

import dataclasses
import json
import re

import ml_dtypes
import numpy as np
import pytest
from checkpoints import (
    PREFIX,
    SHAPES,
    dense,
    draw,
    factors,
    peft_config,
    write_adapter,
    write_json,
    write_model,
)
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from doraxp import AdaptedLayer, Adapter, Config, LayerKind, convert_form
from doraxp.checkpoint import CheckpointError, load_adapters, named_for, open_model, save_adapters
from doraxp.cli import main


def convert(source, target, to="peft"):
    return main(["convert", str(source), "--to", to, "--out", str(target)])


def merge(folder, adapter, *options):
    paths = [str(folder / "base"), str(adapter), "--out", str(folder / "out")]
    return main(["merge", *paths, "--verify", *options])


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text("utf-8"))


def metadata_of(path):
    with safe_open(path, "numpy") as file:
        return file.metadata()


def bytes_of(path):
    return {name: (x.dtype, x.shape, x.tobytes()) for name, x in load_file(path).items()}


def add(folder, tensors, metadata=None):
    """Add tensors to a PEFT file."""
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path) | tensors, path, metadata or {"format": "pt"})


def adapted(shape, kind="linear", rank=2, config=None):
    kind = LayerKind(kind)
    *_, out, inner = kind.matrix_shape(shape)
    leaves = factors(np.random.default_rng(4), (out, inner), rank)
    return AdaptedLayer(Adapter(*leaves), config or Config(rank, 3.0), kind, shape)


# A base that the training changed


@pytest.mark.parametrize("name", ["pissa", "pissa_niter_4", "olora", "loftq", "corda"])
def test_a_changed_base_is_still_known_after_a_conversion_to_peft(tmp_path, capsys, name):
    write_model(tmp_path / "base", np.dtype("f4"))
    write_adapter(tmp_path / "a", init_lora_weights=name)
    assert convert(tmp_path / "a", tmp_path / "b") == 0
    assert load_adapters(tmp_path / "b").base_change == name
    assert config_of(tmp_path / "b")["init_lora_weights"] == name
    assert merge(tmp_path, tmp_path / "b") == 2
    assert f"was initialised by {name}" in capsys.readouterr().err


@pytest.mark.parametrize("lead", ["", "unet.", "text_encoder."])
def test_a_changed_base_and_biases_are_still_known_in_a_file_of_diffusers(tmp_path, lead):
    write_adapter(tmp_path / "a", {f"{lead}q": (7, 5)}, init_lora_weights="olora", bias="all")
    for source, target in ("ab", "bc"):
        save_adapters(tmp_path / target, load_adapters(tmp_path / source), "diffusers")
        found = load_adapters(tmp_path / target)
        assert (found.base_change, found.trained_biases) == ("olora", "all")


def test_a_changed_base_is_refused_by_mlx(tmp_path, capsys):
    write_adapter(tmp_path / "a", init_lora_weights="olora")
    assert convert(tmp_path / "a", tmp_path / "b", "mlx") == 2
    error = capsys.readouterr().err
    assert "was initialised by olora, which changed the base weights" in error
    assert "format 'peft'" in error
    assert not (tmp_path / "b").exists()
    assert convert(tmp_path / "a", tmp_path / "b", "peft") == 0


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_missing_biases_are_still_known_after_a_conversion_to_peft(tmp_path, capsys, bias):
    write_model(tmp_path / "base", np.dtype("f4"))
    write_adapter(tmp_path / "a", bias=bias)
    assert convert(tmp_path / "a", tmp_path / "b") == 0
    assert config_of(tmp_path / "b")["bias"] == bias
    assert merge(tmp_path, tmp_path / "b") == 2
    assert "but the file lacks block.0.k.bias" in capsys.readouterr().err


def test_missing_biases_are_refused_by_mlx(tmp_path, capsys):
    write_adapter(tmp_path / "a", bias="all")
    assert convert(tmp_path / "a", tmp_path / "b", "mlx") == 2
    error = capsys.readouterr().err
    assert "says bias 'all', but the file has no bias" in error
    assert "if the model has no biases, set bias to 'none'" in error
    # The advice works.
    write_json(tmp_path / "a" / "adapter_config.json", peft_config(bias="none"))
    assert convert(tmp_path / "a", tmp_path / "b", "mlx") == 0


def of_another_format(folder):
    """Load a PEFT folder as if its configuration had another place."""
    return dataclasses.replace(load_adapters(folder), format="another")


def test_the_fields_of_another_format_are_kept_too(tmp_path):
    write_adapter(tmp_path / "a", init_lora_weights="olora", bias="all")
    save_adapters(tmp_path / "b", of_another_format(tmp_path / "a"))
    found = load_adapters(tmp_path / "b")
    assert (found.base_change, found.trained_biases) == ("olora", "all")


def test_whole_tensors_of_another_format_are_refused(tmp_path):
    write_adapter(tmp_path / "a")
    add(tmp_path / "a", {f"{PREFIX}head.weight": np.ones((3, 4), "f4")})
    with pytest.raises(ValueError, match=r"also replaces head.weight: .* doraxp merge"):
        save_adapters(tmp_path / "b", of_another_format(tmp_path / "a"))


# PEFT to PEFT


WHOLE = {
    f"{PREFIX}head.weight": draw(np.random.default_rng(1), 3, 4),
    f"{PREFIX}head.bias": draw(np.random.default_rng(2), 3, dtype=ml_dtypes.bfloat16),
    f"{PREFIX}norm.num_batches_tracked": np.array(7),
    f"{PREFIX}norm.mask": np.array([True, False]),
    f"{PREFIX}embed.original_module.weight": draw(np.random.default_rng(3), 5, 4),
    f"{PREFIX}embed.base_layer.weight": draw(np.random.default_rng(4), 5, 4),
}
ENTRIES = {
    "base_model_name_or_path": "someone/model",
    "task_type": "SEQ_CLS",
    "lora_dropout": 0.25,
    "modules_to_save": ["head"],
    "target_modules": ["q", "k"],
    "inference_mode": True,
    "exclude_modules": ["x"],
    "layers_to_transform": [0, 1],
    "rank_pattern": {"nothing": 4},
    "bias": "none",
    "auto_mapping": {"base_model_class": "Net", "parent_library": "net"},
    "revision": "main",
    "peft_version": "0.21.2",
}


def test_peft_to_peft_is_a_copy(tmp_path):
    write_adapter(tmp_path / "a", **ENTRIES)
    add(tmp_path / "a", WHOLE, {"format": "pt", "from": "here"})
    assert convert(tmp_path / "a", tmp_path / "b") == 0
    before, after = (tmp_path / name / "adapter_model.safetensors" for name in "ab")
    assert bytes_of(after) == bytes_of(before)
    assert metadata_of(after) == metadata_of(before)
    was, now = config_of(tmp_path / "a"), config_of(tmp_path / "b")
    assert {name: now[name] for name in was} == was
    assert load_adapters(tmp_path / "b").replacements == load_adapters(tmp_path / "a").replacements


@pytest.mark.parametrize("to", ["peft", "mlx"])
def test_names_that_begin_as_a_part_of_a_pipeline_stay(tmp_path, to):
    """The blocks of GPT-2 are in `transformer`."""
    paths = {"transformer.h.0.q": (7, 5), "transformer.h.1.q": (7, 5)}
    pattern = {} if to == "mlx" else {r"^transformer\.h\.0\.q": 7}
    write_adapter(tmp_path / "a", paths, alpha_pattern=pattern)
    assert convert(tmp_path / "a", tmp_path / "b", to) == 0
    before, after = (load_adapters(tmp_path / name) for name in "ab")
    scalings = [{path: x.config.scaling for path, x in one.items()} for one in (before, after)]
    assert scalings[0] == scalings[1]


def test_the_entries_that_a_file_lacks_are_those_of_its_adapters(tmp_path):
    write_adapter(tmp_path / "a", target_modules=None, task_type=None)
    assert convert(tmp_path / "a", tmp_path / "b") == 0
    config = config_of(tmp_path / "b")
    assert config["target_modules"] == sorted(SHAPES)
    assert (config["task_type"], config["bias"]) == (None, "none")


@pytest.mark.parametrize("turned", [False, True])
def test_patterns_keep_their_order(tmp_path, turned):
    """PEFT takes the first pattern that matches."""
    pattern = {"q": 5, r"block\.1\.q": 7}
    pattern = dict(reversed(pattern.items())) if turned else pattern
    write_adapter(tmp_path / "a", alpha_pattern=pattern)
    assert convert(tmp_path / "a", tmp_path / "b") == 0
    assert list(config_of(tmp_path / "b")["alpha_pattern"].items()) == list(pattern.items())
    before, after = (load_adapters(tmp_path / name) for name in "ab")
    assert {path: layer.config for path, layer in after.items()} == {
        path: layer.config for path, layer in before.items()
    }


def test_tensors_have_the_names_that_peft_loads(tmp_path):
    """Some versions and trainers write other endings, and PEFT does not find them."""
    write_adapter(tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    desired = bytes_of(path)
    other = {
        re.sub("lora_([AB])", r"lora_\1.default", name).replace("_vector", "_vector.weight"): x
        for name, x in load_file(path).items()
    }
    save_file(other, path)
    assert convert(tmp_path / "a", tmp_path / "b") == 0
    assert bytes_of(tmp_path / "b" / "adapter_model.safetensors") == desired


def test_nvlabs_entries_that_peft_does_not_know_are_left_out(tmp_path):
    own = {"merge_weights": False, "dora_simple": True, "Wdecompose_target_modules": None}
    write_adapter(tmp_path / "a", peft_type="DORA", enable_lora=None, lora_dropout=0.1, **own)
    assert convert(tmp_path / "a", tmp_path / "b") == 0
    config = config_of(tmp_path / "b")
    assert (config["peft_type"], config["use_dora"], config["lora_dropout"]) == ("LORA", True, 0.1)
    assert not {*own, "enable_lora"} & config.keys()


def test_whole_tensors_are_refused_by_mlx_and_merged_by_merge(tmp_path, capsys):
    base = write_model(tmp_path / "base", np.dtype("f4"))
    adapter = write_adapter(tmp_path / "a")
    bias = draw(np.random.default_rng(1), 7)
    add(tmp_path / "a", {f"{PREFIX}block.0.q.bias": bias})
    assert convert(tmp_path / "a", tmp_path / "b", "mlx") == 2
    error = capsys.readouterr().err
    assert "also replaces block.0.q.bias" in error
    assert "doraxp merge" in error
    # The advice works.
    assert merge(tmp_path, tmp_path / "a") == 0
    merged = load_file(tmp_path / "out" / "model-1.safetensors")
    np.testing.assert_array_equal(merged["block.0.q.bias"], bias)
    desired = dense(base["block.0.q.weight"], *adapter["block.0.q"])
    np.testing.assert_allclose(merged["block.0.q.weight"], desired, rtol=2**-22)


def test_a_whole_tensor_of_an_unknown_dtype_is_refused(tmp_path):
    write_adapter(tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    name = f"{PREFIX}head.weight"
    add(tmp_path / "a", {name: np.zeros(4, np.uint8)})
    raw = path.read_bytes()
    entry = f'"{name}":{{"dtype":"U8"'.encode()
    assert entry in raw
    size = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + size].rstrip().replace(entry, entry.replace(b'"U8"', b'"F8_E8M0"'))
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + size :])
    with pytest.raises(CheckpointError, match=r"head.weight has dtype F8_E8M0, .* copy the folder"):
        save_adapters(tmp_path / "b", load_adapters(tmp_path / "a"))


# Names without dots


def lycoris(path):
    a, b, m = factors(np.random.default_rng(2), (7, 5))
    tensors = {"lora_down.weight": a, "lora_up.weight": b, "dora_scale": m.reshape(-1, 1)}
    save_file({f"lora_unet_down_0.{name}": tensor for name, tensor in tensors.items()}, path)
    return a, b, m


@pytest.mark.parametrize("to", ["peft", "mlx"])
def test_names_without_dots_are_refused(tmp_path, capsys, to):
    lycoris(tmp_path / "a.safetensors")
    assert convert(tmp_path / "a.safetensors", tmp_path / "b", to) == 2
    error = capsys.readouterr().err
    assert "lora_unet_down_0 is not the name of a module in the model" in error
    assert "--base BASE" in error
    assert not (tmp_path / "b").exists()


def test_adapters_are_saved_under_the_names_of_the_base(tmp_path):
    leaves = lycoris(tmp_path / "a.safetensors")
    save_file({"down.0.weight": np.ones((7, 5), np.float32)}, tmp_path / "base.safetensors")
    model, adapters = (
        open_model(tmp_path / "base.safetensors"),
        load_adapters(tmp_path / "a.safetensors"),
    )
    save_adapters(tmp_path / "b", named_for(model, adapters))
    (path, layer), *others = load_adapters(tmp_path / "b").items()
    assert (path, others) == ("down.0", [])
    for one, other in zip(layer.adapter, leaves, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_module_that_the_base_lacks_has_no_name(tmp_path):
    lycoris(tmp_path / "a.safetensors")
    save_file({"up.0.weight": np.ones((7, 5), np.float32)}, tmp_path / "base.safetensors")
    model, adapters = (
        open_model(tmp_path / "base.safetensors"),
        load_adapters(tmp_path / "a.safetensors"),
    )
    with pytest.raises(CheckpointError, match=r"the base has no lora_unet_down_0\.weight"):
        named_for(model, adapters)


# mlx-lm's embeddings


def write_mlx(folder, path, a, b, m, **parameters):
    """Write an mlx-lm folder of one module; s is 1.5."""
    folder.mkdir()
    tensors = {f"{path}.lora_a": a, f"{path}.lora_b": b, f"{path}.m": m}
    save_file(tensors, folder / "adapters.safetensors")
    parameters = {"rank": a.shape[1], "scale": 1.5, **parameters}
    entries = {"fine_tune_type": "dora", "lora_parameters": parameters}
    write_json(folder / "adapter_config.json", entries)


def embedding(folder, path, shape, rank=2, **parameters):
    """Write an adapter as `DoRAEmbedding` has it; return A and B of the layer, and m."""
    b, a, m = factors(np.random.default_rng(6), shape[::-1], rank)  # (rank, tokens), (dims, rank)
    rows = np.linspace(1, 2, shape[0], dtype="f4")
    del m
    write_mlx(
        folder, path, np.ascontiguousarray(b.T), np.ascontiguousarray(a.T), rows, **parameters
    )
    return a.T, b.T, rows


@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (5, 5)])
def test_an_embedding_of_mlx_is_merged_by_token(tmp_path, shape, rank):
    a, b, m = embedding(tmp_path / "a", "model.embed_tokens", shape, rank)
    weight = draw(np.random.default_rng(7), *shape)
    save_file({"model.embed_tokens.weight": weight}, tmp_path / "base")
    layer = load_adapters(tmp_path / "a")["model.embed_tokens"]
    assert (layer.kind, layer.shape) == (LayerKind("linear"), shape)
    assert merge(tmp_path, tmp_path / "a") == 0
    merged = load_file(tmp_path / "out")["model.embed_tokens.weight"]
    np.testing.assert_allclose(merged, dense(weight, a, b, m), rtol=2**-21)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        *((f"model.{name}", "embedding") for name in ("embed_tokens", "wte", "wpe", "embed")),
        *((f"transformer.{name}", "embedding") for name in ("word_embeddings", "embed_in")),
        *((name, "embedding") for name in ("tok_embeddings", "token_embeddings", "embeddings")),
        ("model.embed_tokens_per_layer", "embedding"),
        ("model.embedders.0", "embedding"),
        ("vision.position_embedding_table", "embedding"),
        *((f"model.layers.3.{name}", "linear") for name in ("attn.q_proj", "mlp.fc1", "wo", "q")),
        *(
            (name, "linear")
            for name in ("lm_head", "model.per_layer_projection", "score", "output")
        ),
        *((name, None) for name in ("x", "model.patch_embedding", "embed_out", "layers.1.embed_x")),
    ],
)
def test_the_name_of_a_square_module_tells_its_kind(tmp_path, path, kind):
    a, b, m = embedding(tmp_path / "a", path, (5, 5))
    if kind is None:
        with pytest.raises(CheckpointError, match="neither the name nor the shapes") as raised:
            load_adapters(tmp_path / "a")
        assert f'"embeddings": ["{path}"]' in str(raised.value)
        assert '"embeddings": []' in str(raised.value)
        return
    found = load_adapters(tmp_path / "a")[path].adapter
    desired = (a, b, m) if kind == "embedding" else (b.T, a.T, m)
    for one, other in zip(found, desired, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("path", ["x", "model.embed_tokens", "layers.0.q_proj"])
@pytest.mark.parametrize("listed", [True, False])
def test_the_configuration_may_list_the_embeddings(tmp_path, path, listed):
    """The advice of the refusal, for both answers."""
    a, b, m = embedding(tmp_path / "a", path, (5, 5), embeddings=[path] if listed else [])
    found = load_adapters(tmp_path / "a")[path].adapter
    for one, other in zip(found, (a, b, m) if listed else (b.T, a.T, m), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("shape", "listed", "message"),
    [
        ((5, 5), "x", "embeddings of lora_parameters must be a list of modules, got 'x'"),
        ((5, 5), [1], r"embeddings of lora_parameters must be a list of modules, got \[1\]"),
        ((9, 5), [], "x.m has shape .9,., which is one number for each token of an embedding"),
    ],
)
def test_a_wrong_list_of_embeddings_is_refused(tmp_path, shape, listed, message):
    embedding(tmp_path / "a", "x", shape, embeddings=listed)
    with pytest.raises(CheckpointError, match=message):
        load_adapters(tmp_path / "a")


@pytest.mark.parametrize("shape", [(9, 5), (5, 5)])
def test_an_embedding_of_mlx_comes_back_from_mlx(tmp_path, shape):
    embedding(tmp_path / "a", "model.embed_tokens", shape)
    adapters = load_adapters(tmp_path / "a")
    save_adapters(tmp_path / "b", adapters, "mlx")
    save_adapters(tmp_path / "c", dict(adapters), "mlx")
    desired = bytes_of(tmp_path / "a" / "adapters.safetensors")
    for name in "bc":
        assert bytes_of(tmp_path / name / "adapters.safetensors") == desired


@pytest.mark.parametrize("path", ["x", "embed_out"])
def test_a_square_module_comes_back_whatever_its_name(tmp_path, path):
    layers = {path: adapted((5, 5))}
    save_adapters(tmp_path / "a", layers, "mlx")
    assert config_of(tmp_path / "a")["lora_parameters"]["embeddings"] == []
    for one, other in zip(
        load_adapters(tmp_path / "a")[path].adapter, layers[path].adapter, strict=True
    ):
        np.testing.assert_array_equal(one, other)
    embedding(tmp_path / "e", path, (5, 5), embeddings=[path])
    save_adapters(tmp_path / "f", load_adapters(tmp_path / "e"), "mlx")
    assert config_of(tmp_path / "f")["lora_parameters"]["embeddings"] == [path]
    ours, theirs = (bytes_of(tmp_path / name / "adapters.safetensors") for name in "ef")
    assert ours == theirs


def test_a_list_of_embeddings_is_written_only_where_it_is_needed(tmp_path):
    square = {"model.embed_tokens": adapted((5, 5)), "layers.0.q": adapted((5, 5))}
    save_adapters(tmp_path / "a", square | {"x": adapted((9, 5))}, "mlx")
    assert "embeddings" not in config_of(tmp_path / "a")["lora_parameters"]


@pytest.mark.parametrize("loaded", [True, False], ids=["file", "dict"])
def test_an_embedding_of_mlx_is_refused_by_peft(tmp_path, loaded):
    embedding(tmp_path / "a", "model.embed_tokens", (9, 5))
    adapters = load_adapters(tmp_path / "a")
    with pytest.raises(ValueError, match=r"has one magnitude for each token.*doraxp merge"):
        save_adapters(tmp_path / "b", adapters if loaded else dict(adapters))


# The choices of a Config that no trainer's file has


CHOICES = [
    {"norm_gradient": "detached"},
    {"dropout": "low_rank"},
    {"norm_gradient": "detached", "dropout": "low_rank"},
]


@pytest.mark.parametrize("choices", CHOICES, ids=str)
@pytest.mark.parametrize("format", ["peft", "mlx"])
def test_choices_survive(tmp_path, format, choices):
    config = Config(2, 3.0, **choices)
    save_adapters(tmp_path / "a", {"block.0.q": adapted((7, 5), config=config)}, format)
    adapters = load_adapters(tmp_path / "a")
    assert adapters["block.0.q"].config == adapters.layers["block.0.q"].config == config
    assert convert(tmp_path / "a", tmp_path / "b", {"peft": "mlx", "mlx": "peft"}[format]) == 0
    assert load_adapters(tmp_path / "b")["block.0.q"].config == config
    assert convert(tmp_path / "a", tmp_path / "c", format) == 0
    assert load_adapters(tmp_path / "c")["block.0.q"].config == config


def test_choices_of_each_module_survive(tmp_path):
    layers = {
        "block.0.q": adapted((7, 5), config=Config(2, 3.0, norm_gradient="detached")),
        "block.0.k": adapted((6, 5), config=Config(2, 3.0, dropout="low_rank")),
        "block.1.q": adapted((7, 5)),
    }
    save_adapters(tmp_path / "a", layers)
    found = load_adapters(tmp_path / "a")
    assert {path: layer.config for path, layer in found.items()} == {
        path: layer.config for path, layer in layers.items()
    }


def test_a_file_of_default_choices_has_no_entry_for_them(tmp_path):
    save_adapters(tmp_path / "a", {"block.0.q": adapted((7, 5))})
    assert metadata_of(tmp_path / "a" / "adapter_model.safetensors") == {"format": "pt"}


def test_arguments_override_the_file(tmp_path):
    write_adapter(tmp_path / "a")
    own = {"norm_gradient": "detached", "dropout": "low_rank", "form": "direction"}
    for name, value in own.items():
        found = load_adapters(tmp_path / "a", **{name: value})
        assert {layer.config for layer in found.values()} == {Config(2, 3.0, **{name: value})}
    save_adapters(tmp_path / "b", load_adapters(tmp_path / "a", norm_gradient="detached"))
    assert load_adapters(tmp_path / "b")["block.0.q"].config.norm_gradient == "detached"
    again = load_adapters(tmp_path / "b", norm_gradient="exact")
    assert again["block.0.q"].config == Config(2, 3.0)
    save_adapters(tmp_path / "c", again)
    assert "doraxp" not in metadata_of(tmp_path / "c" / "adapter_model.safetensors")


def test_a_wrong_argument_is_an_error_of_config(tmp_path):
    write_adapter(tmp_path / "a")
    for name in "norm_gradient", "dropout", "form":
        with pytest.raises(ValueError, match=f"{name} must be one of .*, got 'x'"):
            load_adapters(tmp_path / "a", **{name: "x"})


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("[1]", "must be a JSON object"),
        ("{", "not JSON"),
        (
            '{"alpha": 3}',
            "dropout, form and experts only, got alpha",
        ),
        ('{"dropout": "x"}', "dropout must be one of"),
        ('{"dropout": 1}', "dropout must be a string, or an object of strings by module"),
        ('{"dropout": {"block.0.q": 1}}', "dropout must be a string, or an object of strings"),
        ('{"dropout": {"y": "input"}}', "dropout has an entry for y, and the file has no adapter"),
        ('{"form": "direction"}', "form must be 'weight' in a file"),
    ],
)
def test_a_wrong_entry_of_choices_is_refused(tmp_path, entry, message):
    write_adapter(tmp_path / "a")
    add(tmp_path / "a", {}, {"format": "pt", "doraxp": entry})
    with pytest.raises(CheckpointError, match=message) as raised:
        load_adapters(tmp_path / "a")
    assert "adapter_model.safetensors" in str(raised.value)


@pytest.mark.parametrize("format", ["peft", "mlx"])
def test_a_direction_form_is_refused_and_the_advice_works(tmp_path, format):
    weight = draw(np.random.default_rng(3), 7, 5)
    layer = adapted((7, 5), config=Config(2, 3.0, form="direction", norm_gradient="detached"))
    with pytest.raises(ValueError, match=r"doraxp\.convert_form"):
        save_adapters(tmp_path / "a", {"q": layer}, format)
    adapter, config = convert_form(weight, layer.adapter, layer.config, "weight")
    save_adapters(tmp_path / "a", {"q": layer._replace(adapter=adapter, config=config)}, format)
    assert load_adapters(tmp_path / "a")["q"].config == config


# The parts beside the adapters


EMBEDDINGS = f"{PREFIX}model.embed_tokens"
TOKENS = f"{EMBEDDINGS}.token_adapter.trainable_tokens_delta"


def test_a_copy_has_both_names_that_peft_writes_of_a_trained_embedding(tmp_path):
    write_adapter(tmp_path / "a", modules_to_save=["embed_tokens"])
    embeddings = draw(np.random.default_rng(8), 7, 5)
    names = [f"{EMBEDDINGS}.{part}weight" for part in ("", "modules_to_save.", "original_module.")]
    add(tmp_path / "a", dict.fromkeys(names, embeddings))
    assert convert(tmp_path / "a", tmp_path / "b") == 0
    before, after = (bytes_of(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert before == after


def with_tokens(folder):
    """Write a PEFT adapter with two trained tokens."""
    write_adapter(folder, trainable_token_indices={"embed_tokens": [3, 1]})
    add(folder, {TOKENS: draw(np.random.default_rng(8), 2, 5)})


@pytest.mark.parametrize("to", ["mlx", "diffusers"])
def test_trained_tokens_are_refused_by_formats_without_them(tmp_path, capsys, to):
    with_tokens(tmp_path / "a")
    assert convert(tmp_path / "a", tmp_path / "b", to) == 2
    error = capsys.readouterr().err
    assert "rows of 2 tokens of model.embed_tokens.weight" in error
    assert "doraxp merge" in error
    assert not (tmp_path / "b").exists()


def test_trained_tokens_are_in_a_copy(tmp_path):
    with_tokens(tmp_path / "a")
    assert convert(tmp_path / "a", tmp_path / "b") == 0
    before, after = (tmp_path / name / "adapter_model.safetensors" for name in "ab")
    assert bytes_of(after) == bytes_of(before)
    assert config_of(tmp_path / "b")["trainable_token_indices"] == {"embed_tokens": [3, 1]}
    one, other = (load_adapters(tmp_path / name).tokens for name in "ab")
    assert one == other != {}


def state_dict_of_two(folder):
    """Write a state dict of PEFT with the adapters "x" and "y", a head and tokens of each."""
    write_adapter(folder, modules_to_save=["head"], trainable_token_indices=[3, 1])
    path = folder / "adapter_model.safetensors"
    own = load_file(path)
    rng = np.random.default_rng(9)
    whole = {
        name: {f"{PREFIX}head.weight": draw(rng, 3, 4), TOKENS: draw(rng, 2, 5)} for name in "xy"
    }
    tensors = {f"{PREFIX}head.original_module.weight": draw(rng, 3, 4)}
    for name, added in whole.items():
        tensors |= {
            re.sub(r"(lora_[AB]|lora_magnitude_vector)", rf"\1.{name}", key): value + (name == "y")
            for key, value in own.items()
        }
        head, rows = added.values()
        tensors |= {f"{PREFIX}head.modules_to_save.{name}.weight": head, f"{TOKENS}.{name}": rows}
    save_file(tensors, path)


def test_one_adapter_of_a_state_dict_has_the_names_that_peft_loads(tmp_path):
    state_dict_of_two(tmp_path / "a")
    options = ["--adapter-name", "x"]
    paths = [str(tmp_path / "a"), "--to", "peft", "--out", str(tmp_path / "b")]
    assert main(["convert", *paths, *options]) == 0
    found = load_file(tmp_path / "b" / "adapter_model.safetensors")
    source = load_file(tmp_path / "a" / "adapter_model.safetensors")
    desired = {
        re.sub(r"(\.modules_to_save)?\.x(?=\.weight$)|\.x$", "", name): value
        for name, value in source.items()
        if not re.search(r"\.y(\.weight)?$", name)
    }
    assert found.keys() == desired.keys()
    for name, value in found.items():
        np.testing.assert_array_equal(value, desired[name])
