"""Optimizers from the settings of others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from doraxp._base.scalars import check_kind
from doraxp.optim._loops import SGD, AdamW
from doraxp.optim._schedules import Schedule, check_names

_KINDS: dict[str, type[AdamW] | type[SGD]] = {"AdamW": AdamW, "SGD": SGD}


def optimizer_from_settings(settings: Mapping[str, Any]) -> AdamW | SGD:
    """Return a new optimizer with the settings of another one, before its first step.

    Parameters
    ----------
    settings : mapping
        From `AdamW.settings` or `SGD.settings`; they may have been in a JSON file.

    Returns
    -------
    AdamW or SGD

    Raises
    ------
    TypeError
        `settings` is not a mapping, or a value has another type than it must have.
    ValueError
        The optimizer is unknown, a name is missing or unknown, or a number is out of range.

    Examples
    --------
    >>> optimizer_from_settings(SGD(0.5, momentum=0.75).settings()).momentum
    0.75
    """
    check_kind("settings", settings, Mapping)
    name = settings.get("optimizer")
    if name not in [*_KINDS]:  # a list has no hash
        raise ValueError(f"settings['optimizer'] must be one of {[*_KINDS]}, got {name!r}")
    kind = _KINDS[str(name)]
    known = ["optimizer", *(field.name for field in fields(kind))]
    check_names(f"settings of {name}", settings, dict.fromkeys(known))
    given = {key: value for key, value in settings.items() if key != "optimizer"}
    rate = given["learning_rate"]
    if isinstance(rate, Mapping) and isinstance(rate.get("kind"), str):
        given["learning_rate"] = Schedule.from_settings(rate)
    return kind(**given)
