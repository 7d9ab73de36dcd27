"""Merges into quantised models of transformers, to bfloat16 and back into the same format.

The right weights are PEFT's merge, in float64, into the weights that the format's own library
reads. They are rounded to bfloat16, or quantised again by that library.
"""

from __future__ import annotations

import functools
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peft
import torch
import transformers
from safetensors.torch import save_file

from doraxp import AdaptedLayer, Adapter, Config, LayerKind
from doraxp.checkpoint import save_adapters
from writers.matrix import BOUND, BOUND16, CLOSE, Trial, difference, read_tensors, register
from writers.peft_common import IDS, model, outputs, reload, train
from writers.quantised_formats import (
    Bits4,
    Bits8,
    Compressed,
    CompressedExperts,
    Float8,
    Format,
    Mxfp4,
    config_of,
    dense,
    quantised,
    write,
)

SIZES = {
    "hidden_size": 64, "intermediate_size": 192, "moe_intermediate_size": 32, "head_dim": 32,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WHOLE_BLOCKS = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64}
EYE = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "image_size": 16, "patch_size": 4,
}  # fmt: skip
FOUR = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 4}
"""All experts are used: a choice of two would jump where inputs are rounded to eight bits."""
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", {}),
    "Llama, tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "Llama, whole blocks": ("LlamaForCausalLM", WHOLE_BLOCKS),
    "Qwen3": ("Qwen3ForCausalLM", {}),
    "Qwen3-MoE": ("Qwen3MoeForCausalLM", FOUR),
    "gpt-oss": ("GptOssForCausalLM", {**FOUR, "intermediate_size": 96}),
    "LLaVA": ("LlavaForConditionalGeneration", {}),
}
DYNAMIC = {"strategy": "token", "dynamic": True, "symmetric": True}
GROUP = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
FLOAT = {"num_bits": 8, "type": "float", "symmetric": True}
INTEGER = {"num_bits": 8, "type": "int", "symmetric": True}
FORMATS: dict[str, Format] = {
    "nf4": Bits4("nf4"),
    "nf4, double": Bits4("nf4", double=True),
    "fp4": Bits4("fp4"),
    "int8": Bits8(),
    "FP8, blocks of 16": Float8([16, 16]),
    "FP8, blocks of 128": Float8([128, 128]),
    "FP8, one scale": Float8(None),
    "FP8, ue8m0": Float8([16, 16], "ue8m0"),
    "float-quantized, channels": Compressed({**FLOAT, "strategy": "channel"}, {**FLOAT, **DYNAMIC}),
    "float-quantized, one scale": Compressed({**FLOAT, "strategy": "tensor"}, {**FLOAT, **DYNAMIC}),
    "float-quantized, blocks": Compressed(
        {**FLOAT, "strategy": "block", "block_structure": [16, 16]}, {**FLOAT, **DYNAMIC}
    ),
    "int-quantized": Compressed({**INTEGER, "strategy": "channel"}, {**INTEGER, **DYNAMIC}),
    "pack-quantized": Compressed({**GROUP, "symmetric": True}),
    "pack-quantized, asymmetric": Compressed({**GROUP, "symmetric": False}),
    "MXFP4": Mxfp4(),
}
OF_EXPERTS = {
    "float-quantized, experts": CompressedExperts(
        {**FLOAT, "strategy": "channel"}, {**FLOAT, **DYNAMIC}
    ),
    "pack-quantized, experts": CompressedExperts({**GROUP, "symmetric": True}),
}
MODULES = ["q_proj", "o_proj", "gate_proj", "down_proj"]
"""Those with an adapter. The others of a layer stay quantised."""
LOOSE = 0.1
"""Of the outputs of a model that computes as it is stored, in bfloat16 or with 8-bit inputs."""
FOLDERS = tempfile.TemporaryDirectory()
"""Bases are made once in a process."""


class Base(NamedTuple):
    """A quantised model, and its tensors as the format's library reads them."""

    folder: Path
    name: str
    form: Format
    dense: dict[str, torch.Tensor]

    @property
    def cls(self) -> Any:
        return getattr(transformers, self.name)


