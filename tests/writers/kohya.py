"""Single files with the names of kohya's scripts, ComfyUI and OneTrainer.

The registry does not have these writers. So the files are made here, and the right values are those
of the formula, m (W + s B A) / ‖W + s B A‖ by rows, in float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from writers import original_names as names
from writers.images import image_model, t5_encoder, text_encoder
from writers.matrix import CLOSE, Trial, read_tensors, register

RANK, ALPHA = 4, 6.0
Tensors = dict[str, torch.Tensor]
Modules = Mapping[str, list[str]]
KOHYA = ("lora_down.weight", "lora_up.weight", "dora_scale")
PEFT = ("lora_A.weight", "lora_B.weight", "dora_scale")
VECTOR = ("lora_down.weight", "lora_up.weight", "lora_magnitude_vector")
PLAIN = KOHYA[:2]
PLAIN_PEFT = PEFT[:2]
CORE = (*PLAIN, "lora_mid.weight")
"""The leaves of plain LoRA. With a core, those of convolutions: down, up and mid."""


def underscored(prefix: str) -> Callable[[str], str]:
    return lambda name: f"{prefix}_{name.replace('.', '_')}"


def dotted(prefix: str) -> Callable[[str], str]:
    return lambda name: f"{prefix}.{name}"


def swap(matrix: torch.Tensor, name: str, stems: list[str]) -> torch.Tensor:
    """Exchange the halves of the rows where diffusers has them in the other order."""
    if name not in names.SWAPPED or stems[0].endswith(name):
        return matrix
    return torch.cat(matrix.chunk(2)[::-1])


def adapt(
    base: Tensors,
    modules: Modules,
    key: Callable[[str], str],
    leaves: tuple[str, ...],
    alpha: object,
    without: Collection[str] = (),
) -> tuple[Tensors, Tensors]:
    """Return the adapter's tensors, and the tensors of the base that they change, merged.

    `modules` has the tensors in the base of each module that the adapter names. An adapter has no
    magnitudes where `leaves` has none, and for the modules `without`: they are W + s B A.
    """
    adapter: Tensors = {}
    merged: Tensors = {}
    for name, stems in modules.items():
        whole = swap(torch.cat([base[f"{stem}.weight"] for stem in stems]), name, stems).double()
        ones = [1] * (whole.ndim - 1)
        core = leaves == CORE and whole.ndim > 2 and max(whole.shape[2:]) > 1
        kernel = ones[1:] if core else whole.shape[2:]
        a = 0.2 * torch.randn(RANK, whole.shape[1], *kernel, dtype=torch.float64)
        b = 0.2 * torch.randn(len(whole), RANK, *ones[1:], dtype=torch.float64)
        own = dict(zip(leaves, (a, b), strict=False))
        if core:
            own[leaves[2]] = mid = torch.randn(RANK, RANK, *whole.shape[2:], dtype=torch.float64)
            a = torch.einsum("ij...,jr->ir...", mid, a.flatten(1))
        scale = 1.0 if alpha is None else float(alpha) / RANK
        v = whole.flatten(1) + scale * b.flatten(1) @ a.flatten(1)
        if leaves not in (PLAIN, PLAIN_PEFT, CORE) and key(name) not in without:
            norms = whole.flatten(1).norm(dim=1)
            m = norms * (1 + 0.1 * torch.randn(len(whole), dtype=torch.float64))
            v = m[:, None] * v / v.norm(dim=1, keepdim=True)
            own[leaves[2]] = m if leaves[2] == "lora_magnitude_vector" else m.reshape(-1, *ones)
        new = swap(v.reshape(whole.shape), name, stems)
        for leaf, tensor in own.items():
            adapter[f"{key(name)}.{leaf}"] = tensor.float().contiguous()
        if alpha is not None:
            adapter[f"{key(name)}.alpha"] = torch.tensor(alpha)
        rows = new.float().split([len(base[f"{stem}.weight"]) for stem in stems])
        merged |= {f"{stem}.weight": x.clone() for stem, x in zip(stems, rows, strict=True)}
    return adapter, merged


def on_diffusers(
    folder: Path,
    title: str,
    modules: Modules,
    key: Callable[[str], str],
    leaves: tuple[str, ...] = KOHYA,
    alpha: object = ALPHA,
    without: Collection[str] = (),
) -> Trial:
    """Make an adapter of original names for a model that diffusers saved."""
    model = text_encoder() if title == "text encoder" else image_model(title)
    model.save_pretrained(folder / "base")
    base = read_tensors(folder / "base")
    adapter, merged = adapt(base, modules, key, leaves, alpha, without)
    save_file(adapter, folder / "adapter.safetensors")
    return Trial(folder / "base", folder / "adapter.safetensors", base | merged)


def original(base: Tensors, modules: Modules, prefix: str) -> Tensors:
    """Return the tensors under the original names."""
    return {
        f"{prefix}{name}.weight": swap(
            torch.cat([base[f"{stem}.weight"] for stem in stems]), name, stems
        )
        for name, stems in modules.items()
    }


def on_original(
    folder: Path,
    title: str,
    modules: Modules,
    key: Callable[[str], str],
    prefix: str = "",
    leaves: tuple[str, ...] = KOHYA,
    alpha: object = ALPHA,
) -> Trial:
    """Make an adapter for a file of the original layout, with other parts of a pipeline in it."""
    base = original(image_model(title).state_dict(), modules, prefix)
    if prefix:
        base["first_stage_model.encoder.conv_in.weight"] = torch.randn(8, 3, 3, 3)
    stems = {name: [prefix + name] for name in modules}
    return save(folder, base, *adapt(base, stems, key, leaves, alpha))


def save(folder: Path, base: Tensors, adapter: Tensors, merged: Tensors) -> Trial:
    save_file({name: x.clone() for name, x in base.items()}, folder / "base.safetensors")
    save_file(adapter, folder / "adapter.safetensors")
    right = load_file(folder / "base.safetensors") | merged
    return Trial(folder / "base.safetensors", folder / "adapter.safetensors", right)


UNET = underscored("lora_unet")
WHOLE = "model.diffusion_model."
PLACES: dict[str, tuple[str, dict[str, list[str]]]] = {
    "SDXL": ("SDXL's UNet", names.SDXL),
    "Flux": ("Flux", names.FLUX),
    "Flux's final layer": ("Flux", names.FLUX_FINAL),
    "SD3": ("SD3", names.SD3),
    "SD3's final layer": ("SD3", names.SD3_FINAL),
    "SD3's last context block": ("SD3", names.SD3_LAST_CONTEXT),
}
WAYS: dict[str, tuple[Callable[[str], str], tuple[str, ...]]] = {
    "lora_unet_": (UNET, KOHYA),
    "diffusion_model., lora_A": (dotted("diffusion_model"), PEFT),
}

for place, (title, modules) in PLACES.items():
    given = {"title": title, "modules": modules}
    for way, (key, leaves) in WAYS.items():
        for layout, make, where in (
            ("diffusers' folder", on_diffusers, {}),
            ("a file of the original names", on_original, {}),
            ("a whole checkpoint", on_original, {"prefix": WHOLE}),
        ):
            trial = functools.partial(make, key=key, leaves=leaves, **given, **where)
            register("kohya, original names", f"{place}: {way} on {layout}", trial)

FLUX_MODULES = {name: [name] for stems in names.FLUX.values() for name in stems}
FORMS: dict[str, tuple[Callable[[str], str], tuple[str, ...], object]] = {
    "lora_transformer_ (OneTrainer)": (underscored("lora_transformer"), KOHYA, ALPHA),
    "lora_unet_": (UNET, KOHYA, ALPHA),
    "transformer., lora_down": (dotted("transformer"), KOHYA, ALPHA),
    "transformer., lora_A and dora_scale": (dotted("transformer"), PEFT, ALPHA),
    "diffusion_model., lora_A and dora_scale": (dotted("diffusion_model"), PEFT, ALPHA),
    "lora_down and lora_magnitude_vector": (UNET, VECTOR, ALPHA),
    "int64 alpha": (UNET, KOHYA, 6),
    "without alpha": (UNET, KOHYA, None),
}
for form, (key, leaves, alpha) in FORMS.items():
    trial = functools.partial(
        on_diffusers, title="Flux", modules=FLUX_MODULES, key=key, leaves=leaves, alpha=alpha
    )
    register("kohya, forms of the file", f"{form}, Flux of diffusers", trial)

CLIP = [
    *[f"encoder.layers.0.self_attn.{x}" for x in ("q_proj", "k_proj", "v_proj", "out_proj")],
    "encoder.layers.1.mlp.fc1",
    "encoder.layers.1.mlp.fc2",
]


def on_text_encoder(folder: Path, prefix: str, published: bool, long: bool) -> Trial:
    """Make an adapter of a text encoder, in the names of each version of transformers."""
    base = {
        ("text_model." if published else "") + name: x
        for name, x in text_encoder().state_dict().items()
    }
    place, part = ("text_model." * published, "text_model." * long)
    modules = {part + name: [place + name] for name in CLIP}
    return save(folder, base, *adapt(base, modules, underscored(prefix), KOHYA, ALPHA))


for prefix in "lora_te", "lora_te1":
    for published in True, False:
        for long in True, False:
            base, adapter = ("text_model.encoder" if x else "encoder" for x in (published, long))
            trial = functools.partial(
                on_text_encoder, prefix=prefix, published=published, long=long
            )
            register("kohya, text encoders", f"{prefix}_ of {adapter} on {base}", trial)


def with_encoders(folder: Path, places: Mapping[str, str], *, unet: bool) -> Trial:
    """Make an adapter with parts for text encoders, and a whole checkpoint that has them."""
    base = original(image_model("SDXL's UNet").state_dict(), names.SDXL, WHOLE)
    adapter: Tensors = {}
    merged: Tensors = {}
    if unet:
        stems = {name: [WHOLE + name] for name in names.SDXL}
        adapter, merged = adapt(base, stems, UNET, KOHYA, ALPHA)
    for prefix, place in places.items():
        base |= {place + name: x for name, x in text_encoder().state_dict().items()}
        modules = {f"text_model.{name}": [place + name] for name in CLIP}
        more, changed = adapt(base, modules, underscored(prefix), KOHYA, ALPHA)
        adapter, merged = adapter | more, merged | changed
    return save(folder, base, adapter, merged)


def on_t5(folder: Path, prefix: str) -> Trial:
    """Make an adapter of T5, the second text encoder of Flux and the third of SD3."""
    base = {name: x.clone() for name, x in t5_encoder().state_dict().items()}
    part = "encoder.block.0.layer"
    modules = {
        f"{part}.{name}": [f"{part}.{name}"]
        for name in ("0.SelfAttention.q", "0.SelfAttention.o", "1.DenseReluDense.wi")
    }
    return save(folder, base, *adapt(base, modules, underscored(prefix), KOHYA, ALPHA))


for prefix in "lora_te2", "lora_te3":
    trial = functools.partial(on_t5, prefix=prefix)
    register("kohya, text encoders", f"{prefix}_ of T5", trial)

OPEN_CLIP = {
    "self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
}  # fmt: skip


def with_open_clip(folder: Path) -> Trial:
    """Make an adapter of SDXL's second text encoder; a checkpoint has its q, k and v in one."""
    state = text_encoder().state_dict()
    ours = "encoder.layers.0."
    theirs = "conditioner.embedders.1.model.transformer.resblocks.0."
    qkv = [f"{ours}self_attn.{x}_proj" for x in "qkv"]
    stems = [*qkv, *(ours + name for name in OPEN_CLIP)]
    adapter, merged = adapt(
        state,
        {f"text_model.{stem}": [stem] for stem in stems},
        underscored("lora_te2"),
        KOHYA,
        ALPHA,
    )

    def published(tensors: Tensors) -> Tensors:
        fused = torch.cat([tensors[f"{stem}.weight"] for stem in qkv])
        others = {
            f"{theirs}{new}.weight": tensors[f"{ours}{old}.weight"]
            for old, new in OPEN_CLIP.items()
        }
        return {f"{theirs}attn.in_proj_weight": fused, **others}

    return save(folder, published(state), adapter, published(merged))


