"""`match_parts`: the names of image models, whose adapters are for several parts of one model.

Names are compared flat, with an underscore for each dot, as kohya's files have them.

::

    lora_unet_…, unet.…, transformer.…, diffusion_model.…      the denoiser
    lora_te1_…, text_encoder.…, lora_te2_…, text_encoder_2.…   the text encoders
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from doraxp.checkpoint._names._match import Match
from doraxp.checkpoint._names._originals import SWAPPED, in_diffusers
from doraxp.checkpoint._names._places import WEIGHT, Place, Places, Shapes, Wanted, cut, fits

_DENOISER, _ENCODER = "denoiser", "text encoder "
_UNDERSCORED = re.compile(
    r"(?:lora|lycoris)_(?:(?P<denoiser>unet|transformer|diffusion_model)_|te(?P<te>\d?)_)?(?P<rest>.+)"
)
_DOTTED = re.compile(
    r"(?:(?:lora_)?(?P<denoiser>unet|transformer|(?:model\.)?diffusion_model)"
    r"|(?:lora_te|text_encoder_?)(?P<te>\d?))\.(?P<rest>.+)"
)
_OF_BASE = (
    ("model.diffusion_model.", _DENOISER),
    ("unet.", _DENOISER),
    ("transformer.", _DENOISER),
    ("text_encoder.", f"{_ENCODER}1"),
    ("text_encoder_2.", f"{_ENCODER}2"),
    ("text_encoder_3.", f"{_ENCODER}3"),
    ("cond_stage_model.transformer.", f"{_ENCODER}1"),
    ("cond_stage_model.model.", f"{_ENCODER}1"),
    ("conditioner.embedders.0.transformer.", f"{_ENCODER}1"),
    ("conditioner.embedders.1.model.", f"{_ENCODER}2"),
    ("text_encoders.clip_l.transformer.", f"{_ENCODER}1"),
    ("text_encoders.clip_g.transformer.", f"{_ENCODER}2"),
    ("text_encoders.t5xxl.transformer.", f"{_ENCODER}3"),
)
"""The prefixes of a whole checkpoint, or of a pipeline, and their parts."""
_OPEN_CLIP = (
    ("encoder_layers_", "transformer_resblocks_"),
    ("self_attn_out_proj", "attn_out_proj"),
    ("mlp_fc1", "mlp_c_fc"),
    ("mlp_fc2", "mlp_c_proj"),
)
_OPEN_CLIP_QKV = re.compile(r"(?P<block>.+)_self_attn_(?P<part>[qkv])_proj")


def match_parts(wanted: Sequence[Wanted], shapes: Shapes) -> tuple[Match, tuple[str, ...]]:
    """Return the places of an adapter's tensors, and the paths that are for another part.

    Parameters
    ----------
    wanted : sequence of Wanted
    shapes : mapping of str to tuple of int
        Of the base's tensors, by name.
    """
    parts = _parts(shapes)
    groups: dict[str, list[Wanted]] = defaultdict(list)
    for one in wanted:
        groups[_split(one.path)[0]].append(one)
    fitting = {role: dict(_fitting(role, own, parts, shapes)) for role, own in groups.items()}
    best = {role: max(found.values(), key=len, default={}) for role, found in fitting.items()}
    places = {name: own for found in best.values() for name, own in found.items()}
    problem, options = _problem(groups, fitting, parts, places)
    if problem is not None:
        return Match({}, [], problem, options), ()
    if not places:
        return Match({}, list(wanted)), ()
    # Only a part that the base does not have, as the names tell, may be left out.
    roles = {part.role for part in parts.values()}
    others = [role for role in groups if role not in roles and not best[role]]
    if "" in groups:
        others = []
    unused = {one.name: one.path for role in others for one in groups[role]}
    missing = [one for one in wanted if one.name not in places and one.name not in unused]
    return Match(places, missing), tuple(unused.values())


def _problem(
    groups: Mapping[str, Sequence[Wanted]],
    fitting: Mapping[str, Mapping[str, Mapping[str, Places]]],
    parts: Mapping[str, _Part],
    places: Mapping[str, Places],
) -> tuple[str | None, tuple[tuple[str, str], ...]]:
    """Return why it is not known which tensors are meant, and the options; None if it is known.

    Parameters
    ----------
    groups : mapping of str to sequence of Wanted
        The tensors of the adapter by the part that they are for.
    fitting : mapping of str to mapping
        Their places in each part of the base.
    parts : mapping of str to _Part
    places : mapping of str to Places
        Those that were found.
    """
    users: dict[str, str] = {}
    for role, members in groups.items():
        complete = [name for name, found in fitting[role].items() if len(found) == len(members)]
        if len(complete) > 1:
            path = members[0].path
            options = tuple((name, _option(path, parts[name].role)) for name in complete)
            return f"{path} may be for {' or '.join(complete)}", options
        if complete and role and users.setdefault(complete[0], role) != role:
            return (
                f"the {users[complete[0]]} and the {role} of the adapter both fit the base: remove "
                "one of them from the adapter"
            ), ()
    tensors = {place.tensor for found in places.values() for place in found}
    doubles = (name for part in parts.values() for name in part.doubles if name in tensors)
    double = next(doubles, None)
    if double is None:
        return None, ()
    return (
        f"{double} and another tensor have the same name in this file: remove the one that the "
        "model does not have"
    ), ()


def _option(path: str, role: str) -> str:
    """Return the argument of --rename that gives the modules of an adapter to a part."""
    number = role.removeprefix(_ENCODER)
    if path.startswith(("lora_", "lycoris_")):
        return f"^(lora|lycoris)_=lora_{'unet' if role == _DENOISER else f'te{number}'}_"
    encoder = "text_encoder." if number == "1" else f"text_encoder_{number}."
    return f"^={'unet.' if role == _DENOISER else encoder}"


def _split(path: str) -> tuple[str, str]:
    """Return the part that a module is for, "" for any, and its flat name in it."""
    match = _DOTTED.fullmatch(path) or _UNDERSCORED.fullmatch(path)
    if match is None:
        return "", path.replace(".", "_")
    flat = match["rest"].replace(".", "_")
    if match["denoiser"]:
        return _DENOISER, flat
    return ("", flat) if match["te"] is None else (f"{_ENCODER}{match['te'] or 1}", flat)


_Index = Mapping[str, Places]


class _Part(NamedTuple):
    """A part of a base."""

    role: str
    """The denoiser or a text encoder; "" where the names do not tell."""
    modules: _Index
    """The places of its modules by all flat names that they have."""
    doubles: frozenset[str]
    """The tensors that have the flat name of another one."""


def _parts(shapes: Shapes) -> dict[str, _Part]:
    """Return the parts of a base by their prefixes."""
    modules = {
        name.removesuffix(f".{WEIGHT}"): name
        for name in shapes
        if name.endswith((".weight", "_weight"))
    }
    found: dict[str, dict[str, str]] = defaultdict(dict)
    doubles: set[str] = set()
    for module, name in modules.items():
        prefix = next((prefix for prefix, _ in _OF_BASE if module.startswith(prefix)), "")
        flat = module.removeprefix(prefix).replace(".", "_")
        if flat in found[prefix]:
            doubles |= {name, found[prefix][flat]}
        found[prefix][flat] = name
    roles = dict(_OF_BASE)
    parts = {}
    has_clip_g = any("clip_g" in prefix for prefix in found)
    for prefix, own in found.items():
        role = roles.get(prefix, "")
        if "t5xxl" in prefix and not has_clip_g:
            role = f"{_ENCODER}2"
        if prefix or len(found) == 1:
            parts[prefix] = _Part(role, _index(own, shapes), frozenset(doubles))
    return parts


def _index(modules: Mapping[str, str], shapes: Shapes) -> _Index:
    """Return the places of a part's modules by all flat names that they have."""
    index: dict[str, Places] = {}
    for flat, name in modules.items():
        index[flat] = (Place(name),)
    for flat, name in modules.items():
        targets = in_diffusers(flat)
        for target, rows in zip(targets, _shares(len(targets), shapes[name]), strict=True):
            places = (Place(name, rows),) if len(targets) > 1 else _swapped(flat, name, shapes)
            index.setdefault(target, places)
    return index


