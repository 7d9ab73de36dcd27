"""Converted adapters and embeddings, loaded or merged by PEFT and mlx-lm themselves."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from checkpoints import draw, write_json
from safetensors.numpy import load_file, save_file

import doraxp
from doraxp import Adapter, Config, LayerKind
from doraxp.checkpoint import load_adapters, save_adapters
from doraxp.checkpoint._formats.embeddings import kind_by_name
from doraxp.cli import main

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore:`is_gradient_checkpointing`:FutureWarning"
)


def convert(source, target, to):
    assert main(["convert", str(source), "--to", to, "--out", str(target)]) == 0


# PEFT


def network(torch):
    """A classifier with a trained head, a norm with an integer buffer and a trained embedding."""
    torch.manual_seed(7)
    return torch.nn.Sequential(
        torch.nn.Linear(12, 20), torch.nn.BatchNorm1d(20), torch.nn.Linear(20, 12),
        torch.nn.Linear(12, 3),
    ).eval()  # fmt: skip


def train(torch, model):
    """Give every trained number, and the buffers of the norm, another value."""
    torch.manual_seed(8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.rand_like(parameter) if "magnitude" in name else None
                parameter += 0.3 * (torch.randn_like(parameter) if noise is None else noise)
        for name, buffer in model.named_buffers():
            if "modules_to_save" in name:
                buffer += 2


CASES = {
    "head": {"modules_to_save": ["3"], "lora_dropout": 0.25},
    "norm": {"modules_to_save": ["1", "3"]},
    "biases": {"bias": "lora_only"},
    "patterns": {"rank_pattern": {"0": 3}, "alpha_pattern": {"2": 5}, "use_rslora": True},
}


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_a_copy_to_the_same_model(peft, torch, tmp_path, case):
    """With the choices of a Config in the header, without a warning."""
    entries = {"r": 2, "use_dora": True, "target_modules": ["0", "2"], **CASES[case]}
    model = peft.get_peft_model(network(torch), peft.LoraConfig(**entries)).eval()
    train(torch, model)
    model.save_pretrained(tmp_path / "a")
    # PEFT would look for a model of this name in the network.
    path = tmp_path / "a" / "adapter_config.json"
    config = json.loads(path.read_text("utf-8")) | {"base_model_name_or_path": "someone/model"}
    write_json(path, config)
    save_adapters(tmp_path / "b", load_adapters(tmp_path / "a", norm_gradient="detached"))
    assert load_adapters(tmp_path / "b")["0"].config.norm_gradient == "detached"
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert {name: x.tobytes() for name, x in before.items()} == {
        name: x.tobytes() for name, x in after.items()
    }
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in "ab"]
    assert {name: configs[1].get(name) for name in configs[0]} == configs[0]
    again = peft.PeftModel.from_pretrained(network(torch), tmp_path / "b").eval()
    state, desired = again.state_dict(), model.state_dict()
    assert state.keys() == desired.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in desired.items())
    x = torch.randn(5, 12)
    assert torch.equal(again(x), model(x))


def test_peft_loads_a_copy_of_a_trained_embedding(peft, torch, tmp_path):
    """PEFT writes it beside the embedding of before the training."""
    transformers = importlib.import_module("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 40}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": False}

    def base():
        torch.manual_seed(7)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval()

    config = peft.LoraConfig(
        r=2, use_dora=True, target_modules=["q_proj"], modules_to_save=["embed_tokens"]
    )
    model = peft.get_peft_model(base(), config).eval()
    train(torch, model)
    model.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    convert(tmp_path / "a", tmp_path / "b", "peft")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert {name: x.tobytes() for name, x in before.items()} == {
        name: x.tobytes() for name, x in after.items()
    }
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "b").eval()
    x = torch.arange(8)[None]
    assert torch.equal(again(x).logits, model(x).logits)


# mlx-lm


def assert_close(actual, desired):
    assert np.abs(actual - desired).max() <= 1e-6 * np.abs(desired).max()


def llama(vocabulary, tied):
    """A model of two blocks, and its weights. Its tokens may be as many as its dimensions."""
    module = importlib.import_module("mlx_lm.models.llama")
    utils = importlib.import_module("mlx.utils")
    mx = importlib.import_module("mlx.core")
    mx.random.seed(3)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": tied}
    config = {"model_type": "llama", "rms_norm_eps": 1e-5, "vocab_size": vocabulary}
    model = module.Model(module.ModelArgs.from_dict({**config, **shape, **heads}))
    return model, {name: np.array(x) for name, x in utils.tree_flatten(model.parameters())}


def write_with_mlx_lm(model, folder, keys):
    """Adapt modules of a model, train them, and write the adapter as mlx-lm does."""
    mx, utils = (importlib.import_module(name) for name in ("mlx.core", "mlx.utils"))
    parameters = {"rank": 3, "scale": 7.0, "dropout": 0.0, "keys": keys}
    tuner = importlib.import_module("mlx_lm.tuner.utils")
    tuner.linear_to_lora_layers(model, 2, parameters, use_dora=True)
    rng = np.random.default_rng(3)
    trained = {
        name: mx.array(draw(rng, *x.shape) if "lora" in name else np.array(x) * np.float32(1.2))
        for name, x in utils.tree_flatten(model.parameters())
        if name.rpartition(".")[-1] in ("lora_a", "lora_b", "m")
    }
    model.load_weights(list(trained.items()), strict=False)
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), trained)
    save_config = importlib.import_module("mlx_lm.utils").save_config
    config = {"fine_tune_type": "dora", "num_layers": 2, "lora_parameters": parameters}
    save_config(config, folder / "adapter_config.json")


def fused(model):
    return {
        name: np.array(module.fuse().weight)
        for name, module in model.named_modules()
        if hasattr(module, "fuse")
    }


def logits(model):
    mx = importlib.import_module("mlx.core")
    return np.array(model(mx.array([[1, 5, 2, 9]])))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("vocabulary", [50, 32, 16])
def test_a_merge_of_an_embedding_is_that_of_mlx_lm(mlx_lm, tmp_path, vocabulary, tied):
    mx = importlib.import_module("mlx.core")
    model, weights = llama(vocabulary, tied)
    save_file(weights, tmp_path / "base")
    keys = ["model.embed_tokens", "self_attn.q_proj", *([] if tied else ["lm_head"])]
    write_with_mlx_lm(model, tmp_path / "adapter", keys)
    paths = [str(tmp_path / name) for name in ("base", "adapter", "out")]
    assert main(["merge", *paths[:2], "--out", paths[2], "--verify"]) == 0
    merged = load_file(tmp_path / "out")
    desired = fused(model)
    assert len(desired) == len(keys) + 1
    for path, weight in desired.items():
        assert_close(merged[f"{path}.weight"], weight)
    plain, _ = llama(vocabulary, tied)
    plain.load_weights([(name, mx.array(x)) for name, x in merged.items()])
    actual, wanted = logits(plain), logits(model)
    assert np.abs(actual - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("vocabulary", [50, 32, 16])
def test_mlx_lm_loads_the_embedding_that_we_write(mlx_lm, tmp_path, vocabulary):
    """From a file of mlx-lm, and from an adapter of kind linear on (tokens, dims)."""
    model, weights = llama(vocabulary, tied=True)
    write_with_mlx_lm(model, tmp_path / "a", ["model.embed_tokens", "self_attn.q_proj"])
    convert(tmp_path / "a", tmp_path / "b", "mlx")
    load = importlib.import_module("mlx_lm.tuner.utils").load_adapters
    again, _ = llama(vocabulary, tied=True)
    load(again, tmp_path / "b")
    np.testing.assert_array_equal(logits(again), logits(model))
    own = doraxp.adapt(weights, ["embed_tokens"], Config(3, 6.0), seed=0)
    ((path, layer),) = own.items()
    assert (layer.kind, layer.shape) == (LayerKind(), (vocabulary, 32))
    rng = np.random.default_rng(3)
    changed = Adapter(*(leaf + 0.2 * draw(rng, *leaf.shape) for leaf in layer.adapter))
    save_adapters(tmp_path / "c", {path: layer._replace(adapter=changed)}, "mlx")
    other, _ = llama(vocabulary, tied=True)
    load(other, tmp_path / "c")
    merged = doraxp.merge(weights[f"{path}.weight"], changed, layer.config)
    assert_close(fused(other)[path], merged)


def test_the_names_of_mlx_lms_modules_tell_their_kind(mlx_lm):
    """Each embedding and linear layer of its small models: right, or not known."""
    source = "\n".join(
        path.read_text("utf-8") for path in (Path(mlx_lm.__file__).parent / "models").glob("*.py")
    )
    found = {
        kind: set(re.findall(rf"self\.(\w+) = nn\.{kind}\(", source))
        for kind in ("Embedding", "Linear")
    }
    assert min(map(len, found.values())) > 10
    assert {name for name in found["Embedding"] if kind_by_name(name) != "embedding"} == set()
    assert {name for name in found["Linear"] if kind_by_name(name) == "embedding"} == set()
    in_blocks = {name for name in found["Linear"] if kind_by_name(f"layers.0.x.{name}") is None}
    assert in_blocks == {"embed_out", "patch_embedding"}
