"""How an adapter fits a base: the options, the guard of the norms, and advice that works."""

from __future__ import annotations

import pathlib
import re
import shlex
import shutil

import numpy as np
import pytest
from checkpoints import (
    ALPHA,
    PREFIX,
    RANK,
    assert_merged,
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

from doraxp.checkpoint import (
    CheckpointError,
    Fit,
    _norm_guard,
    load_adapters,
    named_for,
    open_model,
)
from doraxp.cli import main

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"


@pytest.fixture
def rng():
    return np.random.default_rng(12)


def model(folder, rng, *paths, shape=(6, 5), **config):
    return write_base(
        folder / "base", {f"{path}.weight": draw(rng, *shape) for path in paths}, **config
    )


def adapt(rng, base, paths):
    """Return A, B and m by module, and the merged weights; `paths` has the tensors' modules."""
    leaves = {path: near(rng, base[f"{own}.weight"]) for path, own in paths.items()}
    return leaves, {
        f"{own}.weight": dense(base[f"{own}.weight"], *leaves[path]) for path, own in paths.items()
    }


def advised(error, option):
    """Return the arguments of an option as the error prints them, as a shell reads them."""
    words = shlex.shlex(error[error.index(option) :], posix=True)
    words.whitespace_split = True
    return [words.get_token(), words.get_token()]


# --rename

RENAMED = [
    ("net.block.h", "model.trunk"),
    ("", "x.y"),
    ("a.b.c", ""),
    ("a+b.[c].d", "x.z"),
    ("it's", r"x\1"),
]
"""The beginnings of an adapter's names, and of the base's."""


@pytest.mark.parametrize(("own", "there"), RENAMED)
def test_the_rename_that_the_error_prints_merges(tmp_path, rng, capsys, own, there):
    """It is for all modules whose names begin alike."""
    ends = ("0.q", "0.v")
    paths = {f"{own}.{end}".strip("."): f"{there}.{end}".strip(".") for end in ends}
    base = model(tmp_path, rng, *paths.values())
    leaves, changed = adapt(rng, base, paths)
    write_peft(tmp_path / "adapter", leaves)
    error = refused(tmp_path, capsys)
    assert f"; the nearest is by name {paths[f'{own}.0.q'.strip('.')]}.weight" in error
    check(tmp_path, base, changed, *advised(error, "--rename"))
    assert error.count("the nearest is") == 1


def test_without_a_tensor_of_a_like_name_no_rename_is_advised(tmp_path, rng, capsys):
    base = model(tmp_path, rng, "a.b")
    leaves, changed = adapt(rng, base, {"c.d": "a.b"})
    write_peft(tmp_path / "adapter", leaves)
    assert "--rename" not in refused(tmp_path, capsys)
    check(tmp_path, base, changed, "--rename", r"^c\.d$=a.b")


@pytest.mark.parametrize("lead", ["model.layers", "layers"])
def test_a_base_with_fewer_blocks_is_told(tmp_path, rng, capsys, lead):
    base = model(tmp_path, rng, *(f"layers.{place}.{x}" for place in (0, 1) for x in "qk"))
    paths = {f"{lead}.{place}.{x}": f"layers.0.{x}" for place in range(4) for x in "qk"}
    write_peft(tmp_path / "adapter", adapt(rng, base, paths)[0])
    error = refused(tmp_path, capsys)
    assert f"the base has no {lead}.2.k.weight for an adapter of shape (6, 5); block 2" in error
    assert f"block 2 of {lead} is beyond the last one of the base, so the base has fewer" in error
    assert "--rename" not in error


@pytest.mark.parametrize("missing", ["layers.2.q", "q"])
def test_a_block_that_lacks_a_module_is_not_beyond_the_last_one(tmp_path, rng, capsys, missing):
    base = model(tmp_path, rng, "layers.0.q", "layers.1.k", "layers.2.k")
    own = dict.fromkeys(("layers.0.q", missing), "layers.0.q")
    write_peft(tmp_path / "adapter", adapt(rng, base, own)[0])
    error = refused(tmp_path, capsys)
    assert f"the base has no {missing}.weight" in error
    assert "fewer blocks" not in error


@pytest.mark.parametrize("more", [[], ["layers.1.v"], ["x.v"]])
def test_a_tensor_of_another_module_is_not_advised(tmp_path, rng, capsys, more):
    base = model(tmp_path, rng, "layers.0.q", "layers.0.v", "layers.2.q", *more)
    own = dict.fromkeys(("layers.0.q", "layers.0.v", "layers.1.v", "layers.2.q"), "layers.0.q")
    write_peft(tmp_path / "adapter", adapt(rng, base, own)[0])
    if "layers.1.v" in more:
        assert merge(tmp_path) == 0
        return
    error = refused(tmp_path, capsys)
    assert "the base has no layers.1.v.weight" in error
    assert "layers.0.v" not in error
    assert "fewer blocks" not in error


def test_a_tensor_that_another_module_has_is_not_advised(tmp_path, rng, capsys):
    """The magnitudes of both modules are the norms of the one that BASE has."""
    base = model(tmp_path, rng, "a.q")
    a, b, _ = near(rng, base["a.q.weight"])
    leaves = a, b, np.linalg.norm(base["a.q.weight"], axis=1)
    write_peft(tmp_path / "adapter", {"a.q": leaves, "c.d": leaves})
    error = refused(tmp_path, capsys)
    assert "the base has no c.d.weight" in error
    assert "--rename" not in error


def test_a_tensor_whose_name_no_option_can_give_is_not_advised(tmp_path, rng, capsys):
    base = model(tmp_path, rng, "a=b.q.v")
    write_peft(tmp_path / "adapter", adapt(rng, base, {"x.q.v": "a=b.q.v"})[0])
    assert "--rename" not in refused(tmp_path, capsys)


def test_renames_are_made_one_after_another_in_the_names_of_all_tensors(tmp_path, rng):
    """An equals sign may be in the expression: the last one ends it."""
    base = model(tmp_path, rng, "a.q", "a.v")
    base["a.q.bias"] = draw(rng, 6)
    save_file(base, tmp_path / "base" / "model.safetensors")
    leaves, changed = adapt(rng, base, {"x1.q": "a.q", "x2.v": "a.v"})
    changed["a.q.bias"] = draw(rng, 6)
    write_peft(
        tmp_path / "adapter", leaves, {f"{PREFIX}x1.q.bias": changed["a.q.bias"]}, bias="all"
    )
    check(tmp_path, base, changed, "--rename", r"^x\d(?=\.)=y", "--rename", "y=a")


@pytest.mark.parametrize(
    ("text", "message"),
    [("(=x", "'(' is not a regular expression"), ("abc", "must be REGEX=NEW, got 'abc'")],
)
def test_a_rename_that_is_not_an_expression_is_refused(tmp_path, rng, capsys, text, message):
    write_peft(tmp_path / "adapter", adapt(rng, model(tmp_path, rng, "a"), {"a": "a"})[0])
    with pytest.raises(SystemExit, match="2"):
        merge(tmp_path, "--rename", text)
    assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"a rename must be REGEX=NEW, got '\('"):
        Fit((("(", "x"),))


