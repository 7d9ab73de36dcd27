"""The names of image models: the parts of a model, kohya's names, the original ones, diffusers'.

`image_names.json` has the original names of the modules of a U-Net of Stable Diffusion XL, of Flux
and of Stable Diffusion 3, and the names in diffusers. The last two are flat, with N for a number. A
list of names is one matrix, whose rows are theirs in this order.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from checkpoints import ALPHA, RANK, assert_merged, dense, draw, near
from safetensors.numpy import load_file, save_file

from doraxp.cli import main

TABLES = json.loads(Path(__file__).with_name("image_names.json").read_text("utf-8"))
KOHYA = ("lora_down.weight", "lora_up.weight", "dora_scale")
WHOLE = "model.diffusion_model."
SIZE = 4
"""The width of the models."""
SWAPPED = "final_layer.adaLN_modulation.1"
"""The module whose halves of rows diffusers has in the other order."""


@pytest.fixture
def rng():
    return np.random.default_rng(9)


def underscored(prefix):
    return lambda name: f"{prefix}_{name.replace('.', '_')}"


def dotted(prefix):
    return lambda name: f"{prefix}.{name}"


def swapped(matrix):
    return np.concatenate(np.split(matrix, 2)[::-1])


def adapt(rng, base, modules, key, leaves=KOHYA, alpha=ALPHA):
    """Return an adapter's tensors, and the weights of `base` that it changes.

    `modules` has the function that takes a module's weight from the base, and the one that takes
    the merged weight apart, into tensors by name.
    """
    adapter, changed = {}, {}
    for name, (join, split) in modules.items():
        weight = join(base)
        a, b, m = near(rng, weight)
        ones = [1] * (weight.ndim - 1)
        a, b = a.reshape(RANK, *weight.shape[1:]), b.reshape(-1, RANK, *ones[1:])
        m = m if leaves[2].startswith("lora_magnitude") else m.reshape(-1, *ones)
        for leaf, tensor in zip(leaves, (a, b, m), strict=True):
            adapter[f"{key(name)}.{leaf}"] = np.ascontiguousarray(tensor)
        if alpha is not None:
            adapter[f"{key(name)}.alpha"] = np.asarray(alpha)
        s = 1 if alpha is None else float(alpha) / RANK
        matrix = weight.reshape(len(weight), -1)
        merged = dense(matrix, a.reshape(RANK, -1), b.reshape(-1, RANK), m.reshape(-1), s)
        changed |= split(base, merged.reshape(weight.shape))
    return adapter, changed


def parts(*stems, swap=False):
    """Return the two functions of `adapt` for rows of several tensors, one below the other."""
    names = [stem if stem.endswith("_weight") else f"{stem}.weight" for stem in stems]

    def join(base):
        whole = np.concatenate([base[name] for name in names])
        return swapped(whole) if swap else whole

    def split(base, merged):
        merged = swapped(merged) if swap else merged
        stops = np.cumsum([len(base[name]) for name in names])[:-1]
        return dict(zip(names, np.split(merged, stops), strict=True))

    return join, split


def same(*stems):
    return {stem: parts(stem) for stem in stems}


def rows_of(stem, start, stop, whole=True):
    """Return the two functions of `adapt` for some rows of a tensor."""
    name = stem if stem.endswith("_weight") else f"{stem}.weight"

    def split(base, merged):
        weight = base[name].astype(float)
        weight[start:stop] = merged
        return {name: weight}

    return lambda base: base[name][start:stop], split


def write(folder, base, adapter):
    save_file(base, folder / "base.safetensors")
    save_file(adapter, folder / "adapter.safetensors")
    return [str(folder / name) for name in ("base.safetensors", "adapter.safetensors")]


def check(folder, base, adapter, changed, *arguments):
    """Merge, verify and audit; return the tensors of the result."""
    paths, out = write(folder, base, adapter), str(folder / "out.safetensors")
    assert main(["merge", *paths, "--out", out, "--verify", *arguments]) == 0
    merged = load_file(out)
    assert_merged(merged, base, changed)
    assert main(["audit", *paths, out, *arguments]) == 0
    return merged


def refused(folder, capsys, base, adapter):
    paths = write(folder, base, adapter)
    assert main(["merge", *paths, "--out", str(folder / "out.safetensors")]) == 2
    return capsys.readouterr().err


# Original names and those of diffusers


def flat(name):
    return name.replace(".", "_")


def model_of(title, rng):
    """Return the tensors by diffusers' names, and by original ones, and what `adapt` takes."""
    theirs, ours, modules = {}, {}, {}
    for original, names in TABLES[title].items():
        names = [names] if isinstance(names, str) else names
        names = [name.replace(".N.", ".1.") for name in names]
        original = original.replace("_N_", "_1_")
        swap = flat(original) == flat(SWAPPED)
        for name in names:
            conv = (3, 3) if "conv" in name else ()
            rows = 2 * SIZE if swap else 10 if name.endswith("proj_mlp") else SIZE
            theirs[f"{name}.weight"] = draw(rng, rows, SIZE, *conv)
        ours[f"{original}.weight"] = parts(*names, swap=swap)[0](theirs)
        modules[original] = (names, swap)
    return theirs, ours, modules


