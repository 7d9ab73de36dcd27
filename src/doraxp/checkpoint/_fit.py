"""`fit`: the tensors of a base that an adapter is for, by names and shapes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np

from doraxp.checkpoint._adapters import AdapterSet
from doraxp.checkpoint._errors import CheckpointError
from doraxp.checkpoint._model import Model
from doraxp.checkpoint._names import (
    DROPPED,
    WRAPPERS,
    Match,
    Places,
    Shapes,
    Wanted,
    guess,
    match,
    match_parts,
    nearest,
    rename_option,
    without,
)
from doraxp.checkpoint._norm_guard import nearest_by_norms
from doraxp.checkpoint._quantised.protocol import Refused
from doraxp.checkpoint._safetensors import Source, are_equal
from doraxp.checkpoint._tied import Tied, is_head, tied_head, tied_in_file

_OF_MODULES = "name the tensor of each module with --rename REGEX=NEW"
_OF_PARTS = "remove from BASE the one that the model does not use"
"""The advice where no one option tells which tensors are meant."""


@dataclass(frozen=True)
class Fit:
    """Choices that say how an adapter fits a base, where the files do not."""

    renames: tuple[tuple[str, str], ...] = ()
    """Regular expressions and their replacements, for the names of the adapter's modules."""
    residual: bool = False
    """True if the base has the residual weights that PiSSA, OLoRA and their like leave."""
    architecture: str | None = None
    """The class of the result with its new head; None for the one that the files tell."""
    labels: tuple[str, ...] | None = None
    """The names of a classifier's classes; None for LABEL_0, LABEL_1, …"""

    def __post_init__(self) -> None:
        for pattern, _ in self.renames:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"a rename must be REGEX=NEW, got {pattern!r}: {error}") from None

    def renamed(self, name: str) -> str:
        """Return the name after all renames."""
        for pattern, new in self.renames:
            name = re.sub(pattern, new, name)
        return name


AS_FILED = Fit()
"""The files say how the adapter fits."""


@dataclass(frozen=True)
class Fitted:
    """The tensors of a base that an adapter is for."""

    sources: dict[str, Source]
    """All tensors of the base; a tied head and its bias have the names that they would have."""
    places: dict[str, Places]
    """Of each module, and of each tensor that the adapter has in full, by its name there."""
    modules: tuple[str, ...]
    """The modules that are for this base."""
    unused: tuple[str, ...]
    """The modules that are for another part of the model."""
    others: frozenset[str]
    """The tensors that the adapter has in full, or adds, for another part of the model."""
    lead: str
    """The leading component that the adapter's names have and the base's lack, with its dot."""
    tied: Tied | None
    shapes: Mapping[str, tuple[int, ...]]
    """Of the sources, without the tensors of quantised weights that cannot be read."""
    refused: Mapping[str, str]
    """Of each quantised weight that cannot be read: the rest of a sentence that begins with it."""
    _wanted: Mapping[str, Wanted]

    def own_name(self, name: str) -> str:
        """Return the name that a new tensor of the adapter has in the result."""
        return without(WRAPPERS, self._wanted[name].name)

    def missing(self, adapters: AdapterSet) -> Iterator[str]:
        """Yield a message for each module that the base does not have.

        The first one tells that the base has fewer blocks, or names the nearest tensors: by the
        name, and by the magnitudes.
        """
        paths = [path for path in self.modules if path not in self.places]
        for path in paths:
            wanted = self._wanted[path]
            name = wanted.path if wanted.is_stack else wanted.name
            message = f"the base has no {name} for an adapter of shape {wanted.shape}"
            refused = self._refused(wanted)
            if refused is not None:
                yield f"{refused} {self.refused[refused]}"
                continue
            if path == paths[0]:
                message += self._too_few(paths) or self._near(path, wanted, adapters)
            yield message

    def _refused(self, wanted: Wanted) -> str | None:
        """Return the quantised weight of this name, with or without leading components."""
        own = f".{without(DROPPED, wanted.path if wanted.is_stack else wanted.name)}"
        for name in self.refused:
            if own.endswith(f".{name}") or f".{name}".endswith(own):
                return name
        return None

    def _too_few(self, paths: Sequence[str]) -> str:
        """Return a text where all these modules are of blocks beyond the last one of the base."""
        leads = {
            _block(self._wanted[path].path)[0]: _block(places[0].tensor)[0]
            for path, places in self.places.items()
        }
        last: dict[str, int] = {}
        for lead, number in map(_block, self.shapes):
            last[lead] = max(number, last.get(lead, -1))
        missing = [_block(self._wanted[path].path) for path in paths]
        if any(not -1 < last.get(leads.get(lead, ""), -1) < number for lead, number in missing):
            return ""
        lead, number = missing[0]
        return (
            f"; block {number} of {lead} is beyond the last one of the base, so the base has fewer "
            "blocks than the adapter: give the model that the adapter was trained on"
        )

    def _near(self, path: str, wanted: Wanted, adapters: AdapterSet) -> str:
        layer = adapters.layers[path]
        taken = {place.tensor for places in self.places.values() for place in places}
        free = {name: shape for name, shape in self.shapes.items() if name not in taken}
        named = nearest(wanted, free)
        m = adapters.magnitude(layer)
        alike = {
            name: source
            for name, source in self.sources.items()
            if name in free and source.tensor.shape == layer.shape
        }
        measured = None
        if m is not None and not layer.kind.is_stack:
            measured = nearest_by_norms(np.abs(m.astype(np.float64)), layer.kind, alike)
        found = [
            f"{way} {name}"
            for way, name in (("by name", named), ("by magnitude", measured))
            if name is not None
        ]
        best = measured or named
        if is_head(wanted.name):
            return "; if the embeddings are the head too, give the folder with its config.json"
        rename = rename_option(wanted.path, best.removesuffix(".weight")) if best else ""
        if not rename:
            return ""
        return f"; the nearest is {', '.join(found)}: --rename {shlex.quote(rename)} takes {best}"


