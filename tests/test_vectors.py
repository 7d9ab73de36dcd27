"""`doraxp vectors`: it writes the same bytes everywhere, and a program in JavaScript reads them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import doraxp
from doraxp import Adapter
from doraxp.cli import main
from doraxp.testing import (
    catalogue,
    expected_of_operator,
    operator_catalogue,
    optimizer_catalogue,
)
from doraxp.testing._libraries import Library
from doraxp.testing._reference import expected, expected_steps

NAMES = {"manifest.json", "float32.safetensors", "float64.safetensors"}
READER = Path(__file__).parents[1] / "examples" / "vectors" / "check.mjs"
EVERY = (*catalogue(), *operator_catalogue(), *optimizer_catalogue())
CASES = {case.name: case for case in EVERY}
LAYERS = [case for case in catalogue() if "float64" in case.dtypes]


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    out = tmp_path_factory.mktemp("vectors") / "out"
    assert main(["vectors", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def manifest(vectors):
    return json.loads((vectors / "manifest.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def tensors(vectors):
    return {dtype: load_file(vectors / f"{dtype}.safetensors") for dtype in ("float32", "float64")}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_two_runs_write_the_same_bytes(vectors, tmp_path, capsys):
    assert main(["vectors", "--out", str(tmp_path / "again")]) == 0
    assert contents(tmp_path / "again") == contents(vectors)
    assert (
        f"{len(EVERY) - len(catalogue()) + len(LAYERS)} cases, in float32 and float64: "
        in capsys.readouterr().out
    )


def test_another_blas_writes_the_same_bytes(vectors, tmp_path):
    """The oldest kernels of OpenBLAS add in another order than those of this machine."""
    command = [sys.executable, "-m", "doraxp", "vectors", "--out", str(tmp_path / "again")]
    environment = os.environ | {
        "OPENBLAS_CORETYPE": "Prescott",
        "PYTHONPATH": str(Path(doraxp.__file__).parents[1]),
    }
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert contents(tmp_path / "again") == contents(vectors)


def test_the_page_explains_every_array(manifest):
    page = (Path(__file__).parents[1] / "docs" / "vectors.md").read_text("utf-8")
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    explained = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    for case in manifest["cases"]:
        if case["kind"] not in ("adamw", "sgd"):
            assert {*case["inputs"], *case["expected"]} <= explained


def test_the_manifest_names_every_tensor_and_nothing_else(manifest, tensors):
    assert (manifest["format"], manifest["catalogue"]) == (1, doraxp.testing.VERSION)
    assert [case["name"] for case in manifest["cases"]] == [
        name for name, case in CASES.items() if "float64" in case.dtypes
    ]
    names = {
        f"{case['name']}/{group}/{name}"
        for case in manifest["cases"]
        for group, key in (("inputs", "inputs"), ("expected", "expected"), ("bound", "expected"))
        for name in case[key]
    }
    for dtype, arrays in tensors.items():
        assert set(arrays) == names
        for name, array in arrays.items():
            ids = "embedding" in name and name.endswith("/inputs/x")
            assert array.dtype == ("int32" if ids else dtype if "/inputs/" in name else "float64")
            assert np.isfinite(array).all()
            assert "/bound/" not in name or (array > 0).all()


def test_the_numbers_are_those_of_the_catalogue(manifest, tensors):
    for dtype, arrays in tensors.items():
        for entry in manifest["cases"]:
            case = CASES[entry["name"]]
            assert entry["reason"] == case.reason
            if entry["kind"] in ("layer", "convolution", "embedding"):
                of_case = expected if entry["kind"] == "layer" else expected_of_operator
                assert entry["scaling"] == case.config.scaling
                assert (entry["dropout"] is None) == ("dropout_mask" not in case.arrays)
                wanted, inputs = of_case(case, dtype), case.stored(dtype)
            else:
                wanted, inputs = expected_steps(case, dtype), case.params
                for t, grads in enumerate(case.grads, start=1):
                    inputs = inputs | {f"grad {name} {t}": g for name, g in grads.items()}
            for name, array in inputs.items():
                written = arrays[f"{case.name}/inputs/{name}"]
                np.testing.assert_array_equal(written, array.astype(written.dtype))
            for name, want in wanted.items():
                assert want.share(arrays[f"{case.name}/expected/{name}"]) <= 1
                # The files add in another order, so the last digits may differ.
                bound = arrays[f"{case.name}/bound/{name}"]
                np.testing.assert_allclose(bound, want.bound, rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.name)
def test_intermediates_of_this_package_are_within_the_bounds(tensors, case, dtype):
    numpy = Library("numpy")
    arrays = {name: numpy.asarray(array, dtype) for name, array in case.stored(dtype).items()}
    adapter = Adapter(*(arrays[name] for name in Adapter._fields))
    with np.errstate(all="ignore"):
        y, cache = doraxp.forward(
            arrays["x"],
            arrays["weight"],
            adapter,
            case.config,
            bias=arrays.get("bias"),
            dropout_mask=arrays.get("dropout_mask"),
        )
        grads = doraxp.backward(arrays["dy"], cache)
    prepared = cache.prepared
    found = {
        "norm": prepared.norm,
        "gain": prepared.gain,
        "low_rank": cache.low_rank,
        "z": cache.z,
        "y": y,
        "e": grads.adapter.magnitude * prepared.norm,
        "dz": prepared.gain[..., None, :] * arrays["dy"].reshape(cache.z.shape),
    }
    if prepared.direction.factors.row_scale is not None:
        found["row_scale"] = prepared.direction.factors.row_scale
    for name, array in found.items():
        want, bound = (
            tensors[dtype][f"{case.name}/{group}/{name}"] for group in ("expected", "bound")
        )
        assert (np.abs(array.reshape(want.shape) - want) <= bound).all(), name


def refused(capsys, *arguments):
    assert main(["vectors", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_a_folder_with_files_is_refused(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    message = f"doraxp vectors: error: {tmp_path}: must be empty; --force replaces the vectors"
    assert message in refused(capsys, "--out", tmp_path)
    assert os.listdir(tmp_path) == ["mine.txt"]


def test_force_replaces_the_vectors_and_nothing_else(vectors, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    for name in NAMES:
        (out / name).write_text("old")
    assert main(["vectors", "--out", str(out), "--force"]) == 0
    assert contents(out) == contents(vectors) | {"mine.txt": b"mine"}
    assert os.listdir(tmp_path) == ["out"]


def test_an_empty_folder_is_filled(vectors, tmp_path):
    (tmp_path / "out").mkdir()
    assert main(["vectors", "--out", str(tmp_path / "out")]) == 0
    assert contents(tmp_path / "out") == contents(vectors)


def test_a_path_where_a_folder_cannot_be_made_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "file: must be a folder, but is a file" in refused(capsys, "--out", tmp_path / "file")
    assert "nowhere: no such folder" in refused(capsys, "--out", tmp_path / "nowhere" / "out")


def test_a_run_that_fails_leaves_no_files(tmp_path, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr("doraxp.testing._vectors.json.dumps", full)  # the manifest is written last
    assert "no space left on device" in refused(capsys, "--out", tmp_path / "out")
    assert os.listdir(tmp_path) == []


# The reader in another language


def read_by_node(node, folder):
    result = subprocess.run([node, READER, folder], capture_output=True, text=True)
    return result.returncode, result.stdout + result.stderr


def test_the_reader_finds_every_number_within_its_bound(node, vectors, manifest):
    status, printed = read_by_node(node, vectors)
    assert (status, printed.count("WRONG")) == (0, 0), printed
    assert f"{len(manifest['cases'])} cases, " in printed
    assert ": 0 arrays are wrong" in printed


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        ("float64", "tall/expected/y"),
        ("float32", "tall/expected/dw"),
        ("float64", "low-rank dropout/inputs/dropout_mask"),
        ("float32", "dropout/inputs/x"),
        ("float64", "direction form/inputs/weight"),
        ("float64", "detached/expected/q"),
        ("float32", "stack/inputs/lora_a"),
        ("float64", "adamw/inputs/grad lora_b 2"),
        ("float32", "sgd/expected/lora_a 3"),
    ],
)
def test_the_reader_finds_one_changed_number(node, vectors, tmp_path, dtype, name):
    shutil.copytree(vectors, tmp_path, dirs_exist_ok=True)
    path = tmp_path / f"{dtype}.safetensors"
    raw = bytearray(path.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    entry = json.loads(raw[8 : 8 + length])[name]
    start, stop = (8 + length + offset for offset in entry["data_offsets"])
    kind = np.dtype({"F64": "<f8", "F32": "<f4"}[entry["dtype"]])
    numbers = np.frombuffer(raw, kind, (stop - start) // kind.itemsize, start)
    numbers[1] += 1e-3
    path.write_bytes(raw)
    status, printed = read_by_node(node, tmp_path)
    assert status == 1
    wrong = [line for line in printed.splitlines() if line.startswith("WRONG")]
    assert wrong
    assert all(line.startswith(f"WRONG {dtype}, {name.split('/')[0]}, ") for line in wrong)


def test_the_reader_prints_an_error_for_files_that_it_cannot_read(node, vectors, tmp_path):
    status, printed = read_by_node(node, tmp_path)
    assert (status, "error: ENOENT" in printed) == (2, True)
    shutil.copytree(vectors, tmp_path, dirs_exist_ok=True)
    manifest = tmp_path / "manifest.json"
    manifest.write_text(manifest.read_text("utf-8").replace('"format": 1', '"format": 2'), "utf-8")
    assert read_by_node(node, tmp_path) == (2, "error: format must be 1, got 2\n")
