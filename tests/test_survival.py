"""How much of an update a merge keeps: the report, stochastic rounding, and suspicious norms."""

from __future__ import annotations

import hashlib
import re
import shutil

import ml_dtypes
import numpy as np
import pytest
from checkpoints import dense, draw, peft_config, write_json
from safetensors.numpy import load_file, save_file

from doraxp.checkpoint import (
    Options,
    _matrix,
    _sampled_norms,
    _survival,
    plan_merge,
    run_merge,
    sample_norms,
)
from doraxp.checkpoint._engine import Reused
from doraxp.checkpoint._precision import PRECISION, count_infinite
from doraxp.checkpoint._rounding import PIECE, Stochastic, to_either, to_nearest
from doraxp.checkpoint._safetensors import DTYPES
from doraxp.cli import main

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
HALF = [BFLOAT16, np.dtype(np.float16)]
NAMES = {np.dtype(np.float16): "F16", BFLOAT16: "BF16"}
RANK = 4


def norms(weight):
    return np.linalg.norm(weight.astype(np.float64), axis=1).astype(np.float32)


def write(folder, dtype, update, *, shape=(96, 64), modules=2, transposed=False, seed=0):
    """Write a base and an adapter whose update is `update` of the weight; return W and W'."""
    rng = np.random.default_rng(seed)
    weights, exact, tensors = {}, {}, {}
    for i in range(modules):
        path, (out, inner) = f"m.{i}.q", shape
        weight = (0.02 * draw(rng, out, inner)).astype(dtype)
        a, b = draw(rng, RANK, inner), 0.01 * update * draw(rng, out, RANK)
        m = norms(weight.astype(np.float64) + b.astype(np.float64) @ a)  # only the direction moves
        weights[f"{path}.weight"] = weight
        exact[f"{path}.weight"] = dense(weight, a, b, m, scaling=1.0)
        names = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
        for name, leaf in zip(names, (a, b, m), strict=True):
            tensors[f"base_model.model.{path}.{name}"] = leaf
    turn = (lambda x: np.ascontiguousarray(x.T)) if transposed else (lambda x: x)
    for name in ("base", "adapter"):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir()
    stored = {name: turn(weight) for name, weight in weights.items()}
    save_file(stored, folder / "base" / "model.safetensors")
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors")
    config = peft_config(r=RANK, lora_alpha=RANK, fan_in_fan_out=transposed)
    write_json(folder / "adapter" / "adapter_config.json", config)
    return stored, {name: turn(weight) for name, weight in exact.items()}


def merged(folder, out="out", **options):
    """Merge, and return the changes and the tensors."""
    plan = plan_merge(folder / "base", folder / "adapter", Options(**options))
    changes = run_merge(plan, folder / out, verify=True)
    return changes, load_file(folder / out / "model.safetensors")


def kept(before, exact, stored):
    before, exact, stored = (np.asarray(x).astype(np.float64) for x in (before, exact, stored))
    update = exact - before
    return float(((stored - before) * update).sum() / (update * update).sum())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("update", [3e-4, 3e-3, 1.0])
@pytest.mark.parametrize(
    ("dtype", "target"), [("bfloat16", None), ("float16", None), ("float32", "BF16")]
)
def test_kept_is_the_projection_of_the_stored_update_on_the_exact_one(
    tmp_path, monkeypatch, dtype, target, update, transposed
):
    monkeypatch.setattr(_matrix, "BLOCK", 700)
    before, exact = write(tmp_path, dtype, update, transposed=transposed)
    changes, stored = merged(tmp_path, dtype=target)
    for name, change in changes.items():
        assert change.kept == pytest.approx(kept(before[name], exact[name], stored[name]), abs=2e-3)


def test_a_wider_dtype_keeps_the_whole_update(tmp_path):
    write(tmp_path, "bfloat16", 3e-4)
    changes, _ = merged(tmp_path, dtype="F32")
    assert all(change.kept == pytest.approx(1, abs=1e-4) for change in changes.values())


