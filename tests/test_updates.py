"""Updates of other kinds than B A, as LyCORIS names them, and files of them that must be refused.

The right values are those of dense formulas, in float64. A refusal is one line that names the
module, and exit status 2.
"""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from checkpoints import PREFIX, draw, read_folder, write_base, write_json
from safetensors.numpy import load_file, save_file
from updates import (
    ALGORITHMS,
    ALPHA,
    IN,
    KERNEL,
    OUT,
    PATHS,
    RANK,
    SHAPES,
    loha,
    lokr_with_core,
    lora,
    merged,
    prefixed,
)

from doraxp.cli import main

CASES = [(name, kind) for name, (_, kinds) in ALGORITHMS.items() for kind in kinds]


def write(folder, tensors):
    """Write a base, and a file of `tensors` beside a right DoRA adapter of another module."""
    rng = np.random.default_rng(3)
    base = {f"{path}.weight": draw(rng, *SHAPES[kind]) for kind, path in PATHS.items()}
    base["down.0.bias"] = draw(rng, OUT)
    write_base(folder / "base", base)
    right = {
        "lora_down.weight": draw(rng, RANK, 5),
        "lora_up.weight": draw(rng, 7, RANK),
        "dora_scale": 1 + rng.random((7, 1), dtype="f4"),
        "alpha": np.float32(ALPHA),
    }
    save_file({**prefixed("other", right), **tensors}, folder / "adapter.safetensors")
    return base


def run(folder):
    arguments = [str(folder / name) for name in ("base", "adapter.safetensors")]
    return main(["merge", *arguments, "--out", str(folder / "out"), "--jobs", "1"])


def assert_merge(folder, base, changed, capsys):
    assert run(folder) == 0, capsys.readouterr().err
    out = read_folder(folder / "out")
    for name, wanted in changed.items():
        difference = np.max(np.abs(out[name] - wanted)) / np.max(np.abs(wanted))
        assert difference <= 1e-6, name
    for name in base.keys() - {*changed, "up.0.weight"}:
        assert out[name].tobytes() == base[name].tobytes(), name


@pytest.mark.parametrize("norms", [None, "outputs", "inputs"])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_merge_equals_the_dense_formula(tmp_path, capsys, name, kind, norms):
    rng = np.random.default_rng(7)
    leaves, change = ALGORITHMS[name][0](rng, kind)
    ones = [1] * (len(SHAPES[kind]) - 2)
    shape = {"outputs": (OUT, 1, *ones), "inputs": (1, IN, *ones)}.get(norms)
    m = None if shape is None else (1 + rng.random(shape)).astype("f4")
    leaves |= {"alpha": np.float32(ALPHA)} | ({} if m is None else {"dora_scale": m})
    base = write(tmp_path, prefixed(kind, leaves))
    key = f"{PATHS[kind]}.weight"
    assert_merge(tmp_path, base, {key: merged(base[key], change, m)}, capsys)


def test_a_whole_difference_with_a_magnitude_is_dora(tmp_path, capsys):
    rng = np.random.default_rng(7)
    leaves = {"diff": draw(rng, OUT, IN), "dora_scale": (1 + rng.random((OUT, 1))).astype("f4")}
    base = write(tmp_path, prefixed("linear", leaves))
    change = leaves["diff"] * (RANK / ALPHA)  # it has no scale
    wanted = merged(base["down.0.weight"], change, leaves["dora_scale"])
    assert_merge(tmp_path, base, {"down.0.weight": wanted}, capsys)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_whole_difference_is_added(tmp_path, capsys, kind):
    rng = np.random.default_rng(7)
    leaves = {"diff": draw(rng, *SHAPES[kind])}
    key, bias = (f"{PATHS[kind]}.{name}" for name in ("weight", "bias"))
    if kind == "linear":
        leaves["diff_b"] = draw(rng, OUT)
    base = write(tmp_path, prefixed(kind, leaves))
    changed = {key: base[key] + leaves["diff"]}
    if kind == "linear":
        changed[bias] = base[bias] + leaves["diff_b"]
    assert_merge(tmp_path, base, changed, capsys)


