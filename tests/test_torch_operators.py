"""PEFT's DoRA convolutions and embeddings: `accelerate`, and the core's operators, against PEFT."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

import doraxp
from doraxp import Adapter, Config, Convolution, Embedding, LayerKind

NAME = "base_model.model.0"
CHANNELS = 20  # of x: more than the outputs of A, so that x with A is a sum of products
CASES = {
    "1d": (1, (3,), {"stride": 2, "padding": 1}),
    "2d": (2, (3, 2), {"stride": (2, 1), "padding": (1, 0)}),
    "2d-padded": (2, (3, 2), {"padding": (1, 4)}),
    "2d-pointwise-dilated": (2, (1, 1), {"dilation": 3}),
    "2d-same": (2, (3, 5), {"padding": "same"}),
    "3d": (3, (2, 1, 3), {"stride": (1, 2, 1), "padding": (0, 0, 2), "bias": False}),
    "embedding": (0, (), {}),
    "embedding-padding": (0, (), {"padding_idx": 3}),
    "embedding-scaled": (0, (), {"embed_scale": 1.5}),
}
SIZES = {1: (9,), 2: (7, 6), 3: (4, 3, 5)}


@pytest.fixture(autouse=True, params=["small", "large"])
def size(request, monkeypatch, peft):
    """Take the convolutions of a test for small ones, or for large ones."""
    from doraxp.torch import _operated

    if request.param == "large":
        monkeypatch.setattr(_operated, "is_small", lambda *_: False)


def base_of(torch, name):
    """Return the layer of a case, without an adapter."""
    dims, kernel, options = CASES[name]
    if dims:
        kind = {1: torch.nn.Conv1d, 2: torch.nn.Conv2d, 3: torch.nn.Conv3d}[dims]
        return kind(CHANNELS, 6, kernel, **options)
    options = dict(options)
    scale = options.pop("embed_scale", None)
    return torch.nn.Embedding(11, 6, **options) if scale is None else scaled(torch)(11, 6, scale)


def scaled(torch):
    """Return the class of an embedding with a scale, as Gemma's."""

    class ScaledWordEmbedding(torch.nn.Embedding):
        def __init__(self, count, dim, scale):
            super().__init__(count, dim)
            self.register_buffer("embed_scale", torch.tensor(scale), persistent=False)

        def forward(self, ids):
            return super().forward(ids) * self.embed_scale.to(self.weight.dtype)

    return ScaledWordEmbedding


def model_of(peft, torch, name, *, dtype="float64", dropout=0.0, base=None, **options):
    """Return a model with DoRA on one layer, with parameters as after training."""
    torch.manual_seed(11)
    base = base_of(torch, name) if base is None else base
    config = peft.LoraConfig(
        r=4, lora_alpha=6, use_dora=True, lora_dropout=dropout, target_modules=["0"], **options
    )
    model = peft.get_peft_model(torch.nn.Sequential(base), config, autocast_adapter_dtype=False)
    model.to(getattr(torch, dtype))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def input_of(torch, name, dtype="float64"):
    torch.manual_seed(1)
    if name.startswith("embedding"):
        return torch.tensor([[3, 0, 3], [10, 7, 3]])
    return torch.randn(3, CHANNELS, *SIZES[CASES[name][0]], dtype=getattr(torch, dtype))


def step(torch, model, x):
    """Return y and all gradients; dropout draws the same numbers every time."""
    x = x.detach()
    inputs = [p for p in model.parameters() if p.requires_grad]
    if x.dtype.is_floating_point:
        inputs.append(x.requires_grad_())
    torch.manual_seed(5)
    y = model(x)
    return [y.detach(), *torch.autograd.grad((y * weights_like(torch, y)).sum(), inputs)]


