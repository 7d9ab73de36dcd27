"""PEFT's contestants on a GPU, with the CPU in its place: their names, clock and memory."""

from __future__ import annotations

import types

import numpy as np
import pytest

from doraxp.bench import TASKS, Contestant, Workload, _peft, check_all, draw
from doraxp.bench._truth import Truth

WORKLOAD = Workload(24, 16, 5, 4)


@pytest.fixture
def on_cuda(torch, peft, monkeypatch):
    cuda = types.SimpleNamespace(most=5000)  # before anything was reset
    cuda.reset_peak_memory_stats = lambda: vars(cuda).update(most=1000)
    cuda.memory_allocated = lambda: 100
    cuda.max_memory_allocated = lambda: cuda.most
    monkeypatch.setattr(torch, "cuda", cuda)
    here = _peft.contestants
    monkeypatch.setattr(_peft, "contestants", lambda task, workload, device: here(task, workload))
    return _peft.on_cuda


@pytest.mark.parametrize("task", TASKS)
def test_each_is_right_and_they_are_all_pefts(on_cuda, task):
    present = list(on_cuda(task, WORKLOAD, 2))
    names = [contestant.name for contestant in present]
    assert names
    assert not any("accelerated" in name for name in names)
    check_all(task, WORKLOAD, present)


def test_the_memory_is_the_devices(on_cuda):
    (contestant,) = on_cuda("norm", WORKLOAD, 2)
    assert contestant.peak() == 900


def test_sets_of_inputs_are_used_in_turn_and_each_is_reset_before_its_call(on_cuda, monkeypatch):
    done = []

    def made(number):
        call, reset = (lambda what=what: done.append((what, number)) for what in ("call", "reset"))
        return Contestant("DoRA", _peft.LIBRARY, "detached", call, dict, reset)

    sets = iter(range(2))
    monkeypatch.setattr(_peft, "contestants", lambda *_, **__: iter([made(next(sets))]))
    (contestant,) = on_cuda("merge", WORKLOAD, 2)
    for _ in range(3):
        contestant.reset()
        contestant.call()
    assert done == [(what, number) for number in (0, 1, 0) for what in ("reset", "call")]


def test_the_true_norm_is_that_of_the_rows_of_v():
    truth = Truth(draw(WORKLOAD), WORKLOAD.config.scaling)
    np.testing.assert_allclose(truth.answers("norm", "exact")["n"] ** 2, (truth.v**2).sum(axis=1))