@pytest.mark.parametrize("block", [700, 9000])
@pytest.mark.parametrize(
    ("shape", "sample", "parts", "group"),
    [((512, 100), 6000, 8, 64), ((960, 32), 2000, 15, 64), ((64, 300), 900, 21, 3),
     ((3, 9000), 2000, 3, 1), ((24000, 1), 2000, 12, 64)],
)  # fmt: skip
def test_a_large_weight_is_measured_in_a_part_of_its_numbers(
    tmp_path, monkeypatch, shape, sample, parts, group, block
):
    """Each group of rows in the next part of the columns, whatever the blocks are."""
    monkeypatch.setattr(_matrix, "BLOCK", block)
    before, exact = write(tmp_path, "bfloat16", 1e-3, shape=shape, modules=1)
    whole, stored = merged(tmp_path)
    monkeypatch.setattr(_survival, "SAMPLE", sample)
    sampled, _ = merged(tmp_path, "sampled")
    name = "m.0.q.weight"
    desired = kept(*(x[name] for x in (before, exact, stored)))
    assert whole[name].kept == pytest.approx(desired, abs=1e-5)
    rows, columns = np.indices(shape)
    part = rows // group % parts
    inside = (columns >= part * shape[1] // parts) & (columns < (part + 1) * shape[1] // parts)
    assert inside.any(0).all()
    assert inside.any(1).all() or shape[1] < parts
    assert sample / 2 < inside.sum() < 2 * sample or shape[0] == parts
    w, x, y = (tensors[name].astype(np.float64)[inside] for tensors in (before, exact, stored))
    assert sampled[name].kept == pytest.approx(kept(w, x, y), abs=1e-4)


def test_an_update_that_rounding_lost_is_warned_of(tmp_path, capsys):
    write(tmp_path, "bfloat16", 3e-4)
    paths = [str(tmp_path / name) for name in ("base", "adapter")]
    for number, (options, lost) in enumerate(
        [((), 2), (("--rounding", "stochastic", "--seed", "3"), 0), (("--dtype", "float32"), 0)]
    ):
        assert main(["merge", *paths, "--out", str(tmp_path / f"{number}"), *options]) == 0
        lines = [line for line in capsys.readouterr().err.splitlines() if "rounding lost" in line]
        assert len(lines) == (lost > 0)
        for line in lines:
            assert line.startswith("doraxp merge: warning: rounding lost part of the update in 2")
            assert line.endswith(
                "--dtype float32 keeps all of it, --rounding stochastic keeps it in the mean"
            )


# Stochastic rounding


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("update", [1e-4, 1e-3, 1e-2])
def test_stochastic_rounding_keeps_small_updates(tmp_path, dtype, update):
    before, exact = write(tmp_path, dtype, update, shape=(1000, 800), modules=1)
    changes, stored = merged(tmp_path, rounding="stochastic")
    (name,) = before
    assert changes[name].kept == pytest.approx(kept(before[name], exact[name], stored[name]), 1e-3)
    # The noise of 800,000 numbers: its standard deviation is up to 0.02 of an update of 1e-4.
    assert abs(changes[name].kept - 1) < 0.06


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("scale", [1.0, 3e-5, 1e-7])
def test_stochastic_rounding_takes_a_neighbour_and_its_mean_is_exact(dtype, scale):
    x = scale * np.random.default_rng(1).standard_normal(64).astype(np.float32)
    many = np.repeat(x, 4096)
    rounded = to_either(many, dtype, Stochastic(0, "w"), 0).astype(np.float64).reshape(64, 4096)
    finest = 2.0**-24 if dtype == np.float16 else 2.0**-133
    nearest = to_nearest(x, dtype)
    step = np.maximum(
        np.spacing(np.abs(x)).astype(np.float64) * 2 ** (13 if finest > 1e-10 else 16), finest
    )
    assert (np.abs(rounded - x[:, None]) < step[:, None]).all()
    assert all(len(np.unique(row)) <= 2 for row in rounded)
    assert (np.abs(rounded.mean(1) - x) < 6 * step / np.sqrt(4 * 4096)).all()
    on_grid = nearest.astype(np.float32)
    np.testing.assert_array_equal(to_either(on_grid, dtype, Stochastic(0, "w"), 0), nearest)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("wide", [np.float32, np.float64])
def test_nan_infinity_and_the_largest_numbers_are_rounded_as_to_nearest(dtype, wide):
    largest = float(ml_dtypes.finfo(dtype).max)
    x = np.tile(np.array([np.nan, np.inf, -np.inf, largest, -largest, 0.0, -0.0], wide), 100)
    x[0] = -x[0]
    random = Stochastic(0, "w")
    assert to_either(x, dtype, random, 0).tobytes() == to_nearest(x, dtype).tobytes()
    above = np.full(64, largest * (1 + 2.0**-14), wide)
    np.testing.assert_array_equal(
        to_either(above, dtype, Stochastic(0, "w"), 0), np.full(64, largest, dtype)
    )
    beyond = 65535 if dtype == np.float16 else np.finfo(np.float32).max
    with pytest.raises(FloatingPointError):
        to_either(np.full(64, beyond, wide), dtype, random, 0)


@pytest.mark.parametrize("dtype", HALF)
def test_the_random_bits_belong_to_the_elements(dtype):
    x = np.random.default_rng(2).standard_normal(2 * PIECE + 77).astype(np.float32)
    whole = to_either(x, dtype, Stochastic(5, "w"), 0).copy()
    for start, stop in ((0, 5), (5, 16), (17, 40), (PIECE - 3, PIECE + 9), (PIECE + 1, x.size)):
        part = to_either(x[start:stop], dtype, Stochastic(5, "w"), start, Reused())
        np.testing.assert_array_equal(part, whole[start:stop])
    for other in (Stochastic(6, "w"), Stochastic(5, "v")):
        assert (to_either(x, dtype, other, 0) != whole).mean() > 0.1


def philox(counter, key):
    """Return the four words of Philox4x64-10 (Salmon et al., 2011), in integers of Python."""
    mask = (1 << 64) - 1
    words, key = [counter, 0, 0, 0], list(key)
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * words[0], 0xCA5A826395121157 * words[2]
        words = [
            second >> 64 ^ words[1] ^ key[0],
            second & mask,
            first >> 64 ^ words[3] ^ key[1],
            first & mask,
        ]
        key = [(key[0] + 0x9E3779B97F4A7C15) & mask, (key[1] + 0xBB67AE8584CAA73B) & mask]
    return words


def test_the_bits_of_an_element_are_those_of_philox():
    name = int.from_bytes(hashlib.blake2b(b"model.w", digest_size=8).digest(), "little")
    words = [word for counter in (3, 4) for word in philox(counter, (7, name))]
    halves = [word >> shift & 0xFFFF for word in words for shift in (0, 16, 32, 48)]
    random = Stochastic(7, "model.w")
    assert [bits.tolist() for bits in random.bits(32, [48, 64])] == [halves[:16], halves[16:]]
    assert [bits.tolist() for bits in random.bits(37, [48, 50])] == [halves[5:16], halves[16:18]]


@pytest.mark.parametrize("dtype", HALF)
def test_a_number_is_rounded_up_where_its_fraction_and_its_bits_exceed_one(dtype):
    lowest = np.array([1.5, -1.5, 0.75, 2.0**-20], dtype)
    high = np.nextafter(lowest, lowest * np.array(2, dtype))
    low, high = (np.repeat(x.astype(np.float64), 500) for x in (lowest, high))
    fraction = np.random.default_rng(3).integers(0, 8192, low.size) / 8192
    (bits,) = (bits / 65536 for bits in Stochastic(7, "w").bits(0, [low.size]))
    x = (low + fraction * (high - low)).astype(np.float32)
    step = 13 if dtype == np.float16 else 16
    bits = np.where(np.abs(x) > 1e-4, np.floor(bits * 2**step) / 2**step, bits)
    up = to_either(x, dtype, Stochastic(7, "w"), 0).astype(np.float64) == high
    np.testing.assert_array_equal(up, fraction + bits >= 1)


def test_a_stochastic_merge_depends_neither_on_jobs_nor_on_blocks_nor_on_a_resume(
    tmp_path, monkeypatch
):
    write(tmp_path, "bfloat16", 1e-3)
    _, first = merged(tmp_path, rounding="stochastic", seed=1)
    _, other = merged(tmp_path, "other", rounding="stochastic", seed=2)
    _, nearest = merged(tmp_path, "nearest", seed=1)
    monkeypatch.setattr(_matrix, "BLOCK", 300)
    _, again = merged(tmp_path, "again", rounding="stochastic", seed=1)
    for name, tensor in first.items():
        assert again[name].tobytes() == tensor.tobytes()
        assert other[name].tobytes() != tensor.tobytes()
        assert nearest[name].tobytes() != tensor.tobytes()


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, -np.nan])
def test_nan_and_infinity_are_counted_by_their_bits(name, value):
    dtype = DTYPES[name]
    largest = ml_dtypes.finfo(dtype).max
    numbers = np.array([[0.0, -0.0, 1.0], [largest, -largest, -1.0]], dtype)
    assert count_infinite(numbers) == 0
    assert count_infinite(numbers[:0]) == 0
    numbers[0, 1:] = value
    assert count_infinite(numbers) == 2


