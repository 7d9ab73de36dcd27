"""`doraxp.torch.accelerate` around weights of bitsandbytes and torchao, beside PEFT's layers."""

from __future__ import annotations

import copy
import logging
import weakref

import pytest

pytestmark = [
    # torchao registers enumerations in a way that PyTorch 2.13 warns of.
    pytest.mark.filterwarnings("ignore:.*register_constant.*"),
    # Without the model's configuration, PEFT's layer around torchao cannot merge.
    pytest.mark.filterwarnings("ignore:.*without `get_apply_tensor_subclass`.*:UserWarning"),
]
LAYERS = ("base_model.model.0", "base_model.model.2")
IN_TORCHAO = ("Int8WeightOnlyConfig", "Float8WeightOnlyConfig", "IntxWeightOnlyConfig")
KINDS = (
    "nf4",
    "nf4 twice",  # its scales are quantised too
    "int8",
    *(f"{config} {when}" for config in IN_TORCHAO for when in ("before", "after")),
)
"""Ways to quantise; by torchao before or after PEFT was applied."""


@pytest.fixture
def libraries(torch, peft, bitsandbytes, torchao):
    """Ties a test to the libraries."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def in_bitsandbytes(linear, kind):
    """Return the quantised layer."""
    from bitsandbytes import nn

    size = linear.in_features, linear.out_features, linear.bias is not None
    if kind == "int8":
        layer = nn.Linear8bitLt(*size, has_fp16_weights=False)
    else:
        layer = nn.Linear4bit(
            *size,
            compute_dtype=linear.weight.dtype,
            quant_type="nf4",
            compress_statistics=kind == "nf4 twice",
        )
        # Else a processor with bfloat16 packs the weight in evaluation, and PEFT's norm is wrong.
        layer.support_avx512bf16_for_cpu = False
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")  # moving it quantises it


def in_torchao(model, config, ending=""):
    """Quantise the layers whose names end so, in place."""
    from torchao import quantization

    config = getattr(quantization, config)()
    quantization.quantize_(model, config, filter_fn=lambda _, name: name.endswith(ending))


def model_of(kind, *, dropout=0.0, bias=True, zero_row=False):
    """Return a quantised model with DoRA on two layers, with parameters as after training."""
    import peft
    import torch

    torch.manual_seed(11)
    base = torch.nn.Sequential(
        torch.nn.Linear(128, 96, bias=bias), torch.nn.Tanh(), torch.nn.Linear(96, 64, bias=bias)
    )
    if zero_row:
        torch.nn.init.zeros_(base[0].weight[1])
    config, _, when = kind.partition(" ")
    if config not in IN_TORCHAO and config != "Int8DynamicActivationInt8WeightConfig":
        for index in (0, 2):
            base[index] = in_bitsandbytes(base[index], kind)
        base.is_loaded_in_8bit = kind == "int8"
        base.is_loaded_in_4bit = kind != "int8"
    elif when == "before":
        for index in (0, 2):
            in_torchao(base[index], config)
    options = peft.LoraConfig(
        r=3, lora_alpha=5, use_dora=True, lora_dropout=dropout, target_modules=["0", "2"]
    )
    model = peft.get_peft_model(base, options)
    if when == "after":
        in_torchao(model, config, "base_layer")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        if zero_row:
            model.base_model.model[0].lora_B["default"].weight[1] = 0
    return model


def x_of(torch):
    return torch.randn(2, 7, 128, generator=torch.manual_seed(1))


def step(torch, model, x):
    """Return y and all gradients; dropout draws the same numbers every time."""
    x = x.detach().requires_grad_()
    trained = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(5)
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *trained])]


def assert_same(torch, actual, desired, rtol=3e-6):
    for got, want in zip(actual, desired, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=rtol * float(want.abs().max()))


def dense_of(layer):
    """Return the base's weight as a plain tensor."""
    from doraxp.torch._quantised import dequantised

    return dequantised(layer.base_layer)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", KINDS)
def test_detached_equals_pefts_step(libraries, torch, kind, dropout, bias):
    """The models are made twice: PEFT cannot go on with an int8 layer after one step on a CPU."""
    from doraxp.torch import accelerate

    x = x_of(torch)
    want = step(torch, model_of(kind, dropout=dropout, bias=bias), x)
    model = model_of(kind, dropout=dropout, bias=bias)
    handle = accelerate(model, "detached")
    assert handle.layers == LAYERS
    assert dict(handle.left) == {}
    assert_same(torch, step(torch, model, x), want)
    assert_same(torch, step(torch, model, x), want)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_equals_pefts(libraries, torch, kind):
    from doraxp.torch import accelerate

    x = x_of(torch)
    with torch.no_grad():
        want = model_of(kind).eval()(x)
        model = model_of(kind).eval()
        accelerate(model)
        assert_same(torch, [model(x)], [want])


@pytest.mark.parametrize("kind", KINDS)
def test_exact_gives_the_true_gradient_of_the_dequantised_layers(libraries, torch, kind):
    from doraxp.torch import accelerate

    model, x = model_of(kind), x_of(torch)
    accelerate(model)
    got = step(torch, model, x)
    x = x.requires_grad_()
    trained = [p for p in model.parameters() if p.requires_grad]

    def dense(layer, x):
        update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        v = dense_of(layer) + layer.scaling["default"] * update
        m = layer.lora_magnitude_vector["default"].weight
        return x @ ((m / v.norm(dim=1))[:, None] * v).T + layer.base_layer.bias

    first, _, second = model.base_model.model
    y = dense(second, torch.tanh(dense(first, x)))
    want = [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *trained])]
    assert_same(torch, got, want, 2e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["nf4", "int8", "Int8WeightOnlyConfig after"])
