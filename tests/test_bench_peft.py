"""PEFT's contestants on a GPU, with the CPU in its place: who they are, their clock and memory."""

from __future__ import annotations

import types

import numpy as np
import pytest

from doraxp.cli._bench import peft as bench
from doraxp.cli._bench.cases import TASKS, Case, Dense, draw
from doraxp.cli._bench.measure import check_all

CASE = Case(24, 16, 5, 4)


@pytest.fixture
def on_cuda(torch, peft, monkeypatch):
    cuda = types.SimpleNamespace(most=5000)  # before anything was reset
    cuda.reset_peak_memory_stats = lambda: vars(cuda).update(most=1000)
    cuda.memory_allocated = lambda: 100
    cuda.max_memory_allocated = lambda: cuda.most
    monkeypatch.setattr(torch, "cuda", cuda)
    here = bench.contestants
    monkeypatch.setattr(bench, "contestants", lambda task, case, device: here(task, case))
    return bench.on_cuda


@pytest.mark.parametrize("task", TASKS)
def test_each_is_right_and_none_is_ours(on_cuda, task):
    present = list(on_cuda(task, CASE, 2))
    names = [entrant.name for entrant in present]
    assert names
    assert not any("accelerated" in name for name in names)
    check_all(task, CASE, present)


def test_the_memory_is_the_devices(on_cuda):
    (entrant,) = on_cuda("norm", CASE, 2)
    assert entrant.peak() == 900


def test_sets_of_inputs_are_gone_round_and_each_is_reset_before_its_call(on_cuda, monkeypatch):
    done = []

    def made(number):
        call, reset = (lambda what=what: done.append((what, number)) for what in ("call", "reset"))
        return bench.Contestant("DoRA", bench.LIBRARY, "detached", call, dict, reset)

    sets = iter(range(2))
    monkeypatch.setattr(bench, "contestants", lambda *_, **__: iter([made(next(sets))]))
    (entrant,) = on_cuda("merge", CASE, 2)
    for _ in range(3):
        entrant.reset()
        entrant.call()
    assert done == [(what, number) for number in (0, 1, 0) for what in ("reset", "call")]


def test_the_answers_are_the_dense_ones():
    dense = Dense(draw(CASE), CASE.config.scaling)
    np.testing.assert_allclose(dense.answers("norm", "exact")["n"] ** 2, (dense.v**2).sum(axis=1))
