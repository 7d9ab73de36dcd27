"""The modes of PyTorch that concern a call: recording, transforms, fake tensors, autocast."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor


def is_recorded(*arrays: Tensor | None) -> bool:
    """Return whether autograd keeps a graph of what is computed from the arrays."""
    if not torch.is_grad_enabled():
        return False
    return any(array is not None and array.requires_grad for array in arrays)


def is_transformed() -> bool:
    """Return whether `torch.func`, forward mode or a tracer is at work, which need the definition.

    A tracer is `torch.jit.trace`, or `make_fx`. It cannot record that a value is read.
    """
    transformed: bool = torch._C._are_functorch_transforms_active()
    level: int = torch.autograd.forward_ad._current_level
    if transformed or level >= 0:
        return True
    if torch.compiler.is_compiling():  # it cannot look at the tracers
        return False
    if torch._C._get_tracing_state() is not None:
        return True
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def is_fake() -> bool:
    """Return whether PyTorch computes shapes and no values, as in a `FakeTensorMode`."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def is_autocast(x: Tensor) -> bool:
    """Return whether autocast is on for the device of x."""
    kind = x.device.type
    # is_autocast_enabled raises for a device without autocast, such as meta. To ask takes 1 µs.
    if kind not in ("cpu", "cuda") and not torch.amp.is_autocast_available(kind):
        return False
    enabled: bool = torch.is_autocast_enabled(kind)
    return enabled


def without_autocast(x: Tensor) -> Any:
    """Return a block that turns autocast off for the device of x."""
    return (
        torch.autocast(x.device.type, enabled=False) if is_autocast(x) else contextlib.nullcontext()
    )