@functools.cache
def base_of(title: str, form: str, change: Callable[[Path, Format], None] | None = None) -> Base:
    """Make a base; `change` may then edit its files."""
    torch.manual_seed(0)
    name, changes = MODELS[title]
    sizes = {**SIZES, **changes}
    if title == "LLaVA":
        text = transformers.LlamaConfig(**SIZES)
        sizes = {"text_config": text, "vision_config": transformers.CLIPVisionConfig(**EYE)}
    new = spread_experts(model(name, **sizes)).bfloat16()
    folder = Path(tempfile.mkdtemp(dir=FOLDERS.name)) / "base"
    way = (FORMATS | OF_EXPERTS)[form]
    way.save(new, folder)
    if change is not None:
        change(folder, way)
    settings = config_of(folder)["quantization_config"]
    return Base(folder, name, way, dense(read_tensors(folder), way, settings))


@torch.no_grad()
def spread_experts(new: Any) -> Any:
    """Give the rows of experts unlike norms, and so much weight that the outputs depend on them."""
    for parameter in new.parameters():
        if parameter.ndim == 3:
            parameter.mul_(2 + 4 * torch.rand(*parameter.shape[:2], 1))
    return new


def dense_model(folder: Path, base: Base, tensors: dict[str, torch.Tensor]) -> Any:
    """Load tensors as a dense model in float32."""
    config = config_of(base.folder)
    del config["quantization_config"]
    write(folder, tensors, config)
    return reload(folder, base.name)


def trial_of(
    folder: Path,
    title: str,
    form: str,
    to: str,
    change: Callable[[Path, Format], None] | None = None,
    adapt: Callable[..., dict[str, torch.Tensor]] | None = None,
    options: tuple[str, ...] = ("--compute", "float64"),
    **changes: Any,
) -> Trial:
    """Adapt the dense weights of a base, and merge the adapter into the quantised ones."""
    base = base_of(title, form, change)
    torch.manual_seed(1)
    new = dense_model(folder / "dense", base, base.dense)
    merged = (adapt or adapted)(folder, base, new, **changes)
    right = base.dense | {
        name: stored(name, weight, base, to).bfloat16() for name, weight in merged.items()
    }
    wanted = outputs(dense_model(folder / "right", base, right), input_ids=IDS)
    read = functools.partial(read_dense, form=base.form)
    if to == "same" and not options:
        read = functools.partial(read_but_ties, read=read, merged=merged, right=right)
    check = functools.partial(loaded, base=base, wanted=wanted)
    options = ("--targets", to, *options)
    own = Trial(base.folder, folder / "adapter", right, options=options, read=read)
    # transformers 5.24 has no way to load dense experts where the format packs experts.
    if (to, form) == ("bf16", "pack-quantized, experts") and any(".experts." in x for x in merged):
        return own
    return own._replace(outputs=check, wanted=wanted)


def adapted(folder: Path, base: Base, new: Any, **changes: Any) -> dict[str, torch.Tensor]:
    """Save an adapter of PEFT, and return the weights that its own merge changes."""
    config = {"r": 4, "lora_alpha": 6, "use_dora": True, "target_modules": MODULES, **changes}
    tuned = train(peft.get_peft_model(new, peft.LoraConfig(**config)))
    tuned.save_pretrained(folder / "adapter")
    tuned.double().merge_and_unload().save_pretrained(folder / "merged")
    return {
        name: weight
        for name, weight in read_tensors(folder / "merged").items()
        if not torch.equal(weight, base.dense[name].double())
    }


def stored(name: str, weight: torch.Tensor, base: Base, to: str) -> torch.Tensor:
    """Return a merged weight as OUT should have it, dense."""
    tensors = read_tensors(base.folder)
    names = quantised(tensors, base.form).get(name)
    if to == "bf16" or names is None:
        return weight
    settings = config_of(base.folder)["quantization_config"]
    old = {end: tensors[part] for end, part in names.items()}
    return base.form.read(base.form.requantise(weight.float(), old, settings), settings)


def read_dense(out: Path, form: Format) -> dict[str, torch.Tensor]:
    return dense(read_tensors(out), form, config_of(out).get("quantization_config", {}))


