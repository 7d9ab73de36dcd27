"""Quantised weights: bit equality with the libraries that write and read them.

`nox -s writers` runs this file. It needs the group `writers`, so it runs where it is asked for.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import numpy as np
import pytest
from test_quantised_formats import BF16, E4M3, Disk, bits, draw, read, requantised, state_of

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of the libraries
    pytest.mark.usefixtures("writers"),
    pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"]),
]


@pytest.fixture(scope="module")
def writers():
    """The libraries are imported where they are used; this name chooses the tests."""


@pytest.fixture(scope="module")
def pytorch():
    return importlib.import_module("torch")


def torch_dtype(pytorch, dtype):
    return {"BF16": pytorch.bfloat16, "F16": pytorch.float16, "F32": pytorch.float32}[dtype]


def from_torch(pytorch, tensor):
    tensor = tensor.contiguous()
    for dtype, other in ((pytorch.bfloat16, BF16), (pytorch.float8_e4m3fn, E4M3)):
        if tensor.dtype == dtype:
            return tensor.view(pytorch.uint8).numpy().view(other).reshape(tensor.shape)
    if tensor.dtype == pytorch.float8_e8m0fnu:
        return tensor.view(pytorch.uint8).numpy()
    return tensor.numpy()


def assert_same(actual, desired):
    np.testing.assert_array_equal(bits(actual), bits(desired))


def check(tensors, reference, weight, entries, dtype, without=()):
    """Compare with the reader's weight, and the tensors with those of our quantiser."""
    disk = Disk(tensors)
    _, how = disk.only(entries, dtype)
    how.check(disk)
    assert_same(read(how, disk, 7), reference)
    new, _ = requantised(how, disk, weight, 3)
    for name in tensors:
        if name not in without:
            assert_same(new.tensors[name], tensors[name])
    return new


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
@pytest.mark.parametrize("shape", [(256, 384), (3, 256, 128)])
def test_fp8_equals_transformers(pytorch, scale_fmt, shape, dtype):
    module = importlib.import_module("transformers.integrations.finegrained_fp8")
    config = SimpleNamespace(weight_block_size=[128, 128], scale_fmt=scale_fmt)
    quantise = module.Fp8Quantize(SimpleNamespace(quantization_config=config))
    weight = draw(*shape)
    made = quantise._quantize_one("p.weight", pytorch.from_numpy(weight))
    codes, scales = made.values()
    wanted = torch_dtype(pytorch, dtype)
    reference = module.Fp8Dequantize(None)._dequantize_one(codes, scales, wanted)
    tensors = {name: from_torch(pytorch, tensor) for name, tensor in made.items()}
    entries = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    check(tensors, from_torch(pytorch, reference), weight, entries, dtype)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("shape", "storage"), [((64, 96), "uint8"), ((33, 20), "bfloat16")])
def test_4_bits_equal_bitsandbytes(pytorch, kind, nested, shape, storage, dtype):
    functional = importlib.import_module("bitsandbytes.functional")
    generic = importlib.import_module("bitsandbytes.backends.default.ops")
    wanted = torch_dtype(pytorch, dtype)
    weight = pytorch.from_numpy(draw(*shape)).to(wanted)
    codes, state = functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=nested, quant_type=kind,
        quant_storage=getattr(pytorch, storage),
    )  # fmt: skip
    absmax = state.absmax
    if nested:
        absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
    # The kernel for CPUs has no negative zero in fp4, and older ones are wrong in rows of 96.
    reference = generic._dequantize_4bit_compute(
        codes.view(pytorch.uint8).reshape(-1), absmax, state.code, 64, shape, wanted
    )
    tensors = {"p.weight": from_torch(pytorch, codes)}
    for name, tensor in state.as_dict(packed=True).items():
        tensors[f"p.weight.{name}"] = from_torch(pytorch, tensor)
    name = f"p.weight.quant_state.bitsandbytes__{kind}"
    # bitsandbytes writes the offset with 17 digits, and its kernel for CPUs rounds the scales
    # before it looks for their codes.
    without = (name, "p.weight.absmax") if nested else ()
    rows = weight.float().numpy()
    new = check(tensors, from_torch(pytorch, reference), rows, {}, dtype, without)
    if nested:
        offset = np.float32(state_of(new.tensors)["nested_offset"])
        np.testing.assert_allclose(offset, state.offset.item(), rtol=2e-7)
        _, plain = functional.quantize_4bit(weight, blocksize=64, quant_type=kind)
        code = state.state2.code
        desired, outer = exact_blockwise(plain.absmax.numpy() - offset, code.numpy())
        assert_same(new.tensors["p.weight.absmax"], desired)
        assert_same(new.tensors["p.weight.nested_absmax"], outer)


def exact_blockwise(values, code):
    """Return the nearest codes of a block of at most 256 numbers, as the generic function does."""
    largest = abs(values).max()
    scaled = np.clip(values / largest, -1, 1)
    return np.searchsorted((code[:-1] + code[1:]) / 2, scaled).astype("u1"), np.array([largest])


def test_8_bits_equal_bitsandbytes(pytorch, dtype):
    functional = importlib.import_module("bitsandbytes.functional")
    weight = pytorch.from_numpy(draw(48, 96)).to(torch_dtype(pytorch, dtype))
    codes, scales, _ = functional.int8_vectorwise_quant(weight)
    reference = functional.int8_vectorwise_dequant(codes, scales).to(weight.dtype)
    tensors = {"p.weight": codes.numpy(), "p.SCB": scales.numpy()}
    check(tensors, from_torch(pytorch, reference), weight.float().numpy(), {}, dtype)


