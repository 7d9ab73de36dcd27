"""PEFT's DoRA and LoRA, and torch.optim.AdamW, as contestants. Their tests need PEFT.

x has the weight's dtype and dy that of y, as in training. The adapter is in float32 beside a 16-bit
weight, as `peft.get_peft_model` makes it. The layers get copies of the arrays.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING, Any

from doraxp._base.types import Adapter, Array, NormGradient
from doraxp.backends import available
from doraxp.bench._contestant import Contestant
from doraxp.bench._torch import Block, Tensors, autocast, tensors
from doraxp.bench._ways import DORA, LAYERS
from doraxp.bench._workloads import LEARNING_RATE, Workload

if TYPE_CHECKING:
    from torch import Tensor

LIBRARY = "PEFT"


@dataclass(frozen=True)
class Layers:
    """Makes layers of one kind, with copies of the tensors of a workload."""

    kind: str
    """DoRA or LoRA."""
    workload: Workload
    inputs: Tensors
    block: Block
    """The block to call a layer in."""

    def make(self) -> Any:
        """Return a new layer."""
        return layer_of(self.inputs, self.workload, use_dora=self.kind == "DoRA")

    def trained(self) -> tuple[Any, Tensor, list[Tensor]]:
        """Return a new layer, an x that takes part in the gradients, and the layer's parameters."""
        layer, x = self.make(), self.inputs.x.clone().requires_grad_()
        return layer, x, [leaf for leaf in layer.parameters() if leaf.requires_grad]

    def contestant(
        self,
        call: Callable[[], Any],
        answer: Callable[[Any], dict[str, Array]],
        reset: Callable[[], None] = lambda: None,
        *,
        name: str | None = None,
        kind: str | None = None,
    ) -> Contestant:
        """Return a contestant, of this kind's name and answer unless others are given."""
        own = "detached" if self.kind == "DoRA" else self.kind
        return Contestant(
            name or self.kind, LIBRARY, kind or own, call, answer, reset,
            tolerance=self.workload.roundings, is_stored=True,
        )  # fmt: skip


def why_not() -> str | None:
    """Return the reason why PEFT cannot take part, or None if it can."""
    return None if importlib.util.find_spec("peft") else "not installed: pip install peft"


def contestants(
    task: str, workload: Workload, *, narrow_adapter: bool = False
) -> Iterator[Contestant]:
    """Yield the contestants of PEFT, or for adamw that of PyTorch.

    With `narrow_adapter` the adapter has the weight's dtype too.
    """
    inputs = tensors(workload)
    if task == "adamw":  # in the compute dtype: in float16 the squares are 0
        yield _adamw(inputs.adapter)
        return
    if narrow_adapter:
        leaves: Any = inputs.adapter
        narrow = Adapter(*(leaf.to(inputs.weight.dtype) for leaf in leaves))
        inputs = inputs._replace(adapter=narrow)
    kinds = ("DoRA", "LoRA") if task in ("forward", "backward", "step", "evaluation") else ("DoRA",)
    for kind in kinds:
        yield from _WAYS[task](Layers(kind, workload, inputs, autocast(workload)))


def on_cuda(task: str, workload: Workload, sets: int) -> Iterator[Contestant]:
    """Yield PEFT's own contestants beside CuPy's, with all arrays in the weight's dtype."""
    there = replace(workload, device="cuda")
    rows = (contestants(task, there, narrow_adapter=True) for _ in range(sets))
    for one in in_turn(rows):
        if "accelerated" not in one.name:
            yield one


def in_turn(rows: Iterable[Iterable[Contestant]]) -> Iterator[Contestant]:
    """Yield each contestant of several sets of inputs. A reset goes on to the next set."""
    for of_all in zip(*map(list, rows), strict=True):
        turns = _Turns(of_all)
        yield of_all[0]._replace(call=turns.call, reset=turns.reset, peak=turns.peak)


class _Turns:
    """The same contestant with several sets of inputs, used in turn."""

    def __init__(self, contestants: Sequence[Contestant]) -> None:
        self._turns = cycle(contestants)

    def reset(self) -> None:
        self._current = next(self._turns)
        self._current.reset()

    def call(self) -> Any:
        return self._current.call()

    def peak(self) -> int:
        import torch

        self.reset()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = self.call()
        peak = torch.cuda.max_memory_allocated() - before
        del result
        return int(peak)


def layer_of(inputs: Tensors, workload: Workload, *, use_dora: bool) -> Any:
    """Return a linear layer of PEFT with copies of these tensors."""
    import peft
    import torch

    base: Any = torch.nn.Sequential(
        torch.nn.Linear(workload.inner, workload.out, bias=False, device="meta")
    )
    base[0].weight = torch.nn.Parameter(inputs.weight.clone(), requires_grad=False)
    config = peft.LoraConfig(
        r=workload.rank,
        lora_alpha=workload.rank,  # s = 1, as in `Workload.config`
        target_modules=["0"],
        use_dora=use_dora,
        lora_dropout=0.0,
    )
    model: Any = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    layer = model.base_model.model[0]
    leaves = [layer.lora_A, layer.lora_B, layer.lora_magnitude_vector]
    tensors: Any = inputs.adapter
    for holder, leaf in zip(leaves[: 2 + use_dora], tensors, strict=False):
        holder["default"].weight.data = leaf.clone()
    return layer


def _forward(layers: Layers) -> Iterator[Contestant]:
    layer, block, x = layers.make(), layers.block, layers.inputs.x

    def call() -> Any:
        with block():
            return layer(x)

    yield layers.contestant(call, lambda y: {"y": y.detach()})


