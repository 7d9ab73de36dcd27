"""Quantised models of transformers on disk: written, read and loaded by each format's own library.

A weight P.weight is several tensors on disk. Their names are P and an end, such as ".weight" of the
codes and ".SCB" of the scales.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes
import mlx.core as mx
import numpy as np
import torch
import transformers
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams
from compressed_tensors.utils import match_name
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from writers.matrix import Tensors, read_tensors

BFLOAT16 = {"dtype": torch.bfloat16}
Settings = Mapping[str, Any]
"""The quantization_config of a config.json."""


class Format:
    """How a library stores a model's linear layers, and how it reads them."""

    ends: tuple[str, ...]
    """Of the codes, of the scales, and others."""
    weight = ".weight"
    """The end of the weight's name where it is dense."""
    live: Mapping[str, Any] | None = None
    """The options of `from_pretrained` for a model that computes as it is stored; None where a CPU
    cannot do that."""

    def save(self, model: Any, folder: Path) -> None:
        """Write a model in bfloat16 into a folder."""
        raise NotImplementedError

    def read(self, parts: Tensors, settings: Settings) -> torch.Tensor:
        """Return a weight, dense and in bfloat16, from its tensors by their ends."""
        raise NotImplementedError

    def requantise(
        self, weight: torch.Tensor, parts: Tensors, settings: Settings
    ) -> dict[str, torch.Tensor]:
        """Return the tensors of a new weight, stored in the way of an old one."""
        raise NotImplementedError

    @property
    def options(self) -> dict[str, Any]:
        """Of `from_pretrained`, with which a CPU loads the model."""
        return BFLOAT16

    def load(self, cls: Any, folder: Path) -> Any:
        """Return a dense model in float32."""
        return cls.from_pretrained(folder, **self.options).float().eval()

    def converted(self, cls: Any, folder: Path) -> set[str]:
        """Return the modules that the library takes for quantised when it loads a model."""
        raise NotImplementedError


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def write(folder: Path, tensors: Tensors, config: Mapping[str, Any]) -> None:
    """Write a model of one file."""
    folder.mkdir(parents=True)
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(plain, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def quantised(tensors: Tensors, form: Format) -> dict[str, dict[str, str]]:
    """Return the names of the tensors of each quantised weight, by their ends."""
    stems = (name.removesuffix(form.ends[1]) for name in tensors if name.endswith(form.ends[1]))
    return {
        stem + form.weight: {end: stem + end for end in form.ends if stem + end in tensors}
        for stem in stems
    }


def dense(tensors: Tensors, form: Format, settings: Settings) -> dict[str, torch.Tensor]:
    """Return a model's tensors, where every quantised weight is dense."""
    found = quantised(tensors, form)
    names = {name for parts in found.values() for name in parts.values()}
    return {name: tensor for name, tensor in tensors.items() if name not in names} | {
        name: form.read({end: tensors[part] for end, part in parts.items()}, settings)
        for name, parts in found.items()
    }


def linears(model: Any) -> Iterator[tuple[str, Any]]:
    return ((n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear))


class Bits4(Format):
    """nf4 or fp4 of bitsandbytes."""

    live = BFLOAT16

    def __init__(self, kind: str, *, double: bool = False):
        self.config = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double
        )
        self.state = f".weight.quant_state.bitsandbytes__{kind}"
        nested = (".weight.nested_absmax", ".weight.nested_quant_map")
        self.ends = (".weight", ".weight.absmax", ".weight.quant_map", self.state, *nested)

    def save(self, model: Any, folder: Path) -> None:
        dense = folder.with_name(f"{folder.name}-before")
        model.save_pretrained(dense)
        config = {"quantization_config": self.config, **BFLOAT16}
        type(model).from_pretrained(dense, **config).save_pretrained(folder)

    def read(self, parts: Tensors, settings: Settings) -> torch.Tensor:
        # An end is ".weight.absmax", and the library reads what is behind the last dot.
        named = {end: part for end, part in parts.items() if end != ".weight"}
        return dequantize_4bit(parts[".weight"], QuantState.from_dict(named, torch.device("cpu")))

    def requantise(
        self, weight: torch.Tensor, parts: Tensors, settings: Settings
    ) -> dict[str, torch.Tensor]:
        named = {end: part for end, part in parts.items() if end != ".weight"}
        old = QuantState.from_dict(named, torch.device("cpu"))
        codes, new = quantize_4bit(
            weight,
            blocksize=old.blocksize,
            compress_statistics=old.nested,
            quant_type=old.quant_type,
        )
        new.dtype = old.dtype
        packed = {f".weight.{end}": part for end, part in new.as_dict(packed=True).items()}
        return {".weight": codes, **packed}

    def load(self, cls: Any, folder: Path) -> Any:
        return cls.from_pretrained(folder, **BFLOAT16).dequantize().float().eval()

    def converted(self, cls: Any, folder: Path) -> set[str]:
        kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
        loaded = cls.from_pretrained(folder, **BFLOAT16)
        return {name for name, module in linears(loaded) if isinstance(module, kinds)}