@pytest.mark.parametrize("name", DTYPES)
def test_the_table_of_precision_is_that_of_the_dtypes(name):
    info = ml_dtypes.finfo(DTYPES[name])
    assert PRECISION[name] == (float(info.eps), float(info.smallest_normal))


def test_wider_tensors_are_rounded_to_nearest(tmp_path):
    write(tmp_path, "float32", 1e-3)
    _, nearest = merged(tmp_path)
    _, stochastic = merged(tmp_path, "other", rounding="stochastic")
    for name, tensor in nearest.items():
        assert stochastic[name].tobytes() == tensor.tobytes()


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"rounding": "up"}, "rounding must be 'nearest' or 'stochastic', got 'up'"),
        ({"rounding": None}, "rounding must be 'nearest' or 'stochastic', got None"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"seed": 1 << 64}, "seed must be below 18446744073709551616, got 18446744073709551616"),
        ({"backend": "jax"}, "backend must be 'numpy', 'torch' or 'cupy', got 'jax'"),
        ({"backend": "Torch"}, "backend must be 'numpy', 'torch' or 'cupy', got 'Torch'"),
        ({"compute": "float16"}, "compute must be 'float32', 'float64' or None, got 'float16'"),
        ({"compute": np.float32}, "compute must be 'float32', 'float64' or None, got <class"),
        ({"dtype": "bfloat16"}, "dtype must be 'F64', 'F32', 'F16', 'BF16' or None, got 'bfloa"),
        ({"dtype": ["F16"]}, "dtype must be 'F64', 'F32', 'F16', 'BF16' or None, got ['F16']"),
    ],
)
def test_wrong_options_are_refused(options, rule):
    with pytest.raises(ValueError, match=f"^{re.escape(rule)}"):
        Options(**options)


