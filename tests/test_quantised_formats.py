"""Quantised weights on disk: readers and quantisers, on golden numbers and slow formulas.

The formulas here work on one number at a time, in float64, and round where the format does.
"""

from __future__ import annotations

import pickle

import ml_dtypes
import numpy as np
import pytest

from doraxp._base.safetensors import Tensor
from doraxp.checkpoint import CheckpointError
from doraxp.checkpoint._quantised import find
from doraxp.checkpoint._quantised.protocol import Refused, Settings
from doraxp.checkpoint._safetensors import DTYPES

BF16, E4M3 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
NAMES = {
    np.dtype(dtype): name
    for name, dtype in {
        "F32": "f4", "F16": "f2", "BF16": BF16, "U8": "u1", "I8": "i1", "I32": "i4", "U32": "u4",
        "I64": "i8", "F8_E4M3": E4M3, "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu, "I16": "i2", "F64": "f8",
    }.items()
}  # fmt: skip
BYTES = ("F8_E4M3", "F8_E5M2", "F8_E8M0")


class Disk:
    """The tensors of a model, read as the package reads them, through one buffer each."""

    def __init__(self, tensors):
        self.tensors = {
            name: np.ascontiguousarray(x).reshape(np.shape(x)) for name, x in tensors.items()
        }
        self.buffers = {}

    def entries(self):
        return {name: Tensor(NAMES[x.dtype], x.shape, x.nbytes) for name, x in self.tensors.items()}

    def __call__(self, name, rows=None):
        tensor = self.tensors[name]
        if NAMES[tensor.dtype] in BYTES:
            tensor = tensor.view(np.uint8)
        if rows is not None:
            assert 0 <= rows.start <= rows.stop <= len(tensor), (name, rows)
            tensor = tensor[rows]
        buffer = self.buffers.setdefault(name, np.empty(self.tensors[name].nbytes, np.uint8))
        result = buffer[: tensor.nbytes].view(tensor.dtype).reshape(tensor.shape)
        result[...] = tensor
        return result

    def find(self, entries=None, dtype="BF16"):
        return find(self.entries(), Settings(entries or {}, dtype), self)

    def only(self, entries=None, dtype="BF16"):
        ((name, how),) = self.find(entries, dtype).items()
        return name, how


def bits(array):
    """Return the bit patterns, for comparisons that see the sign of zero and NaN."""
    array = np.ascontiguousarray(array)
    return array.view(f"u{array.itemsize}")


def read(how, disk, *sizes):
    """Return all rows of a weight, in blocks of these sizes one after the other."""
    total, blocks, start = int(np.prod(how.shape[:-1])), [], 0
    sizes = sizes or (total,)
    while start < total:
        stop = min(start + sizes[len(blocks) % len(sizes)], total)
        blocks.append(np.array(how.dequantise(slice(start, stop), disk, np.empty)))
        start = stop
    whole = np.concatenate(blocks)
    assert whole.dtype == DTYPES[how.dtype]
    return whole.reshape(how.shape)


def requantised(how, disk, weight, blocks=1):
    """Quantise all rows, `blocks` steps at a time; return the new disk and Quantised.weight."""
    matrix = np.asarray(weight).reshape(-1, how.shape[-1])
    quantiser = how.quantiser(disk)
    size = how.step * blocks
    slices = [slice(i, min(i + size, len(matrix))) for i in range(0, len(matrix), size)]
    if quantiser.passes == 2:
        for rows in slices:
            quantiser.measure(rows, matrix[rows].copy())
    results = []
    for rows in slices:
        given = matrix[rows].copy()
        stored, back = quantiser.quantise(rows, given)
        assert (bits(given) == bits(matrix[rows])).all(), "the rows were written to"
        results.append((stored.copy(), back.copy()))
    new = dict(disk.tensors)
    rest = quantiser.rest()
    main = np.concatenate([stored for stored, _ in results])
    for name, tensor in {how.tensors[0]: main, **rest}.items():
        old = disk.tensors[name]
        assert tensor.shape == old.shape, name
        new[name] = tensor.view(old.dtype) if tensor.dtype == np.uint8 else tensor
        assert new[name].dtype == old.dtype, name
    assert set(rest) <= set(how.tensors[1:])
    return Disk(new), np.concatenate([back for _, back in results]).reshape(how.shape)


