"""`doraxp bench --backend cupy`, with NumPy in CuPy's place: workloads, answers, clock, memory."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import types
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

import doraxp
from doraxp.backends import Status
from doraxp.bench import (
    Contestant,
    Measured,
    Workload,
    _clock,
    _cuda,
    _device,
    _gpu,
    _measure,
    _peft,
    gpu_suite,
)
from doraxp.bench import contestants as bench_contestants
from doraxp.bench._report import ratios
from doraxp.cli import main

WORKLOAD = Workload(24, 16, 5, 4, "bfloat16")


class Gpu:
    """A device with a simulated clock: it works through its queue, and the host does not wait.

    In seconds. `now` is the host's time. A launch begins at `free`, or now if `free` is past.
    """

    def __init__(self):
        self.now = self.free = 0.0
        self.held = []

    def work(self, *, device, host):
        self.now += host
        self.free = max(self.free, self.now) + device

    def kernel(self, source, name):
        assert name in source

        def launch(grid, block, arguments):
            assert (grid, block) == ((1,), (1,))
            (nanoseconds,) = arguments
            self.hold(1e-9 * int(nanoseconds))

        return launch

    def hold(self, seconds):
        self.held.append(seconds)
        self.free = max(self.free, self.now) + seconds

    def event(self, **options):
        return Event(self, options)

    def wait(self):
        self.now = max(self.now, self.free)

    def cupy(self):
        cuda = types.SimpleNamespace(
            Event=self.event, get_elapsed_time=lambda a, b: 1e3 * (b.at - a.at)
        )
        return types.SimpleNamespace(cuda=cuda, RawKernel=self.kernel)

    def queue(self, library):
        """The queue by CuPy, or by PyTorch: a device of 2.5e9 cycles in a second."""
        if library == "cupy":
            return _device.Queue(self.cupy())
        return _cuda.Queue(
            types.SimpleNamespace(Event=self.event, _sleep=lambda cycles: self.hold(cycles / 2.5e9))
        )


class Event:
    """An event of CuPy and of PyTorch."""

    def __init__(self, device, options):
        self.device, self.options = device, options

    def record(self):
        self.at = max(self.device.free, self.device.now)

    def synchronize(self):
        self.device.now = max(self.device.now, self.at)

    @property
    def done(self):
        return self.at <= self.device.now

    def query(self):
        return self.done

    def elapsed_time(self, last):
        assert self.options == last.options == {"enable_timing": True}
        return 1e3 * (last.at - self.at)


@pytest.fixture
def device(monkeypatch):
    made = Gpu()
    monkeypatch.setattr("time.perf_counter", lambda: made.now)
    return made


@pytest.fixture(params=["cupy", "torch"])
def queue(request, device):
    """The queue of the simulated device, by either library."""
    return device.queue(request.param)


class Hook:
    """CuPy's MemoryHook, active inside its `with` block."""

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
        cuda=types.SimpleNamespace(MemoryHook=Hook, runtime=runtime),
    )
    load = importlib.import_module
    monkeypatch.setattr(
        "importlib.import_module", lambda name, *rest: fake if name == "cupy" else load(name, *rest)
    )
    usable = [Status("cupy", True, "14.2.0")]
    monkeypatch.setattr("doraxp.backends.available", lambda: usable)
    monkeypatch.setattr(_device, "driver", lambda: "580.1.2")
    monkeypatch.setattr(_gpu, "_copied", lambda weight: weight.copy())
    monkeypatch.setattr(_peft, "why_not", lambda: "not here")
    monkeypatch.setattr(_measure, "SECONDS", 1e-6)
    monkeypatch.setattr(_measure, "SETTLE", 0)
    monkeypatch.setattr(_gpu, "ROTATED", 3000)  # two sets of inputs, or one
    monkeypatch.setattr(_device, "seconds", lambda *_: 1e-3)
    numbers = itertools.count(1)
    monkeypatch.setattr(_device, "host_seconds", lambda *_: next(numbers) / 1e3)
    return fake


