"""A head that was trained with an adapter: what the model's configuration says of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from doraxp.checkpoint._adapters import AdapterSet
from doraxp.checkpoint._config_edits import ConfigEdits, architecture_for
from doraxp.checkpoint._errors import CheckpointError
from doraxp.checkpoint._fit import Fit, Fitted
from doraxp.checkpoint._json import JsonObject
from doraxp.checkpoint._safetensors import AnySource
from doraxp.checkpoint._tasks import JoinedTensor, ReplacedTensor
from doraxp.checkpoint._tied import is_embedding, is_head

_LAST = (
    *("score", "classifier", "out_proj", "qa_outputs"),
    *("class_labels_classifier", "class_predictor", "class_embed"),
)
"""The layers of the heads of transformers that have a row for each class."""
_WITH_BACKGROUND = (
    *("detr", "table-transformer", "yolos"),
    *("maskformer", "mask2former", "oneformer", "eomt"),
)
"""The model types whose head has one row more than there are classes: for no object."""


def check_added(name: str, source: AnySource, adapters: AdapterSet, fitted: Fitted) -> None:
    """Raise CheckpointError unless a tensor that the base does not have is that of a new head."""
    parts = name.split(".")
    saved = adapters.head.place_in(name)
    end = "." + ".".join(parts[saved or 0 :])
    is_known = is_embedding(name) or (is_head(name) and any(map(is_head, fitted.sources)))
    if saved is None or is_known or any(f".{other}".endswith(end) for other in fitted.sources):
        raise CheckpointError(f"the base has no tensor {name} for {source.name} to replace")
    block = next((place for place in range(saved) if parts[place].isdecimal()), None)
    if block is not None:
        lead = f".{'.'.join(parts[max(0, block - 1) : block + 1])}."
        modules = {part for part in parts[saved:-1] if not part.isdecimal()}
        for other in fitted.sources:
            # Such as the experts of layer 0, each of which the base may have by itself.
            if lead in f".{other}" and not modules.isdisjoint(other.split(".")):
                raise CheckpointError(
                    f"the base has {other} and other tensors for {source.name}, which is that "
                    "module in another form: merge this adapter with PEFT"
                )


def head_edits(
    edits: ConfigEdits,
    config: JsonObject,
    adapters: AdapterSet,
    choices: Fit,
    fitted: Fitted,
    tasks: Mapping[str, ReplacedTensor | JoinedTensor],
) -> ConfigEdits:
    """Return the changes of a model's configuration with those that its head asks for.

    Raises
    ------
    CheckpointError
        The labels are not as many as the classes, or no file tells the class of the model that
        has a new head.
    """
    whole = {
        name: task.source.tensor.shape
        for name, task in tasks.items()
        if name.endswith(".weight") and len(task.source.tensor.shape) > 1
    }
    added = [name for name in tasks if name not in fitted.sources]
    heads = {
        name: shape
        for name, shape in whole.items()
        if not is_embedding(name)
        and not is_head(name)
        and (name not in fitted.sources or shape != fitted.sources[name].tensor.shape)
    }
    labels, architecture = choices.labels, choices.architecture
    if heads:
        labels = _labels(heads, config, adapters, choices)
    if added:
        architecture = _architecture(added[0], config, adapters, choices)
        _check_names(added[0], fitted)
    elif architecture is None:
        architecture = _other_class(whole, config, adapters)
    tokens = [whole[name][0] for name in added if is_head(name) and name in whole]
    if tokens:  # such as the letters of a recogniser
        edits = replace(edits, vocab_size=tokens[0])
    return replace(edits, labels=labels, architecture=architecture)


def _labels(
    heads: Mapping[str, tuple[int, ...]], config: JsonObject, adapters: AdapterSet, choices: Fit
) -> tuple[str, ...]:
    """Return the names of the classes, one for each row of the last layer of a head."""
    last = min(heads, key=lambda name: (_rank(name), heads[name][0]))
    size = heads[last][0]
    if config.get("model_type") in _WITH_BACKGROUND and _rank(last) < 2:
        size -= 1
    if choices.labels is not None and len(choices.labels) != size:
        raise CheckpointError(
            f"labels must have a name for each of the {size} classes of {last}, got "
            f"{len(choices.labels)}"
        )
    labels = choices.labels or adapters.head.labels
    return labels if len(labels) == size else tuple(f"LABEL_{place}" for place in range(size))


def _rank(name: str) -> int:
    """Return 0 for the layer of a head that has the classes, 1 for its other layers, else 2."""
    parts = name.split(".")
    return 0 if parts[-2] in _LAST else 1 if not set(_LAST).isdisjoint(parts) else 2


def _architecture(added: str, config: JsonObject, adapters: AdapterSet, choices: Fit) -> str | None:
    """Return the class of a model with a new head; None where the configuration has no class."""
    before = config.get("architectures")
    own = choices.architecture or adapters.head.architecture
    found = own or architecture_for(adapters.head.task, before)
    if found is None and before:
        raise CheckpointError(
            f"the base has no {added}, and no file tells the class of a model that has it: name "
            "it with --architecture, such as BertForTokenClassification"
        )
    return found


def _other_class(whole: Collection[str], config: JsonObject, adapters: AdapterSet) -> str | None:
    """Return the class of the task, where the head that was trained is of one name in both."""
    head = adapters.head
    before = config.get("architectures")
    found = architecture_for(head.task, before)
    is_trained = any(
        not is_embedding(name) and not is_head(name) and adapters.head.place_in(name) is not None
        for name in whole
    )
    return found if is_trained and head.task != "CAUSAL_LM" and [found] != before else None


def _check_names(added: str, fitted: Fitted) -> None:
    """Raise CheckpointError where a model with the new head has other names than the base."""
    pairs = [(fitted.own_name(path), fitted.places[path][0].tensor) for path in fitted.places]
    for own, there in pairs:
        (one, _, rest), (other, _, end) = own.partition("."), there.partition(".")
        if one != other and rest == end:
            raise CheckpointError(
                f"a model with {added} has the name {own} for {there}: save the base with the "
                "class that was trained, and merge into that"
            )
