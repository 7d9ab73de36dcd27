"""`diagnose`: the things to know about a base before an adapter is trained on it.

::

    trained numbers of (*stack, out, in)    stack · (rank · (out + in) + out): those of A, B and m
    memory of them in float32               4 bytes each
    AdamW's state                           two moments, 8 bytes each
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from doraxp._base.safetensors import Tensor
from doraxp._core.kinds import LayerKind
from doraxp.checkpoint._doctor_findings import findings_of
from doraxp.checkpoint._doctor_modules import Layout, Modules, layout_of
from doraxp.checkpoint._doctor_report import Cost, DiagnosedModule, Diagnosis
from doraxp.checkpoint._doctor_rows import count_not_finite, count_rows
from doraxp.checkpoint._model import Model
from doraxp.checkpoint._quantised.reader import quantised_in
from doraxp.checkpoint._safetensors import are_equal
from doraxp.checkpoint._tied import tied_head, tied_in_file

RANKS = (4, 8, 16, 32, 64)


def diagnose(
    model: Model,
    target_modules: Modules = "all-linear",
    *,
    exclude_modules: Modules | None = None,
    ranks: Sequence[int] | None = None,
    on_bytes: Callable[[int, int], None] = lambda done, total: None,
) -> Diagnosis:
    """Return the things to know about a base before an adapter is trained on it.

    ::

        PEFT:  V = W at the start,  m = ‖V‖,  W' = (m / ‖V‖)⊙V      NaN where ‖V‖ is 0, ∞ or NaN

    Parameters
    ----------
    model : Model
        The base, as `open_model` returns it.
    target_modules : str or iterable of str
        As `doraxp.adapt` takes them. No kinds are given, so "all-linear" leaves out tensors of all
        experts.
    exclude_modules : str or iterable of str, optional
        As `doraxp.adapt` takes them.
    ranks : sequence of int, optional
        The ranks whose costs are counted; 4, 8, 16, 32 and 64 if None. A rank above the rows or
        columns of a target is a warning if it was given, and else a note.
    on_bytes : callable
        Called with the bytes that were read so far, and those of the whole base. They are those of
        the numbers: a quantised weight counts as it is read.

    Returns
    -------
    Diagnosis

    Raises
    ------
    CheckpointError
        The files are those of an adapter, a file has changed, or a quantised weight breaks a rule
        of its format.
    OSError
        A file cannot be read.
    ValueError
        A string is not a regular expression, or a rank is below 1.

    Notes
    -----
    The base is read once, tensor by tensor and by blocks of rows, with some MiB of memory. Two
    tensors that may be tied are read once more.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import numpy as np
    >>> from safetensors.numpy import save_file
    >>> from doraxp.checkpoint import diagnose, open_model
    >>> weight = np.ones((6, 4), np.float32)
    >>> weight[2] = 0
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder) / "model.safetensors"
    ...     save_file({"layers.0.q_proj.weight": weight}, file)
    ...     found = diagnose(open_model(file))
    >>> found.modules["layers.0.q_proj"].rows.zero, found.breaks
    (1, True)
    """
    are_given = ranks is not None
    ranks = RANKS if ranks is None else ranks
    if any(rank < 1 for rank in ranks):
        raise ValueError(f"ranks must be at least 1, got {min(ranks)}")
    layout = layout_of(model, target_modules, exclude_modules)
    total, done = sum(one.tensor.nbytes for one in layout.sources.values()), 0

    def read(count: int) -> None:
        nonlocal done
        done += count
        on_bytes(done, total)

    targets = set(layout.targets.paths)
    modules = {path: _module(layout, path, targets, read) for path in layout.names}
    weights = set(layout.names.values())
    others = {
        name: count
        for name, one in layout.sources.items()
        if name not in weights and (count := count_not_finite(one, read))
    }
    for path in layout.refused:
        modules[path] = DiagnosedModule(
            *(None,) * 5, is_target=path in targets, left_out=layout.reasons.get(path), rows=None
        )
    parameters = sum(math.prod(one.tensor.shape) for one in layout.sources.values())
    tied = dict(_tied(layout, model))
    costs = tuple(_cost(modules, rank, parameters) for rank in ranks)
    return Diagnosis(
        modules,
        layout.targets,
        tied,
        costs,
        findings_of(layout, modules, tied, costs, others, ranks_are_given=are_given),
        parameters,
        sum(one.tensor.nbytes for one in model.stored.values()),
    )


def _module(
    layout: Layout, path: str, targets: set[str], read: Callable[[int], None]
) -> DiagnosedModule:
    """Read a weight, and return the figures of its module."""
    source, kind = layout.sources[layout.names[path]], layout.kinds[path]
    weight = quantised_in(source)
    if weight is not None:
        weight.check()
    return DiagnosedModule(
        kind.name,
        source.tensor.shape,
        source.tensor.dtype,
        math.prod(source.tensor.shape),
        None if weight is None else weight.quantisation.label,
        path in targets,
        layout.reasons.get(path),
        count_rows(source, kind, read),
    )


def _tied(layout: Layout, model: Model) -> Iterator[tuple[str, str]]:
    """Yield the tied tensors by name, each with the embedding that it is too."""
    names = set(layout.sources)
    tie = tied_head(names, model.config) or tied_in_file(names, model.config)
    if tie is not None:
        yield from ((name, tie.embedding) for name in (tie.head, *tie.copies) if name)
    alike: dict[Tensor, str] = {}
    # Embeddings come first: heads are tied to them.
    order = sorted(layout.reasons.items(), key=lambda item: item[1] != "embedding")
    for name in (layout.names[path] for path, _ in order if path in layout.names):
        source = layout.sources[name]
        first = alike.setdefault(source.tensor, name)
        if first != name and are_equal(source, layout.sources[first]):
            yield name, first


def _cost(modules: dict[str, DiagnosedModule], rank: int, base: int) -> Cost:
    """Return the size of an adapter of all targets that can be read."""
    parameters = too_small = 0
    for one in modules.values():
        if one.is_target and one.kind is not None and one.shape is not None:
            *stack, out, inner = LayerKind(one.kind).matrix_shape(one.shape)
            parameters += math.prod(stack) * (rank * (out + inner) + out)
            too_small += rank > min(out, inner)
    percent = 100 * parameters / base if base else 0.0
    return Cost(rank, parameters, percent, 4 * parameters, 8 * parameters, too_small)
