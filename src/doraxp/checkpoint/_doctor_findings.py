"""The findings of a diagnosis, each from the counts of the modules."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from doraxp._base.words import counted, the_nearest
from doraxp.checkpoint._doctor_modules import Layout, Refusal, is_fused
from doraxp.checkpoint._doctor_report import Cost, DiagnosedModule, Finding, Level
from doraxp.checkpoint._doctor_rows import STEP

Modules = Mapping[str, DiagnosedModule]
_ORDER: tuple[Level, ...] = ("error", "warning", "note")
_ROWS: tuple[tuple[Level, str, str, str, str], ...] = (
    (
        "error", "zero-rows", "zero", "Rows of zeros",
        "PEFT divides m = 0 by the norm 0: the outputs are NaN. Exclude the modules, or train with "
        "doraxp, where such a row is safe",
    ),
    (
        "error", "underflow-rows", "underflow", "Rows whose squares underflow",
        "PEFT's norm is 0, and the outputs are NaN. Exclude the modules, or train with doraxp, "
        "which scales such a row before it squares it",
    ),
    (
        "error", "overflow-rows", "overflow", "Rows whose norm overflows",
        "PEFT's norm is infinite, and the outputs are NaN. Load the base in a wider dtype, or "
        "exclude the modules",
    ),
    (
        "warning", "fragile-rows", "fragile", "Rows whose squares are near underflow",
        "PEFT's norm loses digits. Train with doraxp, which scales such a row before it squares it",
    ),
    (
        "warning", "float16-rows", "float16", "Rows whose norm is 0 or infinity in float16",
        "They are NaN in PEFT there. Do not load the base in float16",
    ),
    (
        "note", "coarse-rows", "coarse",
        f"Rows whose norm a step with learning rate {STEP} does not change",
        "The dtype of the weight is too coarse for m. Keep A, B and m in float32, as doraxp and "
        "PEFT do by default",
    ),
)  # fmt: skip


def findings_of(
    layout: Layout,
    modules: Modules,
    tied: Mapping[str, str],
    costs: Sequence[Cost],
    not_finite: Mapping[str, int],
    *,
    ranks_are_given: bool,
) -> tuple[Finding, ...]:
    """Return all findings, the errors first.

    Parameters
    ----------
    layout : Layout
    modules : mapping of str to DiagnosedModule
    tied : mapping of str to str
        By name of a tensor, the embedding that it is too.
    costs : sequence of Cost
    not_finite : mapping of str to int
        The numbers that are NaN or infinite, of the tensors that are not weights of modules.
    ranks_are_given : bool
        Whether the caller chose the ranks of `costs`.
    """
    found = [
        *_of_targets(layout, modules),
        *_of_numbers(modules, not_finite),
        *_of_rows(modules),
        *_of_kinds(modules),
        *_of_ties(layout, modules, tied),
        *_of_ranks(costs, ranks_are_given),
    ]
    return tuple(sorted(found, key=lambda one: _ORDER.index(one.level)))


def _of_targets(layout: Layout, modules: Modules) -> Iterator[Finding]:
    """Yield the findings about the patterns."""
    targets = layout.targets
    arguments = {"target_modules": targets.unmatched, "exclude_modules": targets.unused}
    for argument, missing in arguments.items():
        for name, near in missing.items():
            nearest = f"; {the_nearest(near)}" if near else ""
            text = f"{argument} {name!r} matches no module{nearest}. Correct the name"
            yield Finding("error", f"unmatched-{argument.partition('_')[0]}", text)
    if not targets.paths and not targets.unmatched:
        excluded = tuple(targets.excluded)
        yield Finding(
            "error", "no-target", "No module gets an adapter. Give other target modules", excluded
        )
    refused: dict[Refusal, list[str]] = {}
    for path in targets.paths:
        if path in layout.refused:
            refused.setdefault(layout.refused[path], []).append(path)
    for one, paths in refused.items():
        text = f"Targets that are not checked: {_count(paths)}. The weight {one.problem}"
        level: Level = "warning" if one.is_quantised else "error"
        yield Finding(level, "unreadable", text, tuple(paths))
    rest = tuple(
        path
        for path, one in modules.items()
        if not one.is_target and one.kind in ("linear", "transposed") and one.left_out is None
    )
    if rest:
        text = f"Matrices that are not targets: {_count(rest)}"
        yield Finding("note", "not-targets", text, rest)


def _of_numbers(modules: Modules, not_finite: Mapping[str, int]) -> Iterator[Finding]:
    """Yield the findings about NaN and infinity, wherever they are."""
    bad = {path: one.rows.not_finite for path, one in modules.items() if one.rows is not None}
    bad = {path: count for path, count in bad.items() if count}
    if bad:
        text = f"Rows with NaN or infinity: {_in_modules(sum(bad.values()), bad)}. Restore the file"
        yield Finding("error", "not-finite", text, tuple(bad))
    if not_finite:
        text = f"Other tensors with NaN or infinity: {len(not_finite)}. Restore the file"
        yield Finding("error", "not-finite-tensors", text, tuple(not_finite))


def _of_rows(modules: Modules) -> Iterator[Finding]:
    """Yield the findings about rows of the targets, and of zero rows of the other modules."""
    for level, code, field, name, text in _ROWS:
        found = {
            path: count
            for path, one in modules.items()
            if one.is_target and (count := getattr(one.rows, field, 0))
        }
        if found:
            count = _in_modules(sum(found.values()), found)
            yield Finding(level, code, f"{name}: {count}. {text}", tuple(found))
    others = {
        path: one.rows.zero + one.rows.underflow
        for path, one in modules.items()
        if one.rows is not None and not one.is_target and one.rows.zero + one.rows.underflow
    }
    if others:
        count = _in_modules(sum(others.values()), others)
        text = f"Rows with the norm 0 without an adapter: {count}. As targets they are NaN in PEFT"
        yield Finding("note", "zero-rows-elsewhere", text, tuple(others))


def _of_kinds(modules: Modules) -> Iterator[Finding]:
    """Yield the findings about the dtype and the layout of the targets."""
    targets = {path: one for path, one in modules.items() if one.is_target}
    wide = tuple(path for path, one in targets.items() if one.dtype == "F64")
    if wide:
        text = f"Targets in float64: {_count(wide)}. A, B, m and all products have that dtype too"
        yield Finding("note", "float64", text, wide)
    formats: dict[str, list[str]] = {}
    for path, one in targets.items():
        if one.quantised is not None:
            formats.setdefault(one.quantised, []).append(path)
    for label, paths in formats.items():
        text = (
            f"Quantised targets, {label}: {_count(paths)}. Their numbers are those of the format's "
            "own library. To train on the packed weights, read them with load_quantised (QDoRA)"
        )
        yield Finding("note", "quantised", text, tuple(paths))
    stacks = tuple(path for path, one in modules.items() if "experts" in (one.kind or ""))
    if stacks:
        text = (
            f"All experts in one tensor: {_count(stacks)}. PEFT refuses DoRA on them. doraxp.adapt "
            "takes them where `kinds` names them, with an adapter for each expert"
        )
        yield Finding("note", "fused-experts", text, stacks)
    fused = tuple(path for path in targets if is_fused(path))
    if fused:
        text = f"Several projections in one matrix: {_count(fused)}. They share one A"
        yield Finding("note", "fused-projections", text, fused)


def _of_ties(layout: Layout, modules: Modules, tied: Mapping[str, str]) -> Iterator[Finding]:
    """Yield the findings about embeddings that are also something else."""
    for other, embedding in tied.items():
        pair = (embedding.removesuffix(".weight"), other.removesuffix(".weight"))
        chosen = [path for path in pair if path in modules and modules[path].is_target]
        where = "" if other in layout.sources else ", which is not in the file,"
        text = f"{pair[1]}{where} is tied to {pair[0]}"
        if chosen:
            text += f", and the adapter of {chosen[0]} unties them. Exclude it if that is not meant"
        yield Finding("warning" if chosen else "note", "tied", text, pair)


def _of_ranks(costs: Sequence[Cost], are_given: bool) -> Iterator[Finding]:
    large = [cost for cost in costs if cost.too_small]
    if large:
        ranks = ", ".join(str(cost.rank) for cost in large)
        targets = counted(max(large).too_small, "target")
        text = (
            f"Rank {ranks}: above the rows or columns of up to {targets}. "
            "Give these a smaller rank with rank_pattern"
        )
        yield Finding("warning" if are_given else "note", "rank", text)


def _in_modules(rows: int, modules: Collection[str]) -> str:
    return f"{rows:,} in {_count(modules)}"


def _count(modules: Collection[str]) -> str:
    return counted(len(modules), "module")
