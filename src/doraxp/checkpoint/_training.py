"""The state of a training run: `save_training`, and `load_training` to resume it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from doraxp._base.scalars import check_count, check_kind
from doraxp._base.types import Array, HostArray
from doraxp.checkpoint._errors import CheckpointError
from doraxp.checkpoint._host import beside
from doraxp.checkpoint._training_folder import TABLE, read_folder, write_folder
from doraxp.checkpoint._trees import decoded, encoded
from doraxp.layers import AdaptedModel, DoRALayer
from doraxp.optim import Optimizer, optimizer_from_settings

_GENERATORS = ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64")
_OF_OPTIMIZERS = ("state", "steps", "settings")

AnyModel: TypeAlias = AdaptedModel | DoRALayer | Mapping[str, DoRALayer]


@dataclass(frozen=True)
class Training:
    """The state of a training run, from `load_training`.

    Attributes
    ----------
    path : Path
        The folder.
    step : int or None
        The number of steps taken.
    generator : numpy.random.Generator or None
        A new generator in the state of the saved one.
    extra : object
        The values of JSON that were saved.
    """

    path: Path
    step: int | None
    generator: np.random.Generator | None
    extra: Any
    _layers: Mapping[str, Any]
    _optimizer: Mapping[str, Any] | None
    _arrays: Mapping[str, HostArray]

    def resume(self, model: AnyModel, optimizer: Optimizer | None = None) -> Optimizer | None:
        """Put the state into a model that was made in the same way, and return the optimizer.

        Parameters
        ----------
        model : AdaptedModel, DoRALayer, or mapping of str to DoRALayer
            The arrays become those of its library, on its device.
        optimizer : Optimizer, optional
            Gets the saved state and number of steps. None makes one with the saved settings.

        Returns
        -------
        Optimizer or None
            None where no optimizer was saved.

        Raises
        ------
        TypeError
            `optimizer` is not one, or is of another class than the saved one.
        ValueError
            The state is of another model: the message names the layer and the setting. After an
            error nothing has changed.
        """
        whole = _as_model(model)
        _check_optimizer(optimizer)
        like = next(iter(whole.adapted.values())).adapter.lora_a
        state = {path: self._decoded(tree, like) for path, tree in self._layers.items()}
        found = self._optimizer
        if found is not None and optimizer is None:
            optimizer = optimizer_from_settings(found["settings"])
        own = None if found is None else self._decoded(found["state"], like)
        if found is None or optimizer is None:
            whole.load_state(state)
            return None
        before = optimizer.state, optimizer.steps
        try:
            _give_state(optimizer, own, found)
            whole.load_state(state)
        except Exception:
            optimizer.state, optimizer.steps = before
            raise
        return optimizer

    def _decoded(self, tree: Any, like: Array) -> Any:
        return decoded(tree, lambda name: beside(self._arrays[name], like))


def save_training(
    path: str | os.PathLike[str],
    model: AnyModel,
    optimizer: Optimizer | None = None,
    *,
    step: int | None = None,
    generator: np.random.Generator | None = None,
    extra: Any = None,
    overwrite: bool = True,
) -> None:
    """Write the state of a training run into a folder. A kill leaves the old state or the new one.

    Parameters
    ----------
    path : path
        A folder, which is made if it does not exist.
    model : AdaptedModel, DoRALayer, or mapping of str to DoRALayer
        Adapters, trained weights and biases, settings, and the state of dropout are saved. Frozen
        weights are not. Arrays may be of any library.
    optimizer : Optimizer, optional
        Its settings, with the schedule, and its state.
    step : int, optional
        Number of steps taken. None takes that of the optimizer.
    generator : numpy.random.Generator, optional
        The generator of the batches, for example.
    extra : object, optional
        Values that JSON has.
    overwrite : bool
        Replace an older state in the folder.

    Raises
    ------
    FileExistsError
        The folder has a file that is not part of a state, or has a state and `overwrite` is False.
    FileNotFoundError
        The folder above does not exist.
    TypeError
        `optimizer` is not one, or a part cannot be saved, such as a learning rate that is a
        function. Nothing is written.

    Examples
    --------
    >>> import tempfile
    >>> from doraxp import AdamW, Config, DoRALayer, Linear
    >>> layer, optimizer = DoRALayer(Linear(np.eye(4)), Config(rank=1), seed=0), AdamW(1e-3)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_training(f"{folder}/run", layer, optimizer, extra={"epoch": 2})
    ...     training = load_training(f"{folder}/run")
    >>> training.step, training.extra
    (0, {'epoch': 2})
    >>> training.resume(layer).learning_rate
    0.001
    """
    _check_optimizer(optimizer)
    arrays: dict[str, HostArray] = {}
    table = {
        "layers": {
            name: encoded(f"layers/{name}", state, arrays)
            for name, state in _as_model(model).state().items()
        },
        "optimizer": _of_optimizer(optimizer, arrays),
        "step": _step_of(step, optimizer),
        "generator": _of_generator(generator, arrays),
        "extra": extra,
    }
    try:
        json.dumps(table)
    except (TypeError, ValueError) as error:
        raise TypeError(f"extra must have values of JSON: {error}") from None
    write_folder(Path(path), table, arrays, overwrite=overwrite)


def load_training(path: str | os.PathLike[str]) -> Training:
    """Return the state of a training run that `save_training` wrote.

    Parameters
    ----------
    path : path

    Returns
    -------
    Training
        All arrays are in memory.

    Raises
    ------
    FileNotFoundError
        The folder has no complete state.
    CheckpointError
        A file is not one of `save_training`, or its arrays belong to another save.
    """
    folder = Path(path)
    table, arrays = read_folder(folder)
    parts: Any = table
    try:
        generator = decoded(parts["generator"], arrays.__getitem__)
        return Training(
            folder, parts["step"], _generator(generator), parts["extra"], parts["layers"],
            parts["optimizer"], arrays,
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / TABLE}: {error!r}") from None


def _give_state(optimizer: Optimizer, state: Any, saved: Mapping[str, Any]) -> None:
    """Put a saved state into an optimizer. TypeError where it is that of another class."""
    try:
        optimizer.state, optimizer.steps = state, saved["steps"]
    except TypeError as error:
        raise TypeError(
            f"optimizer must go on from the state of {saved['settings'].get('optimizer')}, got "
            f"{type(optimizer).__name__}: {error}. Without an optimizer, resume makes the saved one"
        ) from None


def _check_optimizer(optimizer: Any) -> None:
    if optimizer is not None and not all(hasattr(optimizer, name) for name in _OF_OPTIMIZERS):
        raise TypeError(
            f"optimizer must have {', '.join(_OF_OPTIMIZERS)}, as doraxp.AdamW(...) has, got "
            f"{type(optimizer).__name__}"
        )


def _as_model(model: AnyModel) -> AdaptedModel:
    if isinstance(model, AdaptedModel):
        return model
    if isinstance(model, DoRALayer):
        return AdaptedModel({model.name or "layer": model})
    check_kind("model", model, Mapping)
    return AdaptedModel(model)


def _step_of(step: int | None, optimizer: Optimizer | None) -> int | None:
    if step is not None:
        return check_count("step", step)
    return None if optimizer is None else optimizer.steps


def _of_optimizer(optimizer: Optimizer | None, arrays: dict[str, HostArray]) -> Any:
    if optimizer is None:
        return None
    state = encoded("optimizer", optimizer.state, arrays)
    return {"settings": optimizer.settings(), "steps": optimizer.steps, "state": state}


def _of_generator(generator: np.random.Generator | None, arrays: dict[str, HostArray]) -> Any:
    if generator is None:
        return None
    check_kind("generator", generator, np.random.Generator)
    state = generator.bit_generator.state
    if state["bit_generator"] not in _GENERATORS:
        raise TypeError(
            f"generator must be of one of {_GENERATORS} to be saved, got {state['bit_generator']}"
        )
    return encoded("generator", state, arrays)


def _generator(state: Any) -> np.random.Generator | None:
    if state is None:
        return None
    if state["bit_generator"] not in _GENERATORS:
        raise ValueError(f"generator must be one of {_GENERATORS}, got {state['bit_generator']!r}")
    bits = getattr(np.random, state["bit_generator"])()
    bits.state = state
    return np.random.Generator(bits)