def _shares(count: int, shape: tuple[int, ...]) -> list[slice]:
    """Return the rows of each of `count` modules in one: queries, keys, values and the rest."""
    if not count:
        return []
    size = shape[1] if count > 3 else shape[0] // count
    return cut([size * place for place in range(count)], shape[0])


def _swapped(flat: str, name: str, shapes: Shapes) -> Places:
    """Return the place of a module, with its halves of rows exchanged where diffusers does so."""
    rows, columns = shapes[name][:2] if len(shapes[name]) > 1 else (0, 0)
    if not flat.endswith(SWAPPED) or rows != 2 * columns:
        return (Place(name),)
    low, high = cut([0, columns], rows)
    return Place(name, low, high), Place(name, high, low)


def _fitting(
    role: str, members: Sequence[Wanted], parts: Mapping[str, _Part], shapes: Shapes
) -> Iterator[tuple[str, dict[str, Places]]]:
    """Yield the places of those modules that a part has, for each part that may be meant."""
    for prefix, (own, index, _) in parts.items():
        if role and own and role != own:
            continue
        found = {}
        for one in members:
            places = _of_leaf(one.leaf, _places(_split(one.path)[1], index, shapes), shapes)
            if places and _fits(one, places, shapes):
                found[one.name] = places
        yield prefix, found