# Several tensors that may be meant


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("own", ["", "x."])
def test_the_options_of_an_ambiguity_merge(tmp_path, rng, capsys, own, place):
    leads = ("text.", "vision.")
    ends = ("layers.0.q", "layers.0.v")
    base = model(tmp_path, rng, *(f"{lead}{end}" for lead in leads for end in ends))
    leaves, changed = adapt(rng, base, {f"{own}{x}": f"{leads[place]}{x}" for x in ends})
    write_peft(tmp_path / "adapter", leaves)
    error = refused(tmp_path, capsys)
    if own:  # of no stage
        check(tmp_path, base, changed, "--rename", f"^x[.]={leads[place]}")
        return
    assert "layers.0.q.weight may be text.layers.0.q.weight or vision.layers.0.q.weight" in error
    options = error.split("--rename")[1:]
    assert len(options) == 2
    assert f" takes {leads[place]}layers.0.q.weight" in options[place]
    check(tmp_path, base, changed, *advised(f"--rename{options[place]}", "--rename"))


def test_where_no_one_option_is_enough_each_module_needs_its_name(tmp_path, rng, capsys):
    """The tables of two families give two names. The advice is followed."""
    paths = [f"b.{place}.{name}.query" for place in (0, 1) for name in ("attention", "self")]
    base = model(tmp_path, rng, *paths)
    own = {f"b.{place}.q_proj": f"b.{place}.self.query" for place in (0, 1)}
    leaves, changed = adapt(rng, base, own)
    write_peft(tmp_path / "adapter", leaves)
    error = refused(tmp_path, capsys)
    assert "b.0.q_proj.weight may be b.0.attention.query.weight or b.0.self.query.weight" in error
    assert "; name the tensor of each module with --rename REGEX=NEW" in error
    options = [x for pair in own.items() for x in ("--rename", "=".join(pair))]
    check(tmp_path, base, changed, *options)


def test_two_ways_that_agree_are_one(tmp_path, rng):
    """The norm is found by the second way alone, without `model`."""
    base = model(tmp_path, rng, "a.q")
    base["a.model.norm.weight"] = draw(rng, 3)
    save_file(base, tmp_path / "base" / "model.safetensors")
    leaves, changed = adapt(rng, base, {"q": "a.q"})
    changed["a.model.norm.weight"] = draw(rng, 3)
    whole = {f"{PREFIX}norm.weight": changed["a.model.norm.weight"]}
    write_peft(tmp_path / "adapter", leaves, whole, modules_to_save=["norm"])
    check(tmp_path, base, changed)


# One of several adapters


def test_a_folder_of_several_adapters_needs_the_name_of_one(tmp_path, rng, capsys):
    base = model(tmp_path, rng, Q)
    (tmp_path / "adapter").mkdir()
    results = {}
    for name in ("one", "two"):
        leaves, results[name] = adapt(rng, base, {Q: Q})
        write_peft(tmp_path / "adapter" / name, leaves)
    error = refused(tmp_path, capsys)
    assert "has the adapters one, two: choose one with --subfolder NAME" in error
    check(tmp_path, base, results["two"], "--subfolder", "two")
    converted = tmp_path / "converted"
    arguments = ["convert", str(tmp_path / "adapter"), "--to", "mlx", "--out", str(converted)]
    assert main(arguments) == 2
    assert "--subfolder NAME" in capsys.readouterr().err
    assert main([*arguments, "--subfolder", "one"]) == 0
    shutil.rmtree(tmp_path / "out")
    shutil.rmtree(tmp_path / "adapter")
    converted.rename(tmp_path / "adapter")
    check(tmp_path, base, results["one"])


def test_a_folder_without_an_adapter_is_refused(tmp_path, rng, capsys):
    model(tmp_path, rng, Q)
    (tmp_path / "adapter").mkdir()
    assert "the folder must contain adapters.safetensors or" in refused(tmp_path, capsys)


