"""`load_quantised`: a quantised weight of a model, still packed, to train an adapter on it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from doraxp._base.types import Array, DType, HostArray
from doraxp._core.quantised import QuantisedWeight
from doraxp.checkpoint._errors import CheckpointError
from doraxp.checkpoint._model import open_model
from doraxp.checkpoint._quantised.protocol import Refused


def load_quantised(
    base: str | os.PathLike[str],
    name: str,
    *,
    place: Callable[[HostArray], Array] = lambda array: array,
    dtype: DType | None = None,
) -> QuantisedWeight:
    """Return a quantised weight of a model, still packed, to train an adapter on it.

    ::

        W = table[codes]·scale + bias

    Its product is rounded to float32 and then to `dtype`. Some formats round once more on the way,
    which `doraxp merge` does and this weight does not.

    Parameters
    ----------
    base : path
        A folder or a file.
    name : str
        The weight's name, such as "model.layers.0.self_attn.q_proj.weight".
    place : callable
        Takes an array of NumPy to another library, such as `cupy.asarray`.
    dtype : dtype of that library, optional
        The dtype of the rows; None means float32.

    Raises
    ------
    CheckpointError
        The model has no such weight, or it is not a quantised matrix that can be read.
    OSError
        A file cannot be read.
    """
    path = Path(base)
    model = open_model(path)
    found = model.quantised.get(name)
    if isinstance(found, Refused):
        raise CheckpointError(f"{path}: {name} {found.problem}")
    if found is None:
        problem = "is not quantised" if name in model.sources() else "is not in the model"
        raise CheckpointError(f"{path}: {name} {problem}")
    if len(found.shape) != 2:
        raise CheckpointError(f"{path}: {name} has the shape {found.shape} and is not a matrix")
    weight = model.readable[name]
    weight.check()
    packed = found.packed(weight.fetch)
    bias = None if packed.bias is None else place(np.ascontiguousarray(packed.bias))
    return QuantisedWeight(
        *(place(np.ascontiguousarray(array)) for array in packed[:3]),
        group=packed.group,
        bias=bias,
        dtype=dtype,
    )
