"""Formats of adapter files: reading, writing and refusing each; `convert` and `inspect`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoints import (
    SHAPES,
    dense,
    draw,
    factors,
    write_adapter,
    write_json,
    write_model,
)
from safetensors.numpy import load_file, save_file

import doraxp
from doraxp import AdaptedLayer, Adapter, Config, LayerKind
from doraxp._base.extras import install_hint
from doraxp.checkpoint import CheckpointError, load_adapters, save_adapters
from doraxp.cli import main

DTYPES = [np.dtype("f4"), np.dtype("f2"), np.dtype("f8"), np.dtype(ml_dtypes.bfloat16)]


def layers(dtype="f4", kinds=None, config=None):
    rng = np.random.default_rng(4)
    found = {}
    for path, shape in SHAPES.items():
        kind = (kinds or {}).get(path, LayerKind())
        stored = {"conv": (*shape, 3, 2), "embedding": (9, 4)}.get(kind.name, shape)
        *_, out, inner = kind.matrix_shape(stored)
        leaves = (leaf.astype(dtype) for leaf in factors(rng, (out, inner)))
        found[path] = AdaptedLayer(Adapter(*leaves), config or Config(2, 3.0), kind, stored)
    return found


def assert_same(actual, desired):
    assert actual.keys() == desired.keys()
    for path, layer in desired.items():
        assert actual[path][1:] == layer[1:]
        for one, other in zip(actual[path].adapter, layer.adapter, strict=True):
            assert (one.dtype, one.shape) == (other.dtype, other.shape)
            assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", ["peft", "mlx"])
def test_saving_and_loading_keeps_every_bit(tmp_path, format, dtype):
    save_adapters(tmp_path / "a", layers(dtype), format)
    adapters = load_adapters(tmp_path / "a")
    assert adapters.format == format
    assert_same(adapters, layers(dtype))


@pytest.mark.parametrize("other", ["conv", "embedding", "transposed"])
def test_pefts_format_holds_every_kind_that_peft_adapts(tmp_path, other):
    kinds = dict.fromkeys(SHAPES, LayerKind(other))
    config = Config(2, 3.5, rslora=True)
    save_adapters(tmp_path / "a", layers(kinds=kinds, config=config))
    assert_same(load_adapters(tmp_path / "a"), layers(kinds=kinds, config=config))


def test_converting_peft_to_mlx_and_back_keeps_every_bit(tmp_path, capsys):
    write_adapter(tmp_path / "peft")
    assert (
        main(["convert", str(tmp_path / "peft"), "--to", "mlx", "--out", str(tmp_path / "mlx")])
        == 0
    )
    assert (
        main(["convert", str(tmp_path / "mlx"), "--to", "peft", "--out", str(tmp_path / "again")])
        == 0
    )
    assert "3 modules, mlx to peft" in capsys.readouterr().out
    first, again = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "again")
    )
    assert {name: x.tobytes() for name, x in first.items()} == {
        name: x.tobytes() for name, x in again.items()
    }
    assert_same(load_adapters(tmp_path / "again"), load_adapters(tmp_path / "peft"))


def test_mlx_stores_the_factors_transposed_and_s(tmp_path):
    save_adapters(tmp_path / "a", {"model.layers.3.q": layers()["block.0.q"]}, "mlx")
    tensors = load_file(tmp_path / "a" / "adapters.safetensors")
    shapes = {name: x.shape for name, x in tensors.items()}
    path = "model.layers.3.q"
    assert shapes == {f"{path}.lora_a": (5, 2), f"{path}.lora_b": (2, 7), f"{path}.m": (7,)}
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text()) == {
        "fine_tune_type": "dora",
        "num_layers": -1,  # all: mlx-lm counts blocks from the last one
        "lora_parameters": {"rank": 2, "scale": 1.5, "dropout": 0.0, "keys": ["q"]},
    }


def test_nvlabs_files_are_read(tmp_path):
    adapter = write_adapter(tmp_path / "a", peft_type="DORA")
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = {}
    for name, tensor in load_file(path).items():
        if name.endswith("lora_magnitude_vector"):
            name = name.replace("lora_magnitude_vector", "weight_m_wdecomp.weight")
            tensor = tensor.reshape(-1, 1)
        tensors[name] = tensor
    save_file(tensors, path)
    adapters = load_adapters(path)
    assert adapters.format == "nvlabs"
    for name, leaves in adapter.items():
        for one, other in zip(adapters[name].adapter, leaves, strict=True):
            np.testing.assert_array_equal(one, other)
    base = write_model(tmp_path / "base", np.dtype("f4"))
    paths = [str(tmp_path / name) for name in ("base", "a", "out")]
    assert main(["merge", *paths[:2], "--out", paths[2], "--verify"]) == 0
    merged = load_file(tmp_path / "out" / "model-1.safetensors")["block.0.q.weight"]
    desired = dense(base["block.0.q.weight"], *adapter["block.0.q"])
    np.testing.assert_allclose(merged, desired, rtol=2**-22)


def lycoris(path, **changes):
    a, b, m = factors(np.random.default_rng(2), (7, 5))
    tensors = {
        "lora_unet_down_0.lora_down.weight": a,
        "lora_unet_down_0.lora_up.weight": b,
        "lora_unet_down_0.dora_scale": m.reshape(-1, 1),
        "lora_unet_down_0.alpha": np.array(3, np.float32),
    }
    tensors = {name: tensors.get(name) for name in tensors} | {
        f"lora_unet_down_0.{name}": tensor for name, tensor in changes.items()
    }
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    return a, b, m


def test_lycoris_files_are_read(tmp_path):
    a, b, m = lycoris(tmp_path / "a.safetensors")
    adapters = load_adapters(tmp_path / "a.safetensors")
    layer = adapters["lora_unet_down_0"]
    assert (adapters.format, layer.config, layer.shape) == ("lycoris", Config(2, 3.0), (7, 5))
    for one, other in zip(layer.adapter, (a, b, m), strict=True):
        np.testing.assert_array_equal(one, other)
    lycoris(tmp_path / "b.safetensors", alpha=None)
    assert load_adapters(tmp_path / "b.safetensors")["lora_unet_down_0"].config.scaling == 1.0


def test_lycoris_convolutions_are_merged(tmp_path):
    rng = np.random.default_rng(2)
    weight = draw(rng, 7, 4, 3, 3)
    a, b, m = factors(rng, (7, 36))
    lycoris(
        tmp_path / "a.safetensors",
        **{
            "lora_down.weight": a.reshape(2, 4, 3, 3),
            "lora_up.weight": b.reshape(7, 2, 1, 1),
            "dora_scale": m.reshape(7, 1, 1, 1),
        },
    )
    save_file({"down.0.weight": weight}, tmp_path / "base")
    paths = [str(tmp_path / name) for name in ("base", "a.safetensors", "out")]
    assert main(["merge", *paths[:2], "--out", paths[2], "--verify"]) == 0
    merged = load_file(tmp_path / "out")["down.0.weight"]
    desired = dense(weight.reshape(7, -1), a, b, m).reshape(weight.shape)
    np.testing.assert_allclose(merged, desired, rtol=2**-22)
    save_file({"down.0.weight": weight, "down_0.weight": weight}, tmp_path / "base")
    assert main(["merge", *paths[:2], "--out", paths[2], "--force"]) == 2


@pytest.mark.parametrize("inner", [5, 7])
def test_an_old_lycoris_file_norms_the_columns_even_of_a_square_weight(tmp_path, inner):
    """The scale has shape (1, in): it may have as many numbers as the weight has rows."""
    rng = np.random.default_rng(2)
    weight = draw(rng, 7, inner)
    b, a, m = factors(rng, (inner, 7))  # of the transpose: its A is Bᵀ
    changes = {
        "lora_down.weight": np.ascontiguousarray(a.T),
        "lora_up.weight": np.ascontiguousarray(b.T),
        "dora_scale": m.reshape(1, -1),
    }
    lycoris(tmp_path / "a.safetensors", **changes)
    save_file({"down.0.weight": weight}, tmp_path / "base")
    paths = [str(tmp_path / name) for name in ("base", "a.safetensors", "out")]
    assert main(["merge", *paths[:2], "--out", paths[2], "--verify"]) == 0
    merged = load_file(tmp_path / "out")["down.0.weight"]
    np.testing.assert_allclose(merged, dense(weight.T, b, a, m).T, rtol=2**-22)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_up.weight": None}, "must have lora_up and lora_down"),
        (
            {"lora_mid.weight": np.ones((2, 2), "f4")},
            "lora_mid must have shape (rank, rank, *kernel)",
        ),
        ({"lora_in.weight": np.ones((2, 2), "f4")}, "is not part of an adapter that doraxp knows"),
        ({"lora_up.weight": np.ones((7, 3), "f4")}, "(out, rank, ...), got (2, 5) and (7, 3)"),
        (
            {"dora_scale": np.ones((3, 1), "f4")},
            "for each input of a weight of shape (7, 5), got shape (3, 1)",
        ),
        ({"alpha": np.ones(2, "f4")}, "alpha must be one number"),
        ({"alpha": np.array(0, "f4")}, "alpha must be above 0 and finite, got 0.0"),
        ({"alpha": np.array(-4, "f4")}, "alpha must be above 0 and finite, got -4.0"),
    ],
)
def test_a_wrong_lycoris_file_is_refused(tmp_path, changes, message):
    lycoris(tmp_path / "a.safetensors", **changes)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load_adapters(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        ({"fine_tune_type": "full"}, {}, "fine_tune_type must be 'dora' or 'lora', got 'full'"),
        ({"fine_tune_type": "lora"}, {}, "x has a magnitude, but adapter_config.json says"),
        ({}, {"x.m": None}, "x has no magnitude, but adapter_config.json says"),
        ({}, {"x.m": (7, 1)}, "x.m must have one axis"),
        ({}, {"x.lora_b": None}, "x must have both factors"),
        ({"lora_parameters": {"rank": 2}}, {}, "must have a scale above 0, got None"),
        ({"lora_parameters": [20]}, {}, "must have a scale above 0, got None"),
        ({"lora_parameters": {"scale": True}}, {}, "must have a scale above 0, got True"),
        ({"lora_parameters": {"scale": np.inf}}, {}, "must have a scale above 0, got inf"),
        (
            {"lora_parameters": {"scale": 20.0, "rank": 4}},
            {},
            "adapter_config.json: x: rank is 4, but lora_a has shape (5, 2)",
        ),
        (
            {"lora_parameters": {"scale": 20.0}},
            {"x.lora_a": (5, 0), "x.lora_b": (0, 7)},
            "x: rank must be at least 1, got 0",
        ),
        ({}, {"x.lora_b": (3, 7)}, "lora_b (rank, out), got (5, 2) and (3, 7)"),
        ({}, {"x.m": (6,)}, "x.m has shape (6,), which does not fit rank 2"),
    ],
)
def test_a_wrong_mlx_folder_is_refused(tmp_path, config, changes, message):
    shapes = {"x.lora_a": (5, 2), "x.lora_b": (2, 7), "x.m": (7,), **changes}
    tensors = {name: np.ones(shape, np.float32) for name, shape in shapes.items() if shape}
    save_file(tensors, tmp_path / "adapters.safetensors")
    entries = {"fine_tune_type": "dora", "lora_parameters": {"rank": 2, "scale": 20.0}, **config}
    write_json(tmp_path / "adapter_config.json", entries)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load_adapters(tmp_path)


def replaced(**fields):
    return {path: layer._replace(**fields) for path, layer in layers().items()}


@pytest.mark.parametrize(
    ("format", "adapters", "message"),
    [
        ("peft", {}, "must hold at least one layer"),
        ("onnx", layers(), "format must be one of ('mlx', 'diffusers', 'peft'), got 'onnx'"),
        ("peft", replaced(config=Config(2, form="direction")), "PEFT has the weight form only"),
        ("mlx", replaced(config=Config(2, form="direction")), "mlx-lm has the weight form only"),
        ("peft", replaced(kind=LayerKind("experts")), "must have one axis for them, got the shape"),
        ("peft", replaced(kind=LayerKind("columns")), "PEFT has no adapter of this kind"),
        ("mlx", replaced(kind=LayerKind("embedding")), "mlx-lm has no adapter of kind 'emb"),
        (
            "mlx",
            layers() | {"block.1.q": layers()["block.1.q"]._replace(config=Config(2, 4.0))},
            "block.0.q has rank 2 and s 1.5, and block.1.q has rank 2 and s 2.0",
        ),
        (
            "peft",
            layers() | {"block.1.q": layers(config=Config(2, rslora=True))["block.1.q"]},
            "PEFT has one use_rslora for all modules",
        ),
        ("mlx", replaced(config=Config(3, 0.1, rslora=True)), "would not come back exactly"),
    ],
)
def test_an_adapter_that_a_format_cannot_hold_is_refused(tmp_path, format, adapters, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        save_adapters(tmp_path / "a", adapters, format)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_and_nothing_is_dropped(tmp_path, capsys):
    write_adapter(tmp_path / "a")
    paths = [str(tmp_path / name) for name in ("a", "b")]
    assert main(["convert", paths[0], "--to", "peft", "--out", paths[0]]) == 2
    assert "already exists" in capsys.readouterr().err
    path = tmp_path / "a" / "adapter_model.safetensors"
    save_file(load_file(path) | {"base_model.model.lm_head.weight": np.ones((2, 2), "f4")}, path)
    assert main(["convert", paths[0], "--to", "mlx", "--out", paths[1]]) == 2
    assert "also replaces lm_head.weight" in capsys.readouterr().err


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_saved_files_have_the_mode_of_any_new_file(tmp_path, umask):
    before = os.umask(umask)
    try:
        save_adapters(tmp_path / "a", layers())
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "a").iterdir()}
    assert modes == dict.fromkeys(
        ("adapter_model.safetensors", "adapter_config.json"), 0o666 & ~umask
    )
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o777 & ~umask


def test_overwrite_replaces_an_adapter_of_either_format(tmp_path):
    other = layers(config=Config(2, 5.0))
    for format in ("peft", "mlx", "peft"):
        save_adapters(tmp_path / "a", layers(), format, overwrite=True)
        assert_same(load_adapters(tmp_path / "a"), layers())
        save_adapters(tmp_path / "a", other, overwrite=True)
        assert_same(load_adapters(tmp_path / "a"), other)
        assert [path.name for path in tmp_path.iterdir()] == ["a"]
        assert len(list((tmp_path / "a").iterdir())) == 2
    with pytest.raises(FileExistsError, match="already exists; overwrite=True, or --force, repl"):
        save_adapters(tmp_path / "a", layers())
    assert_same(load_adapters(tmp_path / "a"), other)


def test_convert_replaces_its_own_source_by_force(tmp_path, capsys):
    write_adapter(tmp_path / "a")
    before = dict(load_adapters(tmp_path / "a"))
    command = ["convert", str(tmp_path / "a"), "--to", "mlx", "--out", str(tmp_path / "a")]
    assert main(command) == 2
    assert "--force" in capsys.readouterr().err
    assert main([*command, "--force"]) == 0
    after = load_adapters(tmp_path / "a")
    assert after.format == "mlx"
    assert_same(after, before)


@pytest.mark.parametrize("foreign", ["thesis.tex", ".git", "README.md", "adapter_config.json"])
def test_overwrite_removes_no_foreign_file(tmp_path, foreign):
    save_adapters(tmp_path / "a", layers())
    if foreign.startswith((".git", "adapter")):
        (tmp_path / "a" / foreign).unlink(missing_ok=True)
        (tmp_path / "a" / foreign).mkdir()
    else:
        (tmp_path / "a" / foreign).write_text("mine")
    problem = f"only an adapter's own files are replaced, but it has {foreign}: move it"
    with pytest.raises(FileExistsError, match=re.escape(problem)):
        save_adapters(tmp_path / "a", layers(), overwrite=True)
    assert (tmp_path / "a" / foreign).exists()


@pytest.mark.parametrize("kind", ["file", "link"])
def test_overwrite_replaces_neither_a_file_nor_a_link(tmp_path, kind):
    if kind == "file":
        (tmp_path / "a").write_text("mine")
    else:
        (tmp_path / "b").mkdir()
        (tmp_path / "a").symlink_to(tmp_path / "b")
    with pytest.raises(FileExistsError, match="must be a folder to be replaced"):
        save_adapters(tmp_path / "a", layers(), overwrite=True)


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()])
def test_the_old_adapter_stays_if_the_new_one_cannot_take_its_place(tmp_path, monkeypatch, error):
    save_adapters(tmp_path / "a", layers())
    other, rename = layers(config=Config(2, 5.0)), Path.rename

    def fail(path, target):
        if path.name == "complete":
            raise error
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(type(error)):
        save_adapters(tmp_path / "a", other, overwrite=True)
    assert_same(load_adapters(tmp_path / "a"), layers())
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


STOPPED = """
import os, sys
from pathlib import Path
from doraxp.checkpoint import load_adapters, save_adapters
source, target, last = sys.argv[1:]
adapters = dict(load_adapters(source))
rename = Path.rename
def stop(path, to):
    if path.name == last != "a":
        os._exit(9)
    rename(path, to)
    if path.name == last:
        os._exit(9)