def two_in_a_file(folder, rng, base):
    """Write the state dict of PEFT with two adapters; return the merged weights of each."""
    results, tensors = {}, {}
    for name in ("default", "other"):
        leaves, results[name] = adapt(rng, base, {Q: Q})
        ends = ("lora_A.{}.weight", "lora_B.{}.weight", "lora_magnitude_vector.{}.weight")
        for end, leaf in zip(ends, leaves[Q], strict=True):
            tensors[f"{PREFIX}{Q}.{end.format(name)}"] = leaf
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    write_json(folder / "adapter_config.json", peft_config())
    return results


def test_a_file_of_several_adapters_needs_the_name_of_one(tmp_path, rng, capsys):
    base = model(tmp_path, rng, Q)
    results = two_in_a_file(tmp_path / "adapter", rng, base)
    error = refused(tmp_path, capsys)
    assert "has the adapters default, other: choose one with --adapter-name NAME" in error
    for name, changed in results.items():
        check(tmp_path, base, changed, "--adapter-name", name)
        shutil.rmtree(tmp_path / "out")
    error = refused(tmp_path, capsys, "--adapter-name", "third")
    assert "adapter_name must be one of default, other, got 'third'" in error
    paths = [str(tmp_path / name) for name in ("base", "adapter", "out")]
    check(tmp_path, base, results["other"], "--adapter-name", "other")
    assert main(["audit", *paths, "--adapter-name", "other"]) == 0
    assert main(["audit", *paths, "--adapter-name", "default"]) == 1


def test_an_adapter_of_any_name_that_is_alone_needs_no_option(tmp_path, rng):
    base = model(tmp_path, rng, Q)
    results = two_in_a_file(tmp_path / "adapter", rng, base)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: x for name, x in load_file(file).items() if ".other" in name}, file)
    check(tmp_path, base, results["other"])


def test_a_format_without_names_has_no_adapter_of_a_name(tmp_path, rng, capsys):
    base = model(tmp_path, rng, "a")
    a, b, m = near(rng, base["a.weight"])
    names = ("lora_down.weight", "lora_up.weight", "dora_scale")
    (tmp_path / "adapter").mkdir()
    leaves = zip(names, (a, b, m.reshape(-1, 1)), strict=True)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({f"lora_unet_a.{name}": leaf for name, leaf in leaves}, file)
    error = refused(tmp_path, capsys, "--adapter-name", "x")
    assert "has one adapter without a name, got the name 'x'" in error
    check(tmp_path, base, {"a.weight": dense(base["a.weight"], a, b, m, 1)})


# The guard of the norms

TALL = (20, 6)


def scaled(rng, *shape):
    """Return a weight whose rows have norms of several sizes, as trained ones have."""
    weight = draw(rng, *shape)
    return (weight * (0.5 + rng.random((len(weight), *[1] * (weight.ndim - 1))))).astype("float32")


def two(folder, rng, **others):
    tensors = {f"{name}.weight": scaled(rng, *TALL) for name in ("h.a", "h.b")}
    return write_base(folder / "base", tensors | others)


def test_magnitudes_of_another_tensor_show_a_wrong_match(tmp_path, rng, capsys):
    """The advice is followed: the adapter is for the tensor that the error names."""
    base = two(tmp_path, rng)
    leaves = near(rng, base["h.b.weight"])
    leaves = (*leaves[:2], np.linalg.norm(base["h.b.weight"], axis=1) * 1.01)
    write_peft(tmp_path / "adapter", {"h.a": (*leaves[:2], leaves[2].astype("float32"))})
    error = refused(tmp_path, capsys)
    assert (
        "h.a was matched to h.a.weight, but its magnitudes are the row norms of h.b.weight: name "
        "that one with --rename"
    ) in error
    changed = {"h.b.weight": dense(base["h.b.weight"], *leaves)}
    check(tmp_path, base, changed, "--rename", r"^h\.a$=h.b")


def test_an_error_names_the_tensor_that_has_the_magnitudes(tmp_path, rng, capsys):
    base = {"a.b.weight": scaled(rng, 32, 8), "c.d.weight": scaled(rng, 32, 8)}
    write_base(tmp_path / "base", base)
    leaves = near(rng, base["c.d.weight"])
    leaves = (*leaves[:2], np.linalg.norm(base["c.d.weight"], axis=1))
    write_peft(tmp_path / "adapter", {"x.y": leaves})
    error = refused(tmp_path, capsys)
    assert "the nearest is by magnitude c.d.weight" in error
    check(
        tmp_path,
        base,
        {"c.d.weight": dense(base["c.d.weight"], *leaves)},
        *advised(error, "--rename"),
    )


def test_names_of_image_models_are_known_in_an_adapter_of_peft_too(tmp_path, rng):
    base = model(tmp_path, rng, "down_blocks.0.attentions.0.proj_in")
    leaves, changed = adapt(rng, base, {"input_blocks.1.1.proj_in": next(iter(base))[:-7]})
    write_peft(tmp_path / "adapter", leaves)
    check(tmp_path, base, changed)


def test_out_has_the_name_of_a_safetensors_file(tmp_path, rng, capsys):
    base = {"a.b.weight": draw(rng, 6, 5)}
    save_file(base, tmp_path / "base.safetensors")
    write_peft(tmp_path / "adapter", {"a.b": near(rng, base["a.b.weight"])})
    paths = [str(tmp_path / name) for name in ("base.safetensors", "adapter", "out.onnx")]
    assert main(["merge", *paths[:2], "--out", paths[2]]) == 2
    assert "must end in .safetensors, not in .onnx" in capsys.readouterr().err
    assert not (tmp_path / "out.onnx").exists()