def test_the_suite_is_that_of_the_docs():
    workloads = list(gpu_suite())
    assert len(workloads) == 4 * 2 * 3
    assert Workload(8192, 28672, 4096, 256, "bfloat16") in workloads


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_one_command_measures_everything(fake_cupy, tmp_path, capsys, monkeypatch, dtype):
    workloads = [Workload(24, 16, tokens, 4, dtype) for tokens in (1, 5)]
    monkeypatch.setattr("doraxp.bench.gpu_suite", lambda: iter(workloads))
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
    other = {"float32": ", TF32", "float64": None}.get(dtype, ", exact products")
    suffixes = ("",) if other is None else ("", other)
    ways = (*(way + end for end in suffixes for way in ("exact", "detached")), "bare products")
    assert {name for task, name in of_tokens if task == "step"} == set(ways)
    assert {n for task, n in of_tokens if task == "backward"} == {*ways[:-1], "bare product"}
    assert {task for task, _ in of_tokens} == {"forward", "backward", "step", "evaluation"}
    assert {task for task, _, _ in done} == {*(t for t, _ in of_tokens), "norm", "merge", "adamw"}
    assert all(one["over_own_bare"] for one in report["results"] if one["task"] != "adamw")
    assert "NVIDIA Fake" in capsys.readouterr().out


def test_other_workloads_are_measured_on_request(fake_cupy, tmp_path):
    path = tmp_path / "gpu.json"
    shape = ("--shapes", "24x16", "--rank", "4", "--tokens", "5", "--tasks", "norm")
    command = ("--backend", "cupy", "--rounds", "2", "--json", str(path))
    assert main(["bench", *command, *shape]) == 0
    cases = [one["case"] for one in json.loads(path.read_text())["results"]]
    assert {tuple(case.values()) for case in cases} == {(24, 16, 5, 4, "float32", False, "cpu")}


def test_a_gpu_is_measured_by_itself(fake_cupy, capsys, monkeypatch):
    usable = [Status(name, True, "1") for name in ("cupy", "numpy")]
    monkeypatch.setattr("doraxp.backends.available", lambda: usable)
    assert main(["bench", "--backend", "cupy", "--backend", "numpy"]) == 2
    assert "--backend cupy must be alone, got ['cupy', 'numpy']" in capsys.readouterr().err


def test_contestants_use_several_sets_of_inputs_in_turn(fake_cupy):
    met = set()

    def merge(weight):
        met.add(weight.ctypes.data)

    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(_gpu, "_copied", merge)
        patch.setattr(_gpu, "_on_device", lambda _, inputs: copied(inputs))
        bare, *_ = _gpu.contestants("merge", WORKLOAD)
        for _ in range(4):
            bare.call()
    assert len(met) == 3000 // (2 * (24 * 16 + 5 * 16 + 5 * 24)) + 1


def copied(inputs):
    leaves = type(inputs.adapter)(*(leaf.copy() for leaf in inputs.adapter))
    return inputs._replace(weight=inputs.weight.copy(), adapter=leaves)


def test_the_bare_copy_is_the_devices_own():
    """CuPy's kernel for a copy takes several times as long."""
    copied = []

    class OnDevice:
        def __init__(self, shape, dtype):
            self.shape, self.dtype, self.nbytes = shape, dtype, 48
            self.data = types.SimpleNamespace(copy_from_device_async=lambda *of: copied.append(of))

    weight = OnDevice((3, 4), "float32")
    copy = _gpu._copied(weight)
    assert (copy.shape, copy.dtype) == ((3, 4), "float32")
    assert copied == [(weight.data, 48)]


def test_inputs_are_in_the_weights_dtype():
    weight, adapter, x, dy = _gpu.stored(WORKLOAD)
    assert weight.dtype == x.dtype == dy.dtype == ml_dtypes.bfloat16
    assert adapter.lora_a.dtype == np.float32


@pytest.mark.parametrize("host", [1e-6, 3e-5, 4e-3])
@pytest.mark.parametrize("repeats", [1, 20])
def test_time_is_the_devices_however_slow_the_host_is(device, queue, host, repeats):
    """The queue is held while it is filled: a short call must not take as long as Python needs."""
    calls = []

    def call():
        calls.append(None)
        device.work(device=2e-5, host=host)

    assert _clock.seconds(queue, call, repeats) == pytest.approx(2e-5)
    assert repeats < len(calls) < repeats + 4
    assert _clock.host_seconds(queue, call) == pytest.approx(host)


def test_the_reset_before_a_call_is_not_timed(device, queue):
    ready = []

    def reset():
        ready.append(1)
        device.work(device=1.0, host=1.0)

    def call():
        ready.pop()
        device.work(device=2e-5, host=3e-5)

    assert _clock.seconds(queue, call, 5, reset) == pytest.approx(2e-5)
    assert _clock.host_seconds(queue, call, reset) == pytest.approx(3e-5)


