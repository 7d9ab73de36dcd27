"""Print, as JSON, the errors and collectives of a layer over 8 devices of one CPU.

The errors are those against one device. It is a script because JAX counts its devices at its start.
"""

from __future__ import annotations

import collections
import json
import os
import re
from functools import partial

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import doraxp
from doraxp import Adapter, Config
from doraxp.jax import dora_linear, merge

SHAPES = {
    "x": (16, 32),
    "weight": (24, 32),
    "lora_a": (8, 32),
    "lora_b": (24, 8),
    "magnitude": (24,),
    "bias": (24,),
}
SPLITS = {
    "column": {"weight": P("d"), "lora_b": P("d"), "magnitude": P("d"), "bias": P("d")},
    "row": {"x": P(None, "d"), "weight": P(None, "d"), "lora_a": P(None, "d")},
    "data": {"x": P("d")},
}
"""The splits whose collectives are counted."""
MORE_SPLITS = {
    "W rows": {"weight": P("d")},
    "W rows, x columns": {"weight": P("d"), "x": P(None, "d")},
    "W columns": {"weight": P(None, "d")},
    "W columns, x columns": {"weight": P(None, "d"), "x": P(None, "d")},
    "W columns, x tokens": {"weight": P(None, "d"), "x": P("d")},
    "B rows": {"lora_b": P("d")},
    "ranks": {"lora_a": P("d"), "lora_b": P(None, "d")},
    "bias": {"bias": P("d")},
}
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
CONFIGS = {
    f"{form}-{norm_gradient}": Config(8, 2, form=form, norm_gradient=norm_gradient)
    for form in ("weight", "direction")
    for norm_gradient in ("exact", "detached")
}
FEW = ("weight-exact", "direction-detached")
FEW_SPLITS = ("W rows", "W columns, x columns", "ranks")
"""The configs and splits that run where each one takes long and the other ones show the same."""
COLLECTIVE = re.compile(
    r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-\w+)(?:-start)?\("
)


def layer(x, weight, adapter, bias, config, prepared=None):
    return dora_linear(x, weight, adapter, config, bias, prepared=prepared, train_base=True)


def counted(config):
    """Return functions of x, weight, adapter, bias and prepared, by name, to count collectives."""

    def forward(x, weight, adapter, bias, prepared):
        weight, adapter = prepared.weight, prepared.adapter
        return layer(x, weight, adapter, bias, config, prepared)

    def forward_and_norm(x, weight, adapter, bias, prepared):
        return layer(x, weight, adapter, bias, config)

    def step(x, weight, adapter, bias, prepared):
        """Return a loss and the gradients of all arguments."""

        def loss(x, weight, adapter, bias):
            return jax.numpy.sum(layer(x, weight, adapter, bias, config) ** 2)

        return jax.value_and_grad(loss, range(4))(x, weight, adapter, bias)

    def merged(x, weight, adapter, bias, prepared):
        return merge(weight, adapter, config)

    return {f.__name__: f for f in (forward, forward_and_norm, step, merged)}


def everything(config, x, weight, adapter, bias):
    """Return the results of all functions of a layer; the core's, and derivatives of all kinds."""
    prepared = doraxp.prepare(weight, adapter, config)
    core, cache = doraxp.forward(x, weight, adapter, config, bias=bias, prepared=prepared)

    def loss(x, weight, adapter, bias):
        return jax.numpy.sum(layer(x, weight, adapter, bias, config) ** 2)

    def merged(weight, adapter):
        return jax.numpy.sum(merge(weight, adapter, config, train_base=True) ** 4)

    def slope(magnitude):
        return jax.grad(loss, 2)(x, weight, adapter._replace(magnitude=magnitude), bias)

    given, m = (x, weight, adapter, bias), adapter.magnitude
    return {
        "core": (prepared.norm, core, doraxp.merge(weight, adapter, config)),
        "backward": doraxp.backward(2 * core, cache, train_base=True),
        "reverse": jax.value_and_grad(loss, range(4))(*given),
        "plain": jax.grad(lambda a: (doraxp.forward(x, weight, a, config)[0] ** 2).sum())(adapter),
        "linear map": jax.jvp(lambda *i: layer(*i, config), given, given),
        "merged": jax.value_and_grad(merged, (0, 1))(weight, adapter),
        "second": jax.jvp(slope, (m,), (m,)),
    }


