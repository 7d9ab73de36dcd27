"""Models of several folders: pipelines of diffusers, and weights in sub-folders."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from checkpoints import (
    ALPHA,
    LEAVES,
    RANK,
    assert_merged,
    dense,
    draw,
    merge,
    near,
    read_folder,
    write_base,
    write_json,
    write_peft,
)
from safetensors.numpy import load_file, save_file

from doraxp.checkpoint import Options, _run, open_model, plan_merge, run_merge
from doraxp.cli import main

UNET = {
    "down_blocks.0.attentions.0.proj_in.weight": (6, 5, 1, 1),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight": (6, 5),
    "conv_out.weight": (4, 6, 3, 3),
    "conv_out.bias": (4,),
}
TEXT = {
    "text_model.encoder.layers.0.self_attn.q_proj.weight": (6, 5),
    "text_model.encoder.layers.0.self_attn.q_proj.bias": (6,),
    "text_model.encoder.layers.0.self_attn.v_proj.weight": (6, 5),
}
SINGLE = "diffusion_pytorch_model.safetensors"
LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture
def rng():
    return np.random.default_rng(10)


def write_shards(folder, stem, tensors):
    """Write a model of two shards, with its index."""
    names = list(tensors)
    shards = {
        f"{stem}-00001-of-00002.safetensors": names[:2],
        f"{stem}-00002-of-00002.safetensors": names[2:],
    }
    for file, own in shards.items():
        save_file({name: tensors[name] for name in own}, folder / file, {"format": "pt"})
    weight_map = {name: file for file, own in shards.items() for name in own}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    write_json(folder / f"{stem}.safetensors.index.json", index)


def write_pipeline(folder, rng, dtype="float32"):
    """Write a pipeline, and return its tensors by component and name."""
    tensors = {
        f"{part}.{name}": draw(rng, *shape, dtype=dtype)
        for part, shapes in (("text_encoder", TEXT), ("unet", UNET))
        for name, shape in shapes.items()
    }
    for part in ("unet", "text_encoder", "scheduler", "tokenizer"):
        (folder / part).mkdir(parents=True)
    write_json(folder / "model_index.json", {"_class_name": "StableDiffusionPipeline"})
    write_shards(folder / "unet", "diffusion_pytorch_model", of_part(tensors, "unet"))
    save_file(of_part(tensors, "text_encoder"), folder / "text_encoder" / "model.safetensors")
    write_json(folder / "unet" / "config.json", {"_class_name": "UNet2DConditionModel"})
    write_json(folder / "text_encoder" / "config.json", {"torch_dtype": "float32"})
    write_json(folder / "scheduler" / "scheduler_config.json", {"steps": 3})
    (folder / "tokenizer" / "vocab.json").write_text("{}")
    return tensors


def of_part(tensors, part):
    return {
        name.removeprefix(f"{part}."): tensor
        for name, tensor in tensors.items()
        if name.startswith(f"{part}.")
    }


def read_pipeline(folder):
    return {
        f"{part}.{name}": tensor
        for part in ("text_encoder", "unet")
        for name, tensor in read_folder(folder / part).items()
    }


def shaped(leaves, weight):
    """Return A, B and m in the shapes of a convolution's adapter, or as they are."""
    a, b, m = leaves
    ones = [1] * (weight.ndim - 2)
    return a.reshape(len(a), *weight.shape[1:]), b.reshape(*b.shape, *ones), m


def adapted(rng, base, chosen):
    """Return A, B and m, and the merged weights, of some tensors."""
    leaves = {name.removesuffix(".weight"): near(rng, base[name]) for name in chosen}
    changed = {
        name: dense(base[name].reshape(len(base[name]), -1), *leaves[name.removesuffix(".weight")])
        for name in chosen
    }
    return leaves, changed