def test_a_shard_of_a_pickled_model_is_converted_with_its_index(tmp_path, rng, capsys):
    base = model(tmp_path, rng, Q)
    write_peft(tmp_path / "adapter", adapt(rng, base, {Q: Q})[0])
    (tmp_path / "base" / "model.safetensors").unlink()
    (tmp_path / "base" / "pytorch_model-00001-of-00002.bin").write_bytes(b"a pickle")
    error = refused(tmp_path, capsys)
    assert f".from_pretrained('{tmp_path / 'base'}').save_pretrained(" in error


def test_a_fused_weight_of_another_shape_is_named_by_the_audit(tmp_path, rng, capsys):
    base = {"layers.0.attn.qkv.weight": draw(rng, 18, 5)}
    write_base(tmp_path / "base", base)
    query = near(rng, base["layers.0.attn.qkv.weight"][:6])
    write_peft(tmp_path / "adapter", {"layers.0.attention.q_proj": query})
    write_base(tmp_path / "out", {"layers.0.attn.qkv.weight": draw(rng, 12, 5)})
    paths = [str(tmp_path / name) for name in ("base", "adapter", "out")]
    assert main(["audit", *paths]) == 1
    assert "another shape" in capsys.readouterr().out


def test_magnitudes_in_another_order_show_permuted_rows(tmp_path, rng, capsys):
    base = two(tmp_path, rng)
    a, b, _ = near(rng, base["h.a.weight"])
    m = rng.permutation(np.linalg.norm(base["h.a.weight"], axis=1))
    write_peft(tmp_path / "adapter", {"h.a": (a, b, m)})
    assert "BASE stores the rows in another order than the module" in refused(tmp_path, capsys)


@pytest.mark.parametrize("seed", [53, 71, 130, 154, 172, 214])
def test_a_right_adapter_of_few_rows_passes_the_guard(tmp_path, seed):
    """Its magnitudes were trained by as much as the norms vary; 24 look like another order."""
    rng = np.random.default_rng(seed)
    norms = 1 + 0.12 * rng.standard_normal(24)
    m = norms * (1 + 0.12 * rng.standard_normal(24))
    weight = draw(rng, 24, 8)
    weight *= (norms / np.linalg.norm(weight, axis=1))[:, None].astype("float32")
    base = write_base(tmp_path / "base", {"h.a.weight": weight})
    a, b, _ = near(rng, weight)
    m = m.astype("float32")
    write_peft(tmp_path / "adapter", {"h.a": (a, b, m)})
    check(tmp_path, base, {"h.a.weight": dense(weight, a, b, m)})


@pytest.mark.parametrize(("rows", "trained"), [(128, 0.02), (128, 0.05), (24, 0.0)])
def test_magnitudes_in_another_order_are_refused_among_many_modules(
    tmp_path, rng, capsys, rows, trained
):
    """The other modules are right, and have other shapes."""
    weights = {f"h.{place}.weight": scaled(rng, 16, 7) for place in range(40)}
    norms = 1 + 0.12 * rng.standard_normal(rows)
    weight = draw(rng, rows, 8)
    weight *= (norms / np.linalg.norm(weight, axis=1))[:, None].astype("float32")
    base = write_base(tmp_path / "base", {"h.a.weight": weight, **weights})
    leaves = {name.removesuffix(".weight"): near(rng, base[name]) for name in weights}
    m = rng.permutation(norms) * (1 + trained * rng.standard_normal(rows))
    leaves["h.a"] = (*near(rng, weight)[:2], m.astype("float32"))
    write_peft(tmp_path / "adapter", leaves)
    error = refused(tmp_path, capsys)
    assert "h.a was matched to h.a.weight" in error
    assert "BASE stores the rows in another order than the module" in error


