"""Optimizers, schedules and clipping, as pure functions: (params, grads, state) -> (params, state).

The letters are p for a parameter, g for its gradient, η for `learning_rate`, λ for `weight_decay`,
and t for the step, from 1.

`params` is a tree: a NamedTuple of arrays, such as `Adapter`, or a dict of arrays and trees, such
as the `state_dict` of a layer, or a dict of these by name. `grads` and the arrays of the state have
the structure of `params`. Each array is a leaf, and is stepped by itself.

`learning_rate` and `weight_decay` are one number for all leaves, or a tree of numbers. Its entries
are those of `params`, and a number in it stands for all leaves below; or they are all names that
leaves of `params` have, for the leaves of those names in all layers. In both cases a dict may stand
for a NamedTuple, and a NamedTuple for a dict. LoRA+ has a larger η for B than for A, and
`lora_plus` multiplies η of B alone::

    learning_rate={"lora_a": 1e-4, "lora_b": 1.6e-3, "magnitude": 1e-4}
    learning_rate=1e-4, lora_plus=16

A `weight_decay` of one number decays every leaf except those named `magnitude`. Decay draws A and
B to 0, and so the layer back to its base weight; it would draw m, and the layer's output, to 0.
Numbers per leaf decay m too. Neither the paper nor PEFT has a rule for m.

Under a compiler that traces, a learning rate, a weight decay and AdamW's step may be 0-d arrays.
"""

from doraxp.optim._adamw import AdamWState, adamw_init, adamw_step
from doraxp.optim._clipping import clip_by_global_norm
from doraxp.optim._loops import SGD, AdamW, Optimizer
from doraxp.optim._scaling import scaled_gradients
from doraxp.optim._schedules import (
    Schedule,
    constant_schedule,
    cosine_schedule,
    linear_schedule,
)
from doraxp.optim._settings import optimizer_from_settings
from doraxp.optim._sgd import SGDState, sgd_init, sgd_step

__all__ = [
    "SGD",
    "AdamW",
    "AdamWState",
    "Optimizer",
    "SGDState",
    "Schedule",
    "adamw_init",
    "adamw_step",
    "clip_by_global_norm",
    "constant_schedule",
    "cosine_schedule",
    "linear_schedule",
    "optimizer_from_settings",
    "scaled_gradients",
    "sgd_init",
    "sgd_step",
]