def test_a_call_slower_than_the_first_is_held_too(device, queue):
    hosts = iter([3e-5] + [5e-5] * 100)

    def call():
        device.work(device=2e-6, host=next(hosts))

    assert _clock.seconds(queue, call, 8) == pytest.approx(2e-6)


def test_the_calls_are_repeated_if_the_device_began_before_the_queue_was_full(device, queue):
    """A call may need much longer than the first one did, by the host's clock."""
    hosts = iter([1e-6] + [3e-5] * 100)

    def call():
        device.work(device=2e-6, host=next(hosts))

    assert _clock.seconds(queue, call, 8) == pytest.approx(2e-6)
    first, second, third = device.held  # about 12, 24 and 48 µs a call
    assert (second, third) == (pytest.approx(2 * first), pytest.approx(4 * first))


def test_a_call_that_waits_for_the_device_is_measured_as_it_is(device, queue):
    def call():
        device.work(device=2e-6, host=3e-5)
        device.wait()

    assert _clock.seconds(queue, call, 8) == pytest.approx(3.2e-5, rel=0.2)
    assert len(device.held) == _clock.TRIES


def test_the_hosts_time_is_a_median_and_the_queue_is_not_held_for_it(device, queue):
    hosts = iter([1e-5] * 12 + [1.0] + [1e-5] * 100)
    assert _clock.host_seconds(
        queue, lambda: device.work(device=2e-5, host=next(hosts))
    ) == pytest.approx(1e-5)
    assert not device.held


def test_the_queue_is_held_several_times_for_many_calls(device, queue):
    longest = 0
    queued = []

    def call():
        nonlocal longest
        queued[:] = [end for end in queued if end > device.now]
        device.work(device=1e-6, host=1e-5)
        queued.append(device.free)
        longest = max(longest, len(queued))

    _clock.seconds(queue, call, 1000)
    assert longest <= _clock.QUEUED
    assert max(device.held) < 1e-3


def test_the_benchmarks_of_cupy_use_the_same_clock(device):
    def call():
        device.work(device=2e-5, host=1e-3)

    assert _device.seconds(device.cupy(), call, 3) == pytest.approx(2e-5)
    assert _device.host_seconds(device.cupy(), call) == pytest.approx(1e-3)


def test_the_hosts_time_is_reported_beside_the_devices(fake_cupy, tmp_path, capsys):
    path = tmp_path / "gpu.json"
    shape = ("--shapes", "24x16", "--rank", "4", "--tokens", "1", "--tasks", "forward")
    assert main(["bench", "--backend", "cupy", "--rounds", "2", "--json", str(path), *shape]) == 0
    hosts = [one["host_seconds"] for one in json.loads(path.read_text())["results"]]
    assert hosts == [number / 1e3 for number in range(1, len(hosts) + 1)]
    text = capsys.readouterr().out
    assert "Times are the device's; the host needs its own to make a call of it." in text
    assert [line.split() for line in text.splitlines()].count(
        ["median", "quartiles", "host", "peak"]
    ) == 1
    table = text.partition("Figures: ")[0]
    assert max(map(len, table.splitlines())) <= 80


def test_the_peak_is_the_most_that_is_held_at_once():
    def call():
        hook = Hook.active
        if hook is None:
            return
        hook.free_postprocess(mem_ptr=99, mem_size=1 << 30)  # it was allocated before the call
        for pointer, size in ((1, 512), (2, 1024)):
            hook.malloc_postprocess(mem_ptr=pointer, mem_size=size)
        hook.free_postprocess(mem_ptr=1, mem_size=512)
        hook.malloc_postprocess(mem_ptr=3, mem_size=256)

    cupy = types.SimpleNamespace(cuda=types.SimpleNamespace(MemoryHook=Hook))
    assert _device.peak(cupy, call) == 1536


@pytest.mark.parametrize(
    ("dtype", "unit", "other"),
    [
        ("bfloat16", 2.0**-8, "exact, exact products"),
        ("float16", 2.0**-11, "exact, exact products"),
        ("float32", 2.0**-11, "exact, TF32"),
    ],
)
def test_an_answer_of_rounded_numbers_may_err_by_ten_roundings(fake_cupy, dtype, unit, other):
    workload = replace(WORKLOAD, dtype=dtype)
    made = {one.name: one.tolerance for one in _gpu.contestants("step", workload)}
    rounded, whole = ("exact", other) if dtype != "float32" else (other, "exact")
    assert made[rounded] == 10 * unit
    # Sums of 16-bit products on tensor cores lose a little; those of float32 do not.
    assert made[whole] == (None if dtype == "float32" else 24 / 16 * 2.0**-23)
    norm = {one.name: one.tolerance for one in _gpu.contestants("norm", workload)}
    assert norm["from nothing"] == made[whole]  # no 16-bit number is on its way


