"""The warnings of `doraxp merge`: before the merge, and after it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from doraxp._base.words import counted
from doraxp._terminal.messages import print_warning

if TYPE_CHECKING:
    from doraxp.checkpoint import Change, Merge

_QUANTISED_NAME = re.compile(r"-bnb-[48]bit$", re.IGNORECASE)
"""The end of the name of a model that bitsandbytes has quantised."""


def warn_of_traps(merge: Merge) -> None:
    """Warn of a merge that its files cannot decide, or that may not be the intended one."""
    if merge.unused:
        _warn(
            f"ADAPTER has {counted(len(merge.unused), 'module')} for another part of the model "
            f"than BASE, {merge.unused[0]} the first: merge ADAPTER into that part too"
        )
    if merge.changes_unknown_tie():
        _warn(
            "BASE has no config.json, and no head beside the embeddings that the adapter changes: "
            "if its head is tied to them, give the folder of the model"
        )
    unknown = merge.unknown_base()
    if unknown is not None:
        _warn(
            "the magnitudes do not tell whether BASE is the residual base of "
            f"{unknown}: --base-is-residual says so, and OUT is wrong with "
            "another base"
        )
    experts = merge.unloadable_experts()
    if experts is not None:
        _warn(
            f"{experts} are dense in OUT, and transformers loads no dense experts in a model of "
            "packed ones (compressed-tensors): --targets same keeps them packed"
        )
    for adapters in merge.adapters:
        if _QUANTISED_NAME.search(adapters.base_name) and not merge.fates:
            _warn(
                f"ADAPTER was trained on {adapters.base_name}, a quantised copy of a model: its m "
                "and its update make up for the rounding of that copy, and BASE is not quantised. "
                "OUT differs from the trained model by that rounding"
            )
    for name, known in merge.tokenizers_apart().items():
        _warn(
            f"OUT has BASE's {name}, and not the other one of ADAPTER"
            if known
            else f"OUT has no {name}, and ADAPTER has one"
        )


def warn_of_norms(merge: Merge) -> None:
    """Warn of a base whose norms show that the adapter was not made for it as it is."""
    from doraxp.checkpoint import sample_norms

    sample = sample_norms(merge)
    if sample.equal:
        _warn(
            f"in {counted(len(sample.equal), 'module', of=sample.modules)}, {sample.equal[0]} the "
            "first, the rows of BASE have the norms m of the adapter: either this adapter has been "
            "merged into BASE before, or its magnitude was hardly trained"
        )
    if sample.fresh_and_unequal:
        _warn(
            "the adapter has B = 0 and norms m that BASE does not have, so it is not a fresh "
            f"adapter of BASE: {', '.join(sample.fresh_and_unequal)}"
        )


def warn_of_changes(changes: Mapping[str, Change]) -> None:
    """Warn of idle adapters, and of updates that OUT does not store."""
    idle = [name for name, change in changes.items() if change.is_idle]
    if idle:
        _warn(f"the adapter changes nothing in {', '.join(idle)}")
    quantised = {name: change for name, change in changes.items() if change.cosine is not None}
    lost = {name: one for name, one in quantised.items() if one.is_lost or one.is_drowned}
    if lost:
        name, worst = min(lost.items(), key=lambda item: item[1].cosine or 0.0)
        tensors = counted(len(lost), "tensor", of=len(quantised))
        _warn(
            f"quantising again lost part of the update in {tensors}; "
            f"{name} kept {worst.kept:.2f} of it, with a cosine of {worst.cosine:.2f}: "
            "--targets bf16 keeps them dense"
        )
    rounded = {name: change.kept for name, change in changes.items() if name not in quantised}
    _warn_of_loss({name: kept for name, kept in rounded.items() if changes[name].is_lost})


def _warn_of_loss(kept: Mapping[str, float]) -> None:
    """Warn of an update that rounding took back in part, and name the options that keep it."""
    if kept:
        worst = min(kept, key=kept.__getitem__)
        _warn(
            f"rounding lost part of the update in {counted(len(kept), 'tensor')}; {worst} kept "
            f"{kept[worst]:.2f} of it: --dtype float32 keeps all of it, --rounding stochastic "
            "keeps it in the mean"
        )


def _warn(message: str) -> None:
    print_warning("doraxp merge", message)
