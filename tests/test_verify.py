"""`doraxp verify`: the table, the exit status, the figures, and the backends it refuses."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

import doraxp
from doraxp._base.extras import install_hint
from doraxp.cli import main


def test_all_usable_backends_are_verified(capsys, monkeypatch, tmp_path):
    usable = [doraxp.backends.Status("numpy", True, ""), doraxp.backends.Status("cupy", False, "")]
    monkeypatch.setattr("doraxp.backends.available", lambda: usable)
    path = tmp_path / "figures.json"
    assert main(["verify", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    report = json.loads(path.read_text())
    total = len(report["figures"])
    assert f"{total:,} of {total:,} figures are within the bounds." in printed
    assert report["ok"]
    assert {figure["backend"] for figure in report["figures"]} == {"numpy"}
    assert {figure["dtype"] for figure in report["figures"]} >= {"float32", "float64", "float16"}
    for word in ("float32", "norm", "merged", "adamw", "sgd", "Dense"):
        assert word in printed


def test_a_wrong_number_is_exit_status_1_and_named(capsys, monkeypatch, tmp_path):
    right = doraxp.merge

    def wrong(weight, *args, **kwargs):
        merged = right(weight, *args, **kwargs)
        return merged * np.inf if weight.shape == (8, 5) else merged

    monkeypatch.setattr(doraxp, "merge", wrong)
    path = tmp_path / "figures.json"
    assert main(["verify", "--backend", "numpy", "--json", str(path)]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "WRONG numpy, tall, float32, merged: has 40 numbers that are not finite" in printed
    report = json.loads(path.read_text())
    (one, _) = (figure for figure in report["figures"] if not figure["ok"])
    assert (one["case"], one["error"], one["share"]) == ("tall", None, None)


def test_the_caption_of_the_table_fills_its_lines(capsys):
    """The table of one library is narrow; its caption need not be."""
    assert main(["verify", "--backend", "numpy"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (first,) = (line for line in lines if line.startswith("Largest error"))
    assert 60 < len(first.rstrip()) <= 80


def test_a_long_list_of_failures_is_cut(capsys, monkeypatch):
    right = doraxp.merge
    monkeypatch.setattr(doraxp, "merge", lambda *args, **kwargs: 1.01 * right(*args, **kwargs))
    assert main(["verify", "--backend", "numpy"]) == 1
    printed = capsys.readouterr().out
    assert printed.count("WRONG") == 20
    assert "% of its bound" in printed
    assert "more\n" in printed


def test_agreement_of_two_backends_and_missing_dtypes_are_printed(capsys, monkeypatch):
    from doraxp.testing import Agreement, Comparison, Figure

    figure = Figure("numpy", "tall", "float32", "y", float("nan"), 0.0, 1.2e-7, 0.5, None)
    pairs = (Agreement(("numpy", "torch"), 0.25), Agreement(("numpy", "jax"), 1.5))
    comparison = Comparison(
        (figure, figure._replace(backend="torch", dtype="float64")), pairs, (("torch", "bfloat16"),)
    )
    monkeypatch.setattr("doraxp.cli.verify.compare_backends", lambda *_, **__: comparison)
    assert main(["verify", "--backend", "numpy"]) == 1
    printed = capsys.readouterr().out
    assert "numpy and torch agree: 25 %" in printed
    assert "numpy and jax DISAGREE: 150 %" in printed
    assert "torch: no bfloat16 here" in printed


@pytest.fixture
def on_cuda(monkeypatch):
    """Return a function that names the libraries that can compute on a CUDA device."""

    def choose(*names):
        def check(asked, *, device):
            (name,) = asked
            if name == "numpy":
                raise ValueError("device must be cpu for numpy, got 'cuda'")
            if name not in names:
                raise RuntimeError(f"{name} cannot run on {device} here: no device")

        monkeypatch.setattr("doraxp.cli.verify.check_usable", check)
        usable = [
            doraxp.backends.Status(name, True, "") for name in ("numpy", "cupy", "torch", "jax")
        ]
        monkeypatch.setattr("doraxp.backends.available", lambda: usable)

    return choose


def test_a_device_takes_the_libraries_that_can_compute_on_it(
    capsys, monkeypatch, tmp_path, on_cuda
):
    from doraxp.testing import Agreement, Comparison, Figure

    on_cuda("torch", "jax")
    asked = []

    def compare(names, *, device, progress):
        asked.append((names, device))
        figure = Figure("torch on cuda", "tall", "float32", "y", 1e-7, 0.0, 1.2e-7, 0.5, None)
        pair = Agreement(("torch on cuda", "jax on cuda"), 0.25)
        return Comparison((figure, figure._replace(backend="jax on cuda")), (pair,), ())

    monkeypatch.setattr("doraxp.cli.verify.compare_backends", compare)
    monkeypatch.setattr("doraxp.cli.verify.versions", lambda *names: dict.fromkeys(names, "1"))
    path = tmp_path / "figures.json"
    assert main(["verify", "--device", "cuda", "--json", str(path)]) == 0
    assert asked == [(["torch", "jax"], "cuda")]
    out = capsys.readouterr().out
    assert re.search(r"\n +torch +jax *\n +dense +on cuda +on cuda *\n", out)
    assert "torch on cuda and jax on cuda agree: 25 %" in out
    report = json.loads(path.read_text())
    assert (report["device"], report["versions"]) == ("cuda", {"torch": "1", "jax": "1"})


def test_a_device_on_which_no_library_computes_is_exit_status_2(capsys, on_cuda):
    on_cuda()
    assert main(["verify", "--device", "cuda"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("doraxp verify: error: no library can compute on cuda here: cupy cannot")
    assert "; jax cannot run on cuda here: no device" in line
    assert "numpy" not in line


def test_a_device_that_does_not_exist_is_exit_status_2(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["verify", "--device", "meta"])
    assert "argument --device: invalid choice: 'meta' (choose from" in capsys.readouterr().err


def test_a_device_that_a_library_never_has_is_exit_status_2(capsys):
    assert main(["verify", "--device", "cuda", "--backend", "numpy"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "doraxp verify: error: device must be cpu for numpy, got 'cuda'"


def test_the_table_of_all_libraries_on_the_host_fits_80_columns(capsys, monkeypatch):
    from doraxp.testing import Comparison, Figure

    names = ("numpy", "torch", "jax", "dask", "array_api_strict")
    figures = tuple(
        Figure(f"{name} on cpu", "tall", "float32", "merged", 99e-7, 1e-6, 1.2e-7, 0.99, None)
        for name in names
    )
    comparison = Comparison(figures, (), ())
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("doraxp.cli.verify.compare_backends", lambda *_, **__: comparison)
    assert main(["verify", "--backend", "numpy", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert re.search(r" numpy +torch +jax +dask +strict *\n +dense" + 5 * " +on cpu", out)
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("abacus", "each name must be one of numpy, "),
        ("cupy", "cupy cannot run here: run python -m pip install '.[cuda13]'"),
    ],
)
def test_a_backend_that_cannot_run_is_exit_status_2(capsys, monkeypatch, name, message):
    how = "run python -m pip install '.[cuda13]'"
    nothing = [doraxp.backends.Status(one, False, how) for one in ("numpy", "cupy")]
    monkeypatch.setattr("doraxp.backends.available", lambda: nothing)
    assert main(["verify", "--backend", name]) == 2
    assert f"doraxp verify: error: {message}" in capsys.readouterr().err


def test_without_the_extra_it_says_how_to_get_it(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["verify"]) == 2
    assert install_hint("verify") in capsys.readouterr().err