def write_diffusers(folder, rng, base, chosen, header=True):
    """Write what diffusers saves for a pipeline, and return the merged weights."""
    leaves, changed = adapted(rng, base, chosen)
    tensors = {
        f"{path}.{leaf}": np.ascontiguousarray(tensor)
        for path, own in leaves.items()
        for leaf, tensor in zip(LEAVES, shaped(own, base[f"{path}.weight"]), strict=True)
    }
    config = {"r": RANK, "lora_alpha": ALPHA, "use_dora": True}
    parts = {path.partition(".")[0] for path in leaves}
    entries = {f"{part}.{key}": value for part in parts for key, value in config.items()}
    metadata = {"lora_adapter_metadata": json.dumps(entries)} if header else {}
    folder.mkdir()
    save_file(tensors, folder / LORA, {"format": "pt", **metadata})
    return changed


def write_kohya(folder, rng, base, chosen):
    leaves, changed = adapted(rng, base, chosen)
    tensors = {}
    for path, own in leaves.items():
        part, _, rest = path.partition(".")
        key = f"lora_{'te' if part == 'text_encoder' else part}_{rest.replace('.', '_')}"
        a, b, m = shaped(own, base[f"{path}.weight"])
        tensors |= {
            f"{key}.lora_down.weight": a,
            f"{key}.lora_up.weight": b,
            f"{key}.dora_scale": m.reshape(-1, *[1] * (a.ndim - 1)),
            f"{key}.alpha": np.asarray(ALPHA, np.float32),
        }
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    return changed


def weights(base, part=""):
    return [name for name in base if name.endswith(".weight") and name.startswith(part)]


