"""Optimizers that keep their state equal the pure functions, and are rebuilt from settings."""

from __future__ import annotations

import json
import math
import pickle
import re
from dataclasses import FrozenInstanceError

import numpy as np
import pytest

from doraxp import (
    SGD,
    AdamW,
    AdamWState,
    Adapter,
    Config,
    DoRALayer,
    Linear,
    Optimizer,
    Schedule,
    SGDState,
    adamw_init,
    adamw_step,
    clip_by_global_norm,
    constant_schedule,
    cosine_schedule,
    linear_schedule,
    optimizer_from_settings,
    scaled_gradients,
    sgd_init,
    sgd_step,
)

NAMES = ("lora_a", "lora_b", "magnitude")
KINDS = {"AdamW": (AdamW, adamw_init, adamw_step), "SGD": (SGD, sgd_init, sgd_step)}
each_kind = pytest.mark.parametrize(("kind", "init", "step"), KINDS.values(), ids=KINDS)
SCHEDULES = [
    constant_schedule(0.5),
    constant_schedule(0.5, warmup_steps=2),
    linear_schedule(0.5, total_steps=3),
    cosine_schedule(0.5, total_steps=9, warmup_steps=2, final=0.25),
]


def random_layer(draw):
    return dict(zip(NAMES, (draw(2, 5), draw(4, 2), draw(4)), strict=True))


def whole(value=1.0):
    shapes = ((2, 5), (4, 2), (4,))
    return {name: np.full(shape, value) for name, shape in zip(NAMES, shapes, strict=True)}


def assert_same(assert_close, actual, desired, rtol=0):
    assert actual.keys() == desired.keys()
    for name in desired:
        assert_close(actual[name], desired[name], rtol=rtol)


@each_kind
def test_an_optimizer_takes_the_steps_of_the_functions(
    backend, draw, assert_close, kind, init, step
):
    """Clipped first, then scaled, then stepped at the rate of the schedule."""
    numbers = {"weight_decay": 0.2, "lora_plus": 4}
    numbers |= {"momentum": 0.5, "nesterov": True} if kind is SGD else {"beta1": 0.5, "eps": 1e-3}
    schedule = linear_schedule(0.5, total_steps=6, warmup_steps=2)
    optimizer = kind(schedule, max_norm=2.0, damping=0.5, **numbers)
    params = desired = random_layer(draw)
    state = init(params)
    assert (optimizer.steps, optimizer.state, optimizer.last_norm) == (0, None, None)
    for number in range(3):
        grads = random_layer(draw)
        params = optimizer.step(params, grads)
        grads, norm = clip_by_global_norm(grads, 2.0)
        grads = scaled_gradients(desired, grads, damping=0.5)
        rate = schedule(number)
        desired, state = step(desired, grads, state, learning_rate=rate, **numbers)
        assert_same(assert_close, params, desired)
        assert_same(assert_close, optimizer.state[-1], state[-1])
        assert_close(optimizer.last_norm, norm, rtol=0)
        assert optimizer.steps == number + 1


@each_kind
def test_an_optimizer_has_the_defaults_of_the_functions(
    draw, backend, assert_close, kind, init, step
):
    params, grads = random_layer(draw), random_layer(draw)
    optimizer = kind(0.1)
    desired, _ = step(params, grads, init(params), learning_rate=0.1)
    assert_same(assert_close, optimizer.step(params, grads), desired)
    assert optimizer.last_norm is None
    ours = {name: getattr(optimizer, name) for name in step.__kwdefaults__}
    assert ours == step.__kwdefaults__


@each_kind
def test_a_rate_per_leaf_and_a_function_of_the_step_are_rates(
    backend, draw, assert_close, kind, init, step
):
    params, grads = random_layer(draw), random_layer(draw)
    each = {"lora_a": 0.1, "lora_b": 0.2, "magnitude": 0.3}
    seen = []
    for rate in (each, Adapter(**each), lambda number: seen.append(number) or each):
        optimizer = kind(rate)
        desired, state = step(params, grads, init(params), learning_rate=each)
        desired, _ = step(desired, grads, state, learning_rate=each)
        actual = optimizer.step(optimizer.step(params, grads), grads)
        assert_same(assert_close, actual, desired)
    assert seen == [0, 1]


