"""`doraxp.torch` against torch.autograd of the dense formula, in float64."""

from __future__ import annotations

import copy
import gc
import weakref
from functools import partial

import numpy as np
import pytest

import doraxp
from doraxp import Adapter, Config

RULES = [(form, norm) for form in ("weight", "direction") for norm in ("exact", "detached")]
LEAVES = [(4, 6), (2, 6), (4, 2), (4,), (4,)]
SHAPES = {
    "matrix": [(5, 6), *LEAVES],
    "vector": [(6,), *LEAVES],
    "batch": [(3, 5, 6), *LEAVES],
    "stack": [(3, 5, 6), *((3, *leaf) for leaf in LEAVES)],
}


@pytest.fixture(autouse=True, params=["by definition", "by factors"])
def way(request, monkeypatch):
    """Compute small layers in both ways; large ones are always computed by their factors."""
    if request.param == "by factors":
        monkeypatch.setattr("doraxp.torch._definition._SMALL", 0)
    return request.param


def draw(torch, shapes=SHAPES["matrix"], dtype="float64"):
    rng = np.random.default_rng(5)
    made = [torch.tensor(rng.standard_normal(shape)) for shape in shapes]
    return [array.to(getattr(torch, dtype)).requires_grad_() for array in made]


def ours(config, x, w, a, b, m, bias=None):
    from doraxp.torch import dora_linear

    return dora_linear(x, w, Adapter(a, b, m), config, bias)


def dense(config, x, w, a, b, m, bias=None):
    d = w / w.norm(dim=-1, keepdim=True) if config.form == "direction" else w
    v = d + config.scaling * b @ a
    n = v.norm(dim=-1)
    n = n.detach() if config.norm_gradient == "detached" else n
    y = x @ ((m / n)[..., None] * v).mT
    return y if bias is None else y + (bias[..., None, :] if w.ndim > 2 else bias)


def assert_same(torch, actual, desired, rtol=1e-12):
    for got, want in zip(actual, desired, strict=True):
        want = want.detach()
        torch.testing.assert_close(got.detach(), want, rtol=0, atol=rtol * float(want.abs().max()))


def make(torch, config=None, *, train_base=False, bias=True):
    from doraxp.torch import DoRALinear

    torch.manual_seed(3)
    base = torch.nn.Linear(6, 4, bias=bias, dtype=torch.float64)
    layer = DoRALinear(base, config or Config(2, 3), seed=0, train_base=train_base)
    torch.nn.init.normal_(layer.lora_b)
    return base, layer


def step(torch, layer, x, run=None, create_graph=False):
    """Return y and the gradients of x and of the trained parameters."""
    x = x.detach().requires_grad_()
    y = layer(x) if run is None else run(x)
    trained = [p for p in layer.parameters() if p.requires_grad]
    return y, *torch.autograd.grad(y.square().sum(), [x, *trained], create_graph=create_graph)


def dense_y(layer, x):
    return dense(layer.config, x, layer.weight, *layer.adapter, layer.bias)


def dense_step(torch, layer, x):
    parts = layer.weight, *layer.adapter, layer.bias
    return step(torch, layer, x, lambda x: dense(layer.config, x, *parts))


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("form", "norm_gradient"), RULES)
def test_gradients_are_those_of_the_dense_formula(torch, shapes, form, norm_gradient):
    inputs = draw(torch, shapes)
    config = Config(2, 3, form=form, norm_gradient=norm_gradient)
    got, want = ours(config, *inputs), dense(config, *inputs)
    dy = torch.randn_like(want)
    assert_same(torch, [got], [want])
    grads = (torch.autograd.grad(y, inputs, dy) for y in (got, want))
    assert_same(torch, *grads)


@pytest.mark.parametrize("form", ["weight", "direction"])
@pytest.mark.parametrize("trained", range(6))
def test_gradcheck_of_each_input_alone_and_of_all(torch, form, trained):
    inputs = draw(torch)
    for index, array in enumerate(inputs):
        array.requires_grad_(trained in (0, index))  # 0: all
    assert torch.autograd.gradcheck(lambda *a: ours(Config(2, 3, form=form), *a), inputs)


@pytest.mark.parametrize(("form", "norm_gradient"), RULES)
def test_second_derivatives_are_those_of_the_dense_formula(torch, form, norm_gradient):
    inputs, config = draw(torch), Config(2, 3, form=form, norm_gradient=norm_gradient)

    def second(run, loss):
        first = torch.autograd.grad(loss(run(config, *inputs)), inputs[:5], create_graph=True)
        return torch.autograd.grad(sum(each.square().sum() for each in first), inputs[:5])

    for loss in (torch.sum, lambda y: y.square().sum()):  # dy has a graph or not
        assert_same(torch, second(ours, loss), second(dense, loss), 1e-11)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # jvp's own import
@pytest.mark.parametrize(
    "transform",
    ["grad", "jvp", "forward mode", "jacrev", "vmap over x", "vmap over A", "vmap over bias"],
)
@pytest.mark.parametrize("shapes", ["matrix", "stack"])
@pytest.mark.parametrize(("form", "norm_gradient"), RULES)
def test_torch_func_goes_through(torch, shapes, form, norm_gradient, transform):
    from torch import func
    from torch.autograd import forward_ad

    inputs = [array.detach() for array in draw(torch, SHAPES[shapes])]
    config = Config(2, 3, form=form, norm_gradient=norm_gradient)
    x, tangents = inputs[0], [torch.randn_like(array) for array in inputs]
    every = tuple(range(6))
    ours(config, *inputs)  # the plan of an evaluation knows no transform

    def forward_mode(run):
        with forward_ad.dual_level():
            m = forward_ad.make_dual(inputs[4], tangents[4])
            return [forward_ad.unpack_dual(run(config, *inputs[:4], m, inputs[5])).tangent]

    transforms = {
        "grad": lambda run: func.grad(lambda *a: run(config, *a).square().sum(), every)(*inputs),
        "jvp": lambda run: func.jvp(partial(run, config), tuple(inputs), tuple(tangents)),
        "jacrev": lambda run: func.jacrev(partial(run, config), (0, 3))(*inputs),
        "vmap over x": lambda run: [
            func.vmap(lambda x: run(config, x, *inputs[1:]))(torch.stack([x, 2 * x]))
        ],
        "vmap over A": lambda run: [
            func.vmap(lambda a: run(config, *inputs[:2], a, *inputs[3:]))(
                torch.stack([inputs[2], 2 * inputs[2]])
            )
        ],
        "vmap over bias": lambda run: [
            func.vmap(lambda bias: run(config, *inputs[:5], bias))(
                torch.stack([inputs[5], 2 * inputs[5]])
            )
        ],
        "forward mode": forward_mode,
    }
    got, want = transforms[transform](ours), transforms[transform](dense)
    assert_same(torch, got, want, 1e-11)