WRITERS = {"diffusers": write_diffusers, "kohya": write_kohya}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("trained", ["", "unet.", "text_encoder."])
def test_each_component_gets_its_part(tmp_path, rng, capsys, writer, trained):
    base = write_pipeline(tmp_path / "base", rng)
    changed = WRITERS[writer](tmp_path / "adapter", rng, base, weights(base, trained))
    assert merge(tmp_path, "--verify") == 0
    assert_merged(read_pipeline(tmp_path / "out"), base, changed)
    out = tmp_path / "out"
    files = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    there = tmp_path / "base"
    assert files == {str(file.relative_to(there)) for file in there.rglob("*") if file.is_file()}
    index = json.loads((out / "unet" / f"{SINGLE}.index.json").read_text())
    assert (
        index["weight_map"]
        == json.loads((there / "unet" / f"{SINGLE}.index.json").read_text())["weight_map"]
    )
    sizes = [x.nbytes for x in of_part(base, "unet").values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    for file in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json"):
        assert (out / file).read_bytes() == (there / file).read_bytes()
    capsys.readouterr()
    paths = [str(tmp_path / name) for name in ("base", "adapter", "out")]
    assert main(["audit", *paths]) == 0
    assert f"{out}: right" in capsys.readouterr().out


def test_the_audit_of_a_pipeline_names_the_tensor_that_is_wrong(tmp_path, rng, capsys):
    base = write_pipeline(tmp_path / "base", rng)
    write_diffusers(tmp_path / "adapter", rng, base, weights(base))
    assert merge(tmp_path) == 0
    file = tmp_path / "out" / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    tensors["text_model.encoder.layers.0.self_attn.q_proj.bias"][0] += 1
    save_file(tensors, file)
    paths = [str(tmp_path / name) for name in ("base", "adapter", "out")]
    assert main(["audit", *paths]) == 1
    name = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.bias"
    assert f"{name}: changed" in capsys.readouterr().out


def test_the_option_dtype_is_for_all_components(tmp_path, rng):
    base = write_pipeline(tmp_path / "base", rng)
    write_diffusers(tmp_path / "adapter", rng, base, weights(base))
    assert merge(tmp_path, "--dtype", "float16", "--verify") == 0
    merged = read_pipeline(tmp_path / "out")
    assert {tensor.dtype.name for tensor in merged.values()} == {"float16"}
    config = json.loads((tmp_path / "out" / "text_encoder" / "config.json").read_text())
    assert config == {"torch_dtype": "float16"}
    assert "torch_dtype" not in (tmp_path / "out" / "unet" / "config.json").read_text()


def test_a_pipeline_goes_on_from_the_shards_that_are_finished(tmp_path, rng, monkeypatch):
    base = write_pipeline(tmp_path / "base", rng)
    changed = write_diffusers(tmp_path / "adapter", rng, base, weights(base))
    begun, real = [], _run.merge_shard

    def count(merge, name, *rest):
        begun.append(name)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return real(merge, name, *rest)

    monkeypatch.setattr(_run, "merge_shard", count)
    assert merge(tmp_path) == 130
    assert not (tmp_path / "out").exists()
    first = len(begun)
    assert merge(tmp_path, "--verify") == 0
    assert begun[0] not in begun[first:]
    assert begun[1] in begun[first:]
    assert {name.partition("/")[0] for name in begun} == {"unet", "text_encoder"}
    assert_merged(read_pipeline(tmp_path / "out"), base, changed)


def test_a_pipeline_is_replaced_by_force(tmp_path, rng):
    base = write_pipeline(tmp_path / "base", rng)
    changed = write_diffusers(tmp_path / "adapter", rng, base, weights(base))
    for arguments in ([], ["--force"]):
        assert merge(tmp_path, *arguments) == 0
        assert_merged(read_pipeline(tmp_path / "out"), base, changed)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_part_that_no_component_has_is_left_out_and_named(tmp_path, rng, capsys, writer):
    base = write_pipeline(tmp_path / "base", rng)
    changed = WRITERS[writer](tmp_path / "adapter", rng, base, weights(base))
    shutil.rmtree(tmp_path / "base" / "text_encoder")
    assert merge(tmp_path) == 0
    assert "ADAPTER has 2 modules for another part" in capsys.readouterr().err
    own = of_part(changed, "unet")
    assert_merged(read_folder(tmp_path / "out" / "unet"), of_part(base, "unet"), own)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_component_alone_gets_its_part(tmp_path, rng, capsys, part):
    """A folder without model_index.json is one model; the other part is left out."""
    base = write_pipeline(tmp_path / "all", rng)
    changed = write_diffusers(tmp_path / "adapter", rng, base, weights(base))
    (tmp_path / "all" / part).rename(tmp_path / "base")
    assert merge(tmp_path, "--verify") == 0
    assert "for another part of the model than BASE" in capsys.readouterr().err
    assert_merged(read_folder(tmp_path / "out"), of_part(base, part), of_part(changed, part))


@pytest.mark.parametrize("way", ["folder", "file"])
def test_an_adapter_of_one_model_of_diffusers_has_its_configuration_in_the_header(
    tmp_path, rng, way
):
    base = of_part(write_pipeline(tmp_path / "all", rng), "unet")
    (tmp_path / "all" / "unet").rename(tmp_path / "base")
    leaves, changed = adapted(rng, base, weights(base))
    tensors = {
        f"{path}.{leaf}": np.ascontiguousarray(tensor)
        for path, own in leaves.items()
        for leaf, tensor in zip(LEAVES, shaped(own, base[f"{path}.weight"]), strict=True)
    }
    config = {"r": RANK, "lora_alpha": ALPHA, "use_dora": True}
    (tmp_path / "adapter").mkdir()
    file = tmp_path / "adapter" / (LORA if way == "folder" else "mine.safetensors")
    save_file(tensors, file, {"lora_adapter_metadata": json.dumps(config)})
    run_merge(
        plan_merge(tmp_path / "base", file if way == "file" else file.parent, Options()),
        tmp_path / "out",
        verify=True,
    )
    assert_merged(read_folder(tmp_path / "out"), base, changed)


def test_without_a_header_the_scale_is_1(tmp_path, rng):
    """So diffusers takes it: alpha is the rank of each module."""
    base = write_pipeline(tmp_path / "base", rng)
    chosen = weights(base, "unet.")
    write_diffusers(tmp_path / "adapter", rng, base, chosen, header=False)
    tensors = load_file(tmp_path / "adapter" / LORA)
    changed = {}
    for name in chosen:
        a, b, m = (tensors[f"{name.removesuffix('.weight')}.{leaf}"] for leaf in LEAVES)
        weight = base[name].reshape(len(base[name]), -1)
        changed[name] = dense(weight, a.reshape(RANK, -1), b.reshape(-1, RANK), m, 1)
    assert merge(tmp_path, "--verify") == 0
    assert_merged(read_pipeline(tmp_path / "out"), base, changed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_encoder.init_lora_weights": "pissa"}, "initialised by pissa, which changed"),
        ({"unet.bias": "all"}, "config.json says bias all, but the file lacks"),
        ({"unet.use_dora": False}, "use_dora"),
    ],
)
def test_an_entry_of_one_part_counts(tmp_path, rng, capsys, change, message):
    base = write_pipeline(tmp_path / "base", rng)
    write_diffusers(tmp_path / "adapter", rng, base, weights(base))
    tensors = load_file(tmp_path / "adapter" / LORA)
    config = {"r": RANK, "lora_alpha": ALPHA, "use_dora": True}
    entries = {f"{part}.{k}": v for part in ("unet", "text_encoder") for k, v in config.items()}
    metadata = {"lora_adapter_metadata": json.dumps(entries | change)}
    save_file(tensors, tmp_path / "adapter" / LORA, metadata)
    assert merge(tmp_path) == 2
    assert message in capsys.readouterr().err