def test_magnitudes_of_embeddings_are_in_the_order_of_the_dimensions(tmp_path, rng):
    """Their norms are much alike, so that trained ones may look like others in another order."""
    embeddings = scaled(rng, *TALL).T.copy()
    base = write_base(tmp_path / "base", {"embed.weight": embeddings})
    a, b, _ = near(rng, embeddings.T)
    m = rng.permutation(np.linalg.norm(embeddings, axis=0))
    names = ("lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
    leaves = dict(zip(names, (a, b, m), strict=True))
    whole = {f"{PREFIX}embed.{name}": leaf for name, leaf in leaves.items()}
    write_peft(tmp_path / "adapter", {}, whole)
    check(tmp_path, base, {"embed.weight": dense(embeddings.T, a, b, m).T})


def test_the_guard_reads_a_transposed_and_a_convolution_too(tmp_path, rng, capsys):
    tensors = {f"h.{name}.weight": scaled(rng, *TALL).T.copy() for name in "ab"}
    tensors |= {f"c.{name}.weight": scaled(rng, 20, 3, 2, 2) for name in "ab"}
    base = write_base(tmp_path / "base", tensors)
    norms = np.linalg.norm(base["h.b.weight"], axis=0)
    a, b, _ = near(rng, base["h.a.weight"].T)
    write_peft(tmp_path / "adapter", {"h.a": (a, b, norms)}, fan_in_fan_out=True)
    assert "row norms of h.b.weight" in refused(tmp_path, capsys)
    shutil.rmtree(tmp_path / "adapter")
    a, b, _ = near(rng, base["c.a.weight"])
    norms = np.linalg.norm(base["c.b.weight"].reshape(20, -1), axis=1)
    conv = (a.reshape(RANK, 3, 2, 2), b.reshape(20, RANK, 1, 1), norms)
    write_peft(tmp_path / "adapter", {"c.a": conv})
    assert "row norms of c.b.weight" in refused(tmp_path, capsys)


@pytest.mark.parametrize(
    "title", ["trained", "random", "few rows", "alike", "doubled", "zero", "constant"]
)
def test_other_magnitudes_pass_the_guard(tmp_path, rng, title):
    """Far from all tensors, near the own one, or in a matrix that is too small to tell."""
    rows = 15 if title == "few rows" else 20
    tensors = {f"h.{name}.weight": scaled(rng, rows, 6) for name in "ab"}
    if title == "alike":
        tensors["h.b.weight"] = tensors["h.a.weight"].copy()
    if title == "doubled":  # norms that rise and fall with the own ones tell nothing
        tensors["h.b.weight"] = 2 * tensors["h.a.weight"]
    if title == "zero":
        tensors["h.a.weight"] *= 0
    if title == "constant":
        tensors["h.b.weight"] /= np.linalg.norm(tensors["h.b.weight"], axis=1, keepdims=True)
    base = write_base(tmp_path / "base", tensors)
    norms = {name: np.linalg.norm(base[f"h.{name}.weight"], axis=1) for name in "ab"}
    m = {
        "trained": norms["a"] * (1 + 0.3 * rng.standard_normal(rows)),
        "random": rng.random(rows),
        "few rows": norms["b"],
        "alike": norms["b"] * 1.2,
        "doubled": norms["b"],
        "zero": rng.random(rows),
        "constant": np.ones(rows),
    }[title].astype("float32")
    a, b, _ = near(rng, base["h.a.weight"])
    write_peft(tmp_path / "adapter", {"h.a": (a, b, m)})
    check(tmp_path, base, {"h.a.weight": dense(base["h.a.weight"], a, b, m)})


def test_a_large_transposed_weight_is_not_looked_at(tmp_path, rng, monkeypatch):
    monkeypatch.setattr(_norm_guard, "_LARGEST", 0)
    tensors = {f"h.{name}.weight": scaled(rng, *TALL).T.copy() for name in "ab"}
    base = write_base(tmp_path / "base", tensors)
    a, b, _ = near(rng, base["h.a.weight"].T)
    m = np.linalg.norm(base["h.b.weight"], axis=0)
    write_peft(tmp_path / "adapter", {"h.a": (a, b, m)}, fan_in_fan_out=True)
    check(tmp_path, base, {"h.a.weight": dense(base["h.a.weight"].T, a, b, m).T})
    shutil.rmtree(tmp_path / "out")
    write_json(
        tmp_path / "adapter" / "adapter_config.json",
        peft_config(fan_in_fan_out=True, init_lora_weights="olora"),
    )
    assert merge(tmp_path) == 2
    assert merge(tmp_path, "--base-is-residual") == 0


# torchtune's export

TUNE = {"target_modules": ["q_proj"], "base_model_name_or_path": "base"}


def tune(folder, rng, *, heads=4, kv_heads=2, added=None, config=None):
    """Write torchtune's export of q, k and v; return the base's tensors and the merged weights."""
    rows = {"q_proj": 4 * heads, "k_proj": 4 * kv_heads, "v_proj": 4 * kv_heads}
    lead = "model.layers.0.self_attn"
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    tensors = {f"{lead}.{name}.weight": draw(rng, size, 5) for name, size in rows.items()}
    base = write_base(folder / "base", tensors, **(sizes if config is None else config(sizes)))
    leaves, changed = adapt(rng, base, {f"{lead}.{name}": f"{lead}.{name}" for name in rows})
    stored = {}
    for path, (a, b, m) in leaves.items():
        count = {"q": heads, "k": kv_heads, "v": None}[path[-6]]
        # The two numbers of a rotation are side by side in the file, and half a head apart in m.
        by_pairs = m if count is None else m.reshape(count, 2, -1).swapaxes(1, 2).reshape(-1)
        stored[path] = (a, b, by_pairs)
    write_peft(folder / "adapter", stored)
    entries = {"r": RANK, "lora_alpha": ALPHA, "peft_type": "LORA", **TUNE, **(added or {})}
    write_json(folder / "adapter" / "adapter_config.json", entries)
    return base, changed


@pytest.mark.parametrize("added", [{}, {"use_dora": True}])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 3), (4, 1)])
def test_the_magnitudes_of_torchtune_are_put_in_order(tmp_path, rng, added, heads, kv_heads):
    base, changed = tune(tmp_path, rng, heads=heads, kv_heads=kv_heads, added=added)
    check(tmp_path, base, changed)
    paths = [str(tmp_path / name) for name in ("base", "adapter", "out")]
    assert main(["audit", *paths]) == 0


def test_the_heads_may_be_in_the_part_of_the_text(tmp_path, rng):
    base, changed = tune(tmp_path, rng, config=lambda sizes: {"text_config": sizes})
    check(tmp_path, base, changed)


def test_without_heads_of_keys_those_of_queries_count(tmp_path, rng):
    base, changed = tune(tmp_path, rng, kv_heads=4, config=lambda sizes: {"num_attention_heads": 4})
    check(tmp_path, base, changed)


@pytest.mark.parametrize("heads", [None, 3, "4", 0, -4, 16])
def test_heads_that_do_not_divide_the_rows_are_refused(tmp_path, rng, capsys, heads):
    """The advice is followed: a config.json with the number of heads."""
    base, changed = tune(tmp_path, rng, config=lambda sizes: {"num_attention_heads": heads})
    error = refused(tmp_path, capsys)
    assert "BASE must have a config.json whose num_attention_heads divides 16 rows" in error
    write_json(
        tmp_path / "base" / "config.json", {"num_attention_heads": 4, "num_key_value_heads": 2}
    )
    check(tmp_path, base, changed)


