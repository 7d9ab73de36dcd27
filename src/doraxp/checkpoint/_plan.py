"""The plan of a merge: where each tensor of the result comes from.

`plan` compares an adapter with a base by their headers alone, and reports all problems at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from doraxp._core.kinds import LayerKind
from doraxp.checkpoint._adapters import CONFIG, AdapterSet, StoredLayer, with_kernel
from doraxp.checkpoint._config_edits import ConfigEdits
from doraxp.checkpoint._errors import CheckpointError
from doraxp.checkpoint._experts import expert_parts
from doraxp.checkpoint._fit import AS_FILED, Fit, Fitted, fit
from doraxp.checkpoint._model import Model
from doraxp.checkpoint._names import Place
from doraxp.checkpoint._norm_guard import residual_fits, wrong_matches
from doraxp.checkpoint._orientation import is_transposed
from doraxp.checkpoint._quantised.reader import QuantisedReader
from doraxp.checkpoint._safetensors import DTYPES, Source
from doraxp.checkpoint._separate_head import separate_head, separate_shared
from doraxp.checkpoint._tasks import (
    CopiedTensor,
    JoinedTensor,
    MergedTensor,
    Part,
    ReplacedTensor,
    Task,
)
from doraxp.checkpoint._tied import (
    Tied,
    has_head_alone,
    is_embedding,
    is_head,
    is_tied_by_name,
    shared_copies,
    tied_head,
    tied_in_file,
)
from doraxp.checkpoint._torchtune import in_order
from doraxp.checkpoint._whole_tensors import WholeTensors, whole_tensors

_OTHER_WAY = {"linear": LayerKind("transposed"), "transposed": LayerKind("linear")}
_GIVE_CONFIG = "put the model's config.json beside it"
_GIVE_OTHER = "give the model as its own library saves it, with all biases"
"""How to tell the merge how a square weight is stored."""


class Plan(NamedTuple):
    """The tasks of a merge, and the changes of the model's configuration."""

    tasks: dict[str, Task]
    """By the names of the result: first those that change, then the copied ones."""
    lead: str
    """The part that the result's names have before those of the base: "" or, where the adapter
    brings a head to a model without one, such as "bert."."""
    edits: ConfigEdits
    unused: tuple[str, ...]
    """Modules of the adapter that are for another part of the model than BASE."""
    sources: Mapping[str, Source]
    """The tensors of the base under the names of the result; a head that is the embeddings too is
    among them only where the result has it."""


def plan(model: Model, adapters: AdapterSet, choices: Fit = AS_FILED) -> Plan:
    """Return the task of each tensor: first those that change, then the copied ones.

    Raises
    ------
    CheckpointError
        The message lists every adapter without a weight, every weight with two adapters, every
        shape that does not fit, every quantised weight, and a base that is not the adapter's.
    """
    fitted = fit(model, adapters, choices)
    whole = whole_tensors(model, adapters, choices, fitted)
    parts, unmerged = _merged_parts(model, adapters, fitted, whole.tasks)
    problems = [
        *unmerged,
        *whole.problems,
        *_untrained_parts(parts, whole.tasks, fitted, adapters, choices),
    ]
    if not problems:
        pairs = [(name, part) for name, found in parts.items() for part in found]
        problems = list(wrong_matches(pairs, fitted.sources))
    if problems:
        raise CheckpointError(f"{adapters.reader.path}: " + "; ".join(problems))
    changed: dict[str, Task] = dict(whole.tasks)
    for name, found in parts.items():
        changed[name] = _joined(fitted.sources[name], found)
    try:
        untied = _separated(model, adapters, fitted, changed, whole)
    except CheckpointError as error:
        raise CheckpointError(f"{adapters.reader.path}: {error}") from None
    alone = _names_alone(fitted.tied, untied=untied)
    copied = {
        name: CopiedTensor(source)
        for name, source in fitted.sources.items()
        if name not in changed and name not in alone
    }
    lead = fitted.lead if whole.added else ""
    tasks = {
        f"{'' if name in whole.added else lead}{name}": task
        for name, task in (changed | copied).items()
    }
    sources = {
        f"{lead}{name}": source for name, source in fitted.sources.items() if name not in alone
    }
    return Plan(tasks, lead, replace(whole.edits, untied=untied), fitted.unused, sources)