def test_a_tensor_that_is_not_of_an_adapter_is_refused(tmp_path, rng, capsys):
    base = write_pipeline(tmp_path / "base", rng)
    write_diffusers(tmp_path / "adapter", rng, base, weights(base))
    tensors = load_file(tmp_path / "adapter" / LORA) | {"unet.conv_out.weight": draw(rng, 2)}
    save_file(tensors, tmp_path / "adapter" / LORA)
    assert merge(tmp_path) == 2
    assert "unet.conv_out.weight is not part of an adapter" in capsys.readouterr().err


# Files of a folder


def test_the_index_of_diffusers_is_read_and_written(tmp_path, rng):
    base = of_part(write_pipeline(tmp_path / "all", rng), "unet")
    (tmp_path / "all" / "unet").rename(tmp_path / "base")
    model = open_model(tmp_path / "base")
    assert list(model.indexes) == [f"{SINGLE}.index.json"]
    leaves, changed = adapted(rng, base, ["conv_out.weight"])
    a, b, m = shaped(leaves["conv_out"], base["conv_out.weight"])
    write_peft(tmp_path / "adapter", {"conv_out": (a, b, m)})
    assert merge(tmp_path, "--dtype", "float16", "--verify") == 0
    index = json.loads((tmp_path / "out" / f"{SINGLE}.index.json").read_text())
    size = sum(tensor.nbytes // 2 for tensor in base.values())
    assert index["metadata"]["total_size"] == size
    assert set(changed) < set(read_folder(tmp_path / "out"))


@pytest.mark.parametrize("mark", ["fp16", "bf16", "non_ema", "ema", "fp32"])
def test_the_unmarked_file_is_merged_and_the_variant_left_out(tmp_path, rng, capsys, mark):
    base = {"a.weight": draw(rng, 6, 5)}
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / SINGLE)
    variant = f"diffusion_pytorch_model.{mark}.safetensors"
    save_file({"a.weight": base["a.weight"].astype("float16")}, tmp_path / "base" / variant)
    leaves, changed = adapted(rng, base, ["a.weight"])
    write_peft(tmp_path / "adapter", leaves)
    assert merge(tmp_path, "--verify") == 0
    assert_merged(read_folder(tmp_path / "out"), base, changed)
    assert f"Left out: {variant}" in capsys.readouterr().out


def test_a_variant_alone_is_the_model(tmp_path, rng):
    base = {"a.weight": draw(rng, 6, 5)}
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "diffusion_pytorch_model.fp16.safetensors")
    leaves, changed = adapted(rng, base, ["a.weight"])
    write_peft(tmp_path / "adapter", leaves)
    assert merge(tmp_path, "--verify") == 0
    assert_merged(read_folder(tmp_path / "out"), base, changed)


def test_two_files_of_which_none_is_a_variant_are_refused(tmp_path, rng, capsys):
    (tmp_path / "base").mkdir()
    for name in "ab":
        save_file({"a.weight": draw(rng, 6, 5)}, tmp_path / "base" / f"{name}.safetensors")
    write_peft(tmp_path / "adapter", {"a": near(rng, draw(rng, 6, 5))})
    assert merge(tmp_path) == 2
    assert "or one safetensors file, got 2 of them" in capsys.readouterr().err