def test_the_graph_of_a_large_layer_keeps_no_plain_weight(
    libraries, torch, monkeypatch, kind, dropout
):
    """The numbers stay the same, and the memory that quantising saves stays saved."""
    from doraxp.torch import _around, _peft, accelerate

    x, made = x_of(torch), []

    def recorded(base):
        made.append(weakref.ref(weight := dense(base)))
        return weight

    dense = _peft.dequantised
    model = model_of(kind, dropout=dropout)
    accelerate(model)
    want = step(torch, model, x)
    monkeypatch.setattr(_peft, "dequantised", recorded)
    y = model(x.requires_grad_())
    assert [ref() is not None for ref in made] == [True, True]  # the layers are small
    monkeypatch.setattr(_around, "SMALL", 0)
    made.clear()
    y = model(x)
    assert [ref() for ref in made] == [None, None]
    del y
    assert_same(torch, step(torch, model, x), want, 0)


# The weight that torchao makes of a row of zeros in float8 is NaN.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "Float8" not in kind])
@pytest.mark.parametrize("norm_gradient", ["exact", "detached"])
def test_rows_of_zeros_give_the_bias_and_finite_gradients(libraries, torch, kind, norm_gradient):
    from doraxp.torch import accelerate

    model = model_of(kind, zero_row=True)
    accelerate(model, norm_gradient)
    layer, x = model.base_model.model[0], x_of(torch)
    assert torch.equal(layer(x)[..., 1], layer.base_layer.bias[1].expand(2, 7))
    assert all(bool(torch.isfinite(gradient).all()) for gradient in step(torch, model, x))


@pytest.mark.parametrize(
    "kind", ["nf4", "Int8WeightOnlyConfig before", "Int8WeightOnlyConfig after"]
)
def test_a_copy_can_be_restored(libraries, torch, kind):
    from doraxp.torch import accelerate, restore

    model, x = model_of(kind), x_of(torch)
    classes = [type(module) for module in model.modules()]
    want = step(torch, model, x)
    accelerate(model, "detached")
    copied = copy.deepcopy(model)
    assert_same(torch, step(torch, copied, x), want)
    for each in (copied, model):
        restore(each)
        assert [type(module) for module in each.modules()] == classes


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_gives_the_dtype_of_the_base(libraries, torch, kind):
    from doraxp.torch import accelerate

    model, x = model_of(kind), x_of(torch)
    wide = step(torch, model_of(kind), x)[0]
    accelerate(model)
    layer = model.base_model.model[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == layer.base_layer(x).dtype
        y = model(x)
    torch.testing.assert_close(y.float(), wide, rtol=0, atol=0.05 * float(wide.abs().max()))


def test_layers_that_quantise_x_are_left_to_peft(libraries, torch):
    """torchao has no gradient by an x that it quantises."""
    from doraxp.torch import accelerate

    kind = "Int8DynamicActivationInt8WeightConfig before"
    with pytest.raises(ValueError, match="torchao quantises its x too"):
        accelerate(model_of(kind))


def test_a_weight_that_is_quantised_after_accelerate_is_noticed(libraries, torch):
    from doraxp.torch import accelerate

    x = x_of(torch)
    model = model_of("Int8WeightOnlyConfig never")
    handle = accelerate(model, "detached")
    plain = step(torch, model, x)
    in_torchao(model, "Int8WeightOnlyConfig", "base_layer")
    got = step(torch, model, x)
    assert handle.layers == LAYERS
    handle.restore()
    assert_same(torch, got, step(torch, model, x))
    assert not torch.equal(got[0], plain[0])


def test_a_weight_that_is_packed_for_evaluation_is_left_to_peft(libraries, torch):
    """bitsandbytes packs it on processors that multiply bfloat16."""
    from doraxp.torch import accelerate

    model = model_of("nf4")
    handle = accelerate(model)
    state = model.base_model.model[0].base_layer.weight.quant_state
    state.packing_format_for_cpu = True
    reason = "bitsandbytes has packed its weight for evaluation"
    assert dict(handle.left) == {LAYERS[0]: reason}


def test_a_weight_that_is_not_quantised_yet_is_left_to_peft(libraries, torch, bitsandbytes):
    from doraxp.torch._quantised import is_quantised

    for layer in (
        bitsandbytes.nn.Linear4bit(4, 3),
        bitsandbytes.nn.Linear8bitLt(4, 3, has_fp16_weights=True),
    ):
        assert "its base must be a torch.nn.Linear or a quantised one" in is_quantised(layer)


def test_a_wrong_merge_of_peft_is_said(libraries, torch):
    """PEFT merges DoRA in torchao as plain LoRA. Once it does not, the warning can go."""
    from torchao.quantization import Int8WeightOnlyConfig

    from doraxp.torch import accelerate

    model, x = model_of("Int8WeightOnlyConfig before").eval(), x_of(torch)
    for index in (0, 2):
        model.base_model.model[index].get_apply_tensor_subclass = Int8WeightOnlyConfig
    accelerate(model)
    want = model(x).detach()
    with pytest.warns(UserWarning, match="PEFT merges DoRA into a weight of torchao as plain LoRA"):
        model.merge_adapter()
    error = float((model(x).detach() - want).abs().max() / want.abs().max())
    assert error > 0.1
