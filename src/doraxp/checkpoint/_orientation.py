"""Whether a base stores a weight (out, in), or (in, out) as GPT-2's Conv1D does.

The shape tells, unless the weight is square. PEFT's ``fan_in_fan_out`` is that of the last module
that it adapted. So the base is asked: a weight (n, 3 n) whose bias has 3 n numbers is stored
(in, out), and so are its neighbours that have a bias. The biases come before the model type,
because mlx-lm stores the weights of GPT-2 (out, in).
"""

from __future__ import annotations

from collections.abc import Mapping

from doraxp.checkpoint._names._places import Shapes

_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
_CONV1D = ("c_attn", "c_proj", "c_fc", "q_attn")
"""The modules that these models store (in, out)."""


def may_transpose(shapes: Shapes, model_type: object) -> bool:
    """Return whether any weight of the base may be stored (in, out)."""
    return model_type in _CONV1D_MODELS or any(_by_bias(shapes).values())


def is_transposed(
    name: str,
    shapes: Shapes,
    model_type: object,
    adapted: Mapping[str, bool],
    *,
    flag: bool,
) -> bool | None:
    """Return whether a square weight is stored (in, out); None where nothing tells.

    Parameters
    ----------
    name : str
        The weight.
    shapes : mapping of str to tuple of int
        Of the base's tensors.
    model_type : object
        That of config.json.
    adapted : mapping of str to bool
        Whether an adapted weight is stored (in, out), of those whose shape tells, and of the square
        ones, whose value does not count.
    flag : bool
        PEFT's ``fan_in_fan_out``.
    """
    evidence = {
        other: transposed
        for other, transposed in adapted.items()
        if shapes[other][0] != shapes[other][1]
    }
    evidence |= _by_bias(shapes)
    if model_type in _CONV1D_MODELS:
        if _module(name) not in _CONV1D:
            return False
        ways = {value for other, value in evidence.items() if _module(other) in _CONV1D}
        return None if len(ways) > 1 else False not in ways
    if not any(evidence.values()):
        # No weight of the base is known to be stored (in, out). The flag is that of all modules if
        # they have one name.
        return flag if not flag or len(set(map(_module, adapted))) == 1 else None
    if _bias(name) not in shapes and all(
        _bias(other) in shapes for other, transposed in evidence.items() if transposed
    ):
        return False  # each Conv1D of the base has a bias
    near = _nearest(name, evidence)
    if len(set(near.values())) > 1:
        return None
    if not any(near.values()) or any(_bias(other) in shapes for other in near):
        return any(near.values()) and _bias(name) in shapes  # each Conv1D has a bias
    return True if len(near) < len(evidence) else None


def _module(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]


def _bias(name: str) -> str:
    return f"{name.removesuffix('weight')}bias"


def _by_bias(shapes: Shapes) -> dict[str, bool]:
    """Return whether a weight is stored (in, out), of all weights whose bias tells."""
    found = {}
    for name, shape in shapes.items():
        bias = shapes.get(_bias(name), ())
        tells = len(shape) == 2 and shape[0] != shape[1] and len(bias) == 1 and bias[0] in shape
        if name.endswith(".weight") and tells:
            found[name] = bias[0] == shape[1]
    return found


def _nearest(name: str, evidence: Mapping[str, bool]) -> dict[str, bool]:
    """Return the evidence of the weights that share the most leading components with `name`."""
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        lead = "".join(f"{part}." for part in parts[:length])
        near = {other: value for other, value in evidence.items() if other.startswith(lead)}
        if near:
            return near
    return dict(evidence)