def read_but_ties(
    out: Path,
    read: Callable[[Path], dict[str, torch.Tensor]],
    merged: dict[str, torch.Tensor],
    right: dict[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Return the tensors of OUT, and a right number in the place of another that is as near.

    A merge in float32 may round to the neighbour where a number lies between two codes. The
    neighbour is within the bound of float32 as near to the merge in float64 as the right code.
    """
    tensors = read(out)
    for name, weight in merged.items():
        got, want, exact = (one.double() for one in (tensors[name], right[name], weight))
        is_near = (got - exact).abs() <= (want - exact).abs() + BOUND * exact.abs().max()
        tensors[name] = torch.where(is_near, want, got)
    return tensors


def loaded(out: Path, base: Base, wanted: torch.Tensor) -> torch.Tensor:
    """Check that OUT loads without a report, and return the outputs of its dense model."""
    form = base.form
    found, report = base.cls.from_pretrained(
        out, output_loading_info=True, **(form.live or form.options)
    )
    if any(report.values()):
        raise ValueError(f"transformers reports {report}")
    tensors = read_tensors(out)
    weights = quantised(tensors, form)
    if not weights:  # `float` and `dequantize` refuse a model that has a config, and no such layer
        for parameter in found.parameters():
            parameter.data = parameter.float()
        return outputs(found.eval(), input_ids=IDS)
    stored = {in_memory(name) for name in weights}
    parts = {name for names in weights.values() for name in names.values()}
    plain = {in_memory(name) for name in tensors if name not in parts and "_bias" not in name}
    declared = form.converted(base.cls, out)
    if declared != stored:
        raise ValueError(f"config.json is wrong about {sorted(declared ^ stored)}")
    if declared & plain:
        raise ValueError(f"some weights of {sorted(declared & plain)} are dense, and some are not")
    if form.live is not None:
        off = difference(outputs(found.eval(), input_ids=IDS), wanted)
        if not off <= LOOSE:
            raise ValueError(f"the outputs are off by {off:.0e} as the model is stored")
    return outputs(form.load(base.cls, out), input_ids=IDS)


def in_memory(name: str) -> str:
    """Return the module of a tensor, by its name in memory; those of experts are one module."""
    path = re.sub(r"\.experts\..*", ".experts", name).removesuffix(".weight")
    path = re.sub(
        r"^language_model\.(model\.)?", lambda m: "model.language_model." if m[1] else "", path
    )
    return re.sub(r"^(vision_tower|multi_modal_projector)", r"model.\1", path)


# Bases with a module in bfloat16, or in two files


PLAIN = "model.layers.1.self_attn.o_proj"


def with_plain(folder: Path, form: Format) -> None:
    """Store one linear layer in bfloat16, and leave it out of config.json."""
    config = config_of(folder)
    tensors = read_tensors(folder)
    whole = dense(tensors, form, config["quantization_config"])
    parts = quantised(tensors, form)[f"{PLAIN}.weight"].values()
    tensors = {name: tensor for name, tensor in tensors.items() if name not in parts}
    tensors[f"{PLAIN}.weight"] = whole[f"{PLAIN}.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def with_declared(folder: Path, form: Format) -> None:
    """Store one linear layer in bfloat16, and list it in config.json."""
    with_plain(folder, form)
    config = config_of(folder)
    settings = config["quantization_config"]
    entries = ("llm_int8_skip_modules", "modules_to_not_convert", "ignore")
    (entry,) = (name for name in entries if name in settings)
    settings[entry] = [*(settings[entry] or ["lm_head"]), PLAIN]
    (folder / "config.json").write_text(json.dumps(config))


def in_two_files(folder: Path, form: Format) -> None:
    """Store the codes in one file, and their scales in another."""
    tensors = read_tensors(folder)
    (folder / "model.safetensors").unlink()
    files: dict[str, dict[str, torch.Tensor]] = {"1-of-00002": {}, "2-of-00002": {}}
    for name, tensor in tensors.items():
        number = "1-of-00002" if name.endswith(form.ends[0]) else "2-of-00002"
        files[number][name] = tensor
    places = {}
    for number, some in files.items():
        file = f"model-0000{number}.safetensors"
        save_file(some, folder / file, {"format": "pt"})
        places |= dict.fromkeys(some, file)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


# Adapters of single experts, which PEFT does not have as DoRA


def adapted_experts(folder: Path, base: Base, new: Any, targets: str) -> dict[str, torch.Tensor]:
    """Save DoRA of the experts whose names match, and return m (W + s B A) / ‖W + s B A‖."""
    config = Config(rank=3, alpha=5.0)
    layers, merged = {}, {}
    for name, tensor in base.dense.items():
        if re.search(targets, name):
            weight = tensor.double()
            a = 0.2 * torch.randn(config.rank, weight.shape[1])
            b = 0.2 * torch.randn(len(weight), config.rank)
            m = (weight.norm(dim=1) * (1 + 0.1 * torch.randn(len(weight)))).float()
            adapter = Adapter(*(np.array(x) for x in (a, b, m)))
            path = name.removesuffix(".weight")
            layers[path] = AdaptedLayer(adapter, config, LayerKind(), tuple(weight.shape))
            v = weight + config.alpha / config.rank * b.double() @ a.double()
            merged[name] = m[:, None] * v / v.norm(dim=1, keepdim=True)
    save_adapters(folder / "adapter", layers)
    return merged


def add(
    name: str, *, bound: float = CLOSE, goals: tuple[str, ...] = ("bf16", "same"), **what: Any
) -> None:
    for to in goals:
        trial = functools.partial(trial_of, to=to, **what)
        register("Quantised", f"{name}, --targets {to}", trial, bound=bound)


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
LORA: dict[str, Any] = {"use_dora": False}
FUSED = {**LORA, "target_modules": ["q_proj"], "target_parameters": EXPERTS}
OF_LLAVA = r"model\.language_model\..*(q_proj|down_proj)"
for form in FORMATS:
    title = "Llama, whole blocks" if form == "FP8, blocks of 128" else "Llama"
    # bitsandbytes looks for the nearest code of a scale in a coarse table, and may miss it by one.
    bound = BOUND16 if form == "nf4, double" else CLOSE
    if form != "MXFP4":
        add(form, bound=bound, title=title, form=form)
for form in "nf4", "FP8, blocks of 16", "pack-quantized":
    add(f"{form}, LoRA", title="Qwen3", form=form, **LORA)
    add(f"{form}, default precision", bound=BOUND16, title="Qwen3", form=form, options=())
    add(f"{form}, all-linear", title="Llama", form=form, target_modules="all-linear")
for form in "nf4", "int8", "FP8, blocks of 16", "float-quantized, channels", "pack-quantized":
    add(f"{form}, tied", title="Llama, tied", form=form)
    add(f"{form}, in two files", title="Llama", form=form, change=in_two_files)
    add(f"{form}, an undeclared layer in bfloat16", title="Llama", form=form, change=with_plain)
    add(f"{form}, a declared layer in bfloat16", title="Llama", form=form, change=with_declared)
    add(f"{form}, images and text", title="LLaVA", form=form, target_modules=OF_LLAVA)
add("nf4, Qwen3-MoE, fused experts in bfloat16", title="Qwen3-MoE", form="nf4", **FUSED)
for form in "FP8, blocks of 16", "FP8, one scale", *OF_EXPERTS:
    add(f"{form}, Qwen3-MoE, attention", title="Qwen3-MoE", form=form, target_modules=["q_proj"])
    add(f"{form}, Qwen3-MoE, fused experts", title="Qwen3-MoE", form=form, **FUSED)
    for what, targets in {
        "experts": r"\.experts\.",
        "one of four experts": r"\.experts\.2\.",
        "the down projections of experts": r"\.experts\.\d\.down_proj",
        "experts of one layer": r"layers\.1.*\.experts\.",
    }.items():
        single = {"adapt": adapted_experts, "targets": targets}
        add(f"{form}, Qwen3-MoE, DoRA of {what}", title="Qwen3-MoE", form=form, **single)
for what, changes in {
    "attention": {"target_modules": ["q_proj", "o_proj"]},
    "attention, LoRA": {**LORA, "target_modules": ["q_proj", "o_proj"]},
    "experts and attention": FUSED,
    "gate_up_proj": {**FUSED, "target_parameters": EXPERTS[:1]},
    "down_proj": {**FUSED, "target_parameters": EXPERTS[1:]},
    "gate_up_proj of one layer": {
        **LORA, "target_modules": [], "target_parameters": ["layers.1.mlp.experts.gate_up_proj"],
    },
}.items():  # fmt: skip
    add(f"MXFP4, gpt-oss, {what}", title="gpt-oss", form="MXFP4", **changes)
add("MXFP4, gpt-oss, in two files", title="gpt-oss", form="MXFP4", change=in_two_files, **FUSED)
