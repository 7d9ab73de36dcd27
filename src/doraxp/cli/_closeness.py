"""The figures of an extraction: how near each adapted weight is to the wanted one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from doraxp._base.words import counted
from doraxp._terminal.messages import print_warning
from doraxp._terminal.module_table import Column, print_modules
from doraxp._terminal.tables import plain_console, print_caption

if TYPE_CHECKING:
    from doraxp.checkpoint import Extraction

_FIRST = (
    Column("kind", "stored as"),
    Column("rank", "rank"),
    Column("update_norm", "update\nnorm", statistics.median),
    Column("relative_lora_error", "error of\nSVD LoRA", statistics.median),
)
_OF_DORA = (
    Column("relative_error", "error of\nDoRA", statistics.median),
    Column("ratio", "DoRA ÷\nLoRA", max),
)
_CAPTION = (
    "Update norm: ‖W* − W‖, with W* of {target}. Errors: ‖W' − W*‖ as a part of it; 0 is {target} "
    "itself, 1 is BASE. {lora}: the truncated SVD of W* − W at the same rank. Medians of a kind"
)
_TENTH = 0.1
"""The relative error for which `Closeness.rank_for_tenth` is a rank."""
_NAMED = 3
"""Tensors that a warning names."""


def figures_of(found: Extraction) -> dict[str, dict[str, Any]]:
    """Return the figures of each module, by path."""
    return {
        path: {
            "kind": found.adapters[path].kind.name,
            "rank": found.adapters[path].config.rank,
            "shape": found.adapters[path].shape,
            **one._asdict(),
            "relative_lora_error": one.lora_error / one.update_norm,
            "relative_error": one.error / one.update_norm,
            "ratio": one.ratio,
        }
        for path, one in found.closeness.items()
    }


def print_closeness(
    modules: Mapping[str, Mapping[str, Any]], target: str, *, every: bool, dora: bool = True
) -> None:
    """Print a table of the figures: all modules, or a row for each kind of module.

    `target` is the word for the model whose weights are wanted. Without `dora`, the adapter that
    is written is SVD LoRA.
    """
    console = plain_console()
    print_modules("module", modules, (*_FIRST, *_OF_DORA) if dora else _FIRST, console, every=every)
    end = "; of DoRA ÷ LoRA, the largest, 1 where SVD LoRA is exact to rounding." if dora else "."
    lora = "SVD LoRA" if dora else "SVD LoRA, the adapter in DST"
    print_caption(f"{_CAPTION.format(target=target, lora=lora)}{end}", console)
    advice = _advice(modules.values())
    if advice:
        merge = "" if dora else f"; a merge of {target} into BASE has no such error"
        print_caption(f"{advice}{merge}.", console)


def _advice(modules: Collection[Mapping[str, Any]]) -> str:
    """Return how to bring each error to a tenth of the update; "" where each is below it."""
    above = sum(one["relative_error"] > _TENTH for one in modules)
    if not above:
        return ""
    ranks = [one["rank_for_tenth"] for one in modules]
    lower = "A larger --rank lowers it"
    if None not in ranks:
        lower = f"--rank {max(ranks)} brings it to {_TENTH} or below in all modules"
    return f"The error is above {_TENTH} in {above} of {counted(len(modules), 'module')}. {lower}"


def warn_of_left_out(command: str, left_out: Mapping[str, float], target: str, out: str) -> None:
    """Warn of tensors that differ between `target` and BASE and that the adapter lacks."""
    if not left_out:
        return
    names = sorted(left_out, key=lambda name: -left_out[name])
    first = ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")
    count = counted(len(names), "tensor")
    differ = "differs and is" if len(names) == 1 else "differ and are"
    message = f"{count} of {target} {differ} not in {out}: {first}"
    known = [name for name in names if math.isfinite(left_out[name])]
    if known:
        message += f"; the largest relative change is {left_out[known[0]]:.2g}, of {known[0]}"
    if len(known) < len(names):
        others = counted(len(names) - len(known), "tensor", "is")
        message += f"; {others} new, or of another shape, or without numbers"
    print_warning(f"doraxp {command}", message)