def _places(flat: str, index: _Index, shapes: Shapes) -> Places:
    """Return the places of a module of a flat name; empty if a part does not have it."""
    for name in _spellings(flat):
        if name in index:
            return index[name]
    targets = in_diffusers(flat)
    found = [index[target] for target in targets if target in index]
    if targets and len(found) == len(targets) and all(len(places) == 1 for places in found):
        if len(found) == 1:
            return _swapped(flat, found[0][0].tensor, shapes)
        tensors = [places[0].tensor for places in found]
        sizes = [shapes[tensor][0] for tensor in tensors]
        own = cut([sum(sizes[:place]) for place in range(len(sizes))], sum(sizes))
        return tuple(Place(tensor, None, rows) for tensor, rows in zip(tensors, own, strict=True))
    fused = _OPEN_CLIP_QKV.fullmatch(_open_clip(flat))
    if fused is None or f"{fused['block']}_attn_in_proj_weight" not in index:
        return ()
    (place,) = index[f"{fused['block']}_attn_in_proj_weight"]
    return (Place(place.tensor, _shares(3, shapes[place.tensor])["qkv".index(fused["part"])]),)


def _of_leaf(leaf: str, places: Places, shapes: Shapes) -> Places:
    """Return the places of another tensor of a module whose weight has these; empty without it."""
    names = [f"{place.tensor.removesuffix(WEIGHT)}{leaf}" for place in places]
    if not all(name in shapes for name in names):
        return ()
    return tuple(place._replace(tensor=name) for place, name in zip(places, names, strict=True))


def _spellings(flat: str) -> Iterator[str]:
    """Yield the flat names that libraries have for one module."""
    yield flat
    yield f"transformer_{flat}"  # that may be a part, or how the module's own name begins
    yield flat.removeprefix("text_model_")
    yield f"text_model_{flat}"
    yield _open_clip(flat)


def _open_clip(flat: str) -> str:
    """Return the name in OpenCLIP of a module of a text encoder."""
    flat = flat.removeprefix("text_model_")
    for old, new in _OPEN_CLIP:
        flat = flat.replace(old, new)
    return flat


def _fits(one: Wanted, places: Places, shapes: Shapes) -> bool:
    """Return whether a module has the shape that its places have together."""
    if one.shape is None:
        return True
    if len(places) == 1 and places[0].rows is None and places[0].own is None:
        return fits(one.shape, shapes[places[0].tensor])
    rows = 0
    for place in places:
        shape = shapes[place.tensor]
        if shape[1:] != one.shape[1:]:
            return False
        rows += shape[0] if place.rows is None else place.rows.stop - place.rows.start
    return rows == one.shape[0]
