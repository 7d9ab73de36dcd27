"""Config: its scaling, its defaults and its error messages."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import pickle

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


@pytest.mark.parametrize(
    ("argument", "advice"),
    [
        ({"r": 8}, "got r=8: write rank=8"),
        ({"lora_r": 8}, "got lora_r=8: write rank=8"),
        ({"lora_rank": 8}, "got lora_rank=8: write rank=8"),
        ({"lora_alpha": 16}, "got lora_alpha=16: write alpha=16"),
        ({"use_rslora": True}, "got use_rslora=True: write rslora=True"),
        ({"rs_lora": True}, "got rs_lora=True: write rslora=True"),
        (
            {"lora_dropout": 0.1},
            "got lora_dropout=0.1: give the rate to the layers, as adapt_layers(..., dropout=0.1) "
            "or DoRALayer(..., dropout=0.1)",
        ),
        (
            {"target_modules": ["q", "v"]},
            "got target_modules=['q', 'v']: give it to adapt_layers or adapt, as target_modules",
        ),
        (
            {"rank_pattern": {"q": 4}},
            "got rank_pattern={'q': 4}: give it to adapt_layers or adapt, as rank_pattern",
        ),
        (
            {"exclude_modules": ["q"]},
            "got exclude_modules=['q']: give it to adapt_layers or adapt, as exclude_modules",
        ),
        (
            {"alpha_pattern": {"q": 4}},
            "got alpha_pattern={'q': 4}: give it to adapt_layers or adapt, as alpha_pattern",
        ),
        (
            {"init_lora_weights": True},
            "got init_lora_weights=True: give method to adapt_layers, DoRALayer or init",
        ),
        (
            {"train_base": True},
            "got train_base=True: give it to DoRALayer or adapt_layers, as train_base",
        ),
        ({"use_dora": True}, "got use_dora=True: leave it out, because each Config is of DoRA"),
        ({"scale": 2.0}, "got scale=2.0: write alpha, which is the scale times the rank"),
        ({"scaling": 2.0}, "got scaling=2.0: write alpha, which is the scale times the rank"),
        ({"rnak": 8}, "got rnak=8: the nearest is rank"),
        ({"zzz": 8}, "got zzz=8"),
    ],
)
def test_a_name_of_another_library_is_refused_with_the_name_to_write(argument, advice):
    rule = "Config takes rank, alpha, rslora, form, norm_gradient and dropout, "
    for others in ({}, {"rank": 8}):
        with pytest.raises(TypeError) as caught:
            Config(**others, **argument)
        assert str(caught.value) == rule + advice


@pytest.mark.parametrize("rate", [0.1, 0])
def test_a_rate_in_place_of_the_kind_of_dropout_is_refused_with_its_place(rate):
    with pytest.raises(ValueError, match="dropout must be one of") as caught:
        Config(8, dropout=rate)
    assert str(caught.value) == (
        f"dropout must be one of ('input', 'low_rank'), got {rate}: give the rate to the layers, "
        f"as adapt_layers(..., dropout={rate}) or DoRALayer(..., dropout={rate})"
    )


@pytest.mark.parametrize("kind", ["base", True])
def test_an_unknown_kind_of_dropout_is_not_taken_for_a_rate(kind):
    with pytest.raises(ValueError, match=rf"\('input', 'low_rank'\), got {kind!r}$"):
        Config(8, dropout=kind)


def test_config_has_the_signature_of_its_fields_and_is_pickled_copied_and_replaced():
    names = [field.name for field in dataclasses.fields(Config)]
    assert list(inspect.signature(Config).parameters) == names
    config = Config(8, 16, rslora=True, form="direction")
    for again in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config), copy.copy(config)):
        assert again == config
    assert dataclasses.replace(config, alpha=4) == Config(8, 4, rslora=True, form="direction")
    with pytest.raises(TypeError, match=r"got r=4: write rank=4"):
        dataclasses.replace(config, r=4)
