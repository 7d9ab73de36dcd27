"""PEFT's contestants on a GPU, with the CPU in its place: who they are, their clock and memory."""

from __future__ import annotations

import types

import numpy as np
import pytest

from doraxp.cli._bench import peft as bench
from doraxp.cli._bench.cases import TASKS, Case, Dense, draw
from doraxp.cli._bench.measure import check_all

CASE = Case(24, 16, 5, 4)


class Event:
    """One of a device on which everything takes two milliseconds."""

    def __init__(self, *, enable_timing):
        assert enable_timing

    def record(self):
        pass

    def elapsed_time(self, end):
        return 2.0


@pytest.fixture
def on_cuda(torch, peft, monkeypatch):
    held = iter([100, 1000])
    cuda = types.SimpleNamespace(
        Event=Event,
        synchronize=lambda: None,
        reset_peak_memory_stats=lambda: None,
        memory_allocated=lambda: next(held),
        max_memory_allocated=lambda: next(held),
    )
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


def test_the_clock_and_the_memory_are_the_devices(on_cuda):
    (entrant,) = on_cuda("norm", CASE, 2)
    assert entrant.seconds(5) == pytest.approx(2e-3)
    assert entrant.peak() == 900


def test_the_answers_are_the_dense_ones():
    dense = Dense(draw(CASE), CASE.config.scaling)
    np.testing.assert_allclose(dense.answers("norm", "exact")["n"] ** 2, (dense.v**2).sum(axis=1))
