"""`doraxp vectors` writes the same bytes everywhere, and programs in three languages read them."""

from __future__ import annotations

import hashlib
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
    OptimizerCase,
    catalogue,
    expected_of_operator,
    expected_of_sum,
    expected_of_update,
    operator_catalogue,
    optimizer_catalogue,
    sum_catalogue,
    update_catalogue,
)
from doraxp.testing._libraries import Library
from doraxp.testing._reference import expected, expected_steps
from doraxp.testing._vectors import write_checksums

NAMES = {"SHA256SUMS", "manifest.json", "float32.safetensors", "float64.safetensors"}
ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples" / "vectors"
EVERY = (
    *catalogue(), *operator_catalogue(), *update_catalogue(), *sum_catalogue(),
    *optimizer_catalogue(),
)  # fmt: skip
CASES = {case.name: case for case in EVERY}
EXPECTED = {
    "layer": expected,
    "convolution": expected_of_operator,
    "embedding": expected_of_operator,
    "loha": expected_of_update,
    "lokr": expected_of_update,
    "sum": expected_of_sum,
}
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


def test_the_checksums_are_those_of_all_other_files(vectors):
    lines = (vectors / "SHA256SUMS").read_text("utf-8").splitlines()
    assert lines == [
        f"{hashlib.sha256((vectors / name).read_bytes()).hexdigest()}  {name}"
        for name in sorted(NAMES - {"SHA256SUMS"})
    ]


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
    page = (Path(__file__).parents[1] / "docs" / "reference" / "vectors.md").read_text("utf-8")
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    explained = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    for case in manifest["cases"]:
        if case["kind"] in EXPECTED:
            names = {re.sub(r" \d$", "", name) for name in (*case["inputs"], *case["expected"])}
            assert names <= explained
        assert case["kind"] in explained


def test_the_manifest_names_every_tensor_and_nothing_else(manifest, tensors):
    assert (manifest["format"], manifest["catalogue"]) == (2, doraxp.testing.VERSION)
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
            assert (entry["reason"], entry["since"]) == (case.reason, case.since)
            if entry["kind"] == "sum":
                assert entry["scalings"] == [config.scaling for config in case.configs]
                assert entry["strengths"] == list(case.strengths)
            elif entry["kind"] in EXPECTED:
                assert entry["scaling"] == case.config.scaling
                assert (entry["dropout"] is None) == ("dropout_mask" not in case.arrays)
            if entry["kind"] in EXPECTED:
                wanted, inputs = EXPECTED[entry["kind"]](case, dtype), case.stored(dtype)
            else:
                assert isinstance(case, OptimizerCase)
                assert (entry["kind"], entry["numbers"]) == (case.optimizer, case.numbers)
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


# The programs in other languages


