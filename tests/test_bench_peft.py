"""PyTorch's and PEFT's contestants, on the CPU, and with the CPU in the place of a CUDA device."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import types
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from doraxp.bench import (
    TASKS,
    Contestant,
    Workload,
    _cuda,
    _measure,
    _peft,
    _torch,
    check_all,
    contestants,
    draw,
)
from doraxp.bench._truth import Truth
from doraxp.cli import main

WORKLOAD = Workload(24, 16, 5, 4)


class Event:
    """An event of a device that has done all its work; a second lies between two events."""

    made = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        Event.made += 1
        self.number = Event.made

    def query(self):
        return True

    def synchronize(self):
        pass

    def elapsed_time(self, last):
        return 1e3 * (last.number - self.number)


@pytest.fixture
def cuda(torch, peft, monkeypatch):
    """PyTorch's module `cuda`, with the CPU for a device."""
    properties = types.SimpleNamespace(
        name="NVIDIA Fake", multi_processor_count=2, total_memory=2**30
    )
    cuda = types.SimpleNamespace(most=5000)  # before anything was reset
    cuda.is_available = lambda: True
    cuda.current_device = lambda: 0
    cuda.get_device_properties = lambda number: properties
    cuda.reset_peak_memory_stats = lambda: vars(cuda).update(most=1000)
    cuda.memory_allocated = lambda: 100
    cuda.max_memory_allocated = lambda: cuda.most
    cuda.Event = Event
    cuda._sleep = lambda cycles: None
    monkeypatch.setattr(_cuda, "SETS", 3)
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setitem(_torch.PLACES, "cuda", "cpu")
    return cuda


@pytest.fixture
def on_cuda(cuda):
    return _peft.on_cuda


def names(present, kind=None):
    return {one.name for one in present if kind in (None, one.library)}


STEP = {"bare products", "DoRA", "accelerated, exact", "accelerated, detached", "LoRA"}
EVALUATION = {"bare product", "DoRA", "DoRA, DoraCaching", "accelerated", "LoRA"}


