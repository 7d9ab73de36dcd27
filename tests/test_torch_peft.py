"""`doraxp.torch.accelerate` against PEFT's own layers: same numbers, same files, and undone."""

from __future__ import annotations

import copy
import pickle
import re

import pytest

NAMES = ("0", "2")


def model_of(peft, torch, *, dtype="float64", bias=True, dropout=0.0, **options):
    """Return a small model with DoRA on two linear layers, with parameters as after training."""
    torch.manual_seed(11)
    base = torch.nn.Sequential(
        torch.nn.Linear(12, 10, bias=bias), torch.nn.Tanh(), torch.nn.Linear(10, 8, bias=bias)
    )
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        use_dora=True,
        lora_dropout=dropout,
        **{"target_modules": list(NAMES)} | options,
    )
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    model.to(getattr(torch, dtype))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def step(torch, model, x):
    """Return y and all gradients; dropout draws the same numbers every time."""
    x = x.detach().requires_grad_()
    trained = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(5)
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *trained])]


def assert_same(torch, actual, desired, rtol=1e-12):
    for got, want in zip(actual, desired, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=rtol * float(want.abs().max()))


def exact(torch, model):
    """Return PEFT's formula as a function of x whose gradient goes through the norm."""

    def run(x):
        for layer in (model.base_model.model[0], torch.tanh, model.base_model.model[2]):
            if layer is torch.tanh:
                x = layer(x)
                continue
            update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            v = layer.base_layer.weight + layer.scaling["default"] * update
            m = layer.lora_magnitude_vector["default"].weight
            x = x @ ((m / v.norm(dim=1))[:, None] * v).T + layer.base_layer.bias
        return x

    return run


@pytest.fixture
def x(torch):
    return torch.randn(2, 7, 12, dtype=torch.float64, generator=torch.manual_seed(1))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_detached_equals_pefts_step_to_rounding_and_restore_equals_it_to_the_bit(
    peft, torch, x, dropout, bias
):
    from doraxp.torch import accelerate

    model = model_of(peft, torch, dropout=dropout, bias=bias)
    want = step(torch, model, x)
    with accelerate(model, norm_gradient="detached") as handle:
        assert handle.layers == tuple(f"base_model.model.{name}" for name in NAMES)
        assert dict(handle.left) == {}
        assert repr(handle) == "<Accelerated: 2 layers by doraxp, 0 left to PEFT>"
        assert_same(torch, step(torch, model, x), want)
        y = model.eval()(x)
        model.train()
    again = step(torch, model, x)
    assert_same(torch, again, want, 0)
    assert_same(torch, [y.detach()], [model.eval()(x).detach()])


def test_exact_gives_the_true_gradient_of_pefts_formula(peft, torch, x):
    from doraxp.torch import accelerate

    model = model_of(peft, torch)
    detached = step(torch, model, x)
    trained = [p for p in model.parameters() if p.requires_grad]
    x = x.requires_grad_()
    y = exact(torch, model)(x)
    want = [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *trained])]
    handle = accelerate(model)
    assert_same(torch, step(torch, model, x), want)
    assert not torch.allclose(want[2], detached[2])
    handle.restore()
    handle.restore()
    assert_same(torch, step(torch, model, x), detached, 0)


