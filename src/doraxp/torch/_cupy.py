"""CuPy's kernels for PyTorch's tensors on a GPU: the same memory, stream and allocator.

A tensor and an array of CuPy share their memory through DLPack. The kernels' own memory comes from
PyTorch's allocator, and they run on PyTorch's current stream: nothing waits, nothing is
copied, and PyTorch's memory statistics stay true.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from doraxp._base.types import Adapter, Gradients
from doraxp._core.matrix import Cache, backward_checked, forward_checked
from doraxp._core.prepared import Prepared, prepare_checked
from doraxp.backends import available, compute_dtype, operations
from doraxp.torch._kept import with_weight
from doraxp.torch._ops import Call, Forward

_CHOSEN: ContextVar[bool] = ContextVar("cupy_kernels", default=False)


@contextlib.contextmanager
def cupy_kernels() -> Iterator[None]:
    """Let CuPy's kernels compute the layers whose tensors are on an NVIDIA GPU.

    The block holds for `dora_linear`, `DoRALinear` and accelerated layers of PEFT. A backward uses
    the kernels if its forward did. Tensors on other devices are computed by PyTorch as without the
    block, and so are layers that torch.compile compiles.

    Raises
    ------
    RuntimeError
        CuPy cannot run here; the message says why.

    Examples
    --------
    >>> import doraxp
    >>> with doraxp.torch.cupy_kernels():  # doctest: +SKIP
    ...     loss = model(x).square().mean()
    >>> loss.backward()  # doctest: +SKIP
    """
    status = next(status for status in available() if status.name == "cupy")
    if not status.usable:
        raise RuntimeError(f"cupy_kernels needs CuPy and an NVIDIA GPU; CuPy is {status.detail}")
    token = _CHOSEN.set(True)
    try:
        yield
    finally:
        _CHOSEN.reset(token)


def is_chosen(tensor: Tensor) -> bool:
    """Return whether CuPy's kernels compute a layer with this tensor here."""
    return _CHOSEN.get() and tensor.device.type == "cuda"


def forward_on_cupy(
    x: Tensor, weight: Tensor, adapter: Adapter, bias: Tensor | None, call: Call
) -> Forward:
    """Return the same as `forward_layer`, computed by CuPy's kernels."""
    with on_stream(x):
        leaves: tuple[Any, ...] = adapter
        plain = Adapter(*map(taken, leaves))
        base, wide_bias = taken(weight), None if bias is None else taken(bias)
        ops, config = operations(weight=base, **plain._asdict()), call.config
        dtype = compute_dtype(base, *plain, xp=ops.xp)
        known: Any = prepare_checked(base, plain, config, None, None, dtype, ops=ops)
        inputs = taken(x)
        # A product with a dropout mask is rounded to x's dtype in mixed precision alone.
        if call.narrow and ops.operand_dtype(inputs, inputs, dtype, masked=True) == inputs.dtype:
            base = taken(weight.to(x.dtype))
            known = with_weight(known, base)
        y, cache = forward_checked(
            inputs, base, plain, config, wide_bias, known, None, None, None, dtype, ops=ops
        )
        low, z = (given(ops.xp.ascontiguousarray(array)) for array in (cache.low_rank, cache.z))
        return Forward(given(y), z, low, cache.prepared)


def backward_on_cupy(
    dy: Tensor, x: Tensor, weight: Tensor, z: Tensor, low_rank: Tensor, prepared: Prepared,
    *, train_base: bool,
) -> Gradients:  # fmt: skip
    """Return the same as `backward_layer`, for a forward on CuPy, whose `prepared` has W."""
    with on_stream(x):
        cache = Cache(taken(x), None, taken(low_rank), taken(z), prepared)
        ops = operations(weight=cache.z)
        found = backward_checked(taken(dy), cache, train_base=train_base, ops=ops)
        dweight = None if found.weight is None else given(found.weight)
        leaves: Any = Adapter(*map(given, found.adapter))
        dx: Any = given(found.x)
        return Gradients(dx, leaves, dweight, None)


@contextlib.contextmanager
def on_stream(tensor: Tensor) -> Iterator[None]:
    """Let CuPy allocate by PyTorch, on the tensor's device, and run on PyTorch's current stream."""
    cuda, device = importlib.import_module("cupy").cuda, tensor.device.index
    stream = cuda.ExternalStream(torch.cuda.current_stream(device).cuda_stream, device)
    with cuda.Device(device), stream, cuda.using_allocator(_allocator()):
        yield


def taken(tensor: Tensor) -> Any:
    """Return the array of CuPy with a tensor's memory."""
    return importlib.import_module("cupy").from_dlpack(tensor.detach())


def given(array: Any) -> Tensor:
    """Return the tensor with the memory of an array of CuPy."""
    share: Any = torch.utils.dlpack.from_dlpack
    tensor: Tensor = share(array)
    return tensor


@functools.cache
def _allocator() -> Any:
    """Return the allocator that asks PyTorch's for memory on its current stream."""
    cuda: Any = torch.cuda
    kind = importlib.import_module("cupy").cuda.PythonFunctionAllocator
    return kind(
        lambda size, device: cuda.caching_allocator_alloc(size, device),
        lambda address, device: cuda.caching_allocator_delete(address),
    ).malloc