WAYS = {
    "lora_unet_": (underscored("lora_unet"), KOHYA, ALPHA),
    "lora_transformer_": (underscored("lora_transformer"), KOHYA, ALPHA),
    "lycoris_": (underscored("lycoris"), KOHYA, ALPHA),
    "diffusion_model., lora_A": (
        dotted("diffusion_model"),
        ("lora_A.weight", "lora_B.weight", "dora_scale"),
        None,
    ),
    "model.diffusion_model.": (dotted("model.diffusion_model"), KOHYA, np.float16(ALPHA)),
    "transformer., lora_down and lora_magnitude_vector": (
        dotted("transformer"),
        ("lora_down.weight", "lora_up.weight", "lora_magnitude_vector"),
        np.int64(3),
    ),
}


@pytest.mark.parametrize("title", TABLES)
@pytest.mark.parametrize("way", WAYS)
def test_original_names_merge_into_a_model_of_diffusers(tmp_path, rng, title, way):
    """All modules of the table at once: rows of one matrix go to their tensors."""
    key, leaves, alpha = WAYS[way]
    base, _, names = model_of(title, rng)
    modules = {name: parts(*stems, swap=swap) for name, (stems, swap) in names.items()}
    check(tmp_path, base, *adapt(rng, base, modules, key, leaves, alpha))


@pytest.mark.parametrize("title", TABLES)
@pytest.mark.parametrize("prefix", ["", WHOLE])
def test_names_of_diffusers_merge_into_a_file_of_original_names(tmp_path, rng, title, prefix):
    _, ours, names = model_of(title, rng)
    base = {f"{prefix}{name}": tensor for name, tensor in ours.items()}
    if prefix:
        base["first_stage_model.encoder.conv_in.weight"] = draw(rng, SIZE, 3)
    modules = {}
    for original, (stems, swap) in names.items():
        for place, stem in enumerate(stems):
            start = place * SIZE
            stop = len(ours[f"{original}.weight"]) if place == 3 else start + SIZE
            whole = parts(f"{prefix}{original}", swap=swap)
            modules[stem] = rows_of(f"{prefix}{original}", start, stop) if stems[1:] else whole
    base_now, adapter, changed = dict(base), {}, {}
    for name, way in modules.items():  # several modules change rows of one tensor
        more, new = adapt(rng, base_now, {name: way}, underscored("lora_unet"))
        base_now |= {key: np.asarray(tensor) for key, tensor in new.items()}
        adapter, changed = adapter | more, changed | new
    check(tmp_path, base, adapter, changed)


@pytest.mark.parametrize("title", TABLES)
@pytest.mark.parametrize("prefix", ["", WHOLE])
def test_original_names_merge_into_a_file_of_original_names(tmp_path, rng, title, prefix):
    _, ours, _ = model_of(title, rng)
    base = {f"{prefix}{name}": tensor for name, tensor in ours.items()}
    modules = {
        name.removesuffix(".weight"): parts(f"{prefix}{name.removesuffix('.weight')}")
        for name in ours
    }
    check(tmp_path, base, *adapt(rng, base, modules, underscored("lora_unet")))


@pytest.mark.parametrize("rows", [2 * SIZE, 6 * SIZE])
@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_only_the_last_context_block_has_its_halves_swapped(tmp_path, rng, rows, layout):
    """It has shift and scale alone; the others have six parts, in the same order in both."""
    original = "joint_blocks.1.context_block.adaLN_modulation.1"
    own = "transformer_blocks.1.norm1_context.linear"
    there, name = (own, original) if layout == "diffusers" else (original, own)
    base = {f"{there}.weight": draw(rng, rows, SIZE)}
    modules = {name: parts(there, swap=rows == 2 * SIZE)}
    check(tmp_path, base, *adapt(rng, base, modules, underscored("lora_unet")))


