"""PEFT's LoHa and LoKr: the tensors as LyCORIS names them, the numbers in the configuration."""

from __future__ import annotations

import numpy as np
import pytest
from checkpoints import PREFIX, draw, read_folder, write_base, write_json
from safetensors.numpy import save_file
from updates import IN, OUT, PATHS, RANK, SHAPES, loha, loha_with_cores, lokr, lokr_of_factors

from doraxp.cli import main

ALPHA = 5.0
S = ALPHA / RANK
CONV1 = (OUT, IN, 3)


def write(folder, leaves, kind="linear", *, adapter="", beside=None, **entries):
    rng = np.random.default_rng(3)
    base = {f"{path}.weight": draw(rng, *SHAPES[own]) for own, path in PATHS.items()}
    base |= {"conv1.weight": draw(rng, *CONV1), "head.weight": draw(rng, 5, 4)}
    write_base(folder / "base", base)
    path = "conv1" if kind == "conv1" else PATHS[kind]
    tensors = {f"{PREFIX}{path}.{name}{adapter}": leaf for name, leaf in leaves.items()}
    (folder / "adapter").mkdir()
    save_file(tensors | (beside or {}), folder / "adapter" / "adapter_model.safetensors")
    kinds = {"hada_w1_a": "LOHA", "lokr_w1": "LOKR", "lokr_w1_a": "LOKR"}
    peft_type = next(value for name, value in kinds.items() if name in leaves)
    config = {"peft_type": peft_type, "r": RANK, "alpha": ALPHA, **entries}
    write_json(folder / "adapter" / "adapter_config.json", config)
    return base


def run(folder, *arguments):
    paths = [str(folder / name) for name in ("base", "adapter")]
    return main(["merge", *paths, "--out", str(folder / "out"), *arguments])


CASES = {
    "LoHa": (loha, "linear", S),
    "LoHa of a convolution": (loha, "conv", S),
    "LoHa with cores": (loha_with_cores, "conv", S),
    "LoKr of factors": (lokr_of_factors, "conv", S),
    # Unlike LyCORIS, PEFT scales two whole sides too; `lokr` has divided its scale out.
    "LoKr of whole sides": (lokr, "linear", S * S),
}


@pytest.mark.parametrize("case", CASES)
def test_merge_is_the_formula(tmp_path, case):
    draw_leaves, kind, scale = CASES[case]
    leaves, change = draw_leaves(np.random.default_rng(7), kind)
    base = write(tmp_path, leaves, kind)
    assert run(tmp_path, "--verify") == 0
    name = f"{PATHS[kind]}.weight"
    wanted = base[name] + scale * np.asarray(change).reshape(base[name].shape)
    found = read_folder(tmp_path / "out")[name]
    assert np.abs(found - wanted).max() <= 1e-6 * np.abs(wanted).max()


def test_a_whole_side_of_three_axes_is_multiplied_as_peft_does(tmp_path):
    """NumPy aligns the last axes of its arguments, and so does PEFT's product."""
    rng = np.random.default_rng(7)
    leaves = {"lokr_w1": draw(rng, 3, 4), "lokr_w2": draw(rng, 6, 3, 3)}
    base = write(tmp_path, leaves, "conv1")
    assert run(tmp_path) == 0
    change = np.kron(leaves["lokr_w1"][None].astype("f8"), leaves["lokr_w2"].astype("f8"))
    wanted = base["conv1.weight"] + S * change.reshape(CONV1)
    found = read_folder(tmp_path / "out")["conv1.weight"]
    assert np.abs(found - wanted).max() <= 1e-6 * np.abs(wanted).max()


def test_ranks_and_alphas_follow_patterns(tmp_path):
    leaves, change = loha(np.random.default_rng(7), "linear")
    patterns = {"rank_pattern": {"down.0": RANK}, "alpha_pattern": {"down.0": 8.0}}
    base = write(tmp_path, leaves, r=64, **patterns)
    assert run(tmp_path) == 0
    wanted = base["down.0.weight"] + 8.0 / RANK * change
    found = read_folder(tmp_path / "out")["down.0.weight"]
    assert np.abs(found - wanted).max() <= 1e-6 * np.abs(wanted).max()


def test_modules_that_were_trained_in_full_are_taken(tmp_path):
    leaves, _ = loha(np.random.default_rng(7), "linear")
    head = np.ones((5, 4), "f4")
    write(
        tmp_path, leaves,
        beside={f"{PREFIX}head.weight": head}, modules_to_save=["head"],
    )  # fmt: skip
    assert run(tmp_path) == 0
    np.testing.assert_array_equal(read_folder(tmp_path / "out")["head.weight"], head)


def test_one_of_two_adapters_is_chosen(tmp_path, capsys):
    leaves, change = loha(np.random.default_rng(7), "linear")
    other = {f"{PREFIX}down.0.{name}.b": 2 * leaf for name, leaf in leaves.items()}
    base = write(tmp_path, leaves, adapter=".a", beside=other)
    assert run(tmp_path) == 2
    assert "has the adapters a, b: choose one with --adapter-name NAME" in capsys.readouterr().err
    assert run(tmp_path, "--adapter-name", "c") == 2
    assert "adapter_name must be one of a, b, got 'c'" in capsys.readouterr().err
    assert run(tmp_path, "--adapter-name", "a") == 0
    wanted = base["down.0.weight"] + S * change
    found = read_folder(tmp_path / "out")["down.0.weight"]
    assert np.abs(found - wanted).max() <= 1e-6 * np.abs(wanted).max()


def test_another_rank_than_that_of_the_factors_is_refused(tmp_path, capsys):
    write(tmp_path, loha(np.random.default_rng(7), "linear")[0], r=RANK + 1)
    assert run(tmp_path) == 2
    error = capsys.readouterr().err
    assert f"says rank {RANK + 1}, but its factors have rank {RANK}" in error
