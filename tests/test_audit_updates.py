"""The audit of merges of LoRA, LoHa and LoKr: right ones pass, and wrong ones are named."""

from __future__ import annotations

import numpy as np
import pytest
from checkpoints import draw, read_folder, write_base
from safetensors.numpy import save_file
from updates import ALGORITHMS, ALPHA, IN, OUT, PATHS, RANK, SHAPES, prefixed

from doraxp.checkpoint import (
    Options,
    audit,
    load_adapters,
    look_at,
    look_at_base,
    open_model,
    plan_merge,
    run_merge,
)
from doraxp.cli import main

S = ALPHA / RANK
CASES = [
    (name, kind, norms)
    for name, (_, kinds) in ALGORITHMS.items()
    for kind in kinds
    for norms in (None, "outputs", "inputs")
]


DOUBLED = {"merged twice", "α instead of s"}
"""Without a magnitude and with rank 2, both make the update twice as large."""


class Case:
    """A base with one layer of each kind, and an adapter of one of them."""

    def __init__(self, folder, name, kind, norms, dtype="float32"):
        rng = np.random.default_rng(5)
        self.folder, self.name, self.dtype = folder, f"{PATHS[kind]}.weight", dtype
        leaves, change = ALGORITHMS[name][0](rng, kind)
        self.change = S * np.asarray(change).reshape(SHAPES[kind])
        weights = {f"{path}.weight": draw(rng, *SHAPES[own]) for own, path in PATHS.items()}
        self.base = {key: weight.astype(dtype) for key, weight in weights.items()}
        shape = {"outputs": (OUT, 1), "inputs": (1, IN)}.get(norms)
        self.m = None
        if shape is not None:
            self.axes = tuple(a for a in range(self.change.ndim) if a != (norms == "inputs"))
            ones = [1] * (self.change.ndim - 2)
            v = self.base[self.name].astype("f8") + self.change
            near = np.sqrt(np.sum(v * v, axis=self.axes, keepdims=True))
            self.m = (near * (1 + 0.3 * rng.random((*shape, *ones)))).astype("f4")
            leaves = leaves | {"dora_scale": self.m}
        write_base(folder / "base", self.base)
        tensors = prefixed(kind, leaves | {"alpha": np.float32(ALPHA)})
        save_file(tensors, folder / "adapter.safetensors")
        self.plan = plan_merge(folder / "base", folder / "adapter.safetensors", Options())

    def right(self, change=None, weight=None):
        v = self.base[self.name].astype("f8") if weight is None else weight
        v = v + (self.change if change is None else change)
        if self.m is None:
            return v
        return self.m * v / np.sqrt(np.sum(v * v, axis=self.axes, keepdims=True))

    def verdict(self, weight):
        out = self.folder / "out"
        if out.exists():
            for file in out.iterdir():
                file.unlink()
            out.rmdir()
        write_base(out, self.base | {self.name: weight.astype(self.dtype)})
        return audit(self.plan, out)[self.name]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "kind", "norms"), CASES)
def test_a_right_merge_passes(tmp_path, name, kind, norms, dtype):
    case = Case(tmp_path, name, kind, norms, dtype)
    run_merge(case.plan, tmp_path / "merged")
    found = audit(case.plan, tmp_path / "merged")
    assert found[case.name].verdict == "exact"
    assert all(verdict.right for verdict in found.values())
    other = case.verdict(case.right())
    assert other.verdict in ("exact", "rounded")
    assert other.kept == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(("name", "kind", "norms"), CASES)
def test_a_wrong_merge_is_named(tmp_path, name, kind, norms):
    case = Case(tmp_path, name, kind, norms)
    wrong = {
        "unchanged": case.base[case.name],
        "merged twice": case.right(weight=case.right()),
        "the update is subtracted": case.right(-case.change),
    }
    if name != "lokr":  # two whole sides, with s = 1
        wrong["scaled by s²"] = case.right(S * case.change)
        wrong["α instead of s"] = case.right(RANK * case.change)
    if norms is not None:
        wrong["plain LoRA"] = case.base[case.name] + case.change
    for verdict, weight in wrong.items():
        found = case.verdict(np.asarray(weight))
        assert not found.right
        if norms is None and verdict in DOUBLED:
            assert set(found.verdict.split(" or ")) <= DOUBLED
        else:
            assert found.verdict == verdict


@pytest.mark.parametrize(("name", "kind"), [("lora", "linear"), ("loha", "conv"), ("lokr", "conv")])
def test_lora_that_was_merged_as_dora_with_the_norms_of_the_base_is_named(tmp_path, name, kind):
    """PEFT does this where the configuration says DoRA and the magnitudes are missing."""
    case = Case(tmp_path, name, kind, None)
    axes = tuple(range(1, case.change.ndim))
    w = case.base[case.name].astype("f8")
    v = w + case.change
    lengths = [np.sqrt(np.sum(x * x, axis=axes, keepdims=True)) for x in (w, v)]
    found = case.verdict(lengths[0] / lengths[1] * v)
    assert (found.right, found.verdict) == (False, "the norms of BASE as m")


