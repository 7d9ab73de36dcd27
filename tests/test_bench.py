"""`doraxp bench`: the answers to every task are right, and it shows the figures it measured."""

from __future__ import annotations

import importlib
import json
import math
import sys
import types
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from rich.console import Console

import doraxp
from doraxp._base.extras import install_hint
from doraxp._terminal.palette import DARK, LIGHT
from doraxp._terminal.runtimes import runtime
from doraxp.backends import Status
from doraxp.bench import (
    DTYPES,
    TASKS,
    Contestant,
    Measured,
    Workload,
    WrongAnswerError,
    _curves,
    _host,
    _measure,
    _memory,
    _peft,
    _picture,
    _tables,
    blas_kernels,
    check_all,
    draw,
    fresh_process,
    libraries,
    peaks,
    print_tables,
    threads,
)
from doraxp.bench._report import ratios
from doraxp.bench._workloads import stored
from doraxp.cli import main

WORKLOAD = Workload(24, 16, 5, 4)


class Here:
    """A process that is this one: a fresh one takes seconds to start."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *args):
        future = Future()
        future.set_result(function(*args))
        return future


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr("doraxp.bench.fresh_process", Here)
    monkeypatch.setattr(_measure, "SECONDS", 1e-6)
    monkeypatch.setattr(_measure, "SETTLE", 0)


def bench(*arguments):
    return main(["bench", "--shapes", "24x16", "--rank", "4", "--rounds", "2", *arguments])


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_contestant_is_checked_and_reported(quick, tmp_path, capsys, dtype):
    path = tmp_path / "out.json"
    tokens = ("--tokens", "1", "5")
    assert bench("--backend", "numpy", "--dtype", dtype, *tokens, "--json", str(path)) == 0
    report = json.loads(path.read_text())
    done = [(one["task"], one["case"]["tokens"]) for one in report["results"]]
    assert {task for task, _ in done} == set(TASKS) - {"backward"}  # a part of step
    assert ("step", 5) in done
    assert ("merge", 1) in done
    assert ("merge", 5) not in done  # it does not depend on the tokens
    assert all(len(one["seconds"]) == 2 for one in report["results"])
    bare = [one for one in report["results"] if "bare" in one["contestant"]]
    assert all(one["over_bare_numpy"] == [1.0, 1.0, 1.0] for one in bare)
    assert report["versions"]["numpy"] == np.__version__
    assert report["blas_kernels"] == blas_kernels()
    text = capsys.readouterr().out
    assert text.index("Ratios of time") < text.index("Times and memory")
    assert "Threads: " in text
    assert "host" not in text.partition("Threads: ")[0]  # the times are the host's
    table, _, _ = text.partition("Figures: ")  # the path of the JSON file may be longer
    assert max(map(len, table.splitlines())) <= 80


@pytest.mark.parametrize("task", TASKS)
def test_a_wrong_answer_is_named_and_nothing_is_timed(quick, monkeypatch, capsys, task):
    rightly = _host.contestants

    def wrongly(*args):
        for contestant in rightly(*args):
            right = contestant.answer
            yield contestant._replace(
                answer=lambda made, right=right: {
                    name: np.where(np.arange(array.size).reshape(array.shape) == 3, 9.0, array)
                    for name, array in right(made).items()
                }
            )

    monkeypatch.setattr(_host, "contestants", wrongly)
    monkeypatch.setattr(_measure, "time_all", lambda *_: pytest.fail("it was timed"))
    assert bench("--backend", "numpy", "--tasks", task) == 2
    assert f"wrong answer: {task}, numpy, " in capsys.readouterr().err


def test_the_largest_error_of_each_array_is_reported(quick, tmp_path, monkeypatch):
    path = tmp_path / "figures.json"
    monkeypatch.setattr(doraxp, "backward", off_by_a_millionth(doraxp.backward))
    command = ("--backend", "numpy", "--tasks", "step", "--dtype", "float64", "--tokens", "5")
    monkeypatch.setitem(_measure.TOLERANCES, "float64", 1e-5)
    assert bench(*command, "--json", str(path)) == 0
    bare, exact, _ = json.loads(path.read_text())["results"]
    assert set(bare["errors"]) == {"y", "dx"}
    assert exact["errors"]["dB"] == pytest.approx(1e-6)
    assert all(exact["errors"][name] < 1e-12 for name in ("y", "dx", "dA", "dm"))


def off_by_a_millionth(backward):
    def wrong(*args):
        dx, adapter, *rest = backward(*args)
        scaled = adapter._replace(lora_b=(1 + 1e-6) * adapter.lora_b)
        return doraxp.Gradients(dx, scaled, *rest)

    return wrong


def test_a_stopped_run_leaves_the_figures_of_the_tasks_that_it_finished(
    quick, monkeypatch, tmp_path
):
    path = tmp_path / "figures.json"
    measure, left = _measure.measure, []

    def stopped(task, *args, **kwargs):
        if task == "norm":
            left.append([one["task"] for one in json.loads(path.read_text())["results"]])
            raise KeyboardInterrupt
        return measure(task, *args, **kwargs)

    monkeypatch.setattr("doraxp.bench.measure", stopped)
    assert bench("--backend", "numpy", "--tasks", "merge", "norm", "--json", str(path)) == 130
    assert left == [["merge"] * 3]
    assert [one["task"] for one in json.loads(path.read_text())["results"]] == ["merge"] * 3
    assert list(tmp_path.iterdir()) == [path]


def test_ratios_are_of_the_same_round():
    def of(library, kind, *seconds):
        return Measured(WORKLOAD, "step", kind, library, kind, list(seconds), 2**20)

    bare, ours = of("numpy", "bare", 1.0, 2.0, 4.0), of("numpy", "exact", 2.0, 4.0, 8.0)
    theirs = of("PEFT", "detached", 6.0, 12.0, 24.0)
    task = [bare, ours, of("torch", "bare", 2.0, 4.0, 8.0), theirs]
    twice, thrice = (2.0, 2.0, 2.0), (3.0, 3.0, 3.0)
    assert tuple(ratios(ours, task).values()) == (twice, twice, thrice)
    assert tuple(ratios(theirs, task).values()) == ((6.0,) * 3, thrice, None)
    assert ratios(ours, [ours])["over_bare_numpy"] is None


def test_the_picture_of_the_ratios_is_saved(quick, tmp_path, capsys):
    path = tmp_path / "ratios.png"
    assert bench("--backend", "numpy", "--tasks", "norm", "adamw", "--plot", str(path)) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert "Picture: " in capsys.readouterr().out


def test_a_picture_without_ratios_is_refused_before_anything_is_measured(tmp_path, capsys):
    path = tmp_path / "ratios.png"
    assert bench("--backend", "numpy", "--tasks", "adamw", "--plot", str(path)) == 2
    assert (
        "--plot draws times over the bare product's, but adamw has no bare product"
        in capsys.readouterr().err
    )
    assert not path.exists()


def test_curves_are_measured_fitted_and_drawn(quick, tmp_path, capsys, monkeypatch):
    sweeps = {"tokens": (1, 2, 4, 8), "rank": (1, 2, 4), "size": (8, 16, 32)}
    monkeypatch.setattr(_curves, "SWEEPS", sweeps)
    for module in (_picture, _tables):
        monkeypatch.setattr(module, "SWEEPS", sweeps)
    plot, path = tmp_path / "curves.png", tmp_path / "curves.json"
    files = ("--plot", str(plot), "--json", str(path))
    assert bench("--backend", "numpy", "--curves", "--tokens", "1", "5", *files) == 0
    figures = json.loads(path.read_text())
    done = {tuple(one["case"].values())[:4] for one in figures["results"]}
    expected = {(24, 16, n, 4) for n in (1, 2, 4, 8)} | {(24, 16, 5, r) for r in (1, 2, 4)}
    assert done == expected | {(n, n, 5, 4) for n in (8, 16, 32)}
    assert set(figures["exponents"]) == set(sweeps)
    assert [fit["contestant"] for fit in figures["exponents"]["rank"]] == [
        "bare products",
        "exact",
        "detached",
    ]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "A step over tokens 1 to 8" in capsys.readouterr().out


def labels(axis):
    """Return the labels of an axis that are within its limits."""
    low, high = axis.get_view_interval()
    parts = (axis.get_majorticklocs(), axis.major), (axis.get_minorticklocs(), axis.minor)
    texts = []
    for places, ticker in parts:
        seen = [value for value in places if low * 0.999 <= value <= high * 1.001]
        texts += [text for text in ticker.formatter.format_ticks(seen) if text]
    return texts


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_both_pictures_have_the_paper_of_a_light_or_of_a_dark_page(tmp_path, monkeypatch, theme):
    themes = []
    monkeypatch.setattr(_picture, "save", lambda _picture, _path, theme: themes.append(theme))
    results = [
        Measured(w, "step", kind, "numpy", kind, [1.0, 1.0], 1 << 20)
        for _, w in _curves.workloads(WORKLOAD)
        for kind in ("bare", "exact")
    ]
    _picture.save_ratios(results, tmp_path / "p.png", dark=theme == DARK)
    curves = _curves.collect(WORKLOAD, results)
    _picture.save_curves(curves, tmp_path / "p.png", dark=theme == DARK)
    assert themes == [theme, theme]


def test_the_curves_of_a_library_have_a_marker_of_their_own(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(_picture, "save", lambda picture, *_: saved.append(picture))
    results = [
        Measured(w, "step", "exact", library, "exact", [1.0, 1.0], 1 << 20)
        for _, w in _curves.workloads(WORKLOAD)
        for library in ("numpy", "jax")
    ]
    _picture.save_curves(_curves.collect(WORKLOAD, results), tmp_path / "p.png")
    for axes in saved[0].axes:
        numpy, jax, _ = axes.lines
        assert numpy.get_color() == jax.get_color()
        assert numpy.get_marker() != jax.get_marker()


def test_the_ticks_of_the_curves_are_numbers_with_units(tmp_path, monkeypatch):
    saved, save = [], _picture.save
    monkeypatch.setattr(
        _picture, "save", lambda picture, *rest: (save(picture, *rest), saved.append(picture))
    )
    results = [
        Measured(w, "step", kind, "numpy", kind, [median / 2, median, 2 * median], w.tokens << 20)
        for _, w in _curves.workloads(replace(WORKLOAD, tokens=5))
        for median in [1e-6 * w.tokens * w.out]
        for kind in ("bare", "exact", "detached")
    ]
    curves = _curves.collect(replace(WORKLOAD, tokens=5), results)
    for dark in (False, True):
        _picture.save_curves(curves, tmp_path / "curves.png", dark=dark)
    for picture in saved:
        time, *_ = picture.axes
        np.testing.assert_allclose(time.lines[0].get_ydata(), 24e-6 * time.lines[0].get_xdata())
        assert labels(time.xaxis) == ["1", "4", "16", "64", "256", "1024", "4096"]
        assert labels(time.yaxis) == ["100 µs", "1 ms", "10 ms", "100 ms"]
        memory = picture.axes[3]
        assert set(labels(memory.yaxis)) >= {"32 KiB", "1 GiB"}
        colours = [line.get_color() for line in time.lines]
        assert len(set(colours[:3])) == 3


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ((0.062, 0.13), ["70 ms", "80 ms", "90 ms", "100 ms"]),
        ((0.003, 0.09), ["5 ms", "10 ms", "20 ms", "50 ms"]),
    ],
)
def test_a_short_axis_has_multiples_of_the_powers_of_ten(seconds, expected):
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    axes.set_yscale("log")
    axes.set_ylim(*seconds)
    _picture._label_seconds(axes)
    assert labels(axes.yaxis) == expected


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [((0.9, 20), ["1", "2", "4", "8", "16"]), ((0.95, 1.42), ["1", "1.1", "1.2", "1.3", "1.4"])],
)
def test_the_ticks_of_ratios_are_powers_of_two_or_tenths(ratios, expected):
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    axes.set_xscale("log", base=2)
    axes.set_xlim(*ratios)
    _picture._label_ratios(axes)
    assert labels(axes.xaxis) == expected


def test_the_exponent_is_that_of_the_upper_half():
    xs = (1, 2, 4, 8, 16)
    assert _curves.exponent(xs, [5.0, 5.0, 16.0, 64.0, 256.0]) == pytest.approx(2)
    ranks = _curves.SWEEPS["rank"]
    points = [
        Measured(replace(WORKLOAD, rank=r), "step", "a", "b", "exact", [r, r], None) for r in ranks
    ]
    (fit,) = _curves.exponents("rank", {("b", "a"): points})
    assert fit["time"] == pytest.approx(1)
    assert fit["memory"] is None


def test_the_model_counts_every_product_of_a_step():
    """The products of an exact step, one by one, as (rows, columns, terms)."""
    out, inner, tokens, rank, *_ = vars(WORKLOAD).values()
    products = [
        (tokens, out, inner),  # x Wᵀ
        (tokens, inner, out),  # dz W
        (out, rank, inner),  # W Aᵀ
        (rank, inner, out),  # (q⊙B)ᵀ V
        (tokens, rank, inner),  # x Aᵀ
        (tokens, out, rank),  # L Bᵀ
        (tokens, rank, out),  # dz B
        (tokens, inner, rank),  # (dz B) A
        (out, rank, tokens),  # dzᵀ L
        (rank, inner, tokens),  # (dz B)ᵀ x
    ]
    assert _curves.operations(WORKLOAD) == sum(2 * math.prod(shape) for shape in products)
    assert _curves.held_bytes(WORKLOAD) == 4 * (3 * tokens * out + tokens * inner)


def test_an_unknown_peak_is_shown_as_a_dash(capsys):
    print_tables([Measured(WORKLOAD, "norm", "a", "cupy", "exact", [1.0, 1.0], None)], Console())
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "cupy" in line]
    assert rows == [
        ["norm", "a", "cupy", "–", "–", "–"],
        ["norm", "a", "cupy", "1e+03", "1e+03–1e+03", "–"],
    ]


def test_the_peak_is_what_the_call_adds(monkeypatch, tmp_path):
    with fresh_process() as process:
        (bare, *_) = process.submit(
            peaks, "merge", Workload(2048, 1024, 1, 4), [("numpy", "bare copy")]
        ).result()
    assert bare == pytest.approx(2048 * 1024 * 4, rel=0.1)
    _memory.return_what_is_freed()


def test_a_peak_is_known_on_linux_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(_memory, "PROCESS", tmp_path)
    monkeypatch.delattr("ctypes.CDLL")  # on Windows CDLL(None) is an error
    _memory.return_what_is_freed()
    assert _memory.peak_bytes(list, list) is None


def test_values_of_pytorch_are_read_by_way_of_float64():
    class Theirs(list):
        def double(self):
            return np.array(self, np.float64)

    np.testing.assert_array_equal(_measure.on_host(Theirs([1, 2])), [1.0, 2.0])


@pytest.mark.parametrize("theirs", [False, True])
def test_answers_on_a_gpu_are_compared_there(monkeypatch, theirs):
    """To copy 1.9 GB of float64 to the host takes longer than the whole measurement."""

    class OnDevice(np.ndarray):
        def get(self):
            pytest.fail("it was brought to the host")

    monkeypatch.setattr(_measure, "on_host", OnDevice.get)

    class Theirs(list):
        def double(self):
            return np.array(self, np.float64)

    truth = np.array([1.0, -4.0]).view(OnDevice)
    answer = Theirs([1.0, -3.5]) if theirs else np.array([1.0, -3.5], "float32").view(OnDevice)
    assert _measure._error(answer, truth) == 0.125


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_answer_is_compared_with_that_of_the_inputs_that_it_had(dtype):
    """x and dy may be rounded to the weight's dtype: then the right answer is another one."""
    workload = replace(WORKLOAD, dtype=dtype)

    def contestant(inputs, *, is_stored):
        weight, x = (np.asarray(array, np.float32) for array in (inputs.weight, inputs.x))
        return Contestant(
            "bare product", "numpy", "bare", lambda: x @ weight.T, lambda y: {"y": y},
            is_stored=is_stored,
        )  # fmt: skip

    right = [contestant(draw(workload), is_stored=False)]
    right.append(contestant(stored(workload), is_stored=True))
    assert all(errors["y"] < 1e-6 for errors in check_all("evaluation", workload, right))
    wrong = contestant(draw(workload), is_stored=True)
    if dtype == "bfloat16":
        with pytest.raises(WrongAnswerError, match="y must be within 1e-05"):
            check_all("evaluation", workload, [wrong])
    else:
        check_all("evaluation", workload, [wrong])


