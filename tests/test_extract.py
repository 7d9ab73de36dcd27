"""`doraxp extract` and `doraxp.checkpoint.extract`: a DoRA adapter from a full fine-tune."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
from checkpoints import dense, draw, read_folder, write_base, write_json
from safetensors.numpy import load_file, save_file

from doraxp._base.extras import install_hint
from doraxp.checkpoint import CheckpointError, extract, load_adapters, save_adapters
from doraxp.checkpoint import _subspace as subspace
from doraxp.checkpoint._extract import extract_layer
from doraxp.checkpoint._pair import Block
from doraxp.cli import main

RANKS = (1, 2, 4, 7)
SHAPES = [(24, 40), (40, 24), (33, 33), (8, 90), (90, 8), (1, 30), (30, 1)]
DTYPES = ("float64", "float32", "float16", ml_dtypes.bfloat16)
ROUNDING = 3e-7
"""An error may be off by this part of ‖W‖ or ‖W*‖, because A, B and m are float32."""


def gaussian(rng, w):
    return w + 0.1 * draw(rng, *w.shape)


def low_rank_and_noise(rng, w):
    out, inner = w.shape
    return w + draw(rng, out, 3) @ draw(rng, 3, inner) + 0.01 * draw(rng, out, inner)


def rows_scaled(rng, w):
    return w * (1 + 0.2 * draw(rng, len(w), 1)) + 0.01 * draw(rng, *w.shape)


def only_rows_scaled(rng, w):
    return w * (0.5 + rng.random((len(w), 1)))


def decaying(rng, w):
    left, right = (np.linalg.qr(draw(rng, n, min(w.shape)))[0] for n in w.shape)
    return w + left * 0.5 ** np.arange(min(w.shape)) @ right.T


def merge_of_an_adapter(rng, w):
    out, inner = w.shape
    m = np.linalg.norm(w, axis=1) * (0.5 + rng.random(out))
    return dense(w, draw(rng, 2, inner), 0.2 * draw(rng, out, 2), m)


def independent(rng, w):
    return draw(rng, *w.shape)


def from_rows_of_zero(rng, w):
    w[::3] = 0
    return w + draw(rng, *w.shape)


def to_rows_of_zero(rng, w):
    return np.where(np.arange(len(w))[:, None] % 3 == 0, 0, w + 0.1 * draw(rng, *w.shape))


def from_nothing(rng, w):
    w[:] = 0
    return draw(rng, *w.shape)


def few_numbers(rng, w):
    return w + (rng.random(w.shape) < 0.05)


def much_larger(rng, w):
    return 5000 * w + draw(rng, *w.shape)


def opposite(rng, w):
    return -w + 0.1 * draw(rng, *w.shape)


CHANGES = (
    gaussian, low_rank_and_noise, rows_scaled, only_rows_scaled, decaying, merge_of_an_adapter,
    independent, from_rows_of_zero, to_rows_of_zero, from_nothing, few_numbers, much_larger,
    opposite,
)  # fmt: skip


class Case(NamedTuple):
    """One matrix before and after, as the files have it, in float64."""

    base: np.ndarray
    tuned: np.ndarray

    def of_lora(self, rank):
        """The error of the truncated SVD."""
        values = np.linalg.svd(self.tuned - self.base, compute_uv=False)
        return np.linalg.norm(values[rank:])

    def of(self, layer):
        """The error of an adapter."""
        a, b, m = layer.adapter
        merged = dense(layer.kind.matrix(self.base).reshape(len(m), -1), a, b, m, 1)
        return np.linalg.norm(merged - layer.kind.matrix(self.tuned).reshape(len(m), -1))

    @property
    def rounding(self):
        return ROUNDING * max(np.linalg.norm(self.tuned), np.linalg.norm(self.base))


def write_pair(folder, pairs, **config):
    """Write BASE and TUNED with the matrices of some modules; return them as cases."""
    sides = [{f"{path}.weight": pair[side] for path, pair in pairs.items()} for side in (0, 1)]
    for name, tensors in zip(("base", "tuned"), sides, strict=True):
        write_base(folder / name, tensors, **config)
    return {
        path: Case(*(np.asarray(one).astype(np.float64) for one in pair))
        for path, pair in pairs.items()
    }


def drawn(change, shape, dtype, seed=0):
    rng = np.random.default_rng([seed, *shape])
    base = draw(rng, *shape, dtype="float64").astype(dtype)
    tuned = change(rng, base)
    return base.astype(dtype), np.asarray(tuned).astype(dtype)


def from_pair(folder, rank, **options):
    return extract(folder / "base", folder / "tuned", rank, **options)


def run(folder, *arguments):
    """Run `doraxp extract` on the folders base and tuned in `folder`, to the folder adapter."""
    paths = [str(folder / name) for name in ("base", "tuned")]
    return main(["extract", *paths, "--out", str(folder / "adapter"), "--jobs", "1", *arguments])


def refused(folder, capsys, *arguments):
    """Run an extraction that must write nothing, and return its error, which must be one line."""
    before = sorted(folder.iterdir())
    assert run(folder, "--rank", "2", *arguments) == 2
    assert sorted(folder.iterdir()) == before
    error = capsys.readouterr().err
    assert error.startswith("doraxp extract: error: ")
    assert error.count("\n") == 1
    return error


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """A few hundred small matrices, and the extraction of each rank."""
    folder = tmp_path_factory.mktemp("cases")
    pairs = {
        f"{change.__name__}.{dtype_name(dtype)}.{out}x{inner}": drawn(change, (out, inner), dtype)
        for change in CHANGES
        for dtype in DTYPES
        for out, inner in SHAPES
    }
    pairs = {path: pair for path, pair in pairs.items() if np.any(pair[0] != pair[1])}
    known = write_pair(folder, pairs)
    return known, {rank: from_pair(folder, rank) for rank in RANKS}


def dtype_name(dtype):
    return np.dtype(dtype).name


# Laws of the errors


@pytest.mark.parametrize("rank", RANKS)
def test_an_adapter_is_never_worse_than_svd_lora(cases, rank):
    known, found = cases
    assert len(known) > 300
    assert found[rank].adapters.keys() == known.keys()
    for path, case in known.items():
        bound = case.of_lora(rank) + case.rounding
        assert case.of(found[rank].adapters[path]) <= bound, path
        assert found[rank].closeness[path].error <= bound, path


@pytest.mark.parametrize("rank", RANKS)
def test_the_figures_are_those_of_the_definition(cases, rank):
    known, found = cases
    for path, case in known.items():
        closeness = found[rank].closeness[path]
        bound = case.rounding
        assert closeness.error == pytest.approx(case.of(found[rank].adapters[path]), abs=bound)
        assert closeness.lora_error == pytest.approx(case.of_lora(rank), abs=bound)
        norm = np.linalg.norm(case.tuned - case.base)
        assert closeness.update_norm == pytest.approx(norm, rel=1e-3)
        assert closeness.ratio <= 1 + 1e-9


def test_a_higher_rank_is_never_worse(cases):
    known, found = cases
    for path, case in known.items():
        errors = [found[rank].closeness[path].error for rank in RANKS]
        for lower, higher in itertools.pairwise(errors):
            assert higher <= 1.01 * lower + 1e-4 * np.linalg.norm(case.tuned), path


def test_scaled_rows_and_merges_come_back(cases):
    known, found = cases
    for path, case in known.items():
        if path.startswith(("only_rows_scaled.float64", "merge_of_an_adapter.float64")):
            error = found[4].closeness[path].error
            assert error <= 1e-4 * np.linalg.norm(case.tuned - case.base), path


def test_the_magnitude_is_the_best_for_the_direction(cases):
    known, found = cases
    for path, case in known.items():
        a, b, m = (leaf.astype(np.float64) for leaf in found[2].adapters[path].adapter)
        v = case.base + b @ a
        norm = np.linalg.norm(v, axis=1)
        desired = np.divide(np.sum(case.tuned * v, 1), norm, out=np.zeros_like(m), where=norm > 0)
        bound = 1e-6 * (np.linalg.norm(case.tuned) + 1e-30)
        np.testing.assert_allclose(m, np.maximum(desired, 0), rtol=1e-5, atol=bound, err_msg=path)


def test_the_rank_of_a_module_is_at_most_its_sides(cases):
    known, found = cases
    for path, case in known.items():
        layer = found[4].adapters[path]
        assert layer.config.rank == min(4, *case.base.shape)
        assert layer.config.scaling == 1
        assert {leaf.dtype for leaf in layer.adapter} == {np.dtype("float32")}


# Matrices that are too large to be kept in memory

LARGE = (700, 600)


@pytest.fixture(scope="module", params=["float16", "float32"])
def large(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    pairs = {one.__name__: drawn(one, LARGE, request.param) for one in CHANGES[:8]}
    return folder, write_pair(folder, pairs)


def test_a_large_matrix_is_never_worse_than_svd_lora(large):
    folder, known = large
    found = from_pair(folder, 12, jobs=2)
    for path, case in known.items():
        bound = case.of_lora(12) + case.rounding
        assert case.of(found.adapters[path]) <= bound, path
        assert found.closeness[path].lora_error <= 1.0001 * bound, path


def test_little_memory_for_the_subspace_costs_passes_only(large, monkeypatch):
    folder, known = large
    wide = from_pair(folder, 5, modules="^(gaussian|rows_scaled)$")
    monkeypatch.setattr(subspace, "_MEMORY", 1)
    found = from_pair(folder, 5, modules="^(gaussian|rows_scaled)$")
    for path, closeness in found.closeness.items():
        assert closeness.error <= known[path].of_lora(5)
        assert closeness.lora_error == pytest.approx(wide.closeness[path].lora_error, rel=2e-4)
        assert closeness.error == pytest.approx(wide.closeness[path].error, rel=2e-3)


def test_a_thin_matrix_is_exact(tmp_path):
    pair = drawn(gaussian, (40_000, 30), "float32")
    known = write_pair(tmp_path, {"thin": pair})["thin"]
    found = from_pair(tmp_path, 25).closeness["thin"]
    assert found.error <= found.lora_error == pytest.approx(known.of_lora(25), rel=1e-5)


@pytest.mark.parametrize("rank", [2, 9])
def test_the_columns_of_the_subspace_are_orthonormal(rank):
    pair = Arrays(*drawn(low_rank_and_noise, (70, 90), "float64"))
    start = np.random.default_rng(0).standard_normal((90, rank + 20))
    found = subspace.krylov(pair, np.zeros(70), start, rank, 1e9, lambda n: None, loss=-1.0)
    assert found.basis.shape[1] > start.shape[1]
    np.testing.assert_allclose(
        found.basis.T @ found.basis, np.eye(found.basis.shape[1]), atol=1e-12
    )
    np.testing.assert_allclose(found.weight, pair.base @ found.basis, atol=1e-12)
    np.testing.assert_allclose(found.difference, (pair.tuned - pair.base) @ found.basis, atol=1e-12)


def test_the_passes_end_when_the_largest_directions_are_found():
    """The noise beside them, which each pass finds more of, is not waited for."""
    rng = np.random.default_rng(0)
    change = rng.standard_normal((70, 200)) + 100 * np.outer(np.ones(70), np.ones(200))
    start = rng.standard_normal((200, 10))
    pair, total = Arrays(np.ones((70, 200)), 1 + change), float((change**2).sum())
    found = subspace.krylov(pair, np.zeros(70), start, 1, total, lambda n: None, loss=1e-5)
    assert found.is_settled
    assert found.basis.shape[1] <= 4 * start.shape[1]


def test_the_subspace_stays_within_its_memory(monkeypatch):
    pair = Arrays(*drawn(gaussian, (70, 90), "float64"))
    start = np.random.default_rng(0).standard_normal((90, 10))
    monkeypatch.setattr(subspace, "_MEMORY", 8 * 10 * (2 * 70 + 90) * 3)
    found = subspace.krylov(pair, np.zeros(70), start, 2, 1e9, lambda n: None, loss=-1.0)
    assert found.basis.shape == (90, 3 * 10)


# The function for one layer


class Arrays(NamedTuple):
    """A `Pair` in memory."""

    base: np.ndarray
    tuned: np.ndarray
    by_columns: bool = False

    @property
    def shape(self):
        return self.base.shape

    def blocks(self):
        out, inner = self.shape
        for at in range(0, inner if self.by_columns else out, 16):
            part = slice(at, min(at + 16, inner if self.by_columns else out))
            place = (slice(0, out), part) if self.by_columns else (part, slice(0, inner))
            yield Block(*place, self.base[place], self.tuned[place])


@pytest.mark.parametrize("shape", [(50, 60), (600, 540)])
@pytest.mark.parametrize("change", [gaussian, decaying, from_rows_of_zero])
def test_lora_is_the_truncated_svd(shape, change):
    case = Case(*drawn(change, shape, "float64"))
    found = extract_layer(Arrays(*case), 3, method="lora")
    assert found.magnitude is None
    error = np.linalg.norm(case.base + found.lora_b @ found.lora_a - case.tuned)
    assert found.error == found.lora_error == pytest.approx(error, rel=1e-6)
    assert found.error == pytest.approx(case.of_lora(3), rel=3e-5)


@pytest.mark.parametrize("method", ["dora", "lora"])
@pytest.mark.parametrize("shape", [(50, 60), (60, 50), (600, 540)])
@pytest.mark.parametrize("change", [decaying, low_rank_and_noise])
def test_the_rank_for_an_error_of_a_tenth_is_that_of_the_singular_values(shape, change, method):
    case = Case(*drawn(change, shape, "float64"))
    limit = 0.1 * np.linalg.norm(case.tuned - case.base)
    least = next(rank for rank in range(1, min(shape)) if case.of_lora(rank) <= limit)
    for rank in (1, least, least + 2):
        assert extract_layer(Arrays(*case), rank, method=method).rank_for_tenth == least


def test_a_rank_for_an_error_of_a_tenth_is_unknown_outside_of_the_subspace():
    case = Case(*drawn(gaussian, (600, 540), "float64"))
    assert extract_layer(Arrays(*case), 1, method="lora").rank_for_tenth is None


@pytest.mark.parametrize("method", ["dora", "lora"])
def test_blocks_of_columns_and_of_rows_give_the_same_figures(method):
    base, tuned = drawn(rows_scaled, (600, 540), "float64")
    rows, columns = (
        extract_layer(Arrays(base, tuned, by_columns), 4, method=method)
        for by_columns in (False, True)
    )
    assert rows[3:6] == pytest.approx(columns[3:6], rel=1e-6)
    assert rows.rank_for_tenth == columns.rank_for_tenth


def test_no_passes_at_all_are_still_not_worse_than_lora(monkeypatch):
    monkeypatch.setattr("doraxp.checkpoint._extract._CYCLES", 0)
    found = extract_layer(Arrays(*drawn(rows_scaled, (600, 540), "float32")), 4)
    assert found.error < found.lora_error


def test_lora_with_its_best_magnitude_is_taken_where_the_turns_are_worse(monkeypatch):
    def worse(found, sums, gamma, rank, **limits):
        return subspace.Best(np.eye(rank, found.difference.shape[1]), gamma, 1e9)

    monkeypatch.setattr("doraxp.checkpoint._extract.alternate", worse)
    case = Case(*drawn(decaying, (30, 40), "float64"))
    found = extract_layer(Arrays(*case), 4)
    assert found.error <= found.lora_error == pytest.approx(case.of_lora(4), abs=case.rounding)


# Files


def test_the_merge_of_the_saved_adapter_has_the_reported_error(tmp_path):
    pairs = {one.__name__: drawn(one, (40, 30), "float32") for one in CHANGES[:6]}
    known = write_pair(tmp_path, pairs)
    assert run(tmp_path, "--rank", "3", "--json", str(tmp_path / "figures.json")) == 0
    paths = [str(tmp_path / name) for name in ("base", "adapter")]
    assert main(["merge", *paths, "--out", str(tmp_path / "out"), "--dtype", "float64"]) == 0
    merged = read_folder(tmp_path / "out")
    modules = json.loads((tmp_path / "figures.json").read_text())["modules"]
    for path, case in known.items():
        error = np.linalg.norm(merged[f"{path}.weight"] - case.tuned)
        assert error == pytest.approx(modules[path]["error"], abs=case.rounding)
        relative = modules[path]["error"] / modules[path]["update_norm"]
        assert modules[path]["relative_error"] == pytest.approx(relative)


def test_the_same_models_give_the_same_bytes_with_any_number_of_jobs(tmp_path):
    pairs = {one.__name__: drawn(one, (700, 600), "float16") for one in CHANGES[:3]}
    write_pair(tmp_path, pairs)
    for jobs in (1, 3):
        save_adapters(tmp_path / str(jobs), from_pair(tmp_path, 4, jobs=jobs).adapters)
    one, other = (tmp_path / jobs / "adapter_model.safetensors" for jobs in "13")
    assert one.read_bytes() == other.read_bytes()


def test_equal_matrices_are_left_out(tmp_path):
    pair = drawn(gaussian, (6, 5), "float32")
    write_pair(tmp_path, {"a": pair, "b": (pair[0], pair[0])})
    found = from_pair(tmp_path, 2)
    assert (*found.adapters, *found.equal) == ("a", "b")


def test_shards_and_dtypes_may_differ(tmp_path):
    base, tuned = drawn(gaussian, (12, 10), ml_dtypes.bfloat16)
    write_pair(tmp_path, {"a": (base, tuned.astype("float32")), "b": (base, tuned)})
    tensors = read_folder(tmp_path / "tuned")
    (tmp_path / "tuned" / "model.safetensors").unlink()
    for number, (name, tensor) in enumerate(tensors.items()):
        save_file({name: tensor}, tmp_path / "tuned" / f"{number}.safetensors")
    weight_map = {name: f"{number}.safetensors" for number, name in enumerate(tensors)}
    write_json(tmp_path / "tuned" / "model.safetensors.index.json", {"weight_map": weight_map})
    found = from_pair(tmp_path, 3).closeness
    assert found["a"] == pytest.approx(found["b"], rel=1e-5)


@pytest.mark.parametrize("shape", [(20, 30), (600, 520)])
def test_a_weight_that_is_stored_transposed_has_the_same_adapter(tmp_path, shape):
    pair = drawn(rows_scaled, shape, "float32")
    write_pair(tmp_path / "linear", {"h.0.c_attn": pair})
    write_pair(
        tmp_path / "conv1d",
        {"h.0.c_attn": [np.ascontiguousarray(one.T) for one in pair]},
        model_type="gpt2",
    )
    linear, conv1d = (from_pair(tmp_path / name, 4) for name in ("linear", "conv1d"))
    assert conv1d.adapters["h.0.c_attn"].kind.name == "transposed"
    one, other = (found.closeness["h.0.c_attn"] for found in (linear, conv1d))
    assert other[:3] == pytest.approx(one[:3], rel=1e-5)
    assert other.rank_for_tenth == one.rank_for_tenth
    save_adapters(tmp_path / "adapter", conv1d.adapters)
    (layer,) = load_adapters(tmp_path / "adapter").values()
    assert layer.adapter.magnitude.shape == shape[:1]


def test_the_bias_tells_how_a_weight_is_stored(tmp_path):
    base, tuned = drawn(gaussian, (8, 24), "float32")
    for name, weight in (("base", base), ("tuned", tuned)):
        write_base(tmp_path / name, {"a.weight": weight, "a.bias": np.ones(24, np.float32)})
    assert from_pair(tmp_path, 2).adapters["a"].kind.name == "transposed"


def test_a_convolution_is_a_matrix_of_its_filters(tmp_path):
    base, tuned = drawn(gaussian, (10, 36), "float32")
    pair = [one.reshape(10, 4, 3, 3) for one in (base, tuned)]
    known = write_pair(tmp_path, {"conv": pair, "flat": (base, tuned)})
    found = from_pair(tmp_path, 2)
    assert found.adapters["conv"].kind.name == "conv"
    assert found.closeness["conv"] == found.closeness["flat"]
    assert known["conv"].of(found.adapters["conv"]) == pytest.approx(found.closeness["conv"].error)


def test_one_file_may_be_a_model(tmp_path):
    write_pair(tmp_path, {"a": drawn(gaussian, (6, 5), "float32")})
    files = [tmp_path / name / "model.safetensors" for name in ("base", "tuned")]
    assert list(extract(*files, 2).adapters) == ["a"]


OTHERS = {
    "embed_tokens.weight": (9, 5),
    "norm.weight": (5,),
    "a.bias": (6,),
    "scale": (),
    "wpe.weight": (7, 5),
    "depthwise.weight": (4, 1, 3),
    "mlp.experts.up.weight": (2, 3, 4),
}


def write_others(folder, tuned):
    """Write a matrix and tensors of other kinds; `tuned` makes those of TUNED."""
    rng = np.random.default_rng(0)
    others = {name: draw(rng, *shape) for name, shape in OTHERS.items()}
    pair = drawn(gaussian, (6, 5), "float32")
    write_base(folder / "base", {"a.weight": pair[0], "steps": np.arange(3), **others})
    write_base(folder / "tuned", {"a.weight": pair[1], "steps": np.arange(3), **tuned(others)})


def test_tensors_that_an_adapter_cannot_have_are_counted(tmp_path, capsys):
    write_others(
        tmp_path, lambda others: {name: np.asarray(1.5 * one) for name, one in others.items()}
    )
    found = from_pair(tmp_path, 2)
    assert list(found.adapters) == ["a"]
    assert found.left_out == pytest.approx(dict.fromkeys(sorted(OTHERS), 0.5))
    assert run(tmp_path, "--rank", "2") == 0
    warning = capsys.readouterr().err
    assert "warning: 7 tensors of TUNED differ and are not in DIR: " in warning
    assert "the largest relative change is 0.5, of " in warning


def test_tensors_that_do_not_differ_are_not_counted(tmp_path, capsys):
    def in_float64(others):
        return {name: one.astype("float64") for name, one in others.items()}

    write_others(tmp_path, in_float64)
    assert from_pair(tmp_path, 2).left_out == {}
    assert run(tmp_path, "--rank", "2") == 0
    assert "warning" not in capsys.readouterr().err


def test_new_tensors_and_integers_have_no_relative_change(tmp_path, capsys):
    def changed(others):
        others["norm.weight"] = np.full(5, np.nan, np.float32)
        others["wpe.weight"] = others["wpe.weight"][:3]
        return others | {"new": np.ones(2), "steps": np.ones(3, np.int64)}

    write_others(tmp_path, changed)
    names = ["new", "norm.weight", "steps", "wpe.weight"]
    assert from_pair(tmp_path, 2).left_out == dict.fromkeys(names, np.inf)
    assert run(tmp_path, "--rank", "2") == 0
    assert (
        "…; 4 tensors are new, or of another shape, or without numbers" in capsys.readouterr().err
    )


def test_a_tensor_that_was_zero_has_no_relative_change(tmp_path):
    pair = drawn(gaussian, (6, 5), "float32")
    for name, weight, bias in (("base", pair[0], 0), ("tuned", pair[1], 1)):
        tensors = {"a.weight": weight, "a.bias": np.full(6, bias, np.float32)}
        write_base(tmp_path / name, tensors)
    assert from_pair(tmp_path, 2).left_out == {"a.bias": np.inf}


@pytest.mark.parametrize(("tied", "in_adapter"), [(False, True), (True, False)])
def test_an_untied_head_is_a_matrix(tmp_path, tied, in_adapter):
    pair = drawn(gaussian, (9, 5), "float32")
    modules = ["model.embed_tokens", "lm_head", "model.a"]
    write_pair(
        tmp_path,
        dict.fromkeys(modules, pair),
        model_type="llama",
        architectures=["LlamaForCausalLM"],
        tie_word_embeddings=tied,
    )
    assert ("lm_head" in from_pair(tmp_path, 2).adapters) == in_adapter


def test_modules_restricts_the_adapter(tmp_path):
    pair = drawn(gaussian, (6, 5), "float32")
    write_pair(tmp_path, {"block.0.q": pair, "block.0.k": pair, "block.1.q": pair})
    found = from_pair(tmp_path, 2, modules=r"\.q$")
    assert list(found.adapters) == ["block.0.q", "block.1.q"]
    assert list(found.left_out) == ["block.0.k.weight"]


# The command


def test_the_table_has_a_row_for_each_kind_of_module(tmp_path, capsys):
    pair = drawn(gaussian, (40, 30), "float32")
    write_pair(tmp_path, {f"block.{n}.{one}": pair for n in (0, 1) for one in "qk"})
    assert run(tmp_path, "--rank", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[3:5]] == [["k", "2"], ["q", "2"]]
    assert max(map(len, lines[:-1])) <= 80
    assert lines[-1].endswith("adapter: an adapter of 4 modules")
    assert run(tmp_path, "--rank", "2", "--force", "--all") == 0
    assert "block.1.q" in capsys.readouterr().out


@pytest.mark.parametrize("usual_passes", [1, 100])
def test_progress_ends_at_all_bytes(tmp_path, monkeypatch, usual_passes):
    monkeypatch.setattr("doraxp.checkpoint._extract_model._USUAL_PASSES", usual_passes)
    pair = drawn(gaussian, (40, 30), "float32")
    write_pair(tmp_path, {"a": pair, "b": (pair[0], pair[0])})
    seen = []
    from_pair(tmp_path, 2, on_bytes=lambda *pair: seen.append(pair))
    assert seen == sorted(seen)
    assert seen[-1] == (2 * pair[0].nbytes, 2 * pair[0].nbytes)


def test_a_folder_that_exists_is_refused_before_the_work(tmp_path, capsys):
    write_pair(tmp_path, {"a": drawn(gaussian, (6, 5), "float32")})
    (tmp_path / "adapter").mkdir()
    assert "already exists" in refused(tmp_path, capsys)
    (tmp_path / "tuned" / "model.safetensors").unlink()
    assert "already exists" in refused(tmp_path, capsys)


def damaged(folder, change):
    """Write two models, and change the tensors of TUNED."""
    pair = drawn(gaussian, (6, 6), "float32")
    write_pair(folder, {"a": pair, "b": pair})
    path = folder / "tuned" / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def without_a(tensors):
    tensors.pop("a.weight")


def of_another_shape(tensors):
    tensors["a.weight"] = tensors["a.weight"][:3].copy()


def with_nan(tensors):
    tensors["a.weight"][2, 3] = np.nan


def too_large(tensors):
    tensors["a.weight"] = np.full((6, 6), 1e200)


def quantised(tensors):
    tensors["a.weight"] = np.ones((6, 6), np.int8)


def with_scales(tensors):
    tensors["a.weight_scale"] = np.ones(6, np.float32)


def with_other_names(tensors):
    for name in ("a.weight", "b.weight"):
        tensors[f"model.{name}"] = tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_a, "tuned: lacks a.weight of BASE: leave the module out with --modules"),
        (of_another_shape, "tuned: a.weight must have shape (6, 6) as in BASE, got (3, 6)"),
        (with_nan, "tuned/model.safetensors: a.weight contains NaN or infinity"),
        (too_large, "tuned/model.safetensors: a.weight has values too large to square"),
        (quantised, "tuned/model.safetensors: a.weight is quantised (dtype I8)"),
        (with_scales, "tuned/model.safetensors: a.weight is quantised (dtype F32)"),
        (with_other_names, "has no tensor of "),
    ],
)
def test_models_that_do_not_fit_are_refused_by_name(tmp_path, capsys, change, message):
    damaged(tmp_path, change)
    assert message in refused(tmp_path, capsys)


def test_nan_in_base_is_named(tmp_path, capsys):
    damaged(tmp_path, with_nan)
    (tmp_path / "base").rename(tmp_path / "other")
    (tmp_path / "tuned").rename(tmp_path / "base")
    (tmp_path / "other").rename(tmp_path / "tuned")
    assert "base/model.safetensors: a.weight contains NaN" in refused(tmp_path, capsys)


def test_equal_models_are_refused(tmp_path, capsys):
    pair = drawn(gaussian, (6, 6), "float32")
    write_pair(tmp_path, {"a": (pair[0], pair[0])})
    assert "no matrix differs from BASE's, and 0 other tensors do" in refused(tmp_path, capsys)


def test_models_without_a_matrix_are_refused(tmp_path, capsys):
    write_pair(tmp_path, {"norm": (np.ones(3), np.ones(3))})
    assert "base: must have a matrix, got" in refused(tmp_path, capsys)


def test_modules_that_are_not_there_are_refused(tmp_path, capsys):
    write_pair(tmp_path, {"a": drawn(gaussian, (6, 6), "float32")})
    assert "must have a matrix in a module of 'c', got" in refused(
        tmp_path, capsys, "--modules", "c"
    )


def test_a_pipeline_is_refused(tmp_path, capsys):
    pair = drawn(gaussian, (6, 6), "float32")
    for name, weight in zip(("base", "tuned"), pair, strict=True):
        write_base(tmp_path / name / "unet", {"a.weight": weight})
        write_json(tmp_path / name / "model_index.json", {})
    assert "is a pipeline of diffusers: give the folder of one" in refused(tmp_path, capsys)


def test_a_square_weight_of_unknown_storage_is_refused(tmp_path, capsys):
    rng = np.random.default_rng(0)
    tensors = {
        "h.c_attn.weight": draw(rng, 4, 12),
        "h.c_attn.bias": draw(rng, 12),
        "h.c_proj.weight": draw(rng, 12, 4),
        "h.c_proj.bias": draw(rng, 12),
        "h.c_fc.weight": draw(rng, 4, 4),
    }
    write_base(tmp_path / "base", tensors, model_type="gpt2")
    write_base(tmp_path / "tuned", {name: 2 * one for name, one in tensors.items()})
    assert "nothing tells whether h.c_attn.weight is stored" in refused(tmp_path, capsys)


@pytest.mark.parametrize("arguments", [["--rank", "0"], ["--rank", "2", "--modules", "("]])
def test_wrong_arguments_are_refused(tmp_path, capsys, arguments):
    with pytest.raises(SystemExit) as error:
        run(tmp_path, *arguments)
    assert error.value.code == 2
    assert "must be" in (text := capsys.readouterr().err) or "not a regular expression" in text


def test_figures_are_not_written_into_a_model(tmp_path, capsys):
    write_pair(tmp_path, {"a": drawn(gaussian, (6, 6), "float32")})
    error = refused(tmp_path, capsys, "--json", str(tmp_path / "tuned" / "figures.json"))
    assert "--json must not be in" in error


def test_without_the_extra_it_says_how_to_get_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run(tmp_path, "--rank", "2") == 2
    assert install_hint("checkpoint") in capsys.readouterr().err


def test_a_rank_below_1_is_refused(tmp_path):
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        from_pair(tmp_path, 0)


def test_an_error_stops_the_other_threads(tmp_path):
    small, large = (drawn(gaussian, (size, size), "float32") for size in (5, 600))
    small[1][0, 0] = np.inf
    write_pair(tmp_path, {"a": small, "b": large})
    seen = []
    with pytest.raises(CheckpointError, match=r"a\.weight contains NaN or infinity"):
        from_pair(tmp_path, 4, jobs=2, on_bytes=lambda done, total: seen.append(done))
    assert max(seen) < large[0].nbytes


def test_memory_does_not_grow_with_the_matrices(tmp_path):
    """A quarter of one of the matrices in float64 is enough for all."""
    shape = (2600, 2600)
    write_pair(tmp_path, dict.fromkeys("ab", drawn(gaussian, shape, "float16")))
    tracemalloc.start()
    try:
        from_pair(tmp_path, 2)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2600 * 2600 * 8 / 4 + (24 << 20)