def run(config, put):
    """Return the results of the counted functions, and the collectives in the compiled code."""
    x, weight, adapter, bias = arguments(put)
    prepared = jax.jit(doraxp.prepare, static_argnums=2)(weight, adapter, config)
    results, counts = {}, {}
    for name, function in counted(config).items():
        compiled = jax.jit(function).lower(x, weight, adapter, bias, prepared).compile()
        results[name] = compiled(x, weight, adapter, bias, prepared)
        counts[name] = collections.Counter(COLLECTIVE.findall(compiled.as_text()))
    return results, counts


def arguments(put):
    rng = np.random.default_rng(3)
    given = {name: put(name, rng.standard_normal(shape)) for name, shape in SHAPES.items()}
    adapter = Adapter(*(given[name] for name in Adapter._fields))
    return given["x"], given["weight"], adapter, given["bias"]


def alone(_, values):
    return jax.numpy.asarray(values)


def over(mesh, specs):
    return lambda name, values: jax.device_put(values, NamedSharding(mesh, specs.get(name, P())))


def errors(got, want):
    """Return the largest error of each function's results, relative to the largest value."""
    return {name: error(got[name], want[name]) for name in want}


def error(got, want):
    pairs = zip(*map(jax.tree.leaves, (got, want)), strict=True)
    return max(float(np.max(np.abs(np.asarray(a) - b)) / np.max(np.abs(b))) for a, b in pairs)


def collectives():
    """Return the errors and collectives of each config and split."""
    report = {}
    for named, config in CONFIGS.items():
        single, _ = run(config, alone)
        for kind, axis_type in KINDS.items():
            if kind == "explicit" and named not in FEW:
                continue
            mesh = jax.make_mesh((8,), ("d",), axis_types=(axis_type,))
            for split, specs in SPLITS.items():
                results, counts = run(config, over(mesh, specs))
                case = {"errors": errors(results, single), "counts": counts}
                report[f"{kind}-{named}-{split}"] = case
    return report


def splits():
    """Return the errors of all functions for each split, and for several axes of tokens."""
    config = CONFIGS["direction-exact"]
    function = jax.jit(everything, static_argnums=0)
    given = arguments(alone)
    single = function(config, *given)
    report = {}
    for kind, axis_type in KINDS.items():
        mesh = jax.make_mesh((8,), ("d",), axis_types=(axis_type,))
        for split, specs in MORE_SPLITS.items():
            if kind == "auto" and split not in FEW_SPLITS:
                continue
            got = function(config, *arguments(over(mesh, specs)))
            report[f"{kind}-{split}"] = errors(got, single)
        report[f"{kind}-fresh"] = fresh(mesh, config)
        report[f"{kind}-axes of tokens"] = axes_of_tokens(axis_type, config, *given[:3])
    return report


def fresh(mesh, config):
    """Return the errors of an adapter that is made beside a split weight, and of its layer.

    The other arrays are on one device, where JAX may move them from, or are NumPy's.
    """
    x, weight, _, bias = arguments(alone)
    split = jax.device_put(weight, NamedSharding(mesh, P(None, "d")))
    wanted, adapter = (doraxp.init(w, config, seed=0) for w in (weight, split))
    y, _ = doraxp.forward(x, weight, wanted, config, bias=bias)
    return {
        "init": error((adapter.lora_a, adapter.magnitude), (wanted.lora_a, wanted.magnitude)),
        "forward": error(doraxp.forward(x, split, adapter, config, bias=bias)[0], y),
        "dora_linear": error(dora_linear(np.asarray(x), split, adapter, config, bias), y),
    }