def test_torch_func_is_safe_at_zero_rows_and_at_the_limits_of_range(torch):
    from torch import func

    x, w, a, b, m, bias = (array.detach() for array in draw(torch, dtype="float32"))
    w[0], b[0] = 0, 0
    w[1], b[1] = w[1] * 1e-30, b[1] * 1e-30
    w[2], b[2] = w[2] * 1e30, b[2] * 1e30
    found = func.grad(lambda *p: ours(Config(2), *p).sum(), tuple(range(6)))(x, w, a, b, m, bias)
    y = ours(Config(2), x, w, a, b, m, bias)
    wide = [array.double() for array in (x, w, a, b, m, bias)]
    want = func.grad(lambda *p: dense(Config(2), *p).sum(), (0, 3, 4))(
        *(each[1:] if each.shape[0] == 4 else each for each in wide)
    )
    assert_same(torch, [y[:, 1:].double()], [dense(Config(2), *wide)[:, 1:]], 1e-6)
    assert all(torch.isfinite(each).all() for each in found)
    assert_same(torch, [found[4][1:].double()], [want[2]], 1e-6)
    assert torch.equal(found[3][0], torch.zeros(2))


def test_functional_call_of_the_module_has_its_gradients(torch):
    from torch import func

    _, layer = make(torch)
    x = torch.randn(5, 6, dtype=torch.float64)
    parameters = dict(layer.named_parameters())
    got = func.grad(lambda p: func.functional_call(layer, p, (x,)).square().sum())(parameters)
    want = dense_step(torch, layer, x)
    names = ["lora_a", "lora_b", "magnitude"]
    assert_same(torch, [got[name] for name in names], want[2:])


def test_a_zero_row_and_a_cancelled_row_are_safe(torch):
    inputs = draw(torch)
    with torch.no_grad():
        x, w, a, b, m, _ = inputs
        w[1], b[1] = 0, 0
        w[2] = -(b[2] @ a) * (1 - 1e-9)
    got = ours(Config(2), x, w, a, b, m)
    assert torch.equal(got[:, 1], torch.zeros(5, dtype=torch.float64))
    for gradient in torch.autograd.grad(got.sum(), inputs[:5]):
        assert torch.isfinite(gradient).all()
    keep = [0, 2, 3]
    want = dense(Config(2), x, w[keep], a, b[keep], m[keep])
    assert_same(torch, [got[:, keep]], [want], 1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_gradients_have_the_dtypes_of_their_arrays(torch, dtype):
    inputs = draw(torch, dtype=dtype)
    y = ours(Config(2), *inputs)
    got = torch.autograd.grad(y.sum(), inputs)
    wide = [array.detach().double().requires_grad_() for array in inputs]
    want = torch.autograd.grad(dense(Config(2), *wide).sum(), wide)
    assert {array.dtype for array in (y, *got)} == {inputs[0].dtype}
    eps = torch.finfo(y.dtype).eps
    assert_same(torch, [array.double() for array in got], want, 2 * max(eps, 1e-6))


@pytest.mark.parametrize("multiplies", [False, True])
def test_under_autocast_y_has_its_dtype_and_the_adapter_is_computed_in_float32(
    torch, monkeypatch, multiplies
):
    """A CPU that multiplies 16-bit numbers takes W and z in these too: mixed precision."""
    monkeypatch.setattr("doraxp.backends._torch.multiplies", lambda kind, dtype: multiplies)
    inputs = draw(torch, dtype="float32")
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(Config(2), *inputs)
        got = torch.autograd.grad(y.float().sum(), inputs)  # under autocast, as some trainers do
    x = inputs[0].detach().bfloat16().float().requires_grad_()
    wide = ours(Config(2), x, *inputs[1:])
    assert y.dtype == torch.bfloat16
    if multiplies:
        assert_same(torch, [y.float()], [wide], 2**-7)
    else:
        assert torch.equal(y, wide.bfloat16())
    want = torch.autograd.grad(wide.sum(), [x, *inputs[1:]])
    assert {gradient.dtype for gradient in got} == {torch.float32}
    assert_same(torch, got[1:], want[1:], 2**-7 if multiplies else 1e-6)
    assert_same(torch, got[:1], want[:1], 2**-7)  # dx went through the cast


def test_autocast_leaves_a_float64_x_alone(torch):
    config = Config(2)  # a plan holds for one object
    inputs = draw(torch, dtype="float32")
    x = inputs[0].detach().double().requires_grad_()
    want = ours(config, x, *inputs[1:])
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(config, x, *inputs[1:])
        with torch.no_grad():
            evaluations = [ours(config, x, *inputs[1:]) for _ in range(2)]
    assert y.dtype == torch.float64
    assert all(torch.equal(each, want) for each in (y, *evaluations))


@pytest.mark.parametrize("train_base", [False, True])
@pytest.mark.parametrize(("form", "norm_gradient"), RULES)
def test_the_module_has_the_dense_gradients(torch, form, norm_gradient, train_base):
    config = Config(2, 3, form=form, norm_gradient=norm_gradient)
    base, layer = make(torch, config, train_base=train_base)
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    assert_same(torch, step(torch, layer, x), dense_step(torch, layer, x))
    trained = [name for name, p in layer.named_parameters() if p.requires_grad]
    adapter = ["lora_a", "lora_b", "magnitude"]
    assert trained == (["weight", "bias", *adapter] if train_base else adapter)
    assert base.weight.requires_grad
    shared = layer.weight.data_ptr() == base.weight.data_ptr()
    assert shared != train_base


def test_activation_checkpointing_changes_nothing(torch):
    from torch.utils.checkpoint import checkpoint

    _, layer = make(torch)
    x = torch.randn(5, 6, dtype=torch.float64)
    got = step(torch, layer, x, lambda x: checkpoint(layer, x, use_reentrant=False))
    want = step(torch, layer, x)
    assert_same(torch, got, want, 0)
    x.requires_grad_()
    checkpoint(layer, x, use_reentrant=True).square().sum().backward()
    assert_same(torch, [x.grad, *(p.grad for p in layer.adapter)], want[1:], 0)


def test_a_checkpoint_with_exact_products_computes_the_forward_again_as_exactly(torch, monkeypatch):
    from torch.utils.checkpoint import checkpoint

    from doraxp.backends import exact_products

    monkeypatch.setattr("doraxp.backends._torch.multiplies", lambda kind, dtype: True)
    x, w, *leaves = draw(torch, dtype="bfloat16")[:5]
    inputs = [x, w.detach(), *(leaf.detach().float().requires_grad_() for leaf in leaves)]
    trained = [x, *inputs[2:]]
    run = partial(ours, Config(2))
    with exact_products():
        want = torch.autograd.grad(run(*inputs).sum(), trained)
        y = checkpoint(
            run, *inputs, use_reentrant=False,
            context_fn=lambda: (exact_products(), exact_products()),
        )  # fmt: skip
    assert all(map(torch.equal, torch.autograd.grad(y.sum(), trained), want))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo does
@pytest.mark.parametrize("train_base", [False, True])
def test_the_module_compiles_in_one_graph(torch, way, train_base):
    torch.compiler.reset()
    rtol = 1e-12 if way == "by definition" else 0  # the compiled one is by factors
    _, layer = make(torch, train_base=train_base)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for count in (5, 5, 9):  # another count: a graph of unknown sizes
        x = torch.randn(2, count, 6, dtype=torch.float64)
        assert_same(torch, step(torch, layer, x, compiled), step(torch, layer, x), rtol)
        with torch.no_grad():
            for p in layer.parameters():  # as an optimizer's step
                if p.requires_grad:
                    p.mul_(1.25)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])  # in float64 no result is cast