@pytest.mark.parametrize("seed", [1.0, "1", True, None])
def test_a_seed_that_is_not_an_integer_is_refused(seed):
    with pytest.raises(TypeError, match="seed must be an integer, got "):
        Options(seed=seed)


def test_an_integer_of_numpy_is_a_seed(tmp_path):
    """The notes of a merge have the options, as JSON."""
    write(tmp_path, "bfloat16", 1e-3)
    _, one = merged(tmp_path, rounding="stochastic", seed=np.uint64(3))
    _, other = merged(tmp_path, "other", rounding="stochastic", seed=3)
    for name, tensor in one.items():
        assert other[name].tobytes() == tensor.tobytes()


# Norms of the base beside m


def edit(folder, **factor):
    """Multiply the leaves of all modules: `lora_B`, `lora_magnitude_vector`."""
    path = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        for part, value in factor.items():
            if part in name:
                tensors[name] = tensors[name] * np.float32(value)
    save_file(tensors, path)


def warnings(folder, capsys, base="base"):
    paths = [str(folder / name) for name in (base, "adapter")]
    assert main(["merge", *paths, "--out", str(folder / "out"), "--dry-run"]) == 0
    return capsys.readouterr().err


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_base_that_was_merged_before_is_warned_of(tmp_path, capsys, dtype, transposed):
    write(tmp_path, dtype, 1.0, transposed=transposed)
    edit(tmp_path, lora_magnitude_vector=1.1)
    assert warnings(tmp_path, capsys) == ""
    merged(tmp_path, "merged")
    assert warnings(tmp_path, capsys, "merged") == (
        "doraxp merge: warning: in 2 of 2 modules, m.0.q the first, the rows of BASE have the "
        "norms m of the adapter: either this adapter has been merged into BASE before, or its "
        "magnitude was hardly trained\n"
    )