BLOCK = [16, 32]
SCHEMES = [
    ("float-quantized", 8, "float", strategy, None, block, True, shape)
    for strategy, block, shape in (
        ("tensor", None, (48, 64)),
        ("channel", None, (48, 64)),
        ("block", BLOCK, (48, 64)),
        ("block", BLOCK, (50, 70)),
    )
]
SCHEMES += [
    ("int-quantized", 8, "int", strategy, group, None, symmetric, (48, 64))
    for strategy, group in (("channel", None), ("tensor", None), ("group", 32))
    for symmetric in (True, False)
]
SCHEMES += [
    ("pack-quantized", each, "int", strategy, group, None, symmetric, shape)
    for each in (4, 8)
    for strategy, group, shape in (("channel", None, (45, 33)), ("group", 32, (48, 64)))
    for symmetric in (True, False)
]


@pytest.mark.parametrize("case", SCHEMES, ids=str)
def test_compressed_tensors_equal_their_library(pytorch, case, dtype):
    library = importlib.import_module("compressed_tensors.compressors").BaseCompressor
    quantization = importlib.import_module("compressed_tensors.quantization")
    utils = importlib.import_module("compressed_tensors.quantization.utils")
    name, each, kind, strategy, group, block, symmetric, shape = case
    args = quantization.QuantizationArgs(
        num_bits=each, type=kind, symmetric=symmetric, strategy=strategy, group_size=group,
        block_structure=block,
    )  # fmt: skip
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args)
    weight = draw(*shape) + np.float32(0 if symmetric else 0.02)
    height, width = {
        "tensor": shape, "channel": (1, shape[1]), "group": (1, group), "block": block
    }[strategy]  # fmt: skip
    padded = np.pad(weight, ((0, -shape[0] % height), (0, -shape[1] % width)))
    tiles = padded.reshape(padded.shape[0] // height, height, -1, width)
    extremes = [pytorch.from_numpy(f(tiles, (1, 3))) for f in (np.min, np.max)]
    scale, zero = utils.calculate_qparams(*extremes, args)
    if strategy == "tensor":
        scale, zero = scale.reshape(1), zero.reshape(1)
    state = {
        "weight": pytorch.from_numpy(weight), "weight_scale": scale.to(torch_dtype(pytorch, dtype)),
    }  # fmt: skip
    if not symmetric:
        state["weight_zero_point"] = zero
    compressor = library.get_value_from_registry(name)
    made = compressor.compress(state, scheme)
    reference = compressor.decompress(dict(made), scheme)["weight"]
    tensors = {f"p.{key}": from_torch(pytorch, tensor) for key, tensor in made.items()}
    groups = {"g": {"targets": ["Linear"], "weights": {"block_structure": block}}}
    entries = {"quant_method": "compressed-tensors", "config_groups": groups}
    check(tensors, from_torch(pytorch, reference), weight, entries, dtype)


def test_mxfp4_equals_transformers(pytorch, dtype):
    module = importlib.import_module("transformers.integrations.mxfp4")
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (3, 20, 4, 16), np.uint8)
    scales = rng.integers(0, 255, (3, 20, 4), np.uint8)
    reference = module.convert_moe_packed_tensors(
        pytorch.from_numpy(codes), pytorch.from_numpy(scales), dtype=torch_dtype(pytorch, dtype)
    )
    disk = Disk({"p_blocks": codes, "p_scales": scales})
    _, how = disk.only({"quant_method": "mxfp4"}, dtype)
    assert_same(read(how, disk, 50, 7), from_torch(pytorch, reference))


@pytest.fixture(scope="module")
def mx():
    core = importlib.import_module("mlx.core")
    core.set_default_device(core.cpu)
    return core


def from_mlx(mx, array):
    if array.dtype == mx.bfloat16:
        return np.array(array.view(mx.uint16)).view(BF16)
    return np.array(array)


@pytest.mark.parametrize("each", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("shape", [(16, 256), (3, 8, 256)])
def test_affine_codes_equal_mlx(mx, each, group, shape, dtype):
    weight = draw(*shape)
    weight[..., 0, :], weight[..., 1, :], weight[..., 2, :] = 0, 0.03, abs(weight[..., 2, :])
    wanted = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}[dtype]
    array = mx.array(weight).astype(wanted)
    made = mx.quantize(array, group_size=group, bits=each)
    reference = mx.dequantize(*made, group_size=group, bits=each)
    names = ("p.weight", "p.scales", "p.biases")
    tensors = {name: from_mlx(mx, one) for name, one in zip(names, made, strict=True)}
    rows = np.array(array.astype(mx.float32))
    entries = {"bits": each, "group_size": group}
    check(tensors, from_mlx(mx, reference), rows, entries, dtype)


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8"])
def test_mx_modes_equal_mlx(mx, mode, dtype):
    weight = draw(256, 256)
    weight[0] = 0
    for row in range(1, 200):  # at the edges of the scales
        edge = np.float32(2.0 ** (row - 100) * (6 if mode == "mxfp4" else 448))
        weight[row, :32] = 0
        weight[row, 0] = np.nextafter(edge, edge * np.float32((0, 1, 2)[row % 3]))
    made = mx.quantize(mx.array(weight), mode=mode)
    reference = mx.dequantize(*made, mode=mode)
    tensors = {"p.weight": np.array(made[0]), "p.scales": np.array(made[1])}
    check(tensors, from_mlx(mx, reference), weight, {}, dtype)