@each_kind
def test_training_goes_on_from_an_assigned_state(backend, draw, assert_close, kind, init, step):
    schedule = cosine_schedule(0.5, total_steps=5)
    params, gradients = random_layer(draw), [random_layer(draw) for _ in range(4)]
    first, second = kind(schedule), kind(schedule)
    for grads in gradients[:2]:
        params = first.step(params, grads)
    second.steps = first.steps
    second.state = first.state
    assert second.steps == 2
    one = other = params
    for grads in gradients[2:]:
        one, other = first.step(one, grads), second.step(other, grads)
    assert_same(assert_close, other, one)
    second.state = None
    assert second.state is None
    second.step(params, gradients[0])
    assert second.state is not None


def test_the_steps_are_those_of_an_assigned_adamw_state():
    optimizer = AdamW(0.1)
    optimizer.state = adamw_init(whole())._replace(step=np.asarray(7))
    assert optimizer.steps == 7
    assert type(optimizer.steps) is int
    optimizer.step(whole(), whole())
    assert optimizer.steps == optimizer.state.step == 8


@pytest.mark.lanes("numpy")
def test_a_donated_step_writes_into_the_given_arrays(backend, draw):
    params = random_layer(draw)
    optimizer = AdamW(0.1, donate=True, max_norm=1.0)
    new = optimizer.step(params, random_layer(draw))
    if backend.name == "numpy":
        assert all(new[name] is params[name] for name in params)


@each_kind
def test_an_optimizer_trains_a_layer(draw, kind, init, step):
    """The loss of a layer falls, in the loop that the page shows."""
    rng = np.random.default_rng(0)
    weight, target, x = (rng.standard_normal(shape) for shape in ((6, 8), (6, 8), (40, 8)))
    layer = DoRALayer(Linear(weight, np.zeros(6)), Config(2), seed=0, train_base=True)
    optimizer: Optimizer = kind(cosine_schedule(0.01, total_steps=60), lora_plus=4, max_norm=1.0)
    losses = []
    for _ in range(60):
        error = layer.forward(x) - x @ target.T
        losses.append(float((error * error).mean()))
        layer.clear_gradients()
        layer.backward(2 * error / error.size)
        layer.load_state_dict(optimizer.step(layer.state_dict(), layer.gradients))
    assert losses[-1] < losses[0]
    assert {*optimizer.state[-1]} == {"weight", "bias", *NAMES}


@each_kind
def test_an_optimizer_is_known_by_its_members(kind, init, step):
    assert isinstance(kind(0.1), Optimizer)
    assert not isinstance(step, Optimizer)


# After an error nothing has changed


@each_kind
@pytest.mark.parametrize(
    "change",
    [
        {"lora_a": np.ones((2, 4))},
        {"lora_b": np.ones((3, 2))},
        {"magnitude": np.ones(4, int)},
    ],
    ids=NAMES,
)
def test_after_an_error_an_optimizer_has_not_changed(kind, init, step, change):
    optimizer = kind(0.1, max_norm=1.0, damping=1e-6)
    params = optimizer.step(whole(), whole())
    before = optimizer.steps, optimizer.state, optimizer.last_norm
    values = pickle.dumps((before, params))
    with pytest.raises((TypeError, ValueError)):
        optimizer.step(params, {**whole(), **change})
    optimizer.learning_rate = lambda _: -1.0
    with pytest.raises(ValueError, match="learning_rate must be at least 0 and finite"):
        optimizer.step(params, whole())
    after = optimizer.steps, optimizer.state, optimizer.last_norm
    assert all(one is other for one, other in zip(before, after, strict=True))
    assert pickle.dumps((after, params)) == values