def test_a_conversion_puts_the_magnitudes_in_order_with_the_base(tmp_path, rng, capsys):
    base, changed = tune(tmp_path, rng)
    assert convert(tmp_path, "peft") == 2
    error = capsys.readouterr().err
    assert "the magnitudes of q and k have torchtune's order of rows" in error
    assert "give the model, with --base BASE" in error
    assert convert(tmp_path, "peft", "--base", str(tmp_path / "base")) == 0
    use_converted(tmp_path)
    check(tmp_path, base, changed)


# Conversions with the base's names


def convert(folder, to, *arguments):
    out = ["--to", to, "--out", str(folder / "converted")]
    return main(["convert", str(folder / "adapter"), *out, *arguments])


def use_converted(folder):
    shutil.rmtree(folder / "adapter")
    (folder / "converted").rename(folder / "adapter")


def write_kohya(folder, leaves, alpha=ALPHA):
    """Write a file of kohya's names: A, B and m by the name with its prefix."""
    names = ("lora_down.weight", "lora_up.weight", "dora_scale")
    tensors = {}
    for key, (a, b, m) in leaves.items():
        for name, leaf in zip(names, (a, b, m.reshape(-1, 1)), strict=True):
            tensors[f"{key}.{name}"] = leaf
        tensors[f"{key}.alpha"] = np.asarray(alpha, np.float32)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("to", ["peft", "mlx", "diffusers"])
def test_a_conversion_takes_the_names_of_the_base(tmp_path, rng, capsys, to):
    """Without the base it is refused, and the error says so."""
    base = model(tmp_path, rng, "down_blocks.0.to_q", "mid.to_v")
    paths = {
        f"lora_unet_{path.replace('.', '_')}": path for path in ("down_blocks.0.to_q", "mid.to_v")
    }
    leaves, changed = adapt(rng, base, paths)
    write_kohya(tmp_path / "adapter", leaves)
    assert convert(tmp_path, to) == 2
    assert "give the model, with --base BASE" in capsys.readouterr().err
    assert convert(tmp_path, to, "--base", str(tmp_path / "base")) == 0
    assert set(load_adapters(tmp_path / "converted")) == set(paths.values())
    use_converted(tmp_path)
    check(tmp_path, base, changed)


@pytest.mark.parametrize("to", ["peft", "diffusers"])
def test_a_module_that_the_base_has_in_several_becomes_several(tmp_path, rng, to):
    """Queries, keys and values of Flux; and the two halves of its last modulation."""
    lead = "transformer_blocks.0.attn"
    names = [f"{lead}.to_{part}" for part in "qkv"]
    base = model(tmp_path, rng, *names, "norm_out.linear", shape=(10, 5))
    qkv = np.concatenate([base[f"{name}.weight"] for name in names])
    swapped = np.concatenate(np.split(base["norm_out.linear.weight"], 2)[::-1])
    leaves = {
        "lora_unet_double_blocks_0_img_attn_qkv": near(rng, qkv),
        "lora_unet_final_layer_adaLN_modulation_1": near(rng, swapped),
    }
    merged, last = (
        dense(weight, *own) for weight, own in zip((qkv, swapped), leaves.values(), strict=True)
    )
    changed = {
        f"{name}.weight": rows for name, rows in zip(names, np.split(merged, 3), strict=True)
    }
    changed["norm_out.linear.weight"] = np.concatenate(np.split(last, 2)[::-1])
    write_kohya(tmp_path / "adapter", leaves)
    assert convert(tmp_path, to, "--base", str(tmp_path / "base")) == 0
    assert set(load_adapters(tmp_path / "converted")) == {*names, "norm_out.linear"}
    use_converted(tmp_path)
    check(tmp_path, base, changed)


def test_a_module_that_is_a_part_of_one_of_the_base_is_merged_and_not_converted(
    tmp_path, rng, capsys
):
    base = model(tmp_path, rng, "double_blocks.0.img_attn.qkv", shape=(15, 5))
    name = "double_blocks.0.img_attn.qkv.weight"
    leaves = near(rng, base[name][:5])
    write_kohya(tmp_path / "adapter", {"lora_unet_transformer_blocks_0_attn_to_q": leaves})
    assert convert(tmp_path, "peft", "--base", str(tmp_path / "base")) == 2
    error = capsys.readouterr().err
    assert "is only some rows of" in error
    assert "merge it instead, with doraxp merge" in error
    weight = base[name].astype(float)
    weight[:5] = dense(base[name][:5], *leaves)
    check(tmp_path, base, {name: weight})


def test_a_module_that_the_base_lacks_is_not_converted(tmp_path, rng, capsys):
    base = model(tmp_path, rng, "a")
    leaves, _ = adapt(rng, base, {"lora_unet_a": "a", "lora_unet_b": "a"})
    write_kohya(tmp_path / "adapter", leaves)
    assert convert(tmp_path, "peft", "--base", str(tmp_path / "base")) == 2
    assert "the base has no lora_unet_b.weight" in capsys.readouterr().err


def test_two_modules_of_one_name_are_not_converted(tmp_path, rng, capsys):
    base = model(tmp_path, rng, "a")
    leaves, _ = adapt(rng, base, {"lora_unet_a": "a", "lora_transformer_a": "a"})
    write_kohya(tmp_path / "adapter", leaves)
    assert convert(tmp_path, "peft", "--base", str(tmp_path / "base")) == 2
    assert "two modules are for a.weight" in capsys.readouterr().err
    assert merge(tmp_path) == 2
    assert "are both for a.weight" in capsys.readouterr().err


