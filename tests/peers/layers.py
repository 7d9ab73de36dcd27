"""Linear layers of PEFT, torchtune, LyCORIS and mlx-lm, and the parts that other peers share.

layer(weight, bias, ...)    their layer
parameters(layer)           its trained parameters, by this project's names
drop(layer, dropout)        replaces its dropout by a module
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch

Arrays = dict[str, Any]


def as_torch(array: np.ndarray) -> torch.Tensor:
    """Return an array as a tensor. PyTorch cannot read bfloat16 from NumPy."""
    if array.dtype.name != "bfloat16":
        return torch.tensor(array)
    return torch.tensor(array.astype("float32")).to(torch.bfloat16)


def as_numpy(tensor: torch.Tensor, like: np.ndarray) -> np.ndarray:
    """Return a tensor as an array in the dtype of `like`, which is that of the tensor."""
    tensor = tensor.detach()
    return (tensor.float() if tensor.element_size() == 2 else tensor).numpy().astype(like.dtype)


def linear(weight: np.ndarray, bias: np.ndarray | None) -> torch.nn.Linear:
    layer = torch.nn.Linear(*reversed(weight.shape), bias=bias is not None)
    layer.weight.data = as_torch(weight)
    if bias is not None:
        layer.bias.data = as_torch(bias)
    return layer


class Given(torch.nn.Module):
    """A dropout with a fixed mask."""

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.mask


class Peer:
    """The functions that are the same for every layer of PyTorch."""

    def run(
        self, x: np.ndarray, dropout_mask: np.ndarray | None = None, **arrays: Any
    ) -> tuple[Any, torch.Tensor, torch.Tensor]:
        layer, leaf = self.filled(**arrays), as_torch(x).requires_grad_()
        if dropout_mask is not None:
            self.drop(layer, Given(as_torch(dropout_mask)))
        return layer, leaf, layer(leaf)

    def filled(self, lora_a: Any, lora_b: Any, magnitude: Any, **others: Any) -> Any:
        layer = self.layer(rank=len(lora_a), **others)
        given = {"lora_a": lora_a, "lora_b": lora_b, "magnitude": magnitude}
        for name, parameter in self.parameters(layer).items():
            parameter.data = as_torch(given[name]).reshape(parameter.shape)
        return layer

    def forward(self, x: np.ndarray, **arrays: Any) -> np.ndarray:
        return as_numpy(self.run(x, **arrays)[2], x)

    def gradients(self, dy: np.ndarray, x: np.ndarray, **arrays: Any) -> Arrays:
        layer, leaf, y = self.run(x, **arrays)
        y.backward(as_torch(dy))
        found = {
            name: parameter.grad.numpy().reshape(arrays[name].shape)
            for name, parameter in self.parameters(layer).items()
        }
        return {"x": as_numpy(leaf.grad, x), **found}


class Peft(Peer):
    """PEFT's linear layer."""

    def layer(
        self, weight: Any, bias: Any, scaling: float, rank: int, autocast: bool = False
    ) -> Any:
        peft = importlib.import_module("peft")
        config = peft.LoraConfig(
            r=rank, lora_alpha=scaling * rank, target_modules=["0"], use_dora=True
        )
        base = torch.nn.Sequential(linear(weight, bias))
        model = peft.get_peft_model(base, config, autocast_adapter_dtype=autocast)
        return model.base_model.model[0]

    def parameters(self, layer: Any) -> Arrays:
        return {
            "lora_a": layer.lora_A["default"].weight,
            "lora_b": layer.lora_B["default"].weight,
            "magnitude": layer.lora_magnitude_vector["default"].weight,
        }

    def drop(self, layer: Any, dropout: torch.nn.Module) -> None:
        layer.lora_dropout["default"] = dropout
        layer.train()

    def init(self, weight: np.ndarray) -> np.ndarray:
        layer = self.layer(weight, None, 1.0, 1, autocast=True)  # PEFT's default
        return self.parameters(layer)["magnitude"].detach().numpy()

    def merge(self, **arrays: Any) -> np.ndarray:
        return self.merge_of(self.filled(bias=None, **arrays), arrays["weight"])

    def merge_of(self, layer: Any, weight: np.ndarray) -> np.ndarray:
        layer.merge()
        return as_numpy(layer.base_layer.weight, weight)


class Torchtune(Peer):
    """torchtune's linear layer, and the merge of its checkpoints."""

    def layer(self, weight: Any, bias: Any, scaling: float, rank: int) -> Any:
        modules = importlib.import_module("torchtune.modules.peft")
        out, inner = weight.shape
        layer = modules.DoRALinear(inner, out, rank, scaling * rank, use_bias=bias is not None)
        base = linear(weight, bias)
        layer.weight, layer.bias = base.weight, base.bias
        return layer

    def parameters(self, layer: Any) -> Arrays:
        return {
            "lora_a": layer.lora_a.weight,
            "lora_b": layer.lora_b.weight,
            "magnitude": layer.magnitude,
        }

    def drop(self, layer: Any, dropout: torch.nn.Module) -> None:
        layer.dropout = dropout

    def init(self, weight: np.ndarray) -> np.ndarray:
        zeros = np.zeros((1, weight.shape[1])), np.zeros((weight.shape[0], 1))
        lora_a, lora_b = (array.astype(weight.dtype) for array in zeros)
        magnitude = np.zeros(weight.shape[0], weight.dtype)
        layer = self.filled(lora_a, lora_b, magnitude, weight=weight, bias=None, scaling=1.0)
        layer.initialize_dora_magnitude()
        return layer.magnitude.detach().numpy()

    def merge(self, scaling: float, lora_a: Any, **arrays: Any) -> np.ndarray:
        modules = importlib.import_module("torchtune.modules.peft")
        layer = self.filled(lora_a, bias=None, scaling=scaling, **arrays)
        state = {f"layer.{name}": tensor for name, tensor in layer.state_dict().items()}
        rank = len(lora_a)
        merged = modules.get_merged_lora_ckpt(state, rank, scaling * rank)
        return merged["layer.weight"].numpy()


