"""`doraxp convert --base`: the package whose format was written loads the adapter and merges it."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import peft
import transformers
from mlx.utils import tree_unflatten
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model, save_model

from writers.diffusers_peft import FILE, LAYERS, by_peft, fuse, trial_of
from writers.lycoris_files import image_case, llama_case
from writers.matrix import Tensors, Trial, read_tensors, register
from writers.mlx_models import MODELS, mlx_trial
from writers.peft_common import peft_trial, text_model

WRITER = "doraxp convert"
llama = functools.partial(text_model, "LlamaForCausalLM", head_dim=8)


def base_model(folder: Path) -> Any:
    """Load a model by the class that its config.json names."""
    config = json.loads((folder / "config.json").read_text())
    if "_class_name" in config:
        return getattr(diffusers, config["_class_name"]).from_pretrained(folder)
    return getattr(transformers, config["architectures"][0]).from_pretrained(folder)


def read_peft(out: Path, base: Path) -> Tensors:
    tuned = peft.PeftModel.from_pretrained(base_model(base), out)
    tuned.merge_and_unload().save_pretrained(out / "merged")
    return read_tensors(out / "merged")


def read_diffusers(out: Path, base: Path) -> Tensors:
    model = base_model(base)
    model.load_lora_adapter(str(out), prefix=None, weight_name=FILE)
    fuse(model, out / "merged")
    return read_tensors(out / "merged")


def read_mlx(out: Path, base: Path) -> Tensors:
    model, _ = load_model(base)
    load_adapters(model, str(out))
    fused = [(name, m.fuse()) for name, m in model.named_modules() if hasattr(m, "fuse")]
    model.update_modules(tree_unflatten(fused))
    save_model(out / "merged", model)
    return read_tensors(out / "merged")


READERS = {"peft": read_peft, "diffusers": read_diffusers, "mlx": read_mlx}


def conversion(folder: Path, make: Callable[[Path], Trial], to: str) -> Trial:
    """Return the trial of a merge as one of a conversion."""
    trial = make(folder)
    read = functools.partial(READERS[to], base=trial.base)
    return trial._replace(to=to, read=read, outputs=None)


def of_peft(**changes: Any) -> Callable[[Path], Trial]:
    changes = {"target_modules": ["q_proj", "v_proj"], **changes}
    return functools.partial(peft_trial, make=llama, **changes)


FLUX, UNET = ({"title": title, "targets": LAYERS[title]} for title in ("Flux", "UNet"))
SOURCES: dict[str, tuple[Callable[[Path], Trial], tuple[str, ...]]] = {
    "PEFT, Llama": (of_peft(), ("peft", "mlx")),
    "PEFT, Llama, modules_to_save": (of_peft(modules_to_save=["lm_head"]), ("peft",)),
    "PEFT, Llama, rank_pattern": (of_peft(rank_pattern={"v_proj": 2}), ("peft",)),
    "mlx-lm, Llama": (functools.partial(mlx_trial, model=MODELS["Llama"]), ("mlx",)),
    "LyCORIS, Llama": (llama_case, ("peft", "mlx")),
    "LyCORIS, UNet": (functools.partial(image_case, title="UNet"), ("peft", "diffusers")),
    "PEFT, Flux": (functools.partial(by_peft, **FLUX), ("peft", "diffusers")),
    "diffusers, Flux": (functools.partial(trial_of, **FLUX), ("peft", "diffusers")),
    "diffusers, UNet": (functools.partial(trial_of, **UNET), ("peft", "diffusers")),
}

for source, (make, formats) in SOURCES.items():
    for to in formats:
        register(WRITER, f"{source} to {to}", functools.partial(conversion, make=make, to=to))