@pytest.mark.parametrize(("task", "expected"), [("step", STEP), ("evaluation", EVALUATION)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("autocast", [False, True])
def test_each_answer_is_right_on_a_device_and_under_autocast(
    cuda, task, expected, dtype, device, autocast
):
    workload = replace(WORKLOAD, dtype=dtype, device=device, autocast=autocast)
    present = contestants(task, workload, ("torch", "PEFT"))
    assert expected <= names(present)
    assert (names(present) == expected) == (autocast or device == "cuda")
    check_all(task, workload, present)


@pytest.mark.parametrize("workload", [replace(WORKLOAD, dtype="bfloat16"),
                                      replace(WORKLOAD, autocast=True)], ids=str)  # fmt: skip
def test_the_products_of_the_bare_layer_and_of_pefts_are_in_sixteen_bits(torch, peft, workload):
    made = {one.name: one for one in contestants("step", workload, ("torch", "PEFT"))}
    for name in ("bare products", "DoRA", "accelerated, exact", "LoRA"):
        answer = made[name].answer(made[name].call())
        assert answer["y"].dtype == torch.bfloat16
    x = torch.float32 if workload.autocast else torch.bfloat16
    dora = made["DoRA"].answer(made["DoRA"].call())
    assert dora["dx"].dtype == x
    assert dora["dA"].dtype == torch.float32  # PEFT keeps the adapter so


def test_a_wrong_answer_of_an_accelerated_layer_is_named(torch, peft, monkeypatch):
    workload = replace(WORKLOAD, dtype="bfloat16")
    present = [
        one._replace(answer=lambda y, one=one: {"y": 1.1 * one.answer(y)["y"]})
        if one.name == "accelerated" else one
        for one in contestants("evaluation", workload, ("torch", "PEFT"))
    ]  # fmt: skip
    with pytest.raises(_measure.WrongAnswerError, match="evaluation, PEFT, accelerated: y must"):
        check_all("evaluation", workload, present)


def test_one_command_measures_a_cuda_device(cuda, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(_measure, "SECONDS", 1e-6)
    monkeypatch.setattr(_measure, "SETTLE", 0)
    monkeypatch.setattr(_cuda._device, "driver", lambda: "580.1.2")
    path = tmp_path / "cuda.json"
    sizes = ("--shapes", "24x16", "--rank", "4", "--tokens", "5")
    command = ("--backend", "torch", "--device", "cuda", "--rounds", "2", "--json", str(path))
    assert main(["bench", *command, *sizes, "--dtype", "float32", "bfloat16"]) == 0
    report = json.loads(path.read_text())
    assert report["device"] == {
        "name": "NVIDIA Fake", "multiprocessors": 2, "bytes": 2**30, "driver": "580.1.2",
        "runtime_cuda": None,
    }  # fmt: skip
    done = {(one["task"], one["contestant"]) for one in report["results"]}
    assert done == {*(("step", n) for n in STEP), *(("evaluation", n) for n in EVALUATION)}
    assert {one["case"]["device"] for one in report["results"]} == {"cuda"}
    for one in report["results"]:
        assert set(one["seconds"]) == {1.0}  # of the device
        assert 0 < one["host_seconds"] < 0.5
        assert one["peak_bytes"] == 900
        assert one["over_own_bare"] == [1.0, 1.0, 1.0]
        is_ours = one["contestant"].startswith("accelerated") or "Caching" in one["contestant"]
        assert one["peft_over_it"] == ([1.0, 1.0, 1.0] if is_ours else None)
    text = capsys.readouterr().out
    assert "Device: NVIDIA Fake" in text
    assert "Times are the device's; the host needs its own to make a call of it." in text


@pytest.mark.parametrize(("sets", "expected"), [(1.5, 2), (0.1, 1), (100, 3)])
def test_a_layer_on_a_cuda_device_uses_several_sets_of_inputs(cuda, monkeypatch, sets, expected):
    monkeypatch.setattr(_cuda, "ROTATED", sets * 4 * (24 * 16 + 5 * 16 + 5 * 24))
    made = []
    tensors = _torch.tensors

    def counted(workload):
        made.append(workload)
        return tensors(workload)

    monkeypatch.setattr(_torch, "tensors", counted)
    monkeypatch.setattr(_peft, "tensors", counted)
    list(_cuda.contestants("step", replace(WORKLOAD, device="cuda"), ("torch", "PEFT")))
    assert len(made) == 2 * expected  # of PyTorch and of PEFT


@pytest.mark.parametrize("task", TASKS)
def test_each_is_right_and_they_are_all_pefts(on_cuda, task):
    present = list(on_cuda(task, WORKLOAD, 2))
    assert names(present)
    assert not any("accelerated" in name for name in names(present))
    check_all(task, WORKLOAD, present)


def test_the_arrays_beside_cupys_are_all_in_the_weights_dtype(on_cuda, torch):
    dora, _ = on_cuda("step", replace(WORKLOAD, dtype="bfloat16"), 1)
    dora.reset()
    assert {array.dtype for array in dora.answer(dora.call()).values()} == {torch.bfloat16}


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


# benchmarks/models.py


@pytest.fixture
def models(peft, monkeypatch):
    """Return the script as a module."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    monkeypatch.delitem(sys.modules, "models", raising=False)
    yield importlib.import_module("models")
    sys.modules.pop("models", None)


def test_each_way_to_compute_a_model_is_timed_in_each_round(models, tmp_path, monkeypatch, capsys):
    path, size = tmp_path / "models.json", models.Model(1, 16, 2, 6)
    goals = {(size, "step", "accelerated, exact", "PEFT"): 1e-9,
             (size, "generation", "accelerated", "PEFT, DoraCaching"): 1e9}  # fmt: skip
    monkeypatch.setattr(models, "GOALS", goals)
    with warnings.catch_warnings():
        assert models.main(["--rounds", "2", "--json", str(path)], (size,)) == 0
    text = capsys.readouterr().out
    assert "Llama of 1 layers, width 16, rank 2: step, 6 tokens" in text
    assert [line.split()[-1] for line in text.splitlines() if "≤" in line] == ["missed", "met"]
    steps, tokens = json.loads(path.read_text())
    ways = ["base alone", "PEFT", "accelerated, exact", "accelerated, detached"]
    assert list(steps["seconds"]) == ways
    assert list(tokens["seconds"]) == ["base alone", "PEFT", "PEFT, DoraCaching", "accelerated"]
    for one in (steps, tokens):
        assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in one["seconds"].values())
        assert one["ratios"]["PEFT"]["PEFT"] == 1.0


def test_the_ratio_of_a_model_is_of_the_same_round(models):
    times = {"PEFT": [1.0, 2.0, 4.0], "accelerated, exact": [3.0, 6.0, 12.0]}
    assert models.Figures(models.MODELS[0], "step", times).ratio("accelerated, exact", "PEFT") == 3


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers warns of its next names
def test_the_base_alone_has_no_adapter_and_goes_back_to_the_first_layer(models):
    model = models.build(models.Model(1, 16, 2, 6), "float32")
    batch = models.torch.randint(128, (1, 6))
    embedded = []
    inputs = model.get_input_embeddings()
    hook = inputs.register_forward_hook(lambda *args: embedded.append(args[2]))
    with models.without_adapters(model):
        alone = model(input_ids=batch).logits
        alone.sum().backward()
        with models.torch.no_grad():
            model(input_ids=batch)
    hook.remove()
    assert [values.requires_grad for values in embedded] == [True, False]
    with model.disable_adapter():
        assert models.torch.equal(model(input_ids=batch).logits, alone)
    assert not inputs._forward_hooks


def test_a_model_that_computes_something_else_is_not_timed(models, monkeypatch, capsys):
    @contextlib.contextmanager
    def wrong(model):
        with torch_module.no_grad():
            for name, leaf in model.named_parameters():
                if "magnitude" in name:
                    leaf.mul_(1.1)
        yield

    torch_module = importlib.import_module("torch")
    monkeypatch.setitem(models.STEPS, "accelerated, detached", wrong)
    monkeypatch.setattr(models, "time_all", lambda *_: pytest.fail("it was timed"))
    with warnings.catch_warnings():
        assert models.main(["--rounds", "2"], (models.Model(1, 16, 2, 6),)) == 1
    assert "loss and gradients must be within 0.001 of PEFT's, got" in capsys.readouterr().err


def test_the_norms_of_a_model_are_computed_anew_in_each_step(models, torch):
    size = models.Model(1, 16, 2, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = models.build(size, "float32")
        steps = models.Steps(size, model)
        before = [leaf.detach().clone() for leaf in model.parameters() if leaf.requires_grad]
        steps.seconds()
        steps.seconds()
    after = [leaf for leaf in model.parameters() if leaf.requires_grad]
    assert not any(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_cupys_kernels_take_part_where_cupy_finds_the_device(cuda, monkeypatch):
    entered, kernels = [], "accelerated, exact, CuPy's kernels"

    @contextlib.contextmanager
    def cupy_kernels():
        entered.append(True)
        yield

    found = {one.name for one in _peft.contestants("step", replace(WORKLOAD, device="cuda"))}
    assert kernels not in found  # there is no CuPy here
    monkeypatch.setattr("doraxp.torch.cupy_kernels", cupy_kernels)
    usable = types.SimpleNamespace(name="cupy", usable=True)
    monkeypatch.setattr(_peft, "available", lambda: [usable])
    assert kernels not in {one.name for one in _peft.contestants("step", WORKLOAD)}
    made = {one.name: one for one in _peft.contestants("step", replace(WORKLOAD, device="cuda"))}
    made["accelerated, exact"].call()
    assert entered == []
    made[kernels].call()
    assert entered == [True]