class Lycoris(Peer):
    """LyCORIS's LoCon on a linear layer, with one norm for each output row."""

    def layer(self, weight: Any, bias: Any, scaling: float, rank: int) -> Any:
        locon = importlib.import_module("lycoris.modules.locon")
        base = linear(weight, bias)
        alpha = scaling * rank
        return locon.LoConModule("layer", base, 1.0, rank, alpha, weight_decompose=True)

    def parameters(self, layer: Any) -> Arrays:
        return {
            "lora_a": layer.lora_down.weight,
            "lora_b": layer.lora_up.weight,
            "magnitude": layer.dora_scale,
        }

    def merge(self, **arrays: Any) -> np.ndarray:
        merged, _ = self.filled(bias=None, **arrays).get_merged_weight()
        return merged.detach().numpy()


class MlxLm:
    """The linear layer of mlx-lm, or of another package with the same class, on the CPU."""

    def __init__(self, module: str = "mlx_lm.tuner.dora") -> None:
        self.module = module
        self.mx = importlib.import_module("mlx.core")
        self.mx.set_default_device(self.mx.cpu)

    def asarray(self, array: np.ndarray) -> Any:
        return self.mx.array(np.ascontiguousarray(array), dtype=getattr(self.mx, array.dtype.name))

    def layer(
        self, weight: Any, lora_a: Any, lora_b: Any, magnitude: Any, bias: Any, scaling: float
    ) -> Any:
        dora = importlib.import_module(self.module)
        nn = importlib.import_module("mlx.nn")
        base = nn.Linear(*reversed(weight.shape), bias=bias is not None)
        base.weight = self.asarray(weight)
        if bias is not None:
            base.bias = self.asarray(bias)
        layer = dora.DoRALinear.from_base(base, len(lora_a), scale=scaling)
        layer.lora_a, layer.lora_b = self.asarray(lora_a.T), self.asarray(lora_b.T)
        layer.m = self.asarray(magnitude)
        return layer

    def dropping(self, dropout_mask: np.ndarray | None = None, **arrays: Any) -> Any:
        layer = self.layer(**arrays)
        if dropout_mask is not None:
            mask = self.asarray(dropout_mask)
            layer.dropout = lambda x: x * mask
        return layer

    def forward(self, x: np.ndarray, **arrays: Any) -> np.ndarray:
        return np.array(self.dropping(**arrays)(self.asarray(x)))

    def gradients(self, dy: np.ndarray, x: np.ndarray, **arrays: Any) -> Arrays:
        layer, dy = self.dropping(**arrays), self.asarray(dy)

        def loss(trained: Arrays, x: Any) -> Any:
            layer.update(trained)
            return (layer(x) * dy).sum()

        trained = {name: layer[name] for name in ("lora_a", "lora_b", "m")}
        found, dx = self.mx.grad(loss, argnums=(0, 1))(trained, self.asarray(x))
        return {
            "x": np.array(dx),
            "lora_a": np.array(found["lora_a"]).T,
            "lora_b": np.array(found["lora_b"]).T,
            "magnitude": np.array(found["m"]),
        }

    def merge(self, **arrays: Any) -> np.ndarray:
        return np.array(self.layer(bias=None, **arrays).fuse().weight)


class MlxTable(MlxLm):
    """mlx-lm's embedding, used as a linear layer. It has one norm for each token."""

    def layer(
        self, weight: Any, lora_a: Any, lora_b: Any, magnitude: Any, scaling: float, **_: Any
    ) -> Any:
        dora = importlib.import_module(self.module)
        nn = importlib.import_module("mlx.nn")
        base = nn.Embedding(*weight.shape)
        base.weight = self.asarray(weight)
        layer = dora.DoRAEmbedding.from_base(base, len(lora_a), scale=scaling)
        layer.lora_a, layer.lora_b = self.asarray(lora_b), self.asarray(lora_a)
        layer.m = self.asarray(magnitude)
        return layer

    def forward(self, x: np.ndarray, bias: Any, **arrays: Any) -> np.ndarray:
        if bias is not None:
            raise NotImplementedError
        return np.array(self.layer(**arrays).as_linear(self.asarray(x)))

    def looked_up(self, **arrays: Any) -> np.ndarray:
        """Return the result for every token, in the place of the merged weight."""
        tokens = self.mx.arange(len(arrays["weight"]))
        return np.array(self.layer(**arrays)(tokens))

    def merge(self, **arrays: Any) -> np.ndarray:
        return np.array(self.layer(**arrays).fuse().weight)