def test_the_upsampler_of_a_block_without_attention_has_the_next_place(tmp_path, rng):
    """So it is in Stable Diffusion 1."""
    base = {"up_blocks.0.upsamplers.0.conv.weight": draw(rng, SIZE, SIZE, 3, 3)}
    modules = {"output_blocks.2.1.conv": parts("up_blocks.0.upsamplers.0.conv")}
    check(tmp_path, base, *adapt(rng, base, modules, underscored("lora_unet")))


@pytest.mark.parametrize(
    "name",
    ["input_blocks.3.0.in_layers.2", "input_blocks.1.0.other", "middle_block.0.other", "other.1"],
)
def test_a_name_that_no_table_has_is_refused(tmp_path, rng, capsys, name):
    base, _, _ = model_of("unet", rng)
    weights = base | {f"{name}.weight": draw(rng, SIZE, SIZE)}
    adapter, _ = adapt(rng, weights, same(name), underscored("lora_unet"))
    error = refused(tmp_path, capsys, base, adapter)
    assert f"the base has no lora_unet_{flat(name)}.weight" in error


# Text encoders

CLIP = [
    *(f"encoder.layers.0.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")),
    "encoder.layers.0.mlp.fc1",
    "encoder.layers.0.mlp.fc2",
]


def encoder(rng, prefix):
    return {f"{prefix}{name}.weight": draw(rng, SIZE, SIZE) for name in CLIP}


@pytest.mark.parametrize("prefix", ["lora_te", "lora_te1", "lora_te2", "text_encoder."])
@pytest.mark.parametrize("published", ["", "text_model."])
@pytest.mark.parametrize("long", ["", "text_model."])
def test_both_names_of_a_text_encoder_are_one(tmp_path, rng, prefix, published, long):
    base = encoder(rng, published)
    modules = {f"{long}{name}": parts(f"{published}{name}") for name in CLIP}
    key = dotted(prefix[:-1]) if prefix.endswith(".") else underscored(prefix)
    check(tmp_path, base, *adapt(rng, base, modules, key))


