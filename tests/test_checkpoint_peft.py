"""PEFT's format, written or read by PEFT 0.21.2 itself."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save_file

import doraxp
from doraxp import Config, LayerKind
from doraxp.checkpoint import Options, audit, extract, load_adapters, plan_merge, save_adapters

pytestmark = pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*", "ignore:.*save_embedding.*")
PATTERNS = {"rank_pattern": {"square": 2, "conv.": 3}, "alpha_pattern": {"^linear": 5}}


@pytest.fixture
def network(torch):
    """A layer of each kind that PEFT can adapt. One of them is square."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(7)
    return torch.nn.ModuleDict(
        {
            "linear": torch.nn.Linear(12, 20),
            "square": torch.nn.Linear(12, 12, bias=False),
            "conv1": torch.nn.Conv1d(6, 8, 3, dilation=1),
            "conv2": torch.nn.Conv2d(6, 8, (3, 2)),
            "pointwise": torch.nn.Conv2d(6, 8, 1),
            "embedding": torch.nn.Embedding(30, 12),
            "hidden": torch.nn.ModuleDict({"c_attn": Conv1D(20, 12)}),
        }
    )


def train(torch, model):
    """Give every parameter of the adapters a value other than its initial one."""
    torch.manual_seed(8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter *= 1 + 0.3 * torch.rand_like(parameter)
            elif "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))


def weights(model):
    return {
        name.removesuffix(".weight"): tensor.detach().numpy().copy()
        for name, tensor in model.named_parameters()
        if name.endswith(".weight")
    }


def merged(base, adapters):
    return {
        path: layer.kind.restore(
            doraxp.merge(layer.kind.matrix(base[path]), layer.adapter, layer.config), layer.shape
        )
        for path, layer in adapters.items()
    }


def assert_equal_to_5_digits(actual, desired):
    assert actual.keys() <= desired.keys()
    for path, weight in actual.items():
        bound = 1e-5 * np.abs(desired[path]).max()
        np.testing.assert_allclose(weight, desired[path], rtol=0, atol=bound, err_msg=path)


@pytest.mark.parametrize(
    "targets", [["linear", "square", "conv1", "conv2", "pointwise"], ["embedding"], ["c_attn"]]
)
@pytest.mark.parametrize("rslora", [False, True])
def test_we_load_a_folder_that_peft_writes(peft, torch, network, tmp_path, targets, rslora):
    base = weights(network)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=7,
        target_modules=targets,
        use_dora=True,
        use_rslora=rslora,
        **(PATTERNS if "linear" in targets else {}),
        fan_in_fan_out=targets == ["c_attn"],
    )
    model = peft.get_peft_model(network, config)
    train(torch, model)
    model.save_pretrained(tmp_path)
    adapters = load_adapters(tmp_path)
    assert adapters.format == "peft"
    assert len(adapters) == len(targets)
    if "linear" in targets:
        assert adapters["square"].config == Config(2, 7.0, rslora=rslora)
        assert adapters["linear"].config == Config(4, 5.0, rslora=rslora)
        assert adapters["conv2"].config.rank == 3
    desired = weights(model.merge_and_unload())
    assert_equal_to_5_digits(merged(base, adapters), desired)


@pytest.mark.parametrize(
    "kinds",
    [
        {"linear": "linear", "square": "linear", "conv1": "conv", "conv2": "conv"},
        {"embedding": "embedding"},
        {"hidden.c_attn": "transposed"},
    ],
)
def test_peft_loads_a_folder_that_we_write(peft, torch, network, tmp_path, kinds):
    base = {path: weight for path, weight in weights(network).items() if path in kinds}
    layers = doraxp.adapt(
        base,
        list(kinds),
        Config(3, 5.5),
        seed=0,
        kinds={path: LayerKind(kind) for path, kind in kinds.items()},
        rank_pattern={"linear": 5} if "linear" in kinds else None,
        alpha_pattern={"square": 9} if "square" in kinds else None,
    )
    rng = np.random.default_rng(3)
    layers = {
        path: layer._replace(
            adapter=layer.adapter._make(
                leaf + 0.2 * rng.standard_normal(leaf.shape).astype("f4") for leaf in layer.adapter
            )
        )
        for path, layer in layers.items()
    }
    save_adapters(tmp_path / "adapter", layers)
    model = peft.PeftModel.from_pretrained(network, tmp_path / "adapter")
    desired = weights(model.merge_and_unload())
    assert_equal_to_5_digits(merged(base, layers), desired)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wide", [True, False], ids=["adapter-32", "adapter-16"])
