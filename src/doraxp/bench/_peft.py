"""PEFT's DoRA and LoRA, and torch.optim.AdamW, as contestants. Their tests need PEFT.

All arrays are in the weight's dtype, as PEFT wants it. The layers get copies of the arrays.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from doraxp._base.types import Adapter, Array, NormGradient
from doraxp._terminal.runtimes import runtime
from doraxp.bench._contestant import Contestant
from doraxp.bench._ways import DORA, LAYERS
from doraxp.bench._workloads import LEARNING_RATE, Inputs, Workload, draw

if TYPE_CHECKING:
    from torch import Tensor

LIBRARY = "PEFT"
Make: TypeAlias = Callable[[], Any]
"""Makes a layer."""


class Tensors(NamedTuple):
    """The `Inputs` of a workload as tensors, all in the weight's dtype."""

    weight: Tensor
    adapter: tuple[Tensor, ...]
    x: Tensor
    dy: Tensor


def why_not() -> str | None:
    """Return the reason why PEFT cannot take part, or None if it can."""
    return None if importlib.util.find_spec("peft") else "not installed: pip install peft"


def contestants(task: str, workload: Workload, *, device: str = "cpu") -> Iterator[Contestant]:
    """Yield the contestants of PEFT, or for adamw that of PyTorch."""
    if task == "adamw":  # in the compute dtype: in float16 the squares are 0
        yield _adamw(tuple(_tensor(leaf, device) for leaf in draw(workload).adapter))
        return
    inputs = _tensors(draw(workload), device)
    for kind in (
        ("DoRA", "LoRA") if task in ("forward", "backward", "step", "evaluation") else ("DoRA",)
    ):
        yield from _WAYS[task](
            kind, partial(layer_of, inputs, workload, use_dora=kind == "DoRA"), inputs
        )


def on_cuda(task: str, workload: Workload, sets: int) -> Iterator[Contestant]:
    """Yield the contestants of PEFT on the GPU. Each reset goes on to the next of `sets` inputs."""
    rows = [list(contestants(task, workload, device="cuda")) for _ in range(sets)]
    for of_all in zip(*rows, strict=True):
        if "accelerated" not in of_all[0].name:
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

    weight, adapter, *_ = inputs
    base: Any = torch.nn.Sequential(
        torch.nn.Linear(workload.inner, workload.out, bias=False, device="meta")
    )
    base[0].weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
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
    for holder, leaf in zip(leaves[: 2 + use_dora], adapter, strict=False):
        holder["default"].weight.data = leaf.clone()
    return layer


def _tensor(array: Array, device: str) -> Tensor:
    tensor: Any = runtime("torch").asarray(array)
    moved: Tensor = tensor.to(device)
    return moved


def _tensors(inputs: Inputs, device: str) -> Tensors:
    weight, x, dy = (_tensor(array, device) for array in (inputs.weight, inputs.x, inputs.dy))
    leaves = (_tensor(leaf, device).to(weight.dtype) for leaf in inputs.adapter)
    return Tensors(weight, tuple(leaves), x.to(weight.dtype), dy.to(weight.dtype))


def _forward(kind: str, make: Make, inputs: Tensors) -> Iterator[Contestant]:
    layer = make()
    yield _contestant(kind, kind, lambda: layer(inputs.x), lambda y: {"y": y.detach()})


def _backward(kind: str, make: Make, inputs: Tensors) -> Iterator[Contestant]:
    import torch

    layer, x = make(), inputs.x.clone().requires_grad_()
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    y = layer(x)

    def call() -> Any:
        return torch.autograd.grad(y, [x, *trained], inputs.dy, retain_graph=True)

    def answer(result: Any) -> dict[str, Array]:
        names = ("dx", "dA", "dB", "dm")
        return dict(zip(names, (array.detach() for array in result), strict=False))

    yield _contestant(kind, kind, call, answer)