class Bits8(Bits4):
    """int8 of bitsandbytes."""

    def __init__(self) -> None:
        self.config = transformers.BitsAndBytesConfig(load_in_8bit=True)
        self.ends = (".weight", ".SCB", ".weight_format")

    def read(self, parts: Tensors, settings: Settings) -> torch.Tensor:
        new = bitsandbytes.functional.int8_vectorwise_dequant(parts[".weight"], parts[".SCB"])
        return new.bfloat16()

    def requantise(
        self, weight: torch.Tensor, parts: Tensors, settings: Settings
    ) -> dict[str, torch.Tensor]:
        # The library's layer rounds a weight to float16 before this function.
        codes, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(weight)
        return {**parts, ".weight": codes, ".SCB": scales}


class Float8(Format):
    """FP8 in blocks, as of DeepSeek, or with one scale for a weight."""

    ends = (".weight", ".weight_scale_inv")

    def __init__(self, block: list[int] | None, scale: str = "float"):
        self.settings = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": block,
            "modules_to_not_convert": ["lm_head"],
            **({} if scale == "float" else {"scale_fmt": scale}),
        }
        own = SimpleNamespace(weight_block_size=block, scale_fmt=scale)
        self.quantiser = Fp8Quantize(SimpleNamespace(quantization_config=own))

    def save(self, model: Any, folder: Path) -> None:
        before = folder.with_name(f"{folder.name}-before")
        model.save_pretrained(before)
        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in read_tensors(before).items():
            is_plain = any(end in name for end in ("embed", "lm_head", "mlp.gate.", "norm"))
            parts = {name: tensor} if is_plain else self.quantiser._quantize_one(name, tensor)
            tensors |= parts
        write(folder, tensors, {**config_of(before), "quantization_config": self.settings})

    def read(self, parts: Tensors, settings: Settings) -> torch.Tensor:
        codes, scales = (parts[end] for end in self.ends)
        return Fp8Dequantize(None)._dequantize_one(codes, scales, torch.bfloat16)

    def requantise(
        self, weight: torch.Tensor, parts: Tensors, settings: Settings
    ) -> dict[str, torch.Tensor]:
        return self.quantiser._quantize_one(".weight", weight)

    def converted(self, cls: Any, folder: Path) -> set[str]:
        return not_left_out(cls, folder, (torch.nn.Linear,))


def not_left_out(cls: Any, folder: Path, kinds: tuple[type, ...]) -> set[str]:
    """Return the modules that an accelerator would have quantised; a CPU has dense ones.

    transformers renames the modules of an FP8 model's list as it renames those of its file.
    """
    model = empty(cls, folder)
    settings = config_of(folder)["quantization_config"]
    listed = SimpleNamespace(modules_to_not_convert=settings.get("modules_to_not_convert"))
    if settings["quant_method"] == "fp8":
        loader = SimpleNamespace(quantization_config=listed)
        FineGrainedFP8HfQuantizer._normalize_modules_to_not_convert(loader, model)
    patterns = FineGrainedFP8HfQuantizer.get_modules_to_not_convert(
        model, listed.modules_to_not_convert, model._keep_in_fp32_modules
    )
    return {
        name
        for name, module in model.named_modules()
        if (isinstance(module, kinds) or name.endswith(".experts"))
        and should_convert_module(name, patterns)
    }


def empty(cls: Any, folder: Path) -> Any:
    """Return a model without weights."""
    with torch.device("meta"):
        return cls(cls.config_class.from_pretrained(folder))


class Compressed(Format):
    """compressed-tensors: FP8, INT8, or packed integers."""

    def __init__(self, weights: Mapping[str, Any], activations: Mapping[str, Any] | None = None):
        self.scheme = {"weights": weights, "input_activations": activations}
        self.ends = (".weight", ".weight_scale")
        if activations is None:
            others = (".weight_shape", ".weight_zero_point")
            self.ends = (".weight_packed", ".weight_scale", *others)
        # transformers cannot load packed zero points as they are stored.
        self.live = {"dtype": torch.float32} if weights["symmetric"] else None

    def save(self, model: Any, folder: Path) -> None:
        groups = {"group_0": QuantizationScheme(targets=["Linear"], **self.scheme)}
        config = QuantizationConfig(config_groups=groups, ignore=["lm_head"])
        apply_quantization_config(model, config)
        for _, module in linears(model):
            if hasattr(module, "quantization_scheme"):
                scale, zero = scales_of(module.weight, module.quantization_scheme.weights)
                module.weight_scale.data.copy_(scale)
                module.weight_zero_point.data.copy_(zero)
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        model.save_pretrained(folder)
        compressor.update_config(folder)

    def read(self, parts: Tensors, settings: Settings) -> torch.Tensor:
        compressor, scheme = own(settings)
        named = {end.removeprefix("."): part for end, part in parts.items()}
        return compressor.decompress(named, scheme)["weight"].bfloat16()

    def requantise(
        self, weight: torch.Tensor, parts: Tensors, settings: Settings
    ) -> dict[str, torch.Tensor]:
        compressor, scheme = own(settings)
        scale, zero = scales_of(weight, scheme.weights)
        named = {
            "weight": weight,
            "weight_scale": scale.to(parts[".weight_scale"].dtype),
            "weight_zero_point": zero,
        }
        return {f".{end}": part for end, part in compressor.compress(named, scheme).items()}

    @property
    def options(self) -> dict[str, Any]:
        config = transformers.CompressedTensorsConfig(dequantize=True)
        return {**BFLOAT16, "quantization_config": config}

    def converted(self, cls: Any, folder: Path) -> set[str]:
        model = empty(cls, folder)
        loaded = transformers.CompressedTensorsConfig(**config_of(folder)["quantization_config"])
        apply_quantization_config(model, loaded.quantization_config)
        return {n for n, module in linears(model) if hasattr(module, "quantization_scheme")}


