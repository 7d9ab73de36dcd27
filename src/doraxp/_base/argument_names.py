"""Arguments by their names in other libraries: the error says the name or the place here."""

from __future__ import annotations

import functools
from dataclasses import fields
from typing import Any, TypeVar

from doraxp._base.words import nearest

T = TypeVar("T")

_NAMES = {
    "r": "rank",
    "lora_r": "rank",
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "use_rslora": "rslora",
    "rs_lora": "rslora",
}
"""Names of other libraries, and those of `Config`."""
_PLACES = {
    **dict.fromkeys(
        ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"),
        "give it to adapt_layers or adapt, as {name}",
    ),
    "init_lora_weights": "give method to adapt_layers, DoRALayer or init",
    "train_base": "give it to DoRALayer or adapt_layers, as train_base",
    "use_dora": "leave it out, because each Config is of DoRA",
    **dict.fromkeys(("scale", "scaling"), "write alpha, which is the scale times the rank"),
}


def dropout_place(rate: object) -> str:
    """Return the calls that take the rate of dropout."""
    return (
        f"give the rate to the layers, as adapt_layers(..., dropout={rate!r}) or "
        f"DoRALayer(..., dropout={rate!r})"
    )


def explains_names(cls: type[T]) -> type[T]:
    """Let a dataclass refuse an unknown argument with the name to write instead.

    The signature stays that of the fields, and mypy still refuses such a call.
    """
    init: Any = cls.__init__
    *others, last = (field.name for field in fields(cls))  # type: ignore[arg-type]

    @functools.wraps(init)
    def explained(self: Any, /, *args: Any, **arguments: Any) -> None:
        for name, value in arguments.items():
            if name not in (*others, last):
                rule = f"{cls.__name__} takes {', '.join(others)} and {last}"
                advice = _advice(name, value, (*others, last))
                raise TypeError(f"{rule}, got {name}={value!r}{advice}")
        init(self, *args, **arguments)

    cls.__init__ = explained  # type: ignore[method-assign, assignment]
    return cls


def _advice(name: str, value: object, known: tuple[str, ...]) -> str:
    if name in _NAMES:
        return f": write {_NAMES[name]}={value!r}"
    if name == "lora_dropout":
        return f": {dropout_place(value)}"
    if name in _PLACES:
        return f": {_PLACES[name].format(name=name)}"
    return nearest(name, known)
