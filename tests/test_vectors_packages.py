"""packages/vectors: the golden vectors as a wheel and for npm, each with a reader and a schema."""

from __future__ import annotations

import copy
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from doraxp.testing import VERSION, write_vectors
from doraxp.testing._vectors import write_checksums

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "reference" / "vectors.md").read_text("utf-8")
PACKAGES = ROOT / "packages" / "vectors"
NUMBER = f"2.{VERSION}."
DATA = {
    "SHA256SUMS", "manifest.json", "schema.json", "float32.safetensors", "float64.safetensors",
    "layer-float32.onnx", "layer-float64.onnx",
}  # fmt: skip
MIB = 2**20


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    out = tmp_path_factory.mktemp("vectors") / "out"
    write_vectors(out)
    return out


@pytest.fixture(scope="module")
def manifest(vectors):
    return json.loads((vectors / "manifest.json").read_text("utf-8"))


@pytest.fixture
def reader(monkeypatch):
    """The reader in Python, as a module."""
    monkeypatch.syspath_prepend(PACKAGES / "python")
    return importlib.import_module("doraxp_vectors")


@pytest.fixture
def copied(vectors, tmp_path):
    """A folder of the vectors for a test to change."""
    return Path(shutil.copytree(vectors, tmp_path / "copied"))


def change(folder, **values):
    """Change values of the manifest, with its checksum."""
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values), "utf-8")
    write_checksums(folder)


def damage(path):
    raw = bytearray(path.read_bytes())
    raw[-2] ^= 1
    path.write_bytes(raw)


# The reader in Python


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_reader_returns_every_array_of_the_files(reader, vectors, manifest, dtype):
    arrays = load_file(vectors / f"{dtype}.safetensors")
    cases = reader.cases(dtype, folder=vectors)
    assert [case.entry for case in cases] == manifest["cases"] == reader.manifest(vectors)["cases"]
    for case in cases:
        for group in ("inputs", "expected", "bound"):
            for name, array in getattr(case, group).items():
                wanted = arrays.pop(f"{case.entry['name']}/{group}/{name}")
                assert array.dtype == wanted.dtype
                np.testing.assert_array_equal(array, wanted, strict=True)
    assert arrays == {}


def test_the_reader_passes_over_the_kinds_that_nobody_asks_for(reader, vectors, manifest):
    kinds = ["sgd", "embedding"]
    names = [case["name"] for case in manifest["cases"] if case["kind"] in kinds]
    found = [case.entry["name"] for case in reader.cases("float64", kinds, vectors)]
    assert found == names != []


def test_the_reader_names_what_it_does_not_have(reader, vectors):
    with pytest.raises(ValueError, match="dtype must be one of float32, float64, got 'float16'"):
        reader.cases("float16", folder=vectors)
    with pytest.raises(ValueError, match=r"kind must be one of adamw, .*layer.*, got 'layers'"):
        reader.cases("float32", ["layers"], vectors)


@pytest.mark.parametrize("name", ["manifest.json", "float32.safetensors"])
def test_the_reader_refuses_a_damaged_file(reader, copied, name):
    damage(copied / name)
    message = rf"^{name}: its SHA-256 must be \w{{64}}, as SHA256SUMS says, got \w{{64}}; install"
    with pytest.raises(ValueError, match=message):
        reader.cases("float32", folder=copied)


def test_the_reader_refuses_a_file_without_a_checksum(reader, copied):
    (copied / "SHA256SUMS").write_text("")
    with pytest.raises(ValueError, match="SHA-256 must be None, as SHA256SUMS says, got"):
        reader.manifest(copied)


def test_the_reader_refuses_another_format(reader, copied):
    change(copied, format=3)
    with pytest.raises(ValueError, match=r"^manifest.json: format must be 2, got 3$"):
        reader.cases(folder=copied)


def test_a_case_names_the_first_number_outside_its_bound(reader, vectors):
    case = reader.cases("float64", ["layer"], vectors)[0]
    assert case.wrong(case.expected) == []
    assert case.wrong({"y": case.expected["y"] + case.bound["y"] / 2}) == []
    assert len(case.wrong({"y": case.expected["y"] + 1.5 * case.bound["y"]})) == 1
    y = case.expected["y"].copy()
    y[2, 1] = np.nan
    y[3] += 1
    (line,) = case.wrong({"y": y})
    assert line.startswith("tall, y: number (2, 1) must be ")
    assert line.endswith(f", got nan; {1 + y.shape[1]} of {y.size} are wrong")
    with pytest.raises(ValueError, match=r"array must be one of norm, merged, y, .*, got 'Y'"):
        case.wrong({"Y": y})
    assert case.wrong({"y": y[:, 1:]}) == [
        f"tall, y: shape must be {y.shape}, got {y[:, 1:].shape}"
    ]