def test_a_large_weight_that_is_stored_transposed_is_not_read_before_the_merge(
    tmp_path, monkeypatch
):
    write(tmp_path, "float32", 1.0, transposed=True)
    plan = plan_merge(tmp_path / "base", tmp_path / "adapter", Options())
    assert sample_norms(plan).modules == 2
    monkeypatch.setattr(_sampled_norms, "_READ", 96 * 64 * 4 - 1)
    assert sample_norms(plan).modules == 0


def test_a_magnitude_that_was_never_trained_is_warned_of(tmp_path, capsys):
    before, _ = write(tmp_path, "bfloat16", 1.0)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    for name, weight in before.items():
        key = f"base_model.model.{name.removesuffix('weight')}lora_magnitude_vector"
        tensors[key] = norms(weight)
    save_file(tensors, path)
    assert "or its magnitude was hardly trained" in warnings(tmp_path, capsys)
    edit(tmp_path, lora_B=0)
    assert warnings(tmp_path, capsys) == ""  # a fresh adapter
    edit(tmp_path, lora_magnitude_vector=1.01)
    assert warnings(tmp_path, capsys) == (
        "doraxp merge: warning: the adapter has B = 0 and norms m that BASE does not have, so it "
        "is not a fresh adapter of BASE: m.0.q, m.1.q\n"
    )


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("place", [(0, 0), (95, -1)])
@pytest.mark.parametrize("scale", [1.0, 1.1])
def test_one_number_of_b_that_is_not_zero_makes_an_adapter_trained(
    tmp_path, capsys, monkeypatch, transposed, place, scale
):
    """The sample of rows is in the middle; B is read as a whole, block by block."""
    monkeypatch.setattr(_matrix, "BLOCK", 64)
    before, _ = write(tmp_path, "float32", 1.0, modules=1, transposed=transposed)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    (name,) = before
    key = f"base_model.model.{name.removesuffix('weight')}"
    weight = before[name].T if transposed else before[name]
    b = np.zeros_like(tensors[f"{key}lora_B.weight"])
    b[place] = 1e-3
    m = np.float32(scale) * norms(weight)
    tensors |= {f"{key}lora_magnitude_vector": m, f"{key}lora_B.weight": b}
    save_file(tensors, path)
    warned = "or its magnitude was hardly trained" in warnings(tmp_path, capsys)
    assert warned == (scale == 1.0)
