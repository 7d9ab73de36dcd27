"""The check of tools that merge files: it finds nothing in right ones, and names what is wrong."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path

import ml_dtypes  # noqa: F401  NumPy then knows bfloat16
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from doraxp._base.extras import install_hint
from doraxp.checkpoint import Options, Weighted, check_merge_files, plan_merge, run_merge
from doraxp.cli import main


def doraxp_merge(base, adapter, out):
    run_merge(plan_merge(base, [Weighted(adapter)], Options()), out)


def plain(base, adapter, out, *, norm=lambda w, v: v, scale=lambda alpha, rank: alpha / rank):
    """Merge as an author of a tool would write it, into one file."""
    leaves = load_file(Path(adapter) / "adapter_model.safetensors")
    config = json.loads((Path(adapter) / "adapter_config.json").read_text("utf-8"))
    merged = load_file(Path(base) / "model.safetensors")
    for name, stored in merged.items():
        path = name.removesuffix(".weight")
        names = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
        keys = [f"base_model.model.{path}.{leaf}" for leaf in names]
        if keys[0] in leaves:
            a, b, m = (leaves[key].astype("f8") for key in keys)
            alpha = next(
                (
                    n
                    for key, n in config["alpha_pattern"].items()
                    if re.fullmatch(rf"(?:.*\.)?(?:{key})", path)
                ),
                config["lora_alpha"],
            )
            w = stored.astype("f8")
            v = w + scale(alpha, len(a)) * b @ a
            n = np.sqrt(np.sum(norm(w, v) ** 2, axis=1))
            merged[name] = ((m / np.maximum(n, 1e-30))[:, None] * v).astype(stored.dtype)
    save_file(merged, out)


def verdicts(merge_files):
    report = check_merge_files(merge_files)
    assert report.ok == (not report.findings)
    return {(one.case, one.dtype): one.problem for one in report.findings}


@pytest.mark.parametrize("merge_files", [doraxp_merge, plain])
def test_a_right_tool_has_no_finding(merge_files):
    report = check_merge_files(merge_files)
    assert report.findings == ()
    assert {run.dtype for run in report.runs} == {"float32", "bfloat16"}
    assert report.checked == len(report.runs) == 14


@pytest.mark.parametrize(
    ("fault", "verdict"),
    [
        ({"norm": lambda w, v: w}, "base norm"),
        ({"scale": lambda alpha, rank: alpha}, "α instead of s"),
        ({"scale": lambda alpha, rank: 1.0}, "s is left out"),
        ({"scale": lambda alpha, rank: (alpha / rank) ** 2}, "scaled by s²"),
        ({"norm": lambda w, v: v**2}, "another adapter"),
    ],
)
def test_a_fault_has_the_verdict_of_the_audit(fault, verdict):
    found = verdicts(lambda *paths: plain(*paths, **fault))
    assert {dtype for case, dtype in found if case == "tall"} == {"float32", "bfloat16"}
    assert found["tall", "float32"].startswith(verdict)
    assert not any(case == "without an adapter" for case, _ in found)


def test_a_copy_of_the_base_is_found():
    found = verdicts(lambda base, adapter, out: shutil.copytree(base, out))
    assert found["tall", "float32"] == "unchanged (the merge did nothing)"


def test_a_tensor_without_an_adapter_that_changes_is_found():
    def merge_files(base, adapter, out):
        plain(base, adapter, out)
        tensors = load_file(out)
        tensors["model.layers.6.weight"] = 2 * tensors["model.layers.6.weight"]
        save_file(tensors, out)

    assert {case for case, _ in verdicts(merge_files)} == {"without an adapter"}


@pytest.mark.parametrize("merge_files", [lambda *paths: None, lambda *paths: 1 / 0])
def test_a_tool_that_raises_or_writes_nothing_is_a_finding_of_every_tensor(merge_files):
    found = verdicts(merge_files)
    assert len(found) == 14
    assert all(problem.startswith("raises ") for problem in found.values())


def edited(base, adapter, out, leaves=dict, config=dict):
    """Merge another adapter than the one that is given, as a tool does that reads it wrong."""
    folder = Path(out).with_name("edited")
    folder.mkdir()
    given = Path(adapter)
    save_file(
        leaves(load_file(given / "adapter_model.safetensors")), folder / "adapter_model.safetensors"
    )
    text = (given / "adapter_config.json").read_text("utf-8")
    (folder / "adapter_config.json").write_text(json.dumps(config(json.loads(text))), "utf-8")
    plain(base, folder, out)


def without_signs(base, adapter, out):
    edited(base, adapter, out, lambda leaves: {
        name: np.abs(leaf) if "magnitude" in name else leaf for name, leaf in leaves.items()
    })  # fmt: skip


def without_patterns(base, adapter, out):
    edited(base, adapter, out, config=lambda config: config | {"alpha_pattern": {}})


def by_directions(base, adapter, out):
    """Divide W by its norms, which is NaN in a row of zeros."""
    with np.errstate(invalid="ignore"):
        plain(base, adapter, out, norm=lambda w, v: v + 0 * w / np.linalg.norm(w, axis=1)[:, None])


@pytest.mark.parametrize(
    ("merge_files", "case"),
    [
        (without_signs, "negative magnitude"),
        (without_patterns, "rank 1"),
        (by_directions, "zero row of W"),
    ],
)
def test_a_fault_that_one_kind_of_tensor_shows_is_found_there_alone(merge_files, case):
    assert {found for found, _ in verdicts(merge_files)} == {case}


def test_a_tool_that_exits_does_not_end_the_check():
    def merge_files(base, adapter, out):
        raise SystemExit("usage: merge BASE ADAPTER OUT")

    found = verdicts(merge_files)
    assert set(found.values()) == {"raises SystemExit: usage: merge BASE ADAPTER OUT"}


def test_a_finding_does_not_name_the_temporary_folder():
    """Else it differs in each run, and the findings of two dtypes are not one group."""
    found = check_merge_files(lambda base, adapter, out: Path(out).write_text("no tensors"))
    (problem,) = {one.problem for one in found.findings}
    assert problem.startswith("raises CheckpointError: out: not a safetensors file")


def test_each_merge_is_told_before_it_runs():
    told = []
    check_merge_files(doraxp_merge, progress=lambda *step: told.append(step))
    assert told == [("merge_files: float32", 0, 2), ("merge_files: bfloat16", 1, 2)]


MODULE = """
from test_merged_files import doraxp_merge as merge_files
{more}
"""


@pytest.mark.parametrize("more", ["", "from naive import init"])
def test_conform_runs_a_tool_for_files(tmp_path, monkeypatch, capsys, more):
    name = f"tool_{len(more)}"  # a module is imported once
    (tmp_path / f"{name}.py").write_text(MODULE.format(more=more), "utf-8")
    monkeypatch.chdir(tmp_path)
    assert main(["conform", name, "--json", "out.json"]) == 0
    report = json.loads((tmp_path / "out.json").read_text("utf-8"))
    assert report["functions"]["merge_files"]["arrays"] == 14
    assert ("init" in report["functions"]) == bool(more)
    assert "merge_files" in capsys.readouterr().out


def test_without_the_packages_for_files_conform_says_how_to_install_them(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "bare_tool.py").write_text("def merge_files(base, adapter, out): ...", "utf-8")
    monkeypatch.chdir(tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "safetensors" else find(name)
    )
    assert main(["conform", "bare_tool"]) == 2
    assert install_hint("checkpoint") in capsys.readouterr().err