@pytest.mark.parametrize("task", ["forward", "backward", "step"])
@pytest.mark.parametrize(("dtype", "mode"), [("bfloat16", "EXACT"), ("float32", "TF32")])
def test_forward_and_backward_of_a_contestant_run_in_its_mode(
    fake_cupy, monkeypatch, task, dtype, mode
):
    inside, seen = [], []

    @contextlib.contextmanager
    def block():
        inside.append(True)
        yield
        inside.pop()

    def record(call):
        def recorded(*args, **kwargs):
            seen.append(bool(inside))
            return call(*args, **kwargs)

        return recorded

    monkeypatch.setattr(_gpu, mode, getattr(_gpu, mode)._replace(block=block))
    for name in ("forward", "backward"):
        monkeypatch.setattr(doraxp, name, record(getattr(doraxp, name)))
    workload = replace(WORKLOAD, dtype=dtype)
    suffix = getattr(_gpu, mode).suffix
    present = list(_gpu.contestants(task, workload))
    # The forwards of backward's contestants run before, half of them in the other mode.
    assert seen.count(True) == seen.count(False)
    assert bool(seen) == (task == "backward")
    for one in present:
        seen.clear()
        one.call()
        assert set(seen) <= {one.name.endswith(suffix)}
        assert bool(seen) == (one.kind != "bare")


def test_peft_takes_part_where_pytorch_finds_the_device(fake_cupy, monkeypatch):
    torch = types.SimpleNamespace(cuda=types.SimpleNamespace(is_available=lambda: True))
    load = importlib.import_module
    monkeypatch.setattr(
        "importlib.import_module", lambda name, *r: torch if name == "torch" else load(name, *r)
    )
    monkeypatch.setattr(_peft, "why_not", lambda: None)
    calls = []

    def on_cuda(*given):
        calls.append(given)
        yield Contestant(
            "DoRA", _peft.LIBRARY, "detached", lambda: 1, dict, lambda: calls.append(2)
        )

    monkeypatch.setattr(_peft, "on_cuda", on_cuda)
    monkeypatch.setattr(_device, "seconds", lambda cupy, call, repeats, reset: (call(), reset()))
    monkeypatch.setattr(_device, "host_seconds", lambda cupy, call, reset: (call(), reset()))
    *_, theirs = _gpu.contestants("norm", WORKLOAD)
    assert theirs.seconds(7) == theirs.host_seconds() == (1, None)
    assert calls == [("norm", WORKLOAD, 3), 2, 2]


def test_answers_of_pytorchs_device_are_compared_with_its_own_truth(monkeypatch):
    workload = replace(WORKLOAD, device="cuda")
    asked = []

    def contestants(*given):
        asked.append(given)
        yield Contestant("DoRA", "PEFT", "detached", lambda: 7, lambda y: {"y": y}, is_stored=True)

    truth = types.SimpleNamespace(answers=lambda task, kind: {"y": (task, kind)})
    monkeypatch.setattr(_cuda, "contestants", contestants)
    monkeypatch.setattr(_cuda, "truth", lambda given: asked.append(given) or truth)
    monkeypatch.setattr(_measure, "_check", lambda what, *given: given)
    present = bench_contestants("step", workload, ["torch", "PEFT"])
    (errors,) = _measure.check_all("step", workload, present)
    assert asked == [("step", workload, ["torch", "PEFT"]), workload]
    assert errors == {"y": (7, ("step", "detached"), None)}


def test_peft_on_a_gpu_is_compared_with_cupys_bare_products():
    def of(library, kind, seconds):
        return Measured(WORKLOAD, "step", kind, library, kind, [seconds] * 2, 0)

    bare, theirs = of("cupy", "bare", 1.0), of("PEFT", "detached", 3.0)
    assert ratios(theirs, [bare, theirs])["over_own_bare"] == (3.0, 3.0, 3.0)


@pytest.mark.parametrize(
    ("said", "expected"),
    [("echo 580.1.2; echo 580.1.2", "580.1.2"), ("exit 9", None), (None, None)],
    ids=["two devices", "no device", "no such program"],
)
def test_the_version_of_the_driver_is_that_of_nvidia_smi(tmp_path, monkeypatch, said, expected):
    if said is not None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{said}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _device.driver() == expected
