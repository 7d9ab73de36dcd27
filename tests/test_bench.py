"""`doraxp bench`: every task is answered rightly, and what it shows is what it measured."""

from __future__ import annotations

import json
import math
import sys
import types
from concurrent.futures import Future
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from rich.console import Console

from doraxp.backends import Status
from doraxp.cli import main
from doraxp.cli._bench import contestants, curves, measure, memory, peft, picture, report
from doraxp.cli._bench.cases import DTYPES, TASKS, Case
from doraxp.cli._bench.measure import Measured
from doraxp.cli._bench.report import print_tables, ratios
from doraxp.cli._libraries import library
from doraxp.cli.bench import _libraries, kernels, threads

CASE = Case(24, 16, 5, 4)


class Here:
    """Measures memory in this process: a fresh one takes seconds."""

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
    monkeypatch.setattr(memory, "child", Here)
    monkeypatch.setattr(measure, "SECONDS", 1e-6)
    monkeypatch.setattr(measure, "SETTLE", 0)


def bench(*arguments):
    return main(["bench", "--shapes", "24x16", "--rank", "4", "--rounds", "2", *arguments])


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_contestant_is_checked_and_reported(quick, tmp_path, capsys, dtype):
    path = tmp_path / "out.json"
    tokens = ("--tokens", "1", "5")
    assert bench("--backend", "numpy", "--dtype", dtype, *tokens, "--json", str(path)) == 0
    report = json.loads(path.read_text())
    done = [(entry["task"], entry["case"]["tokens"]) for entry in report["results"]]
    assert {task for task, _ in done} == set(TASKS) - {"backward"}  # a part of step
    assert ("step", 5) in done
    assert ("merge", 1) in done
    assert ("merge", 5) not in done  # tokens make no difference to it
    assert all(len(entry["seconds"]) == 2 for entry in report["results"])
    bare = [entry for entry in report["results"] if "bare" in entry["contestant"]]
    assert all(entry["over_bare_numpy"] == [1.0, 1.0, 1.0] for entry in bare)
    assert report["versions"]["numpy"] == np.__version__
    assert report["blas_kernels"] == kernels()
    text = capsys.readouterr().out
    assert text.index("Ratios of time") < text.index("Times and memory")
    assert "Threads: " in text
    assert "host" not in text.partition("Threads: ")[0]  # it is the host that is measured
    table = text.partition("Figures: ")[0]  # then the path of the JSON, as long as it is
    assert max(map(len, table.splitlines())) <= 80


@pytest.mark.parametrize("task", TASKS)
def test_a_wrong_answer_is_named_and_nothing_is_timed(quick, monkeypatch, capsys, task):
    rightly = contestants.contestants

    def wrongly(*args):
        for entrant in rightly(*args):
            right = entrant.answer
            yield entrant._replace(
                answer=lambda made, right=right: {
                    name: np.where(np.arange(array.size).reshape(array.shape) == 3, 9.0, array)
                    for name, array in right(made).items()
                }
            )

    monkeypatch.setattr(contestants, "contestants", wrongly)
    monkeypatch.setattr(measure, "time_all", lambda *_: pytest.fail("it was timed"))
    assert bench("--backend", "numpy", "--tasks", task) == 2
    assert f"wrong answer: {task}, numpy, " in capsys.readouterr().err


def test_ratios_are_of_the_same_round():
    def of(library, kind, *seconds):
        return Measured(CASE, "step", kind, library, kind, list(seconds), 2**20)

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


def test_a_picture_of_no_ratio_is_refused_before_anything_is_measured(tmp_path, capsys):
    path = tmp_path / "ratios.png"
    assert bench("--backend", "numpy", "--tasks", "adamw", "--plot", str(path)) == 2
    assert "--plot draws times over the bare product's" in capsys.readouterr().err
    assert not path.exists()


def test_curves_are_measured_fitted_and_drawn(quick, tmp_path, capsys, monkeypatch):
    sweeps = {"tokens": (1, 2, 4, 8), "rank": (1, 2, 4), "size": (8, 16, 32)}
    monkeypatch.setattr(curves, "SWEEPS", sweeps)
    for module in (picture, report):
        monkeypatch.setattr(module, "SWEEPS", sweeps)
    plot, path = tmp_path / "curves.png", tmp_path / "curves.json"
    files = ("--plot", str(plot), "--json", str(path))
    assert bench("--backend", "numpy", "--curves", "--tokens", "1", "5", *files) == 0
    figures = json.loads(path.read_text())
    done = {tuple(entry["case"].values())[:4] for entry in figures["results"]}
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


def test_the_exponent_is_that_of_the_upper_half():
    xs = (1, 2, 4, 8, 16)
    assert curves.exponent(xs, [5.0, 5.0, 16.0, 64.0, 256.0]) == pytest.approx(2)
    ranks = curves.SWEEPS["rank"]
    points = [
        Measured(replace(CASE, rank=r), "step", "a", "b", "exact", [r, r], None) for r in ranks
    ]
    (fit,) = curves.exponents("rank", {("b", "a"): points})
    assert fit["time"] == pytest.approx(1)
    assert fit["memory"] is None


