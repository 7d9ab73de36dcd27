"""Names: the tensors of a base that the modules of an adapter are for.

An adapter has the names that its trainer's modules had in memory. A model's file has names of its
own. `match` finds the way from one to the other, for the whole adapter or not at all.
"""

from doraxp.checkpoint._names._advice import nearest, rename_option
from doraxp.checkpoint._names._images import match_parts
from doraxp.checkpoint._names._match import Match, guess, match
from doraxp.checkpoint._names._places import Place, Places, Shapes, Wanted
from doraxp.checkpoint._names._tables import DROPPED, WRAPPERS, without

__all__ = [
    "DROPPED",
    "WRAPPERS",
    "Match",
    "Place",
    "Places",
    "Shapes",
    "Wanted",
    "guess",
    "match",
    "match_parts",
    "nearest",
    "rename_option",
    "without",
]
