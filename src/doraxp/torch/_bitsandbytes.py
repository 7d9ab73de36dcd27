"""PEFT's layers around the quantised weights of bitsandbytes, accelerated."""

from __future__ import annotations

from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt

from doraxp.torch._peft import AcceleratedLayer


class AcceleratedLinear4bit(AcceleratedLayer, Linear4bit):
    """PEFT's layer around a weight of 4 bits, accelerated."""


class AcceleratedLinear8bitLt(AcceleratedLayer, Linear8bitLt):
    """PEFT's layer around a weight of 8 bits, accelerated."""


CLASSES: dict[type, type[AcceleratedLayer]] = {
    Linear4bit: AcceleratedLinear4bit,
    Linear8bitLt: AcceleratedLinear8bitLt,
}