def test_differences_of_norms_are_merged_and_not_converted(tmp_path, rng, capsys):
    base = model(tmp_path, rng, "a")
    base["norm.weight"] = draw(rng, 3)
    save_file(base, tmp_path / "base" / "model.safetensors")
    leaves, changed = adapt(rng, base, {"a": "a"})
    write_kohya(tmp_path / "adapter", {"lora_unet_a": leaves["a"]})
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    difference = draw(rng, 3)
    save_file(load_file(file) | {"lora_unet_norm.w_norm": difference}, file)
    assert convert(tmp_path, "peft", "--base", str(tmp_path / "base")) == 2
    error = capsys.readouterr().err
    assert (
        "which is added to that of the base, and a conversion does not write such tensors" in error
    )
    check(tmp_path, base, changed | {"norm.weight": base["norm.weight"] + difference})


def pipeline(folder, rng, *parts):
    """Write a pipeline with one weight in each part."""
    write = {}
    (folder / "base").mkdir()
    write_json(folder / "base" / "model_index.json", {})
    for part in parts:
        (folder / "base" / part).mkdir()
        write[part] = draw(rng, 6, 5)
        save_file({"a.q.weight": write[part]}, folder / "base" / part / "model.safetensors")
    return write


@pytest.mark.parametrize("parts", [("unet",), ("text_encoder", "unet")])
def test_a_conversion_for_a_pipeline_names_its_parts(tmp_path, rng, parts):
    """The loader of a pipeline finds the modules of a part by its name."""
    base = pipeline(tmp_path, rng, *parts)
    keys = {"unet": "lora_unet_a_q", "text_encoder": "lora_te_a_q"}
    leaves = {keys[part]: near(rng, weight) for part, weight in base.items()}
    write_kohya(tmp_path / "adapter", leaves)
    assert convert(tmp_path, "diffusers", "--base", str(tmp_path / "base")) == 0
    assert set(load_adapters(tmp_path / "converted")) == {f"{part}.a.q" for part in parts}
    use_converted(tmp_path)
    assert merge(tmp_path, "--verify") == 0
    for part, weight in base.items():
        merged = read_folder(tmp_path / "out" / part)["a.q.weight"]
        np.testing.assert_allclose(merged, dense(weight, *leaves[keys[part]]), rtol=1e-5, atol=1e-6)


def test_diffusers_has_parts_in_all_names_or_in_none(tmp_path, rng, capsys):
    base = model(tmp_path, rng, "unet.a", "other.a")
    leaves, _ = adapt(rng, base, {"unet.a": "unet.a", "other.a": "other.a"})
    write_peft(tmp_path / "adapter", leaves)
    assert convert(tmp_path, "diffusers") == 2
    assert "other.a: each path must begin with a part of the pipeline" in capsys.readouterr().err


def test_a_conversion_renames_first(tmp_path, rng):
    base = model(tmp_path, rng, "x.q")
    leaves, changed = adapt(rng, base, {"net.h.q": "x.q"})
    write_peft(tmp_path / "adapter", leaves)
    arguments = ["--base", str(tmp_path / "base"), "--rename", r"^net\.h=x"]
    assert convert(tmp_path, "peft", *arguments) == 0
    use_converted(tmp_path)
    assert set(load_adapters(tmp_path / "adapter")) == {"x.q"}
    check(tmp_path, base, changed)


def test_named_for_raises_where_the_names_do_not_fit(tmp_path, rng):
    base = model(tmp_path, rng, "x.q")
    write_peft(tmp_path / "adapter", adapt(rng, base, {"net.h.v": "x.q"})[0])
    with pytest.raises(CheckpointError, match=r"the base has no net\.h\.v\.weight"):
        named_for(open_model(tmp_path / "base"), load_adapters(tmp_path / "adapter"))


# Advice


@pytest.mark.parametrize("change", [{"init_lora_weights": "pissa"}, {"bias": "all"}])
def test_a_conversion_keeps_what_a_merge_needs_or_is_refused(tmp_path, rng, capsys, change):
    """The advice is followed: PEFT has the entry, and a model without biases needs none."""
    base = model(tmp_path, rng, Q)
    leaves, changed = adapt(rng, base, {Q: Q})
    write_peft(tmp_path / "adapter", leaves, **change)
    assert convert(tmp_path, "mlx") == 2
    error = capsys.readouterr().err
    if "bias" in change:
        assert "if the model has no biases, set bias to 'none' there" in error
        write_json(tmp_path / "adapter" / "adapter_config.json", peft_config(bias="none"))
        assert convert(tmp_path, "mlx") == 0
        use_converted(tmp_path)
        check(tmp_path, base, changed)
    else:
        assert "convert it to the format 'peft', which keeps the entry" in error
        assert convert(tmp_path, "peft") == 0
        use_converted(tmp_path)
        assert "with --base-is-residual" in refused(tmp_path, capsys)


def test_whole_tensors_are_merged_and_not_converted(tmp_path, rng, capsys):
    base = model(tmp_path, rng, Q, "lm_head")
    leaves, changed = adapt(rng, base, {Q: Q})
    changed["lm_head.weight"] = draw(rng, 6, 5)
    write_peft(tmp_path / "adapter", leaves, {f"{PREFIX}lm_head.weight": changed["lm_head.weight"]})
    for to in ("mlx", "diffusers"):
        assert convert(tmp_path, to) == 2
        assert "merge it into its base instead, with doraxp merge" in capsys.readouterr().err
    check(tmp_path, base, changed)


