"""Evidence of a base: norms that tell a residual one, biases that tell how weights are stored."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from checkpoints import (
    ALPHA,
    PREFIX,
    RANK,
    check,
    dense,
    draw,
    near,
    refused,
    write_base,
    write_json,
    write_peft,
)
from language_model import EMBED, QUERY, TOKENS, WIDTH, model, query
from safetensors.numpy import load_file, save_file

from doraxp.cli import main


@pytest.fixture
def rng():
    return np.random.default_rng(11)


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


def test_a_wrong_module_is_refused_though_the_magnitudes_were_trained_far(tmp_path, capsys):
    """By 12 % of the norms; 32 rows of unlike lengths tell the right tensor beyond chance."""
    rng = np.random.default_rng(0)
    lengths = {name: 0.2 + 2 * rng.random((32, 1), dtype="f4") for name in ("q_proj", "o_proj")}
    base = {f"h.0.{name}.weight": draw(rng, 32, 24) * own for name, own in lengths.items()}
    write_base(tmp_path / "base", base)
    norms = np.linalg.norm(base["h.0.q_proj.weight"], axis=1)
    m = norms * (1 + 0.12 * rng.standard_normal(32)).astype("f4")
    write_peft(tmp_path / "adapter", {"h.0.q_proj": (draw(rng, 2, 24), draw(rng, 32, 2), m)})
    paths = [str(tmp_path / name) for name in ("base", "adapter")]
    command = ["merge", *paths, "--out", str(tmp_path / "out")]
    assert main([*command, "--rename", "q_proj=o_proj"]) == 2
    assert "its magnitudes are the row norms of h.0.q_proj.weight" in capsys.readouterr().err
    assert main(command) == 0
