"""Quantised weights on disk: readers and quantisers, on golden numbers and slow formulas.

The formulas here work on one number at a time, in float64, and round where the format does.
"""

from __future__ import annotations

import contextlib
import json
import pickle

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings, strategies

from doraxp import QuantisedWeight
from doraxp._base.safetensors import Tensor
from doraxp.checkpoint import CheckpointError
from doraxp.checkpoint._quantised import find
from doraxp.checkpoint._quantised.bitsandbytes_4bit import _NF4
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
    main = np.concatenate([stored.reshape(-1) for stored, _ in results])
    main = main.reshape(disk.tensors[how.tensors[0]].shape)
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
    check_packed(again, new)
    steps = {"F32": 2.0**-23, "BF16": 2.0**-7, "F16": 2.0**-10}[how.dtype]
    error, size = abs(back.astype("f8") - weight), abs(back.astype("f8"))
    assert (error <= how.resolution * size.max() + steps * size).all()
    return new


def check_packed(how, disk):
    """In memory, still packed, a matrix has the numbers of the file, to the last digits."""
    if len(how.shape) != 2:
        return
    if how.shape[1] % 2 and how.label.startswith(("nf4", "fp4", "CT INT4")):
        with pytest.raises(CheckpointError, match=how.tensors[0]):  # a byte has codes of two rows
            how.packed(disk)
        return
    codes, table, scale, group, bias = how.packed(disk)
    arrays = [np.ascontiguousarray(array) for array in (codes, table, scale)]
    weight = QuantisedWeight(*arrays, group=group, bias=bias)
    found, desired = weight.rows(slice(0, how.shape[0])), read(how, disk).astype("f4")
    # The reader rounds to its dtype, and some products on the way. A sum may cancel.
    epsilon = {"F32": 2.0**-22, "BF16": 2.0**-7, "F16": 2.0**-9}[how.dtype]
    assert (abs(found - desired) <= epsilon * (abs(desired) + abs(desired).max())).all()


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
            assert how.label == "FP8 tensor"
            assert how.step == 1
            assert how.quantiser(disk).passes == 2
            by_formula = fp8_by_formula(fp8_model((6, 5), (6, 5)), (6, 5), "BF16")
            np.testing.assert_array_equal(bits(read(how, disk, 2)), bits(by_formula))
            check_quantiser(how, disk, draw(6, 5), entries)
    disk = Disk(fp8_model((3, 6, 5), (6, 5)))
    _, how = disk.only(config)
    assert how.label == "FP8 matrix"
    assert how.step == 6
    check_quantiser(how, disk, draw(3, 6, 5), config)


def test_fp8_codes_are_the_nearest():
    weight = draw(8, 16)
    disk = Disk(fp8_model((8, 16), (4, 8)))
    _, how = disk.only(FP8, "F32")
    assert how.label == "FP8 4×8"
    new = check_quantiser(how, disk, weight, FP8)
    one, largest = np.float32(1), abs(weight.reshape(2, 4, 2, 8)).max((1, 3))
    scales = one / (one / largest * np.float32(448))  # transformers rounds three times
    np.testing.assert_array_equal(new.tensors["p.weight_scale_inv"], scales)
    assert (scales != one / (np.float32(448) / largest)).any()
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
    for shape, block in (
        ((9, 16), (4, 8)),
        ((12, 16), (8, 8)),
        ((6, 16), (3, 8)),
        ((17, 16), (5, 8)),
    ):
        assert "config.json" in refused(fp8_model(shape, block))[1]
    broken = fp8_model((8, 16), (4, 8))
    broken["p.weight_scale_inv"] = np.ones((2, 0), "f4")
    assert "config.json" in refused(broken)[1]
    broken = {"p.weight": np.ones((0, 4), E4M3), "p.weight_scale_inv": np.ones((1, 1), "f4")}
    assert "(0, 4)" in refused(broken)[1]
    other = {"quant_method": "other"}
    assert "config.json" in refused(fp8_model((9, 16), (4, 8)), other)[1]


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
    assert "FP4, two codes a byte" in refused(packed, FP8)[1]  # DeepSeek-V4's experts
    packed = {"p.weight": np.ones((8, 8), "i4"), "p.weight_scale_inv": np.ones((8, 1), "u1")}
    assert "I32" in refused(packed, FP8)[1]
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


# bitsandbytes, 4 bits