@pytest.mark.parametrize(("name", "kind", "norms"), CASES)
def test_one_damaged_number_is_found(tmp_path, name, kind, norms):
    case = Case(tmp_path, name, kind, norms)
    weight = case.right()
    weight.reshape(-1)[37] += np.abs(weight).max()
    found = case.verdict(weight)
    assert (found.right, found.verdict) == (False, "damaged")


def test_another_lora_is_told_by_its_distances(tmp_path):
    case = Case(tmp_path, "loha", "linear", None)
    rng = np.random.default_rng(9)
    found = case.verdict(case.base[case.name] + 3 * rng.standard_normal((OUT, IN)))
    assert (found.right, found.verdict) == (False, "another adapter")
    assert "of ‖W' − W‖" in found.detail
    assert "differ from m" not in found.detail


@pytest.mark.parametrize(("name", "kind", "norms"), CASES)
def test_inspect_has_the_figures_of_the_dense_update(tmp_path, name, kind, norms):
    case = Case(tmp_path, name, kind, norms)
    adapters = load_adapters(tmp_path / "adapter.safetensors")
    ((path, layer),) = adapters.items()
    figures = look_at(layer)
    values = np.linalg.svd(case.change.reshape(OUT, -1), compute_uv=False)
    parts = values[values > 1e-9] / values.sum()
    assert figures.update_norm == pytest.approx(np.linalg.norm(case.change), rel=1e-5)
    assert figures.effective_rank == pytest.approx(np.exp(-np.sum(parts * np.log(parts))), rel=1e-3)
    assert figures.magnitude_mean == (None if norms is None else pytest.approx(case.m.mean()))
    against = look_at_base(open_model(tmp_path / "base"), adapters)[path]
    w, new = case.base[case.name].astype("f8"), case.right()
    axes = case.axes if norms is not None else tuple(range(1, w.ndim))
    before, after = (np.sqrt(np.sum(x * x, axis=axes)) for x in (w, new))
    cosines = np.sum(w * new, axis=axes) / (before * after)
    assert against.magnitude_change == pytest.approx(np.mean(np.abs(after - before)), rel=1e-4)
    assert against.direction_change == pytest.approx(np.mean(1 - cosines), rel=1e-4)
    v = w + case.change
    n, update = (np.sqrt(np.sum(x * x, axis=axes)) for x in (v, case.change))
    assert against.conditioning == pytest.approx((n / (before + update)).min(), rel=1e-4)


def test_the_commands_show_other_updates(tmp_path, capsys):
    Case(tmp_path, "lora", "linear", None)
    adapter, base = str(tmp_path / "adapter.safetensors"), str(tmp_path / "base")
    assert main(["inspect", adapter, "--base", base, "--plot", str(tmp_path / "p.png")]) == 0
    assert (tmp_path / "p.png").stat().st_size > 10_000
    assert main(["merge", base, adapter, "--out", str(tmp_path / "o"), "--dry-run"]) == 0
    assert "LoRA" in capsys.readouterr().out
    assert main(["merge", base, adapter, "--out", str(tmp_path / "o"), "--verify"]) == 0
    assert main(["audit", base, adapter, str(tmp_path / "o")]) == 0
    assert read_folder(tmp_path / "o").keys() == read_folder(tmp_path / "base").keys()


def test_a_bias_beside_lora_is_not_scaled(tmp_path):
    case = Case(tmp_path, "lora", "linear", None)
    bias = {"down.0.bias": np.ones(OUT, "f4")}
    base = case.base | bias
    (tmp_path / "base" / "model.safetensors").unlink()
    save_file(base, tmp_path / "base" / "model.safetensors")
    case.plan = plan_merge(tmp_path / "base", tmp_path / "adapter.safetensors", Options())
    write_base(
        tmp_path / "out",
        base | {case.name: case.right().astype("f4"), "down.0.bias": 2 * bias["down.0.bias"]},
    )
    assert audit(case.plan, tmp_path / "out")["down.0.bias"].verdict == "changed"


def test_lora_of_a_square_weight_that_is_another_is_not_named(tmp_path):
    rng = np.random.default_rng(5)
    base = {"up.0.weight": draw(rng, 12, 12)}
    write_base(tmp_path / "base", base)
    leaves = {"lora_down.weight": draw(rng, 2, 12), "lora_up.weight": draw(rng, 12, 2)}
    save_file(prefixed("other", leaves), tmp_path / "adapter.safetensors")
    plan = plan_merge(tmp_path / "base", tmp_path / "adapter.safetensors", Options())
    write_base(tmp_path / "out", {"up.0.weight": draw(rng, 12, 12)})
    assert audit(plan, tmp_path / "out")["up.0.weight"].verdict == "another adapter"
    change = leaves["lora_up.weight"] @ leaves["lora_down.weight"]
    flipped = np.ascontiguousarray((base["up.0.weight"] + change).T)
    write_base(tmp_path / "flipped", {"up.0.weight": flipped})
    assert audit(plan, tmp_path / "flipped")["up.0.weight"].verdict == "transposed"