def axes_of_tokens(axis_type, config, x, weight, adapter):
    """Return the error of y where x has two axes of tokens, each split over an axis of a mesh."""
    mesh = jax.make_mesh((2, 4), ("d", "t"), axis_types=(axis_type,) * 2)
    x = x.reshape(4, 4, -1)  # an axis of tokens would have to be split in pieces of pieces
    split = jax.device_put(x, NamedSharding(mesh, P("d", "t")))
    whole = jax.device_put((weight, adapter), NamedSharding(mesh, P()))
    compiled = jax.jit(dora_linear, static_argnums=3).lower(split, *whole, config).compile()
    assert not COLLECTIVE.findall(compiled.as_text())
    return {"forward": error(compiled(split, *whole), dora_linear(x, weight, adapter, config))}


def maps():
    """Return the errors of derivatives under `jax.shard_map`. Tokens are split, all else is not."""
    report = {}
    for named in FEW:
        functions = of_a_part(CONFIGS[named])
        given = arguments(alone)
        single = {name: function(*given) for name, function in functions.items()}
        for kind, axis_type in KINDS.items():
            mesh = jax.make_mesh((4, 2), ("d", "t"), axis_types=(axis_type,) * 2)
            x, weight, adapter, bias = arguments(over(mesh, {"x": P("d")}))
            specs = P("d"), P(), P(), P()
            mapped = partial(jax.shard_map, mesh=mesh, in_specs=specs, out_specs=P())
            on_mesh = {
                name: jax.jit(mapped(function))(x, weight, adapter, bias)
                for name, function in of_a_part(CONFIGS[named], "d").items()
            }
            case = errors(on_mesh, single)

            def summed(*given, function=functions["reverse"]):
                return jax.lax.psum(function(*given), "d")

            got = jax.jit(mapped(summed, check_vma=False))(x, weight, adapter, bias)
            case["reverse, unchecked"] = error(got, single["reverse"])

            loss = mapped(of_a_part(CONFIGS[named], "d")["loss"])
            outside = jax.jit(jax.grad(loss, 2))(x, weight, adapter, bias)
            case["reverse, outside"] = error(outside, single["reverse"][0])
            report[f"{kind}-{named}"] = case
    return report


def of_a_part(config, axis=None):
    """Return functions of some tokens, whose results are those of all tokens of the `axis`.

    JAX itself sums the gradient of an argument that is the same on each device.
    """

    def total(part):
        return part if axis is None else jax.lax.psum(part, axis)

    def loss(x, weight, adapter, bias):
        return jax.numpy.sum(layer(x, weight, adapter, bias, config) ** 2)

    def reverse(x, weight, adapter, bias):
        return jax.grad(lambda *trained: loss(x, trained[1], trained[0], bias), (0, 1))(
            adapter, weight
        )

    def forward_mode(x, weight, adapter, bias):
        _, slope = jax.jvp(lambda adapter: loss(x, weight, adapter, bias), (adapter,), (adapter,))
        return total(slope)

    def by_constants(x, weight, adapter, bias):
        """Differentiate by the magnitude and by the bias where another argument varies."""

        def by_magnitude(bias):
            return jax.grad(lambda m: loss(x, weight, adapter._replace(magnitude=m), bias))(
                adapter.magnitude
            )

        def by_bias(magnitude):
            varied = adapter._replace(magnitude=magnitude)
            return jax.grad(lambda bias: loss(x, weight, varied, bias))(bias)

        if axis is not None:
            index = jax.lax.axis_index("t")
            return by_magnitude(bias + index), by_bias(adapter.magnitude + index)
        pairs = [(by_magnitude(bias + i), by_bias(adapter.magnitude + i)) for i in range(2)]
        return jax.tree.map(jax.numpy.add, *pairs)

    def value(*given):
        return total(loss(*given))

    return {
        "loss": value, "reverse": reverse, "forward mode": forward_mode,
        "by constants": by_constants,
    }  # fmt: skip


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    print(json.dumps({part.__name__: part() for part in (collectives, splits, maps)}))
