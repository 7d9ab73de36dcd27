"""A pytest plugin that computes the DoRA layers of every PEFT model with `accelerate`.

PEFT's own tests then test the accelerated layers, see the session peft-tests in noxfile.py.
"""

from __future__ import annotations

from typing import Any

import pytest
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner

from doraxp.torch import accelerate

accelerated: list[int] = []
"""How many layers each model has that doraxp computes."""
_inject = BaseTuner.inject_adapter


def inject_adapter(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
    """Do the same as PEFT's function, then accelerate the model where it has DoRA layers."""
    _inject(self, model, *args, **kwargs)
    if isinstance(self, LoraModel):
        try:
            handle = accelerate(model, "detached")
        except ValueError:  # it has no DoRA layer that can be accelerated
            return
        accelerated.append(len(handle.layers))


BaseTuner.inject_adapter = inject_adapter


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.line(
        f"accelerated {sum(accelerated)} layers of {len(accelerated)} models with doraxp"
    )