def fit(model: Model, adapters: AdapterSet, choices: Fit) -> Fitted:
    """Find the tensors of a base that an adapter is for.

    Raises
    ------
    CheckpointError
        The names fit in several ways.
    """
    sources = model.sources()
    tied = _tie(sources, model)
    unreadable = {
        name: found for name, found in model.quantised.items() if isinstance(found, Refused)
    }
    hidden = {name for found in unreadable.values() for name in found.tensors}
    shapes = {name: source.tensor.shape for name, source in sources.items() if name not in hidden}
    modules = {
        path: Wanted(choices.renamed(path), "weight", layer.shape, layer.kind.is_stack)
        for path, layer in adapters.layers.items()
    }
    whole = {
        name: _whole(choices.renamed(name))
        for name in (*adapters.replacements, *adapters.tokens, *adapters.differences)
    }
    # The adapter of a tensor that the file has in full may be of another size than the base's.
    wanted = list({one.name: one for one in (*modules.values(), *whole.values())}.values())
    found, unused = _find(wanted, shapes, model, adapters)
    if found.problem is not None:
        advice = _advice(found, wanted, shapes, model, adapters)
        raise CheckpointError(f"{adapters.reader.path}: {found.problem}{advice}")
    by_name = found.places or guess(wanted, shapes)
    places = {
        key: by_name[one.name] for key, one in (whole | modules).items() if one.name in by_name
    }
    left = {path for path, one in modules.items() if one.path in unused}
    used = {place.tensor for own in places.values() for place in own}
    rows = {places[name][0].tensor for name in adapters.tokens if name in places}
    try:
        tied = _checked(tied, sources, used, rows)
    except CheckpointError as error:
        raise CheckpointError(f"{adapters.reader.path}: {error}") from None
    return Fitted(
        sources,
        places,
        tuple(path for path in modules if path not in left),
        tuple(path for path in modules if path in left),
        frozenset(name for name, one in whole.items() if one.path in unused),
        _lead(modules, by_name),
        tied,
        shapes,
        {name: found.problem for name, found in unreadable.items()},
        whole | modules,
    )