def test_the_model_counts_every_product_of_a_step():
    """The products of an exact step, one by one, as (rows, columns, terms)."""
    out, inner, tokens, rank, _ = vars(CASE).values()
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
    assert curves.operations(CASE) == sum(2 * math.prod(shape) for shape in products)
    assert curves.held_bytes(CASE) == 4 * (3 * tokens * out + tokens * inner)


def test_what_cannot_be_measured_is_a_dash(capsys):
    print_tables([Measured(CASE, "norm", "a", "cupy", "exact", [1.0, 1.0], None)], Console())
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "cupy" in line]
    assert rows == [
        ["norm", "a", "cupy", "–", "–", "–"],
        ["norm", "a", "cupy", "1e+03", "1e+03–1e+03", "–"],
    ]


def test_the_peak_is_what_the_call_adds(monkeypatch, tmp_path):
    with memory.child() as child:
        (bare, *_) = child.submit(
            memory.peaks, "merge", Case(2048, 1024, 1, 4), [("numpy", "bare copy")]
        ).result()
    assert bare == pytest.approx(2048 * 1024 * 4, rel=0.1)
    memory.return_what_is_freed()


def test_elsewhere_than_on_linux_no_peak_is_known(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "PROCESS", tmp_path)
    monkeypatch.delattr("ctypes.CDLL")  # on Windows CDLL(None) is an error
    memory.return_what_is_freed()
    assert memory.peak_bytes(list, list) is None


def test_values_of_pytorch_are_read_by_way_of_float64():
    class Theirs(list):
        def double(self):
            return np.array(self, np.float64)

    np.testing.assert_array_equal(measure.on_host(Theirs([1, 2])), [1.0, 2.0])


@pytest.mark.parametrize("theirs", [False, True])
def test_answers_on_a_gpu_are_held_to_the_truth_there(monkeypatch, theirs):
    """To bring 1.9 GB of float64 to the host takes longer than all that is measured."""

    class OnDevice(np.ndarray):
        def get(self):
            pytest.fail("it was brought to the host")

    monkeypatch.setattr(measure, "on_host", OnDevice.get)

    class Theirs(list):
        def double(self):
            return np.array(self, np.float64)

    truth = np.array([1.0, -4.0]).view(OnDevice)
    answer = Theirs([1.0, -3.5]) if theirs else np.array([1.0, -3.5], "float32").view(OnDevice)
    assert measure._error(answer, truth) == 0.125


def test_who_is_missing_is_named_and_how_to_get_it(quick, monkeypatch, capsys):
    states = [Status("numpy", True, "2"), Status("torch", False, "pip install torch")]
    monkeypatch.setattr("doraxp.cli.bench.available", lambda: states)
    monkeypatch.setattr(peft, "why_not", lambda: "pip install peft")
    assert bench("--tasks", "norm") == 0
    text = capsys.readouterr().out
    assert "Without torch: pip install torch\nWithout PEFT: pip install peft\n" in text


def test_peft_takes_part_where_torch_does(monkeypatch):
    monkeypatch.setattr(peft, "why_not", lambda: None)
    assert _libraries(["numpy", "torch", "numpy"]) == (["numpy", "torch", "PEFT"], {})
    assert _libraries(["numpy"]) == (["numpy"], {})


def test_kernels_of_blas_are_stated(monkeypatch):
    """The same NumPy is 1.7 times as slow with those of another processor."""
    pools = [
        {"prefix": "libopenblas", "architecture": "Haswell", "num_threads": 2},
        {"prefix": "libgomp", "num_threads": 2},
    ]
    monkeypatch.setattr("threadpoolctl.threadpool_info", lambda: pools)
    assert kernels() == {"libopenblas": "Haswell"}


def test_threads_of_torch_are_stated_where_it_is_in_use(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(get_num_threads=lambda: 7))
    assert threads()["torch"] == 7


def test_torch_gets_the_bits_of_a_bfloat16_array(monkeypatch):
    torch = types.SimpleNamespace(asarray=np.asarray, bfloat16=ml_dtypes.bfloat16)
    monkeypatch.setattr("importlib.import_module", lambda name: torch)
    asarray = library("torch").asarray
    values = np.array([1.0, 0.3], np.float32)
    assert asarray(values) is values
    low = asarray(values.astype(ml_dtypes.bfloat16))
    assert low.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(low, values.astype(ml_dtypes.bfloat16))


def test_a_library_that_changes_the_dtype_is_no_contestant(monkeypatch):
    lib = contestants.library("numpy")._replace(asarray=lambda array: array.astype(np.float32))
    monkeypatch.setattr(contestants, "library", lambda name: lib)
    with pytest.raises(ValueError, match="made float32 of float64: JAX needs JAX_ENABLE_X64"):
        list(contestants.contestants("norm", Case(24, 16, 1, 4, "float64"), "numpy"))


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


def test_curves_need_a_shape_for_all_of_their_ranks(capsys):
    assert bench("--curves") == 2
    error = "--shapes must be at least 256x256 for the ranks of --curves, got 24x16"
    assert error in capsys.readouterr().err


def test_without_the_extra_it_says_how_to_get_it(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["bench"]) == 2
    assert "pip install 'doraxp[bench]'" in capsys.readouterr().err
