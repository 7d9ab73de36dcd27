"""Calls with arrays of NumPy that mypy must accept: `nox -s typecheck` checks this file."""

from __future__ import annotations

from typing import Any, assert_type

import numpy as np
from numpy.typing import NDArray

import doraxp
from doraxp._base.types import Array
from doraxp.checkpoint import load_training, save_adapters, save_training


def layer(x: NDArray[np.float32], weight: NDArray[np.float16], b: NDArray[np.float64]) -> None:
    config = doraxp.Config(rank=1)
    adapter = doraxp.init(weight, config, seed=0)._replace(lora_b=b)
    y, cache = doraxp.forward(x, weight, adapter, config, bias=None)
    assert_type(y, Array)
    assert_type(doraxp.backward(x, cache).x, Array)
    assert_type(doraxp.merge(weight, adapter, config), Array)
    assert_type(doraxp.Adapter(x, b, b).magnitude, Array)


def packed(x: NDArray[np.float32], codes: NDArray[np.uint8], scale: NDArray[np.float32]) -> None:
    weight = doraxp.QuantisedWeight(codes, x, scale, group=64)
    own: doraxp.RowWeight = weight
    config = doraxp.Config(rank=1)
    adapter = doraxp.init(own, config, seed=0)
    assert_type(doraxp.forward(x, weight, adapter, config)[0], Array)
    assert_type(doraxp.merge(own, adapter, config), Array)


def operated(x: NDArray[np.float32], weight: NDArray[np.float32], adapter: doraxp.Adapter) -> None:
    config, operator = doraxp.Config(rank=1), doraxp.Convolution(padding=1)
    y, _ = doraxp.forward(x, weight, adapter, config, operator=operator)
    assert_type(y, Array)
    own: list[doraxp.Operator] = [doraxp.MatMul(), operator, doraxp.Embedding(scale=2.0)]
    doraxp.DoRALayer(doraxp.Linear(weight), config, seed=0, operator=own[0])
    operators = {"fc": doraxp.MatMul()}
    doraxp.adapt_layers({}, ["fc"], config, seed=0, operators=operators)


def trained(layers: dict[str, doraxp.Adapter], state: dict[str, Array]) -> None:
    optimizer: doraxp.Optimizer = doraxp.AdamW(doraxp.constant_schedule(1e-3), lora_plus=16)
    assert_type(optimizer.step(layers, layers), dict[str, doraxp.Adapter])
    assert_type(doraxp.SGD({"lora_a": 0.1}).step(state, state), dict[str, Array])
    optimizer = doraxp.optimizer_from_settings(optimizer.settings())
    optimizer.state, optimizer.steps = None, 3
    assert_type(doraxp.scaled_gradients(layers, layers), dict[str, doraxp.Adapter])


def model(x: NDArray[np.float32], weight: NDArray[np.float32]) -> None:
    layers = {"fc": doraxp.Linear(weight)}
    config = doraxp.Config(rank=1)
    adapted = doraxp.adapt_layers(layers, ["fc"], config, seed=0, dropout=0.1)
    layer = adapted.adapted["fc"]
    assert_type(layer(x), Array)
    optimizer = doraxp.AdamW(doraxp.constant_schedule(0.1), max_norm=1.0)
    layer.step(optimizer)
    adapted.step(optimizer)
    adapted.parameters = adapted.parameters
    save_training("run", adapted, optimizer, generator=np.random.default_rng(0))
    load_training("run").resume(adapted)
    save_adapters("adapter", adapted)
    save_adapters("adapter", {"fc": layer, "other": (layer.adapter, config)})


def any_array(array: np.ndarray[Any, np.dtype[Any]]) -> Array:
    return array


def not_an_array() -> None:
    doraxp.decompose([[3.0, 4.0]])  # type: ignore[arg-type]  # mypy reports it if it is unused


def not_an_argument() -> None:
    doraxp.Config(r=8)  # type: ignore[call-arg]
    doraxp.Config(8, dropout=0.1)  # type: ignore[arg-type]
