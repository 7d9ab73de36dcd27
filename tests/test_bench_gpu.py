"""`doraxp bench --backend cupy`, with NumPy in CuPy's place: cases, answers, clock and memory."""

from __future__ import annotations

import importlib
import json
import types

import ml_dtypes
import numpy as np
import pytest

from doraxp.backends import Status
from doraxp.cli import main
from doraxp.cli._bench import contestants, gpu, measure, peft
from doraxp.cli._bench.cases import Case
from doraxp.cli._bench.contestants import Contestant
from doraxp.cli._bench.measure import Measured
from doraxp.cli._bench.report import ratios

CASE = Case(24, 16, 5, 4, "bfloat16")


class Clock:
    """A clock of a device: a call takes a millisecond, whenever it is made."""

    calls = 0


class Event:
    def record(self):
        self.at = Clock.calls

    def synchronize(self):
        pass


class Hook:
    """CuPy's MemoryHook, with which one goes by `with`."""

    active = None

    def __enter__(self):
        Hook.active = self
        return self

    def __exit__(self, *_):
        Hook.active = None


@pytest.fixture
def fake_cupy(monkeypatch):
    properties = {"name": b"NVIDIA Fake", "multiProcessorCount": 2, "totalGlobalMem": 2**30}
    runtime = types.SimpleNamespace(
        getDevice=lambda: 0,
        getDeviceProperties=lambda number: properties,
        driverGetVersion=lambda: 13000,
        runtimeGetVersion=lambda: 13000,
    )
    fake = types.SimpleNamespace(
        __version__="14.2.0",
        asarray=np.asarray,
        cuda=types.SimpleNamespace(
            Event=Event,
            MemoryHook=Hook,
            get_elapsed_time=lambda began, ended: float(ended.at - began.at),
            runtime=runtime,
        ),
    )
    load = importlib.import_module
    monkeypatch.setattr(
        "importlib.import_module", lambda name, *rest: fake if name == "cupy" else load(name, *rest)
    )
    usable = [Status("cupy", True, "14.2.0")]
    monkeypatch.setattr("doraxp.backends.available", lambda: usable)
    monkeypatch.setattr(gpu, "driver", lambda: "580.1.2")
    monkeypatch.setattr(peft, "why_not", lambda: "not here")
    monkeypatch.setattr(measure, "SECONDS", 1e-6)
    monkeypatch.setattr(measure, "SETTLE", 0)
    monkeypatch.setattr(gpu, "ROTATED", 3000)  # two sets of inputs, or one
    monkeypatch.setattr(gpu, "seconds", lambda *_: 1e-3)
    return fake


def test_the_suite_is_that_of_the_docs():
    cases = list(gpu.suite())
    assert len(cases) == 4 * 2 * 3
    assert Case(8192, 28672, 4096, 256, "bfloat16") in cases


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_one_command_measures_all_that_is_asked(fake_cupy, tmp_path, capsys, monkeypatch, dtype):
    cases = [Case(24, 16, tokens, 4, dtype) for tokens in (1, 5)]
    monkeypatch.setattr(gpu, "suite", lambda: iter(cases))
    path, plot = tmp_path / "gpu.json", tmp_path / "gpu.png"
    files = ("--json", str(path), "--plot", str(plot))
    assert main(["bench", "--backend", "cupy", "--rounds", "2", *files]) == 0
    report = json.loads(path.read_text())
    assert report["device"]["name"] == "NVIDIA Fake"
    assert report["device"]["driver"] == "580.1.2"
    assert report["versions"]["cupy"] == "14.2.0"
    assert plot.read_bytes().startswith(b"\x89PNG")
    done = {(one["task"], one["contestant"], one["case"]["tokens"]) for one in report["results"]}
    of_tokens = {(task, name) for task, name, tokens in done if tokens == 5}
    ways = ("exact", "detached", "exact, reduced", "detached, reduced", "bare products")
    assert {name for task, name in of_tokens if task == "step"} == set(ways)
    assert {n for task, n in of_tokens if task == "backward"} == {*ways[:-1], "bare product"}
    assert {task for task, _ in of_tokens} == {"forward", "backward", "step", "evaluation"}
    assert {task for task, _, _ in done} == {*(t for t, _ in of_tokens), "norm", "merge", "adamw"}
    assert all(one["over_own_bare"] for one in report["results"] if one["task"] != "adamw")
    assert "NVIDIA Fake" in capsys.readouterr().out