def test_the_operators_return_the_shapes_that_they_declare(torch, dtype):
    from doraxp.torch import _ops

    x, w, a, b, m, bias = draw(torch, SHAPES["stack"], dtype)
    rules = 2, 1.0, "weight", "exact"
    arguments = (x, w, a, b, m, bias, False, *rules)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(_ops.forward_op, arguments, test_utils=checks)
    _, z, low_rank = _ops.forward_op(*arguments)
    arguments = (torch.ones(3, 5, 4), x, w, a, b, m, z, low_rank)
    for train_base in (False, True):
        torch.library.opcheck(_ops.backward_op, (*arguments, train_base, *rules), test_utils=checks)


@pytest.mark.parametrize("shapes", ["matrix", "stack"])
def test_after_a_step_the_base_is_read_once_in_a_forward(torch, monkeypatch, shapes):
    """The product with x gives W Aᵀ too; z is contiguous all the same, as autograd was told."""
    from doraxp.backends._torch import TorchOperations
    from doraxp.torch import _kept
    from doraxp.torch._ops import forward_op

    x, w, *leaves = (array.detach() for array in draw(torch, SHAPES[shapes]))
    x = x[..., :1, :]  # few tokens compared with the weight
    rules = False, 2, 1.5, "weight", "exact"
    forward_op(x, w, *leaves, *rules)
    leaves[1] *= 0.1  # then no row of V cancels
    product, factors = TorchOperations.product, []

    def spy(ops, left, right):
        factors.extend((left.data_ptr(), right.data_ptr()))
        return product(ops, left, right)

    monkeypatch.setattr(TorchOperations, "product", spy)
    y, z, _ = forward_op(x, w, *leaves, *rules)
    assert factors.count(w.data_ptr()) == 1
    assert_same(torch, [y], [dense(Config(2, 3), x, w, *leaves)])
    assert z.is_contiguous()
    known, _ = _kept.recall(w, Adapter(*leaves[:3]), Config(2, 3), ops=TorchOperations(torch))
    assert known is not None


