"""Print, as JSON, the errors and collectives of a layer over 8 devices of one CPU.

The errors are those against one device. It is a script because JAX counts its devices at its start.
"""

from __future__ import annotations

import collections
import json
import os
import re

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
    "lora_a": (3, 32),
    "lora_b": (24, 3),
    "magnitude": (24,),
    "bias": (24,),
}
SPLITS = {
    "column": {"weight": P("d"), "lora_b": P("d"), "magnitude": P("d"), "bias": P("d")},
    "row": {"x": P(None, "d"), "weight": P(None, "d"), "lora_a": P(None, "d")},
    "data": {"x": P("d")},
}
COLLECTIVE = re.compile(
    r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-\w+)(?:-start)?\("
)


def layer(x, weight, adapter, bias, config, prepared=None):
    return dora_linear(x, weight, adapter, config, bias, prepared=prepared, train_base=True)


def functions(config):
    """Return the functions to compile, of x, weight, adapter, bias and prepared, by name."""

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


def run(config, put):
    """Return the results of every function, and the collectives in its compiled code."""
    rng = np.random.default_rng(3)
    given = {name: put(name, rng.standard_normal(shape)) for name, shape in SHAPES.items()}
    adapter = Adapter(*(given[name] for name in Adapter._fields))
    prepared = jax.jit(doraxp.prepare, static_argnums=2)(given["weight"], adapter, config)
    arguments = given["x"], given["weight"], adapter, given["bias"], prepared
    results, counts = {}, {}
    for name, function in functions(config).items():
        compiled = jax.jit(function).lower(*arguments).compile()
        results[name] = [np.asarray(leaf) for leaf in jax.tree.leaves(compiled(*arguments))]
        counts[name] = collections.Counter(COLLECTIVE.findall(compiled.as_text()))
    return results, counts


def main():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    report = {}
    for form in ("weight", "direction"):
        for norm_gradient in ("exact", "detached"):
            config = Config(3, 2, form=form, norm_gradient=norm_gradient)
            single, _ = run(config, lambda _, values: jax.numpy.asarray(values))
            for split, specs in SPLITS.items():

                def put(name, values, specs=specs):
                    return jax.device_put(values, NamedSharding(mesh, specs.get(name, P())))

                results, counts = run(config, put)
                errors = {
                    name: max(
                        float(np.max(np.abs(got - want)) / np.max(np.abs(want)))
                        for got, want in zip(leaves, single[name], strict=True)
                    )
                    for name, leaves in results.items()
                }
                report[f"{form}-{norm_gradient}-{split}"] = {"errors": errors, "counts": counts}
    print(json.dumps(report))


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    main()