def test_a_difference_of_the_bias_is_added_beside_lora(tmp_path, capsys):
    rng = np.random.default_rng(7)
    leaves, change = lora(rng, "linear")
    leaves |= {"diff_b": draw(rng, OUT), "alpha": np.float32(ALPHA)}
    base = write(tmp_path, prefixed("linear", leaves))
    new = {
        "down.0.weight": merged(base["down.0.weight"], change),
        "down.0.bias": base["down.0.bias"] + leaves["diff_b"],
    }
    assert_merge(tmp_path, base, new, capsys)


def test_modules_of_all_kinds_in_one_file(tmp_path, capsys):
    rng = np.random.default_rng(7)
    one, first = loha(rng, "linear")
    two, second = lokr_with_core(rng, "conv")
    m = (1 + rng.random((1, IN, 1, 1))).astype("f4")
    alpha = {"alpha": np.float32(ALPHA)}
    tensors = prefixed("linear", one | alpha) | prefixed("conv", two | alpha | {"dora_scale": m})
    base = write(tmp_path, tensors)
    changes = {"down.0.weight": (first,), "down.1.weight": (second, m)}
    new = {name: merged(base[name], *change) for name, change in changes.items()}
    assert_merge(tmp_path, base, new, capsys)


def test_without_alpha_the_change_is_not_scaled(tmp_path, capsys):
    leaves, change = lora(np.random.default_rng(7), "linear")
    base = write(tmp_path, prefixed("linear", leaves))
    wanted = merged(base["down.0.weight"], change * (RANK / ALPHA))
    assert_merge(tmp_path, base, {"down.0.weight": wanted}, capsys)


CONVERTED = [
    case
    for case in CASES
    if case[0] not in ("lokr",)  # two whole sides have no factors
]


@pytest.mark.parametrize("norms", [None, "outputs"])
@pytest.mark.parametrize(("name", "kind"), CONVERTED)
def test_a_product_is_converted_to_factors_exactly(tmp_path, capsys, name, kind, norms):
    """From LyCORIS to PEFT, as one A and B of a larger rank."""
    rng = np.random.default_rng(7)
    leaves, change = ALGORITHMS[name][0](rng, kind)
    ones = [1] * (len(SHAPES[kind]) - 2)
    m = None if norms is None else (1 + rng.random((OUT, 1, *ones))).astype("f4")
    leaves |= {"alpha": np.float32(ALPHA)} | ({} if m is None else {"dora_scale": m})
    base = write(tmp_path, prefixed(kind, leaves))
    save_file(prefixed(kind, leaves), tmp_path / "alone.safetensors")
    paths = {one: str(tmp_path / one) for one in ("base", "alone.safetensors", "peft", "out")}
    command = ["convert", paths["alone.safetensors"], "--base", paths["base"], "--to", "peft"]
    assert main([*command, "--out", paths["peft"]]) == 0, capsys.readouterr().err
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["use_dora"] == (m is not None)
    assert main(["merge", paths["base"], paths["peft"], "--out", paths["out"]]) == 0
    key = f"{PATHS[kind]}.weight"
    wanted = merged(base[key], change, m)
    found = read_folder(tmp_path / "out")[key]
    assert np.max(np.abs(found - wanted)) <= 1e-6 * np.max(np.abs(wanted))


@pytest.mark.parametrize("case", ["lokr", "diff", "columns of a convolution"])
def test_an_update_without_factors_is_not_converted(tmp_path, capsys, case):
    rng = np.random.default_rng(7)
    kind = "conv" if "columns" in case else "linear"
    leaves, _ = ALGORITHMS["lora" if "columns" in case else "lokr"][0](rng, kind)
    if case == "diff":
        leaves = {"diff": draw(rng, OUT, IN)}
    if "columns" in case:
        leaves |= {"dora_scale": np.ones((1, IN, 1, 1), "f4")}
    write(tmp_path, {})
    save_file(prefixed(kind, leaves), tmp_path / "alone.safetensors")
    arguments = ["--base", str(tmp_path / "base"), "--to", "peft", "--out", str(tmp_path / "peft")]
    assert main(["convert", str(tmp_path / "alone.safetensors"), *arguments]) == 2
    error = capsys.readouterr().err
    assert "has updates B A of a low rank only" in error
    assert "doraxp convert --to lora --rank R" in error
    assert not (tmp_path / "peft").exists()