class Programs:
    """The tests of a program, which the fixture `check` runs on a folder."""

    def test_every_number_is_within_its_bound(self, check, vectors, manifest, tensors):
        cases = len(manifest["cases"])
        numbers = sum(
            array.size
            for arrays in tensors.values()
            for name, array in arrays.items()
            if "/expected/" in name
        )
        line = f"{cases} cases, {numbers} numbers: 0 arrays are wrong"
        assert check(vectors) == (0, f"{line}\n")
        page = (ROOT / "docs" / "reference" / "vectors.md").read_text("utf-8")
        assert line in page

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
            ("float64", "grouped convolution/inputs/x"),
            ("float32", "scaled embedding/expected/merged"),
            ("float64", "adamw/inputs/grad lora_b 2"),
            ("float32", "sgd/expected/lora_a 3"),
            ("float64", "loha/inputs/second_b"),
            ("float32", "lokr, factored/inputs/right_a"),
            ("float64", "dora and lora/inputs/lora_b 2"),
            ("float32", "lora+/expected/lora_b 2"),
            ("float64", "scaled adamw/inputs/grad lora_a 3"),
        ],
    )
    def test_one_changed_number_is_found(self, check, vectors, tensors, tmp_path, dtype, name):
        bound = tensors[dtype].get(name.replace("/expected/", "/bound/"))
        by = 1e-3
        if "/expected/" in name:  # a result in double is exact beside the bounds of float32
            by = (1.5 if dtype == "float32" else 2.5) * bound.flat[1]
        shutil.copytree(vectors, tmp_path, dirs_exist_ok=True)
        add_to_second(tmp_path / f"{dtype}.safetensors", name, by)
        write_checksums(tmp_path)
        status, printed = check(tmp_path)
        assert status == 1
        wrong = [line for line in printed.splitlines() if line.startswith("WRONG")]
        assert wrong
        assert all(line.startswith(f"WRONG {dtype}, {name.split('/')[0]}, ") for line in wrong)
        assert f": {len(wrong)} arrays are wrong" in printed

    def test_a_folder_without_vectors_is_an_error(self, check, tmp_path):
        status, printed = check(tmp_path)
        assert status == 2
        assert printed.startswith("error: ")

    @pytest.mark.parametrize("value", ["1", "3"])
    def test_another_format_is_an_error(self, check, vectors, tmp_path, value):
        change_manifest(vectors, tmp_path, '"format": 2', f'"format": {value}')
        assert check(tmp_path) == (2, f"error: manifest.json: format must be 2, got {value}\n")

    def test_a_kind_that_the_program_does_not_know_is_an_error(self, check, vectors, tmp_path):
        change_manifest(vectors, tmp_path, '"kind": "layer"', '"kind": "layers"')
        status, printed = check(tmp_path)
        assert status == 2
        assert printed.startswith("error: tall: kind must be one of layer, ")
        assert printed.endswith(", got layers\n")

    def test_an_array_that_is_missing_is_an_error(self, check, vectors, tmp_path):
        change_manifest(vectors, tmp_path, '"dbias"', '"dbiases"')
        status, printed = check(tmp_path)
        assert status == 2
        assert printed.startswith("error: tall: there is no expected/dbiases")


def add_to_second(path, name, value):
    """Add a value to the second number of an array in a file."""
    raw = bytearray(path.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    entry = json.loads(raw[8 : 8 + length])[name]
    start, stop = (8 + length + offset for offset in entry["data_offsets"])
    kind = np.dtype({"F64": "<f8", "F32": "<f4"}[entry["dtype"]])
    np.frombuffer(raw, kind, (stop - start) // kind.itemsize, start)[1] += value
    path.write_bytes(raw)


def change_manifest(vectors, folder, old, new):
    shutil.copytree(vectors, folder, dirs_exist_ok=True)
    path = folder / "manifest.json"
    path.write_text(path.read_text("utf-8").replace(old, new, 1), "utf-8")
    write_checksums(folder)


def run(*command):
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.returncode, result.stdout + result.stderr


class TestJavaScript(Programs):
    @pytest.fixture
    def check(self, node):
        return lambda folder: run(node, EXAMPLES / "check.mjs", folder)


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """The folder of compiled programs: each is compiled once."""
    return tmp_path_factory.mktemp("programs")


class TestC(Programs):
    @pytest.fixture
    def check(self, cc, programs):
        program = programs / "check-c"
        if not program.exists():
            options = ["-std=c99", "-O2", "-Wall", "-Wextra", "-Werror"]
            built = run(cc, *options, "-o", program, EXAMPLES / "check.c", "-lm")
            assert built == (0, "")
        return lambda folder: run(program, folder)

    def test_no_memory_is_lost_or_misused(self, cc, vectors, tmp_path):
        """The compiler's sanitizers end the program with another status where there is."""
        options = ["-std=c99", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
        assert run(cc, *options, "-o", tmp_path / "check", EXAMPLES / "check.c", "-lm") == (0, "")
        status, printed = run(tmp_path / "check", vectors)
        assert (status, printed.endswith(": 0 arrays are wrong\n")) == (0, True), printed


class TestRust(Programs):
    @pytest.fixture
    def check(self, rustc, programs):
        program = programs / "check-rust"
        if not program.exists():
            options = ["-O", "-D", "warnings"]
            built = run(rustc, "--edition", "2021", *options, "-o", program, EXAMPLES / "check.rs")
            assert built == (0, "")
        return lambda folder: run(program, folder)