# The schema

ADAMW = ("learning_rate", "beta1", "beta2", "eps", "weight_decay")


def test_the_manifest_fits_its_schema(jsonschema, manifest):
    schema = json.loads((PACKAGES / "schema.json").read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(manifest, schema)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        *(("layer", {name: None}) for name in ("rank", "scaling", "form", "extreme", "inputs")),
        ("layer", {"form": "other"}),
        ("layer", {"dropout": "output"}),
        ("layer", {"inputs": ["x"]}),
        ("layer", {"expected": []}),
        ("layer", {"name": "a/b"}),
        ("convolution", {"stride": 2}),
        ("convolution", {"groups": None}),
        ("embedding", {"scale": None}),
        ("adamw", {"numbers": {"learning_rate": 0.1}}),
        ("sgd", {"numbers": None}),
        ("loha", {"scaling": None}),
        ("lokr", {"form": None}),
        ("sum", {"strengths": 1.0}),
        ("sum", {"scalings": None}),
        ("loraplus", {"numbers": dict.fromkeys(ADAMW, 0.1)}),
        ("scaled_adamw", {"numbers": dict.fromkeys(ADAMW, 0.1) | {"ratio": 2.0}}),
        ("adamw", {"since": None}),
        ("adamw", {"since": 0}),
    ],
)
def test_the_schema_refuses_a_case_without_a_property(jsonschema, manifest, kind, change):
    schema = json.loads((PACKAGES / "schema.json").read_text("utf-8"))
    changed = copy.deepcopy(manifest)
    case = next(case for case in changed["cases"] if case["kind"] == kind)
    case.update(change)
    for name in [name for name, value in change.items() if value is None]:
        del case[name]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(changed, schema)


def test_the_schema_allows_kinds_that_it_does_not_know(jsonschema, manifest):
    schema = json.loads((PACKAGES / "schema.json").read_text("utf-8"))
    case = {"name": "a", "reason": "b", "since": 9, "inputs": ["x"], "expected": ["y"]}
    jsonschema.validate(manifest | {"cases": [case | {"kind": "new", "more": 1}]}, schema)
    with pytest.raises(jsonschema.ValidationError, match="is a required property"):
        jsonschema.validate(manifest | {"cases": [case]}, schema)


# The packages


def build(package, out):
    subprocess.run([sys.executable, PACKAGES / "build.py", package, out], check=True)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("packages")


@pytest.fixture
def wheel(hatchling, folder):
    """The wheel; it is built once."""
    built = list((folder / "wheel").glob("*"))
    return built[0] if built else build("wheel", folder / "wheel")


@pytest.fixture
def archive(hatchling, folder):
    """The package for npm; it is built once."""
    built = list((folder / "npm").glob("*"))
    return built[0] if built else build("npm", folder / "npm")


def in_python(code, *places):
    """Run code in a new process that finds modules at some places only, and NumPy."""
    told = [*map(str, places), str(Path(np.__file__).parents[1])]
    begin = f"import sys; sys.path[:0] = {told!r}; "
    command = [sys.executable, "-I", "-S", "-c", begin + code]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_wheel_is_small_and_has_the_files_and_the_licence(wheel):
    assert wheel.name == f"doraxp_vectors-{NUMBER}0-py3-none-any.whl"
    assert wheel.stat().st_size <= 5 * MIB
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith("METADATA"))
        lines = archive.read(metadata).decode().splitlines()
        (licence,) = (name for name in names if name.endswith("LICENSE"))
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()
    assert {f"doraxp_vectors/data/{name}" for name in DATA} <= set(names)
    assert [line for line in lines if line.startswith("Requires-Dist")] == [
        "Requires-Dist: numpy>=2.0"
    ]


def test_the_installed_wheel_is_read_without_this_package(wheel, tmp_path, manifest):
    install = ["-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", tmp_path]
    subprocess.run([sys.executable, *install, wheel], check=True)
    code = "import doraxp_vectors as v; print(len(v.cases('float32')), 'doraxp' in sys.modules)"
    assert in_python(code, tmp_path) == f"{len(manifest['cases'])} False"


