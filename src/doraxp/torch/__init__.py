"""DoRA inside of PyTorch: a function for autograd, a module, and a speed-up for PEFT.

    dora_linear          the function y = x W'ᵀ + bias
    DoRALinear           the same as a module, around a torch.nn.Linear
    accelerate           computes the DoRA layers of a PEFT model, also convolutions and embeddings
    restore              undoes `accelerate`, also in a copy of the model

Needs the extra ``torch``; the last two need PEFT too. The math is `doraxp.forward` and
`doraxp.backward`.
"""

from doraxp._base.extras import require

require("torch", "torch", of="doraxp.torch")

from doraxp.torch._accelerate import Accelerated, accelerate, restore
from doraxp.torch._cupy import cupy_kernels
from doraxp.torch._function import dora_linear
from doraxp.torch._linear import DoRALinear

__all__ = ["Accelerated", "DoRALinear", "accelerate", "cupy_kernels", "dora_linear", "restore"]