NF4 = np.array(_NF4, "f4")
FP4_MAP = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], "f4") / np.float32(12)
TABLES = {"nf4": NF4, "fp4": np.concatenate([FP4_MAP, -FP4_MAP])}
LONG = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def bits4_model(shape, block=64, kind="nf4", dtype="BF16", storage="u1", nested=None, words=()):
    rng = np.random.default_rng(1)
    numbers, name = int(np.prod(shape)), "p.weight"
    blocks = -(-numbers // block)
    codes = rng.integers(0, 256, (numbers + 1) // 2, np.uint8)
    state = {"quant_type": kind, "blocksize": block, "dtype": LONG[dtype], "shape": list(shape)}
    tensors = {
        name: codes.view(storage)[:, None],
        f"{name}.absmax": 0.1 * rng.random(blocks).astype("f4"),
        f"{name}.quant_map": TABLES[kind],
    }
    if nested is not None:
        state |= {"nested_blocksize": 4, "nested_dtype": LONG[nested], "nested_offset": 0.062500123}
        tensors[f"{name}.absmax"] = rng.integers(0, 256, blocks, np.uint8)
        tensors[f"{name}.nested_absmax"] = 0.05 * rng.random(-(-blocks // 4)).astype("f4")
        tensors[f"{name}.nested_quant_map"] = np.sort(2 * rng.random(256) - 1).astype("f4")
    raw = json.dumps(state | dict(words)).encode()
    tensors[f"{name}.quant_state.bitsandbytes__{kind}"] = np.frombuffer(raw, "u1")
    return tensors


def state_of(tensors):
    (raw,) = (tensor for name, tensor in tensors.items() if ".quant_state." in name)
    return json.loads(bytes(raw))


def bits4_by_formula(tensors):
    state, absmax = state_of(tensors), tensors["p.weight.absmax"]
    if "nested_dtype" in state:
        dtype = DTYPES[next(key for key, word in LONG.items() if word == state["nested_dtype"])]
        outer = tensors["p.weight.nested_absmax"].astype("f4")
        table, offset = tensors["p.weight.nested_quant_map"], np.float32(state["nested_offset"])
        products = [(table[a] * outer[i // 4]).astype(dtype) for i, a in enumerate(absmax)]
        absmax = [(x.astype("f4") + offset).astype(dtype).astype("f4") for x in products]
    codes = tensors["p.weight"].reshape(-1).view("u1")
    dtype = DTYPES[next(key for key, word in LONG.items() if word == state["dtype"])]
    result = np.empty(state["shape"], dtype)
    for i in range(result.size):
        code = codes[i // 2] >> 4 if i % 2 == 0 else codes[i // 2] & 15
        result.flat[i] = tensors["p.weight.quant_map"][code] * absmax[i // state["blocksize"]]
    return result


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [None, "F32", "BF16"])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize(
    ("shape", "block", "storage"),
    [((8, 64), 64, "u1"), ((8, 24), 64, BF16), ((5, 8), 64, "f4"), ((7, 9), 8, "u1"),
     ((3, 4, 8), 32, "u1")],
)  # fmt: skip
def test_4_bits_are_read_and_requantised(kind, nested, dtype, shape, block, storage):
    tensors = bits4_model(shape, block, kind, dtype, storage, nested)
    disk = Disk(tensors)
    name, how = disk.only(dtype="F32")
    assert (name, how.shape, how.dtype) == ("p.weight", shape, dtype)
    assert how.label == f"{kind} {block}" + (" nested" if nested else "")
    assert set(how.tensors) == set(tensors)
    desired = bits(bits4_by_formula(tensors))
    for sizes in ((), (1,), (3, 2)):
        np.testing.assert_array_equal(bits(read(how, disk, *sizes)), desired)
    how.check(disk)
    weight = draw(*shape)
    weight.reshape(-1)[: block if block < weight.size else 0] = 0
    new = check_quantiser(how, disk, weight)
    flat = weight.reshape(-1)
    absmax = np.array([abs(flat[i : i + block]).max() for i in range(0, flat.size, block)])
    if nested is None:
        np.testing.assert_array_equal(new.tensors["p.weight.absmax"], absmax)
    else:
        state = state_of(new.tensors)
        assert state["nested_offset"] == pytest.approx(absmax.mean(dtype="f8"), rel=1e-7)
        assert state | {"nested_offset": 0} == state_of(tensors) | {"nested_offset": 0}
    if dtype == "F32":  # the nearest of the 16 numbers of each block
        scale = np.maximum(np.repeat(absmax, block)[: flat.size], 1e-38)
        errors = abs(TABLES[kind] - (flat / scale)[:, None])
        packed = new.tensors["p.weight"].reshape(-1).view("u1")
        codes = np.stack([packed >> 4, packed & 15], -1).reshape(-1)[: flat.size]
        np.testing.assert_allclose(errors[range(flat.size), codes], errors.min(1), atol=1e-6)


def test_a_4_bit_tie_goes_to_the_lower_number():
    weight = np.zeros((1, 64), "f4")
    weight[0, :15], weight[0, 63] = (NF4[1:] + NF4[:-1]) / 2, 1
    disk = Disk(bits4_model((1, 64)))
    new, _ = requantised(disk.only()[1], disk, weight)
    packed = new.tensors["p.weight"].reshape(-1)
    assert (np.stack([packed >> 4, packed & 15], -1).reshape(-1)[:15] == range(15)).all()


@pytest.mark.parametrize("room", [0.5, 0.0625001, 123456])
def test_a_nested_offset_keeps_the_length_of_the_json(room):
    tensors = bits4_model((8, 64), nested="F32", words={"nested_offset": room})
    disk = Disk(tensors)
    new = check_quantiser(disk.only()[1], disk, draw(8, 64) + 0.1)
    state = state_of(new.tensors)
    digits = {0.5: 1, 0.0625001: 7, 123456: 4}[room]
    desired = abs(draw(8, 64) + 0.1).max(1).mean()
    assert state["nested_offset"] == float(f"{desired:.{digits}g}")


def test_an_offset_for_whose_digits_there_is_no_room_stays():
    tensors = bits4_model((8, 64), nested="F32", words={"nested_offset": 1})
    disk = Disk(tensors)
    new = check_quantiser(disk.only()[1], disk, draw(8, 64))
    assert state_of(new.tensors)["nested_offset"] == 1


BITS4_JUNK = [
    ({"quant_type": "int4"}, "int4"),
    ({"quant_type": None}, "None"),
    ({"dtype": "int8"}, "dtype"),
    ({"dtype": ["bfloat16"]}, "dtype"),
    ({"blocksize": 0}, "block"),
    ({"blocksize": 64.0}, "block"),
    ({"blocksize": True}, "block"),
    ({"shape": 3}, "shape"),
    ({"shape": [512]}, "shape"),
    ({"shape": [8, "64"]}, "shape"),
    ({"shape": [-8, -64]}, "shape"),
    ({"shape": [8, 65]}, "260"),
    ({"shape": None}, "shape"),
]
NESTED_JUNK = [
    ({"nested_offset": "0"}, "scales are quantised"),
    ({"nested_offset": float("nan")}, "offset"),
    ({"nested_offset": 10**400}, "offset"),
    ({"nested_offset": True}, "scales are quantised"),
    ({"nested_blocksize": 0}, "scales are quantised"),
    ({"nested_dtype": 3}, "scales are quantised"),
]


@pytest.mark.parametrize(("changes", "word"), BITS4_JUNK)
def test_4_bits_refuse_wrong_words(changes, word):
    name, problem = refused(bits4_model((8, 64), words=changes))
    assert name == "p.weight"
    assert word in problem


@pytest.mark.parametrize(("changes", "word"), NESTED_JUNK)
def test_nested_4_bits_refuse_wrong_words(changes, word):
    assert word in refused(bits4_model((8, 64), nested="F32", words=changes))[1]


BITS4_MISFITS = {
    "": [np.zeros((128, 1), "u1"), np.zeros((128, 2), "u1"), np.zeros((), "u1"), None],
    ".absmax": [np.ones(7, "f4"), np.ones(8, "i4"), np.ones((8, 1), "f4"), None],
    ".quant_map": [np.ones(15, "f4"), np.ones(16, BF16), None],
    ".nested_absmax": [np.ones(3, "f4"), np.ones(2, "u1")],
    ".nested_quant_map": [np.ones(16, "f4"), None],
    ".quant_state.bitsandbytes__nf4": [
        np.zeros(3, "f4"),
        np.frombuffer(b"[1]", "u1"),
        np.frombuffer(b'{"a":', "u1"),
        np.frombuffer(b"\xff\xfe", "u1"),
        np.zeros(1 << 17, "u1"),
    ],
}


@pytest.mark.parametrize("suffix", BITS4_MISFITS)
def test_4_bits_refuse_tensors_that_do_not_fit(suffix):
    for tensor in BITS4_MISFITS[suffix]:
        tensors = bits4_model((8, 64), nested="F32" if "nested" in suffix else None)
        tensors[f"p.weight{suffix}"] = tensor
        if tensor is None:
            del tensors[f"p.weight{suffix}"]
        name, problem = refused(tensors)
        assert name == "p.weight"
        assert "p.weight" in problem


def test_absmax_that_a_cpu_has_transposed_is_refused():
    tensors = bits4_model((8, 128))
    tensors["p.weight.absmax"] = tensors["p.weight.absmax"].reshape(2, 8).astype(BF16)
    assert "damaged" in refused(tensors)[1]


def test_4_bits_of_another_kind_are_refused():
    tensors = bits4_model((8, 64))
    state = ".quant_state.bitsandbytes__"
    tensors[f"p.weight{state}af4"] = tensors.pop(f"p.weight{state}nf4")
    assert "nf4" in refused(tensors)[1]


def test_values_of_4_bits_are_checked():
    for nested, suffix, value in (
        (None, ".absmax", np.inf), ("F32", ".nested_absmax", np.nan),
        ("F32", ".nested_quant_map", np.inf), (None, ".quant_map", 0.5),
    ):  # fmt: skip
        tensors = bits4_model((8, 64), nested=nested)
        changed = tensors[f"p.weight{suffix}"].copy()
        changed[1] = value
        disk = Disk(tensors | {f"p.weight{suffix}": changed})
        _, how = disk.only()
        with pytest.raises(CheckpointError, match=suffix):
            how.check(disk)


# bitsandbytes, 8 bits


def int8_model(rows=6, columns=10, scale="f4"):
    rng = np.random.default_rng(2)
    return {
        "p.weight": rng.integers(-127, 128, (rows, columns), np.int8),
        "p.SCB": (0.1 * rng.random(rows)).astype(scale),
        "p.weight_format": np.array(0, "u1"),
    }


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("scale", ["f4", "f2"])
def test_8_bits_are_read_and_requantised(dtype, scale):
    tensors = int8_model(scale=scale)
    disk = Disk(tensors)
    name, how = disk.only(dtype=dtype)
    assert (name, how.shape, how.dtype, how.step) == ("p.weight", (6, 10), dtype, 1)
    assert how.label == "int8 rows"
    codes, scales = tensors["p.weight"].astype("f4"), tensors["p.SCB"].astype("f4")
    desired = (codes * scales[:, None] * np.float32(1 / 127)).astype(DTYPES[dtype])
    np.testing.assert_array_equal(bits(read(how, disk, 4)), bits(desired))
    how.check(disk)
    weight = draw(6, 10)
    weight[2] = 0
    new = check_quantiser(how, disk, weight)
    largest = abs(weight).max(1).astype(scale)
    np.testing.assert_array_equal(new.tensors["p.SCB"], largest)
    error = (
        new.tensors["p.weight"]
        - weight * 127 / np.where(largest > 0, largest, 1).astype("f4")[:, None]
    )
    assert abs(error).max() <= 0.5 + 1e-4 if scale == "f4" else 0.6


def test_8_bits_refuse_tensors_that_do_not_fit():
    for changes, word in (
        ({"p.weight": None}, "p.weight is missing"),
        ({"p.weight": np.zeros((6, 10), "u1")}, "U8"),
        ({"p.weight": np.zeros(6, "i1")}, "(6,)"),
        ({"p.weight": np.zeros((6, 0), "i1")}, "(6, 0)"),
        ({"p.SCB": np.zeros(5, "f4")}, "(5,)"),
        ({"p.SCB": np.zeros(6, "i4")}, "I32"),
        ({"p.weight_format": np.array(1, "u1")}, "order of one GPU"),
        ({"p.weight_format": np.array([0, 0], "u1")}, "order of one GPU"),
        ({"p.weight_format": np.array(0, "f4")}, "order of one GPU"),
    ):
        tensors = {k: v for k, v in (int8_model() | changes).items() if v is not None}
        name, problem = refused(tensors)
        assert name == "p.weight"
        assert word in problem
    tensors = int8_model()
    tensors["p.SCB"][0] = np.inf
    disk = Disk(tensors)
    _, how = disk.only()
    with pytest.raises(CheckpointError, match=r"p\.SCB: the scales must be finite"):
        how.check(disk)


# compressed-tensors

CT = {
    "quant_method": "compressed-tensors",
    "config_groups": {
        "a": {"weights": {"block_structure": [4, 8]}},
        "b": {"weights": {"block_structure": ["4", 8]}},
        "c": {"weights": None},
        "d": ["q_proj"],
    },
}


def packed_by_formula(codes, bits_each):
    """Pack rows of signed codes, one bit string a row."""
    words = -(-codes.shape[1] * bits_each // 32)
    result = np.zeros((len(codes), words), np.uint32)
    for row, line in enumerate(codes):
        whole = sum(
            (int(code) + (1 << bits_each - 1)) << column * bits_each
            for column, code in enumerate(line)
        )
        result[row] = [whole >> 32 * word & 0xFFFFFFFF for word in range(words)]
    return result.view(np.int32)


def ct_model(kind, shape, size, scale="f4", asymmetric=False):
    """Return a model and its weight by the formula."""
    rng = np.random.default_rng(3)
    grid = tuple(-(-side // one) for side, one in zip(shape, size, strict=True))
    bits_each = 4 if "4" in kind else 8
    limit = 1 << bits_each - 1
    scales = (0.1 * rng.random(grid) + 1e-3).astype(scale)
    zero = rng.integers(-limit, limit, grid).astype(np.int8) * np.int8(asymmetric)
    tensors = {"p.weight_scale": scales}
    if kind == "FP8":
        codes = rng.integers(0, 127, shape, np.uint8).view(E4M3)
        tensors["p.weight"] = codes
    else:
        codes = rng.integers(-limit, limit, shape).astype(np.int8)
        tensors["p.weight"] = codes
    if kind.startswith("packed"):
        del tensors["p.weight"]
        tensors["p.weight_packed"] = packed_by_formula(codes, bits_each)
        tensors["p.weight_shape"] = np.array(shape)
    if asymmetric:
        tensors["p.weight_zero_point"] = zero
        if kind.startswith("packed"):
            tensors["p.weight_zero_point"] = packed_by_formula(zero.T, bits_each).T
    desired = np.empty(shape, scale)
    for row, column in np.ndindex(shape):
        at = row // size[0], column // size[1]
        desired[row, column] = np.float32(float(codes[row, column]) - int(zero[at])) * np.float32(
            scales[at]
        )
    return tensors, desired


@pytest.mark.parametrize("scale", ["f4", BF16, "f2"])
@pytest.mark.parametrize(
    ("kind", "shape", "size", "asymmetric", "words"),
    [
        ("FP8", (8, 16), (4, 8), False, "FP8 4×8"),
        ("FP8", (9, 13), (4, 8), False, "FP8 4×8"),
        ("FP8", (9, 13), (1, 13), False, "FP8 rows"),
        ("FP8", (9, 12), (9, 12), False, "FP8 tensor"),
        ("INT8", (6, 10), (1, 10), False, "INT8 rows"),
        ("INT8", (6, 10), (1, 10), True, "INT8 rows zero"),
        ("INT8", (6, 10), (1, 5), True, "INT8 5 zero"),
        ("INT8", (6, 10), (6, 10), True, "INT8 tensor zero"),
        ("packed 4", (9, 12), (1, 12), False, "INT4 rows"),
        ("packed 4", (19, 13), (1, 13), True, "INT4 rows zero"),
        ("packed 4", (17, 16), (1, 8), True, "INT4 8 zero"),
        ("packed 8", (9, 16), (1, 8), False, "INT8 8"),
        ("packed 8", (9, 15), (1, 5), True, "INT8 5 zero"),
    ],
)
def test_compressed_tensors_are_read_and_requantised(kind, shape, size, asymmetric, words, scale):
    tensors, desired = ct_model(kind, shape, size, scale, asymmetric)
    disk = Disk(tensors)
    name, how = disk.only(CT)
    assert (name, how.shape, DTYPES[how.dtype]) == ("p.weight", shape, np.dtype(scale))
    assert how.label == f"CT {words}"
    assert set(how.tensors) == set(tensors)
    for sizes in ((), (1,), (3, 2), (4,)):
        np.testing.assert_array_equal(bits(read(how, disk, *sizes)), bits(desired))
    how.check(disk)
    weight = draw(*shape) + 0.02 * asymmetric
    weight[: size[0], : size[1]] *= size[0] == shape[0]
    new = check_quantiser(how, disk, weight, CT)
    matrix, whole = weight.reshape(shape), read(how, new)
    limit = {"FP8": 448, "packed 4": 7.5}.get(kind, 127.5)
    for row, column in np.ndindex(new.tensors["p.weight_scale"].shape):
        part = matrix[
            row * size[0] : (row + 1) * size[0], column * size[1] : (column + 1) * size[1]
        ]
        span = (max(part.max(), 0) - min(part.min(), 0)) / 2 if asymmetric else abs(part).max()
        scale_here = np.float32(span) / np.float32(limit) or 2.0**-23
        actual = new.tensors["p.weight_scale"][row, column]
        np.testing.assert_allclose(float(actual), scale_here, rtol=5e-3)
        back = whole[row * size[0] : (row + 1) * size[0]]
        back = back[:, column * size[1] : (column + 1) * size[1]]
        worst = float(actual) * (16.5 if kind == "FP8" else 1.5)
        assert abs(back.astype("f8") - part).max() <= worst + 1e-2 * span


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_compressed_tensors_of_one_scale_may_have_any_shape(shape):
    tensors, desired = ct_model("FP8", (6, 10), (6, 10))
    tensors["p.weight_scale"] = tensors["p.weight_scale"].reshape(shape)
    disk = Disk(tensors)
    for entries in (CT, {}):
        _, how = disk.only(entries)
        np.testing.assert_array_equal(bits(read(how, disk, 4)), bits(desired))
        check_quantiser(how, disk, draw(6, 10), entries)


def test_compressed_tensors_without_a_configuration_need_a_clear_block():
    tensors, desired = ct_model("FP8", (8, 16), (4, 8))
    disk = Disk(tensors)
    np.testing.assert_array_equal(bits(read(disk.only()[1], disk)), bits(desired))
    tensors, _ = ct_model("FP8", (9, 16), (4, 8))
    assert "config.json" in refused(tensors)[1]
    for groups in ({}, {"a": {"weights": {"block_structure": [4, 8]}}}, [], None, "x"):
        entries = {"quant_method": "compressed-tensors", "config_groups": groups}
        assert "(5, 2)" in refused(tensors | {"p.weight_scale": np.ones((5, 2), "f4")}, entries)[1]


CT_MISFITS = [
    ("FP8", {"p.weight_scale": np.ones((9, 1), "i4")}, "I32"),
    ("FP8", {"p.weight_scale": np.ones((9, 0), "f4")}, "(9, 0)"),
    ("FP8", {"p.weight_scale": np.ones((0, 0), "f4")}, "(0, 0)"),
    ("FP8", {"p.weight_scale": np.ones(9, "f4")}, "(9,)"),
    ("FP8", {"p.weight_zero_point": np.zeros((9, 1), E4M3)}, "zero points"),
    ("FP8", {"p.weight": np.zeros((2, 9, 12), E4M3)}, "two axes"),
    ("FP8", {"p.weight": np.zeros((0, 12), E4M3), "p.weight_scale": np.ones(1, "f4")}, "(0, 12)"),
    ("INT8", {"p.weight_scale": np.ones((9, 5), "f4")}, "do not divide"),
    ("INT8", {"p.weight_zero_point": np.zeros(9, "i1")}, "zero points"),
    ("packed 4", {"p.weight_g_idx": np.zeros(12, "i4")}, "actorder"),
    ("packed 4", {"p.weight_shape": None}, "p.weight_shape is missing"),
    ("packed 4", {"p.weight_shape": np.array([9.0, 12.0])}, "whole numbers"),
    ("packed 4", {"p.weight_shape": np.array([8, 12])}, "(8, 12)"),
    ("packed 4", {"p.weight_shape": np.array([9, -12])}, "(9, -12)"),
    ("packed 4", {"p.weight_shape": np.array([9, 1200])}, "(9, 1200)"),
    ("packed 4", {"p.weight_shape": np.array([9, 16]), "p.weight_packed": np.zeros((9, 3), "i4")},
     "5 bits"),
    ("packed 4", {"p.weight_zero_point": np.zeros((1, 1), "i4")}, "zero points"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "changes", "word"), CT_MISFITS)
def test_compressed_tensors_that_do_not_fit_are_refused(kind, changes, word):
    tensors, _ = ct_model(kind, (9, 12), (1, 12))
    tensors = {name: x for name, x in (tensors | changes).items() if x is not None}
    name, problem = refused(tensors, CT)
    assert name == "p.weight"
    assert word in problem


def test_scales_of_compressed_tensors_must_be_finite():
    tensors, _ = ct_model("INT8", (6, 10), (1, 10))
    tensors["p.weight_scale"][2] = np.nan
    disk = Disk(tensors)
    with pytest.raises(CheckpointError, match=r"p\.weight_scale: the scales must be finite"):
        disk.only(CT)[1].check(disk)


# MLX


def bit_string(codes, bits_each):
    """Pack rows of unsigned codes, one bit string a row."""
    signed = codes.astype("i8") - (1 << bits_each - 1)
    return packed_by_formula(signed, bits_each).view("u4")


def mlx_model(bits_each, group, dtype="f4", stack=(), rows=5, columns=64):
    rng = np.random.default_rng(4)
    shape = (*stack, rows, columns)
    codes = rng.integers(0, 1 << bits_each, shape)
    scales, biases = (
        (rng.standard_normal((*stack, rows, columns // group)) * 0.05).astype(dtype)
        for _ in range(2)
    )
    words = bit_string(codes.reshape(-1, columns), bits_each)
    tensors = {
        "p.weight": words.reshape(*stack, rows, -1), "p.scales": scales, "p.biases": biases,
    }  # fmt: skip
    scale, bias = (np.repeat(x.astype("f4"), group, -1) for x in (scales, biases))
    product = (codes.astype("f4") * scale).astype(dtype).astype("f4")
    return tensors, (product + bias).astype(dtype)


@pytest.mark.parametrize("bits_each", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("dtype", ["f4", BF16, "f2"])
@pytest.mark.parametrize("stack", [(), (3,), (2, 2)])
def test_affine_codes_of_mlx_are_read_and_requantised(bits_each, dtype, stack):
    tensors, desired = mlx_model(bits_each, 32, dtype, stack)
    disk = Disk(tensors)
    config = {"bits": bits_each, "group_size": 32}
    name, how = disk.only(config)
    assert (name, how.shape, DTYPES[how.dtype]) == ("p.weight", desired.shape, np.dtype(dtype))
    assert how.tensors == ("p.weight", "p.scales", "p.biases")
    assert how.label == f"mlx {bits_each} bits 32"
    assert how.step == 1
    for sizes in ((), (1,), (3, 4)):
        np.testing.assert_array_equal(bits(read(how, disk, *sizes)), bits(desired))
    how.check(disk)
    weight = draw(*desired.shape)
    weight[..., 0, :32], weight[..., 1, :32], weight[..., 2, :] = 0, 0.03, abs(weight[..., 2, :])
    new = check_quantiser(how, disk, weight, config)
    codes = np.empty((desired.size // 32, 32), int)
    for index, group in enumerate(weight.reshape(-1, 32)):
        codes[index], *beside = affine_by_formula(group, np.float32((1 << bits_each) - 1))
        for number, name in zip(beside, ("p.scales", "p.biases"), strict=True):
            assert new.tensors[name].flat[index] == number.astype(dtype), name
    words = bit_string(codes.reshape(-1, 64), bits_each)
    np.testing.assert_array_equal(new.tensors["p.weight"].reshape(words.shape), words)


def affine_by_formula(group, last):
    """Return the codes, the scale and the bias of one group."""
    least, largest = group.min(), group.max()
    scale = max((largest - least) / last, np.float32(1e-7))
    edge = least if abs(least) > abs(largest) else largest
    scale = scale if edge is least else -scale
    steps = np.rint(edge / scale)
    bias = np.float32(0)
    if steps != 0:
        scale, bias = edge / steps, edge
    return np.clip(np.rint((group - bias) / scale), 0, last), scale, bias


def test_affine_codes_of_mlx_have_the_sign_and_the_bias_of_mlx():
    tensors, _ = mlx_model(4, 32, columns=32, rows=3)
    disk = Disk(tensors)
    config = {"bits": 4, "group_size": 32}
    weight = np.zeros((3, 32), "f4")
    weight[0, :2], weight[1, :2] = (-1, 0.5), (-0.5, 1)
    new = check_quantiser(disk.only(config)[1], disk, weight, config)
    one = np.float32(1)
    np.testing.assert_array_equal(
        new.tensors["p.scales"][:, 0], [one / 10, -one / 10, np.float32(-1e-7)]
    )
    np.testing.assert_array_equal(new.tensors["p.biases"][:, 0], [-1, 1, 0])
    codes = [[0, 15, 10], [15, 0, 10], [0, 0, 0]]
    desired = np.full((3, 32), 10)
    desired[:, :3], desired[2] = codes, 0
    np.testing.assert_array_equal(new.tensors["p.weight"], bit_string(desired, 4))


def test_a_module_of_mlx_may_have_bits_of_its_own():
    config = {"bits": 4, "group_size": 64, "p": {"bits": 8, "group_size": 32}, "q": False}
    tensors, desired = mlx_model(8, 32)
    disk = Disk(tensors)
    np.testing.assert_array_equal(read(disk.only(config)[1], disk), desired)


MLX_MISFITS = [
    ({"bits": 4, "group_size": 32}, {"p.biases": None}, "p.biases is missing"),
    ({"bits": 4, "group_size": 32}, {"p.biases": np.ones((5, 2), BF16)}, "BF16"),
    ({"bits": 4, "group_size": 32}, {"p.scales": np.ones((5, 2), "i4")}, "I32"),
    ({"bits": 4, "group_size": 32}, {"p.scales": np.ones((4, 2), "f4")}, "(4, 2)"),
    ({"bits": 4, "group_size": 32}, {"p.weight": np.ones(5, "u4")}, "(5,)"),
    ({"bits": 4, "group_size": 32}, {"p.weight": np.ones((5, 0), "u4")}, "(5, 0)"),
    ({"bits": 4, "group_size": 64}, {}, "groups of 64"),
    ({"bits": 8, "group_size": 32}, {}, "8 bits"),
    ({"bits": 3, "group_size": 32}, {}, "3 bits"),
    ({"bits": 7, "group_size": 32}, {}, "not known"),
    ({"bits": "4", "group_size": 32}, {}, "not known"),
    ({"bits": 4, "group_size": None}, {}, "not known"),
    ({"bits": 4, "group_size": 0}, {}, "not known"),
    ({"bits": 4, "p": {"group_size": 32}}, {}, "not known"),
    ({}, {}, "config.json"),
]


@pytest.mark.parametrize(("config", "changes", "word"), MLX_MISFITS)
def test_tensors_of_mlx_that_do_not_fit_are_refused(config, changes, word):
    tensors, _ = mlx_model(4, 32)
    tensors = {name: x for name, x in (tensors | changes).items() if x is not None}
    name, problem = refused(tensors, config)
    assert name == "p.weight"
    assert word in problem


@pytest.mark.parametrize("name", ["p.scales", "p.biases"])
def test_numbers_of_mlx_must_be_finite(name):
    tensors, _ = mlx_model(4, 32)
    tensors[name][1, 1] = np.inf
    disk = Disk(tensors)
    _, how = disk.only({"bits": 4, "group_size": 32})
    with pytest.raises(CheckpointError, match=name):
        how.check(disk)


FP4_NUMBERS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
E4M3_NUMBERS = np.arange(256, dtype=np.uint8).view(E4M3).astype("f8")


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8"])
@pytest.mark.parametrize("stack", [(), (3,)])
def test_mx_modes_of_mlx_are_read_and_requantised(mode, stack):
    rng, each = np.random.default_rng(5), int(mode[-1])
    shape = (*stack, 5, 64)
    codes = rng.integers(0, 126, shape) % (1 << each)
    scales = rng.integers(100, 130, (*stack, 5, 2), np.uint8)
    words = bit_string(codes.reshape(-1, 64), each).reshape(*stack, 5, -1)
    disk = Disk({"p.weight": words, "p.scales": scales})
    name, how = disk.only()
    assert (name, how.shape, how.dtype, how.label) == (
        "p.weight", shape, "BF16", f"mlx {mode}",
    )  # fmt: skip
    numbers = (FP4_NUMBERS if each == 4 else E4M3_NUMBERS)[codes]
    desired = (numbers * np.repeat(2.0 ** (scales.astype("f8") - 127), 32, -1)).astype(BF16)
    for sizes in ((), (1,), (3, 4)):
        np.testing.assert_array_equal(bits(read(how, disk, *sizes)), bits(desired))
    how.check(disk)
    weight = draw(*shape)
    weight[..., 0, :] = 0
    weight[..., 1, 0] = 6 if each == 4 else 448
    weight[..., 1, 32] = 6.001 if each == 4 else 449
    new = check_quantiser(how, disk, weight)
    found = new.tensors["p.scales"].reshape(-1, 5, 2)
    assert (found[:, :2] == [[127, 127], [127, 128]]).all()
    disk.tensors["p.scales"][..., 0, 0] = 255
    with pytest.raises(CheckpointError, match=r"p\.scales: a scale must not be NaN"):
        how.check(disk)


def test_the_fp4_codes_of_mlx_have_ties_to_the_smaller_number_and_one_zero():
    weight = np.zeros((1, 32), "f4")
    middles = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5]
    weight[0, :7], weight[0, 7:14], weight[0, 14:16] = middles, -np.array(middles), (6, -0.0)
    disk = Disk({"p.weight": np.zeros((1, 4), "u4"), "p.scales": np.full((1, 1), 127, "u1")})
    new = check_quantiser(disk.only()[1], disk, weight)
    desired = [*range(7), 0, *range(9, 15), 7, 0, *[0] * 16]
    np.testing.assert_array_equal(new.tensors["p.weight"], bit_string(np.array([desired]), 4))


def test_nvfp4_of_mlx_is_refused():
    tensors = {"p.weight": np.zeros((5, 8), "u4"), "p.scales": np.zeros((5, 4), "u1")}
    assert "nvfp4" in refused(tensors)[1]


# MXFP4


def mxfp4_model(experts=2, out=5, groups=3, name="experts.down_proj"):
    rng = np.random.default_rng(6)
    codes = rng.integers(0, 256, (experts, out, groups, 16), np.uint8)
    scales = rng.integers(110, 130, (experts, out, groups), np.uint8)
    desired = np.empty((experts, groups * 32, out))
    for expert, row, column in np.ndindex(desired.shape):
        byte = codes[expert, column, row // 32, row % 32 // 2]
        code = byte & 15 if row % 2 == 0 else byte >> 4
        scale = 2.0 ** (int(scales[expert, column, row // 32]) - 127)
        desired[expert, row, column] = FP4_NUMBERS[code] * scale
    return {f"{name}_blocks": codes, f"{name}_scales": scales}, desired


MXFP4 = {"quant_method": "mxfp4"}


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_mxfp4_is_read_and_requantised(dtype):
    tensors, desired = mxfp4_model()
    disk = Disk(tensors)
    for entries in (MXFP4, None):
        name, how = disk.only(entries, dtype)
    assert (name, how.shape, how.dtype, how.step) == ("experts.down_proj", (2, 96, 5), dtype, 32)
    assert how.label == "MXFP4"
    assert how.tensors == tuple(tensors)
    for sizes in ((), (1,), (50, 7), (96,)):
        np.testing.assert_array_equal(
            bits(read(how, disk, *sizes)), bits(desired.astype(DTYPES[dtype]))
        )
    how.check(disk)
    weight = draw(2, 96, 5)
    weight[0, :32, 0] = 0
    weight[0, 32:64, 0] = np.tile([1, 1.75, 3.5, -5, 0.75, 7.9, -0.0, -0.25], 4)
    new = check_quantiser(how, disk, weight)
    scales = new.tensors["experts.down_proj_scales"]
    assert scales[0, 0].tolist()[:2] == [127, 128]
    first = new.tensors["experts.down_proj_blocks"][0, 0, 1, :4]
    codes = np.stack([first & 15, first >> 4], -1).reshape(-1)
    assert codes.tolist() == [1, 2, 4, 12, 1, 6, 8, 8]  # ties go to even codes
    largest = abs(weight.reshape(2, 3, 32, 5)).max(2).transpose(0, 2, 1)[largest_is_set(weight)]
    exponents = scales.astype(int)[largest_is_set(weight)] - 127
    assert ((largest > 3 * 2.0**exponents) & (largest <= 6 * 2.0**exponents)).all()


def largest_is_set(weight):
    return abs(weight.reshape(2, 3, 32, 5)).max(2).transpose(0, 2, 1) > 0


def test_numbers_of_mxfp4_stay_when_they_are_quantised_again():
    tensors, desired = mxfp4_model()
    disk = Disk(tensors)
    _, how = disk.only(None, "F32")
    _, back = requantised(how, disk, desired.astype("f4"))
    np.testing.assert_array_equal(back, desired)


def test_mxfp4_that_does_not_fit_is_refused():
    for changes, word in (
        ({"experts.down_proj_blocks": np.zeros((2, 5, 3, 8), "u1")}, "(2, 5, 3, 8)"),
        ({"experts.down_proj_blocks": np.zeros((2, 5, 3, 16), "i1")}, "I8"),
        ({"experts.down_proj_scales": np.zeros((2, 5), "u1")}, "(2, 5)"),
        ({"experts.down_proj_scales": np.zeros((2, 5, 3), "f4")}, "F32"),
    ):
        assert word in refused(mxfp4_model()[0] | changes, MXFP4)[1]
    empty = {"p_blocks": np.zeros((0, 5, 3, 16), "u1"), "p_scales": np.zeros((0, 5, 3), "u1")}
    assert "(0, 5, 3)" in refused(empty, MXFP4)[1]
    tensors, _ = mxfp4_model()
    tensors["experts.down_proj_scales"][1, 1, 1] = 255
    disk = Disk(tensors)
    with pytest.raises(CheckpointError, match="a scale must not be NaN"):
        disk.only(MXFP4)[1].check(disk)


# Formats that are refused


def zeros(**tensors):
    """Return tensors of these dtypes and shapes; an underline before a name is a dot."""
    return {f"p.{name}": np.zeros(shape, dtype) for name, (dtype, *shape) in tensors.items()}


REFUSED = {
    "NVFP4": [
        zeros(weight=("u1", 8, 8), weight_scale=(E4M3, 8, 1), weight_scale_2=("f4",)),
        zeros(weight_packed=("u1", 8, 8), weight_scale=(E4M3, 8, 1), weight_global_scale=("f4", 1)),
    ],
    "4-bit floats": [zeros(weight_packed=("u1", 8, 16), weight_scale=("u1", 8, 1))],
    "GPTQ": [
        zeros(qweight=("i4", 8, 8), qzeros=("i4", 1, 1), scales=("f2", 1, 8), g_idx=("i4", 8))
    ],
    "AWQ": [zeros(qweight=("i4", 8, 8), qzeros=("i4", 1, 1), scales=("f2", 1, 8))],
    "AQLM": [zeros(codes=("i2", 8, 8, 1), codebooks=("f2", 1, 8), scales=("f2", 8, 1))],
    "VPTQ": [zeros(indices=("i4", 8, 8), centroids=("f2", 8, 8))],
    "HQQ": [zeros(W_q=("u1", 8, 8), scale=("f2", 8, 1), zero=("f2", 8, 1))],
    "EETQ": [zeros(weight=("i1", 8, 8), weight_scales=("f2", 8))],
    "quanto": [{"p.weight._data": np.zeros((8, 8), "i1"), "p.weight._scale": np.ones((8, 1))}],
    "torchao": [zeros(_weight_qdata=("i1", 8, 8), _weight_scale=("f4", 8, 1))],
    "p.weight.quant_state": [
        {"p.weight": np.zeros((8, 1), "u1"), "p.weight.absmax": np.zeros(1, "f4")},
        zeros(weight=("u1", 8, 1)),
    ],
    "p.weight_scale is missing": [zeros(weight_packed=("i4", 8, 8), weight_shape=("i8", 2))],
    "p_scales": [{"p_blocks": np.zeros((1, 2, 3, 16), "u1")}],
    "p.weight_scale_inv or p.weight_scale": [zeros(weight=(E4M3, 8, 8))],
    "p.SCB or p.weight_scale": [zeros(weight=("i1", 8, 8)), zeros(weight=("i4", 8, 8))],
    "p.scales": [zeros(weight=("u4", 8, 8))],
    "p.gate_up_proj_scale_inv": [zeros(gate_up_proj=(E4M3, 2, 8, 8))],
}


@pytest.mark.parametrize(
    ("word", "tensors"), [(word, one) for word, every in REFUSED.items() for one in every]
)
def test_other_formats_are_refused_by_name(word, tensors):
    name, problem = refused(tensors)
    stem = next(iter(tensors)).removesuffix("_blocks")
    assert name == (stem if stem in ("p", "p.gate_up_proj") else "p.weight")
    assert word in problem
    assert word[0] == "p" or "merge into the 16-bit model" in problem
    ((_, how),) = Disk(tensors).find().items()
    assert set(how.tensors) == set(tensors)


@pytest.mark.parametrize(
    ("method", "tensors", "word"),
    [
        ("fp8", zeros(weight=(E4M3, 8, 8)), ": p.weight_scale_inv"),
        ("compressed-tensors", zeros(weight=(E4M3, 8, 8)), ": p.weight_scale"),
        ("bitsandbytes", zeros(weight=("i1", 8, 8)), ": p.SCB"),
        ("fbgemm_fp8", zeros(weight=(E4M3, 8, 8), weight_scale=("f4", 8, 1)), "(fbgemm_fp8)"),
        ("modelopt", zeros(weight=(E4M3, 8, 8), weight_scale=("f4",)), "(modelopt)"),
        ("new", zeros(weight=("i1", 8, 8), weight_scale=("f4", 8, 1)), "(new)"),
    ],
)
def test_the_method_of_the_configuration_names_the_missing_tensor(method, tensors, word):
    assert word in refused(tensors, {"quant_method": method})[1]


def test_a_weight_in_two_formats_is_refused():
    tensors = fp8_model((8, 16), (4, 8)) | {"p.weight_scale": np.ones((8, 1), "f4")}
    assert "two ways" in refused(tensors)[1]


def test_other_tensors_are_not_quantised():
    assert Disk(zeros(weight=("i1", 8))).find() == {}
    tensors = zeros(
        weight=("f4", 8, 8), bias=("f4", 8), position_ids=("i8", 1, 8),
        num=("i4",), k_scale=("f4", 1), mask=("u1", 8, 8),
    )  # fmt: skip
    tensors |= {
        "p.weight_blocks": np.zeros(3),
        "q.weight_scale": np.ones(1),
        "q_scale_inv": BF16(1),
        "r.scales": np.ones(8, "f4"),
    }
    for method in (None, "fp8", "mxfp4", "gptq", 3):
        assert Disk(tensors).find({"quant_method": method}) == {}


# Junk


NAMES_OF_JUNK = [
    "weight", "weight_scale_inv", "weight_scale", "weight_packed", "weight_shape", "weight_g_idx",
    "weight_zero_point", "SCB", "weight_format", "weight.absmax", "weight.quant_map", "scales",
    "weight.nested_absmax", "weight.nested_quant_map", "weight.quant_state.bitsandbytes__nf4",
    "weight.quant_state.bitsandbytes__", "biases", "weight_blocks", "weight_scales", "qweight",
]  # fmt: skip
VALUES_OF_JUNK = [None, 0, -1, 4, 8, 32, 64, 1.5, "x", "nf4", [], [4, 8], [1], {}, True, 1e400]
KEYS_OF_JUNK = [
    "quant_method", "weight_block_size", "config_groups", "bits", "group_size", "p", "mode",
]  # fmt: skip


def seeds_of_junk():
    """Return small models of all formats, with their configurations."""
    return [
        (fp8_model((8, 16), (4, 8)), FP8),
        (fp8_model((2, 8, 16), (4, 8), "u1"), FP8),
        (bits4_model((8, 64)), {}),
        (bits4_model((8, 64), nested="BF16"), {}),
        (int8_model(), {}),
        (ct_model("FP8", (8, 16), (4, 8))[0], CT),
        (ct_model("INT8", (6, 10), (1, 5), asymmetric=True)[0], CT),
        (ct_model("packed 4", (9, 16), (1, 8), asymmetric=True)[0], CT),
        (mlx_model(3, 32, stack=(2,))[0], {"bits": 3, "group_size": 32}),
        (mxfp4_model(name="p.weight")[0], MXFP4),
    ]


@given(data=strategies.data())
@settings(max_examples=600, deadline=None)
def test_a_changed_model_gives_weights_that_can_be_read_or_one_line(data):
    tensors, entries = data.draw(strategies.sampled_from(seeds_of_junk()))
    entries = dict(entries)
    for _ in range(data.draw(strategies.integers(0, 2))):
        name = data.draw(strategies.sampled_from([*tensors]))
        way = data.draw(
            strategies.sampled_from(["drop", "shape", "dtype", "axis", "swap", "words"])
        )
        shape = list(tensors[name].shape)
        if way == "drop":
            tensors = {key: x for key, x in tensors.items() if key != name} or tensors
        elif way == "shape" and shape:
            axis = data.draw(strategies.integers(0, len(shape) - 1))
            shape[axis] = data.draw(strategies.sampled_from([0, 1, 2, shape[axis] + 1]))
            tensors[name] = np.zeros(shape, tensors[name].dtype)
        elif way == "dtype":
            tensors[name] = np.ones(shape, data.draw(strategies.sampled_from([*NAMES])))
        elif way == "axis":
            tensors[name] = tensors[name][None]
        elif way == "swap":
            tensors[name] = np.ascontiguousarray(tensors[name].T)
        elif entries:
            key = data.draw(strategies.sampled_from([*entries]))
            entries[key] = data.draw(strategies.sampled_from(VALUES_OF_JUNK))
    check_junk(tensors, entries)


@given(data=strategies.data())
@settings(max_examples=600, deadline=None)
def test_junk_gives_weights_that_can_be_read_or_one_line(data):
    draw_one = data.draw
    sides = strategies.sampled_from([0, 1, 2, 4, 8, 16, 32])
    tensors = {}
    for name in draw_one(strategies.sets(strategies.sampled_from(NAMES_OF_JUNK), max_size=6)):
        shape = draw_one(strategies.lists(sides, max_size=4))
        dtype = draw_one(strategies.sampled_from([*NAMES]))
        tensors[f"p.{name}"] = np.zeros(shape, dtype)
    words = strategies.sampled_from(VALUES_OF_JUNK)
    state = {key: draw_one(words) for key in ("dtype", "shape", "blocksize", "nested_blocksize",
             "nested_offset", "nested_dtype")} | {"quant_type": "nf4"}  # fmt: skip
    if draw_one(strategies.booleans()):
        raw = json.dumps(state).encode()
        tensors["p.weight.quant_state.bitsandbytes__nf4"] = np.frombuffer(raw, "u1")
    methods = strategies.sampled_from(["fp8", "mxfp4", "compressed-tensors", "x", 1, None])
    entries = {key: draw_one(words) for key in draw_one(strategies.sets(
        strategies.sampled_from(KEYS_OF_JUNK)))}  # fmt: skip
    if "quant_method" in entries:
        entries["quant_method"] = draw_one(methods)
    check_junk(tensors, entries)


def check_junk(tensors, entries):
    """Fail unless every weight is refused, or can be read and quantised again."""
    disk = Disk(tensors)
    for how in disk.find(entries).values():
        assert set(how.tensors) <= set(tensors)
        if isinstance(how, Refused):
            assert how.problem.startswith("is ")
            assert "\n" not in how.problem
            continue
        with contextlib.suppress(CheckpointError):
            how.check(disk)
        assert isinstance(how.label, str)
        with np.errstate(all="ignore"):
            assert read(how, disk, 3).shape == how.shape
            requantised(how, disk, draw(*how.shape), 2)
