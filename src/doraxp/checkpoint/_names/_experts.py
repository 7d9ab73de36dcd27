"""The tensors of single experts in a base, for an adapter of all experts of a layer.

::

    experts.gate_up_proj (experts, 2·f, in)      experts.N.gate_proj (f, in), experts.N.up_proj
    experts.down_proj (experts, in, f)           experts.N.down_proj
                                                 in some families w1, w3 and w2
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from doraxp.checkpoint._names._places import WEIGHT, Place, Places, Shapes, Wanted, cut

_PARTS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "gate_proj": (("gate_proj",), ("w1",)),
    "up_proj": (("up_proj",), ("w3",)),
    "down_proj": (("down_proj",), ("w2",)),
}
"""The modules of one expert whose rows a stack has, one below the other, by the stack's name."""


def experts_apart(one: Wanted, shapes: Shapes, found: Callable[[Wanted], str | None]) -> Places:
    """Return the places of a stack in the tensors of single experts; none without all of them.

    Parameters
    ----------
    one : Wanted
        The stack.
    shapes : mapping of str to tuple of int
        Of the base's tensors, by name.
    found : callable
        Returns the one tensor of the base that a wanted one may be.
    """
    lead, _, last = one.path.rpartition(".")
    experts, *sides = one.shape or (0,)
    lead = f"{lead.removesuffix('switch_mlp')}experts" if lead.endswith("switch_mlp") else lead
    for parts in _PARTS.get(last, ()):

        def tensors(expert: int, parts: tuple[str, ...] = parts) -> Iterator[str | None]:
            return (found(Wanted(f"{lead}.{expert}.{part}", WEIGHT, None)) for part in parts)

        places: list[Place] = []
        for expert in range(experts):
            own = [tensor for tensor in tensors(expert) if tensor is not None]
            rows = _rows([shapes[tensor] for tensor in own], sides)
            if len(own) < len(parts) or rows is None:
                break
            places += [
                Place(tensor, None, part, expert) for tensor, part in zip(own, rows, strict=True)
            ]
        else:
            return () if any(tensors(experts)) else tuple(places)  # BASE may have more experts
    return ()


def _rows(shapes: list[tuple[int, ...]], sides: list[int]) -> list[slice] | None:
    """Return the rows of tensors that are one below the other; None if they are not a matrix."""
    if not shapes or any(len(shape) != 2 for shape in shapes):
        return None
    sizes = [shape[0] for shape in shapes]
    matrix = {(sum(sizes), columns) for _, columns in shapes}
    if not matrix <= {tuple(sides), tuple(sides[::-1])} or len(matrix) > 1:
        return None
    return cut([sum(sizes[:place]) for place in range(len(sizes))], sum(sizes))
