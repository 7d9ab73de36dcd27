"""The graph of a DoRA layer for ONNX: the forward pass, and all gradients.

    x (tokens, in), weight, lora_a, lora_b, magnitude, bias, dy  ->  y, dx, da, db, dm, dw, dbias

doraxp computes on arrays of ndonnx without values, and ndonnx records the operations.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ndonnx
import onnx

import doraxp
from doraxp import Adapter
from doraxp.testing import catalogue

CASE = "tall"
"""The case whose shapes and scaling the graph has."""


def layer(dtype: str) -> bytes:
    """Return the file of the graph, for arrays of `dtype`, float32 or float64."""
    (case,) = (case for case in catalogue() if case.name == CASE)
    arguments: dict[str, Any] = {
        name: ndonnx.argument(shape=array.shape, dtype=getattr(ndonnx, dtype))
        for name, array in case.arrays.items()
    }
    adapter = Adapter(*(arguments[name] for name in Adapter._fields))
    y, cache = doraxp.forward(
        arguments["x"], arguments["weight"], adapter, case.config, bias=arguments["bias"]
    )
    found = doraxp.backward(arguments["dy"], cache, train_base=True)
    da, db, dm = found.adapter
    results = {"y": y, "dx": found.x, "da": da, "db": db, "dm": dm, "dw": found.weight}
    model = ndonnx.build(arguments, {**results, "dbias": found.bias})
    nodes = needed(
        list(without_branches(model.graph.node)), {value.name for value in model.graph.output}
    )
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.checker.check_model(model, full_check=True)
    text: bytes = model.SerializeToString(deterministic=True)
    return text


def without_branches(nodes: Any) -> Iterator[Any]:
    """Yield the nodes, and in the place of each `If` those of its branch for arrays with numbers.

    ndonnx asks before each product whether an array is empty. Not every importer knows `If`.
    """
    for node in nodes:
        if node.op_type != "If":
            yield node
            continue
        (branch,) = (a.g for a in node.attribute if a.name == "else_branch")
        yield from without_branches(branch.node)
        (found,), (wanted,) = branch.output, node.output
        yield onnx.helper.make_node("Identity", [found.name], [wanted])


def needed(nodes: list[Any], outputs: set[str]) -> list[Any]:
    """Return the nodes that the outputs depend on, in their order."""
    kept = []
    for node in reversed(nodes):
        if outputs.intersection(node.output):
            kept.append(node)
            outputs.update(node.input)
    return kept[::-1]
