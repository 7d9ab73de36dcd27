"""`doraxp conform`: targets, conventions, expected failures, the table, JSON and JUnit XML."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import naive
import pytest
import yaml

from doraxp._base.extras import install_hint
from doraxp.cli import main
from doraxp.testing import (
    VERSION,
    Conventions,
    ExpectedFailure,
    Report,
    catalogue,
    check_implementation,
    grouped,
    judge,
    junit,
    read_expected_failures,
)

WRONG = """
import naive
from naive import gradients, init, step


def forward(bias, **others):
    return naive.forward(bias=None, **others)


class Outer:
    merge = staticmethod(naive.merge)


class Method:
    conventions = {"dtypes": ["float64"]}

    def __init__(self):
        self.inner = Outer

    def forward(self, **others):
        return naive.forward(**others)


class Scaled:
    conventions = naive_conventions = None

    def forward(self, weight, lora_a, lora_b, magnitude, bias, scaling, x):
        v, norm = naive.adapted(weight, lora_a, lora_b, scaling)
        y = x @ v.T
        return magnitude / norm * (y if bias is None else y + bias)


class Needs:
    def __init__(self, size):
        pass
"""
ENTRY = '[[expected]]\nname = "{}"\nreason = "there is no bias yet"\nlink = "https://e.org/7"\n'


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder with the module `mine`, which is the current directory; 80 columns."""
    (tmp_path / "mine.py").write_text(WRONG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def report_of(folder, *arguments):
    """Return the exit status and the JSON of a run."""
    status = main(["conform", *arguments, "--json", str(folder / "r.json")])
    return status, json.loads((folder / "r.json").read_text("utf-8"))


def expecting(folder, *names):
    """Write a file of expected failures with these names."""
    path = folder / "expected.toml"
    path.write_text("".join(map(ENTRY.format, names)), "utf-8")
    return ["--expected", str(path)]


# The table


def test_a_right_implementation_has_a_row_for_each_function_and_exit_status_0(mine, capsys):
    assert main(["conform", "naive"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    report = check_implementation(naive)
    rows = {cells[0]: cells[1:] for line in out.splitlines() if (cells := line.split())}
    for name in ("init", "forward", "gradients", "merge", "step"):
        runs = [one for one in report.runs if one.function == name]
        extreme = sum(one.function == name for one in report.findings)
        counts = (len({one.case for one in runs}), sum(one.checked for one in runs), 0, 0, extreme)
        assert rows[name] == [*map(str, counts)]
    assert out.endswith(f"right: {report.checked} arrays, 0 wrong.\n")
    assert "extreme merge: 4 findings in zero row; huge; tiny" in out


def test_a_wrong_implementation_is_named_and_its_findings_are_grouped(mine, capsys):
    assert main(["conform", "mine", "--dtype", "float64"]) == 1
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    words = " ".join(out.split())
    assert "NAMED forward: the bias is left out (largest error " in words
    assert re.search(
        r"WRONG forward, tall, float64, y: is .* more: wide; square; .* other cases\)", words
    )
    assert words.count("WRONG forward") == 1
    assert re.search(r"WRONG: \d+ arrays, \d+ wrong[.]$", words)


GRADIENTS = """
from naive import forward, merge, adapted


def gradients(dy, x, weight, lora_a, lora_b, magnitude, bias, scaling):
    v, norm = adapted(weight, lora_a, lora_b, scaling)
    tokens, d = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    dv = (magnitude / norm * d).T @ tokens
    return {"lora_a": lora_b.T @ dv, "lora_b": SIGN dv @ lora_a.T}
"""


def test_a_detached_norm_is_named_beside_a_pair_of_mistakes(mine, capsys):
    """dA and dB lack s, and the norm is detached, which --norm-gradient may declare."""
    (mine / "three.py").write_text(GRADIENTS.replace("SIGN", ""))
    assert main(["conform", "three"]) == 1
    words = " ".join(capsys.readouterr().out.split())
    names = "the norm is detached and dA lacks s and dB lacks s"
    assert f"NAMED gradients: {names} (largest error " in words
    assert "if these mistakes are in the reference)" in words
    assert "UNNAMED" not in words
    assert main(["conform", "three", "--norm-gradient", "detached"]) == 1
    assert ": dA lacks s and dB lacks s (largest" in " ".join(capsys.readouterr().out.split())


def test_a_function_that_no_mistake_explains_has_a_hint(mine, capsys):
    (mine / "odd.py").write_text(GRADIENTS.replace("SIGN", "0.3 *") + "\n\ndef step(**_): return 1")
    assert main(["conform", "odd"]) == 1
    words = " ".join(capsys.readouterr().out.split())
    assert "NAMED forward" not in words
    assert (
        "UNNAMED gradients: no known mistake or pair of them explains the numbers; declare your "
        "choices, such as --norm-gradient detached, --layout in_out or --eps 1e-6" in words
    )
    assert "UNNAMED step" not in words
    report = check_implementation(sys.modules["odd"])
    assert report.unexplained == ("gradients",)
    assert "  gradients: no known mistake or pair of them explains the numbers" in str(report)
    (mine / "wide.py").write_text(
        "import naive\ndef merge(**given): return 1.3 * naive.merge(**given)\n"
        "def step(params, grads, state, **_): return {k: 7 * p for k, p in params.items()}, 0\n"
    )
    assert main(["conform", "wide"]) == 1
    words = " ".join(capsys.readouterr().out.split())
    assert "such as --layout in_out, --form direction or --eps 1e-6" in words
    assert "UNNAMED step: no known mistake or pair of them explains the numbers WRONG" in words


WEIGHT_IN_OUT = """
import naive


def forward(weight, **others):
    return naive.forward(weight=weight.T, **others)


def init(weight):
    return naive.init(weight.T)
"""


def test_a_layout_that_was_not_declared_has_a_line_with_the_shapes(mine, capsys):
    (mine / "kernel.py").write_text(WEIGHT_IN_OUT)
    assert main(["conform", "kernel", "--layout", "weight_in_out"]) == 0
    assert "raises" not in capsys.readouterr().out
    assert main(["conform", "kernel"]) == 1
    words = " ".join(capsys.readouterr().out.split())
    line = "forward raises, or returns other shapes, wherever the weight is not square; the first "
    assert f"{line}call was given x (4, 5), weight (8, 5), lora_a (3, 5), lora_b (8, 3)" in words
    assert words.index(line) < words.index("NAMED init")
    assert "UNNAMED" not in words
    status, report = report_of(mine, "kernel", "--layout", "in_out")
    assert status == 1
    (raised,) = report["raised"]
    assert (raised["function"], raised["square_works"]) == ("forward", False)
    assert raised["shapes"]["lora_a"] == [5, 3]


def test_the_help_has_the_shapes_of_each_layout(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit):
        main(["conform", "--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert "--layout {out_in,in_out,weight_in_out}" in words
    assert "out_in: weight (out, in), A (rank, in), B (out, rank)" in words
    assert "in_out: weight (in, out), A (in, rank), B (rank, out)" in words
    assert "weight_in_out: weight (in, out), A (rank, in), B (out, rank)" in words


def test_the_named_functions_are_mended_before_one_without_a_name(mine, capsys):
    gradients = GRADIENTS.replace("SIGN", "0.3 *").replace("forward, merge", "merge")
    (mine / "both.py").write_text(
        gradients
        + "\n\ndef forward(**given):\n"
        + "    return __import__('naive').forward(**given | {'bias': None})\n\n\n"
        + "def step(learning_rate, **given):\n"
        + "    return __import__('naive').step(learning_rate=-learning_rate, **given)\n"
    )
    assert main(["conform", "both"]) == 1
    words = " ".join(capsys.readouterr().out.split())
    assert "NAMED step: the step goes uphill" in words
    assert "explains the numbers; mend forward first, and run again WRONG" in words


def test_a_named_function_of_another_part_is_not_mended_first(mine, capsys):
    (mine / "parted.py").write_text(
        "import naive, naive_parts\n"
        "def merge(**given):\n"
        "    return naive.merge(**given | {'scaling': 1.0})\n"
        "class loha:\n"
        "    def merge(**given):\n"
        "        return 1.5 * naive_parts.loha.merge(**given)\n"
    )
    assert main(["conform", "parted"]) == 1
    words = " ".join(capsys.readouterr().out.split())
    assert "NAMED merge: s is left out" in words
    assert "UNNAMED loha.merge: " in words
    assert "mend " not in words


@pytest.mark.parametrize("columns", range(34, 60, 2))
def test_a_line_that_is_continued_breaks_no_word(mine, capsys, monkeypatch, columns):
    """An option, or the name of an entry, is one word that can be copied."""
    monkeypatch.setenv("COLUMNS", str(columns))
    (mine / "right.py").write_text("from naive import init\n")
    entry = f"init/{'a' * 60}/*"
    assert main(["conform", "right", *expecting(mine, entry)]) == 1
    words = capsys.readouterr().out.split()
    assert {entry, "--dtype"} <= {*words}
    assert not [word for word in words if word.endswith("-")]


def test_cases_that_did_not_run_have_a_reason(mine, capsys):
    (mine / "partly.py").write_text(
        "import naive\n"
        "def merge(weight, **others):\n"
        "    if weight.shape == (8, 5): raise NotImplementedError\n"
        "    return naive.merge(weight, **others)\n"
    )
    status, found = report_of(mine, "partly")
    assert status == 0
    words = " ".join(capsys.readouterr().out.split())
    needs = dict(zip(found["left_out"], found["needs"], strict=True))
    assert needs["tall"] == {}
    assert needs["dropout, direction form"] == {"form": "direction", "dropout": "input"}
    assert needs["half storage"] == {"dtypes": ["float16", "bfloat16"]}
    assert needs["stack"] == {"stacks": True}
    count = sum("dropout" in one and one["dropout"] == "input" for one in needs.values())
    assert f"--dropout input ({count} cases)" in words
    assert "--dtype float16 or bfloat16 (" in words
    assert "--stacks (" in words
    assert "merge raises NotImplementedError in 1 case: tall 25 cases did not run: they" in words
    calls = [{"function": "merge", "case": "tall", "dtype": d} for d in ("float32", "float64")]
    assert found["refused"] == calls
    text = str(check_implementation(sys.modules["partly"]))
    assert f"dropout='input' ({count} cases)" in text
    _, axis = report_of(mine, "partly", "--norm-axis", "input")
    needs = dict(zip(axis["left_out"], axis["needs"], strict=True))
    assert needs["wide"] == {"norm_axis": "output"}


ONLY = """
import naive
from naive import forward


def gradients(**given):
    return {KEYS}
"""


def test_gradients_that_no_case_returned_have_a_line_and_the_exit_status_stays_0(mine, capsys):
    (mine / "alone.py").write_text(ONLY.replace("KEYS", "'x': naive.gradients(**given)['x']"))
    status, found = report_of(mine, "alone")
    assert status == 0
    lines = capsys.readouterr().out.splitlines()
    # The last line has the path of the report, which may be long.
    assert max(len(line) for line in lines if not line.startswith("Report: ")) <= 80
    words = " ".join(" ".join(lines).split())
    said = "gradients never returned lora_a, lora_b, magnitude, weight, bias: not checked"
    assert f"{said} 25 cases did not run" in words
    keys = ["lora_a", "lora_b", "magnitude", "weight", "bias"]
    assert found["never_returned"] == [{"function": "gradients", "keys": keys}]
    _, found = report_of(mine, "naive")
    assert found["never_returned"] == []
    assert "never returned" not in capsys.readouterr().out


def test_a_gradient_that_some_cases_lack_is_wrong_there(mine, capsys):
    found = "**{key: one for key, one in naive.gradients(**given).items() if key != 'lora_a' or "
    keys = f"{found} given['lora_a'].shape[0] != 1}}"
    (mine / "some.py").write_text(ONLY.replace("KEYS", keys))
    status, found = report_of(mine, "some")
    assert status == 1
    assert found["functions"]["gradients"]["wrong"] == 6
    assert found["never_returned"] == []
    words = " ".join(capsys.readouterr().out.split())
    said = "must be returned here as in other cases, got no array for the key lora_a"
    more = "(and 5 more: one column; rank 1)"
    assert f"WRONG gradients, one row, float32, da: {said} {more}" in words
    assert report_of(mine, "some", *expecting(mine, "gradients/*/da"))[0] == 1  # it passes in tall
    names = [f"gradients/{case}/da" for case in ("one row", "one column", "rank 1")]
    assert report_of(mine, "some", *expecting(mine, *names))[0] == 0


def test_the_printed_report_groups_findings_as_the_command_does(mine, capsys):
    assert main(["conform", "mine"]) == 1
    words = " ".join(capsys.readouterr().out.split())
    report = check_implementation(sys.modules["mine"])
    lines = grouped(report.findings)
    assert any(f"WRONG {line}" in words for line in lines)
    assert all(line in words for line in lines)
    assert all(f"  {line}" in str(report).splitlines() for line in lines)


def test_a_function_without_any_run_has_a_line(mine, capsys):
    (mine / "later.py").write_text(
        "from naive import forward\ndef merge(**_): raise NotImplementedError('not yet')\n"
    )
    assert main(["conform", "later", "--junit", "r.xml"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    said = "merge raises NotImplementedError in 24 cases: tall; wide; square; and 21 other cases"
    assert f"{said} 25 cases did not run: " in words
    root = checked(ElementTree.parse("r.xml").getroot())
    suite = root.find("testsuite[@name='merge']")
    assert suite.get("tests") == suite.get("skipped") == "48"
    assert suite[0].get("name") == "tall, float32"
    assert suite[0][0].attrib == {
        "type": "not implemented",
        "message": "merge raises NotImplementedError",
    }


def test_lines_that_are_continued_are_indented(mine, capsys):
    """So a line that begins at the left is a new statement."""
    assert main(["conform", "mine"]) == 1
    lines = capsys.readouterr().out.splitlines()
    below = lines[lines.index(next(line for line in lines if line.startswith("NAMED"))) :]
    heads = ("NAMED ", "WRONG ", "WRONG: ", "extreme ", "25 cases did not run: ")
    assert any(line.startswith("  ") for line in below)
    assert [one for one in below if not one.startswith((*heads, "  "))] == []


def test_a_report_with_the_files_of_a_tool_keeps_what_was_never_returned(mine, capsys):
    code = ONLY.replace("KEYS", "'x': naive.gradients(**given)['x']")
    (mine / "tool.py").write_text(f"{code}\n\ndef merge_files(base, adapter, out): raise OSError\n")
    status, found = report_of(mine, "tool", *expecting(mine, "merge_files/*/merged"))
    assert status == 0
    assert found["functions"]["merge_files"]["expected"] == 14
    assert [one["function"] for one in found["never_returned"]] == ["gradients"]
    assert "gradients never returned lora_a" in " ".join(capsys.readouterr().out.split())
    assert Report((), (), 3, (), ()).never_returned == ()  # it is built without the field too


def test_a_number_that_should_be_0_has_no_relative_error(mine, capsys):
    """A weight of one column has the direction of its sign, so dA and dB are 0."""
    (mine / "zero.py").write_text(GRADIENTS.replace("SIGN", ""))
    assert main(["conform", "zero", "--dtype", "float64"]) == 1
    assert "nan" not in capsys.readouterr().out
    report = check_implementation(sys.modules["zero"], Conventions(dtypes=("float64",)))
    problems = [one.problem for one in report.findings if one.case == "one column"]
    assert any(problem.endswith(" times its bound off") for problem in problems)


def test_a_long_list_of_groups_is_cut(mine, capsys):
    (mine / "many.py").write_text(
        "def init(weight): raise ValueError('no init')\n"
        "def gradients(dy, **_): return {chr(97 + i): dy for i in range(22)}\n"
    )
    assert main(["conform", "many", "--dtype", "float64"]) == 1
    out = capsys.readouterr().out
    assert (out.count("WRONG init"), out.count("WRONG gradients")) == (1, 19)
    assert "and 5 more groups: --json and --junit have all" in out


def test_the_same_fault_in_one_case_names_the_case(mine, capsys):
    (mine / "once.py").write_text(
        "import naive\n"
        "def merge(weight, **others):\n"
        "    if weight.shape == (8, 5): raise ValueError('\\x1b[31m[red]')\n"
        "    return naive.merge(weight, **others)\n"
    )
    assert main(["conform", "once"]) == 1
    words = " ".join(capsys.readouterr().out.split())
    assert "raises ValueError: \\x1b[31m[red] (and 1 more: tall in float64)" in words


# Targets


@pytest.mark.parametrize(
    ("target", "functions"),
    [
        ("mine", {"forward", "gradients", "init", "step"}),
        ("mine:Outer", {"merge"}),
        ("mine:Method", {"forward"}),
        ("mine:naive", {"forward", "gradients", "init", "merge", "step"}),
    ],
)
def test_a_target_is_a_module_an_object_or_a_class(mine, target, functions):
    _, report = report_of(mine, target, "--dtype", "float64")
    assert set(report["functions"]) == functions
    assert report["target"] == target


def test_the_object_may_be_dotted(mine):
    (mine / "nested.py").write_text(
        "import naive\nclass A:\n    class B:\n        init = staticmethod(naive.init)\n"
    )
    assert report_of(mine, "nested:A.B")[0] == 0


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nothing", "MODULE must be importable: run this in the folder .* got 'nothing', Module"),
        ("broken", "got 'broken', ZeroDivisionError: division by zero"),
        ("leaves", "got 'leaves', SystemExit: 3"),
        ("mine:nothing", "OBJECT must be in mine, got 'mine:nothing', AttributeError: "),
        ("mine:Needs", "a class must take no arguments: make an object .* got 'mine:Needs', Type"),
        ("mine.py", "TARGET must be MODULE or MODULE:OBJECT, .* got 'mine.py': write mine$"),
        ("./mine", "TARGET must be MODULE or MODULE:OBJECT, .* got './mine': write mine$"),
        ("./folder/mine.py", "TARGET must be .* got './folder/mine.py': write folder.mine$"),
        ("folder/mine:A", "TARGET must be .* got 'folder/mine:A': write folder.mine:A$"),
        ("./a-b.py", r"TARGET must be .* got '\./a-b\.py'$"),
        ("../mine", r"TARGET must be .* got '\.\./mine': run this in its folder, and write mine$"),
        ("mine:", "TARGET must be MODULE or MODULE:OBJECT, .* got 'mine:'$"),
        ("mine:WRONG()", r"TARGET must be .* got 'mine:WRONG\(\)'$"),
        ("json", "impl must have a function init, forward, .* got module without any of them"),
        ("classes", "OBJECT must be given, got a module .* write classes:One or classes:Two$"),
        ("beside", "whose functions are in a class: write beside:Own$"),
        ("exports", "whose functions are in a class: write exports:Two or exports:One$"),
        ("odd", "conventions must be a doraxp.testing.Conventions or a dict .* got list"),
        ("typo", "conventions must be those of doraxp.testing: .* argument 'lay_out'"),
        ("choice", r"layout must be one of \('out_in', 'in_out', 'weight_in_out'\), got 'x'"),
    ],
)
def test_a_bad_target_is_exit_status_2_and_one_line(mine, capsys, target, message):
    head = "import naive\nfrom naive import init\n"
    (mine / "broken.py").write_text("1 / 0")
    (mine / "leaves.py").write_text("raise SystemExit(3)")
    (mine / "classes.py").write_text(
        "import naive\nclass One:\n    merge = naive.merge\nclass Two(One):\n    pass\nclass No: 0"
    )
    (mine / "beside.py").write_text("from classes import *\nclass Own(Two): 0")
    (mine / "exports.py").write_text("from classes import Two, One")
    (mine / "odd.py").write_text(f"{head}conventions = []")
    (mine / "typo.py").write_text(f"{head}conventions = {{'lay_out': 'in_out'}}")
    (mine / "choice.py").write_text(f"{head}conventions = {{'layout': 'x'}}")
    assert main(["conform", target]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(rf"^doraxp conform: error: {re.escape(target)}: ", line)
    assert re.search(message, line)


def test_functions_of_a_part_have_dotted_names(mine, capsys):
    """An attribute `loha` with a function `merge` is the function loha.merge."""
    (mine / "parts.py").write_text(
        "from naive import init\nclass loha:\n    def merge(**_): raise ValueError('no LoHa')\n"
    )
    assert main(["conform", "parts", *expecting(mine, "init/tall/*")]) == 1
    out = capsys.readouterr().out
    assert re.search(r"^loha.merge +\d+ +0 +\d+ +0 +\d+ *$", out, re.MULTILINE)
    status, report = report_of(mine, "parts", *expecting(mine, "loha.*/*/all"))
    assert status == 0
    assert report["functions"]["loha.merge"]["wrong"] == 0
    assert main(["conform", "parts", "--junit", "r.xml"]) == 1
    suites = [suite.get("name") for suite in ElementTree.parse("r.xml").getroot()]
    assert suites == ["init", "loha.merge"]


# Conventions

GIVEN = {
    "layout": (["--layout", "weight_in_out"], "weight_in_out"),
    "form": (["--form", "direction"], "direction"),
    "norm_gradient": (["--norm-gradient", "detached"], "detached"),
    "norm_axis": (["--norm-axis", "input"], "input"),
    "bias_scaled": (["--bias-scaled"], True),
    "eps": (["--eps", "1e-30"], 1e-30),
    "scaling": (["--scaling", "alpha"], "alpha"),
    "dropout": (["--dropout", "low_rank"], "low_rank"),
    "stacks": (["--stacks"], True),
    "dtypes": (["--dtype", "float32", "--dtype", "float16"], ["float32", "float16"]),
}


def test_every_convention_has_an_option():
    assert set(GIVEN) == {field.name for field in dataclasses.fields(Conventions)}


@pytest.mark.parametrize("name", GIVEN)
def test_an_option_is_the_convention_of_its_name(mine, name):
    options, value = GIVEN[name]
    _, report = report_of(mine, "mine:Outer", *options)
    defaults = dataclasses.asdict(Conventions())
    assert report["conventions"] == {**json.loads(json.dumps(defaults)), name: value}


def test_a_declared_convention_is_not_an_error_and_options_win_over_the_attribute(mine):
    assert report_of(mine, "mine:Scaled")[0] == 1
    assert report_of(mine, "mine:Scaled", "--bias-scaled")[0] == 0
    (mine / "declared.py").write_text(
        "from doraxp.testing import Conventions\nfrom mine import Scaled\n"
        "class Mine(Scaled):\n    conventions = Conventions(bias_scaled=True, dropout='input')\n"
    )
    assert report_of(mine, "declared:Mine", "--dropout", "none")[0] == 0
    status, report = report_of(mine, "declared:Mine", "--no-bias-scaled", "--dropout", "none")
    assert status == 1
    assert (report["conventions"]["bias_scaled"], report["conventions"]["dropout"]) == (False, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layout", "up"], "argument --layout: invalid choice: 'up'"),
        (["--eps", "x"], "argument --eps: must be a number, finite and at least 0, got 'x'"),
        (["--eps=-1"], "argument --eps: must be a number, finite and at least 0, got '-1'"),
        (["--since", "99"], f"argument --since: must be an integer, in 1..{VERSION}, got '99'"),
        (["--junit", "r.json"], "argument --junit: must end in .xml, got 'r.json'"),
        (
            ["--junit", "no/r.xml"],
            "--junit: must be a file in a folder that exists, got",
        ),
    ],
)
def test_a_bad_option_is_exit_status_2(mine, capsys, options, message):
    with pytest.raises(SystemExit, match="2"):
        main(["conform", "naive", *options])
    assert message in capsys.readouterr().err


def test_an_unknown_dtype_is_exit_status_2(mine, capsys):
    assert main(["conform", "naive", "--dtype", "int8"]) == 2
    assert "dtypes must be some of ('float16', " in capsys.readouterr().err


def test_without_the_extra_it_says_how_to_get_it(mine, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["conform", "naive"]) == 2
    assert install_hint("verify") in capsys.readouterr().err


@pytest.mark.parametrize(("body", "status"), [("", 0), ("\n\ndef merge_files(*_): pass\n", 2)])
def test_only_a_tool_for_files_needs_the_extra_of_checkpoints(
    mine, capsys, monkeypatch, body, status
):
    source = "import numpy as np\n\n\ndef init(weight): return np.linalg.norm(weight, axis=1)\n"
    (mine / "small.py").write_text(source + body)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "safetensors" else find(name)
    )
    assert main(["conform", "small"]) == status
    assert (install_hint("checkpoint") in capsys.readouterr().err) == (status == 2)


# Expected failures


def failing(report, **only):
    """Return the names of the findings of a report that have these fields."""
    return sorted(
        {
            f"{one['function']}/{one['case']}/{one['quantity']}"
            for one in report["findings"]
            if all(one[key] == value for key, value in only.items())
        }
    )


def test_failures_that_are_expected_are_exit_status_0(mine, capsys):
    status, report = report_of(mine, "mine")
    assert status == 1
    names = failing(report, extreme=False)
    assert len(names) > 10
    status, report = report_of(mine, "mine", *expecting(mine, *names))
    assert status == 0
    assert report["ok"]
    assert report["functions"]["forward"]["wrong"] == 0
    assert report["functions"]["forward"]["expected"] == 2 * len(names)
    words = " ".join(capsys.readouterr().out.split())
    assert f"expected {names[0]}, 2 findings: there is no bias yet (https://e.org/7)" in words
    assert f"{2 * len(names)} failures expected." in words


def test_an_expected_failure_that_passes_is_exit_status_1_and_named(mine, capsys):
    (mine / "bad.py").write_text("import naive\ndef init(weight): return weight\n")
    status, report = report_of(mine, "bad", *expecting(mine, "init/*/initial"))
    assert status == 0
    status, report = report_of(mine, "naive", *expecting(mine, "init/*/initial", "init/huge/*"))
    assert status == 1
    (passing,) = report["passing"]
    assert passing["name"] == "init/*/initial"
    assert "init/tall" in passing["passes_in"]
    assert "init/huge" not in passing["passes_in"]
    words = " ".join(capsys.readouterr().out.split())
    assert "STALE init/*/initial passes in init/tall; init/wide; init/square; and " in words
    assert "remove or narrow the entry" in words
    assert words.endswith("1 expected failure that did not fail. Report: " + str(mine / "r.json"))


def test_an_entry_that_matches_no_test_of_the_run_is_exit_status_1_and_named(mine, capsys):
    entries = expecting(mine, "init/tal/initial", "inits/tall/*")
    status, report = report_of(mine, "naive", *entries)
    assert status == 1
    assert [entry["name"] for entry in report["unmatched"]] == ["init/tal/initial", "inits/tall/*"]
    words = " ".join(capsys.readouterr().out.split())
    assert "STALE inits/tall/* matches no function and case of this run" in words


def test_an_entry_for_a_quantity_does_not_expect_another_one(mine):
    (mine / "two.py").write_text(
        "import naive\n"
        "def gradients(**given):\n"
        "    found = naive.gradients(**given)\n"
        "    return found | {'lora_a': found['lora_b'], 'lora_b': found['lora_a']}\n"
    )
    status, report = report_of(mine, "two", *expecting(mine, "gradients/tall/da"))
    assert status == 1
    assert "gradients/tall/da" not in failing(report, expected=None)
    assert "gradients/tall/db" in failing(report, expected=None)


def test_an_entry_may_name_an_extreme_case_and_a_dotted_function():
    report = check_implementation(naive)
    entry = ExpectedFailure("merge/zero row/merged", "0 / 0", "#1")
    judged = judge(report, [entry])
    assert judged.ok
    assert {one.case for one, _ in judged.expected} == {"zero row"}
    assert len(judged.extreme) == len(report.findings) - len(judged.expected)
    runs = tuple(one._replace(function=f"loha.{one.function}") for one in report.runs)
    found = tuple(one._replace(function=f"loha.{one.function}") for one in report.findings)
    dotted = report._replace(runs=runs, findings=found)
    assert not judge(dotted, [entry]).ok
    assert judge(dotted, [entry._replace(name="loha.merge/zero row/merged")]).ok


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[expected]", "must be a TOML file in UTF-8: "),
        ("[[expect]]\nname = 'a'", r"must have tables \[\[expected\]\] alone, got expect"),
        ("expected = 3", r"must have tables \[\[expected\]\] alone, got expected as something"),
        ("expected = [3]", "entry 1 must have the keys name, reason, link, got 3"),
        (ENTRY.format("a/b/c") + "because = 'x'", r"entry 1 must .* got .*'link', 'because'\]"),
        (
            "[[expected]]\nname = 'a/b/c'\nreason = 'r'",
            r"entry 1 must have the keys name, reason, ",
        ),
        (ENTRY.format("a/b/c") + ENTRY.format("a/b"), "entry 2: name must be function/case/quanti"),
        (ENTRY.format("/b/c"), "entry 1: name must be function/case/quantity, got '/b/c'"),
        (
            "[[expected]]\nname = 'a/b/c'\nreason = ' '\nlink = 'x'",
            "entry 1: reason must be a text that is not empty, got ' '",
        ),
        (
            "[[expected]]\nname = 'a/b/c'\nreason = 'r'\nlink = 3",
            "entry 1: link must be a text that is not empty, got 3",
        ),
    ],
)
def test_a_bad_file_of_expected_failures_is_exit_status_2(mine, capsys, text, message):
    path = mine / "expected.toml"
    path.write_text(text)
    assert main(["conform", "naive", "--expected", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"expected.toml(:| must) ?.*{message}|expected.toml {message}", line)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        read_expected_failures(path)


def test_a_file_of_expected_failures_in_another_encoding_is_exit_status_2(mine, capsys):
    (mine / "expected.toml").write_bytes("# für".encode("latin-1"))
    assert main(["conform", "mine", "--expected", "expected.toml"]) == 2
    assert "expected.toml must be a TOML file in UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["inf", "nan", "-1"])
def test_an_eps_is_finite_and_at_least_0(mine, capsys, text):
    with pytest.raises(SystemExit):
        main(["conform", "mine", f"--eps={text}"])
    assert f"must be a number, finite and at least 0, got '{text}'" in capsys.readouterr().err


def test_a_missing_file_of_expected_failures_is_exit_status_2(mine, capsys):
    assert main(["conform", "naive", "--expected", "nothing.toml"]) == 2
    assert "naive: nothing.toml: No such file or directory" in capsys.readouterr().err


# Versions of the catalogue


def test_since_leaves_out_the_cases_of_earlier_versions(mine):
    _, every = report_of(mine, "mine:Outer")
    assert (every["since"], every["catalogue"]) == (1, VERSION)
    old = {case.name for case in catalogue() if case.since == 1}
    _, report = report_of(mine, "mine:Outer", "--since", "2", "--dropout", "input")
    assert report["since"] == 2
    assert {one["case"] for one in report["runs"]}.isdisjoint(old)
    assert {one["case"] for one in every["runs"]} >= old - set(every["left_out"])


def test_a_run_without_any_case_is_not_a_success(mine, capsys):
    """The steps of an optimizer are not in the catalogue in float16."""
    (mine / "steps.py").write_text("from naive import step")
    assert main(["conform", "steps", "--dtype", "float16"]) == 2
    assert "steps: one case must run, got 0: the conventions, --since 1" in capsys.readouterr().err


# JSON and JUnit XML


def test_the_json_has_the_whole_report(mine):
    status, found = report_of(mine, "mine")
    assert status == 1
    report = check_implementation(SimpleNamespace(**vars(sys.modules["mine"])))
    assert len(found["findings"]) == len(report.findings)
    assert found["runs"] == [one._asdict() for one in report.runs]
    (diagnosis,) = found["diagnoses"]
    assert diagnosis["deviations"] == ["the bias is left out"]
    assert found["left_out"] == list(report.left_out)
    assert not found["ok"]
    assert {"doraxp", "python", "numpy"} <= set(found["versions"])


COUNTS = {"tests", "failures", "errors", "skipped"}
ATTRIBUTES = {
    "testsuites": (COUNTS | {"name"}, set()),
    "testsuite": (COUNTS | {"name"}, set()),
    "testcase": ({"classname", "name"}, {"assertions"}),
    "failure": ({"type", "message"}, set()),
    "skipped": ({"type", "message"}, set()),
}
INNER = {
    "testsuites": {"testsuite"},
    "testsuite": {"testcase"},
    "testcase": {"failure", "skipped"},
    "failure": set(),
    "skipped": set(),
}
"""The parts of the schema of Jenkins' JUnit plugin that a report uses."""


def checked(element):
    """Return an element after a check of its attributes, children and counts, at any depth."""
    required, optional = ATTRIBUTES[element.tag]
    assert required <= set(element.attrib) <= required | optional
    assert {child.tag for child in element} <= INNER[element.tag]
    if element.tag == "testcase":
        assert len(element) <= 1
    if element.tag in ("testsuites", "testsuite"):
        counts = {
            "tests": len([*element.iter("testcase")]),
            "failures": len([*element.iter("failure")]),
            "errors": 0,
            "skipped": len([*element.iter("skipped")]),
        }
        assert {key: int(element.get(key)) for key in COUNTS} == counts
    for child in element:
        checked(child)
    return element


def test_junit_has_a_test_for_each_function_case_and_dtype(mine):
    assert main(["conform", "mine", "--junit", "r.xml"]) == 1
    root = checked(ElementTree.parse("r.xml").getroot())
    report = check_implementation(sys.modules["mine"])
    tests = [(one.get("classname"), one.get("name")) for one in root.iter("testcase")]
    assert tests == [(one.function, f"{one.case}, {one.dtype}") for one in report.runs]
    assert len(set(tests)) == len(tests)
    assert [suite.get("name") for suite in root] == ["init", "forward", "gradients", "step"]
    wrong = {(one.function, one.case, one.dtype) for one in report.findings if not one.extreme}
    extreme = {(one.function, one.case, one.dtype) for one in report.findings} - wrong
    assert int(root.get("failures")) == len(wrong)
    assert int(root.get("skipped")) == len(extreme)
    first = root.find(".//testcase[@classname='forward'][@name='tall, float32']/failure")
    assert re.match("y: is .* times its bound off", first.get("message"))
    checks = [int(one.get("assertions")) for one in root.iter("testcase")]
    assert sum(checks) == report.checked


def test_expected_failures_are_skipped_with_their_reason_and_stale_ones_fail(mine):
    entries = expecting(mine, "forward/tall/y", "init/tall/*", "merge/tall/*")
    assert main(["conform", "mine", "--junit", "r.xml", *entries]) == 1
    root = checked(ElementTree.parse("r.xml").getroot())
    skipped = root.find(".//testcase[@classname='forward'][@name='tall, float32']/skipped")
    assert skipped.get("message").endswith("expected: there is no bias yet (https://e.org/7)")
    stale = root.find("testsuite[@name='expected failures']")
    messages = {test.get("name"): test[0].get("message") for test in stale}
    assert messages == {
        "init/tall/*": "passes in init/tall",
        "merge/tall/*": "matches no function and case of this run",
    }


def test_gradients_that_no_case_returned_are_skipped_tests(mine):
    (mine / "alone2.py").write_text(ONLY.replace("KEYS", "'x': naive.gradients(**given)['x']"))
    assert main(["conform", "alone2", "--junit", "r.xml"]) == 0
    root = checked(ElementTree.parse("r.xml").getroot())
    suite = root.find("testsuite[@name='gradients']")
    skipped = {
        test.get("name"): test[0].get("message")
        for test in suite
        if len(test) and test[0].get("type") == "never returned"
    }
    assert skipped == {
        key: f"gradients never returned {key}: not checked"
        for key in ("lora_a", "lora_b", "magnitude", "weight", "bias")
    }
    assert suite[-1].get("classname") == "gradients"


def test_any_message_can_be_written_as_xml(mine):
    (mine / "odd.py").write_text("def init(weight): raise ValueError('\\x00\\ud800 <&> ä\\n')\n")
    assert main(["conform", "odd", "--junit", "r.xml"]) == 1
    root = checked(ElementTree.fromstring(Path("r.xml").read_bytes()))
    failure = root.find(".//failure")
    assert failure.get("message") == "all: raises ValueError: \\x00\\ud800 <&> ä\\n"
    report = check_implementation(SimpleNamespace(init=lambda weight: weight))
    text = junit("\x00<", report, judge(report))
    assert checked(ElementTree.fromstring(text)).get("name") == "\\x00<"


# The page and the workflow

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "howto" / "conform.md").read_text("utf-8")
WORKFLOW = ROOT / ".github" / "workflows" / "conform.yml"


@pytest.fixture
def workflow():
    """The reusable workflow. YAML 1.1 reads the key `on` as True."""
    return yaml.safe_load(WORKFLOW.read_text("utf-8"))


def test_the_page_shows_the_output_of_its_command(mine, capsys):
    code, *_ = re.findall(r"cat > mine.py <<'EOF'\n(.*?)EOF\n", PAGE, re.DOTALL)
    (mine / "shown.py").write_text(code)
    assert main(["conform", "shown"]) == 1
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    (shown,) = re.findall(r"The first run prints\n\n```text\n(.*?)\n```", PAGE, re.DOTALL)

    def rounded(text):
        return re.sub(
            r"; [\d.]+ if", "; … if", " ".join(text.split())
        )  # the BLAS decides the digits

    assert rounded(shown) == rounded("\n".join(lines))


def test_the_page_shows_the_line_of_a_function_that_raises(mine, capsys):
    _, code, *_ = re.findall(r"cat > mine.py <<'EOF'\n(.*?)EOF\n", PAGE, re.DOTALL)
    (mine / "kernel.py").write_text(code)
    assert main(["conform", "kernel"]) == 1
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    (shown,) = re.findall(r"The first command prints\n\n```text\n(.*?)\n```", PAGE, re.DOTALL)
    start = lines.index(shown.splitlines()[0])
    assert shown.splitlines() == lines[start : start + 5]
    assert not lines[start + 5].startswith(" ")


def test_the_page_has_every_option(mine, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["conform", "--help"])
    options = set(re.findall(r"^  (--[\w-]+)", capsys.readouterr().out, re.MULTILINE))
    assert len(options) > 12
    assert {option for option in options if option not in PAGE} == set()


def test_the_workflow_is_reusable_and_the_page_names_its_inputs(workflow):
    inputs = workflow[True]["workflow_call"]["inputs"]
    assert {name for name, one in inputs.items() if one.get("required")} == {"target"}
    assert all({"description", "type"} <= set(one) for one in inputs.values())
    (job,) = re.findall(r"```text\n(jobs:.*?)```", PAGE, re.DOTALL)
    called = yaml.safe_load(job)["jobs"]["conform"]
    assert called["uses"].endswith(f"/{WORKFLOW.relative_to(ROOT)}@main")
    assert set(called["with"]) == {"target", "options", "python-version"}
    assert set(called["with"]) < set(inputs)
    assert all(f"`{name}`" in PAGE for name in set(inputs) - set(called["with"]))


def test_the_commands_of_the_workflow_run(workflow, mine):
    """An input is a word or an option of the command, and never a command."""
    steps = workflow["jobs"]["conform"]["steps"]
    assert all({"uses", "run"} & set(step) for step in steps)
    assert all("${{" not in step.get("run", "") for step in steps)
    install, conform = (step for step in steps if "run" in step)
    assert [*install["env"]] == ["DORAXP", "INSTALL"]
    assert [*conform["env"].values()] == ["${{ inputs.target }}", "${{ inputs.options }}"]
    doraxp = mine / "doraxp"
    doraxp.write_text(f'#!/bin/sh\nexec {sys.executable} -m doraxp "$@"\n')
    doraxp.chmod(0o755)
    target, options = "mine:Scaled", "--bias-scaled --json r.json"
    for given, status in ((target, 0), (f"{target}; touch was_run", 2)):
        env = {**os.environ, "PATH": f"{mine}:{os.environ['PATH']}", "TARGET": given}
        env |= {"OPTIONS": options, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = ["bash", "-eo", "pipefail", "-c", conform["run"]]
        assert subprocess.run(command, env=env, check=False).returncode == status
    assert {"conform.xml", "r.json"} < {path.name for path in mine.iterdir()}
    assert not (mine / "was_run").exists()


LAZY = """
class Lazy:
    @property
    def forward(self):
        raise {error}("no weights yet")
"""


@pytest.mark.parametrize("error", ["KeyError", "RuntimeError"])
def test_a_function_that_cannot_be_read_is_bad_input(tmp_path, monkeypatch, capsys, error):
    name = f"lazy_{error.lower()}"
    (tmp_path / f"{name}.py").write_text(LAZY.format(error=error), "utf-8")
    monkeypatch.chdir(tmp_path)
    assert main(["conform", f"{name}:Lazy"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "its functions must be attributes that can be read" in line
    assert f"{error}: " in line