FIRST, OLD = (
    "conditioner.embedders.0.transformer.text_model.",
    "cond_stage_model.transformer.text_model.",
)
register(
    "kohya, text encoders",
    "lora_unet_ and lora_te1_ on a whole checkpoint of SDXL",
    functools.partial(with_encoders, places={"lora_te1": FIRST}, unet=True),
)
register(
    "kohya, text encoders",
    "lora_unet_ and lora_te_ on a whole checkpoint of SD 1.5",
    functools.partial(with_encoders, places={"lora_te": OLD}, unet=True),
)
register(
    "kohya, text encoders",
    "lora_te1_ alone on a whole checkpoint of SDXL",
    functools.partial(with_encoders, places={"lora_te1": FIRST}, unet=False),
)
register("kohya, text encoders", "lora_te2_ on a whole checkpoint of SDXL", with_open_clip)

for place, (title, modules) in PLACES.items():
    given = {"title": title, "modules": modules}
    for way, (key, _) in WAYS.items():
        leaves = PLAIN if key is UNET else PLAIN_PEFT
        for layout, make, where in (
            ("diffusers' folder", on_diffusers, {}),
            ("a whole checkpoint", on_original, {"prefix": WHOLE}),
        ):
            trial = functools.partial(make, key=key, leaves=leaves, **given, **where)
            register("kohya, LoRA", f"{place}: {way} on {layout}", trial, bound=CLOSE)
