"""Optimizers, schedules and clipping, as pure functions: (params, grads, state) -> (params, state).

    p  parameter    g  gradient    η  learning_rate    λ  weight_decay    t  step, from 1

`params` is a NamedTuple of arrays, as `Adapter` is, or a dict of such by name; `grads` and what
the state holds have its structure. Each array is a leaf, and is stepped by itself.

`learning_rate` and `weight_decay` are one number, or one per leaf: a NamedTuple of numbers like
`params`, or like each entry of a dict; or a dict of either. A larger η for B than for A is LoRA+::

    learning_rate=Adapter(lora_a=1e-4, lora_b=1.6e-3, magnitude=1e-4)

A `weight_decay` of one number is for every leaf but those named `magnitude`. Decaying A and B
draws the layer back to its base weight; decaying m draws it, and its output, to 0. One per leaf
says so for m too, and does decay it. Neither the paper nor PEFT has a rule.

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