def test_a_file_that_mixes_dora_and_lora_is_not_written_as_pefts(tmp_path, capsys):
    leaves, _ = lora(np.random.default_rng(7), "linear")
    write(tmp_path, prefixed("linear", leaves))
    for target, message in (("peft", "one use_dora"), ("mlx", "one fine_tune_type")):
        arguments = ["--base", str(tmp_path / "base"), "--to", target]
        command = ["convert", str(tmp_path / "adapter.safetensors"), *arguments]
        assert main([*command, "--out", str(tmp_path / "peft")]) == 2
        assert message in capsys.readouterr().err


def changed(name, kind, leaf, change):
    """Return the leaves of an algorithm, with one of them changed; None takes it away."""
    leaves = ALGORITHMS[name][0](np.random.default_rng(7), kind)[0]
    new = change(leaves[leaf].copy())
    leaves = {key: x for key, x in leaves.items() if key != leaf}
    return prefixed(kind, leaves if new is None else {**leaves, leaf: new})


def filled(value):
    def change(array):
        array[1, 1] = value
        return array

    return change


def both(kind, *names):
    """Return the leaves of several algorithms for one module."""
    rng = np.random.default_rng(7)
    leaves = {}
    for name in names:
        leaves |= ALGORITHMS[name][0](rng, kind)[0]
    return prefixed(kind, leaves)


def transposed(array):
    return array.swapaxes(0, 1)


def shorter(axis):
    return lambda array: np.delete(array, 0, axis)


def absent(array):
    return None


def alone(kind, *shapes, **leaves):
    """Return a module that has only these tensors."""
    rng = np.random.default_rng(7)
    return prefixed(kind, {name: draw(rng, *shape) for name, shape in leaves.items()})