def _step(kind: str, make: Make, inputs: Tensors) -> Iterator[Contestant]:
    import torch

    layer, x = make(), inputs.x.clone().requires_grad_()
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    names = ("y", "dx", "dA", "dB", "dm")

    def call() -> Any:
        y = layer(x)
        return y, *torch.autograd.grad(y, [x, *trained], inputs.dy)

    def answer(result: Any) -> dict[str, Array]:
        return dict(zip(names, (array.detach() for array in result), strict=False))

    yield _contestant(kind, kind, call, answer)
    if kind == "DoRA":
        for norm_gradient in DORA:
            yield _accelerated(norm_gradient, make, inputs, answer)


def _accelerated(
    norm_gradient: NormGradient, make: Make, inputs: Tensors, answer: Callable[[Any], Any]
) -> Contestant:
    import torch

    from doraxp.torch import accelerate

    layer, x = make(), inputs.x.clone().requires_grad_()
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    accelerate(layer, norm_gradient)

    def reset() -> None:  # like a step of the optimizer: the kept norm is of another adapter
        with torch.no_grad():
            trained[0].neg_()
            layer(x[:1])
            trained[0].neg_()

    def call() -> Any:
        y = layer(x)
        return y, *torch.autograd.grad(y, [x, *trained], inputs.dy)

    name = f"accelerated, {norm_gradient}"
    return Contestant(name, LIBRARY, norm_gradient, call, answer, reset)


def _evaluation(kind: str, make: Make, inputs: Tensors) -> Iterator[Contestant]:
    import torch
    from peft.helpers import DoraCaching

    # A call without DoraCaching empties the cache: the two ways need a layer each.
    for caching in (False, True) if kind == "DoRA" else (False,):
        layer = make().eval()

        def call(layer: Any = layer, caching: bool = caching) -> Any:
            with torch.no_grad(), DoraCaching(caching):
                return layer(inputs.x)

        name = f"{kind}, DoraCaching" if caching else kind
        yield _contestant(name, kind, call, lambda y: {"y": y})


def _norm(kind: str, make: Make, inputs: Tensors) -> Iterator[Contestant]:
    import torch

    layer = make()
    dora = layer.lora_magnitude_vector["default"]
    a, b = layer.lora_A["default"], layer.lora_B["default"]

    def call() -> Any:
        with torch.no_grad():
            update = dora.get_lora_weight(a, b)
            return dora.get_weight_norm(inputs.weight, update, layer.scaling["default"])

    yield _contestant(kind, kind, call, lambda norm: {"n": norm})


def _merge(kind: str, make: Make, inputs: Tensors) -> Iterator[Contestant]:
    layer = make()
    base = layer.get_base_layer()

    def reset() -> None:
        base.weight.data = inputs.weight.clone()
        layer.merged_adapters.clear()
        layer._caches.clear()

    def call() -> Any:
        layer.merge(safe_merge=False)
        return base.weight.data

    yield _contestant(kind, kind, call, lambda merged: {"W'": merged}, reset)


_WAYS: dict[str, Callable[[str, Make, Tensors], Iterator[Contestant]]] = {
    "forward": _forward,
    "backward": _backward,
    "step": _step,
    "evaluation": _evaluation,
    "norm": _norm,
    "merge": _merge,
}


def _contestant(
    name: str,
    kind: str,
    call: Callable[[], Any],
    answer: Callable[[Any], dict[str, Array]],
    reset: Callable[[], None] = lambda: None,
) -> Contestant:
    return Contestant(name, LIBRARY, "detached" if kind == "DoRA" else kind, call, answer, reset)


def _adamw(adapter: tuple[Tensor, ...]) -> Contestant:
    import torch

    leaves = [torch.nn.Parameter(leaf.clone()) for _ in range(LAYERS) for leaf in adapter]
    for leaf in leaves:
        leaf.grad = leaf.detach().clone()
    optimizer = torch.optim.AdamW(leaves, lr=LEARNING_RATE, weight_decay=0)

    def answer(result: Any) -> dict[str, Array]:
        names = Adapter._fields
        return {name: p.detach() for name, p in zip(names, leaves[-3:], strict=True)}

    return Contestant("torch.optim.AdamW", LIBRARY, "exact", optimizer.step, answer)