@pytest.mark.parametrize("scaling", [0.0, -0.5, 2.0])
def test_any_scaling_of_peft_gives_pefts_step(peft, torch, x, scaling):
    from doraxp.torch import accelerate

    model = model_of(peft, torch)
    for index in (0, 2):
        model.base_model.model[index].scaling["default"] = scaling
    want = step(torch, model, x)
    accelerate(model, "detached")
    for got, expected in zip(step(torch, model, x), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_files_parameters_and_names_do_not_change(peft, torch, x, tmp_path):
    from doraxp.torch import accelerate

    model = model_of(peft, torch)
    before = dict(model.named_parameters())
    model.save_pretrained(tmp_path / "before")
    handle = accelerate(model)
    model.save_pretrained(tmp_path / "during")
    assert all(p is before[name] for name, p in model.named_parameters())
    assert list(model.state_dict()) == [*before]
    handle.restore()
    model.save_pretrained(tmp_path / "after")
    names = {path.name for path in (tmp_path / "before").iterdir()}
    assert "adapter_model.safetensors" in names
    for name in names:
        (first, *others) = (
            (tmp_path / when / name).read_bytes() for when in ("before", "during", "after")
        )
        assert others == [first, first]


def test_peft_loads_an_adapter_that_was_trained_accelerated(peft, torch, x, tmp_path):
    from doraxp.torch import accelerate

    model = model_of(peft, torch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    with accelerate(model):
        losses = []
        for _ in range(20):
            loss = (model(x) - 1).square().mean()
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        y = model(x).detach()
        model.save_pretrained(tmp_path)
    assert losses[-1] < losses[0] / 2
    fresh = model_of(peft, torch)
    fresh.load_adapter(tmp_path, "default")
    assert_same(torch, [fresh.to(torch.float64)(x).detach()], [y])


def test_peft_still_merges_disables_and_refuses(peft, torch, x):
    from doraxp.torch import accelerate

    model = model_of(peft, torch).eval()
    want = model(x).detach()
    with model.disable_adapter():
        plain = model(x).detach()
    accelerate(model)
    with model.disable_adapter():
        assert torch.equal(model(x), plain)
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when DoRA is enabled"):
        model.base_model.model[0](x, adapter_names=["default", "__base__"])
    model.merge_adapter()
    assert_same(torch, [model(x).detach()], [want])
    model.unmerge_adapter()
    assert_same(torch, [model(x).detach()], [want])
    assert_same(torch, [model.merge_and_unload()(x).detach()], [want])


def test_each_adapter_of_a_layer_can_be_the_active_one(peft, torch, x):
    from doraxp.torch import accelerate

    model = model_of(peft, torch)
    model.add_adapter("plain", peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["0", "2"], use_dora=True))
    model.to(torch.float64).eval()
    want = {}
    for name in ("default", "plain", "other"):
        model.set_adapter(name)
        want[name] = model(x).detach()
    accelerate(model)
    for name, y in want.items():
        model.set_adapter(name)
        assert_same(torch, [model(x).detach()], [y])


def test_copies_and_pickles_compute_with_their_own_arrays(peft, torch, x):
    from doraxp.torch import accelerate

    model = model_of(peft, torch)
    handle = accelerate(model)
    want = step(torch, model, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(torch, step(torch, other, x), want, 0)
        with torch.no_grad():
            other.base_model.model[0].lora_B["default"].weight.mul_(2)
        assert not torch.equal(other(x), want[0])
    handle.restore()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo does
def test_autocast_checkpointing_and_compiling_work(peft, torch, x):
    from torch.utils.checkpoint import checkpoint

    from doraxp.torch import accelerate

    model = model_of(peft, torch, dtype="float32")
    wide = step(torch, model, x.float())[0]
    with torch.autocast("cpu", torch.bfloat16):
        theirs = model(x.float())
        accelerate(model, "detached")
        ours = model(x.float())
    assert ours.dtype == theirs.dtype == torch.bfloat16
    errors = [float((y.detach().float() - wide).abs().max()) for y in (ours, theirs)]
    assert errors[0] <= errors[1]
    want = step(torch, model, x.float())
    got = step(torch, recomputed(torch, model, checkpoint), x.float())
    assert_same(torch, got, want, 0)
    torch.compiler.reset()
    layer = model.base_model.model[0]
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    # A small layer runs by its definition, and compiled as an operator: the roundings differ.
    outputs = [module(x.float()).detach() for module in (compiled, layer)]
    assert_same(torch, outputs[:1], outputs[1:], 1e-6)


def recomputed(torch, model, checkpoint):
    """Return the model with its forward recomputed in the backward."""

    class Recomputed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return checkpoint(self.model, x, use_reentrant=False)

    return Recomputed()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # it has a successor
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # PyTorch's
def test_tracing_and_compiling_for_any_shape_work(peft, torch, x):
    from doraxp.torch import accelerate

    model = model_of(peft, torch)
    with torch.no_grad():
        want = model(x)
    accelerate(model)
    compiled = torch.compile(model, dynamic=True)
    traced = torch.jit.trace(model, x)
    for y in (compiled(x), traced(x)):
        torch.testing.assert_close(y, want)
    torch.testing.assert_close(compiled(x[:1]), want[:1])


def test_a_bfloat16_model_gives_bfloat16_gradients(peft, torch, x):
    from doraxp.torch import accelerate

    for dropout in (0.0, 0.4):
        model = model_of(peft, torch, dtype="bfloat16", dropout=dropout)
        want = step(torch, model, x.bfloat16())
        accelerate(model, "detached")
        got = step(torch, model, x.bfloat16())
        assert {array.dtype for array in got} == {torch.bfloat16}
        assert_same(torch, got, want, 2**-4)


def test_layers_that_cannot_be_swapped_are_left_and_named(peft, torch):
    from doraxp.torch import accelerate

    torch.manual_seed(0)

    class Own(peft.tuners.lora.Linear):
        pass

    base = torch.nn.Sequential(torch.nn.Linear(9, 6), torch.nn.Linear(6, 5))
    config = peft.LoraConfig(r=2, use_dora=True, target_modules=["0", "1"])
    model = peft.get_peft_model(base, config)
    model.base_model.model[0].__class__ = Own
    x = torch.randn(2, 9)
    want = model(x).detach()
    with accelerate(model) as handle:
        assert handle.layers == ("base_model.model.1",)
        assert dict(handle.left) == {
            "base_model.model.0": "its class must be Linear, Conv1d, Conv2d, Conv3d or Embedding, "
            "got Own"
        }
        torch.testing.assert_close(model(x), want)


def test_a_base_of_another_class_is_left_to_peft(peft, torch):
    from doraxp.torch import accelerate

    class Own(torch.nn.Linear):
        pass

    config = peft.LoraConfig(r=2, use_dora=True, target_modules=["0"])
    model = peft.get_peft_model(torch.nn.Sequential(Own(6, 5)), config)
    with pytest.raises(
        ValueError, match=r"its base must be a torch\.nn\.Linear or a quantised one, got Own"
    ):
        accelerate(model)


PARTS = {
    "base layer": lambda layer: layer.get_base_layer(),
    "lora_A": lambda layer: layer.lora_A["default"],
    "lora_B": lambda layer: layer.lora_B["default"],
    "magnitude": lambda layer: layer.lora_magnitude_vector["default"],
}
HOOKS = ["forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook"]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_inside_a_layer_is_never_skipped(peft, torch, x, part, hook):
    """PEFT computes a layer while a part of it has a hook, whenever the hook was put there."""
    from doraxp.torch import accelerate

    model = model_of(peft, torch)
    layer = model.base_model.model[0]
    calls = []
    put = getattr(PARTS[part](layer), f"register_{hook}")(lambda *_: calls.append(hook))
    want = step(torch, model, x)
    theirs = list(calls)
    put.remove()
    handle = accelerate(model, "detached")
    layer_of = "base_model.model.0"
    assert layer_of in handle.layers
    calls.clear()
    put = getattr(PARTS[part](layer), f"register_{hook}")(lambda *_: calls.append(hook))
    assert_same(torch, step(torch, model, x), want)
    assert calls == theirs
    assert dict(handle.left) == {layer_of: f"its {part} has hooks, which would not be called"}
    put.remove()
    assert dict(handle.left) == {}


def test_a_forward_on_an_instance_inside_of_a_layer_is_never_skipped(peft, torch, x):
    """Offloading replaces the method of an instance instead of registering a hook."""
    from doraxp.torch import accelerate

    model = model_of(peft, torch)
    handle = accelerate(model)
    base = model.base_model.model[0].base_layer
    forward, calls = base.forward, []
    base.forward = lambda x: calls.append(1) or forward(x)
    model(x)
    assert calls == [1]
    assert list(handle.left) == ["base_model.model.0"]


def test_bad_arguments_are_refused_and_change_nothing(peft, torch):
    from doraxp.torch import accelerate, restore

    model = model_of(peft, torch)
    classes = [type(module) for module in model.modules()]
    with pytest.raises(TypeError, match="model must be of type Module, got int"):
        accelerate(3)
    with pytest.raises(ValueError, match="norm_gradient must be one of"):
        accelerate(model, "none")
    with pytest.raises(ValueError, match="must have a layer with DoRA, has none: give use_dora"):
        accelerate(torch.nn.Linear(3, 3))
    with pytest.raises(TypeError, match="model must be of type Module, got int"):
        restore(3)
    assert [type(module) for module in model.modules()] == classes
    accelerate(model).restore()
    assert [type(module) for module in model.modules()] == classes


def test_a_layer_with_too_high_a_rank_is_left_to_peft(peft, torch, x):
    """PEFT takes any rank, for example on a classifier with a few classes."""
    from doraxp.torch import accelerate

    model = model_of(peft, torch, rank_pattern={"2": 9})
    want = step(torch, model, x)
    with accelerate(model, "detached") as handle:
        assert handle.layers == ("base_model.model.0",)
        assert dict(handle.left) == {
            "base_model.model.2": "its rank must be at most min(out, in) = 8, got 9"
        }
        assert_same(torch, step(torch, model, x), want)


def test_a_model_whose_ranks_are_all_too_high_is_refused(peft, torch, x):
    """No layer can ever be taken: each adapter of each layer has such a rank."""
    from doraxp.torch import accelerate

    model = model_of(peft, torch, rank_pattern={"0": 11, "2": 11})
    classes = [type(module) for module in model.modules()]
    message = (
        "one of the model's 2 layers with DoRA must be fit for doraxp, none is: "
        "base_model.model.0: its rank must be at most min(out, in) = 10, got 11; "
        "base_model.model.2: its rank must be at most min(out, in) = 8, got 11"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        accelerate(model)
    assert [type(module) for module in model.modules()] == classes
    lower = peft.LoraConfig(r=2, use_dora=True, target_modules=["2"])
    model.add_adapter("lower", lower)
    model.double()
    handle = accelerate(model)  # one adapter of one layer can be taken
    assert handle.layers == ()
    model.set_adapter("lower")
    assert handle.layers == ("base_model.model.2",)


def test_a_state_that_may_change_is_not_refused(peft, torch, x):
    from doraxp.torch import accelerate

    model = model_of(peft, torch)
    model.merge_adapter()
    handle = accelerate(model)
    assert handle.layers == ()
    assert set(handle.left.values()) == {"its adapters are merged"}
    model.unmerge_adapter()
    assert len(handle.layers) == 2


def test_a_rank_that_grows_later_gives_the_layer_back_to_peft(peft, torch, x):
    """Preparing for hot-swapping pads A and B, and turns s into a tensor."""
    from peft.utils.hotswap import prepare_model_for_compiled_hotswap

    from doraxp.torch import accelerate

    for rank, layers in ((7, NAMES), (9, NAMES[:1]), (13, ())):
        model = model_of(peft, torch)
        handle = accelerate(model, "detached")
        prepare_model_for_compiled_hotswap(model, target_rank=rank)
        got = step(torch, model, x)
        assert handle.layers == tuple(f"base_model.model.{name}" for name in layers)
        assert all(f"got {rank}" in reason for reason in handle.left.values())
        handle.restore()
        assert_same(torch, got, step(torch, model, x))


@pytest.mark.parametrize("second", ["plain", "dora"])
def test_two_active_adapters_are_computed_by_peft(peft, torch, x, second):
    from doraxp.torch import accelerate

    model = model_of(peft, torch)
    model.add_adapter(
        "second",
        peft.LoraConfig(
            r=2, target_modules=["0"], use_dora=second == "dora", init_lora_weights=False
        ),
    )
    model.to(torch.float64)
    model.base_model.set_adapter(["default", "second"])
    want = step(torch, model, x)
    handle = accelerate(model, "detached")
    assert_same(torch, step(torch, model, x), want)
    assert handle.layers == ("base_model.model.2",)  # it has one of the two
    assert dict(handle.left) == {
        "base_model.model.0": "it must have one active adapter, has ['default', 'second']"
    }
    model.set_adapter("second")
    reason = "its active adapter must be DoRA, 'second' is not"
    expected = {"dora": None, "plain": reason}[second]
    assert handle.left.get("base_model.model.0") == expected


def test_the_handle_names_the_layers_that_peft_computes_for_a_while(peft, torch, x):
    from doraxp.torch import accelerate

    model = model_of(peft, torch).eval()
    handle = accelerate(model)
    names = handle.layers
    assert len(names) == 2

    def left(reason):
        return handle.layers == () and dict(handle.left) == dict.fromkeys(names, reason)

    with model.disable_adapter():
        assert left("its adapters are disabled")
    model.merge_adapter()
    assert left("its adapters are merged")
    model.unmerge_adapter()
    assert handle.layers == names
    handle.restore()
    assert left("it is not accelerated: call accelerate again")


@pytest.mark.parametrize("change", ["set_scale", "scale_layer", "dtype", "weight", "rename"])
def test_a_change_of_a_layer_is_noticed(peft, torch, x, change):
    from doraxp.torch import accelerate

    def run(model):
        layer = model.base_model.model[0]
        if change == "set_scale":
            layer.set_scale("default", 0.3)
        elif change == "scale_layer":
            layer.scale_layer(0.7)
        elif change == "dtype":
            model.to(torch.float32)
        elif change == "weight":
            layer.base_layer = torch.nn.Linear(12, 10, dtype=torch.float64)
            torch.nn.init.constant_(layer.base_layer.weight, 0.5)
            torch.nn.init.constant_(layer.base_layer.bias, 0.5)
        else:
            for parts in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
                parts["other"] = parts.pop("default")
            layer.lora_dropout["other"] = layer.lora_dropout["default"]
            layer.scaling["other"] = layer.scaling["default"] + 1
            layer.lora_variant["other"] = layer.lora_variant["default"]
            layer.set_adapter("other")
        kind = torch.float32 if change == "dtype" else torch.float64
        return step(torch, model, x.to(kind))

    first, second = model_of(peft, torch), model_of(peft, torch)
    handle = accelerate(second, "detached")
    step(torch, second, x)
    want = run(first)
    assert_same(torch, run(second), want, 1e-5 if change == "dtype" else 1e-12)
    assert len(handle.layers) == 2


def test_layers_that_a_later_adapter_brings_are_accelerated_too(peft, torch, x, tmp_path):
    """Adapters come by add_adapter and by load_adapter, in the model and in its copies."""
    from doraxp.torch import accelerate, restore

    config = peft.LoraConfig(r=2, use_dora=True, target_modules=["0", "2"], init_lora_weights=False)
    model_of(peft, torch).save_pretrained(tmp_path)
    model = model_of(peft, torch, target_modules=["0"])
    handle = accelerate(model, "detached")
    copied, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    both = tuple(f"base_model.model.{name}" for name in NAMES)
    model.add_adapter("second", config)
    copied.add_adapter("second", config)
    loaded.load_adapter(tmp_path, "second")
    for each in (model, copied, loaded):
        each.to(torch.float64)
        each.set_adapter("second")
        each_handle = handle if each is model else accelerate(each, "detached")
        assert each_handle.layers == both
        got = step(torch, each, x)
        restore(each)
        assert each_handle.layers == ()
        assert_same(torch, got, step(torch, each, x))


def test_a_second_call_changes_only_the_gradient_of_the_norm(peft, torch, x):
    from doraxp.torch import accelerate

    model = model_of(peft, torch)
    first = accelerate(model)
    want = step(torch, model, x)
    second = accelerate(model)
    assert first.layers == second.layers != ()
    assert_same(torch, step(torch, model, x), want, 0)
    detached = step(torch, model_of(peft, torch), x)
    accelerate(model, "detached")
    assert_same(torch, step(torch, model, x), detached)


def test_copies_and_pickles_can_be_restored(peft, torch, x):
    from doraxp.torch import accelerate, restore

    model = model_of(peft, torch)
    want = step(torch, model, x)
    classes = [type(module) for module in model.modules()]
    accelerate(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        assert [type(module) for module in other.modules()] != classes
        restore(other)
        restore(other)
        assert [type(module) for module in other.modules()] == classes
        assert_same(torch, step(torch, other, x), want, 0)


def test_an_accelerated_model_reports_the_same_status(peft, torch):
    from doraxp.torch import accelerate

    model = model_of(peft, torch)
    want = model.get_model_status(), model.get_layer_status()
    accelerate(model)
    assert model.get_model_status() == want[0]
    assert [status.name for status in model.get_layer_status()] == [s.name for s in want[1]]


def test_parts_of_other_classes_are_left_to_peft(peft, torch, x):
    """Parallel training puts its own classes and its own tensors inside of a layer."""
    from doraxp.torch import accelerate

    class Own(torch.nn.Linear):
        pass

    class OwnTensor(torch.Tensor):
        pass

    def assert_left(change, reason):
        model = model_of(peft, torch)
        handle = accelerate(model)
        change(model.base_model.model[0])
        assert handle.layers == ("base_model.model.2",)
        assert reason in handle.left["base_model.model.0"]

    def own_a(layer):
        layer.lora_A["default"].__class__ = Own

    def own_base(layer):
        layer.base_layer.__class__ = Own

    def own_leaf(layer):
        tensor = torch.randn(10, 3).as_subclass(OwnTensor)
        layer.lora_B["default"].weight = torch.nn.Parameter(tensor)

    def own_weight(layer):
        layer.base_layer.weight = torch.nn.Parameter(torch.randn(10, 12).as_subclass(OwnTensor))

    assert_left(own_a, "its lora_A and lora_B must be of torch.nn.Linear")
    assert_left(own_base, "its base must be a torch.nn.Linear or a quantised one, got Own")
    assert_left(own_leaf, "its adapter must consist of plain tensors, got OwnTensor")
    assert_left(own_weight, "its weight must be a plain tensor, got OwnTensor")


def test_a_layer_whose_class_fsdp_has_derived_is_restored_and_accelerated_again(peft, torch, x):
    from doraxp.torch import accelerate, restore

    model = model_of(peft, torch)
    theirs = step(torch, model, x)
    accelerate(model)
    for module in model.modules():
        if type(module).__module__.startswith("doraxp."):
            name, kind = f"FSDP{type(module).__name__}", type(module)
            module.__class__ = type(name, (kind,), {"__module__": "torch.distributed.fsdp"})
    ours = step(torch, model, x)
    restore(model)
    assert_same(torch, step(torch, model, x), theirs, 0)
    model.add_adapter("late", peft.LoraConfig(r=2, use_dora=True, target_modules=["0"]))
    handle = accelerate(model)
    assert_same(torch, step(torch, model, x), ours, 0)
    assert handle.layers == tuple(f"base_model.model.{name}" for name in NAMES)


@pytest.fixture
def mesh(torch):
    """A mesh of this process alone, for FSDP2."""
    from torch.distributed.device_mesh import init_device_mesh

    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("first", ["accelerate", "fully_shard"])
def test_fsdp2_may_come_before_or_after(peft, torch, x, mesh, monkeypatch, first):
    from torch.distributed.fsdp import fully_shard

    from doraxp.torch import _peft, accelerate

    model = model_of(peft, torch)
    want = model(x).detach()
    calls, compute = [], _peft.dora_linear
    monkeypatch.setattr(_peft, "dora_linear", lambda *args: calls.append(1) or compute(*args))
    if first == "accelerate":
        accelerate(model)
    fully_shard(model, mesh=mesh)
    handle = accelerate(model)
    y = model(x)
    y.sum().backward()
    assert_same(torch, [y.detach()], [want])
    assert len(calls) == 2
    assert set(handle.left.values()) == {
        "its weight must be a plain tensor, got DTensor (FSDP2 makes it plain in each forward)"
    }


def test_the_reason_why_no_layer_can_be_accelerated_names_each_kind_once(peft, torch, mesh):
    from torch.distributed.fsdp import fully_shard

    from doraxp.torch import accelerate

    model = model_of(peft, torch)
    for name in NAMES:
        fully_shard(model.base_model.model[int(name)], mesh=mesh)
    message = (
        "one of the model's 2 layers with DoRA must be fit for doraxp, none is: "
        "base_model.model.0: its class must be Linear, Conv1d, Conv2d, Conv3d or "
        "Embedding, got FSDPLinear: call accelerate before fully_shard"
    )
    with pytest.raises(ValueError, match=f"^{message}$"):
        accelerate(model)


@pytest.mark.filterwarnings("ignore")  # of PEFT, about fan_in_fan_out
def test_the_layers_of_gpt2_are_left_to_peft(torch, peft):
    import transformers  # PEFT needs it

    from doraxp.torch import accelerate

    sizes = {"n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 20, "n_positions": 4}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)

    def adapted(*targets):
        base = transformers.GPT2LMHeadModel(config)
        options = {"r": 2, "use_dora": True, "fan_in_fan_out": True}
        return peft.get_peft_model(base, peft.LoraConfig(target_modules=[*targets], **options))

    with pytest.raises(ValueError, match=r"h\.0\.attn\.c_attn: its base must be .*, got Conv1D"):
        accelerate(adapted("c_attn"))
    handle = accelerate(adapted("c_attn", "lm_head"))
    assert handle.layers == ("base_model.model.lm_head",)
    assert list(handle.left) == ["base_model.model.transformer.h.0.attn.c_attn"]


def test_a_parameter_of_a_module_may_be_a_forgotten_bias(torch):
    from doraxp import Config, DoRALayer

    base = torch.nn.Module()
    base.kernel = torch.nn.Parameter(torch.eye(4))
    base.offset = torch.nn.Parameter(torch.ones(4))
    with pytest.raises(ValueError, match="Module has an array 'offset' of shape"):
        DoRALayer(base, Config(2), seed=0, weight="kernel")
    assert DoRALayer(base, Config(2), seed=0, weight="kernel", bias="offset").bias is not None
