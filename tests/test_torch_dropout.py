"""Dropout of `doraxp.torch.DoRALinear`: the formulas of the core, drawn by PyTorch's generator."""

from __future__ import annotations

import pytest

import doraxp
from doraxp import Config

MODES = ("input", "low_rank")
CHOICES = [
    pytest.param(dropout, form, norm_gradient, id=f"{dropout}-{form}-{norm_gradient}")
    for dropout in MODES
    for form in ("weight", "direction")
    for norm_gradient in ("exact", "detached")
]


def make(torch, dropout="input", rate=0.4, *, dtype="float64", train_base=False, **choices):
    """Return a layer with parameters as after training."""
    from doraxp.torch import DoRALinear

    torch.manual_seed(3)
    dtype = getattr(torch, dtype)
    base = torch.nn.Linear(6, 4, dtype=dtype)
    config = Config(2, 3, dropout=dropout, **choices)
    layer = DoRALinear(base, config, seed=0, dropout=rate, train_base=train_base)
    layer.to(dtype)
    with torch.no_grad():
        for leaf in layer.adapter:
            leaf.add_(0.3 * torch.randn_like(leaf))
    return layer, torch.randn(5, 6, dtype=dtype)


def step(torch, layer, x):
    """Return y and the gradients of the sum of its squares; each call draws the same mask."""
    x = x.detach().requires_grad_()
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    torch.manual_seed(5)
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *trained])]


def mask_of(torch, layer, x):
    """Return the mask that the next forward draws after the seed of `step`."""
    torch.manual_seed(5)
    return torch.nn.functional.dropout(torch.ones_like(x), layer.dropout)


@pytest.mark.parametrize(("dropout", "form", "norm_gradient"), CHOICES)
@pytest.mark.parametrize("train_base", [False, True])
def test_a_step_in_training_is_that_of_the_core_with_the_mask(
    torch, dropout, form, norm_gradient, train_base
):
    layer, x = make(torch, dropout, form=form, norm_gradient=norm_gradient, train_base=train_base)
    mask = mask_of(torch, layer, x)
    assert {0.0} < set(mask.flatten().tolist())
    with torch.no_grad():
        adapter = doraxp.Adapter(*(leaf.detach() for leaf in layer.adapter))
        y, cache = doraxp.forward(
            x, layer.weight.detach(), adapter, layer.config, bias=layer.bias, dropout_mask=mask
        )
        want = doraxp.backward(2 * y, cache, train_base=train_base)
    got = step(torch, layer, x)
    base = [want.weight, want.bias] if train_base else []
    for actual, desired in zip(got, [y, want.x, *base, *want.adapter], strict=True):
        torch.testing.assert_close(actual, desired, rtol=0, atol=1e-12 * float(desired.abs().max()))


@pytest.mark.parametrize("form", ["weight", "direction"])
@pytest.mark.parametrize("dropout", MODES)
def test_first_and_second_derivatives_with_a_fixed_mask(torch, dropout, form):
    layer, x = make(torch, dropout, form=form, train_base=True)
    names = [name for name, _ in layer.named_parameters()]

    def run(x, *values):
        torch.manual_seed(5)
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), x)

    values = [parameter.detach().clone().requires_grad_() for parameter in layer.parameters()]
    assert torch.autograd.gradcheck(run, (x.requires_grad_(), *values))
    assert torch.autograd.gradgradcheck(run, (x, *values))


@pytest.mark.parametrize("dropout", MODES)
def test_derivatives_where_one_parameter_is_a_function_of_another(torch, dropout):
    layer, x = make(torch, dropout)

    def run(lora_a):
        torch.manual_seed(5)
        magnitude = layer.magnitude.detach() + lora_a.square().sum()
        parameters = {"lora_a": lora_a, "magnitude": magnitude}
        return torch.func.functional_call(layer, parameters, x)

    lora_a = layer.lora_a.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(run, lora_a)
    found = [
        torch.autograd.grad(run(lora_a).sum(), lora_a, create_graph=create_graph)[0]
        for create_graph in (False, True)
    ]
    torch.testing.assert_close(*found)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # jvp's own import
@pytest.mark.parametrize(("dropout", "form", "norm_gradient"), CHOICES)
def test_torch_func_and_forward_mode_differentiate_dropout_too(torch, dropout, form, norm_gradient):
    layer, x = make(torch, dropout, form=form, norm_gradient=norm_gradient)
    parameters = dict(layer.named_parameters())
    trained = {name: leaf.detach() for name, leaf in parameters.items() if leaf.requires_grad}

    def loss(trained, x):
        torch.manual_seed(5)
        return torch.func.functional_call(layer, trained, x).square().sum()

    _, dx, *want = step(torch, layer, x)
    found, found_dx = torch.func.grad(loss, argnums=(0, 1))(trained, x)
    slopes = {name: torch.randn_like(leaf) for name, leaf in trained.items()}
    _, along = torch.func.jvp(lambda trained: loss(trained, x), (trained,), (slopes,))
    torch.testing.assert_close([found_dx, *found.values()], [dx, *want])
    torch.testing.assert_close(along, sum((found[name] * slopes[name]).sum() for name in found))