def _separated(
    model: Model,
    adapters: AdapterSet,
    fitted: Fitted,
    changed: dict[str, Task],
    whole: WholeTensors,
) -> bool:
    """Give head, encoder and decoder weights of their own; return whether the head is untied."""
    tied, sources = fitted.tied, fitted.sources
    if tied is not None:
        if not tied.copies and not _keeps_head(model, whole.edits):
            return False
        untied = separate_head(tied, changed, whole.tasks, sources, adapters)
    else:
        head = next(filter(is_head, changed), None)
        if head is not None and has_head_alone(sources, model.config):
            raise CheckpointError(
                f"{head} is the embeddings too, and BASE does not have them: save the base with "
                "tie_word_embeddings false and embeddings of its own"
            )
        untied = is_tied_by_name(sources, model.config) and any(
            is_head(name) or is_embedding(name) for name in changed
        )
        shared, copies = shared_copies(sources, model.config)
        separate_shared(shared, copies, changed, whole.tasks, sources, adapters)
    if untied and model.config.get("model_type") == "switch_transformers":
        raise CheckpointError(
            "the adapter changes one of embeddings and head, and switch_transformers scales its "
            "logits only where tie_word_embeddings is true: train the adapter with "
            "ensure_weight_tying=True"
        )
    return untied


def _keeps_head(model: Model, edits: ConfigEdits) -> bool:
    """Return whether a model whose embeddings are its head has that head after the changes too.

    A language model that becomes a classifier does not.
    """
    names, config = model.sources().keys(), edits.apply(model.config)
    return bool(tied_head(names, config) or tied_in_file(names, config))


def _names_alone(tied: Tied | None, *, untied: bool) -> set[str]:
    """Return the names of tied tensors that neither the base nor the result has."""
    return set() if tied is None or untied else tied.sources.keys() - set(tied.in_file)


def _joined(source: Source, parts: Sequence[MergedTensor]) -> Task:
    """Return the task of a tensor of the base, of which these parts are merged."""
    if len(parts) == 1 and parts[0].source.window is None:
        return parts[0]
    joined: list[Part] = []
    whole, source = source, source.like(parts[0].source)
    place, rows = 0, source.tensor.shape[0]
    for part in sorted(parts, key=_start):
        if _start(part) > place:
            joined.append(CopiedTensor(source.rows(place, _start(part))))
        joined.append(part)
        place = _start(part) + part.source.tensor.shape[0]
    if place < rows:
        joined.append(CopiedTensor(source.rows(place, rows)))
    return JoinedTensor(whole, tuple(joined))


def _start(part: MergedTensor) -> int:
    return 0 if part.source.window is None else int(part.source.window.start)


def _merged_parts(
    model: Model, adapters: AdapterSet, fitted: Fitted, replaced: Mapping[str, Task]
) -> tuple[dict[str, list[MergedTensor]], list[str]]:
    """Return the merged parts of each tensor, and a message for each adapter that does not fit."""
    merged: dict[str, list[MergedTensor]] = defaultdict(list)
    problems = []
    for path in fitted.modules:
        try:
            layer = in_order(path, adapters.layers[path], adapters, model.config)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        for place in fitted.places.get(path, ()):
            name = place.tensor
            rival = next((part for part in merged[name] if _overlap(part, place)), None)
            if rival is not None:
                problems.append(f"{rival.path} and {path} are both for {name}")
                continue
            task = replaced.get(name)
            if isinstance(task, JoinedTensor):
                problems.append(f"{name} has an adapter, and single rows in {adapters.reader.path}")
                continue
            source = fitted.sources[name]
            if isinstance(task, ReplacedTensor) and isinstance(task.source, Source):
                source = task.source
            if place.rows is not None:
                source = source.rows(place.rows.start, place.rows.stop)
            part = MergedTensor(source, path, layer, adapters)
            try:
                merged[name] += _stored_parts(part, place, fitted, model)
            except CheckpointError as error:
                problems.append(str(error))
    merged = {name: parts for name, parts in merged.items() if parts}
    problems += fitted.missing(adapters)
    problems += _squares(model, adapters, fitted, merged)
    return merged, problems