def test_the_wheel_is_read_without_unpacking(wheel, manifest):
    code = "import doraxp_vectors as v; print(len(v.cases('float64')))"
    assert in_python(code, wheel) == str(len(manifest["cases"]))


def test_the_packages_have_the_same_data(wheel, archive, vectors, tmp_path):
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(tmp_path)
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path, filter="data")
    data = [tmp_path / "doraxp_vectors" / "data", tmp_path / "package" / "data"]
    for folder in data:
        assert {path.name for path in folder.iterdir()} == DATA
        check = subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"],
                               cwd=folder, check=False)  # fmt: skip
        assert check.returncode == 0
        assert (folder / "SHA256SUMS").read_text().count("\n") == len(DATA) - 1
    for name in DATA:
        assert (data[0] / name).read_bytes() == (data[1] / name).read_bytes()
    for path in vectors.iterdir():
        if path.name != "SHA256SUMS":
            assert (data[0] / path.name).read_bytes() == path.read_bytes()


def test_two_builds_have_the_same_bytes(wheel, archive, tmp_path):
    assert build("wheel", tmp_path / "wheel").read_bytes() == wheel.read_bytes()
    assert build("npm", tmp_path / "npm").read_bytes() == archive.read_bytes()


def test_the_package_for_npm_is_small_and_has_the_licence(archive):
    assert archive.name == f"doraxp-vectors-{NUMBER}0.tgz"
    assert archive.stat().st_size <= 5 * MIB
    with tarfile.open(archive) as opened:
        told = json.load(opened.extractfile("package/package.json"))
        licence = opened.extractfile("package/LICENSE").read()
    assert licence == (ROOT / "LICENSE").read_bytes()
    assert told["version"] == f"{NUMBER}0"
    assert "dependencies" not in told


# The page


def size(path):
    paths = path.iterdir() if path.is_dir() else [path]
    return f"{sum(path.stat().st_size for path in paths) / 1e6:.1f} MB"


def test_the_page_has_the_names_and_sizes_of_the_packages(wheel, archive, vectors):
    lines = PAGE.splitlines()
    for command, row in (
        ("doraxp vectors --out vectors", size(vectors)),
        ("python packages/vectors/build.py wheel dist", f"`{wheel.name}`.*{size(wheel)}"),
        ("python packages/vectors/build.py npm dist", f"`{archive.name}`.*{size(archive)}"),
    ):
        (line,) = (line for line in lines if line.startswith(f"| `{command}`"))
        assert re.search(row, line)


def test_the_page_explains_every_file(wheel):
    with zipfile.ZipFile(wheel) as opened:
        names = {name.rpartition("/")[2] for name in opened.namelist() if "/data/" in name}
    assert names == set(re.findall(r"^\| `([\w.-]+)` \|", PAGE.partition("## Versions")[0], re.M))


OFFLINE = """
doraxp() { python -m doraxp "$@"; }
pip() { python -m pip --quiet "$@" --no-deps --no-index --target site; }
npm() { command npm "$@" --offline --silent; }
"""


def test_the_commands_of_the_page_print_its_lines(
    wheel, archive, node, npm, cc, rustc, tmp_path, monkeypatch
):
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "dist").mkdir()
    for built in (wheel, archive):
        shutil.copy(built, tmp_path / "dist")
    blocks = re.findall(r"^```text\n(.*?)^```", PAGE, re.M | re.S)
    blocks = [block for block in blocks if block.startswith("$ ")]
    assert len(blocks) == 2
    for block in blocks:
        commands = re.findall(r"^\$ (.*)", block, re.M)
        script = ["bash", "-euc", OFFLINE + "\n".join(commands)]
        found = subprocess.run(script, cwd=tmp_path, check=True, capture_output=True, text=True)
        assert found.stdout == re.sub(r"^\$ .*\n", "", block, flags=re.M)
    assert (tmp_path / "site" / "doraxp_vectors").is_dir()
    assert (tmp_path / "node_modules" / "doraxp-vectors").is_dir()


# The reader in JavaScript


def in_node(node, code, folder):
    path = folder / "run.mjs"
    path.write_text(code)
    result = subprocess.run([node, path], cwd=folder, capture_output=True, text=True, check=False)
    return result.stdout.strip() + result.stderr


IMPORT = f'import {{ readCases, readManifest, wrong }} from "{PACKAGES / "npm" / "index.mjs"}";\n'


