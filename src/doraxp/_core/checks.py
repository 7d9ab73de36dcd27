"""The rules of shape at the public border: name, rule, value.

`doraxp.backends.operations` holds the arrays to one library, one device and a floating dtype,
and `_scalars` has the rules for all that is no array.
"""

from __future__ import annotations

from doraxp._base.scalars import check_kind
from doraxp._base.types import Adapter, Array, Config
from doraxp.backends import Operations, operations


def check_layer(weight: Array, adapter: Adapter, config: Config, **others: Array) -> Operations:
    """Hold the arguments of one layer to each other; return the operations for its arrays."""
    check_kind("adapter", adapter, Adapter)
    check_kind("config", config, Config)
    ops = operations(weight=weight, **adapter._asdict(), **others)
    check_adapter(weight, adapter, config)
    return ops


def check_weight(weight: Array, name: str = "weight") -> None:
    """Hold a weight to (*stack, out, in), no axis empty."""
    if weight.ndim < 2 or 0 in weight.shape:
        raise ValueError(
            f"{name} must have shape (*stack, out, in) with no axis of length 0, "
            f"got {tuple(weight.shape)}"
        )


def check_config(weight: Array, config: Config) -> None:
    """Hold the rank to what the weight allows."""
    check_weight(weight)
    limit = min(weight.shape[-2:])
    if config.rank > limit:
        raise ValueError(
            f"rank must be in 1..{limit} = 1..min(out, in) for a weight of shape "
            f"{tuple(weight.shape)}, got {config.rank}"
        )


def check_adapter(weight: Array, adapter: Adapter, config: Config) -> None:
    """Hold the adapter's arrays to the weight and the rank."""
    check_config(weight, config)
    *stack, out, inner = weight.shape
    rank = config.rank
    rules = {
        "lora_a": ((*stack, rank, inner), "(*stack, rank, in)"),
        "lora_b": ((*stack, out, rank), "(*stack, out, rank)"),
        "magnitude": ((*stack, out), "(*stack, out)"),
    }
    for name, leaf in adapter._asdict().items():
        shape, rule = rules[name]
        if tuple(leaf.shape) != shape:
            raise ValueError(
                f"{name} must have shape {rule} = {shape} for rank {rank} and a weight of shape "
                f"{tuple(weight.shape)}, got {tuple(leaf.shape)}"
            )


def check_bias(weight: Array, bias: Array | None) -> None:
    """Hold the bias to the weight's rows."""
    if bias is not None and tuple(bias.shape) != tuple(weight.shape[:-1]):
        raise ValueError(
            f"bias must have shape (*stack, out) = {tuple(weight.shape[:-1])} for a weight of "
            f"shape {tuple(weight.shape)}, got {tuple(bias.shape)}"
        )


def check_input(weight: Array, x: Array) -> None:
    """Hold x to the weight's columns, and to its stack."""
    *stack, _, inner = weight.shape
    depth = len(stack)
    fits = x.ndim > depth and tuple(x.shape[:depth]) == tuple(stack) and x.shape[-1] == inner
    if not fits:
        rule = "(*stack, ..., in)" if stack else "(..., in)"
        raise ValueError(
            f"x must have shape {rule} with in = {inner} for a weight of shape "
            f"{tuple(weight.shape)}, got {tuple(x.shape)}"
        )


def check_mask(x: Array, mask: Array | None) -> None:
    """Hold a dropout mask to the shape of x."""
    if mask is not None and tuple(mask.shape) != tuple(x.shape):
        raise ValueError(
            f"dropout_mask must have the shape of x, {tuple(x.shape)}, got {tuple(mask.shape)}"
        )


def check_output_gradient(dy: Array, shape: tuple[int, ...]) -> None:
    """Hold dy to the shape of the y that it is the gradient of."""
    if tuple(dy.shape) != shape:
        raise ValueError(f"dy must have the shape of y, {shape}, got {tuple(dy.shape)}")