OPEN_CLIP = {
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def test_open_clip_has_queries_keys_and_values_in_one_tensor(tmp_path, rng):
    there = "conditioner.embedders.1.model.transformer.resblocks.0."
    fused = f"{there}attn.in_proj_weight"
    base = {fused: draw(rng, 3 * SIZE, SIZE)}
    base |= {f"{there}{name}.weight": draw(rng, SIZE, SIZE) for name in OPEN_CLIP.values()}
    modules = {
        f"text_model.encoder.layers.0.{old}": parts(there + new) for old, new in OPEN_CLIP.items()
    }
    adapter, changed = adapt(rng, base, modules, underscored("lora_te2"))
    weight = base[fused].astype(float)
    for place, part in enumerate("qkv"):
        name = f"text_model.encoder.layers.0.self_attn.{part}_proj"
        rows = slice(place * SIZE, (place + 1) * SIZE)
        way = {name: rows_of(fused, rows.start, rows.stop)}
        more, new = adapt(rng, base, way, underscored("lora_te2"))
        adapter |= more
        weight[rows] = new[fused][rows]
    check(tmp_path, base, adapter, changed | {fused: weight})


T5 = "encoder.block.0.layer.0.SelfAttention.q"
L, G, XXL = (f"text_encoders.{name}.transformer." for name in ("clip_l", "clip_g", "t5xxl"))


@pytest.mark.parametrize(("others", "prefix"), [([L], "lora_te2"), ([L, G], "lora_te3")])
def test_t5_is_the_last_text_encoder(tmp_path, rng, others, prefix):
    """The second one of Flux, and the third one of Stable Diffusion 3."""
    base = {f"{XXL}{T5}.weight": draw(rng, SIZE, SIZE), f"{WHOLE}img_in.weight": draw(rng, 4, 4)}
    for other in others:
        base |= encoder(rng, f"{other}text_model.")
    modules = {T5: parts(f"{XXL}{T5}")}
    check(tmp_path, base, *adapt(rng, base, modules, underscored(prefix)))


@pytest.mark.parametrize("prefix", ["lora_te2", "lora_te3"])
def test_t5_alone_is_any_text_encoder(tmp_path, rng, prefix):
    base = {f"{T5}.weight": draw(rng, SIZE, SIZE)}
    check(tmp_path, base, *adapt(rng, base, same(T5), underscored(prefix)))


# Several parts

PLACES = {
    "SDXL": ("conditioner.embedders.0.transformer.text_model.", "lora_te1"),
    "SD 1.5": ("cond_stage_model.transformer.text_model.", "lora_te"),
    "SD 3": (f"{L}text_model.", "lora_te1"),
}


def unet_and_encoder(rng, place, prefix):
    """Return a whole checkpoint, an adapter of its parts, and the merged weights."""
    _, ours, _ = model_of("unet", rng)
    base = {f"{WHOLE}{name}": tensor for name, tensor in ours.items()} | encoder(rng, place)
    unet = {"out.2": parts(f"{WHOLE}out.2"), "time_embed.0": parts(f"{WHOLE}time_embed.0")}
    adapter, changed = adapt(rng, base, unet, underscored("lora_unet"))
    text = {f"text_model.{name}": parts(f"{place}{name}") for name in CLIP}
    more, new = adapt(rng, base, text, underscored(prefix))
    return base, adapter | more, changed | new


@pytest.mark.parametrize("title", PLACES)
def test_each_part_of_an_adapter_goes_to_its_part_of_a_checkpoint(tmp_path, rng, capsys, title):
    base, adapter, changed = unet_and_encoder(rng, *PLACES[title])
    check(tmp_path, base, adapter, changed)
    assert "another part" not in capsys.readouterr().err


@pytest.mark.parametrize("part", ["unet", "encoder"])
def test_a_part_that_the_base_lacks_is_left_out_and_named(tmp_path, rng, capsys, part):
    place, prefix = PLACES["SDXL"]
    whole, adapter, changed = unet_and_encoder(rng, place, prefix)
    lead = WHOLE if part == "unet" else place
    base = {name.removeprefix(lead): x for name, x in whole.items() if name.startswith(lead)}
    own = {name.removeprefix(lead): x for name, x in changed.items() if name.startswith(lead)}
    report = tmp_path / "report.json"
    check(tmp_path, base, adapter, own)
    assert main(
        ["merge", *write(tmp_path, base, adapter), "--out", str(tmp_path / "again.safetensors"),
         "--json", str(report)]
    ) == 0  # fmt: skip
    unused = json.loads(report.read_text())["unused"]
    other = "lora_te1_" if part == "unet" else "lora_unet_"
    assert {name.startswith(other) for name in unused} == {True}
    warning = f"ADAPTER has {len(unused)} modules for another part of the model than BASE"
    assert warning in capsys.readouterr().err


@pytest.mark.parametrize("part", ["unet", "encoder"])
def test_a_part_that_fits_only_in_part_is_refused(tmp_path, rng, capsys, part):
    place, prefix = PLACES["SDXL"]
    base, adapter, changed = unet_and_encoder(rng, place, prefix)
    lost = next(name for name in changed if name.startswith(WHOLE) == (part == "unet"))
    del base[lost]
    assert "the base has no lora_" in refused(tmp_path, capsys, base, adapter)


def test_a_base_without_any_part_of_the_adapter_is_refused(tmp_path, rng, capsys):
    _, adapter, _ = unet_and_encoder(rng, *PLACES["SDXL"])
    error = refused(tmp_path, capsys, {"other.weight": draw(rng, 3, 3)}, adapter)
    assert "the base has no lora_unet_" in error


def test_modules_that_no_name_gives_to_a_part_are_not_left_out(tmp_path, rng, capsys):
    """`lycoris_` stands before the modules of any model."""
    base = {"out.2.weight": draw(rng, SIZE, SIZE)}
    adapter, _ = adapt(rng, base, same("out.2"), underscored("lora_unet"))
    more, _ = adapt(rng, {"x.weight": draw(rng, 3, 3)}, same("x"), underscored("lycoris"))
    error = refused(tmp_path, capsys, base, adapter | more)
    assert "the base has no lycoris_x.weight" in error


def test_a_part_is_not_left_out_beside_modules_of_no_part(tmp_path, rng, capsys):
    """`transformer.` may be the denoiser, or the beginning of any model's names."""
    base = {"out.2.weight": draw(rng, SIZE, SIZE)}
    adapter, _ = adapt(rng, base, same("out.2"), underscored("lycoris"))
    more, _ = adapt(rng, {"x.weight": draw(rng, 3, 3)}, same("x"), underscored("lora_unet"))
    error = refused(tmp_path, capsys, base, adapter | more)
    assert "the base has no lora_unet_x.weight" in error


TWO_PARTS = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}