def test_other_cases_are_measured_where_they_are_asked_for(fake_cupy, tmp_path):
    path = tmp_path / "gpu.json"
    shape = ("--shapes", "24x16", "--rank", "4", "--tokens", "5", "--tasks", "norm")
    command = ("--backend", "cupy", "--rounds", "2", "--json", str(path))
    assert main(["bench", *command, *shape]) == 0
    cases = [one["case"] for one in json.loads(path.read_text())["results"]]
    assert {tuple(case.values()) for case in cases} == {(24, 16, 5, 4, "float32")}


def test_a_gpu_is_measured_by_itself(fake_cupy, capsys, monkeypatch):
    usable = [Status(name, True, "1") for name in ("cupy", "numpy")]
    monkeypatch.setattr("doraxp.backends.available", lambda: usable)
    assert main(["bench", "--backend", "cupy", "--backend", "numpy"]) == 2
    assert "--backend cupy must be alone, got ['cupy', 'numpy']" in capsys.readouterr().err


def test_contestants_go_round_several_sets_of_inputs(fake_cupy):
    met = set()

    def merge(weight):
        met.add(weight.ctypes.data)

    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(contestants, "copied", merge)
        patch.setattr(gpu, "_on_device", lambda _, inputs: copied(inputs))
        bare, *_ = gpu.contestants("merge", CASE)
        for _ in range(4):
            bare.call()
    assert len(met) == 3000 // (2 * (24 * 16 + 5 * 16 + 5 * 24)) + 1


def copied(inputs):
    leaves = type(inputs.adapter)(*(leaf.copy() for leaf in inputs.adapter))
    return inputs._replace(weight=inputs.weight.copy(), adapter=leaves)


def test_inputs_are_in_the_weights_dtype():
    weight, adapter, x, dy = gpu.stored(CASE)
    assert weight.dtype == x.dtype == dy.dtype == ml_dtypes.bfloat16
    assert adapter.lora_a.dtype == np.float32


def test_seconds_are_the_devices(monkeypatch):
    cuda = types.SimpleNamespace(Event=Event, get_elapsed_time=lambda a, b: float(b.at - a.at))

    def call():
        Clock.calls += 3

    cupy = types.SimpleNamespace(cuda=cuda)
    assert gpu.seconds(cupy, call, 5) == pytest.approx(3e-3)
    entrant = Contestant("a", "cupy", "exact", call, dict, seconds=lambda repeats: 7.0 * repeats)
    assert measure.seconds_of(entrant, 2) == 14


def test_the_peak_is_the_most_that_is_held_at_once():
    def call():
        hook = Hook.active
        if hook is None:
            return
        hook.free_postprocess(mem_ptr=99, mem_size=1 << 30)  # it was there before
        for pointer, size in ((1, 512), (2, 1024)):
            hook.malloc_postprocess(mem_ptr=pointer, mem_size=size)
        hook.free_postprocess(mem_ptr=1, mem_size=512)
        hook.malloc_postprocess(mem_ptr=3, mem_size=256)

    cupy = types.SimpleNamespace(cuda=types.SimpleNamespace(MemoryHook=Hook))
    assert gpu.peak(cupy, call) == 1536


def test_a_reduced_answer_has_a_tolerance_of_its_own(fake_cupy):
    made = {one.name: one.tolerance for one in gpu.contestants("step", CASE)}
    assert made["exact, reduced"] == 4e-2
    assert made["exact"] is None


def test_peft_takes_part_where_pytorch_finds_the_device(fake_cupy, monkeypatch):
    torch = types.SimpleNamespace(cuda=types.SimpleNamespace(is_available=lambda: True))
    load = importlib.import_module
    monkeypatch.setattr(
        "importlib.import_module", lambda name, *r: torch if name == "torch" else load(name, *r)
    )
    monkeypatch.setattr(peft, "why_not", lambda: None)
    monkeypatch.setattr(peft, "on_cuda", lambda task, case, sets: iter([(task, case, sets)]))
    *_, theirs = gpu.contestants("norm", CASE)
    assert theirs == ("norm", CASE, 3)


def test_peft_on_a_gpu_is_held_against_cupys_bare_products():
    def of(library, kind, seconds):
        return Measured(CASE, "step", kind, library, kind, [seconds] * 2, 0)

    bare, theirs = of("cupy", "bare", 1.0), of("PEFT", "detached", 3.0)
    assert ratios(theirs, [bare, theirs])["over_own_bare"] == (3.0, 3.0, 3.0)


@pytest.mark.parametrize(
    ("said", "expected"),
    [("echo 580.1.2; echo 580.1.2", "580.1.2"), ("exit 9", None), (None, None)],
    ids=["two devices", "no device", "no such program"],
)
def test_the_driver_is_asked_for_its_version(tmp_path, monkeypatch, said, expected):
    if said is not None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{said}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu.driver() == expected