@pytest.mark.parametrize(
    "targets", [["linear", "square", "conv2", "pointwise"], ["embedding"], ["c_attn"]]
)
def test_the_audit_of_a_merge_by_peft_is_right(
    peft, torch, network, tmp_path, targets, dtype, wide
):
    """With `wide` false, PEFT rounds every step to the 16 bits of the model."""
    from safetensors.torch import save_file

    network = network.to(getattr(torch, dtype))

    def save(model, name):
        tensors = {key: tensor.contiguous().clone() for key, tensor in model.state_dict().items()}
        save_file(tensors, tmp_path / name)

    save(network, "base.safetensors")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=7,
        target_modules=targets,
        use_dora=True,
        fan_in_fan_out=targets == ["c_attn"],
    )
    model = peft.get_peft_model(network, config, autocast_adapter_dtype=wide)
    train(torch, model)
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload()
    save(merged, "merged.safetensors")
    plan = plan_merge(tmp_path / "base.safetensors", tmp_path / "adapter", Options())
    verdicts = audit(plan, tmp_path / "merged.safetensors")
    assert {verdict.verdict for verdict in verdicts.values()} <= {"exact", "rounded", "equal"}
    with torch.no_grad():
        next(p for p in merged.parameters() if p.ndim > 1).mul_(1.5)
    save(merged, "merged.safetensors")
    wrong = audit(plan, tmp_path / "merged.safetensors")
    assert sum(not verdict.right for verdict in wrong.values()) == 1


@pytest.mark.parametrize(
    "modules", [["linear", "square", "conv1", "conv2", "pointwise"], ["hidden.c_attn"]]
)
def test_peft_merges_an_adapter_that_extract_wrote(peft, torch, network, tmp_path, modules):
    rng = np.random.default_rng(5)
    base = {path: weight for path, weight in weights(network).items() if path in modules}
    tuned = {path: one + 0.1 * rng.standard_normal(one.shape) for path, one in base.items()}
    bias = np.ones(20, np.float32)  # a Conv1D shows by its bias that it is stored (in, out)
    for name, tensors in (("base", base), ("tuned", tuned)):
        tensors = {f"{path}.weight": one.astype("f4") for path, one in tensors.items()}
        save_file(tensors | {"hidden.c_attn.bias": bias}, tmp_path / f"{name}.safetensors")
    found = extract(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", 4)
    assert sorted(found.adapters) == sorted(modules)
    save_adapters(tmp_path / "adapter", found.adapters)
    model = peft.PeftModel.from_pretrained(network, tmp_path / "adapter")
    theirs = weights(model.merge_and_unload())
    assert_equal_to_5_digits(merged(base, found.adapters), theirs)
    for path, closeness in found.closeness.items():
        error = np.linalg.norm(theirs[path] - tuned[path])
        bound = 1e-5 * np.linalg.norm(tuned[path])
        assert error == pytest.approx(closeness.error, abs=bound)


class TestExperts:
    """PEFT has no DoRA of `target_parameters`, and must refuse the layout of doraxp."""

    @pytest.fixture
    def model(self, torch):
        class Experts(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.gate_up_proj = torch.nn.Parameter(torch.randn(3, 10, 4))

        torch.manual_seed(7)
        layers = {"experts": Experts(), "q_proj": torch.nn.Linear(4, 6)}
        return torch.nn.ModuleDict({"mlp": torch.nn.ModuleDict(layers)})

    @pytest.mark.parametrize("others", [[], ["mlp.q_proj"]])
    @pytest.mark.parametrize("kind", ["experts", "transposed_experts"])
    def test_peft_refuses_the_layout_with_an_error(self, peft, model, tmp_path, kind, others):
        base = {name: tensor.detach().numpy() for name, tensor in model.named_parameters()}
        stack = "mlp.experts.gate_up_proj"
        adapters = doraxp.adapt(
            base, [stack, *others], Config(2), seed=1, kinds={stack: LayerKind(kind)}
        )
        save_adapters(tmp_path / "adapter", adapters)
        with pytest.raises(ValueError, match="does not work with use_dora=True"):
            peft.PeftModel.from_pretrained(model, str(tmp_path / "adapter"))