@pytest.mark.parametrize("dropout", MODES)
def test_evaluation_and_a_rate_of_zero_drop_nothing(torch, dropout):
    layer, x = make(torch, dropout)
    plain, _ = make(torch, dropout, 0)
    want = plain(x)
    assert not torch.equal(layer(x), want)
    assert torch.equal(layer.eval()(x), want)
    assert torch.equal(plain.train()(x), want)


@pytest.mark.parametrize("dropout", MODES)
def test_the_generator_of_pytorch_draws(torch, dropout):
    layer, x = make(torch, dropout)
    first, second = step(torch, layer, x)[0], step(torch, layer, x)[0]
    assert torch.equal(first, second)
    assert not torch.equal(layer(x), first)


def test_a_fresh_adapter_with_dropout_of_the_low_rank_part_equals_the_base(torch):
    from doraxp.torch import DoRALinear

    base = torch.nn.Linear(6, 4)
    config = Config(2, dropout="low_rank")
    layer = DoRALinear(base, config, seed=0, dropout=0.5)
    x = torch.randn(5, 6)
    assert torch.equal(layer(x), layer.eval()(x))


@pytest.mark.parametrize("norm_gradient", ["exact", "detached"])
@pytest.mark.parametrize("dropout", MODES)
def test_rows_of_zeros_give_the_bias_and_finite_gradients(torch, dropout, norm_gradient):
    layer, x = make(torch, dropout, norm_gradient=norm_gradient)
    with torch.no_grad():
        layer.weight[1] = 0
        layer.lora_b[1] = 0
    y, *gradients = step(torch, layer, x)
    torch.testing.assert_close(y[:, 1], layer.bias[1].detach().expand(5))
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)


@pytest.mark.parametrize("dropout", MODES)
def test_checkpointing_draws_the_same_mask_again(torch, dropout):
    from torch.utils.checkpoint import checkpoint

    layer, x = make(torch, dropout)
    want = step(torch, layer, x)

    class Recomputed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return checkpoint(self.layer, x, use_reentrant=False)

    for actual, desired in zip(step(torch, Recomputed(), x), want, strict=True):
        assert torch.equal(actual, desired)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo does
@pytest.mark.parametrize("norm_gradient", ["exact", "detached"])
@pytest.mark.parametrize("dropout", MODES)
def test_a_layer_with_dropout_compiles_in_one_graph(torch, dropout, norm_gradient):
    torch.compiler.reset()
    layer, x = make(torch, dropout, norm_gradient=norm_gradient)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for actual, desired in zip(step(torch, compiled, x), step(torch, layer, x), strict=True):
        torch.testing.assert_close(actual, desired, rtol=0, atol=1e-12 * float(desired.abs().max()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dropout", MODES)
def test_dtypes_and_autocast(torch, dropout, dtype):
    """y has the dtype of x or autocast's, and is near to that of float64."""
    wide, x = make(torch, dropout)
    layer, _ = make(torch, dropout, dtype=dtype)
    x = x.to(layer.weight.dtype).double()
    with torch.no_grad():
        for to, of in zip(wide.parameters(), layer.parameters(), strict=True):
            to.copy_(of)

    mask = mask_of(torch, wide, x)  # the generator would draw other ones for other dtypes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "dropout", lambda x, p: x * mask.to(x.dtype))
        want, low = wide(x), layer(x.to(layer.weight.dtype))
        assert low.dtype == layer.weight.dtype
        bound = 8 * torch.finfo(low.dtype).eps * float(want.detach().abs().max())
        torch.testing.assert_close(low.double(), want, rtol=0, atol=bound)
        if dtype == "float32":
            with torch.autocast("cpu", torch.bfloat16):
                low = layer(x.float())
            assert low.dtype == torch.bfloat16
            torch.testing.assert_close(low.double(), want, rtol=0, atol=bound * 2**16)


@pytest.mark.parametrize("create_graph", [False, True])
def test_autocast_rounds_neither_the_gain_nor_its_gradients(torch, create_graph):
    """Within its block PyTorch would make the products in bfloat16, those of a backward too."""
    from doraxp.torch._gain import gain

    layer, _ = make(torch, dtype="float32")
    inputs = [layer.weight.requires_grad_(), *layer.adapter]
    g = gain(*inputs, exact=True)
    want = torch.autograd.grad(g.sum(), inputs, retain_graph=True, create_graph=create_graph)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gain(*inputs, exact=True), g)
        found = torch.autograd.grad(g.sum(), inputs, create_graph=create_graph)
    assert all(map(torch.equal, found, want))


def test_the_repr_shows_the_rate_and_its_kind(torch):
    layer, _ = make(torch, "low_rank", 0.25)
    expected = "in=6, out=4, bias=True, rank=2, scaling=1.5, dropout=0.25 (low_rank)"
    assert str(layer) == f"DoRALinear({expected})"


@pytest.mark.parametrize("rate", [-0.1, 1, float("nan")])
def test_a_rate_outside_of_its_range_is_refused(torch, rate):
    with pytest.raises(ValueError, match="dropout must be at least 0 and below 1"):
        make(torch, rate=rate)
    with pytest.raises(TypeError, match="dropout must be a number"):
        make(torch, rate="0.1")
