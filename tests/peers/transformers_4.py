"""Linear layers of packages that need transformers 4: adapters and MoE-PEFT."""

from __future__ import annotations

import importlib
import math
from typing import Any

import numpy as np
import torch

from peers.layers import Arrays, Peer, as_numpy, as_torch, linear


class Adapters(Peer):
    """The linear layer of adapters, as its models wrap it."""

    def layer(self, weight: Any, bias: Any, scaling: float, rank: int) -> Any:
        adapters = importlib.import_module("adapters")
        methods = importlib.import_module("adapters.methods.lora")
        transformers = importlib.import_module("transformers")
        places = adapters.ModelAdaptersConfig()
        config = adapters.LoRAConfig(
            r=rank, alpha=scaling * rank, use_dora=True, attn_matrices=["q"]
        )
        places.add("one", config)
        places.active_setup = adapters.Stack("one")
        model = transformers.BertConfig()
        base = linear(weight, bias)
        layer = methods.LoRALinear.wrap(base, "selfattn", model, places, attn_key="q")
        layer.add_adapter("one", 0)
        return layer

    def parameters(self, layer: Any) -> Arrays:
        lora = layer.loras["one"]
        return {"lora_a": lora.lora_A, "lora_b": lora.lora_B, "magnitude": lora.m.weight}

    def drop(self, layer: Any, dropout: torch.nn.Module) -> None:
        layer.loras["one"].lora_dropout = dropout

    def init(self, weight: np.ndarray) -> np.ndarray:
        layer = self.layer(weight, None, 1.0, 1)
        return layer.loras["one"].m.weight.detach().numpy()[:, 0]

    def merge(self, **arrays: Any) -> np.ndarray:
        layer = self.filled(bias=None, **arrays)
        layer.merge_adapter("one")
        return as_numpy(layer.weight, arrays["weight"])


class WithoutScaling:
    """A peer with s = 1, where B has the scaling."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer

    def forward(self, lora_b: np.ndarray, scaling: float, **arrays: Any) -> np.ndarray:
        scaled = lora_b * lora_b.dtype.type(scaling)
        return self.peer.forward(lora_b=scaled, scaling=1.0, **arrays)


class MoePeft(Peer):
    """MoE-PEFT's linear layer. It cannot merge, and computes in float32."""

    def layer(self, weight: Any, bias: Any, scaling: float, rank: int) -> Any:
        common = importlib.import_module("moe_peft.common")
        config = common.LoraConfig(
            adapter_name="one", use_dora_=True, lora_r_=rank, lora_alpha_=scaling * rank,
            lora_dropout_=0.5,
        )  # fmt: skip
        layer = common.lora_linear.Linear(linear(weight, bias), "cpu")
        layer.init_lora_weight(config)
        layer.loras_["one"].eval()  # it must have a dropout
        return layer

    def parameters(self, layer: Any) -> Arrays:
        lora = layer.loras_["one"]
        return {
            "lora_a": lora.lora_a_.weight,
            "lora_b": lora.lora_b_.weight,
            "magnitude": lora.magnitude_vector_,
        }

    def drop(self, layer: Any, dropout: torch.nn.Module) -> None:
        layer.loras_["one"].dropout_ = dropout

    def init(self, weight: np.ndarray) -> np.ndarray:
        return self.parameters(self.layer(weight, None, 1.0, 1))["magnitude"].detach().numpy()

    def run(
        self, x: np.ndarray, dropout_mask: np.ndarray | None = None, **arrays: Any
    ) -> tuple[Any, torch.Tensor, torch.Tensor]:
        common = importlib.import_module("moe_peft.common")
        layer, leaf = self.filled(**arrays), as_torch(x).requires_grad_()
        *batch, inner = x.shape
        rows = common.LLMBatchConfig("one", 0, 1)
        given = common.LLMModelInput(batch_configs_=[rows], efficient_operator_=False)
        y = layer(leaf.reshape(1, math.prod(batch), inner), given)
        return layer, leaf, y.reshape(*batch, y.shape[-1])
