"""Kinds of layer, and fresh adapters for a dict of weights; on every backend."""

from __future__ import annotations

import re

import numpy as np
import pytest

import doraxp
from doraxp import Adapter, Config, LayerKind

STORED = {
    "linear": (LayerKind(), (6, 5), (6, 5)),
    "experts": (LayerKind("experts"), (3, 6, 5), (3, 6, 5)),
    "transposed": (LayerKind("transposed"), (5, 6), (6, 5)),
    "embedding": (LayerKind("embedding"), (9, 4), (4, 9)),
    "columns": (LayerKind("columns"), (6, 5), (5, 6)),
    "conv1d": (LayerKind("conv"), (6, 2, 3), (6, 6)),
    "conv2d": (LayerKind("conv"), (6, 2, 3, 2), (6, 12)),
    "conv3d": (LayerKind("conv"), (6, 2, 3, 2, 1), (6, 12)),
    "grouped": (LayerKind("conv", groups=2), (6, 2, 3, 3), (2, 3, 18)),
}


@pytest.mark.parametrize("name", STORED)
def test_decompose_merge_and_analysis_work_for_every_kind(backend, draw, assert_close, name):
    kind, shape, matrix_shape = STORED[name]
    weight = draw(*shape)
    matrix = kind.matrix(weight)
    assert tuple(matrix.shape) == matrix_shape == kind.matrix_shape(shape)
    assert_close(kind.restore(matrix, shape), weight, rtol=0)

    layer = doraxp.adapt({"a.weight": weight}, ["a"], Config(2), seed=0, kinds={"a": kind})["a"]
    assert layer.shape == shape
    magnitude, _ = doraxp.decompose(matrix)
    assert_close(layer.adapter.magnitude, magnitude, rtol=0)
    merged = doraxp.merge(matrix, layer.adapter, layer.config)
    assert_close(kind.restore(merged, shape), weight, rtol=0)
    doubled = layer.adapter._replace(magnitude=2 * magnitude)
    change = doraxp.magnitude_direction_change(matrix, doraxp.merge(matrix, doubled, layer.config))
    assert_close(change.magnitude_rows, magnitude, rtol=1e-12)


def test_the_update_of_a_group_stays_in_that_group():
    kind, shape, _ = STORED["grouped"]
    rng = np.random.default_rng(0)
    weight = rng.standard_normal(shape)
    layer = doraxp.adapt({"a": weight}, ["a"], Config(1), seed=0, kinds={"a": kind})["a"]
    b = np.zeros(layer.adapter.lora_b.shape)
    b[0] = 1
    adapter = Adapter(layer.adapter.lora_a, b, layer.adapter.magnitude)
    merged = kind.restore(doraxp.merge(kind.matrix(weight), adapter, layer.config), shape)
    changed = np.abs(merged - weight).reshape(6, -1).max(axis=1) > 0
    np.testing.assert_array_equal(changed, [True] * 3 + [False] * 3)


@pytest.mark.parametrize(
    ("name", "groups", "shape", "message"),
    [
        ("dense", 1, (2, 2), "kind must be one of"),
        ("linear", 2, (2, 2), "groups must be 1, or at least 1 for a conv"),
        ("conv", 0, (2, 2, 2), "groups must be 1, or at least 1 for a conv"),
        ("linear", 1, (2, 2, 2), "kind 'linear' must have shape (out, in)"),
        ("experts", 1, (2, 2), "kind 'experts' must have shape (*stack, out, in)"),
        ("conv", 1, (2, 2), "kind 'conv' must have shape (out, in/groups, *kernel)"),
        ("conv", 3, (4, 2, 1), "out a multiple of groups = 3, got (4, 2, 1)"),
        ("embedding", 1, (0, 2), "no axis of length 0"),
    ],
)
def test_a_weight_that_does_not_fit_its_kind_is_refused(name, groups, shape, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LayerKind(name, groups).matrix_shape(shape)


WEIGHTS = {
    "embed_tokens.weight": np.ones((9, 4)),
    "layers.0.q_proj.weight": np.ones((4, 4)),
    "layers.0.k_proj.weight": np.ones((2, 4)),
    "layers.1.q_proj.weight": np.ones((4, 4)),
    "layers.1.conv.weight": np.ones((4, 4, 3)),
    "layers.1.experts": np.ones((3, 4, 4)),
    "layers.1.norm.weight": np.ones(4),
    "lm_head.weight": np.ones((9, 4)),
}


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        (["q_proj"], ["layers.0.q_proj", "layers.1.q_proj"]),
        (["layers.0.q_proj", "k_proj"], ["layers.0.q_proj", "layers.0.k_proj"]),
        (["0.q_proj"], ["layers.0.q_proj"]),
        (r".*\.[qk]_proj", ["layers.0.q_proj", "layers.0.k_proj", "layers.1.q_proj"]),
        ("all-linear", ["layers.0.q_proj", "layers.0.k_proj", "layers.1.q_proj"]),
    ],
)
def test_targets_are_names_or_ends_of_names_or_expressions_or_all(targets, found):
    assert list(doraxp.adapt(WEIGHTS, targets, Config(2), seed=0)) == found


def test_a_module_that_cannot_be_adapted_is_named():
    weights = {"a.q.weight": np.eye(4), "a.gate.weight": np.ones((2, 4))}
    with pytest.raises(ValueError, match=r"^a\.gate: rank must be in 1\.\.2 "):
        doraxp.adapt(weights, "all-linear", Config(3), seed=0)
    with pytest.raises(ValueError, match=r"^a\.q: alpha must be finite and not 0"):
        doraxp.adapt(weights, "all-linear", Config(1), seed=0, alpha_pattern={"q": 0})


def test_kinds_rank_and_alpha_are_given_by_pattern():
    kinds = {"conv": LayerKind("conv"), "experts": LayerKind("experts")}
    patterns = {"rank_pattern": {"k_proj": 1}, "alpha_pattern": {r"layers\.1\..*": 8}}
    layers = doraxp.adapt(WEIGHTS, "all-linear", Config(2, 4), seed=0, kinds=kinds, **patterns)
    assert {path: (layer.config.rank, layer.config.alpha) for path, layer in layers.items()} == {
        "layers.0.q_proj": (2, 4),
        "layers.0.k_proj": (1, 4),
        "layers.1.q_proj": (2, 8),
        "layers.1.experts": (2, 8),
    }
    a = [layer.adapter.lora_a for layer in layers.values()]
    assert not np.array_equal(a[0], a[2])  # each draws from its own seed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_modules": ["q_porj"]}, "target_modules 'q_porj' must match one of 8 modules"),
        ({"target_modules": "q"}, "target_modules 'q' must match one of 8 modules; the"),
        ({"target_modules": ["conv"]}, "kinds must have an entry for layers.1.conv, such as conv"),
        ({"target_modules": ["q_proj"], "rank_pattern": {"k_proj": 1}}, "rank_pattern 'k_proj'"),
        ({"target_modules": ["q_proj"], "kinds": {"cnv": LayerKind("conv")}}, "nearest is conv"),
    ],
)
def test_the_error_about_a_pattern_without_a_match_has_near_names(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        doraxp.adapt(WEIGHTS, config=Config(2), seed=0, **arguments)