def check_quantiser(how, disk, weight, entries=None):
    """Check the laws of every quantiser; return the new disk."""
    new, back = requantised(how, disk, weight, 1)
    assert np.isfinite(back.astype("f8")).all()
    ((_, again),) = find(new.entries(), Settings(entries or {}, how.dtype), new).items()
    again.check(new)
    assert back.dtype == DTYPES[how.dtype]
    np.testing.assert_array_equal(bits(read(again, new)), bits(back))
    for blocks in (2, 1000):
        other, other_back = requantised(how, disk, weight, blocks)
        np.testing.assert_array_equal(bits(other_back), bits(back))
        for name, tensor in new.tensors.items():
            np.testing.assert_array_equal(bits(other.tensors[name]), bits(tensor), name)
    _, wide_back = requantised(how, disk, np.asarray(weight, "f8"), 2)
    np.testing.assert_array_equal(bits(wide_back), bits(back))
    assert pickle.loads(pickle.dumps(how)) == how
    return new


def draw(*shape, seed=0, scale=0.05):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype("f4")


def refused(tensors, entries=None, dtype="BF16"):
    """Return the problem of the only weight, which must be refused."""
    name, how = Disk(tensors).only(entries, dtype)
    assert isinstance(how, Refused), how
    assert set(how.tensors) <= set(tensors)
    assert how.problem.startswith("is ")
    assert "\n" not in how.problem
    return name, how.problem


# FP8


