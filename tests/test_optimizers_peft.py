"""LoRA+ against PEFT's own: the same steps in float64 on the adapters of a model of PEFT."""

from __future__ import annotations

import pytest

from doraxp import AdamW, adamw_init, adamw_step, sgd_init, sgd_step

RATIO, RATE, STEPS = 16.0, 0.01, 5
KINDS = {"AdamW": (adamw_init, adamw_step, {}), "SGD": (sgd_init, sgd_step, {"momentum": 0.9})}
FIELDS = {"lora_A": "lora_a", "lora_B": "lora_b"}


@pytest.fixture
def model(peft, torch):
    """Two linear layers with LoRA in float64; B is not 0."""
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 3)).double()
    config = peft.LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False)
    return peft.get_peft_model(base, config).double()


def named(model):
    """Return the trained parameters of a model by layer and name."""
    tree = {}
    for name, leaf in model.named_parameters():
        if leaf.requires_grad:
            layer, field = name.split(".")[-4], FIELDS[name.split(".")[-3]]
            tree.setdefault(layer, {})[field] = leaf
    return tree


@pytest.mark.parametrize(("init", "step", "numbers"), KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("decay", [0.0, 0.25])
def test_lora_plus_equals_peft(
    peft, torch, backend, assert_close, model, init, step, numbers, decay
):
    from peft.optimizers import create_loraplus_optimizer

    name = "SGD" if step is sgd_step else "AdamW"
    theirs = create_loraplus_optimizer(
        model, getattr(torch.optim, name), lr=RATE, loraplus_lr_ratio=RATIO,
        loraplus_weight_decay=decay, **numbers,
    )  # fmt: skip
    leaves = named(model)

    def arrays(values):
        return {
            layer: {field: backend.asarray(values(leaf)) for field, leaf in fields.items()}
            for layer, fields in leaves.items()
        }

    params = arrays(lambda leaf: leaf.detach().numpy())
    state, x = init(params), torch.randn(7, 5, dtype=torch.float64)
    for _ in range(STEPS):
        theirs.zero_grad()
        model(x).square().mean().backward()
        grads = arrays(lambda leaf: leaf.grad.numpy())
        params, state = backend.run(
            step, params, grads, state, learning_rate=RATE, lora_plus=RATIO, weight_decay=decay,
            **numbers,
        )  # fmt: skip
        theirs.step()
        for layer, fields in leaves.items():
            for field, leaf in fields.items():
                assert_close(params[layer][field], leaf.detach().numpy(), rtol=1e-13)


def test_an_optimizer_has_the_rates_of_peft(peft, torch, model):
    from peft.optimizers import create_loraplus_optimizer

    theirs = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=RATIO, loraplus_weight_decay=0.25
    )
    leaves = named(model)
    ours = AdamW(RATE, lora_plus=RATIO, weight_decay=0.25)
    model(torch.ones(3, 5, dtype=torch.float64)).square().mean().backward()
    grads = {
        name: {k: p.grad.numpy() for k, p in fields.items()} for name, fields in leaves.items()
    }
    params = {
        name: {k: p.detach().numpy().copy() for k, p in fields.items()}
        for name, fields in leaves.items()
    }
    new = ours.step(params, grads)
    theirs.step()
    for name, fields in leaves.items():
        for field, leaf in fields.items():
            torch.testing.assert_close(torch.tensor(new[name][field]), leaf.detach())