Path.rename = stop
save_adapters(target, adapters, overwrite=True)
"""


def stop_a_save(folder, last):
    """Replace `a` by `b` in a process that is killed after the rename of `a`, or before others."""
    command = [sys.executable, "-c", STOPPED, *(str(folder / x) for x in "ba"), last]
    assert subprocess.run(command, timeout=100).returncode == 9


@pytest.fixture
def stopped(tmp_path):
    """A save that was killed between its two renames: the old adapter has a hidden name."""
    save_adapters(tmp_path / "a", layers())
    save_adapters(tmp_path / "b", layers(config=Config(2, 5.0)))
    stop_a_save(tmp_path, "a")
    assert not (tmp_path / "a").exists()
    return tmp_path


def test_the_error_about_a_stopped_save_names_the_adapter_of_before(stopped, capsys):
    problem = f"{stopped / 'a'}: no such file or folder; a save was stopped when it replaced this"
    with pytest.raises(FileNotFoundError, match=re.escape(problem)) as raised:
        load_adapters(stopped / "a")
    assert f"{stopped / '.a.replaced'}" in str(raised.value)
    (stopped / ".a.replaced").rename(stopped / "a")
    assert_same(load_adapters(stopped / "a"), layers())


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_next_save_puts_the_adapter_of_before_back(stopped, overwrite):
    newest = layers(config=Config(2, 7.0))
    if overwrite:
        save_adapters(stopped / "a", newest, overwrite=True)
        assert_same(load_adapters(stopped / "a"), newest)
    else:
        with pytest.raises(FileExistsError, match="already exists"):
            save_adapters(stopped / "a", newest)
        assert_same(load_adapters(stopped / "a"), layers())
    assert not (stopped / ".a.replaced").exists()


def test_a_save_that_fails_after_a_stopped_one_puts_the_adapter_back(stopped, monkeypatch):
    rename = Path.rename

    def fail(path, target):
        if path.name == "complete":
            raise OSError("full")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="full"):
        save_adapters(stopped / "a", layers(config=Config(2, 7.0)), overwrite=True)
    assert_same(load_adapters(stopped / "a"), layers())


@pytest.mark.parametrize(
    ("last", "alpha"), [("complete", 3.0), (".a.replaced", 5.0)], ids=["before", "after"]
)
def test_a_save_that_is_killed_at_another_moment_leaves_one_adapter(tmp_path, last, alpha):
    save_adapters(tmp_path / "a", layers())
    save_adapters(tmp_path / "b", layers(config=Config(2, 5.0)))
    stop_a_save(tmp_path, last)
    newest = layers(config=Config(2, 7.0))
    if alpha == 5.0:
        assert_same(load_adapters(tmp_path / "a"), layers(config=Config(2, alpha)))
    save_adapters(tmp_path / "a", newest, overwrite=True)
    assert_same(load_adapters(tmp_path / "a"), newest)
    assert not (tmp_path / ".a.replaced").exists()


def test_the_old_adapter_of_a_save_that_was_stopped_at_its_end_is_replaced(tmp_path):
    """Both stand: the new one at its place, and the one of before under its hidden name."""
    save_adapters(tmp_path / "a", layers())
    save_adapters(tmp_path / ".a.replaced", layers(config=Config(2, 5.0)))
    newest = layers(config=Config(2, 7.0))
    save_adapters(tmp_path / "a", newest, overwrite=True)
    assert_same(load_adapters(tmp_path / "a"), newest)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("there", [False, True])
def test_a_foreign_folder_at_the_hidden_name_is_kept(tmp_path, there):
    if there:
        save_adapters(tmp_path / "a", layers())
    (tmp_path / ".a.replaced").mkdir()
    (tmp_path / ".a.replaced" / "thesis.tex").write_text("mine")
    with pytest.raises(FileExistsError, match=r"\.a\.replaced: only an adapter's own files"):
        save_adapters(tmp_path / "a", layers(), overwrite=True)
    assert (tmp_path / ".a.replaced" / "thesis.tex").read_text() == "mine"
    assert (tmp_path / "a").exists() == there


def test_a_saved_adapter_is_on_the_disk_before_it_appears(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, Path.rename

    def note_sync(file):
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{file}")))
        fsync(file)

    def note_rename(path, target):
        events.append(f"rename {path.name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "rename", note_rename)
    save_adapters(tmp_path / "a", layers())
    files = ["adapter_model.safetensors", "adapter_config.json", "complete"]
    assert events == [*files, "rename complete", tmp_path.name]


def test_the_folder_above_the_target_must_exist(tmp_path):
    path = tmp_path / "none" / "out"
    with pytest.raises(FileNotFoundError) as raised:
        save_adapters(path, layers())
    assert str(raised.value) == f"{path.parent}: no such folder"


def test_unequal_ranks_are_saved_as_patterns(tmp_path):
    own = layers()
    a, b, m = own["block.0.k"].adapter
    own["block.0.k"] = AdaptedLayer(Adapter(a[:1], b[:, :1], m), Config(1, -1), LayerKind(), (6, 5))
    save_adapters(tmp_path / "a", own)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {r"^block\.0\.k": 1}
    assert config["alpha_pattern"] == {r"^block\.0\.k": 1}
    assert load_adapters(tmp_path / "a")["block.0.k"].config == Config(1, 1.0)


@pytest.mark.parametrize("ranks", [(1,), (1, 2, 2)])
def test_a_mixture_of_experts_is_saved_and_loaded(tmp_path, ranks):
    """48 blocks of 128 experts: 18,432 modules, and a pattern for each of two thirds of them."""
    own, names = {}, ("gate", "up", "down")
    for number in range(48 * 128 * 3):
        expert, rank = number // 3, ranks[number % len(ranks)]
        path = f"model.layers.{expert // 128}.mlp.experts.{expert % 128}.{names[number % 3]}_proj"
        leaves = np.zeros((rank, 2), "f4"), np.zeros((2, rank), "f4"), np.ones(2, "f4")
        own[path] = AdaptedLayer(Adapter(*leaves), Config(rank, 1.0), LayerKind(), (2, 2))
    save_adapters(tmp_path / "a", own)
    found = load_adapters(tmp_path / "a")
    assert found.keys() == own.keys()
    assert all(found.layers[path].config == layer.config for path, layer in own.items())


def test_a_pattern_of_a_whole_path_and_others_are_tried_in_their_order(tmp_path):
    """PEFT takes the first pattern that matches, whatever its form."""
    first = {r"^block\.0\.q": 2, "q": 3, "^block.1.q": 4, r"^block\.0\.k$": 5, "k": 6}
    write_adapter(tmp_path / "a", alpha_pattern=first)
    found = load_adapters(tmp_path / "a").layers
    assert {path: layer.config.alpha for path, layer in found.items()} == {
        "block.0.q": 2,
        "block.0.k": 5,
        "block.1.q": 3,
    }
    write_adapter(tmp_path / "b", alpha_pattern=dict(reversed(first.items())))
    found = load_adapters(tmp_path / "b").layers
    assert {path: layer.config.alpha for path, layer in found.items()} == {
        "block.0.q": 3,
        "block.0.k": 6,
        "block.1.q": 4,
    }


def test_a_fresh_adapter_merges_to_its_base(tmp_path):
    base = write_model(tmp_path / "base", np.dtype("f4"))
    weights = {name: base[name] for name in base if name.removesuffix(".weight") in SHAPES}
    save_adapters(tmp_path / "adapter", doraxp.adapt(weights, "all-linear", Config(2), seed=0))
    paths = [str(tmp_path / name) for name in ("base", "adapter", "out")]
    assert main(["merge", *paths[:2], "--out", paths[2], "--compute", "float32"]) == 0
    for name in ("model-1.safetensors", "model-2.safetensors"):
        ours, theirs = (load_file(tmp_path / folder / name) for folder in ("out", "base"))
        assert {key: x.tobytes() for key, x in ours.items()} == {
            key: x.tobytes() for key, x in theirs.items()
        }


# doraxp inspect


@pytest.fixture
def inspected(tmp_path):
    base = write_model(tmp_path / "base", np.dtype("f4"))
    adapter = write_adapter(tmp_path / "adapter")
    paths = {name: str(tmp_path / name) for name in ("base", "adapter", "i.json", "i.png")}
    arguments = ["inspect", paths["adapter"], "--base", paths["base"], "--json", paths["i.json"]]
    assert main([*arguments, "--plot", paths["i.png"]]) == 0
    return tmp_path, base, adapter, json.loads((tmp_path / "i.json").read_text())


def test_inspect_agrees_with_the_formulas(inspected):
    folder, base, adapter, report = inspected
    assert report["format"] == "peft"
    assert (folder / "i.png").read_bytes().startswith(b"\x89PNG\r\n")
    for path, (a, b, m) in adapter.items():
        weight = base[f"{path}.weight"].astype("f8")
        update = 1.5 * b.astype("f8") @ a.astype("f8")
        v, after = weight + update, dense(weight, a, b, m)
        change = doraxp.magnitude_direction_change(weight, after)
        values = np.linalg.svd(update, compute_uv=False)
        parts = values[values > 1e-9] / values.sum()
        norms = [np.linalg.norm(x, axis=1) for x in (v, weight, update)]
        assert report["modules"][path] == {
            "kind": "linear",
            "update": "DoRA",
            "rank": 2,
            "alpha": 3.0,
            "update_norm": pytest.approx(np.linalg.norm(update), rel=1e-12),
            "effective_rank": pytest.approx(np.exp(-np.sum(parts * np.log(parts))), rel=1e-9),
            "magnitude_mean": pytest.approx(float(m.astype("f8").mean())),
            "magnitude_change": pytest.approx(float(change.magnitude), rel=1e-6),
            "direction_change": pytest.approx(float(change.direction), rel=1e-6),
            "conditioning": pytest.approx(
                float((norms[0] / (norms[1] + norms[2])).min()), rel=1e-6
            ),
            "zero_rows": 0,
        }


def test_inspect_needs_no_base(inspected, capsys):
    folder, *_ = inspected
    plot = ["--plot", str(folder / "i.png")]
    assert main(["inspect", str(folder / "adapter"), "--all", *plot]) == 0
    out = capsys.readouterr().out
    assert "block.1.q" in out
    assert "ΔM" not in out


def test_an_update_of_zero_has_rank_zero(tmp_path):
    zero = layers()["block.0.q"]
    zero = zero._replace(adapter=zero.adapter._replace(lora_b=np.zeros((7, 2), "f4")))
    assert doraxp.checkpoint.look_at(zero)[:2] == (0.0, 0.0)


def test_errors_of_inspect_and_convert_are_one_line(tmp_path, capsys, monkeypatch):
    for command in (["inspect", "none"], ["convert", "none", "--to", "mlx", "--out", "x"]):
        assert main(command) == 2
        assert capsys.readouterr().err.count("\n") == 1
    write_adapter(tmp_path / "a")
    find = {"matplotlib": None}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: find.get(name, True))
    assert main(["inspect", str(tmp_path / "a"), "--plot", str(tmp_path / "a.png")]) == 2
    assert install_hint("demo") in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["inspect", str(tmp_path / "a")]) == 2
    assert main(["convert", "none", "--to", "mlx", "--out", "x"]) == 2
    assert install_hint("checkpoint") in capsys.readouterr().err


def test_a_file_of_no_adapter_is_refused(tmp_path):
    save_file({"a.weight": np.ones((2, 2), "f4")}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="no tensor in it has a name of a known adapter"):
        load_adapters(tmp_path / "a.safetensors")