class CompressedExperts(Compressed):
    """compressed-tensors with experts, which are layers of their own on disk alone."""

    def save(self, model: Any, folder: Path) -> None:
        before = folder.with_name(f"{folder.name}-before")
        model.save_pretrained(before)
        name = "pack-quantized" if ".weight_packed" in self.ends else "float-quantized"
        group = QuantizationScheme(targets=["Linear"], format=name, **self.scheme)
        config = QuantizationConfig(
            config_groups={"group_0": group},
            ignore=["lm_head", "re:.*mlp[.]gate$"],
            format=name,
            quantization_status="compressed",
        )
        settings = json.loads(config.model_dump_json())
        scale = {".weight_scale": torch.zeros(1, **BFLOAT16)}
        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in read_tensors(before).items():
            is_plain = any(end in name for end in ("embed", "lm_head", "mlp.gate.", "norm"))
            if is_plain:
                tensors[name] = tensor
            else:
                stem = name.removesuffix(".weight")
                parts = self.requantise(tensor, scale, settings)
                tensors |= {stem + end: part for end, part in parts.items()}
        write(folder, tensors, {**config_of(before), "quantization_config": settings})

    def converted(self, cls: Any, folder: Path) -> set[str]:
        """Return the layers, and the experts of which some are not ignored."""
        ignored = config_of(folder)["quantization_config"]["ignore"]
        experts = {
            name.removesuffix(end)
            for name in read_tensors(folder)
            for end in (".weight", ".weight_packed")
            if ".experts." in name and name.endswith(end)
        }
        taken = {
            name.partition(".experts.")[0] + ".experts"
            for name in experts
            if not any(match_name(name, target) for target in ignored)
        }
        return super().converted(cls, folder) | taken


def own(settings: Settings) -> tuple[Any, QuantizationScheme]:
    """Return the compressor and the scheme of a config.json with one group."""
    (group,) = settings["config_groups"].values()
    compressor = BaseCompressor.get_value_from_registry(settings["format"])
    return compressor, QuantizationScheme.model_validate(group)


def scales_of(weight: torch.Tensor, arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales and zero points from the least and the largest number of each group."""
    weight = weight.detach().float()
    if arguments.strategy == "tensor":
        return calculate_qparams(*torch.aminmax(weight), arguments)
    if arguments.strategy == "channel":
        return calculate_qparams(*torch.aminmax(weight, dim=1, keepdim=True), arguments)
    if arguments.strategy == "block":
        height, width = arguments.block_structure
        blocks = weight.unflatten(1, (-1, width)).unflatten(0, (-1, height)).transpose(1, 2)
        return calculate_qparams(*torch.aminmax(blocks.flatten(2), dim=2), arguments)
    groups = weight.unflatten(1, (-1, arguments.group_size))
    return calculate_qparams(*torch.aminmax(groups, dim=2), arguments)


class Mxfp4(Format):
    """The experts of gpt-oss. Attention, router, embeddings and head stay in bfloat16."""

    ends = ("_blocks", "_scales")
    weight = ""

    def save(self, model: Any, folder: Path) -> None:
        before = folder.with_name(f"{folder.name}-before")
        model.save_pretrained(before)
        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in read_tensors(before).items():
            parts = {"": tensor}
            if name.endswith(("gate_up_proj", "down_proj")):
                parts = self.requantise(tensor, {}, {})
            tensors |= {name + end: part for end, part in parts.items()}
        plain = [f"model.layers.*.{name}" for name in ("self_attn", "mlp.router")]
        settings = {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [*plain, "model.embed_tokens", "lm_head"],
        }
        write(folder, tensors, {**config_of(before), "quantization_config": settings})

    def read(self, parts: Tensors, settings: Settings) -> torch.Tensor:
        blocks, scales = (parts[end] for end in self.ends)
        return convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)

    def requantise(
        self, weight: torch.Tensor, parts: Tensors, settings: Settings
    ) -> dict[str, torch.Tensor]:
        rows = mx.array(weight.mT.contiguous().float().numpy())
        codes, scales = mx.quantize(rows, group_size=32, bits=4, mode="mxfp4")
        packed = np.array(codes).view(np.uint8).reshape(*scales.shape, 16)
        return {"_blocks": torch.from_numpy(packed), "_scales": torch.from_numpy(np.array(scales))}

    def converted(self, cls: Any, folder: Path) -> set[str]:
        return not_left_out(cls, folder, ())
