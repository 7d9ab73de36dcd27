"""Optimizers, schedules and clipping, as pure functions: (params, grads, state) -> (params, state).

    p  parameter    g  gradient    η  learning_rate    λ  weight_decay    t  step, from 1

`params` is a NamedTuple of arrays, such as `Adapter`, or a dict of NamedTuples by name. `grads`
and the arrays of the state have the structure of `params`. Each array is a leaf, and is stepped by
itself.

`learning_rate` and `weight_decay` are one number for all leaves, or one number per leaf. Numbers
per leaf are a NamedTuple with the fields of `params`; a dict of `params` takes one such NamedTuple
for every entry, or a dict with a number or a NamedTuple for each. LoRA+ has a larger η for B than
for A::

    learning_rate=Adapter(lora_a=1e-4, lora_b=1.6e-3, magnitude=1e-4)

A `weight_decay` of one number decays every leaf except those named `magnitude`. Decay draws A and
B to 0, and so the layer back to its base weight; it would draw m, and the layer's output, to 0.
Numbers per leaf decay m too. Neither the paper nor PEFT has a rule for m.

Under a compiler that traces, a learning rate, a weight decay and AdamW's step may be 0-d arrays.
"""

from doraxp.optim._adamw import AdamWState, adamw_init, adamw_step
from doraxp.optim._clipping import clip_by_global_norm
from doraxp.optim._schedules import constant_schedule, cosine_schedule, linear_schedule
from doraxp.optim._sgd import SGDState, sgd_init, sgd_step

__all__ = [
    "AdamWState",
    "SGDState",
    "adamw_init",
    "adamw_step",
    "clip_by_global_norm",
    "constant_schedule",
    "cosine_schedule",
    "linear_schedule",
    "sgd_init",
    "sgd_step",
]