def test_fake_tensors_get_shapes_and_no_values(torch):
    """PyTorch's own way to see what a model would need, before there is memory for it."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        shapes = SHAPES["matrix"]
        inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
        y = ours(Config(2), *inputs)
        gradients = torch.autograd.grad(y.sum(), inputs)
        with torch.no_grad():
            evaluations = [ours(Config(2), *inputs) for _ in range(2)]
        merged = doraxp.merge(inputs[1], Adapter(*inputs[2:5]), Config(2))
    assert {each.shape for each in (y, *evaluations)} == {(5, 4)}
    assert [each.shape for each in gradients] == shapes
    assert merged.shape == (4, 6)


@pytest.mark.parametrize("trained", [False, True])
def test_a_forward_of_fake_tensors_changes_nothing_for_the_next_one_with_values(torch, trained):
    """Here the weight and the adapter are real, and no value is computed from them."""
    from torch._subclasses import FakeTensorMode

    _, layer = make(torch)
    x = torch.randn(5, 6, dtype=torch.float64)
    for _ in range(2):
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.set_grad_enabled(trained):
            assert layer(mode.from_tensor(x)).shape == (5, 4)
        with torch.no_grad():
            evaluations = [layer(x) for _ in range(2)]
        assert_same(torch, evaluations, [dense_y(layer, x)] * 2)
        assert_same(torch, step(torch, layer, x), dense_step(torch, layer, x))
        with torch.no_grad():
            layer(x)  # leaves a plan, which fake tensors may use


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # it has a successor
@pytest.mark.filterwarnings("ignore:Converting a tensor")  # the checks of shapes are not recorded
@pytest.mark.parametrize("tracer", ["torch.jit.trace", "make_fx"])
@pytest.mark.parametrize("planned", [False, True])
def test_a_record_of_a_tracer_follows_the_parameters(torch, tracer, planned):
    from torch.fx.experimental.proxy_tensor import make_fx

    _, layer = make(torch)
    x, other = torch.randn(2, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        if planned:
            layer(x), layer(x)
        if tracer == "make_fx":
            recorded = make_fx(layer)(x)
        else:
            recorded = torch.jit.trace(layer, x, check_trace=False)
        layer.lora_b.mul_(1.5)
    assert_same(torch, [recorded(other)], [dense_y(layer, other)])


def test_the_module_works_on_the_meta_device(torch):
    layer = make(torch)[1].to("meta")
    x = torch.ones(5, 6, device="meta", dtype=torch.float64, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert (y.shape, y.dtype, y.device.type) == ((5, 4), torch.float64, "meta")
    assert (x.grad.shape, layer.lora_b.grad.shape) == ((5, 6), (4, 2))


@pytest.mark.parametrize("create_graph", [False, True])
def test_gradients_of_two_uses_in_one_graph_add_up(torch, create_graph):
    _, layer = make(torch)
    x = torch.randn(5, 6, dtype=torch.float64)
    parts = layer.weight, *layer.adapter, layer.bias

    def twice(run):
        return lambda x: run(x) + 2 * run(torch.cat([run(x), x[:, 4:]], dim=-1))

    got = step(torch, layer, x, twice(layer), create_graph)
    want = step(torch, layer, x, twice(lambda x: dense(layer.config, x, *parts)), create_graph)
    assert_same(torch, got, want)


def test_two_adapters_of_one_weight_go_back_in_any_order(torch):
    x, w, a, b, m, bias = draw(torch)
    others = [(2 * leaf).detach().requires_grad_() for leaf in (a, b, m)]
    inputs = [x, w, a, b, m, bias, *others]
    config = Config(2)

    def total(run):
        return (run(config, x, w, a, b, m, bias) * run(config, x, w, *others)).sum()

    grads = (torch.autograd.grad(total(run), inputs) for run in (ours, dense))
    assert_same(torch, *grads)


def unseen(torch, p):
    with torch.autograd._unsafe_preserve_version_counter(p):
        p.mul_(1.5)


CHANGES = {
    "an optimizer's step": lambda torch, p: torch.optim.SGD([p], lr=0.5).step(),
    "in place": lambda torch, p: p.mul_(1.5),
    "other memory": lambda torch, p: setattr(p, "data", p.data * 1.5),
    "in place through .data": lambda torch, p: p.data.mul_(1.5),
    "through a NumPy view": lambda torch, p: np.multiply(p.numpy(), 1.5, out=p.numpy()),
    "as FSDP fills its buffers": lambda torch, p: unseen(torch, p),
    "there and back": lambda torch, p: [setattr(p, "data", p.data.clone() * 1.2) for _ in "ab"],
}


def test_a_prepared_norm_is_of_the_values_of_the_adapter_and_not_of_its_bits(torch):
    x, weight, a, b, _ = (array.detach() for array in draw(torch, SHAPES["matrix"][:5]))
    magnitude = torch.tensor([0.0, np.nan, 1.0, 2.0], dtype=torch.float64)
    prepared = doraxp.prepare(weight, Adapter(a, b, magnitude), Config(2))

    def run(*values):
        changed = Adapter(a, b, torch.tensor(values, dtype=torch.float64))
        doraxp.forward(x, weight, changed, Config(2), prepared=prepared)

    run(-0.0, -np.nan, 1.0, 2.0)
    run(0.0, -np.nan, 1.0, 2.0)
    other = Adapter(a.mT.contiguous().mT, b, magnitude)  # the same numbers in another order
    doraxp.forward(x, weight, other, Config(2), prepared=prepared)
    for values in [(1, np.nan, 1, 2), (-0.0, 0, 1, 2), (-0.0, np.nan, 1, np.nan)]:
        with pytest.raises(ValueError, match="the adapter has changed"):
            run(*values)


def test_a_prepared_norm_is_refused_with_the_same_bits_in_another_dtype(torch):
    x, weight, a, b, m = (
        array.detach() for array in draw(torch, SHAPES["matrix"][:5], dtype="float16")
    )
    prepared = doraxp.prepare(weight, Adapter(a, b, m), Config(2))
    other = Adapter(a, b.view(torch.bfloat16), m)
    with pytest.raises(ValueError, match="the adapter has changed"):
        doraxp.forward(x, weight, other, Config(2), prepared=prepared)


@pytest.mark.parametrize("name", ["weight", "lora_a", "lora_b", "magnitude"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_change_of_an_array_is_noticed(torch, name, change):
    _, layer = make(torch)
    layer.weight.grad = torch.randn_like(layer.weight)  # frozen, but stepped by the test
    x = torch.randn(5, 6, dtype=torch.float64)
    layer(x).square().sum().backward()
    with torch.no_grad():
        change(torch, getattr(layer, name))
    assert_same(torch, step(torch, layer, x), dense_step(torch, layer, x))


@pytest.mark.parametrize("name", ["weight", "lora_a", "lora_b", "magnitude"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("train_base", [False, True])
def test_every_change_of_an_array_is_noticed_in_evaluation(torch, name, change, train_base):
    _, layer = make(torch, train_base=train_base)
    layer.weight.grad = torch.randn_like(layer.weight)  # frozen, but stepped by the test
    for parameter in layer.adapter:
        parameter.grad = torch.randn_like(parameter)
    x = torch.randn(5, 6, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(3):
            y = layer(x)
            assert_same(torch, [y], [dense_y(layer, x)])
        change(torch, getattr(layer, name))
        for _ in range(3):
            y = layer(x)
            assert_same(torch, [y], [dense_y(layer, x)])


def test_evaluations_take_any_x_bias_and_config_and_training_in_between(torch):
    _, layer = make(torch)
    shapes = [(5, 6), (6,), (2, 3, 6), (1, 6)]
    configs = [layer.config, Config(2, 7), Config(2, 3, form="direction")]
    for config in (*configs, *configs):
        layer.config = config
        for shape in (*shapes, *shapes):
            x = torch.randn(shape, dtype=torch.float64)
            with torch.no_grad():
                y = layer(x)
            assert_same(torch, [y], [dense_y(layer, x)])
            low = layer(x.float())
            assert low.dtype == torch.float32
            layer(x).sum().backward()
            with torch.no_grad():
                layer.bias.mul_(1.5)
                layer.lora_b.data.mul_(0.9)


@pytest.mark.parametrize("form", ["weight", "direction"])
@pytest.mark.parametrize("shape", [(5, 6), (6,), (2, 3, 6), (0, 6), (2, 0, 6)])
def test_evaluations_in_a_row_are_the_dense_formula(torch, shape, form):
    config = Config(2, 3, form=form)  # a plan holds for one object
    _, *arrays = (array.detach() for array in draw(torch))
    for given in (arrays, arrays[:-1]):  # with and without a bias
        for _ in range(3):
            x = torch.randn(shape, dtype=torch.float64)
            y, want = ours(config, x, *given), dense(config, x, *given)
            torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("base", ["bfloat16", "float32"])
def test_evaluations_in_a_row_take_an_x_of_another_dtype(torch, base, dtype):
    config = Config(2)  # a plan holds for one object
    x, w, *leaves = (array.detach() for array in draw(torch, dtype=base))
    x, leaves = x.to(getattr(torch, dtype)), [leaf.float() for leaf in leaves]
    want = dense(config, *(array.double() for array in (x, w, *leaves)))
    for _ in range(3):
        y = ours(config, x, w, *leaves)
        assert y.dtype == x.dtype
        assert_same(torch, [y.double()], [want], 4 * max(2**-24, torch.finfo(y.dtype).eps))


@pytest.mark.parametrize("form", ["weight", "direction"])
@pytest.mark.parametrize("shape", [(5, 6), (6,), (2, 3, 6)])
def test_evaluations_in_a_row_round_as_training_does_in_mixed_precision(
    torch, monkeypatch, shape, form
):
    monkeypatch.setattr("doraxp.backends._torch.multiplies", lambda kind, dtype: True)
    config = Config(2, 3, form=form)  # a plan holds for one object
    x, w, a, b, m, bias = (array.detach() for array in draw(torch, [shape, *LEAVES], "bfloat16"))
    a, b, m = (leaf.float() for leaf in (a, b, m))
    for given in (bias, bias.float(), None):
        evaluations = [ours(config, x, w, a, b, m, given) for _ in range(3)]
        trained = ours(config, x, w, a, b, m.clone().requires_grad_(), given)
        assert all(torch.equal(y, trained) for y in evaluations)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # PyTorch's
def test_a_planned_evaluation_is_not_checked_again_nor_compiled(torch, monkeypatch):
    _, layer = make(torch)
    x = torch.randn(5, 6, dtype=torch.float64)
    with torch.no_grad():
        want = layer(x)
        torch.compiler.reset()
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        assert_same(torch, [compiled(x)], [want])
        monkeypatch.setattr("doraxp.torch._function.check_call", None)
        assert torch.equal(layer(x), want)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_evaluations_in_a_row_read_a_row_that_cancels_from_v(torch, dtype):
    config = Config(2)  # a plan holds for one object
    x, w, a, b, m = (array.detach() for array in draw(torch, SHAPES["matrix"][:5], "float32"))
    a[0], b[0] = w[0] * (1 + 1e-6), torch.tensor([-1.0, 0.0])
    x, w = (array.to(getattr(torch, dtype)) for array in (x, w))
    evaluations = [ours(config, x, w, a, b, m) for _ in range(3)]
    trained = ours(config, x, w, a, b, m.clone().requires_grad_())
    assert all(torch.equal(y, trained) for y in evaluations)


def test_after_evaluations_in_mixed_precision_pytorch_may_differentiate_map_and_free(
    torch, monkeypatch
):
    from torch.multiprocessing.reductions import StorageWeakRef

    monkeypatch.setattr("doraxp.backends._torch.multiplies", lambda kind, dtype: True)
    config = Config(2)  # a plan holds for one object
    x, w, a, b, m, bias = (array.detach() for array in draw(torch, dtype="bfloat16"))
    w = w.clone()  # in memory that nothing else holds
    want = dense(config, *(array.double() for array in (x, w, a, b, m, bias)))
    for trained in (x, bias):
        evaluations = [ours(config, x, w, a, b, m, bias) for _ in range(2)]
        assert_same(torch, [y.double() for y in evaluations], [want] * 2, 2**-6)
        trained.requires_grad_()
        y = ours(config, x, w, a, b, m, bias)
        (gradient,) = torch.autograd.grad(y.sum(), trained)
        assert gradient.shape == trained.shape
        trained.requires_grad_(False)
    ours(config, x, w, a, b, m, bias)
    (mapped,) = torch.vmap(lambda x: ours(config, x, w, a, b, m, bias))(x[None])
    assert_same(torch, [mapped.double()], [want], 2**-6)
    memory = StorageWeakRef(w.untyped_storage())
    w.data = torch.empty(0, dtype=torch.bfloat16)
    assert memory.expired()


@pytest.mark.parametrize("multiplies", [False, True])
def test_an_evaluation_is_as_exact_as_it_is_asked_to_be(torch, monkeypatch, way, multiplies):
    from doraxp.backends import exact_products

    monkeypatch.setattr("doraxp.backends._torch.multiplies", lambda kind, dtype: multiplies)
    config = Config(2)  # a plan holds for one object
    x, w, *leaves, bias = (array.detach() for array in draw(torch, dtype="bfloat16"))
    leaves, bias = [leaf.float() for leaf in leaves], bias.float()

    def evaluate():
        with torch.no_grad():
            return [ours(config, x, w, *leaves, bias) for _ in range(3)]

    usual = evaluate()
    with exact_products():
        exact = evaluate()
    again = evaluate()
    assert all(torch.equal(y, usual[0]) for y in (*usual, *again))
    assert all(torch.equal(y, exact[0]) for y in exact)
    is_mixed = multiplies and way == "by factors"
    assert torch.equal(exact[0], usual[0]) != is_mixed


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_a_fresh_adapter_whose_m_is_pytorchs_norm_has_a_gain_of_one(torch, dtype):
    """PEFT's: it changes no bit of the base's output then."""
    torch.manual_seed(0)
    weight = torch.randn(24, 40, dtype=torch.float64).to(getattr(torch, dtype))
    adapter = doraxp.init(weight, Config(2), seed=0)
    norms = torch.linalg.vector_norm(weight.to(adapter.magnitude.dtype), dim=1)
    gain = doraxp.prepare(weight, adapter._replace(magnitude=norms), Config(2)).gain
    assert torch.equal(gain, torch.ones_like(gain))


LAYOUTS = {
    "transposed": lambda torch, w, *leaves: (w.mT, *leaves),
    "fewer rows": lambda torch, w, a, b, m: (w[:4], a, b[:4], m[:4]),
    "another dtype": lambda torch, w, *leaves: (w.view(torch.bfloat16), *leaves),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_new_layout_in_the_same_memory_is_noticed_in_evaluation(torch, layout):
    config = Config(2)  # a plan holds for one object
    shapes = [(5, 6), (6, 6), (2, 6), (6, 2), (6,)]
    x, *arrays = (array.detach() for array in draw(torch, shapes, "float16"))
    for _ in range(2):
        got = ours(config, x, *arrays).double()
        want = dense(config, x.double(), *(array.double() for array in arrays))
        assert_same(torch, [got], [want], 2**-9)
        for array, now in zip(arrays, layout(torch, *arrays), strict=True):
            array.data = now


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", ["weight", "lora_a", "lora_b", "magnitude"])
def test_a_write_to_a_single_number_is_noticed_if_pytorch_counts_it(torch, name, trained):
    config = Config(2)  # a plan holds for one object
    shapes = {"x": (2, 300), "weight": (300, 300), "lora_a": (2, 300), "lora_b": (300, 2)}
    arrays = dict(zip(shapes, draw(torch, shapes.values()), strict=True))
    arrays = {key: array.detach() for key, array in arrays.items()}
    arrays["magnitude"] = torch.ones(300, dtype=torch.float64)
    for place in range(290, 300):
        arrays["magnitude"].requires_grad_(trained)
        assert_same(torch, [ours(config, *arrays.values())], [dense(config, *arrays.values())])
        with torch.no_grad():
            arrays[name].view(-1)[place] += 10


def test_an_adapter_that_is_made_anew_for_each_evaluation_is_noticed(torch):
    """It has the address and the version of the one before, and few numbers differ."""
    config = Config(2)  # a plan holds for one object
    shapes = [(2, 8), (300, 8), (2, 8), (300, 2), (300,)]
    x, w, a, b, m = (array.detach() for array in draw(torch, shapes))
    memory = b.numpy()
    for row in range(0, 300, 7):
        memory[row] *= 3
        b = torch.from_numpy(memory)
        assert_same(torch, [ours(config, x, w, a, b, m)], [dense(config, x, w, a, b, m)])


@pytest.mark.parametrize("part", range(8))
@pytest.mark.parametrize("shape", [(512, 512), (100, 512), (512, 96), (16, 1024), (1024, 16)])
def test_a_write_through_data_to_an_eighth_of_the_rows_or_columns_is_noticed(torch, shape, part):
    config = Config(2)  # a plan holds for one object
    x, w, a, b, m = (
        array.detach()
        for array in draw(torch, [(2, shape[1]), shape, (2, shape[1]), (shape[0], 2), shape[:1]])
    )
    for axis in (0, 1):
        ours(config, x, w, a, b, m)
        size = shape[axis] // 8
        w.data.narrow(axis, part * size, size).mul_(1.5)
        for trained in (False, True):
            got = ours(config, x, w, a, b, m.requires_grad_(trained))
            assert_same(torch, [got], [dense(config, x, w, a, b, m)])
        m.requires_grad_(False)


@pytest.mark.parametrize("trained", [False, True])
def test_pytorch_may_free_and_resize_the_memory_of_each_array(torch, trained):
    """FSDP does, between two forwards."""
    from torch.multiprocessing.reductions import StorageWeakRef

    _, layer = make(torch)
    x = torch.randn(5, 6, dtype=torch.float64)
    for parameter in (layer.weight, *layer.adapter):
        parameter.data = parameter.data.clone()  # memory that nothing else holds
    for _ in range(3):
        with torch.set_grad_enabled(trained):
            layer(x)
    for parameter in (layer.weight, *layer.adapter):
        storage = parameter.untyped_storage()
        size, numbers = storage.nbytes(), parameter.detach().clone()
        storage.resize_(0)
        storage.resize_(size)
        parameter.data.copy_(numbers)
    assert_same(torch, [layer(x)], [dense_y(layer, x)])
    memory = StorageWeakRef(layer.weight.untyped_storage())
    layer.weight.data = torch.empty(0, dtype=torch.float64)
    assert memory.expired()


def test_a_new_config_is_used_by_the_next_forward(torch):
    _, layer = make(torch)
    x = torch.randn(5, 6, dtype=torch.float64)
    layer(x)
    layer.config = Config(2, 7, form="direction", norm_gradient="detached")
    assert_same(torch, step(torch, layer, x), dense_step(torch, layer, x))


def test_gradients_are_the_same_where_values_are_not_read(torch, monkeypatch):
    from doraxp.backends._torch import TorchOperations

    monkeypatch.setattr(TorchOperations, "can_read_values", lambda self, array: False)
    _, layer = make(torch)
    x = torch.randn(5, 6, dtype=torch.float64)
    for _ in range(2):
        assert_same(torch, step(torch, layer, x), dense_step(torch, layer, x))
        layer.lora_b.data.mul_(2)  # a write that changes no version, as some optimizers make


def test_the_repr_shows_sizes_rank_and_scaling(torch):
    _, layer = make(torch)
    assert str(layer) == "DoRALinear(in=6, out=4, bias=True, rank=2, scaling=1.5)"


def test_a_write_through_data_to_the_adapter_is_noticed(torch):
    _, layer = make(torch)
    x = torch.randn(5, 6, dtype=torch.float64)
    layer(x)
    layer.lora_b.data.mul_(2)
    assert_same(torch, step(torch, layer, x), dense_step(torch, layer, x))


def test_training_goes_on_after_inference_mode(torch):
    base, layer = make(torch)
    x = torch.randn(5, 6, dtype=torch.float64)
    with torch.inference_mode():
        y = layer(x)
        w = base.weight.clone()  # has no version, so nothing is kept of it
        for factor in (1, 2):
            w.mul_(factor)
            assert_same(
                torch,
                [ours(layer.config, x, w, *layer.adapter)],
                [dense(layer.config, x, w, *layer.adapter)],
            )
    want = dense_step(torch, layer, x)
    assert_same(torch, [y], want[:1])
    assert_same(torch, step(torch, layer, x), want)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_evaluations_in_a_row_have_the_same_bits(torch, dtype):
    """For a bias of each dtype too."""
    config = Config(2)  # a plan holds for one object
    x, w, a, b, m, bias = (array.detach() for array in draw(torch, dtype="float32"))
    bias = (1000 * bias.double() / 3).to(getattr(torch, dtype))
    first, *others = (ours(config, x, w, a, b, m, bias) for _ in range(3))
    assert all(torch.equal(other, first) for other in others)


@pytest.mark.parametrize("reason", ["a stack", "autocast", "a view", "a subclass", "inference"])
def test_an_evaluation_that_cannot_be_planned_leaves_nothing_behind(torch, reason):
    from doraxp.torch import _evaluation

    class Other(torch.Tensor):
        """A tensor whose memory may be elsewhere."""

    config, shapes = Config(2), SHAPES["stack" if reason == "a stack" else "matrix"]
    with torch.inference_mode(reason == "inference"):
        x, w, a, b, m, bias = (array.detach().clone() for array in draw(torch, shapes, "float32"))
    if reason == "a view":
        a = a.mT.contiguous().mT
    if reason == "a subclass":
        b = b.as_subclass(Other)
    want = dense(config, x, w, a, b, m, bias)
    with torch.autocast("cpu", torch.bfloat16, enabled=reason == "autocast"):
        for _ in range(3):
            y = ours(config, x, w, a, b, m, bias)
            assert_same(torch, [y.float()], [want], 2**-6 if reason == "autocast" else 1e-6)
    assert id(w) not in _evaluation._plans


def test_a_forward_in_training_ends_the_plan_of_an_evaluation(torch):
    """Then the next one compares the whole adapter."""
    config = Config(2)  # a plan holds for one object
    shapes = [(2, 8), (300, 8), (2, 8), (300, 2), (300,)]
    x, w, a, b, m = (array.detach() for array in draw(torch, shapes))
    for row in range(0, 300, 7):
        ours(config, x, w, a, b, m)
        b.data[row] *= 3
        ours(config, x, w, a, b, m.requires_grad_())
        m.requires_grad_(False)
        assert_same(torch, [ours(config, x, w, a, b, m)], [dense(config, x, w, a, b, m)])


def test_both_products_under_autocast_have_its_dtype(torch, monkeypatch):
    from doraxp.backends import _torch

    monkeypatch.setattr(_torch, "multiplies", lambda kind, dtype: True)
    add, dtypes = _torch._add_product, []

    def spy(total, left, right):
        dtypes.extend((left.dtype, right.dtype))
        return add(total, left, right)

    monkeypatch.setattr(_torch, "_add_product", spy)
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(Config(2), *draw(torch, dtype="float32"))
    y.sum().backward()
    assert dtypes == [torch.bfloat16] * 4


@pytest.mark.parametrize(
    "shape", [(512, 512), (300, 700), (700, 300), (16, 512), (512, 16), (7, 12), (500,), (1, 1)]
)
def test_a_sample_has_a_number_of_each_row_and_column_and_few_more(torch, shape):
    from doraxp.torch import _kept

    numbers = _kept.sample(torch.arange(int(np.prod(shape))).reshape(shape))
    rows, columns = numbers // shape[-1], numbers % shape[-1]
    assert (len(set(rows.tolist())), len(set(columns.tolist()))) == (
        int(np.prod(shape[:-1])), shape[-1],
    )  # fmt: skip
    assert len(numbers) <= max(100, 1.8 * max(shape))


def parts(array):
    """Return an index of each row, each column and, for a vector, each number."""
    if array.ndim == 1:
        return list(range(len(array)))
    return [*range(array.shape[0]), *((slice(None), i) for i in range(array.shape[1]))]


@pytest.mark.parametrize("name", ["weight", "lora_a", "lora_b", "magnitude"])
@pytest.mark.parametrize("evaluation", [False, True])
def test_a_write_of_a_row_or_a_column_through_data_is_noticed(torch, name, evaluation):
    """In evaluation, of the adapter alone: fewer numbers of the weight are compared then."""
    _, layer = make(torch)
    x = torch.randn(5, 6, dtype=torch.float64)
    array = getattr(layer, name)
    for part in parts(array) if (name, evaluation) != ("weight", True) else []:
        with torch.no_grad():
            layer(x), layer(x)
        if not evaluation:
            layer(x).sum().backward()
        array.data[part] *= 1.5
        with torch.set_grad_enabled(not evaluation):
            assert_same(torch, [layer(x)], [dense_y(layer, x)])


def test_many_tokens_of_a_small_layer_are_multiplied_in_16_bits_where_the_device_can(
    torch, monkeypatch
):
    monkeypatch.setattr("doraxp.backends._torch.multiplies", lambda kind, dtype: True)
    monkeypatch.setattr("doraxp.torch._definition._FEW", 4 * 6 * 5 - 1)
    config = Config(2)  # a plan holds for one object
    x, w, a, b, m, bias = (array.detach() for array in draw(torch, dtype="bfloat16"))
    a, b, m = (leaf.float().requires_grad_() for leaf in (a, b, m))
    want = ours(config, x, w, a, b, m, bias)
    with torch.no_grad():
        assert all(torch.equal(ours(config, x, w, a, b, m, bias), want) for _ in range(3))


def test_an_evaluation_under_autocast_is_that_of_training(torch, monkeypatch):
    """It does not use the plan of an evaluation without autocast, whose products are in float32."""
    monkeypatch.setattr("doraxp.backends._torch.multiplies", lambda kind, dtype: True)
    config = Config(2)  # a plan holds for one object
    x, w, a, b, m, bias = (array.detach() for array in draw(torch, dtype="float32"))
    x = x.bfloat16()
    wide = ours(config, x, w, a, b, m, bias)
    with torch.autocast("cpu", torch.bfloat16):
        found = ours(config, x, w, a, b, m, bias)
        trained = ours(config, x, w, a, b, m.requires_grad_(), bias)
    assert torch.equal(found, trained)
    assert not torch.equal(found, wide)


def test_a_graph_whose_tensors_are_packed_holds_no_weight(torch):
    """As `torch.autograd.graph.save_on_cpu` packs them."""
    from torch.multiprocessing.reductions import StorageWeakRef

    inputs = draw(torch)
    want = torch.autograd.grad(dense(Config(2), *inputs).sum(), inputs[2:])
    inputs[1] = inputs[1].detach().clone()
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda packed: packed):
        y = ours(Config(2), *inputs)
    memory = StorageWeakRef(inputs[1].untyped_storage())
    inputs[1] = None
    gc.collect()
    assert memory.expired()
    assert_same(torch, torch.autograd.grad(y.sum(), inputs[2:]), want)


def test_nothing_is_kept_of_a_weight_that_is_trained(torch):
    """It changes at each step."""
    from doraxp.torch import _kept

    _, layer = make(torch, train_base=True)
    layer(torch.randn(5, 6, dtype=torch.float64)).sum().backward()
    assert layer.weight not in _kept._kept


def test_a_freed_weight_leaves_nothing_behind(torch, way):
    from doraxp.torch import _evaluation, _kept

    _, layer = make(torch)
    layer(torch.ones(1, 6, dtype=torch.float64)).sum().backward()
    gone, key = (weakref.ref(layer), weakref.ref(layer.weight)), id(layer.weight)
    with torch.no_grad():
        layer(torch.ones(1, 6, dtype=torch.float64))
    assert (layer.weight in _kept._kept) == (way == "by factors")
    assert key in _evaluation._plans
    del layer
    gc.collect()
    assert [reference() for reference in gone] == [None, None]
    assert key not in _evaluation._plans


@pytest.mark.parametrize("scale", [1, 2.0**-200])  # of W; its squares underflow in float32
@pytest.mark.parametrize("name", ["lora_a", "lora_b", "magnitude"])
def test_an_evaluation_keeps_no_array_of_an_adapter_that_is_gone(torch, name, scale):
    """An array may know its model, by a hook for instance, and then the weight."""
    from doraxp.torch import _evaluation

    _, layer = make(torch)
    x = torch.ones(1, 6, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.mul_(scale)
        layer.lora_b.mul_(scale)
        layer(x)
    key, weight = id(layer.weight), layer.weight
    gone = weakref.ref(getattr(layer, name))
    setattr(layer, name, torch.nn.Parameter(torch.ones_like(getattr(layer, name))))
    assert gone() is None
    assert key not in _evaluation._plans
    with torch.no_grad():
        assert_same(torch, [layer(x)], [dense_y(layer, x)])
    getattr(layer, name).register_hook(partial(print, layer))
    gone = weakref.ref(weight)
    del layer, weight
    gc.collect()
    assert gone() is None
    assert key not in _evaluation._plans


@pytest.mark.parametrize("bias", [False, True])
def test_a_saved_and_loaded_state_gives_the_same_module(torch, bias, tmp_path):
    _, layer = make(torch, bias=bias)
    _, other = make(torch, bias=bias)
    x = torch.randn(5, 6, dtype=torch.float64)
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(1.5)
        other(x)
    torch.save(layer.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert set(layer.state_dict()) == {"weight", "lora_a", "lora_b", "magnitude"} | (
        {"bias"} if bias else set()
    )
    assert torch.equal(other(x), layer(x))


def test_a_copy_has_its_own_parameters(torch):
    _, layer = make(torch)
    x = torch.randn(5, 6, dtype=torch.float64)
    y = layer(x)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight.mul_(2), other.magnitude.mul_(3)
    assert torch.equal(layer(x), y)
    assert_same(torch, step(torch, other, x), dense_step(torch, other, x))


def test_training_and_evaluation_mode_compute_the_same(torch):
    _, layer = make(torch)
    x = torch.randn(5, 6, dtype=torch.float64)
    y = layer(x)
    with torch.no_grad():
        assert torch.equal(layer.eval()(x), y)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", ["weight", "direction"])
def test_merge_returns_a_plain_layer_with_the_same_outputs(torch, form, bias):
    base, layer = make(torch, Config(2, 3, form=form), bias=bias)
    merged = layer.merge()
    x = torch.randn(5, 6, dtype=torch.float64)
    assert type(merged) is torch.nn.Linear
    assert_same(torch, [merged(x)], [layer(x)])
    assert {p.requires_grad for p in merged.parameters()} == {True}
    pointers = {p.data_ptr() for p in (*layer.parameters(), *base.parameters())}
    assert not pointers & {p.data_ptr() for p in merged.parameters()}


def test_a_fresh_module_equals_its_base(torch):
    from doraxp.torch import DoRALinear

    base = torch.nn.Linear(6, 4)
    layer = DoRALinear(base, Config(2), seed=7)
    assert torch.equal(layer.merge().weight, base.weight)
    assert torch.equal(layer.lora_a, doraxp.init(base.weight, Config(2), seed=7).lora_a)


@pytest.mark.parametrize("stack", [(), (2,)])
def test_accumulate_adds_in_place_and_equals_the_generic_operation(torch, stack):
    from doraxp.backends import Operations, operations

    total, left, right = (torch.randn(*stack, *s) for s in ((5, 6), (5, 2), (2, 6)))
    ops = operations(total=total)
    assert type(ops) is not Operations
    want = Operations(ops.xp).accumulate(total.clone(), left, right)
    pointer = total.data_ptr()
    got = ops.accumulate(total, left, right)
    assert got.data_ptr() == pointer
    assert_same(torch, [got], [want], 1e-6)


@pytest.mark.parametrize("stack", [(), (2,)])
def test_output_gradients_equal_the_generic_operation(torch, stack):
    from doraxp.backends import Operations, operations

    shapes = (5, 6), (5, 6), (6,), (6,), (6, 2)
    d, z, gain, norm, scaled_b = (torch.randn(*stack, *shape) for shape in shapes)
    given, ops = d.clone(), operations(d=d)
    for exact, with_bias in ((True, True), (False, False)):
        got, want = (
            each.output_gradients(d, z, gain, norm, scaled_b, exact=exact, with_bias=with_bias)
            for each in (ops, Operations(ops.xp))
        )
        found = [array is not None for array in got]
        assert found == [array is not None for array in want]
        assert_same(torch, *([a for a in arrays if a is not None] for arrays in (got, want)), 1e-6)
    assert torch.equal(d, given)


@pytest.mark.parametrize("known", [False, True])
def test_autograd_differentiates_the_functions_of_the_core(torch, known):
    """For x and dy, and for dy alone, where z is outside of the graph."""
    x, w, a, b, m = (array.detach() for array in draw(torch)[:5])
    dy = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)

    def dx(x, dy):
        _, cache = doraxp.forward(x, w, Adapter(a, b, m), Config(2, 3))
        return doraxp.backward(dy, cache).x

    assert torch.autograd.gradcheck(dx, (x if known else x.requires_grad_(), dy))


@pytest.mark.parametrize("evaluated", [False, True])
def test_bad_arguments_are_refused(torch, evaluated):
    from doraxp.torch import DoRALinear

    with pytest.raises(TypeError, match=r"^base must be of type Linear, got Identity$"):
        DoRALinear(torch.nn.Identity(), Config(2), seed=0)
    with pytest.raises(ValueError, match="rank must be in"):
        DoRALinear(torch.nn.Linear(3, 3), Config(4), seed=0)
    x, w, a, b, m, bias = draw(torch)
    config = Config(2)
    if evaluated:
        x, w, a, b, m, bias = (array.detach() for array in (x, w, a, b, m, bias))
        ours(config, x, w, a, b, m, bias)
    for index in range(6):
        arrays = [x, w, a, b, m, bias]
        arrays[index] = arrays[index].detach().numpy()
        with pytest.raises(TypeError, match=r"must be of type Tensor, got ndarray$"):
            ours(config, *arrays)
    if evaluated:
        ours(config, x, w, a, b, m)
    with pytest.raises(TypeError, match="adapter must be of type Adapter"):
        doraxp.torch.dora_linear(x, w, (a, b, m), config)
    with pytest.raises(TypeError, match=r"^x must be of type Tensor, got NoneType$"):
        ours(config, None, w, a, b, m)
    with pytest.raises(TypeError, match="x must be of dtype"):
        ours(config, x.int(), w, a, b, m)
    with pytest.raises(ValueError, match=r"x must have shape \(\.\.\., in\)"):
        ours(config, x[:, 1:], w, a, b, m)
    with pytest.raises(ValueError, match="bias must have shape"):
        ours(config, x, w, a, b, m, bias[1:])
    with pytest.raises(ValueError, match="lora_a must have shape"):
        ours(Config(1), x, w, a, b, m)
    with pytest.raises(ValueError, match="lora_a must have shape"):
        ours(config, x, w, a.view(3, 4), b, m)
    with pytest.raises(ValueError, match="x must have shape"):
        ours(config, x[0, 0], w, a, b, m)
    with pytest.raises(TypeError, match="bias must be of dtype"):
        ours(config, x, w, a, b, m, bias.int())
    with pytest.raises(ValueError, match="all arrays must be on one device"):
        ours(config, x.to("meta"), w, a, b, m)


def test_the_functions_of_the_core_take_parameters(torch):
    """A prepared norm is refused after a change, and accepted before one."""
    x, w, a, b, m, _ = draw(torch)
    adapter, config = Adapter(a, b, m), Config(2)
    prepared = doraxp.prepare(w, adapter, config)
    y, cache = doraxp.forward(x, w, adapter, config, prepared=prepared)
    assert_same(torch, [y], [dense(config, x, w, a, b, m)])
    doraxp.backward(torch.ones_like(y), cache)
    for leaf in adapter:
        numbers = leaf.detach().clone()
        leaf.data[(0,) * leaf.ndim] += 1
        with pytest.raises(ValueError, match="the adapter has changed"):
            doraxp.forward(x, w, adapter, config, prepared=prepared)
        leaf.data.copy_(numbers)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap runs addmm_ as a loop
@pytest.mark.parametrize("batched", ["x", "dy"])
def test_vmap_works_on_the_functions_of_the_core(torch, batched):
    config = Config(2, 3)
    (w, a, b, m), (x, dy) = LEAVES[:4], [(5, 6), (5, 4)]
    x, dy, *leaves = (
        array.detach() for array in draw(torch, [(3, *x) if batched == "x" else x, dy, w, a, b, m])
    )
    if batched == "dy":
        dy = torch.stack([dy, 2 * dy, dy + 1])

    def gradients(x, dy):
        weight, *adapter = leaves
        _, cache = doraxp.forward(x, weight, Adapter(*adapter), config)
        made = doraxp.backward(dy, cache)
        return (made.x, *made.adapter)

    axes = (0, None) if batched == "x" else (None, 0)
    got = torch.func.vmap(gradients, axes)(x, dy)
    pairs = [(x[i], dy) if batched == "x" else (x, dy[i]) for i in range(3)]
    want = map(torch.stack, zip(*(gradients(*pair) for pair in pairs), strict=True))
    assert_same(torch, got, list(want))


@pytest.mark.filterwarnings("ignore:.torch.jit.script.:DeprecationWarning")  # PyTorch's own
def test_forward_mode_works_on_the_functions_of_the_core(torch):
    from torch.autograd import forward_ad

    config = Config(2, 3)
    x, dy, w, a, b, m = (array.detach() for array in draw(torch, [(5, 6), (5, 4), *LEAVES[:4]]))
    _, cache = doraxp.forward(x, w, Adapter(a, b, m), config)
    with forward_ad.dual_level():
        made = doraxp.backward(forward_ad.make_dual(dy, dy), cache)
        tangents = [forward_ad.unpack_dual(d).tangent for d in (made.x, *made.adapter)]
    plain = doraxp.backward(dy, cache)  # linear in dy
    assert_same(torch, tangents, [plain.x, *plain.adapter])