def _find(
    wanted: Sequence[Wanted], shapes: Shapes, model: Model, adapters: AdapterSet
) -> tuple[Match, tuple[str, ...]]:
    """Return the match of an adapter, and the paths that are for another part of the model."""
    if adapters.is_of_images:
        return match_parts(wanted, shapes)
    model_type = model.config.get("model_type")
    found = match(wanted, shapes, model_type if isinstance(model_type, str) else None)
    if found.places or found.problem is not None:
        return found, ()
    parts = match_parts(wanted, shapes)  # an adapter of PEFT may be of an image model too
    return parts if parts[0].places and not parts[0].missing else (found, ())


def _advice(
    found: Match, wanted: Sequence[Wanted], shapes: Shapes, model: Model, adapters: AdapterSet
) -> str:
    """Return the options that tell which of several tensors is meant; each was tried."""
    advice = []
    for meant, option in found.options:
        regex, _, new = option.rpartition("=")
        renamed = [one._replace(path=re.sub(regex, new, one.path)) for one in wanted]
        again, _ = _find(renamed, shapes, model, adapters)
        tensors = [place.tensor for places in again.places.values() for place in places]
        is_complete = all(one.shape is None for one in again.missing)
        if option and is_complete and any(name.startswith(meant) for name in tensors):
            advice.append(f"--rename {shlex.quote(option)} takes {meant}")
    if not advice and found.options:
        advice = [_OF_PARTS if adapters.is_of_images else _OF_MODULES]
    return f"; {', '.join(advice)}" if advice else ""


def _block(name: str) -> tuple[str, int]:
    """Return the name of the blocks that a module is in, and its block's number, else -1."""
    match = re.match(r"(.*?)\.(\d+)\.", name)
    return (match[1], int(match[2])) if match else (name, -1)


def _whole(name: str) -> Wanted:
    path, _, leaf = name.rpartition(".")
    return Wanted(path, leaf, None)


def _tie(sources: dict[str, Source], model: Model) -> Tied | None:
    """Give a tied head and its bias their names among the sources."""
    if model.is_pipeline:
        return None
    names = sources.keys()
    tied = tied_head(names, model.config) or tied_in_file(names, model.config)
    if tied is not None and tied.head:
        sources.setdefault(tied.head, sources[tied.embedding])
        if tied.bias:
            sources[tied.head_bias] = sources[tied.bias]
    return tied


def _checked(
    tied: Tied | None, sources: Mapping[str, Source], used: Set[str], rows: Set[str]
) -> Tied | None:
    """Return a tie without the tensors of the file that differ; None where the head differs.

    `rows` has the tensors of which the adapter has single rows.
    """
    if tied is None or used.isdisjoint((tied.embedding, *tied.sources)):
        return tied
    equal = [name for name in tied.in_file if are_equal(sources[name], sources[tied.embedding])]
    if tied.head in tied.in_file and tied.head not in equal:
        if tied.embedding in rows and not tied.rows_alone:
            raise CheckpointError(
                f"{tied.embedding} and {tied.head} differ in BASE, and PEFT trains single rows as "
                "if the head were the embeddings, because the configuration ties them: train the "
                "embeddings with modules_to_save in place of trainable_token_indices"
            )
        return None
    copies = [name for name in tied.copies if name in equal or name not in tied.in_file]
    return tied._replace(copies=tuple(copies), in_file=tuple(equal))


def _lead(modules: Mapping[str, Wanted], places: Mapping[str, Places]) -> str:
    """Return the lead that all modules' names have before those of the base."""
    leads = set()
    for one in modules.values():
        (first, *_) = places.get(one.name, (None,))
        name = without(WRAPPERS, one.path if one.is_stack else one.name)
        if first is None or not f".{name}".endswith(f".{first.tensor}"):
            return ""
        leads.add(name.removesuffix(first.tensor))
    return leads.pop() if len(leads) == 1 else ""