@pytest.mark.parametrize("chosen", [0, 1])
@pytest.mark.parametrize("two", [("text_encoder", "text_encoder_2"), ("unet", "text_encoder_2")])
@pytest.mark.parametrize("key", ["lycoris", "lora", None])
def test_a_module_that_two_parts_have_is_refused(tmp_path, rng, capsys, key, two, chosen):
    """The advice is followed."""
    base = {name: x for part in two for name, x in encoder(rng, f"{part}.").items()}
    name = f"{two[chosen]}.{CLIP[0]}"
    naming = underscored(key) if key else str
    adapter, changed = adapt(rng, base, {CLIP[0]: parts(name)}, naming)
    error = refused(tmp_path, capsys, base, adapter)
    one, other = sorted(two)
    assert f"may be for {one}. or {other}.; --rename" in error
    options = {part: f"^(lora|lycoris)_={TWO_PARTS[part]}" if key else f"^={part}." for part in two}
    for part, option in options.items():
        assert f"--rename {shlex.quote(option)} takes {part}." in error
    check(tmp_path, base, adapter, changed, "--rename", options[two[chosen]])


def test_a_rename_that_would_move_another_part_is_not_advised(tmp_path, rng, capsys):
    base = encoder(rng, "text_encoder.") | encoder(rng, "text_encoder_2.")
    base["unet.out.2.weight"] = draw(rng, SIZE, SIZE)
    way = {CLIP[0]: parts(f"text_encoder.{CLIP[0]}")}
    adapter, _ = adapt(rng, base, way, underscored("lycoris"))
    more, _ = adapt(rng, base, {"out.2": parts("unet.out.2")}, underscored("lora_unet"))
    error = refused(tmp_path, capsys, base, adapter | more)
    assert "may be for text_encoder. or text_encoder_2.; remove from BASE" in error


def test_two_parts_of_one_kind_are_not_told_apart_by_a_rename(tmp_path, rng, capsys):
    leads = ("cond_stage_model.transformer.", "text_encoder.")
    base = {name: x for lead in leads for name, x in encoder(rng, lead).items()}
    way = {CLIP[0]: parts(f"text_encoder.{CLIP[0]}")}
    adapter, _ = adapt(rng, base, way, underscored("lora_te1"))
    error = refused(tmp_path, capsys, base, adapter)
    assert f"may be for {leads[0]} or {leads[1]}; remove from BASE" in error
    assert "--rename" not in error


@pytest.mark.parametrize(
    ("own", "other"), [("to_q", "qkv"), ("to_q", "to_q"), ("to_k", "qkv"), ("qkv", "qkv")]
)
def test_two_modules_for_the_same_rows_are_refused(tmp_path, rng, capsys, own, other):
    fused = "double_blocks.0.img_attn.qkv"
    base = {f"{fused}.weight": draw(rng, 3 * SIZE, SIZE)}
    names = {"qkv": fused, "to_q": "transformer_blocks.0.attn.to_q"}
    names["to_k"] = "transformer_blocks.0.attn.to_k"
    ways = {"qkv": parts(fused), "to_q": rows_of(fused, 0, SIZE)}
    ways["to_k"] = rows_of(fused, SIZE, 2 * SIZE)
    one, _ = adapt(rng, base, {names[own]: ways[own]}, underscored("lora_unet"))
    two, _ = adapt(rng, base, {names[other]: ways[other]}, underscored("lora_transformer"))
    assert f"are both for {fused}.weight" in refused(tmp_path, capsys, base, one | two)


def test_two_tensors_of_one_flat_name_are_refused(tmp_path, rng, capsys):
    base = {"a.b_c.weight": draw(rng, 3, 3), "a_b.c.weight": draw(rng, 3, 3)}
    adapter, _ = adapt(rng, base, same("a.b_c"), underscored("lora_unet"))
    error = refused(tmp_path, capsys, base, adapter)
    assert "and another tensor have the same name in this file" in error