def weights_like(torch, y):
    """Return numbers in the shape of y, which stand for dy."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)


def assert_same(torch, actual, desired, rtol=1e-12):
    for got, want in zip(actual, desired, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=0, atol=rtol * float(want.abs().max()))


def leaves_of(layer):
    """Return A, B and m of a layer with DoRA, and W, as the layer stores them."""
    if hasattr(layer.base_layer, "num_embeddings"):
        a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    else:
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return a, b, layer.lora_magnitude_vector["default"].weight, layer.base_layer.weight


def dense(torch, layer, x):
    """Return y by the dense formula, whose gradients go through the norm."""
    a, b, m, weight = leaves_of(layer)
    base, s = layer.base_layer, layer.scaling["default"]
    if not x.dtype.is_floating_point:
        v = weight.T + s * b @ a
        table = (m / v.norm(dim=1))[:, None] * v
        y = torch.nn.functional.embedding(x, table.T)
        return y * getattr(base, "embed_scale", 1.0)
    v = weight.flatten(1) + s * b.flatten(1) @ a.flatten(1)
    rows = (m.reshape(-1) / v.norm(dim=1))[:, None] * v
    function = getattr(torch.nn.functional, f"conv{x.ndim - 2}d")
    return function(x, rows.view_as(weight), base.bias, base.stride, base.padding, base.dilation)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", CASES)
def test_detached_equals_pefts_step_and_restore_equals_it_to_the_bit(
    peft, torch, name, dtype, dropout
):
    from doraxp.torch import accelerate

    model, x = (
        model_of(peft, torch, name, dtype=dtype, dropout=dropout),
        input_of(torch, name, dtype),
    )
    want = step(torch, model, x)
    with accelerate(model, norm_gradient="detached") as handle:
        assert handle.layers == (NAME,)
        assert dict(handle.left) == {}
        for _ in range(2):
            assert_same(torch, step(torch, model, x), want, {"float32": 1e-5}.get(dtype, 1e-12))
        ours = model.eval()(x).detach()
        with torch.no_grad():
            assert_same(torch, [model(x)], [ours], {"float32": 1e-6}.get(dtype, 1e-13))
    theirs = model(x).detach()
    assert_same(torch, [ours], [theirs], {"float32": 1e-5}.get(dtype, 1e-12))
    assert_same(torch, step(torch, model.train(), x), want, 0)


@pytest.mark.parametrize("trains_base", [False, True])
@pytest.mark.parametrize("name", [name for name in CASES if name != "embedding-padding"])
def test_exact_gives_the_gradient_of_the_dense_formula(peft, torch, name, trains_base):
    from doraxp.torch import accelerate

    model, x = model_of(peft, torch, name), input_of(torch, name)
    layer = model.base_model.model[0]
    if trains_base:
        layer.base_layer.requires_grad_()
    detached = step(torch, model, x)
    inputs = [p for p in model.parameters() if p.requires_grad]
    given = x.clone()
    if given.dtype.is_floating_point:
        inputs.append(given.requires_grad_())
    y = dense(torch, layer, given)
    slopes = torch.autograd.grad((y * weights_like(torch, y)).sum(), inputs)
    accelerate(model)
    got = step(torch, model, x)
    assert_same(torch, got, [y.detach(), *slopes])
    assert any(not torch.allclose(one, other) for one, other in zip(got, detached, strict=True))


def test_the_row_of_padding_gets_the_gradient_of_the_norm_alone(peft, torch):
    """PEFT gives A no gradient there, and the norm does not know about padding."""
    from doraxp.torch import accelerate

    model, plain = (model_of(peft, torch, name) for name in ("embedding-padding", "embedding"))
    layer, other = (each.base_model.model[0] for each in (model, plain))
    other.load_state_dict(layer.state_dict())
    ids = torch.tensor([[3, 0, 3], [10, 7, 3]])
    differences = []
    for each in (layer, other):
        theirs = step(torch, each, ids)[1]
        accelerate(each)
        differences.append(step(torch, each, ids)[1] - theirs)
    torch.testing.assert_close(*differences, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in CASES if name != "embedding-padding"])
def test_the_core_gives_pefts_output_and_its_detached_gradients(peft, torch, name):
    """The core computes with NumPy, from the arrays that PEFT's layer has."""
    model, x = model_of(peft, torch, name, dtype="float32"), input_of(torch, name, "float32")
    layer = model.base_model.model[0]
    base = layer.base_layer
    y, *slopes = step(torch, model, x)
    a, b, m, weight = (array.detach().numpy() for array in leaves_of(layer))
    adapter = Adapter(a.reshape(4, -1), b.reshape(-1, 4), m.reshape(-1))
    config = Config(4, 6, norm_gradient="detached")
    if name.startswith("embedding"):
        operator, bias = Embedding(float(getattr(base, "embed_scale", 1.0))), None
    else:
        padding = tuple((size - 1) // 2 for size in CASES[name][1])
        padding = padding if base.padding == "same" else base.padding
        operator = Convolution(base.stride, padding, base.dilation)
        bias = None if base.bias is None else base.bias.detach().numpy()
    got, cache = doraxp.forward(
        x.detach().numpy(), weight, adapter, config, bias=bias, operator=operator
    )
    found = doraxp.backward(weights_like(torch, y).numpy(), cache)
    actual = [got, *(each.reshape(-1) for each in found.adapter)]
    desired = [y, *(each.reshape(-1) for each in slopes[:3])]
    if found.x is not None:
        actual, desired = [*actual, found.x], [*desired, slopes[3]]
    assert_same(torch, map(torch.from_numpy, map(np.ascontiguousarray, actual)), desired, 1e-5)


@pytest.mark.parametrize("name", ["2d", "embedding"])
def test_states_of_a_layer_are_pefts(peft, torch, name):
    from doraxp.torch import accelerate

    model, x = model_of(peft, torch, name), input_of(torch, name)
    model.add_adapter("plain", peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["0"], use_dora=True))
    model.to(torch.float64).eval()
    want = {}
    for active in ("plain", "other", "default"):
        model.set_adapter(active)
        want[active] = model(x).detach()
    with model.disable_adapter():
        plain = model(x).detach()
    handle = accelerate(model)
    for active, y in want.items():
        model.set_adapter(active)
        assert_same(torch, [model(x).detach()], [y])
        assert handle.layers == (() if active == "plain" else (NAME,))
    with model.disable_adapter():
        assert handle.left[NAME] == "its adapters are disabled"
        assert torch.equal(model(x), plain)
    model.merge_adapter()
    assert handle.left[NAME] == "its adapters are merged"
    assert_same(torch, [model(x).detach()], [want["default"]], 1e-10)
    model.unmerge_adapter()
    layer = model.base_model.model[0]
    layer.set_adapter(["default", "other"])
    assert handle.left[NAME] == "it must have one active adapter, has ['default', 'other']"
    layer.set_adapter(["default"])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(torch, [other(x).detach()], [want["default"]])
        doraxp.torch.restore(other)
        assert type(other.base_model.model[0]).__module__.startswith("peft.")


