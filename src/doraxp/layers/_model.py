"""`AdaptedModel`: the layers of a model by path, some with adapters, trained as one.

tree   {path: {name: array}}, the arrays of all adapted layers
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, ValuesView
from typing import Any, TypeAlias

from doraxp._base.scalars import check_kind
from doraxp._base.types import Array
from doraxp._base.words import counted, the_nearest
from doraxp.layers._dora import DoRALayer
from doraxp.layers._parameters import count
from doraxp.layers._targets import nearest
from doraxp.layers._trained import check_optimizer
from doraxp.optim import Optimizer

Tree: TypeAlias = dict[str, dict[str, Array]]
Setter: TypeAlias = Callable[[Any], None]


class AdaptedModel(Mapping[str, Any]):
    """The layers of a model by path: `DoRALayer` where one is adapted, the given layer elsewhere.

    `doraxp.adapt_layers` makes it.

    Parameters
    ----------
    layers : mapping of str to layer
        Adapted layers are of the class `DoRALayer`.
    setters : mapping of str to callable, optional
        ``setters[path](layer)`` puts another layer in the place of the one at `path`.
    weight, bias : str
        Names of the attributes of layers without an adapter, for the counts. `bias` may be None.

    Raises
    ------
    ValueError
        No layer is a `DoRALayer`.

    Examples
    --------
    >>> import numpy as np
    >>> from doraxp import Config, Linear, adapt_layers
    >>> layers = {"up": Linear(np.eye(4)), "down": Linear(np.eye(4))}
    >>> model = adapt_layers(layers, ["up"], Config(rank=1), seed=0)
    >>> model["up"](np.ones(4)), list(model.parameters)
    (array([1., 1., 1., 1.]), ['up'])
    >>> print(model.summary())
    trainable params: 12 || all params: 44 || trainable%: 27.2727
    """

    def __init__(
        self,
        layers: Mapping[str, Any],
        *,
        setters: Mapping[str, Setter] | None = None,
        weight: str = "weight",
        bias: str | None = "bias",
    ) -> None:
        self._layers, self._setters = dict(layers), dict(setters or {})
        self._attributes = weight, bias
        self.adapted: dict[str, DoRALayer] = {
            path: layer for path, layer in layers.items() if isinstance(layer, DoRALayer)
        }
        """The adapted layers by path."""
        if not self.adapted:
            raise ValueError("layers must hold at least one DoRALayer")

    def __getitem__(self, path: str) -> Any:
        try:
            return self._layers[path]
        except KeyError:
            near = _nearest(str(path), self._layers)
            layers = counted(len(self), "layer")
            raise KeyError(
                f"path must be one of {layers}, got {path!r}; {the_nearest(near)}"
            ) from None

    def __contains__(self, path: object) -> bool:
        return path in self._layers

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def values(self) -> ValuesView[Any]:
        """Return the layers in order; `reversed` takes them, as those of a dict."""
        return self._layers.values()

    def __repr__(self) -> str:
        layers = counted(len(self.adapted), "layer", of=len(self))
        return f"<AdaptedModel {layers} adapted, {self.summary()}>"

    @property
    def parameters(self) -> Tree:
        """The trained arrays, {path: {name: array}}. May be assigned to, as `load_state_dict` is.

        After an error nothing has changed.
        """
        return {path: layer.state_dict() for path, layer in self.adapted.items()}

    @parameters.setter
    def parameters(self, tree: Mapping[str, Mapping[str, Array]]) -> None:
        self._check_paths("parameters", tree)
        new = {}
        for path, layer in self.adapted.items():
            with _at(path):
                new[path] = layer._fitting(tree[path], strict=True)
        for path, layer in self.adapted.items():
            layer._replace(new[path])

    @property
    def gradients(self) -> Tree:
        """The gradients of the current parameters, {path: {name: array}}.

        A layer without gradients is not in it.
        """
        found = {path: layer._live_gradients() for path, layer in self.adapted.items()}
        return {path: gradients for path, gradients in found.items() if gradients is not None}

    def step(self, optimizer: Optimizer) -> None:
        """Take one step of an optimizer with the arrays of all layers; drop the gradients.

        The norm for clipping is that of all gradients together. RuntimeError names the layers
        without gradients of their current parameters. TypeError for an object without a method
        `step`.
        """
        check_optimizer(optimizer)
        gradients = self.gradients
        absent = [path for path in self.adapted if path not in gradients]
        if absent:
            raise RuntimeError(
                f"step needs gradients of all layers, but {', '.join(absent)} have none of the "
                "current parameters: call backward of each first, and again after every step"
            )
        stepped = optimizer.step(self.parameters, gradients)
        for path, layer in self.adapted.items():
            layer._replace(stepped[path])

    def clear_gradients(self) -> None:
        """Drop the gradients of all layers."""
        for layer in self.adapted.values():
            layer.clear_gradients()

    def train(self) -> None:
        """Turn dropout on."""
        for layer in self.adapted.values():
            layer.train()

    def eval(self) -> None:
        """Turn dropout off."""
        for layer in self.adapted.values():
            layer.eval()

    def merge(self) -> dict[str, Any]:
        """Return plain layers by path: copies of the bases with W', and the layers not adapted.

        A model that was made with an accessor gets them in place of its adapted layers. TypeError
        where a base cannot be copied or assigned; then nothing has changed.
        """
        plain = dict(self._layers)
        for path, layer in self.adapted.items():
            with _at(path):
                plain[path] = layer.merge_to_original_layer()
        for path, put in self._setters.items():
            put(plain[path])
        return plain

    @property
    def trained_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(layer.parameter_count for layer in self.adapted.values())

    @property
    def all_parameters(self) -> int:
        """How many numbers weights, biases and adapters have together."""
        total = 0
        for layer in self.values():
            if isinstance(layer, DoRALayer):
                arrays, adapter = [layer.weight, layer.bias], count(layer.adapter._asdict())
            else:
                adapter = 0
                arrays = [getattr(layer, name, None) for name in self._attributes if name]
            total += adapter + sum(math.prod(a.shape) for a in arrays if a is not None)
        return total

    def summary(self) -> str:
        """Return the counts in one line, as PEFT's ``print_trainable_parameters`` prints them."""
        trained, total = self.trained_parameters, self.all_parameters
        return (
            f"trainable params: {trained:,d} || all params: {total:,d} || "
            f"trainable%: {100 * trained / total:.4f}"
        )

    def state(self) -> dict[str, dict[str, Any]]:
        """Return `DoRALayer.state()` of each adapted layer by path."""
        return {path: layer.state() for path, layer in self.adapted.items()}

    def load_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Load a state of a model that was made in the same way; after an error nothing changed."""
        self._check_paths("state", state)
        for path, layer in self.adapted.items():
            with _at(path):
                layer._checked_state(state[path])
        for path, layer in self.adapted.items():
            layer.load_state(state[path])

    def _check_paths(self, name: str, tree: Mapping[str, Any]) -> None:
        check_kind(name, tree, Mapping)
        problems = [f"missing {path}" for path in self.adapted if path not in tree]
        problems += [f"unexpected {path}" for path in tree if path not in self.adapted]
        if problems:
            raise ValueError(f"{name} must have the adapted layers: " + "; ".join(problems))


def _nearest(wanted: str, paths: Iterable[str]) -> list[str]:
    """Return the paths that are nearest to `wanted`, or whose ends are."""
    paths = list(paths)
    near = nearest(wanted, paths)
    found = (path for one in near for path in paths if one in (path, path.rpartition(".")[-1]))
    return [*dict.fromkeys(found)][:5]


@contextlib.contextmanager
def _at(path: str) -> Iterator[None]:
    """Give an error the path of the layer that it is about."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path}: {error}") from None
