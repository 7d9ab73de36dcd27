"""The loaders of diffusers, with a file that kohya's scripts or LyCORIS would write."""

from __future__ import annotations

import importlib
from typing import Any, ClassVar

import numpy as np
import torch

from peers.layers import as_numpy, as_torch, linear

PATH = ("down_blocks", "0", "attentions", "0", "transformer_blocks", "0", "attn1", "to_q")


def kohya(
    lora_a: np.ndarray, lora_b: np.ndarray, magnitude: np.ndarray, scaling: float, prefix: str
) -> dict[str, torch.Tensor]:
    """Return the tensors of a file with one DoRA layer, by kohya's names."""
    arrays = {
        "lora_down.weight": as_torch(lora_a),
        "lora_up.weight": as_torch(lora_b),
        "alpha": torch.tensor(float(scaling * len(lora_a))),
        "dora_scale": as_torch(magnitude[:, None]),
    }
    return {f"{prefix}.{name}": tensor for name, tensor in arrays.items()}


class Diffusers:
    """The merge of an adapter that a pipeline's loader has read.

    The names of the model are those of Stable Diffusion's U-Net, and it has one layer.
    """

    def __init__(self, *, pipeline: bool) -> None:
        self.pipeline = pipeline

    def read(self, state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], Any]:
        """Return the tensors and alphas that the loader or its conversion makes of a file."""
        loaders = importlib.import_module("diffusers.loaders.lora_pipeline")
        if self.pipeline:
            return loaders.StableDiffusionLoraLoaderMixin.lora_state_dict(state)
        conversion = importlib.import_module("diffusers.loaders.lora_conversion_utils")
        return conversion._convert_non_diffusers_lora_to_diffusers(state)

    def merge(
        self, weight: np.ndarray, lora_a: Any, lora_b: Any, magnitude: Any, scaling: float
    ) -> np.ndarray:
        state = kohya(lora_a, lora_b, magnitude, scaling, f"lora_unet_{'_'.join(PATH)}")
        read, alphas = self.read(state)
        return merged_with(weight, read, prefix="unet", network_alphas=alphas)


class DiffusersPeft:
    """The merge of an adapter whose file has PEFT's names and shapes."""

    def merge(
        self, weight: np.ndarray, lora_a: Any, lora_b: Any, magnitude: Any, scaling: float
    ) -> np.ndarray:
        loaders = importlib.import_module("diffusers.loaders.lora_pipeline")
        place = ".".join(PATH)
        state = {
            f"unet.{place}.lora_A.weight": as_torch(lora_a),
            f"unet.{place}.lora_B.weight": as_torch(lora_b * lora_b.dtype.type(scaling)),
            f"unet.{place}.lora_magnitude_vector.weight": as_torch(magnitude),
        }
        read, _ = loaders.StableDiffusionLoraLoaderMixin.lora_state_dict(state)
        return merged_with(weight, read, prefix="unet")


def read_by_every_loader() -> dict[str, list[str]]:
    """Return the keys that each loader keeps of a layer by the names of diffusers."""
    loaders = importlib.import_module("diffusers.loaders.lora_pipeline")
    shapes = {"lora_A.weight": (2, 3), "lora_B.weight": (4, 2), "dora_scale": (4, 1)}
    found = {}
    for name, loader in vars(loaders).items():
        if name.endswith("LoraLoaderMixin"):
            state = {f"transformer.to_q.{key}": torch.ones(shape) for key, shape in shapes.items()}
            read = loader.lora_state_dict(state)
            found[name] = list(read[0] if isinstance(read, tuple) else read)
    return found


def merged_with(weight: np.ndarray, read: dict[str, torch.Tensor], **options: Any) -> np.ndarray:
    """Return the weight of the model after an adapter is loaded and merged."""
    model = unet(weight)
    model.load_lora_adapter(read, **options)
    (layer,) = (module for module in model.modules() if hasattr(module, "lora_A"))
    layer.merge()
    return as_numpy(layer.base_layer.weight, weight)


def unet(weight: np.ndarray) -> Any:
    """Return a model with one linear layer, at a place of Stable Diffusion's U-Net."""
    loaders = importlib.import_module("diffusers.loaders")

    class Model(torch.nn.Module, loaders.PeftAdapterMixin):
        """A model that diffusers can load an adapter into."""

        config: ClassVar[dict[str, Any]] = {}

    model: Any = Model()
    parent = model
    *path, last = PATH
    for name in path:
        parent.add_module(name, torch.nn.Module())
        parent = getattr(parent, name)
    parent.add_module(last, linear(weight, None))
    return model