BAD = {
    "lora and loha": ("linear", both("linear", "lora", "loha"), "hada"),
    "lora and lokr": ("linear", both("linear", "lora", "lokr"), "lokr"),
    "loha and lokr": ("conv", both("conv", "loha", "lokr"), "hada|lokr"),
    "lora and a whole difference": (
        "linear",
        both("linear", "lora") | alone("linear", diff=SHAPES["linear"]),
        "diff",
    ),
    "lokr, a factor both whole and in parts": (
        "linear",
        both("linear", "lokr", "lokr of factors"),
        "lokr_w",
    ),
    "lora_mid of another rank": (
        "conv", changed("lora_mid", "conv", "lora_mid.weight", shorter(0)), "lora_mid",
    ),
    "lora_mid of another kernel": (
        "conv", changed("lora_mid", "conv", "lora_mid.weight", shorter(2)), "shape",
    ),
    "lora_mid of a linear layer": (
        "linear",
        both("linear", "lora") | alone("linear", **{"lora_mid.weight": (RANK, RANK)}),
        "lora_mid",
    ),
    "hada_t1 of another rank": (
        "conv", changed("hada_t1", "conv", "hada_t1", shorter(1)), "hada_",
    ),
    "hada_t2 of another kernel": (
        "conv", changed("hada_t1", "conv", "hada_t2", shorter(3)), "LoHa",
    ),
    "hada_t1 without hada_t2": ("conv", changed("hada_t1", "conv", "hada_t2", absent), "hada_t"),
    "hada_t1 of factors that are not transposed": (
        "conv", changed("hada_t1", "conv", "hada_w1_a", transposed), "hada_",
    ),
    "lokr_t2 of another rank": (
        "conv", changed("lokr_t2", "conv", "lokr_t2", shorter(0)), "lokr_",
    ),
    "lokr_t2 of another kernel": (
        "conv", changed("lokr_t2", "conv", "lokr_t2", shorter(2)), "lokr_|kernel|shape",
    ),
    "lokr_t2 beside a whole second factor": (
        "conv",
        both("conv", "lokr") | alone("conv", lokr_t2=(RANK, RANK, *KERNEL)),
        "lokr_t2",
    ),
    "lokr with too few outputs": (
        "linear", changed("lokr", "linear", "lokr_w1", shorter(0)), "lokr|shape",
    ),
    "lokr with too few inputs": (
        "conv", changed("lokr of factors", "conv", "lokr_w2_b", shorter(1)), "lokr|shape",
    ),
    "lokr with its kernel turned": (
        "conv",
        changed("lokr", "conv", "lokr_w2", lambda array: array.swapaxes(2, 3)),
        "lokr|shape",
    ),
    "loha of another layer": (
        "linear", changed("loha", "linear", "hada_w1_a", shorter(0)), "hada|shape",
    ),
    "loha of two ranks in one half": (
        "linear", changed("loha", "linear", "hada_w1_b", shorter(0)), "hada|rank",
    ),
    "lora of another layer": (
        "linear", changed("lora", "linear", "lora_up.weight", shorter(0)), "shape",
    ),
    "only hada_w1_a": ("linear", alone("linear", hada_w1_a=(OUT, RANK)), "hada"),
    "without hada_w2_b": ("linear", changed("loha", "linear", "hada_w2_b", absent), "hada_w2_b"),
    "only lokr_w1": ("linear", changed("lokr", "linear", "lokr_w2", absent), "lokr_w"),
    "without lokr_w2_a": (
        "linear", changed("lokr of factors", "linear", "lokr_w2_a", absent), "lokr_w2",
    ),
    "without lora_up": ("linear", changed("lora", "linear", "lora_up.weight", absent), ""),
    "without lora_down": ("conv", changed("lora_mid", "conv", "lora_down.weight", absent), ""),
    "diff of another shape": ("linear", alone("linear", diff=(OUT, IN - 1)), "diff|shape"),
    "diff_b of another shape": (
        "linear", alone("linear", diff=(OUT, IN), diff_b=(OUT - 1,)), "diff_b|shape|bias",
    ),
    "diff_b of a layer without a bias": (
        "conv", alone("conv", diff=SHAPES["conv"], diff_b=(OUT,)), "bias|diff_b",
    ),
    "dora_scale alone": ("linear", alone("linear", dora_scale=(OUT, 1)), ""),
    "alpha alone": ("linear", prefixed("linear", {"alpha": np.float32(2)}), ""),
    "dora_scale of neither axis": (
        "linear",
        both("linear", "loha") | alone("linear", dora_scale=(OUT - 1, 1)),
        "dora_scale|magnitude",
    ),
    "rank 0": (
        "linear",
        alone("linear", **{"lora_down.weight": (0, IN), "lora_up.weight": (OUT, 0)}),
        "rank",
    ),
}  # fmt: skip
BAD |= {
    f"{value} in {leaf}": (kind, changed(name, kind, leaf, filled(value)), "NaN|inf|finite")
    for name, kind, leaf, value in (
        ("lora", "linear", "lora_up.weight", np.nan),
        ("lora_mid", "conv", "lora_mid.weight", np.nan),
        ("loha", "linear", "hada_w1_b", np.nan),
        ("hada_t1", "conv", "hada_t2", np.inf),
        ("lokr", "linear", "lokr_w1", np.nan),
        ("lokr of factors", "conv", "lokr_w2_b", -np.inf),
        ("lokr_t2", "conv", "lokr_t2", np.nan),
    )
}
BAD["nan in diff"] = (
    "linear",
    prefixed("linear", {"diff": filled(np.nan)(np.zeros((OUT, IN), "f4"))}),
    "NaN|inf|finite",
)
OTHERS = {
    "OFT": ("OFT", alone("linear", oft_blocks=(6, 3, 3), alpha=())),
    "BOFT": ("OFT", alone("linear", oft_blocks=(2, 6, 3, 3), alpha=())),
    "GLoRA": ("GLoRA", alone(
        "linear",
        **{
            "a1.weight": (RANK, IN), "a2.weight": (IN, RANK),
            "b1.weight": (RANK, IN), "b2.weight": (OUT, RANK), "alpha": (),
        },
    )),
    "IA3": (r"IA3|IA\^3|\(IA\)", prefixed(
        "linear", {"weight": np.ones(OUT, "f4"), "on_input": np.array(0)}
    )),
    "T-LoRA": ("T-?LoRA", alone(
        "linear",
        **{"q_layer.weight": (RANK, IN), "p_layer.weight": (OUT, RANK), "lambda_layer": (1, RANK)},
    )),
}  # fmt: skip


def assert_refused(folder, capsys, *patterns):
    before = sorted(folder.iterdir())
    assert run(folder) == 2
    assert sorted(folder.iterdir()) == before
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert error.endswith("\n")
    for pattern in patterns:
        assert re.search(pattern, error, re.IGNORECASE), (pattern, error)


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_module_is_refused_by_its_name(tmp_path, capsys, case):
    kind, tensors, pattern = BAD[case]
    write(tmp_path, tensors)
    assert_refused(tmp_path, capsys, PATHS[kind].replace(".", "[._]"), pattern)