def test_the_installed_package_for_npm_is_read(archive, node, npm, tmp_path, manifest):
    (tmp_path / "package.json").write_text("{}")
    install = ["install", "--offline", "--no-audit", "--no-fund", archive]
    subprocess.run([npm, *install], cwd=tmp_path, check=True, capture_output=True)
    code = """
        import { readCases } from "doraxp-vectors";
        import { createRequire } from "node:module";
        const resolve = createRequire(import.meta.url).resolve;
        console.log(readCases("float32").length, resolve("doraxp-vectors/data/schema.json"));
    """
    schema = tmp_path / "node_modules" / "doraxp-vectors" / "data" / "schema.json"
    assert in_node(node, code, tmp_path) == f"{len(manifest['cases'])} {schema.resolve()}"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_both_readers_return_the_same_numbers(node, reader, vectors, tmp_path, dtype):
    code = f"""
        const found = readCases("{dtype}", {{ folder: "{vectors}" }}).map((one) => [
          one.entry.name,
          ...["inputs", "expected", "bound"].map((group) =>
            Object.entries(one[group]).map(([name, array]) => [name, array.shape, [...array.data]]))
        ]);
        console.log(JSON.stringify(found));
    """
    wanted = [
        [case.entry["name"], *(
            [[name, list(array.shape), array.ravel().tolist()] for name, array in group.items()]
            for group in (case.inputs, case.expected, case.bound)
        )]
        for case in reader.cases(dtype, folder=vectors)
    ]  # fmt: skip
    printed = in_node(node, IMPORT + code, tmp_path)
    assert json.loads(printed, parse_int=float) == wanted  # JavaScript prints 1e20 as digits


def test_the_reader_in_javascript_passes_over_kinds_and_names_those_it_lacks(
    node, vectors, tmp_path, manifest
):
    code = f"""
        const folder = "{vectors}";
        console.log(readCases("float32", {{ folder, kinds: ["sgd"] }}).length);
        for (const [dtype, kinds] of [["float32", ["sgdd"]], ["float16", ["sgd"]]]) {{
          try {{
            readCases(dtype, {{ folder, kinds }});
          }} catch (error) {{
            console.log(error.message);
          }}
        }}
    """
    count, kind, dtype = in_node(node, IMPORT + code, tmp_path).splitlines()
    assert int(count) == sum(case["kind"] == "sgd" for case in manifest["cases"])
    assert kind.startswith("kind must be one of adamw, ")
    assert kind.endswith(", got sgdd")
    assert dtype == "dtype must be one of float32, float64, got float16"


def test_the_reader_in_javascript_refuses_damaged_files_and_other_formats(node, copied, tmp_path):
    code = IMPORT + f'readCases("float64", {{ folder: "{copied}" }});'
    damage(copied / "float64.safetensors")
    assert "Error: float64.safetensors: its SHA-256 must be " in in_node(node, code, tmp_path)
    (copied / "SHA256SUMS").write_text("")
    assert "Error: manifest.json: its SHA-256 must be undefined" in in_node(node, code, tmp_path)
    change(copied, format=3)
    assert "Error: manifest.json: format must be 2, got 3" in in_node(node, code, tmp_path)


def test_a_case_in_javascript_names_the_first_number_outside_its_bound(node, vectors, tmp_path):
    code = f"""
        const [one] = readCases("float32", {{ folder: "{vectors}", kinds: ["sgd"] }});
        const right = one.expected["lora_a 1"].data;
        const bound = one.bound["lora_a 1"].data;
        const beside = (share) => ({{ "lora_a 1": right.map((n, i) => n + share * bound[i]) }});
        console.log(wrong(one, beside(0.5)).length, wrong(one, beside(1.5)).length);
        const changed = [...right].map((n, i) => (i === 2 ? NaN : i === 4 ? n + 1 : n));
        console.log(wrong(one, {{ "lora_a 1": right }}).length);
        console.log(...wrong(one, {{ "lora_a 1": changed, "lora_b 1": [1] }}));
        console.log(...wrong(one, {{ "lora_a 1": undefined }}));
        try {{
          wrong(one, {{ lora_a: right }});
        }} catch (error) {{
          console.log(error.message);
        }}
    """
    beside, none, changed, missing, unknown = in_node(node, IMPORT + code, tmp_path).splitlines()
    assert (none, beside) == ("0", "0 1")
    assert changed.startswith("sgd, lora_a 1: number 2 must be ")
    assert ", got NaN; 2 of " in changed
    assert "sgd, lora_b 1: must have " in changed
    assert missing.endswith(", has undefined")
    assert unknown.startswith("array must be one of lora_a 1, ")
