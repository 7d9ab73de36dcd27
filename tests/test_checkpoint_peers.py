"""The files of LyCORIS and mlx-lm, written or read by these libraries themselves."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from checkpoints import draw, factors, merge
from safetensors.numpy import load_file, save_file

import doraxp
from doraxp import Adapter, Config, LayerKind
from doraxp.checkpoint import load_adapters, save_adapters

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of their imports


def assert_close(actual, desired):
    assert np.abs(actual - desired).max() <= 1e-6 * np.abs(desired).max()


def adapt_with_lycoris(layer, arguments, on_output, folder):
    """Write `base` and `adapter`, and return the adapted layer."""
    torch = importlib.import_module("torch")
    locon = importlib.import_module("lycoris.modules.locon")
    torch.manual_seed(7)
    base = getattr(torch.nn, layer)(*arguments)
    module = locon.LoConModule(
        "lora_unet_down_0", base, 1.0, 4, 7.0, weight_decompose=True, wd_on_out=on_output
    )
    for factor in module.lora_up, module.lora_down:
        torch.nn.init.normal_(factor.weight, std=0.3)
    module.dora_scale.data *= 1 + 0.3 * torch.rand_like(module.dora_scale)
    state = {name: tensor.detach().numpy() for name, tensor in module.custom_state_dict().items()}
    tensors = {f"lora_unet_down_0.{name}": array.copy() for name, array in state.items()}
    save_file(tensors, folder / "adapter")
    save_file({"down.0.weight": base.weight.detach().numpy()}, folder / "base")
    return module


CONVOLUTIONS = [
    ("Conv1d", (6, 8, 3)),
    ("Conv2d", (6, 8, (3, 2), 1, 0, 2)),  # dilated
    ("Conv2d", (6, 8, 3, 1, 0, 1, 2)),  # of two groups
    ("Conv3d", (6, 8, (3, 2, 1))),
]


@pytest.mark.parametrize(
    ("layer", "arguments", "on_output"),
    [
        (*layer, on_output)
        for layer in (("Linear", (12, 20)), *CONVOLUTIONS)
        for on_output in (True, False)
    ],
)
def test_merges_agree_with_those_of_lycoris(lycoris, tmp_path, layer, arguments, on_output):
    desired, _ = adapt_with_lycoris(layer, arguments, on_output, tmp_path).get_merged_weight()
    assert merge(tmp_path, "--verify") == 0
    assert_close(load_file(tmp_path / "out")["down.0.weight"], desired.detach().numpy())


@pytest.fixture
def llama(mlx_lm):
    """A model of four blocks and its weights."""
    llama = importlib.import_module("mlx_lm.models.llama")
    utils = importlib.import_module("mlx.utils")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "vocab_size": 50}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    config = {"model_type": "llama", "rms_norm_eps": 1e-5, **shape, **heads}
    model = llama.Model(llama.ModelArgs.from_dict(config))
    return model, {name: np.array(x) for name, x in utils.tree_flatten(model.parameters())}


PATHS = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "lm_head"]


def test_mlx_lm_loads_a_folder_that_we_write(llama, mlx_lm, tmp_path):
    """Also for adapters of the first blocks only, and of a module outside the blocks."""
    model, weights = llama
    rng = np.random.default_rng(3)
    layers = {
        path: layer._replace(adapter=Adapter(*factors(rng, layer.shape, rank=4)))
        for path, layer in doraxp.adapt(weights, PATHS, Config(4, 10.0), seed=0).items()
    }
    save_adapters(tmp_path / "adapter", layers, "mlx")
    importlib.import_module("mlx_lm.tuner.utils").load_adapters(model, tmp_path / "adapter")
    fused = {
        name: np.array(module.fuse().weight)
        for name, module in model.named_modules()
        if hasattr(module, "fuse")
    }
    assert fused.keys() > layers.keys()
    for path, weight in fused.items():
        base = weights[f"{path}.weight"]
        if path in layers:
            base = doraxp.merge(base, layers[path].adapter, layers[path].config)
        assert_close(weight, base)


def test_we_load_a_folder_that_mlx_lm_writes(llama, mlx_lm, tmp_path):
    model, weights = llama
    mx, utils = (importlib.import_module(name) for name in ("mlx.core", "mlx.utils"))
    parameters = {"rank": 3, "scale": 7.0, "dropout": 0.0, "keys": ["self_attn.v_proj"]}
    tuner = importlib.import_module("mlx_lm.tuner.utils")
    tuner.linear_to_lora_layers(model, 2, parameters, use_dora=True)
    rng = np.random.default_rng(3)
    trained = {
        name: mx.array(draw(rng, *x.shape) if "lora" in name else np.array(x) * np.float32(1.2))
        for name, x in utils.tree_flatten(model.parameters())
        if name.rpartition(".")[-1] in ("lora_a", "lora_b", "m")
    }
    model.load_weights(list(trained.items()), strict=False)
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), trained)
    save_config = importlib.import_module("mlx_lm.utils").save_config
    config = {"fine_tune_type": "dora", "num_layers": 2, "lora_parameters": parameters}
    save_config(config, tmp_path / "adapter_config.json")
    adapters = load_adapters(tmp_path)
    assert set(adapters) == {f"model.layers.{number}.self_attn.v_proj" for number in (2, 3)}
    modules = dict(model.named_modules())
    for path, layer in adapters.items():
        assert layer.kind == LayerKind()
        merged = doraxp.merge(weights[f"{path}.weight"], layer.adapter, layer.config)
        assert_close(merged, np.array(modules[path].fuse().weight))