def test_a_twin_that_the_adapter_does_not_change_does_not_matter(tmp_path, rng):
    base = {"a.b_c.weight": draw(rng, 3, 3), "a_b.c.weight": draw(rng, 3, 3)}
    base["d.weight"] = draw(rng, 3, 3)
    check(tmp_path, base, *adapt(rng, base, same("d"), underscored("lora_unet")))


def test_a_shape_that_no_place_has_is_refused(tmp_path, rng, capsys):
    """A matrix of all rows of three tensors must have as many columns and rows as they."""
    names = [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"]
    base = {f"{name}.weight": draw(rng, SIZE, SIZE) for name in names}
    for shape in ((3 * SIZE, SIZE + 1), (2 * SIZE, SIZE)):
        weights = {"double_blocks.0.img_attn.qkv.weight": draw(rng, *shape)}
        modules = same("double_blocks.0.img_attn.qkv")
        adapter, _ = adapt(rng, weights, modules, underscored("lora_unet"))
        assert "the base has no" in refused(tmp_path, capsys, base, adapter)


# Forms of the file


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", ["out.0", "input_blocks.1.0.in_layers.0"])
def test_the_difference_of_a_norm_is_added_to_it(tmp_path, rng, name, dtype):
    theirs = {
        "out.0": "conv_norm_out",
        "input_blocks.1.0.in_layers.0": "down_blocks.0.resnets.0.norm1",
    }
    base = {
        "conv_out.weight": draw(rng, SIZE, SIZE, 3, 3),
        f"{theirs[name]}.weight": draw(rng, 7, dtype=dtype),
        f"{theirs[name]}.bias": draw(rng, 7, dtype=dtype),
    }
    adapter, changed = adapt(rng, base, {"out.2": parts("conv_out")}, underscored("lora_unet"))
    for leaf, own in (("weight", "w_norm"), ("bias", "b_norm")):
        difference = draw(rng, 7)
        adapter[f"lora_unet_{flat(name)}.{own}"] = difference
        total = base[f"{theirs[name]}.{leaf}"].astype(float) + difference
        changed[f"{theirs[name]}.{leaf}"] = total.astype(dtype)
    check(tmp_path, base, adapter, changed)
    paths = [str(tmp_path / f"{x}.safetensors") for x in ("base", "adapter", "out")]
    merged = load_file(paths[2])
    merged[f"{theirs[name]}.bias"][0] += 1
    save_file(merged, paths[2])
    assert main(["audit", *paths]) == 1


@pytest.mark.parametrize(
    ("own", "shape", "message"),
    [
        ("out_0.w_norm", (6,), "lora_unet_out_0.w_norm (6,) does not fit out.0.weight (7,)"),
        ("out_0.b_norm", (7,), "the base has no tensor lora_unet_out_0.bias"),
        ("gone.w_norm", (7,), "the base has no tensor lora_unet_gone.weight"),
    ],
)
def test_a_difference_that_fits_no_norm_is_refused(tmp_path, rng, capsys, own, shape, message):
    base = {"out.2.weight": draw(rng, SIZE, SIZE), "out.0.weight": draw(rng, 7)}
    adapter, _ = adapt(rng, base, same("out.2"), underscored("lora_unet"))
    adapter[f"lora_unet_{own}"] = draw(rng, *shape)
    assert message in refused(tmp_path, capsys, base, adapter)


def test_a_difference_that_is_nan_is_refused(tmp_path, rng, capsys):
    base = {"out.2.weight": draw(rng, SIZE, SIZE), "out.0.weight": draw(rng, 7)}
    adapter, _ = adapt(rng, base, same("out.2"), underscored("lora_unet"))
    adapter["lora_unet_out_0.w_norm"] = np.full(7, np.nan, np.float32)
    error = refused(tmp_path, capsys, base, adapter)
    assert "lora_unet_out_0.w_norm contains NaN or infinity" in error


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        (np.array([1.0, 2.0], np.float32), "alpha must be one number"),
        (np.array(True), "alpha must be one number"),
        (np.array(0, np.int64), "alpha must be"),
    ],
)
def test_an_alpha_that_is_not_one_number_above_0_is_refused(tmp_path, rng, capsys, alpha, message):
    base = {"out.2.weight": draw(rng, SIZE, SIZE)}
    adapter, _ = adapt(rng, base, same("out.2"), underscored("lora_unet"), alpha=None)
    adapter["lora_unet_out_2.alpha"] = alpha
    assert message in refused(tmp_path, capsys, base, adapter)
