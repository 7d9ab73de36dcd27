"""The demo's parts: its digits, its hand-written gradients, the same steps on every backend."""

from __future__ import annotations

import numpy as np
import pytest

from doraxp import Convolution
from doraxp._terminal.runtimes import BACKENDS
from doraxp.backends import available
from doraxp.demo import PLANS, Settings, experiment
from doraxp.demo._digits import Digits, load_digits, split_digits
from doraxp.demo._methods import (
    adapted_logits,
    loss_and_gradients,
    merged,
    methods,
    plain_logits,
)
from doraxp.demo._networks import Flat, Layer, Product

METHODS = methods(rank=2)


def pytest_generate_tests(metafunc):
    """Parametrise `library` over NumPy and the demo's other backends that are asked for."""
    if "library" in metafunc.fixturenames:
        asked = {"numpy", *(metafunc.config.getoption("backend") or BACKENDS)}
        metafunc.parametrize("library", [name for name in BACKENDS if name in asked])


@pytest.fixture
def usable_library(request, library):
    status = {status.name: status for status in available()}[library]
    if not status.usable and not request.config.getoption("backend"):
        pytest.skip(f"{library}: {status.detail}")
    return library


def draw(rng, *shape):
    return 0.5 * rng.standard_normal(shape)


LAYERS = {
    "linear": {"layer 1": (Product(), (5, 6)), "layer 2": (Product(), (4, 5))},
    "convolutional": {
        "layer 1": (Convolution(padding=1), (3, 2, 3, 3)),
        "layer 2": (Convolution(stride=2, padding=1), (5, 3, 3, 3)),
        "layer 3": (Flat(), (4, 30)),
    },
}
X_SHAPES = {"linear": (7, 6), "convolutional": (7, 2, 4, 5)}


@pytest.fixture(params=LAYERS)
def task(request):
    """A small network, seven digits and their targets; in float64."""
    rng = np.random.default_rng(20240214)
    layers = LAYERS[request.param]
    operators = {name: operator for name, (operator, _) in layers.items()}
    base = {
        name: Layer(draw(rng, *shape), draw(rng, shape[0])) for name, (_, shape) in layers.items()
    }
    return operators, base, draw(rng, *X_SHAPES[request.param]), np.eye(4)[rng.integers(4, size=7)]


def trained_somewhat(method, operators, base):
    """Return the parameters of a method away from their start: B = 0 would hide A's gradient."""
    rng = np.random.default_rng(7)
    starts = {name: method.start(operators[name], layer, seed=7) for name, layer in base.items()}
    return {
        name: start._make(leaf + 0.3 * draw(rng, *leaf.shape) for leaf in start)
        for name, start in starts.items()
    }


def test_the_digits_are_those_of_the_source():
    digits = load_digits()
    assert digits.images.shape == (1797, 8, 8)
    counts = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    np.testing.assert_array_equal(np.bincount(digits.labels), counts)
    assert int((16 * digits.images).sum(dtype=np.float64)) == 561_718


def test_digits_are_turned_counter_clockwise():
    image = np.arange(4.0).reshape(1, 2, 2)
    np.testing.assert_array_equal(Digits(image, None).turned().images, [[[1.0, 3.0], [0.0, 2.0]]])


def test_a_choice_made_by_validation_has_not_seen_the_test_digits():
    training, test = split_digits(validate=False)
    smaller, validation = split_digits(validate=True)
    as_rows = [{row.tobytes() for row in part.images} for part in (training, test)]
    assert as_rows[0].isdisjoint(as_rows[1])
    rows = [image.tobytes() for part in (smaller, validation) for image in part.images]
    assert sorted(rows) == sorted(image.tobytes() for image in training.images)
    assert len(training.labels) + len(test.labels) == 1797


@pytest.mark.parametrize("name", ["LoRA", "DoRA exact", "full fine-tuning"])
def test_gradients_are_those_of_the_loss(name, task):
    method, (operators, base, x, targets) = METHODS[name], task
    at = trained_somewhat(method, operators, base)
    _, gradients = loss_and_gradients(method, operators, base, at, x, targets)
    rng = np.random.default_rng(2)
    for layer, leaves in at.items():
        for field, leaf in leaves._asdict().items():
            along = draw(rng, *leaf.shape)
            ahead, behind = (
                loss_and_gradients(
                    method,
                    operators,
                    base,
                    {**at, layer: leaves._replace(**{field: leaf + step * along})},
                    x,
                    targets,
                )[0]
                for step in (1e-6, -1e-6)
            )
            gradient = getattr(gradients[layer], field)
            error = abs(np.sum(gradient * along) - (ahead - behind) / 2e-6)
            allowed = 1e-6 * np.linalg.norm(gradient) * np.linalg.norm(along)
            assert error <= allowed, (layer, field)


@pytest.mark.parametrize("name", METHODS)
def test_the_merged_network_is_the_adapted_one(name, task):
    method, (operators, base, x, _) = METHODS[name], task
    at = trained_somewhat(method, operators, base)
    adapted = adapted_logits(method, operators, base, at, x)
    assert np.max(np.abs(adapted - plain_logits(operators, base, x))) > 0.01
    np.testing.assert_allclose(
        plain_logits(operators, merged(method, operators, base, at), x), adapted, atol=1e-13
    )


@pytest.mark.parametrize("network", PLANS)
def test_the_network_fits_the_digits_and_the_largest_rank(network):
    plan = PLANS[network]
    x = load_digits().inputs(plan.x_shape)[:3]
    base = plan.draw(np.random.default_rng(0), np.asarray)
    assert plain_logits(plan.operators, base, x).shape == (3, 10)
    methods(plan.rank_limit)
    for rank, fits in ((plan.rank_limit, True), (plan.rank_limit + 1, False)):
        method = methods(rank)["LoRA"]
        outcomes = []
        for name, layer in base.items():
            try:
                method.start(plan.operators[name], layer, seed=0)
                outcomes.append(True)
            except ValueError:
                outcomes.append(False)
        assert all(outcomes) == fits


def test_each_seed_starts_differently():
    first, second = experiment(Settings(seeds=2, steps=10)).methods["LoRA"]
    assert first.losses != second.losses


@pytest.mark.parametrize("network", PLANS)
def test_every_backend_takes_the_same_steps(usable_library, network):
    outcomes = [
        experiment(Settings(network, name, seeds=1, steps=10)) for name in ("numpy", usable_library)
    ]
    losses, others = (
        {name: run.losses for name, (run,) in outcome.methods.items()} for outcome in outcomes
    )
    assert len(losses) == 4
    for name, values in losses.items():
        assert others[name] == pytest.approx(values, rel=1e-3), name