def test_a_missing_library_is_named_with_the_way_to_get_it(quick, monkeypatch, capsys):
    states = [Status("numpy", True, "2"), Status("torch", False, "pip install torch")]
    monkeypatch.setattr("doraxp.bench._plan.available", lambda: states)
    monkeypatch.setattr(_peft, "why_not", lambda: "pip install peft")
    assert bench("--tasks", "norm") == 0
    text = capsys.readouterr().out
    assert "Without torch: pip install torch\nWithout PEFT: pip install peft\n" in text


def test_peft_takes_part_where_torch_does(monkeypatch):
    monkeypatch.setattr(_peft, "why_not", lambda: None)
    assert libraries(["numpy", "torch", "numpy"]) == (["numpy", "torch", "PEFT"], {})
    assert libraries(["numpy"]) == (["numpy"], {})


def test_kernels_of_blas_are_stated(monkeypatch):
    """With the kernels of another processor the same NumPy is 1.7 times as slow."""
    pools = [
        {"prefix": "libopenblas", "architecture": "Haswell", "num_threads": 2},
        {"prefix": "libgomp", "num_threads": 2},
    ]
    monkeypatch.setattr("threadpoolctl.threadpool_info", lambda: pools)
    assert blas_kernels() == {"libopenblas": "Haswell"}