def _overlap(part: MergedTensor, place: Place) -> bool:
    """Return whether a merged part has rows of a place."""
    if part.source.window is None or place.rows is None:
        return True
    own = part.source.window
    return bool(own.start < place.rows.stop and place.rows.start < own.stop)


def _stored_parts(
    part: MergedTensor, place: Place, fitted: Fitted, model: Model
) -> list[MergedTensor]:
    """Return a part with the kind and shape in which the base stores the weight.

    Of a module with several experts it is the part of each.
    """
    name, tensor = place.tensor, part.source.tensor
    if tensor.dtype not in DTYPES:
        raise CheckpointError(f"{name} has dtype {tensor.dtype}, without fractions")
    if isinstance(part.source.reader, QuantisedReader):
        part.source.reader.check()
    if part.layer.kind.is_stack:
        return list(expert_parts(part, place, model.config))
    return [replace(part, layer=_as_stored(name, part.layer, tensor.shape, place))]


def _as_stored(name: str, layer: StoredLayer, there: tuple[int, ...], place: Place) -> StoredLayer:
    """Return the layer with the kind and shape of a weight that the base stores in `there`."""
    shape = layer.shape
    if place.own is not None and layer.kind.name == "columns" and layer.names.magnitude:
        raise CheckpointError(
            f"{name} is only some rows of its module, whose magnitude has one number for each "
            "input: its norms need all rows, so merge into a base that has the module whole"
        )
    if place.own is not None:
        shape = (place.own.stop - place.own.start, *shape[1:])
        layer = layer._replace(shape=shape, rows=(place.own,))
    layer = with_kernel(layer, there)
    if there == layer.shape:
        return layer
    if layer.kind.name in _OTHER_WAY and there == shape[::-1] and place.own is None:
        return layer._replace(kind=_OTHER_WAY[layer.kind.name], shape=there)
    raise CheckpointError(f"{name} has shape {there}, but its adapter is for {shape}")


def _squares(
    model: Model,
    adapters: AdapterSet,
    fitted: Fitted,
    merged: dict[str, list[MergedTensor]],
) -> Iterator[str]:
    """Give square weights their kind; yield a message for each whose kind nothing tells."""
    adapted = {
        name: parts[0].layer.kind.name == "transposed"
        for name, parts in merged.items()
        if parts[0].layer.kind.name in _OTHER_WAY
        and parts[0].source.window is None
        and parts[0].expert is None
    }
    for name in adapted:
        (part,) = merged[name]
        shape = part.layer.shape
        if shape != shape[::-1]:
            continue
        flag = adapters.layers[part.path].kind.name == "transposed"
        transposed = is_transposed(
            name, fitted.shapes, model.config.get("model_type"), adapted, flag=flag
        )
        if transposed is None:
            yield (
                f"{name} is square, and fan_in_fan_out is that of the last adapted module only: "
                "nothing in BASE tells whether it is stored (out, in) or (in, out); "
                + (_GIVE_OTHER if model.config else _GIVE_CONFIG)
            )
            continue
        kind = LayerKind("transposed" if transposed else "linear")
        merged[name] = [replace(part, layer=part.layer._replace(kind=kind))]


def _untrained_parts(
    merged: Mapping[str, Sequence[MergedTensor]],
    replaced: Mapping[str, ReplacedTensor | JoinedTensor],
    fitted: Fitted,
    adapters: AdapterSet,
    choices: Fit,
) -> Iterator[str]:
    """Yield a message where the file lacks weights or biases that the training changed."""
    parts = [part for name, found in merged.items() if name not in replaced for part in found]
    if adapters.base_change and parts:
        fits = residual_fits(parts)
        if fits is False and choices.residual:
            yield "BASE is not the residual base: the magnitudes are the row norms of its weights"
        elif not (fits or choices.residual):
            yield (
                f"the adapter was initialised by {adapters.base_change}, which changed the base "
                "weights, and the file does not have them: merge into the base that the training "
                "saved beside the adapter, with --base-is-residual"
            )
    biases = {f"{name.removesuffix('weight')}bias" for name in merged} & fitted.sources.keys()
    if adapters.trained_biases and (lacking := sorted(biases - replaced.keys())):
        yield (
            f"{CONFIG} says bias {adapters.trained_biases}, but the file lacks "
            f"{', '.join(lacking)}: some versions of PEFT leave trained biases out"
        )
