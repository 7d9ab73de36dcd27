"""Small quantised models on disk with random codes, and the weights that they are.

Each weight is computed here from its codes by the formula of the format, one number at a time or
with NumPy's plainest operations, apart from the readers in `src`.
"""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np

from doraxp._base.safetensors import Tensor, write_header

BFLOAT16 = ml_dtypes.bfloat16
NAMES = {
    np.dtype(np.float32): "F32", np.dtype(BFLOAT16): "BF16", np.dtype(np.uint8): "U8",
    np.dtype(np.int8): "I8", np.dtype(np.int32): "I32", np.dtype(np.uint32): "U32",
    np.dtype(np.int64): "I64", np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3", np.dtype(ml_dtypes.float8_e8m0fnu): "F8_E8M0",
}  # fmt: skip
"""The names that safetensors files have for dtypes."""
FP8_BLOCK = [16, 16]
MXFP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def save(file, tensors):
    """Write a safetensors file, the wider dtypes first, as the libraries do."""
    order = sorted(tensors.items(), key=lambda item: -item[1].itemsize)
    entries = {name: Tensor(NAMES[one.dtype], one.shape, one.nbytes) for name, one in order}
    with file.open("wb") as opened:
        write_header(opened, entries, {"format": "pt"})
        for _, one in order:
            opened.write(np.ascontiguousarray(one).reshape(-1).view(np.uint8).data)


def write(folder, tensors, shard_of=None, **config):
    """Write a model of one file, or of the shards that `shard_of` names for each tensor."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16", **config}))
    if shard_of is None:
        save(folder / "model.safetensors", tensors)
        return
    weight_map = {name: shard_of(name) for name in tensors}
    for shard in set(weight_map.values()):
        own = {name: one for name, one in tensors.items() if weight_map[name] == shard}
        save(folder / shard, own)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip
"""The numbers of nf4: arXiv:2305.14314, appendix E."""

# Each function returns the tensors on disk and the weight in float64


def fp8(rng, name, out, inner, block=FP8_BLOCK):
    """FP8 with a scale for each block."""
    codes = rng.integers(0, 256, (out, inner)).astype(np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0  # NaN
    codes = codes.view(ml_dtypes.float8_e4m3fn)
    grid = tuple(-(-side // size) for side, size in zip((out, inner), block, strict=True))
    scales = (1e-3 * (1 + rng.random(grid))).astype(np.float32)
    whole = scales.repeat(block[0], axis=0).repeat(block[1], axis=1)[:out, :inner]
    weight = (codes.astype(np.float32) * whole).astype(BFLOAT16)
    return {name: codes, f"{name}_scale_inv": scales}, weight.astype(np.float64)


def nf4(rng, name, out, inner, block=64):
    """4 bits of bitsandbytes, without a second quantisation of the scales."""
    codes = rng.integers(0, 16, out * inner)
    table = np.array(NF4, np.float32)
    absmax = (0.1 * (1 + rng.random(-(-codes.size // block)))).astype(np.float32)
    values = table[codes] * absmax.repeat(block)[: codes.size]
    state = {"quant_type": "nf4", "blocksize": block, "dtype": "bfloat16", "shape": [out, inner]}
    tensors = {
        name: (codes[::2] * 16 + codes[1::2]).astype(np.uint8)[:, None],
        f"{name}.absmax": absmax,
        f"{name}.quant_map": table,
        f"{name}.quant_state.bitsandbytes__nf4": np.frombuffer(
            json.dumps(state).encode(), np.uint8
        ),
    }
    return tensors, values.astype(BFLOAT16).astype(np.float64).reshape(out, inner)


def int8(rng, name, out, inner):
    """8 bits of bitsandbytes: a scale for each row."""
    codes = rng.integers(-127, 128, (out, inner)).astype(np.int8)
    scb = (0.1 * (1 + rng.random(out))).astype(np.float32)
    values = codes.astype(np.float32) * scb[:, None] * np.float32(1 / 127)
    module = name.removesuffix("weight")
    tensors = {
        name: codes, f"{module}SCB": scb, f"{module}weight_format": np.array(0, np.uint8)
    }  # fmt: skip
    return tensors, values.astype(BFLOAT16).astype(np.float64)


def int4(rng, name, out, inner, group=32):
    """4 bits of compressed-tensors, symmetric."""
    codes = rng.integers(0, 16, (out, inner)).astype(np.uint8)
    scales = (0.01 * (1 + rng.random((out, inner // group)))).astype(BFLOAT16)
    values = (codes.astype(np.float32) - 8) * scales.astype(np.float32).repeat(group, axis=1)
    module = name.removesuffix("weight")
    tensors = {
        f"{module}weight_packed": (codes[:, ::2] + 16 * codes[:, 1::2]).view(np.int32),
        f"{module}weight_scale": scales,
        f"{module}weight_shape": np.array([out, inner], np.int64),
    }
    return tensors, values.astype(BFLOAT16).astype(np.float64)


def mlx(rng, name, out, inner, group=32):
    """4 bits of mlx."""
    codes = rng.integers(0, 16, (out, inner)).astype(np.uint8)
    scales = (0.01 * (1 + rng.random((out, inner // group)))).astype(BFLOAT16)
    biases = (scales.astype(np.float32) * -8).astype(BFLOAT16)
    wide, offset = (one.astype(np.float32).repeat(group, axis=1) for one in (scales, biases))
    product = (codes.astype(np.float32) * wide).astype(BFLOAT16).astype(np.float32)
    module = name.removesuffix("weight")
    tensors = {
        name: (codes[:, ::2] + 16 * codes[:, 1::2]).view(np.uint32),
        f"{module}scales": scales,
        f"{module}biases": biases,
    }
    return tensors, (product + offset).astype(BFLOAT16).astype(np.float64)


def mxfp4(rng, name, experts, inner, out):
    """The stacks of gpt-oss: (experts, in, out) in memory."""
    blocks = rng.integers(0, 256, (experts, out, inner // 32, 16)).astype(np.uint8)
    scales = rng.integers(118, 122, (experts, out, inner // 32)).astype(np.uint8)
    pairs = np.stack([MXFP4[blocks & 15], MXFP4[blocks >> 4]], axis=-1)
    values = pairs.reshape(experts, out, inner // 32, 32) * np.exp2(scales[..., None] - 127.0)
    weight = values.reshape(experts, out, inner).swapaxes(1, 2)
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}, weight.astype(np.float64)


MATRICES = {"fp8": fp8, "nf4": nf4, "int8": int8, "int4": int4, "mlx": mlx}
_GROUP = {
    "targets": ["Linear"],
    "weights": {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32
    },
}  # fmt: skip
_MLX = {"group_size": 32, "bits": 4, "mode": "affine"}
CONFIGS = {
    "fp8": {"quantization_config": {"quant_method": "fp8", "weight_block_size": FP8_BLOCK}},
    "nf4": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    "int8": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
    "int4": {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": _GROUP},
            "ignore": ["lm_head"],
        }
    },
    "mlx": {"quantization": _MLX, "quantization_config": _MLX},
    "mxfp4": {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}},
}
"""The entries of config.json."""