def test_a_flag_that_denies_the_magnitudes_is_set_as_the_error_says(tmp_path, rng, capsys):
    base = model(tmp_path, rng, Q)
    leaves, changed = adapt(rng, base, {Q: Q})
    write_peft(tmp_path / "adapter", leaves, use_dora=False)
    assert "set it to true if DoRA was trained" in refused(tmp_path, capsys)
    write_json(tmp_path / "adapter" / "adapter_config.json", peft_config(use_dora=True))
    check(tmp_path, base, changed)


@pytest.mark.parametrize(
    ("folder", "name", "new"),
    [
        ("base", "pytorch_model.bin", "model.safetensors"),
        ("adapter", "adapter_model.bin", "adapter_model.safetensors"),
        ("base", "diffusion_pytorch_model.bin", None),
    ],
)
def test_a_pickle_is_converted_to_the_file_that_is_found(tmp_path, rng, capsys, folder, name, new):
    """The error has the new name; transformers finds a model of that name too."""
    base = model(tmp_path, rng, Q)
    leaves, changed = adapt(rng, base, {Q: Q})
    write_peft(tmp_path / "adapter", leaves)
    (file,) = (tmp_path / folder).glob("*.safetensors")
    tensors = load_file(file)
    file.unlink()
    (tmp_path / folder / name).write_bytes(b"a pickle")
    error = refused(tmp_path, capsys)
    if new is None:
        assert "or one safetensors file, got 0 of them" in error
        return
    assert "a pickle file can run any code" in error
    advised_path = pathlib.Path(re.search(r"\.items\(\)\}, '(.+?)'", error)[1])
    assert advised_path == tmp_path / folder / new
    save_file(tensors, advised_path)
    check(tmp_path, base, changed)


def test_the_folder_of_the_model_is_named(tmp_path, rng, capsys):
    """The advice is followed: sentence-transformers has the model in a folder of its own."""
    base = model(tmp_path, rng, Q)
    leaves, changed = adapt(rng, base, {Q: Q})
    write_peft(tmp_path / "adapter", leaves)
    (tmp_path / "base").rename(tmp_path / "0_Transformer")
    (tmp_path / "base").mkdir()
    (tmp_path / "0_Transformer").rename(tmp_path / "base" / "0_Transformer")
    (tmp_path / "base" / "2_Dense").mkdir()
    save_file({"a": draw(rng, 1)}, tmp_path / "base" / "2_Dense" / "model.safetensors")
    error = refused(tmp_path, capsys)
    folder = tmp_path / "base" / "0_Transformer"
    assert f"got 0 of them: give {folder}, the folder of the model" in error
    folder.rename(tmp_path / "model")
    shutil.rmtree(tmp_path / "base")
    (tmp_path / "model").rename(tmp_path / "base")
    check(tmp_path, base, changed)


def test_of_two_files_in_a_folder_one_must_be_given(tmp_path, rng, capsys):
    """The advice is followed."""
    base = model(tmp_path, rng, Q)
    leaves, changed = adapt(rng, base, {Q: Q})
    write_peft(tmp_path / "adapter", leaves)
    file = tmp_path / "base" / "model.safetensors"
    file.rename(file.with_name("a.safetensors"))
    for name in ("b.safetensors", "2_Dense/model.safetensors"):
        (file.parent / name).parent.mkdir(exist_ok=True)
        save_file({"a": draw(rng, 1)}, file.parent / name)
    assert "got 2 of them: give the one that is the model" in refused(tmp_path, capsys)
    (file.parent / "a.safetensors").rename(tmp_path / "a.safetensors")
    shutil.rmtree(tmp_path / "base")
    (tmp_path / "a.safetensors").rename(tmp_path / "base")
    assert merge(tmp_path) == 0
    assert_merged(load_file(tmp_path / "out"), base, changed)


def test_two_modules_for_one_tensor_are_refused(tmp_path, rng, capsys):
    base = model(tmp_path, rng, "a.q")
    leaves, _ = adapt(rng, base, {"x.q": "a.q", "y.q": "a.q"})
    write_peft(tmp_path / "adapter", leaves)
    error = refused(tmp_path, capsys, "--rename", "^x=a", "--rename", "^y=a")
    assert "x.q and y.q are both for a.q.weight" in error


def test_a_shape_that_does_not_fit_is_named(tmp_path, rng, capsys):
    base = model(tmp_path, rng, Q, V)
    leaves, _ = adapt(rng, base, {Q: Q})
    write_peft(tmp_path / "adapter", leaves | {V: near(rng, draw(rng, 7, 5))})
    error = refused(tmp_path, capsys)
    assert f"{V}.weight has shape (6, 5), but its adapter is for (7, 5)" in error


@pytest.mark.parametrize("scales", ["weight_scale", "weight_scale_inv", "scales", "weight.absmax"])
def test_a_quantised_weight_is_refused_by_name(tmp_path, rng, capsys, scales):
    """A weight that is not quantised, in the same model, merges."""
    base = model(tmp_path, rng, Q, V)
    base[f"{V}.{scales}"] = draw(rng, 6)
    save_file(base, tmp_path / "base" / "model.safetensors")
    leaves, changed = adapt(rng, base, {Q: Q})
    write_peft(tmp_path / "adapter", leaves)
    check(tmp_path, base, changed)
    shutil.rmtree(tmp_path / "out")
    shutil.rmtree(tmp_path / "adapter")
    leaves, _ = adapt(rng, base, {Q: Q, V: V})
    write_peft(tmp_path / "adapter", leaves)
    error = refused(tmp_path, capsys)
    assert f"{V}.weight is quantised" in error
    assert f"{Q}.weight is quantised" not in error
