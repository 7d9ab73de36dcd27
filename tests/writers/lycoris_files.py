"""LyCORIS: single layers, and networks of its own names and of kohya's."""

from __future__ import annotations

import functools
import json
import logging
from pathlib import Path
from typing import Any

import lycoris
import torch
from lycoris.kohya import create_network
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from safetensors.torch import save_file

from writers.images import image_model, image_outputs, text_encoder, text_outputs
from writers.matrix import Trial, read_tensors, register
from writers.peft_common import outputs, randomise, reload, text_model

logging.getLogger("LyCORIS").setLevel(logging.ERROR)
LINEAR = ("Linear", (20, 12))
CONV1D = ("Conv1d", (6, 8, 3))
CONV2D = ("Conv2d", (6, 8, (3, 2)))
CONV3D = ("Conv3d", (6, 8, (3, 2, 1)))
GROUPED = ("Conv2d", (6, 8, 3, 1, 0, 1, 2))
POINT = ("Conv2d", (6, 8, 1))
LAYERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "Linear": (LINEAR, {}),
    "Linear, wd_on_out=False": (LINEAR, {"wd_on_out": False}),
    "Linear, rs_lora": (LINEAR, {"rs_lora": True}),
    "Linear, use_scalar": (LINEAR, {"use_scalar": True}),
    "Linear, alpha=0": (LINEAR, {"alpha": 0}),
    "Linear, square, wd_on_out=False": (("Linear", (12, 12)), {"wd_on_out": False}),
    "Conv1d": (CONV1D, {}),
    "Conv2d": (CONV2D, {}),
    "Conv2d of one pixel": (POINT, {}),
    "Conv2d, dilated and with a stride": (("Conv2d", (6, 8, 3, 2, 1, 2)), {}),
    "Conv2d of two groups": (GROUPED, {}),
    "Conv3d": (CONV3D, {}),
}


@torch.no_grad()
def train(module: Any) -> Any:
    """Change the factors, and the magnitudes by a tenth."""
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape)
        if name.endswith("dora_scale"):
            parameter.mul_(1 + 0.1 * noise)
        elif not name.endswith("scalar"):
            parameter.add_(0.2 * noise)
        else:
            parameter.fill_(0.7)
    return module.eval()


@torch.no_grad()
def acting(adapter: Any) -> torch.Tensor:
    """Return the weight with which the adapter's forward computes.

    The merge of LyCORIS 4.1.3 is another where alpha is not the rank: it multiplies the change of
    LoHa and of LoKr by alpha / rank twice.
    """
    if not isinstance(adapter, LohaModule | LokrModule):
        return adapter.get_merged_weight()[0].clone()
    weight = adapter.org_weight + adapter.get_weight(adapter.shape) * adapter.scalar
    return adapter.apply_weight_decompose(weight) if adapter.wd else weight


@torch.no_grad()
def merge(adapters: Any) -> None:
    """Merge the adapters of a network into its layers."""
    for adapter in adapters:
        if isinstance(adapter, LohaModule | LokrModule):
            adapter.org_module[0].weight.copy_(acting(adapter))
        else:
            adapter.merge_to(1.0)


def single(folder: Path, layer: tuple[str, Any], alpha: float = 7.0, **changes: Any) -> Trial:
    """Make an adapter of one layer, and merge it by LyCORIS."""
    base = randomise(getattr(torch.nn, layer[0])(*layer[1]))
    name = "lora_unet_down_0"
    adapter = train(LoConModule(name, base, 1.0, 4, alpha, weight_decompose=True, **changes))
    state = {key: x.detach().contiguous() for key, x in adapter.custom_state_dict().items()}
    save_file({f"{name}.{key}": x for key, x in state.items()}, folder / "adapter.safetensors")
    save_file({"down.0.weight": base.weight.detach()}, folder / "base.safetensors")
    merged, _ = adapter.get_merged_weight()
    right = {"down.0.weight": merged.detach()}
    return Trial(folder / "base.safetensors", folder / "adapter.safetensors", right)


for name, (layer, changes) in LAYERS.items():
    register("LyCORIS", name, functools.partial(single, layer=layer, **changes))

BLOCKS = ["Transformer2DModel", "ResnetBlock2D", "FluxTransformerBlock", "LlamaDecoderLayer"]
OPTIONS = {"algo": "lora", "dora_wd": True, "warn_on_unmatched": False}


def whole(
    folder: Path,
    make: Any,
    load: Any,
    run: Any,
    kinds: dict[str, Any] | None = None,
    **changes: Any,
) -> Trial:
    """Adapt a model by `create_lycoris`, whose prefix is `lycoris_`.

    `kinds` has the algorithm, and other options, of each class of modules that has its own.
    """
    model = make()
    model.save_pretrained(folder / "base")
    preset = {"target_module": BLOCKS, "module_algo_map": kinds or {}}
    lycoris.LycorisNetwork.apply_preset(preset)
    network = train(lycoris.create_lycoris(model, 1.0, 4, 6, **{**OPTIONS, **changes}))
    network.apply_to()
    train(network)
    wanted = run(model)
    network.save_weights(str(folder / "adapter.safetensors"), None, {})
    network.restore()
    merge(network.loras)
    model.save_pretrained(folder / "right")
    right = read_tensors(folder / "right")
    adapter = folder / "adapter.safetensors"
    return Trial(folder / "base", adapter, right, lambda out: run(load(out)), wanted)


