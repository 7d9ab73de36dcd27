"""Which bases of PEFT's layers are quantised, and their weights as plain tensors.

bitsandbytes   has layers and parameters of its own
torchao        has tensors of its own, in a `torch.nn.Linear`

Neither library is imported here before a layer has its classes.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor


def is_quantised(base: Any) -> bool | str:
    """Return whether a base is quantised, or the reason why doraxp cannot compute with it.

    The base of a layer is looked at in each call, so a plain one is recognised first.
    """
    kind, weight = type(base), base._parameters.get("weight")
    of_weight = type(weight)
    if kind is torch.nn.Linear:
        if of_weight is torch.nn.Parameter or of_weight is Tensor:
            return False
        if not of_weight.__module__.startswith("torchao."):
            name = of_weight.__name__
            later = " (FSDP2 makes it plain in each forward)" if name == "DTensor" else ""
            return f"its weight must be a plain tensor, got {name}{later}"
        if any(
            getattr(weight, name, None) for name in ("act_quant_kwargs", "activation_quantization")
        ):
            return "torchao quantises its x too, and has no gradient for that"
        return True
    if of_weight.__name__ == "Int8Params" and weight.dtype == torch.int8:
        return True
    if of_weight.__name__ == "Params4bit" and weight.quant_state is not None:
        # It packs a weight for a processor with bfloat16, and cannot dequantise it then.
        is_packed = getattr(weight.quant_state, "packing_format_for_cpu", False)
        return "bitsandbytes has packed its weight for evaluation" if is_packed else True
    return f"its base must be a torch.nn.Linear or a quantised one, got {kind.__name__}"


def dequantised(base: Any) -> Tensor:
    """Return the weight of a quantised base as a plain tensor, (out, in)."""
    weight = base.weight
    if type(weight).__name__ == "Int8Params":
        # PEFT's function assigns the weight anew, and on a CPU the base's next product then fails.
        from bitsandbytes.functional import int8_vectorwise_dequant

        scales = base.state.SCB if weight.SCB is None else weight.SCB
        dense: Tensor = int8_vectorwise_dequant(weight.data, scales)
        return dense
    plain: Tensor = dequantize_module_weight(base)
    return plain