@each_kind
def test_a_state_of_another_optimizer_is_refused(kind, init, step):
    optimizer = kind(0.1)
    optimizer.step(whole(), whole())
    before = optimizer.steps, optimizer.state
    other = SGDState(whole()) if kind is AdamW else adamw_init(whole())
    message = f"state must be of type {kind.__name__}State, got {type(other).__name__}"
    with pytest.raises(TypeError, match=message):
        optimizer.state = other
    assert (optimizer.steps, id(optimizer.state)) == (before[0], id(before[1]))


def test_a_state_with_a_bad_step_is_refused():
    optimizer = AdamW(0.1)
    with pytest.raises(ValueError, match=r"^state\.step must be at least 0, got -1$"):
        optimizer.state = AdamWState(-1, whole(), whole())
    assert optimizer.state is None


@pytest.mark.parametrize(
    ("kind", "numbers", "error", "message"),
    [
        (AdamW, {"learning_rate": -1}, ValueError,
         "learning_rate must be at least 0 and finite, got -1.0"),
        (AdamW, {"beta1": 1}, ValueError, "beta1 must be at least 0 and below 1, got 1.0"),
        (AdamW, {"beta2": "x"}, TypeError, "beta2 must be a number, got 'x'"),
        (AdamW, {"eps": 0}, ValueError, "eps must be above 0 and finite, got 0.0"),
        (AdamW, {"donate": 1}, TypeError, "donate must be True or False, got 1"),
        (AdamW, {"weight_decay": math.nan}, ValueError,
         "weight_decay must be at least 0 and finite, got nan"),
        (SGD, {"momentum": 1}, ValueError, "momentum must be at least 0 and below 1, got 1.0"),
        (SGD, {"nesterov": True}, ValueError,
         "nesterov must come with a momentum above 0, got 0.0"),
        (SGD, {"lora_plus": 0}, ValueError, "lora_plus must be above 0 and finite, got 0.0"),
        (SGD, {"max_norm": 0}, ValueError, "max_norm must be above 0 and finite, got 0.0"),
        (AdamW, {"damping": -1}, ValueError, "damping must be at least 0 and finite, got -1.0"),
    ],
)  # fmt: skip
def test_bad_arguments_of_an_optimizer_are_refused(kind, numbers, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        kind(**{"learning_rate": 0.1, **numbers})


# Settings


@pytest.mark.parametrize("rate", [0.5, {"q": 0.5, "v": dict.fromkeys(NAMES, 0.5)}, *SCHEDULES])
@pytest.mark.parametrize(
    "made",
    [
        lambda rate: AdamW(rate),
        lambda rate: AdamW(
            rate, beta1=0.5, beta2=0.75, eps=1e-3, weight_decay={"q": 0.5, "v": 0.25},
            lora_plus=16, max_norm=1, damping=0, donate=True,
        ),
        lambda rate: SGD(rate),
        lambda rate: SGD(
            rate, momentum=0.5, nesterov=True, weight_decay=1, lora_plus=2, max_norm=3, damping=1
        ),
    ],
)  # fmt: skip
def test_settings_in_json_rebuild_an_optimizer(rate, made):
    optimizer = made(rate)
    settings = optimizer.settings()
    text = json.dumps(settings, allow_nan=False)
    again = optimizer_from_settings(json.loads(text))
    assert type(again) is type(optimizer)
    assert again.settings() == settings
    assert repr(again) == repr(optimizer)
    assert again.learning_rate == rate
    assert (again.steps, again.state) == (0, None)


def test_settings_have_the_names_of_the_arguments():
    assert SGD(1, max_norm=np.float32(2)).settings() == {
        "optimizer": "SGD", "learning_rate": 1.0, "momentum": 0.0, "nesterov": False,
        "weight_decay": 0.0, "lora_plus": 1.0, "max_norm": 2.0, "damping": None,
    }  # fmt: skip


def test_a_named_tuple_in_settings_is_a_dict_that_means_the_same():
    each = Adapter(0.1, 0.2, 0.3)
    optimizer = AdamW({"q": each, "v": 0.5}, weight_decay=each)
    settings = optimizer.settings()
    assert settings["learning_rate"] == {"q": each._asdict(), "v": 0.5}
    params = {name: Adapter(**whole()) for name in "qv"}
    one = optimizer.step(params, params)
    other = optimizer_from_settings(settings).step(params, params)
    for name in params:
        for actual, desired in zip(other[name], one[name], strict=True):
            np.testing.assert_array_equal(actual, desired)


@pytest.mark.parametrize(
    ("rate", "name"),
    [(len, "learning_rate"), ({0: 0.5}, "learning_rate"), ({"q": "x"}, "learning_rate['q']")],
)
@each_kind
def test_a_rate_that_json_does_not_have_is_refused_in_settings(kind, init, step, rate, name):
    rule = f"{name} must be a number, numbers by names, or a Schedule to be in settings, got "
    with pytest.raises(TypeError, match=f"^{re.escape(rule)}"):
        kind(rate).settings()


GOOD = SGD(0.5).settings()
SCHEDULED = SCHEDULES[2].settings()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (None, TypeError, "settings must be of type Mapping, got NoneType"),
        ({}, ValueError, "settings['optimizer'] must be one of ['AdamW', 'SGD'], got None"),
        ({**GOOD, "optimizer": "Adam"}, ValueError,
         "settings['optimizer'] must be one of ['AdamW', 'SGD'], got 'Adam'"),
        ({**GOOD, "optimizer": ["SGD"]}, ValueError,
         "settings['optimizer'] must be one of ['AdamW', 'SGD'], got ['SGD']"),
        ({**GOOD, "rate": 1}, ValueError,
         f"settings of SGD must have the names {[*GOOD]}, got {[*GOOD, 'rate']}"),
        ({**GOOD, "momentum": 2}, ValueError, "momentum must be at least 0 and below 1, got 2.0"),
        ({**GOOD, "learning_rate": {"kind": "linear"}}, ValueError,
         f"settings of a schedule must have the names {[*SCHEDULED]}, got ['kind']"),
        ({**GOOD, "learning_rate": {**SCHEDULED, "kind": "step"}}, ValueError,
         "kind must be one of ('constant', 'linear', 'cosine'), got 'step'"),
    ],
)  # fmt: skip
def test_settings_that_make_no_optimizer_are_refused(settings, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        optimizer_from_settings(settings)


# Schedules


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_is_a_value(schedule):
    """It is equal to another with the same numbers, and its repr makes it again."""
    again = Schedule.from_settings(json.loads(json.dumps(schedule.settings())))
    assert again == schedule
    assert hash(again) == hash(schedule)
    assert [again(step) for step in range(12)] == [schedule(step) for step in range(12)]
    assert eval(repr(schedule)) == schedule
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert [other == schedule for other in SCHEDULES].count(True) == 1
    with pytest.raises(FrozenInstanceError):
        schedule.final = 1.0


def test_a_schedule_shows_its_call():
    assert repr(SCHEDULES[1]) == "constant_schedule(0.5, warmup_steps=2)"
    assert repr(SCHEDULES[3]) == ("cosine_schedule(0.5, total_steps=9, warmup_steps=2, final=0.25)")


@pytest.mark.parametrize("numbers", [{"total_steps": 5}, {"final": 0.5}])
def test_a_constant_schedule_with_an_end_is_refused(numbers):
    rule = "a constant schedule must have total_steps = None and final = 0, got "
    with pytest.raises(ValueError, match=f"^{re.escape(rule)}"):
        Schedule("constant", 0.5, **numbers)


def test_settings_of_a_schedule_that_are_not_a_mapping_are_refused():
    with pytest.raises(TypeError, match=r"^settings must be of type Mapping, got list$"):
        Schedule.from_settings([])