def fp8_model(shape, block, scale="f4", seed=0, name="p.weight", small=False):
    rng = np.random.default_rng(seed)
    *stack, rows, columns = shape
    grid = (*stack, -(-rows // block[0]), -(-columns // block[1]))
    codes = rng.integers(0, 256, shape, np.uint8)
    codes[(codes & 127) == 127] = 0  # NaN
    scales = rng.integers(110, 130, grid, np.uint8) if scale in ("u1", "e8m0") else rng.random(grid)
    scales = scales.view(ml_dtypes.float8_e8m0fnu) if scale == "e8m0" else scales.astype(scale)
    return {name: codes.view(E4M3), f"{name}_scale_inv": scales}


def fp8_by_formula(tensors, block, dtype, name="p.weight"):
    codes, scales = tensors[name], tensors[f"{name}_scale_inv"]
    if scales.dtype == np.uint8:
        scales = scales.view(ml_dtypes.float8_e8m0fnu)
    result = np.empty(codes.shape, DTYPES[dtype])
    for index in np.ndindex(codes.shape):
        *stack, row, column = index
        scale = scales[(*stack, row // block[0], column // block[1])]
        # 4 by at most 24 bits: float64 has the product exactly, and it is rounded twice.
        result[index] = np.float32(np.float64(codes[index]) * np.float64(scale))
    return result


FP8 = {"quant_method": "fp8", "weight_block_size": [4, 8]}


@pytest.mark.parametrize("scale", ["f4", BF16, "f2", "u1", "e8m0"])
@pytest.mark.parametrize("shape", [(8, 16), (9, 13), (3, 5), (3, 8, 16), (2, 3, 5, 9)])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_fp8_reads_and_requantises_blocks(scale, shape, dtype):
    tensors = fp8_model(shape, (4, 8), scale)
    disk = Disk(tensors)
    name, how = disk.only(FP8, dtype)
    assert (name, how.shape, how.dtype) == ("p.weight", shape, dtype)
    assert how.tensors == ("p.weight", "p.weight_scale_inv")
    desired = bits(fp8_by_formula(tensors, (4, 8), dtype))
    for sizes in ((), (1,), (3, 2), (4,)):
        np.testing.assert_array_equal(bits(read(how, disk, *sizes)), desired)
    how.check(disk)
    weight = draw(*shape)
    weight[..., :4, :8] = 0
    check_quantiser(how, disk, weight, FP8)


def test_fp8_of_one_scale():
    config = {"quant_method": "fp8", "weight_block_size": None}
    for shape in ((), (1,), (1, 1)):
        tensors = fp8_model((6, 5), (6, 5))
        tensors["p.weight_scale_inv"] = tensors["p.weight_scale_inv"].reshape(shape)
        disk = Disk(tensors)
        for entries in (config, None):
            _, how = disk.only(entries)
            assert how.label == "FP8, one scale"
            assert how.step == 1
            assert how.quantiser(disk).passes == 2
            by_formula = fp8_by_formula(fp8_model((6, 5), (6, 5)), (6, 5), "BF16")
            np.testing.assert_array_equal(bits(read(how, disk, 2)), bits(by_formula))
            check_quantiser(how, disk, draw(6, 5), entries)
    disk = Disk(fp8_model((3, 6, 5), (6, 5)))
    _, how = disk.only(config)
    assert how.label == "FP8, one scale a matrix"
    assert how.step == 6
    check_quantiser(how, disk, draw(3, 6, 5), config)


def test_fp8_codes_are_the_nearest():
    weight = draw(8, 16)
    disk = Disk(fp8_model((8, 16), (4, 8)))
    _, how = disk.only(FP8, "F32")
    assert how.label == "FP8, blocks of 4 × 8"
    new = check_quantiser(how, disk, weight, FP8)
    numbers = np.arange(256, dtype=np.uint8).view(E4M3).astype("f8")
    numbers = numbers[np.isfinite(numbers)]
    for index in np.ndindex(weight.shape):
        scale = np.float64(new.tensors["p.weight_scale_inv"][index[0] // 4, index[1] // 8])
        error = abs(numbers * scale - weight[index]).min()
        actual = abs(float(new.tensors["p.weight"][index]) * scale - weight[index])
        assert actual <= error * (1 + 1e-6)


def test_fp8_rounds_every_float32_as_ml_dtypes_does():
    from doraxp.checkpoint._quantised.codes import fp8

    rng = np.random.default_rng(0)
    numbers = np.arange(256, dtype=np.uint8).view(E4M3).astype("f4")
    numbers = np.unique(numbers[np.isfinite(numbers)])
    middles = (numbers[1:] + numbers[:-1]) / 2
    steps = [np.nextafter(middles, np.float32(sign * np.inf)) for sign in (1, -1)]
    drawn = rng.integers(0, 1 << 32, 20_000, np.uint32).view("f4")
    for values in (numbers, middles, *steps, np.clip(drawn[np.isfinite(drawn)], -448, 448)):
        desired = values.astype(E4M3).view(np.uint8)
        np.testing.assert_array_equal(fp8(np.ascontiguousarray(values)), desired)


def test_fp8_without_a_configuration_is_read_where_the_block_is_clear():
    for shape, block in (((8, 16), (4, 8)), ((3, 5), (4, 8)), ((4, 16), (4, 8))):
        tensors = fp8_model(shape, block)
        disk = Disk(tensors)
        _, how = disk.only()
        np.testing.assert_array_equal(
            bits(read(how, disk)), bits(fp8_by_formula(tensors, block, "BF16"))
        )
    for shape, block in (((9, 16), (4, 8)), ((12, 16), (8, 8)), ((6, 16), (3, 8))):
        assert "config.json" in refused(fp8_model(shape, block))[1]
    broken = fp8_model((8, 16), (4, 8))
    broken["p.weight_scale_inv"] = np.ones((2, 0), "f4")
    assert "config.json" in refused(broken)[1]
    broken = {"p.weight": np.ones((0, 4), E4M3), "p.weight_scale_inv": np.ones((1, 1), "f4")}
    assert "config.json" in refused(broken)[1]


@pytest.mark.parametrize("block", ["x", [4], [4, 0], [4, "8"], [True, 8], 4, {}, [4, 1 << 40]])
def test_fp8_refuses_a_block_that_is_not_two_sizes(block):
    entries = {"quant_method": "fp8", "weight_block_size": block}
    assert "weight_block_size" in refused(fp8_model((8, 16), (4, 8)), entries)[1]


def test_fp8_refuses_tensors_that_do_not_fit():
    tensors = fp8_model((8, 16), (8, 8))
    assert "(1, 2)" in refused(tensors, FP8)[1]  # 192 rows with 2 rows of scales, for example
    tensors["p.weight_scale_inv"] = np.ones((2, 2), "i4")
    assert "I32" in refused(tensors, FP8)[1]
    packed = {"p.weight": np.ones((8, 8), "i1"), "p.weight_scale_inv": np.ones((8, 1), "u1")}
    assert "I8" in refused(packed, FP8)[1]
    vector = {"p.weight": np.ones(8, E4M3), "p.weight_scale_inv": np.ones(1, "f4")}
    assert "(8,)" in refused(vector, FP8)[1]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_fp8_scales_must_be_finite(value):
    tensors = fp8_model((8, 16), (4, 8))
    tensors["p.weight_scale_inv"][1, 1] = value
    disk = Disk(tensors)
    _, how = disk.only(FP8)
    with pytest.raises(CheckpointError, match=r"p\.weight_scale_inv: the scales must be finite"):
        how.check(disk)