def test_a_pipeline_without_weights_is_refused(tmp_path, rng, capsys):
    write_pipeline(tmp_path / "base", rng)
    for file in (tmp_path / "base").glob("*/*.safetensors"):
        file.unlink()
    write_peft(tmp_path / "adapter", {"a": near(rng, draw(rng, 6, 5))})
    assert merge(tmp_path) == 2
    assert "no folder of this pipeline has a safetensors file" in capsys.readouterr().err


def test_one_file_beside_model_index_json_is_one_model(tmp_path, rng):
    base = write_base(tmp_path / "base", {"a.weight": draw(rng, 6, 5)})
    write_json(tmp_path / "base" / "model_index.json", {})
    leaves, changed = adapted(rng, base, ["a.weight"])
    write_peft(tmp_path / "adapter", leaves)
    assert merge(tmp_path) == 0
    assert_merged(read_folder(tmp_path / "out"), base, changed)


# Weights in sub-folders


def write_with_sub_folder(folder, rng, files):
    """Write a model, and files of another module in `2_Dense`; return its tensors."""
    base = write_base(folder / "base", {f"layers.{i}.weight": draw(rng, 6, 5) for i in range(4)})
    (folder / "base" / "2_Dense").mkdir()
    for name, content in files.items():
        if isinstance(content, dict):
            save_file(content, folder / "base" / "2_Dense" / name)
        else:
            (folder / "base" / "2_Dense" / name).write_bytes(content)
    leaves, changed = adapted(rng, base, ["layers.0.weight"])
    write_peft(folder / "adapter", leaves)
    return base, changed


DENSE = {"linear.weight": np.ones((3, 6), np.float32)}
COPY = {f"layers.{i}.weight": np.ones((6, 5), np.float16) for i in range(4)}
LARGE = {"other.weight": np.ones((60, 5), np.float16)}
SUB_FOLDERS = {
    "a module": ({"model.safetensors": DENSE, "config.json": b"{}"}, []),
    "a module in shards": (
        {"a.safetensors": DENSE, "model.safetensors.index.json": b"{}"},
        [],
    ),
    "a module of pickles": ({"pytorch_model.bin": b"x", "config.json": b"{}"}, []),
    "a module, and a pickle of it": (
        {"model.safetensors": DENSE, "pytorch_model.bin": b"x"},
        ["pytorch_model.bin"],
    ),
    "a module, and a variant of it": (
        {"model.safetensors": DENSE, "model.fp16.safetensors": DENSE},
        ["model.fp16.safetensors"],
    ),
    "a module, and its graph": (
        {"model.safetensors": DENSE, "model.onnx": b"x"},
        ["model.onnx"],
    ),
    "a copy of the model": ({"model.safetensors": COPY}, ["model.safetensors"]),
    "one tensor of the model": (
        {"model.safetensors": {"layers.1.weight": np.ones((6, 5), np.float16)}},
        ["model.safetensors"],
    ),
    "other names, as many numbers": ({"model.safetensors": LARGE}, ["model.safetensors"]),
    "a pickle without a configuration": ({"pytorch_model.bin": b"x"}, ["pytorch_model.bin"]),
    "no safetensors file": ({"model.safetensors": b"x"}, ["model.safetensors"]),
    "an adapter": (
        {"adapter_model.safetensors": DENSE, "adapter_config.json": b"{}"},
        ["adapter_config.json", "adapter_model.safetensors"],
    ),
}


@pytest.mark.parametrize("title", SUB_FOLDERS)
def test_a_module_in_a_sub_folder_is_copied_and_a_copy_of_the_model_left_out(tmp_path, rng, title):
    files, left_out = SUB_FOLDERS[title]
    base, changed = write_with_sub_folder(tmp_path, rng, files)
    report = tmp_path / "report.json"
    assert merge(tmp_path, "--verify", "--json", str(report)) == 0
    assert_merged(read_folder(tmp_path / "out"), base, changed)
    found = {file.name for file in (tmp_path / "out").glob("2_Dense/*")}
    assert found == files.keys() - set(left_out)
    left = [f"2_Dense/{name}" for name in left_out]
    assert sorted(json.loads(report.read_text())["left_out"]) == left
    for name in found:
        there = tmp_path / "base" / "2_Dense" / name
        assert (tmp_path / "out" / "2_Dense" / name).read_bytes() == there.read_bytes()