def test_threads_of_torch_are_stated_where_it_is_in_use(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(get_num_threads=lambda: 7))
    assert threads()["torch"] == 7


def test_torch_gets_the_bits_of_a_bfloat16_array(monkeypatch):
    torch = types.SimpleNamespace(asarray=np.asarray, bfloat16=ml_dtypes.bfloat16)
    monkeypatch.setattr("importlib.import_module", lambda name: torch)
    asarray = runtime("torch").asarray
    values = np.array([1.0, 0.3], np.float32)
    assert asarray(values) is values
    low = asarray(values.astype(ml_dtypes.bfloat16))
    assert low.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(low, values.astype(ml_dtypes.bfloat16))


def test_a_library_that_changes_the_dtype_is_refused(monkeypatch):
    run = runtime("numpy")._replace(asarray=lambda array: array.astype(np.float32))
    monkeypatch.setattr(_host, "runtime", lambda name: run)
    with pytest.raises(ValueError, match="made float32 of float64: JAX needs JAX_ENABLE_X64"):
        list(_host.contestants("norm", Workload(24, 16, 1, 4, "float64"), "numpy"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "4096"], "must be OUTxIN, as 4096x11008, got '4096'"),
        (["--shapes", "0x4"], "must be OUTxIN, as 4096x11008, got '0x4'"),
        (["--tokens", "0"], "argument --tokens: must be an integer, at least 1, got '0'"),
    ],
)
def test_bad_arguments_are_refused(capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        main(["bench", *arguments])
    assert message in capsys.readouterr().err


def test_a_rank_above_the_shape_is_refused(capsys):
    assert bench("--rank", "17") == 2
    assert "--rank must be in 1..16 for 24x16, got 17" in capsys.readouterr().err


@pytest.fixture
def fake_torch(monkeypatch):
    """PyTorch without a CUDA device, where it may not be installed."""
    fake = types.SimpleNamespace(cuda=types.SimpleNamespace(is_available=lambda: False))
    load = importlib.import_module
    monkeypatch.setattr(
        "importlib.import_module", lambda name, *r: fake if name == "torch" else load(name, *r)
    )
    states = [Status(name, True, "1") for name in ("numpy", "torch")]
    monkeypatch.setattr("doraxp.backends.available", lambda: states)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--backend torch --device cuda",
            "--device cuda cannot run here: PyTorch finds no CUDA device here: install its build "
            "for CUDA, or leave out --device",
        ),
        (
            "--backend torch --backend numpy --device cuda",
            "--device cuda needs --backend torch by itself, got ['torch', 'numpy']",
        ),
        ("--autocast", "--autocast needs --backend torch by itself, got None"),
        (
            "--backend torch --autocast --tasks norm step merge",
            "--autocast has the --tasks step and evaluation alone, got merge norm",
        ),
        (
            "--backend torch --autocast --dtype float32 float64",
            "--autocast needs --dtype float32 or bfloat16, got float64",
        ),
    ],
)
def test_a_run_on_pytorch_that_cannot_be_is_refused_in_one_line(
    fake_torch, capsys, arguments, message
):
    assert bench(*arguments.split()) == 2
    assert capsys.readouterr().err == f"doraxp bench: error: {message}\n"


