"""LyCORIS: the algorithms other than DoRA of LoRA, each with and without `dora_scale`.

The right values are those of the forward, for the merge of LyCORIS 4.1.3 multiplies the change of
LoHa and of LoKr by alpha / rank twice: see `acting`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lycoris.modules.full import FullModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from safetensors.torch import load_file, save_file

from writers.lycoris_files import acting, by_kohya, image_case, llama_case, train
from writers.matrix import CLOSE, Trial, register
from writers.peft_common import randomise

WRITER = "LyCORIS, algorithms"
NAME = "lora_unet_down_0"
WEIGHT, BIAS = "down.0.weight", "down.0.bias"
LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "Linear": (functools.partial(torch.nn.Linear, 24, 18), (24,)),
    "square Linear": (functools.partial(torch.nn.Linear, 12, 12), (12,)),
    "Conv2d": (functools.partial(torch.nn.Conv2d, 12, 18, (3, 2)), (12, 5, 4)),
    "Conv2d of one pixel": (functools.partial(torch.nn.Conv2d, 12, 18, 1), (12, 5, 4)),
    "Conv2d of two groups": (functools.partial(torch.nn.Conv2d, 12, 18, 3, groups=2), (12, 5, 4)),
    "Conv1d": (functools.partial(torch.nn.Conv1d, 12, 18, 3), (12, 7)),
    "Conv3d": (functools.partial(torch.nn.Conv3d, 6, 10, (3, 2, 1)), (6, 4, 3, 2)),
}
"""A layer, and the shape of one input without the batch."""
ALGORITHMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lora": (LoConModule, {}),
    "loha": (LohaModule, {}),
    "lokr, both factors whole": (LokrModule, {"full_matrix": True}),
    "lokr, the second in factors": (LokrModule, {"rank": 2}),
    "lokr, both in factors": (LokrModule, {"rank": 1, "decompose_both": True}),
}
DECOMPOSED: dict[str, dict[str, Any]] = {
    "": {},
    ", dora_scale of outputs": {"weight_decompose": True},
    ", dora_scale of inputs": {"weight_decompose": True, "wd_on_out": False},
}
PLAIN, OUTPUTS, INPUTS = DECOMPOSED.values()


def single(
    folder: Path,
    module: Any,
    layer: str,
    rank: int = 4,
    alpha: float = 7.0,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Trial:
    """Make an adapter of one layer. The right outputs are those of the adapter's forward."""
    make, shape = LAYERS[layer]
    base = randomise(make())
    save_file({WEIGHT: base.weight.clone(), BIAS: base.bias.clone()}, folder / "base.safetensors")
    adapter = module(NAME, base, 1.0, rank, alpha, **changes)
    right = {WEIGHT: base.weight.detach().clone(), BIAS: base.bias.detach().clone()}
    adapter.apply_to()
    train(adapter)
    for parameter in adapter.parameters():
        parameter.data = parameter.data.to(dtype).float()
    state = {
        f"{NAME}.{key}": x.detach().to(dtype).contiguous()
        for key, x in adapter.custom_state_dict().items()
    }
    save_file(state, folder / "adapter.safetensors")
    if isinstance(adapter, FullModule):
        right = {WEIGHT: adapter.weight.detach(), BIAS: adapter.bias.detach()}
    else:
        right[WEIGHT] = acting(adapter)
    x = torch.randn(3, *shape, dtype=torch.float64)
    wanted = outputs(adapter, base, x)

    def load(out: Path) -> torch.Tensor:
        merged = make()
        tensors = load_file(out)
        merged.load_state_dict({"weight": tensors[WEIGHT], "bias": tensors[BIAS]})
        return merged.double()(x).detach()

    return Trial(folder / "base.safetensors", folder / "adapter.safetensors", right, load, wanted)


@torch.no_grad()
def outputs(adapter: Any, base: Any, x: torch.Tensor) -> torch.Tensor:
    """Return the output of the adapted layer, in float64."""
    adapter.double()
    base.double()
    return base(x).clone()


def cell(name: str, module: Any, layer: str, **changes: Any) -> None:
    make = functools.partial(single, module=module, layer=layer, **changes)
    register(WRITER, f"{name}, {layer}", make, bound=CLOSE)


for name, (module, changes) in ALGORITHMS.items():
    for what, options in DECOMPOSED.items():
        for layer in LAYERS:
            cell(name + what, module, layer, **changes, **options)

TUCKER: dict[str, tuple[Any, dict[str, Any]]] = {
    "lora": (LoConModule, {}),
    "loha": (LohaModule, {}),
    "lokr": (LokrModule, {"rank": 2}),
    "lokr, both in factors": (LokrModule, {"rank": 1, "decompose_both": True}),
}
for name, (module, changes) in TUCKER.items():
    for what, options in DECOMPOSED.items():
        for layer in "Conv2d", "Conv2d of two groups", "Conv1d":
            cell(f"{name}, use_tucker{what}", module, layer, use_tucker=True, **changes, **options)
for name, (module, changes) in TUCKER.items():
    for layer in "Linear", "Conv2d of one pixel":  # LyCORIS makes no core for these
        cell(f"{name}, use_tucker", module, layer, use_tucker=True, **changes)
cell("lora, use_tucker", LoConModule, "Conv3d", use_tucker=True)
cell("loha, use_tucker", LohaModule, "Conv3d", use_tucker=True)
for layer in LAYERS:
    cell("full", FullModule, layer)