def _backward(layers: Layers) -> Iterator[Contestant]:
    import torch

    layer, x, trained = layers.trained()
    with layers.block():
        y = layer(x)

    def call() -> Any:
        return torch.autograd.grad(y, [x, *trained], layers.inputs.dy, retain_graph=True)

    yield layers.contestant(call, lambda result: _named(("dx", "dA", "dB", "dm"), result))


def _step(layers: Layers) -> Iterator[Contestant]:
    layer, x, trained = layers.trained()
    yield layers.contestant(_step_of(layers, layer, x, trained), _name_step)
    if layers.kind == "DoRA":
        for norm_gradient in DORA:
            yield _accelerated(norm_gradient, layers)
            if _has_kernels(layers.workload):
                block = partial(_by_kernels, layers.block)
                with_kernels = replace(layers, block=block)
                yield _accelerated(norm_gradient, with_kernels, ", CuPy's kernels")


def _has_kernels(workload: Workload) -> bool:
    """Return whether CuPy's kernels can compute the layers of a workload here."""
    usable = {status.name for status in available() if status.usable}
    return workload.device == "cuda" and "cupy" in usable


@contextlib.contextmanager
def _by_kernels(block: Block) -> Iterator[None]:
    """Enter a block, and in it the one for CuPy's kernels."""
    from doraxp.torch import cupy_kernels

    with block(), cupy_kernels():
        yield


def _accelerated(norm_gradient: NormGradient, layers: Layers, suffix: str = "") -> Contestant:
    import torch

    from doraxp.torch import accelerate

    layer, x, trained = layers.trained()
    accelerate(layer, norm_gradient)

    def reset() -> None:  # like a step of the optimizer: the kept norm is of another adapter
        with torch.no_grad(), layers.block():
            trained[0].neg_()
            layer(x[:1])
            trained[0].neg_()

    call = _step_of(layers, layer, x, trained)
    name = f"accelerated, {norm_gradient}{suffix}"
    return layers.contestant(call, _name_step, reset, name=name, kind=norm_gradient)


def _step_of(layers: Layers, layer: Any, x: Tensor, trained: list[Tensor]) -> Callable[[], Any]:
    """Return a function that makes y in the block, and all gradients outside of it."""
    import torch

    block, dy = layers.block, layers.inputs.dy

    def call() -> Any:
        with block():
            y = layer(x)
        return y, *torch.autograd.grad(y, [x, *trained], dy)

    return call


def _evaluation(layers: Layers) -> Iterator[Contestant]:
    import torch
    from peft.helpers import DoraCaching

    from doraxp.torch import accelerate

    block, x = layers.block, layers.inputs.x

    def contestant(name: str, caching: bool, layer: Any, kind: str | None = None) -> Contestant:
        def call() -> Any:
            with torch.no_grad(), DoraCaching(caching), block():
                return layer(x)

        return layers.contestant(call, lambda y: {"y": y}, name=name, kind=kind)

    # A call without DoraCaching empties the cache: the two ways need a layer each.
    yield contestant(layers.kind, False, layers.make().eval())
    if layers.kind == "DoRA":
        yield contestant("DoRA, DoraCaching", True, layers.make().eval())
        layer = layers.make().eval()
        accelerate(layer)
        yield contestant("accelerated", False, layer, kind="exact")


def _norm(layers: Layers) -> Iterator[Contestant]:
    import torch

    layer, weight = layers.make(), layers.inputs.weight
    dora = layer.lora_magnitude_vector["default"]
    a, b = layer.lora_A["default"], layer.lora_B["default"]

    def call() -> Any:
        with torch.no_grad():
            update = dora.get_lora_weight(a, b)
            return dora.get_weight_norm(weight, update, layer.scaling["default"])

    yield layers.contestant(call, lambda norm: {"n": norm})


def _merge(layers: Layers) -> Iterator[Contestant]:
    layer, weight = layers.make(), layers.inputs.weight
    base = layer.get_base_layer()

    def reset() -> None:
        base.weight.data = weight.clone()
        layer.merged_adapters.clear()
        layer._caches.clear()

    def call() -> Any:
        layer.merge(safe_merge=False)
        return base.weight.data

    yield layers.contestant(call, lambda merged: {"W'": merged}, reset)


_WAYS: dict[str, Callable[[Layers], Iterator[Contestant]]] = {
    "forward": _forward,
    "backward": _backward,
    "step": _step,
    "evaluation": _evaluation,
    "norm": _norm,
    "merge": _merge,
}


def _name_step(result: Any) -> dict[str, Array]:
    return _named(("y", "dx", "dA", "dB", "dm"), result)


def _named(names: tuple[str, ...], result: Any) -> dict[str, Array]:
    """Return the arrays of a result by name. LoRA has no dm."""
    return dict(zip(names, (array.detach() for array in result), strict=False))


def _adamw(adapter: Any) -> Contestant:
    import torch

    leaves = [torch.nn.Parameter(leaf.clone()) for _ in range(LAYERS) for leaf in adapter]
    for leaf in leaves:
        leaf.grad = leaf.detach().clone()
    optimizer = torch.optim.AdamW(leaves, lr=LEARNING_RATE, weight_decay=0)

    def answer(result: Any) -> dict[str, Array]:
        names = Adapter._fields
        return {name: p.detach() for name, p in zip(names, leaves[-3:], strict=True)}

    return Contestant("torch.optim.AdamW", LIBRARY, "exact", optimizer.step, answer)