@pytest.mark.parametrize("scaling", [0.0, -0.5, 2.0])
@pytest.mark.parametrize("name", ["2d", "embedding"])
def test_any_scaling_of_peft_gives_pefts_step(peft, torch, name, scaling):
    from doraxp.torch import accelerate

    model, x = model_of(peft, torch, name), input_of(torch, name)
    model.base_model.model[0].scaling["default"] = scaling
    want = step(torch, model, x)
    accelerate(model, "detached")
    for got, expected in zip(step(torch, model, x), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


LEFT = {
    "padding mode": (
        {"padding_mode": "reflect"},
        "its padding_mode must be 'zeros', got 'reflect'",
    ),
    "groups": ({"groups": 2}, "its groups must be 1, got 2: the norm that PEFT takes is another"),
    "dilation": (
        {"dilation": (1, 2)},
        "its dilation must be 1 where its kernel has more than 1 number, got (1, 2): PEFT's lora_A "
        "has no dilation",
    ),
    "kernel": ({"kernel_size": (3, 4)}, "its kernel must be odd for padding 'same', got (3, 4)"),
}


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd:UserWarning")
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("case", LEFT)
def test_convolutions_of_which_peft_has_no_dora_are_left_and_named(peft, torch, case):
    from doraxp.torch import accelerate

    options, reason = dict(LEFT[case][0]), LEFT[case][1]
    kernel = options.pop("kernel_size", 3)
    layers = [torch.nn.Conv2d(4, 6, kernel, padding="same", **options), torch.nn.Conv2d(6, 2, 1)]
    config = peft.LoraConfig(r=4, use_dora=True, target_modules=["0", "1"])
    model = peft.get_peft_model(torch.nn.Sequential(*layers), config)
    x = torch.randn(2, 4, 7, 6)
    want = model(x).detach()
    with accelerate(model) as handle:
        assert handle.layers == ("base_model.model.1",)
        assert dict(handle.left) == {NAME: reason}
        torch.testing.assert_close(model(x).detach(), want)


def test_peft_fails_for_a_dilated_convolution_and_has_another_norm_for_groups(peft, torch):
    """The two reasons above, seen in PEFT's own layers."""
    dilated = model_of(
        peft, torch, "2d", base=torch.nn.Conv2d(CHANNELS, 6, 3, padding=2, dilation=2)
    )
    with pytest.raises(RuntimeError, match="must match the size"):
        dilated(input_of(torch, "2d"))
    with pytest.warns(UserWarning, match="groups > 1"):
        grouped = model_of(peft, torch, "2d", base=torch.nn.Conv2d(4, 6, 1, groups=2, bias=False))
    layer = grouped.base_model.model[0]
    m = layer.lora_magnitude_vector["default"]
    # x W'ᵀ of the unit vectors gives W', whose norms by rows would be m.
    rows = grouped(torch.eye(4, dtype=torch.float64)[:, :, None, None])[..., 0, 0].T
    assert not torch.allclose(rows.norm(dim=1), m.weight.abs().reshape(-1))


def test_parts_of_other_classes_and_hooks_are_left_to_peft(peft, torch):
    from doraxp.torch import accelerate

    class OwnTensor(torch.Tensor):
        pass

    class Own(torch.nn.Conv2d):
        pass

    def own(parameter):
        return torch.nn.Parameter(parameter.detach().as_subclass(OwnTensor))

    def reason(name, change):
        model = model_of(peft, torch, name)
        handle = accelerate(model)
        assert handle.layers == (NAME,)
        change(model.base_model.model[0])
        return handle.left[NAME]

    def own_a(layer):
        layer.lora_A["default"].__class__ = Own

    def own_base(layer):
        layer.base_layer.__class__ = Own

    def own_leaf(layer):
        layer.lora_B["default"].weight = own(layer.lora_B["default"].weight)

    def own_table(layer):
        layer.base_layer.weight = own(layer.base_layer.weight)

    def own_magnitude(layer):
        holder = layer.lora_magnitude_vector["default"]
        holder.__class__ = type("Own", (type(holder),), {})

    def hooked(layer):
        layer.lora_magnitude_vector["default"].register_forward_hook(lambda *_: None)

    def hooked_a(layer):
        layer.lora_A["default"].register_forward_hook(lambda *_: None)

    assert "its lora_A and lora_B must be of torch.nn.Conv2d" in reason("2d", own_a)
    assert reason("2d", own_base) == "its base must be a torch.nn.Conv2d, got Own"
    for name in ("2d", "embedding"):
        assert "its magnitude must be of PEFT's class" in reason(name, own_magnitude)
        assert "its magnitude has hooks" in reason(name, hooked)
        assert reason(name, own_table) == "its weight must be a plain tensor, got OwnTensor"
    assert "its adapter must consist of plain tensors, got OwnTensor" in reason("2d", own_leaf)
    assert "its lora_A has hooks" in reason("2d", hooked_a)


def test_a_call_that_only_peft_knows_is_pefts(peft, torch):
    """x without a batch, for which PEFT's y gets a batch, and PEFT fails where there is a bias."""
    from doraxp.torch import accelerate

    base = torch.nn.Conv2d(CHANNELS, 6, 3, bias=False)
    model, x = model_of(peft, torch, "2d", base=base), input_of(torch, "2d")[0]
    want = model(x).detach()
    accelerate(model)
    assert_same(torch, [model(x).detach()], [want], 0)


@pytest.mark.parametrize("name", ["2d", "embedding"])
def test_a_bfloat16_model_gives_bfloat16_results(peft, torch, name):
    from doraxp.torch import accelerate

    for dropout in (0.0, 0.4):
        model = model_of(peft, torch, name, dtype="bfloat16", dropout=dropout)
        x = input_of(torch, name, "bfloat16")
        want = step(torch, model, x)
        accelerate(model, "detached")
        assert_same(torch, step(torch, model, x), want, 2**-4)


@pytest.mark.parametrize("name", ["2d", "embedding"])
def test_second_derivatives_are_those_of_the_dense_formula(peft, torch, name):
    from doraxp.torch import accelerate

    model, x = model_of(peft, torch, name), input_of(torch, name)
    accelerate(model)
    layer = model.base_model.model[0]
    results = []
    for function in (model, lambda x: dense(torch, layer, x)):
        trained = [p for p in model.parameters() if p.requires_grad]
        first = torch.autograd.grad(function(x).square().sum(), trained, create_graph=True)
        total = sum(each.square().sum() for each in first)
        results.append(torch.autograd.grad(total, trained))
    assert_same(torch, *results, 1e-11)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo does
@pytest.mark.parametrize("name", ["2d", "embedding"])
def test_autocast_checkpointing_and_compiling_work(peft, torch, name):
    from torch.utils.checkpoint import checkpoint

    from doraxp.torch import accelerate

    model, x = model_of(peft, torch, name, dtype="float32"), input_of(torch, name, "float32")
    wide = step(torch, model, x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        theirs = model(x)
        accelerate(model, "detached")
        ours = model(x)
        with torch.no_grad():
            evaluated = model(x)
    assert ours.dtype == theirs.dtype == evaluated.dtype
    errors = [float((y.detach().float() - wide).abs().max()) for y in (ours, evaluated, theirs)]
    assert max(errors[:2]) <= errors[2]
    want = step(torch, model, x)
    recomputed = copy.copy(model)
    recomputed.forward = lambda x: checkpoint(model.forward, x, use_reentrant=False)
    assert_same(torch, step(torch, recomputed, x), want, 0)
    torch.compiler.reset()
    layer = model.base_model.model[0]
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    results = []
    for module in (compiled, layer):
        y = module(x)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), parameters)])
    assert_same(torch, *results, 1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # it has a successor
@pytest.mark.parametrize("name", ["2d", "embedding"])
def test_tracing_and_mapping_work(peft, torch, name):
    from doraxp.torch import accelerate

    model, x = model_of(peft, torch, name), input_of(torch, name)
    want = model(x).detach()
    accelerate(model)
    parameters = dict(model.named_parameters())

    def call(x):
        return torch.func.functional_call(model, parameters, (x[None],))[0]

    mapped = torch.func.vmap(call)(x)
    assert_same(torch, [torch.jit.trace(model, x)(x).detach(), mapped.detach()], [want, want])


@pytest.mark.parametrize("name", ["2d", "embedding"])
def test_a_write_to_the_base_is_seen_by_the_next_call(peft, torch, name):
    from doraxp.torch import accelerate

    model, x = model_of(peft, torch, name), input_of(torch, name)
    accelerate(model, "detached")
    layer = model.base_model.model[0]
    with torch.no_grad():
        model(x)
        layer.base_layer.weight.mul_(1.5)
        torch.testing.assert_close(model(x), dense(torch, layer, x), rtol=1e-12, atol=1e-12)
        layer.base_layer.weight.data += 0.5
        torch.testing.assert_close(model(x), dense(torch, layer, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm_gradient", ["exact", "detached"])
@pytest.mark.parametrize("name", ["2d", "embedding"])
def test_a_row_of_zeros_gives_its_bias(peft, torch, name, norm_gradient):
    from doraxp.torch import accelerate

    model, x = model_of(peft, torch, name), input_of(torch, name)
    accelerate(model, norm_gradient)
    _, b, _, weight = leaves_of(model.base_model.model[0])
    with torch.no_grad():
        b[1] = 0
        (weight if name == "2d" else weight.T)[1] = 0
    y, *gradients = step(torch, model, x)
    row = y[:, 1] if name == "2d" else y[..., 1]
    bias = model.base_model.model[0].base_layer.bias[1] if name == "2d" else torch.tensor(0.0)
    torch.testing.assert_close(row, bias.to(row.dtype).expand_as(row))
    assert all(bool(each.isfinite().all()) for each in gradients)
    assert float(gradients[1].abs().sum()) > 0


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd:UserWarning")
def test_a_grouped_convolution_of_the_core_is_not_pefts(peft, torch):
    """The core's A and B stay in their group; PEFT's A sees all channels."""
    shape = LayerKind("conv", groups=2).matrix_shape((6, 2, 3, 3))
    layer = model_of(peft, torch, "2d", base=torch.nn.Conv2d(4, 6, 3, groups=2)).base_model.model[0]
    a, _, _, _ = leaves_of(layer)
    assert shape == (2, 3, 18)
    assert a.shape == (4, 4, 3, 3)