for form, (key, leaves, alpha) in {
    "lora_transformer_ (OneTrainer)": (underscored("lora_transformer"), PLAIN, ALPHA),
    "transformer., lora_A": (dotted("transformer"), PLAIN_PEFT, ALPHA),
    "diffusion_model., lora_A, without alpha": (dotted("diffusion_model"), PLAIN_PEFT, None),
    "int64 alpha": (UNET, PLAIN, 6),
    "without alpha": (UNET, PLAIN, None),
}.items():
    trial = functools.partial(
        on_diffusers, title="Flux", modules=FLUX_MODULES, key=key, leaves=leaves, alpha=alpha
    )
    register("kohya, LoRA", f"{form}, Flux of diffusers", trial, bound=CLOSE)
for layout, make, where in (
    ("diffusers' folder", on_diffusers, {}),
    ("a whole checkpoint", on_original, {"prefix": WHOLE}),
):
    trial = functools.partial(
        make, title="SDXL's UNet", modules=names.SDXL, key=UNET, leaves=CORE, **where
    )
    register("kohya, LoRA", f"SDXL: lora_mid on {layout}", trial, bound=CLOSE)
some = [underscored("lora_unet")(name) for name in list(names.SDXL)[::2]]
register(
    "kohya, LoRA",
    "SDXL: dora_scale of every other module",
    functools.partial(
        on_diffusers, title="SDXL's UNet", modules=names.SDXL, key=UNET, without=some
    ),
)