def image_case(folder: Path, title: str, **changes: Any) -> Trial:
    make = functools.partial(image_model, title)
    load = type(make()).from_pretrained
    run = functools.partial(image_outputs, title=title)
    return whole(folder, make, lambda out: load(out).eval(), run, **changes)


def llama_case(folder: Path, **changes: Any) -> Trial:
    make = functools.partial(text_model, "LlamaForCausalLM", head_dim=8)
    return whole(folder, make, reload, outputs, **changes)


for name, make in {
    "UNet": functools.partial(image_case, title="UNet"),
    "UNet, ranks of convolutions apart": functools.partial(
        image_case, title="UNet", conv_dim=2, conv_alpha=1
    ),
    "UNet, train_norm": functools.partial(image_case, title="UNet", train_norm=True),
    "SDXL's UNet": functools.partial(image_case, title="SDXL's UNet"),
    "Flux": functools.partial(image_case, title="Flux"),
    "Llama": llama_case,
    "Llama, wd_on_output=False": functools.partial(llama_case, wd_on_output=False),
}.items():
    register("LyCORIS, lycoris_", name, make)


def by_kohya(
    folder: Path,
    title: str,
    place: str,
    encoders: int = 0,
    preset: str = "attn-mlp",
    **changes: Any,
) -> Trial:
    """Adapt a UNet, and text encoders, by the network for kohya's scripts.

    `place` is the part of a pipeline's folder that is BASE: `unet`, `text_encoder`, or all of it.
    """
    parts = {"unet": image_model(title)}
    names = ["text_encoder", "text_encoder_2"][:encoders]
    parts |= {name: text_encoder(16 + 8 * number) for number, name in enumerate(names)}
    for name, model in parts.items():
        model.save_pretrained(folder / "base" / name)
    kinds = {"unet": "UNet2DConditionModel"} | dict.fromkeys(names, "CLIPTextModel")
    write_index(folder / "base", kinds)
    texts = [parts[name] for name in names]
    texts = texts[0] if len(texts) == 1 else texts
    options = {"preset": preset, **OPTIONS, **changes}
    network = create_network(1.0, 4, 6, None, texts, parts["unet"], **options)
    network.apply_to(texts, parts["unet"], bool(encoders), True)
    train(network)
    wanted = run_parts(parts, title, place)
    network.save_weights(str(folder / "adapter.safetensors"), None, {})
    network.restore()
    merge(network.loras)
    for name, model in parts.items():
        model.save_pretrained(folder / "right" / name)
    right = read_tensors(folder / "right" / place)

    def load(out: Path) -> torch.Tensor:
        root = out if not place else None
        loaded = {
            name: type(model).from_pretrained(root / name if root else out).eval()
            for name, model in parts.items()
            if place in ("", name)
        }
        return run_parts(loaded, title, place)

    return Trial(folder / "base" / place, folder / "adapter.safetensors", right, load, wanted)


def write_index(folder: Path, kinds: dict[str, str]) -> None:
    """Write model_index.json, by which a folder is a pipeline."""
    entries = {
        name: ["diffusers" if name == "unet" else "transformers", kind]
        for name, kind in kinds.items()
    }
    (folder / "model_index.json").write_text(json.dumps(entries))


def run_parts(parts: dict[str, Any], title: str, place: str) -> torch.Tensor:
    """Return the outputs of all parts that are in `place`."""
    results = [
        image_outputs(model, title) if name == "unet" else text_outputs(model)
        for name, model in parts.items()
        if place in ("", name)
    ]
    return torch.cat([result.flatten() for result in results])


for name, make in {
    "lora_unet_ on a UNet": ("UNet", "unet", 0),
    "lora_unet_ on SDXL's UNet": ("SDXL's UNet", "unet", 0),
    "lora_unet_ and lora_te_ on a UNet": ("UNet", "unet", 1),
    "lora_unet_ and lora_te_ on a text encoder": ("UNet", "text_encoder", 1),
    "lora_unet_ and lora_te_ on a pipeline": ("UNet", "", 1),
    "lora_unet_, lora_te1_ and lora_te2_ on SDXL's UNet": ("SDXL's UNet", "unet", 2),
    "lora_unet_, lora_te1_ and lora_te2_ on the first text encoder": (
        "SDXL's UNet", "text_encoder", 2,
    ),
    "lora_unet_, lora_te1_ and lora_te2_ on the second text encoder": (
        "SDXL's UNet", "text_encoder_2", 2,
    ),
    "lora_unet_, lora_te1_ and lora_te2_ on a pipeline": ("SDXL's UNet", "", 2),
}.items():  # fmt: skip
    title, place, encoders = make
    trial = functools.partial(by_kohya, title=title, place=place, encoders=encoders)
    register("LyCORIS for kohya's scripts", name, trial)
register(
    "LyCORIS for kohya's scripts",
    "lora_unet_ on a UNet, convolutions",
    functools.partial(by_kohya, title="UNet", place="unet", preset="unet-convblock-only"),
)