CHANGES: Mapping[str, dict[str, Any]] = {
    "rs_lora": {"rs_lora": True},
    "use_scalar": {"use_scalar": True},
    "alpha=rank": {"alpha": 2.0},
    "alpha=0": {"alpha": 0},
    "alpha below 1": {"alpha": 0.5},
    "r=1": {"rank": 1},
}
for name, (module, changes) in TUCKER.items():
    for what, options in CHANGES.items():
        for layer in "Linear", "Conv2d":
            given = {"rank": 2, **changes, **options}
            cell(f"{name}, {what}", module, layer, **given)
            if what in ("rs_lora", "use_scalar"):
                cell(f"{name}, dora_scale of outputs, {what}", module, layer, **given, **OUTPUTS)
    cell(f"{name}, use_tucker and use_scalar", module, "Conv2d", use_tucker=True, use_scalar=True,
         **changes)  # fmt: skip
for name, (module, changes) in TUCKER.items():
    for dtype in torch.float16, torch.bfloat16:
        what = f"{name}, use_tucker, dora_scale of outputs, saved in {str(dtype)[6:]}"
        cell(what, module, "Conv2d", use_tucker=True, dtype=dtype, **changes, **OUTPUTS)
for factor in 2, 3, 6:
    cell(f"lokr, factor={factor}", LokrModule, "Linear", rank=2, factor=factor)
    cell(f"lokr, factor={factor}, dora_scale of inputs", LokrModule, "Conv2d", rank=2,
         factor=factor, **INPUTS)  # fmt: skip
cell("lokr, unbalanced_factorization", LokrModule, "Linear", rank=2, unbalanced_factorization=True)
cell("lokr, unbalanced_factorization", LokrModule, "Conv2d", rank=1, unbalanced_factorization=True)
cell("lokr, a large rank", LokrModule, "Linear", rank=40)  # both factors are whole, and alpha is 40
cell("lokr, both factors whole and use_scalar", LokrModule, "Linear", full_matrix=True,
     use_scalar=True)  # fmt: skip

SIMPLE = {"algo": "lora", "dora_wd": False}
NETWORKS: dict[str, dict[str, Any]] = {
    "lora": SIMPLE,
    "lora, use_tucker": {**SIMPLE, "use_tucker": True},
    "lora, use_tucker, DoRA": {"use_tucker": True},
    "lora, wd_on_output=False": {"wd_on_output": False},
    "lora, ranks of convolutions apart": {**SIMPLE, "conv_dim": 2, "conv_alpha": 1},
    "lora, train_norm": {**SIMPLE, "train_norm": True},
    "loha": {"algo": "loha", "dora_wd": False},
    "loha, use_tucker, DoRA": {"algo": "loha", "use_tucker": True},
    "lokr": {"algo": "lokr", "dora_wd": False},
    "lokr, use_tucker, DoRA": {"algo": "lokr", "use_tucker": True, "conv_dim": 1},
    "lokr, full_matrix": {"algo": "lokr", "full_matrix": True, "dora_wd": False},
    "lokr, decompose_both": {"algo": "lokr", "decompose_both": True, "factor": 4},
    "full": {"algo": "full", "dora_wd": False},
    "full, train_norm": {"algo": "full", "dora_wd": False, "train_norm": True},
    "DoRA of attention, LoRA of the others": {
        **SIMPLE, "kinds": {"Attention": {"algo": "lora", "weight_decompose": True}},
    },
    "four algorithms": {
        "kinds": {
            "BasicTransformerBlock": {"algo": "loha", "weight_decompose": False},
            "Attention": {"algo": "lokr", "dim": 2, "alpha": 3},
            "ResnetBlock2D": {"algo": "full"},
        },
    },
}  # fmt: skip
for name, changes in NETWORKS.items():
    make = functools.partial(image_case, title="UNet", **changes)
    register(f"{WRITER}, lycoris_", f"UNet, {name}", make, bound=CLOSE)
LLAMA: dict[str, dict[str, Any]] = {
    "lora": SIMPLE,
    "loha": {"algo": "loha", "dora_wd": False},
    "loha, wd_on_output=False": {"algo": "loha", "wd_on_output": False},
    "lokr": {"algo": "lokr", "dora_wd": False},
    "lokr, wd_on_output=False": {"algo": "lokr", "wd_on_output": False, "factor": 4},
    "full": {"algo": "full", "dora_wd": False},
    "loha of attention, DoRA of the others": {
        "kinds": {"LlamaAttention": {"algo": "loha", "weight_decompose": False}},
    },
}
for name, changes in LLAMA.items():
    make = functools.partial(llama_case, **changes)
    register(f"{WRITER}, lycoris_", f"Llama, {name}", make, bound=CLOSE)
for name, changes in {
    "lora": SIMPLE,
    "lora, rs_lora": {**SIMPLE, "rs_lora": True},
    "loha": {"algo": "loha", "dora_wd": False},
    "lokr, use_tucker, DoRA": {"algo": "lokr", "use_tucker": True},
    "full": {"algo": "full", "dora_wd": False},
}.items():
    for preset in "attn-mlp", "unet-convblock-only":
        make = functools.partial(by_kohya, title="UNet", place="unet", preset=preset, **changes)
        register(f"{WRITER}, for kohya's scripts", f"UNet, {name}, {preset}", make, bound=CLOSE)
    make = functools.partial(by_kohya, title="SDXL's UNet", place="", encoders=2, **changes)
    register(f"{WRITER}, for kohya's scripts", f"SDXL's pipeline, {name}", make, bound=CLOSE)