@pytest.mark.parametrize("name", OTHERS)
def test_another_algorithm_is_refused_by_its_name(tmp_path, capsys, name):
    pattern, tensors = OTHERS[name]
    write(tmp_path, tensors)
    assert_refused(tmp_path, capsys, "down[._]0", pattern)


KINDS_OF_PEFT = {
    "OFT": {"oft_R.weight": (6, 3)},
    "BOFT": {"boft_R": (1, 6, 3, 3), "boft_s": (OUT, 1)},
    "IA3": {"ia3_l": (OUT, 1)},
    "VERA": {"vera_lambda_b": (OUT,), "vera_lambda_d": (RANK,)},
    "HRA": {"hra_u": (IN, RANK)},
}


@pytest.mark.parametrize("kind", KINDS_OF_PEFT)
def test_another_peft_type_is_refused_by_its_name(tmp_path, capsys, kind):
    write(tmp_path, {})
    folder = tmp_path / "adapter.safetensors"
    folder.unlink()
    folder.mkdir()
    rng = np.random.default_rng(7)
    tensors = {
        f"{PREFIX}down.0.{name}": draw(rng, *shape) for name, shape in KINDS_OF_PEFT[kind].items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    write_json(folder / "adapter_config.json", {"peft_type": kind, "r": RANK})
    assert_refused(tmp_path, capsys, kind)


FLUX = "transformer_blocks.0.attn.to_{}"
"""The names of diffusers for the parts of `double_blocks.0.img_attn.qkv` of Flux."""


def fused_case(name, norms=None):
    """A LyCORIS file of a fused module, and a base with its three parts, of 6 rows each."""
    rng = np.random.default_rng(7)
    if name == "diff":
        leaves = {"diff": draw(rng, OUT, IN)}
        change = leaves["diff"] * (RANK / ALPHA)
    else:
        leaves, change = ALGORITHMS[name][0](rng, "linear")
    shape = {"outputs": (OUT, 1), "inputs": (1, IN)}.get(norms)
    m = None if shape is None else (1 + rng.random(shape)).astype("f4")
    leaves |= {"alpha": np.float32(ALPHA)} | ({} if m is None else {"dora_scale": m})
    module = "lora_unet_double_blocks_0_img_attn_qkv"
    base = {f"{FLUX.format(part)}.weight": draw(rng, OUT // 3, IN) for part in "qkv"}
    return base, {f"{module}.{leaf}": np.asarray(x) for leaf, x in leaves.items()}, change, m


@pytest.mark.parametrize("norms", [None, "outputs"])
@pytest.mark.parametrize("name", ["lora", "loha", "lokr", "lokr of factors", "diff"])
def test_each_part_of_a_fused_module_has_its_rows(tmp_path, capsys, name, norms):
    base, tensors, change, m = fused_case(name, norms)
    write_base(tmp_path / "base", base)
    save_file(tensors, tmp_path / "adapter.safetensors")
    assert run(tmp_path) == 0, capsys.readouterr().err
    wanted = merged(np.concatenate(list(base.values())), change, m)
    out = read_folder(tmp_path / "out")
    found = np.concatenate([out[key] for key in base])
    assert np.max(np.abs(found - wanted)) <= 1e-6 * np.max(np.abs(wanted))


def test_norms_over_the_inputs_need_all_rows_of_a_module(tmp_path, capsys):
    base, tensors, *_ = fused_case("lora", "inputs")
    write_base(tmp_path / "base", base)
    save_file(tensors, tmp_path / "adapter.safetensors")
    assert_refused(tmp_path, capsys, "its norms need all rows")


@pytest.mark.parametrize("norms", [None, "outputs"])
@pytest.mark.parametrize("name", ["lora", "loha", "lokr", "lokr of factors", "diff"])
def test_a_weight_that_is_stored_the_other_way_is_merged(tmp_path, capsys, name, norms):
    """As GPT-2's Conv1D is; the shapes tell it."""
    rng = np.random.default_rng(7)
    leaves, change = {"diff": draw(rng, OUT, IN)}, None
    if name == "diff":
        change = leaves["diff"] * (RANK / ALPHA)
    else:
        leaves, change = ALGORITHMS[name][0](rng, "linear")
    m = None if norms is None else (1 + rng.random((OUT, 1))).astype("f4")
    leaves |= {"alpha": np.float32(ALPHA)} | ({} if m is None else {"dora_scale": m})
    weight = draw(rng, OUT, IN)
    write_base(tmp_path / "base", {"down.0.weight": np.ascontiguousarray(weight.T)})
    save_file(prefixed("linear", leaves), tmp_path / "adapter.safetensors")
    assert run(tmp_path) == 0, capsys.readouterr().err
    wanted = merged(weight, change, m).T
    found = read_folder(tmp_path / "out")["down.0.weight"]
    assert np.max(np.abs(found - wanted)) <= 1e-6 * np.max(np.abs(wanted))


def test_a_difference_of_a_norm_is_added(tmp_path, capsys):
    rng = np.random.default_rng(7)
    leaves, _ = lora(rng, "linear")
    norm = {"lora_unet_norm_0.diff": draw(rng, OUT)}
    tensors = prefixed("linear", leaves | {"alpha": np.float32(ALPHA)}) | norm
    base = write(tmp_path, tensors)
    save_file(tensors, tmp_path / "adapter.safetensors")
    weights = base | {"norm.0.weight": draw(rng, OUT)}
    (tmp_path / "base" / "model.safetensors").unlink()
    save_file(weights, tmp_path / "base" / "model.safetensors")
    assert run(tmp_path) == 0, capsys.readouterr().err
    out = read_folder(tmp_path / "out")
    wanted = weights["norm.0.weight"] + norm["lora_unet_norm_0.diff"]
    np.testing.assert_allclose(out["norm.0.weight"], wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("leaves", "message"),
    [
        ({"lokr_w1": (3, 4, 1), "lokr_w2": (6, 3)}, "lokr_w1 must have two axes"),
        ({"lokr_w1": (3,), "lokr_w2": (6, 3)}, "lokr_w1 must have at least two axes"),
    ],
)
def test_a_side_of_lokr_of_other_axes_is_refused(tmp_path, capsys, leaves, message):
    rng = np.random.default_rng(7)
    write(tmp_path, prefixed("linear", {name: draw(rng, *shape) for name, shape in leaves.items()}))
    assert_refused(tmp_path, capsys, "down_0", message)


def test_lokr_with_more_rows_than_columns_in_its_left_side_is_converted(tmp_path, capsys):
    rng = np.random.default_rng(7)
    leaves = {
        "lokr_w1": draw(rng, 3, 1),
        "lokr_w2_a": draw(rng, 6, 1),
        "lokr_w2_b": draw(rng, 1, IN),
    }
    write(tmp_path, {})
    save_file(prefixed("linear", leaves | {"alpha": np.float32(1)}), tmp_path / "alone.safetensors")
    paths = {name: str(tmp_path / name) for name in ("base", "alone.safetensors", "peft", "out")}
    command = ["convert", paths["alone.safetensors"], "--base", paths["base"], "--to", "peft"]
    assert main([*command, "--out", paths["peft"]]) == 0, capsys.readouterr().err
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    a, b = (tensors[f"{PREFIX}down.0.lora_{name}.weight"] for name in "AB")
    assert a.shape == (1, IN)
    wanted = np.kron(leaves["lokr_w1"], leaves["lokr_w2_a"] @ leaves["lokr_w2_b"])
    np.testing.assert_allclose(b @ a, wanted, rtol=1e-5)


def test_a_product_whose_rank_is_above_a_side_is_not_converted(tmp_path, capsys):
    rng = np.random.default_rng(7)
    leaves = {
        f"hada_{half}_{side}": draw(rng, *shape)
        for half in ("w1", "w2")
        for side, shape in (("a", (OUT, 4)), ("b", (4, IN)))
    }
    write(tmp_path, {})
    save_file(prefixed("linear", leaves), tmp_path / "alone.safetensors")
    arguments = ["--base", str(tmp_path / "base"), "--to", "peft", "--out", str(tmp_path / "peft")]
    assert main(["convert", str(tmp_path / "alone.safetensors"), *arguments]) == 2
    assert "has updates B A of a low rank only" in capsys.readouterr().err
