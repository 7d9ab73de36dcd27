"""The optimizers against torch.optim: each step in float64, on every backend."""

from __future__ import annotations

import pytest

from doraxp import Adapter, adamw_init, adamw_step, clip_by_global_norm, sgd_init, sgd_step

STEPS = 8
ALL = Adapter(0.05, 0.05, 0.05)
LORA_PLUS = Adapter(0.01, 0.16, 0.03)
NO_DECAY = Adapter(0.0, 0.0, 0.0)
DECAY = Adapter(0.3, 0.3, 0.3)
DECAY_EACH = Adapter(0.5, 0.2, 0.1)
SGD = {
    "plain": (ALL, NO_DECAY, {}),
    "momentum": (ALL, NO_DECAY, {"momentum": 0.9}),
    "nesterov": (ALL, NO_DECAY, {"momentum": 0.9, "nesterov": True}),
    "decay": (ALL, DECAY, {"momentum": 0.9}),
    "per-leaf": (LORA_PLUS, DECAY_EACH, {"momentum": 0.5, "nesterov": True}),
}
ADAMW = {
    "no-decay": (ALL, NO_DECAY, {}),
    "decay": (ALL, DECAY, {}),
    "betas": (ALL, DECAY, {"beta1": 0.5, "beta2": 0.9, "eps": 1e-3}),
    "per-leaf": (LORA_PLUS, DECAY_EACH, {}),
}


def random_adapter(draw):
    return Adapter(draw(2, 5), draw(4, 2), draw(4))


def follow(backend, draw, assert_close, torch, init, step, theirs, case):
    """Take the same steps here and in torch.optim, and compare the parameters after each."""
    rates, decays, numbers = case
    params = random_adapter(draw)
    leaves = [torch.tensor(backend.numpy(leaf), requires_grad=True) for leaf in params]
    optimizer = theirs(
        {"params": [leaf], "lr": rate, "weight_decay": decay}
        for leaf, rate, decay in zip(leaves, rates, decays, strict=True)
    )
    state = backend.run(init, params)
    for _ in range(STEPS):
        grads = random_adapter(draw)
        params, state = backend.run(
            step, params, grads, state, learning_rate=rates, weight_decay=decays, **numbers
        )
        for leaf, grad in zip(leaves, grads, strict=True):
            leaf.grad = torch.tensor(backend.numpy(grad))
        optimizer.step()
        for actual, desired in zip(params, leaves, strict=True):
            assert_close(actual, desired.detach().numpy(), rtol=1e-14)


@pytest.mark.parametrize("case", SGD.values(), ids=SGD)
def test_sgd_equals_torch(backend, draw, assert_close, torch, case):
    def theirs(groups):
        return torch.optim.SGD(groups, **case[2])

    follow(backend, draw, assert_close, torch, sgd_init, sgd_step, theirs, case)


@pytest.mark.parametrize("case", ADAMW.values(), ids=ADAMW)
def test_adamw_equals_torch(backend, draw, assert_close, torch, case):
    betas = (case[2].get("beta1", 0.9), case[2].get("beta2", 0.999))

    def theirs(groups):
        return torch.optim.AdamW(groups, betas=betas, eps=case[2].get("eps", 1e-8))

    follow(backend, draw, assert_close, torch, adamw_init, adamw_step, theirs, case)


@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_clipping_equals_torch(backend, draw, assert_close, torch, max_norm):
    grads = random_adapter(draw)
    leaves = [torch.zeros(tuple(leaf.shape), dtype=torch.float64) for leaf in grads]
    for leaf, grad in zip(leaves, grads, strict=True):
        leaf.grad = torch.tensor(backend.numpy(grad))
    total = torch.nn.utils.clip_grad_norm_(leaves, max_norm)
    torchs_epsilon = 1 + 1e-6 / float(total) if total > max_norm else 1.0
    clipped, norm = backend.run(clip_by_global_norm, grads, max_norm)
    assert_close(norm, total.numpy(), rtol=1e-15)
    for actual, leaf in zip(clipped, leaves, strict=True):
        assert_close(actual, torchs_epsilon * leaf.grad.numpy(), rtol=1e-15)


@pytest.mark.parametrize(("step", "name"), [(sgd_step, "SGD"), (adamw_step, "AdamW")])
def test_defaults_are_those_of_torch(torch, step, name):
    theirs = getattr(torch.optim, name)([torch.zeros(1)], lr=1.0).defaults
    ours = dict(step.__kwdefaults__)
    if name == "AdamW":
        theirs["beta1"], theirs["beta2"] = theirs["betas"]
        theirs["donate"] = False  # torch's step always writes into its parameters
    theirs["lora_plus"] = 1.0  # torch has a group of parameters for each rate
    assert ours == {name: theirs[name] for name in ours}