def test_the_defaults_on_a_cuda_device_are_those_of_training(fake_torch, monkeypatch):
    planned = []

    def jobs(workloads, tasks):
        planned.extend((list(workloads), tasks))
        raise ValueError("that is enough")

    monkeypatch.setattr("doraxp.bench.why_not_on_cuda", lambda: None)
    monkeypatch.setattr("doraxp.bench.jobs", jobs)
    assert main(["bench", "--backend", "torch", "--device", "cuda"]) == 2
    workloads, tasks = planned
    assert tasks == ["step", "evaluation"]
    assert workloads == [
        Workload(4096, 4096, tokens, 16, dtype, device="cuda")
        for dtype in ("bfloat16", "float32")
        for tokens in (1, 128, 4096)
    ]


def test_a_workload_under_autocast_says_so_and_allows_for_its_roundings():
    under = replace(WORKLOAD, autocast=True)
    assert str(under) == "24×16 float32 under bfloat16 autocast, rank 4, 5 tokens"
    assert WORKLOAD.roundings is None
    assert under.roundings == replace(WORKLOAD, dtype="bfloat16").roundings == 10 * 2.0**-8


def test_curves_need_a_shape_for_all_of_their_ranks(capsys):
    assert bench("--curves") == 2
    error = "--shapes must be at least 256x256 for the ranks of --curves, got 24x16"
    assert error in capsys.readouterr().err


