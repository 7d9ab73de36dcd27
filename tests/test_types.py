"""Config: its scaling, its defaults and its error messages."""

from __future__ import annotations

import math

import numpy as np
import pytest

from doraxp import Config


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        (Config(8), 1.0),
        (Config(8, -1), 1.0),
        (Config(8, 16), 2.0),
        (Config(16, 8, rslora=True), 2.0),
        (Config(16, rslora=True), 4.0),
        (Config(np.int64(4), np.float32(2)), 0.5),
    ],
)
def test_scaling_is_alpha_over_rank_or_its_root(config, scaling):
    assert config.scaling == scaling
    assert type(config.scaling) is float
    assert type(config.rank) is int


def test_defaults_are_the_weight_form_and_the_exact_gradient():
    assert (Config(1).form, Config(1).norm_gradient) == ("weight", "exact")


def test_config_is_frozen_and_hashable():
    assert {Config(2): 1}[Config(2)] == 1
    with pytest.raises(AttributeError):
        Config(2).rank = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank must be at least 1, got 0"),
        ({"rank": 2.0}, TypeError, "rank must be an integer, got 2.0"),
        ({"rank": True}, TypeError, "rank must be an integer, got True"),
        ({"rank": 1, "alpha": 0}, ValueError, r"alpha must be finite and not 0 .* got 0.0"),
        ({"rank": 1, "alpha": math.nan}, ValueError, r"alpha must be finite and not 0 .* got nan"),
        ({"rank": 1, "alpha": math.inf}, ValueError, r"alpha must be finite and not 0 .* got inf"),
        ({"rank": 1, "alpha": "1"}, TypeError, "alpha must be a number or None, got '1'"),
        ({"rank": 1, "alpha": True}, TypeError, "alpha must be a number or None, got True"),
        ({"rank": 1, "alpha": 10**400}, ValueError, r"alpha must be finite .* got inf"),
        ({"rank": 1, "rslora": "no"}, TypeError, "rslora must be True or False, got 'no'"),
        ({"rank": 1, "form": "row"}, ValueError, r"form must be one of .*weight.* got 'row'"),
        (
            {"rank": 1, "norm_gradient": "none"},
            ValueError,
            r"norm_gradient must be one of .*exact.* got 'none'",
        ),
    ],
)
def test_config_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        Config(**arguments)
