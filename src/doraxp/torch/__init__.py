"""DoRA inside of PyTorch: under autograd, as a module, and in place of PEFT's.

    dora_linear          the function, y = x W'ᵀ + bias
    DoRALinear           the module around a torch.nn.Linear
    accelerate           PEFT's DoRA layers, computed here

Needs the extra ``torch``; `accelerate` needs PEFT too. The math is `doraxp.forward` and
`doraxp.backward`.
"""

from doraxp.torch._accelerate import Accelerated, accelerate
from doraxp.torch._function import dora_linear
from doraxp.torch._linear import DoRALinear

__all__ = ["Accelerated", "DoRALinear", "accelerate", "dora_linear"]