def test_without_the_extra_it_says_how_to_get_it(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["bench"]) == 2
    assert install_hint("bench") in capsys.readouterr().err


# benchmarks/peft_table.py


@pytest.fixture
def peft_table(monkeypatch):
    """Return the script as a module."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    monkeypatch.delitem(sys.modules, "peft_table", raising=False)
    yield importlib.import_module("peft_table")
    sys.modules.pop("peft_table", None)


def test_the_tables_of_the_page_have_the_ratios_of_the_accelerated_layer(
    peft_table, tmp_path, capsys
):
    def result(task, contestant, seconds, peak, bare, **case):
        return {
            "task": task, "contestant": contestant, "seconds": seconds, "peak_bytes": peak << 20,
            "over_own_bare": [0, bare, 99], "case": {"out": 24, "inner": 16, "rank": 4,
            "dtype": "float32", "autocast": False, **case},
        }  # fmt: skip

    first = [
        result("step", "DoRA", [1.0, 2.0, 4.0], 8, 5.0, tokens=5),
        result("step", "accelerated, exact", [0.5, 0.5, 1.0], 2, 1.5, tokens=5),
        result("step", "DoRA", [1.0], 0, 5.0, tokens=1),
        result("step", "accelerated, exact", [12.0], 1, 3.0, tokens=1),
    ]
    second = [
        result("evaluation", name, [seconds], 1, bare, tokens=1, autocast=True)
        for name, seconds, bare in (
            ("DoRA", 4.0, 8.0), ("DoRA, DoraCaching", 2.0, 4.0), ("accelerated", 1.0, 2.0),
        )
    ]  # fmt: skip
    second.append(result("step", "DoRA", [1.0], 9, 1.0, out=99, tokens=5))
    second.append(result("step", "accelerated, exact", [1.0], 9, 1.0, out=99, tokens=5))
    second.append(result("norm", "DoRA", [1.0], 9, 1.0, tokens=5))
    paths = [tmp_path / "first.json", tmp_path / "second.json"]
    for path, results in zip(paths, (first, second), strict=True):
        path.write_text(json.dumps({"results": results}))
    assert peft_table.main(list(map(str, paths))) == 0
    assert capsys.readouterr().out.split("\n") == [
        "step, float32, rank 4: ÷ PEFT / ÷ bare / memory ÷ PEFT", "",
        "| | 1 token | 5 tokens |", "|---|---|---|",
        "| 24×16 | 12 / 3.00 / – | 0.25 / 1.50 / 0.25 |",
        "| 99×16 | – | 1.00 / 1.00 / 1.00 |", "",
        "evaluation, float32 under bfloat16 autocast, rank 4: ÷ PEFT / ÷ DoraCaching / ÷ bare", "",
        "| | 1 token |", "|---|---|", "| 24×16 | 0.25 / 0.50 / 2.00 |", "",
    ]  # fmt: skip
    assert peft_table.main([]) == 2
