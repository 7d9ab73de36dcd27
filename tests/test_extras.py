"""An error about a missing extra says how to install it: from the clone, or by name."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import doraxp.bench
import doraxp.demo
from doraxp._base import extras
from doraxp.cli import main

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
BY_NAME = "run python -m pip install 'doraxp[checkpoint]'"


def from_the_clone(folder: Path, extra: str = "checkpoint") -> str:
    return f"run python -m pip install '.[{extra}]' in {folder}"


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """Return a function that puts doraxp into a folder, with the record of where it is from."""

    def install(direct_url: dict | None) -> None:
        record = tmp_path / "doraxp-0.1.0.dist-info"
        record.mkdir()
        (record / "METADATA").write_text("Metadata-Version: 2.4\nName: doraxp\nVersion: 0.1.0\n")
        if direct_url is not None:
            (record / "direct_url.json").write_text(json.dumps(direct_url))
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setattr(extras, "PACKAGE", tmp_path / "doraxp")

    return install


@pytest.mark.parametrize(
    ("direct_url", "hint"),
    [
        ({"url": "file:///home/me/do%20raxp", "dir_info": {}},
         from_the_clone("/home/me/do raxp")),
        ({"url": "file:///home/me/doraxp", "dir_info": {"editable": True}},
         from_the_clone("/home/me/doraxp")),
        ({"url": "file:///tmp/doraxp-0.1.0-py3-none-any.whl", "archive_info": {}}, BY_NAME),
        ({"url": "https://host/doraxp.git", "vcs_info": {"vcs": "git", "commit_id": "1"}}, BY_NAME),
        (None, BY_NAME),
    ],
)  # fmt: skip
def test_the_hint_follows_the_source_of_the_installation(installed, direct_url, hint):
    installed(direct_url)
    assert extras.install_hint("checkpoint") == hint


def test_a_source_tree_gives_the_command_for_its_folder(monkeypatch, tmp_path):
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.setattr(extras, "PACKAGE", tmp_path / "src" / "doraxp")
    assert extras.install_hint("checkpoint") == from_the_clone(tmp_path)


def test_a_copied_package_without_a_record_gives_the_name(monkeypatch, tmp_path):
    monkeypatch.setattr(extras, "PACKAGE", tmp_path / "doraxp")
    monkeypatch.setattr(sys, "path", [])
    assert extras.install_hint("checkpoint") == BY_NAME


def test_the_command_line_gives_the_hint(installed, capsys, monkeypatch):
    installed({"url": "file:///home/me/doraxp", "dir_info": {}})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["demo"]) == 2
    error = "rich and matplotlib are not installed: "
    hint = from_the_clone("/home/me/doraxp", "demo")
    assert capsys.readouterr().err == f"doraxp demo: error: {error}{hint}\n"


@pytest.mark.parametrize(
    ("room", "module"),
    [
        ("checkpoint", "safetensors"),
        ("checkpoint", "ml_dtypes"),
        ("checkpoint", "threadpoolctl"),
        ("torch", "torch"),
        ("jax", "jax"),
    ],
)
def test_an_import_without_the_extra_gives_the_hint(room, module):
    code = f"import sys; sys.modules[{module!r}] = None; import doraxp.{room}"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 1
    *_, last = ran.stderr.splitlines()
    hint = extras.install_hint(room)
    assert last.startswith(f"ModuleNotFoundError: doraxp.{room} needs the extra {room}: ")
    assert re.search(rf"\b{module}\b", last)
    assert last.endswith(f" not installed: {hint}")


@pytest.mark.parametrize(
    ("call", "extra"),
    [
        (lambda path: doraxp.demo.save_picture(None, path), "demo"),
        (lambda path: doraxp.demo.print_results(None, None), "demo"),
        (lambda path: doraxp.bench.save_curves({}, path), "bench"),
        (lambda path: doraxp.bench.save_ratios([], path), "bench"),
        (lambda path: doraxp.bench.print_tables([], None), "bench"),
        (lambda path: doraxp.bench.print_exponents({}, None), "bench"),
        (lambda path: doraxp.bench.threads(), "bench"),
        (lambda path: doraxp.bench.blas_kernels(), "bench"),
        (lambda path: doraxp.bench.draw(doraxp.bench.Workload(4, 4, 4, 2, "bfloat16")), "bench"),
    ],
)
def test_a_function_without_its_extra_gives_the_hint(call, extra, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=re.escape(extras.install_hint(extra))) as caught:
        call(tmp_path / "picture.png")
    assert caught.value.name


def test_the_missing_modules_are_listed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="the extra demo: a, b and c are not installed: "):
        extras.require("demo", "a", "b", "c", of="doraxp.demo")


def test_a_stub_without_a_spec_counts_as_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "a_stub", type(sys)("a_stub"))
    extras.require("demo", "a_stub", of="doraxp.demo")


def test_the_name_of_every_hint_is_an_extra():
    hinted = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            match node:
                case ast.Call(
                    func=ast.Name(id="require" | "install_hint" | "lacks"),
                    args=[ast.Constant(value=str(first)), *_],
                    keywords=keywords,
                ):
                    extra = [one.value.value for one in keywords if one.arg == "extra"]
                    hinted |= {*(extra or [first])}
    assert hinted >= {"checkpoint", "torch", "jax", "demo", "bench", "verify", "cuda13"}
    assert hinted <= set(PROJECT["optional-dependencies"])
