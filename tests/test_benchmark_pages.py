"""docs/benchmarks: each page is the one that `benchmarks/pages.py` makes of the JSON beside it."""

from __future__ import annotations

import importlib.util
import json
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "benchmarks"
BY_HAND = {"h200", "index"}

sys.path.insert(0, str(ROOT / "benchmarks"))
import check  # noqa: E402
import dated  # noqa: E402
import page_bodies  # noqa: E402
import pages  # noqa: E402

sys.path.remove(str(ROOT / "benchmarks"))


@pytest.mark.parametrize("name", pages.PAGES)
def test_a_page_is_made_of_the_json_beside_it(name):
    page = (FOLDER / f"{name}.md").read_text("utf-8")
    assert page == pages.text_of(name), f"run python benchmarks/pages.py {name}"


def test_every_page_has_a_script_and_a_line_in_the_list():
    names = {path.stem for path in FOLDER.glob("*.md")}
    assert names == set(pages.PAGES) | BY_HAND
    index = (FOLDER / "index.md").read_text("utf-8")
    for name in names - {"index"}:
        title, *_ = (FOLDER / f"{name}.md").read_text("utf-8").splitlines()
        assert f"[{title.removeprefix('# ')}]({name}.md)" in index


@pytest.mark.parametrize("name", pages.PAGES)
def test_a_page_names_its_commands_and_their_scripts_are_there(name):
    page = (FOLDER / f"{name}.md").read_text("utf-8")
    for command in pages.PAGES[name].commands:
        assert pages.shown(command) in page
        for script in re.findall(r"\S+\.py\b", command):
            assert (ROOT / script).is_file()


def test_a_value_that_misses_its_goal_is_bold():
    figures = [
        {"what": "a", "case": "one", "value": 1.00006, "goal": 1},
        {"what": "b", "case": "two", "value": [0.9, 1.0], "goal": 1},
        {"what": "c", "case": "one", "value": 3.456, "goal": 4, "at_least": True},
        {"what": "d", "case": "two", "value": None},
    ]
    lines = list(page_bodies.goals([{"run": {}, "figures": figures}]))
    assert [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines] == [
        "## one",
        "",
        "|  | goal | measured |",
        "|---|---|---|",
        "| a | ≤ 1 | **1.00006** |",
        "| c | ≥ 4 | **3.46** |",
        "",
        "## two",
        "",
        "|  | goal | measured |",
        "|---|---|---|",
        "| b | ≤ 1 | 0.9 to 1 |",
        "| d |  | – |",
    ]


def test_a_wide_table_has_a_column_for_each_kind_of_figure():
    figures = [
        {"what": "ratio", "case": "1 token", "value": 2.70451},
        {"what": "MiB", "case": "1 token", "value": 1910},
        {"what": "ratio", "case": "512 tokens", "value": 1.2, "goal": 1.3},
        {"what": "MiB", "case": "512 tokens", "value": 58.4},
        {"what": "error", "case": "noise", "value": [0.9956, 0.9998]},
    ]
    lines = list(page_bodies.wide([{"run": {}, "figures": figures}]))
    assert [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines] == [
        "| | ratio | MiB |",
        "|---|---|---|",
        "| 1 token | 2.705 | 1,910 |",
        "| 512 tokens | 1.2 (≤ 1.3) | 58.4 |",
        "",
        "| | error |",
        "|---|---|",
        "| noise | 0.9956 to 0.9998 |",
    ]


def test_a_command_that_is_killed_is_not_a_goal_that_is_missed():
    with pytest.raises(subprocess.CalledProcessError):
        pages.shell("kill -9 $$", at_most=1)


@pytest.mark.parametrize(
    ("lines", "processor"),
    [("processor\t: 0\nmodel name\t: A Chip\n", "A Chip"), ("", platform.machine())],
)
def test_the_processor_is_that_of_linux_or_the_architecture(monkeypatch, lines, processor):
    monkeypatch.setattr(Path, "read_text", lambda *_: lines)
    assert dated.conditions()["processor"] == processor


def test_a_run_is_measured_written_and_drawn(tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT / 'benchmarks')!r})\n"
        "import dated\nfrom pathlib import Path\n"
        "dated.note('a ratio', value=2.0, goal=1)\ndated.write(Path(sys.argv[1]))\nsys.exit(1)\n"
    )
    drawn = tmp_path / "drawn"
    page = pages.Page(
        "Title", "About.", (f"python {script} {{json}}",), page_bodies.goals, f"touch {drawn}"
    )
    monkeypatch.setattr(pages, "FOLDER", tmp_path)
    monkeypatch.setattr(pages, "PAGES", {"made": page})
    monkeypatch.setattr(sys, "argv", ["pages.py", "made", "--run"])
    assert pages.main() == 0
    (run,) = json.loads((tmp_path / "made.json").read_text())
    assert run["figures"] == [{"what": "a ratio", "value": 2.0, "goal": 1}]
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", run["run"]["date"])
    assert "numpy" in run["versions"]
    assert "**2**" in (tmp_path / "made.md").read_text()
    assert drawn.exists()


def test_a_check_that_is_stopped_leaves_the_figures_of_each_workload(tmp_path, monkeypatch):
    first, second = list(check.GOALS)[:2]

    def results(workload, task, process):
        if workload == second:
            raise KeyboardInterrupt
        return task

    def met(goal, found, case):
        dated.note(goal.task, value=1.0, goal=goal.bound, case=case)
        return True

    file = tmp_path / "out.json"
    monkeypatch.setattr(dated, "FIGURES", [])
    monkeypatch.setattr(check, "results", results)
    monkeypatch.setattr(check, "met", met)
    monkeypatch.setattr(check.small_layer, "check", lambda: True)
    monkeypatch.setattr(sys, "argv", ["check.py", "--json", str(file)])
    with pytest.raises(KeyboardInterrupt):
        check.main()
    found = json.loads(file.read_text())
    assert [one["case"] for one in found["figures"]] == [str(first)] * len(check.GOALS[first])
    assert found["run"]["date"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["cpus"], "NAME must be one of audit, cpu, "), (["--run"], "--run needs a NAME")],
)
def test_a_wrong_call_of_the_pages_is_refused(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["pages.py", *arguments])
    with pytest.raises(SystemExit) as error:
        pages.main()
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_the_first_and_the_last_point_of_a_sweep_are_those_of_its_results():
    def result(tokens, rank, size, seconds):
        case = {"out": size, "inner": size, "tokens": tokens, "rank": rank}
        return {
            "case": case,
            "library": "numpy",
            "contestant": "exact",
            "seconds_quartiles": [0, seconds, 0],
        }

    fit = {"library": "numpy", "contestant": "exact", "time": 1.0, "memory": None}
    points = [(1, 4, 8, 1.0), (5, 4, 8, 2.0), (5, 1, 8, 3.0), (5, 4, 8, 4.0), (5, 4, 2, 5.0)]
    run = {
        "results": [result(*point) for point in points],
        "exponents": {name: [fit] for name in ("tokens", "rank", "size")},
    }
    rows = list(page_bodies.rows_of_curves(run))
    assert [row[0] for row in rows] == ["tokens, 1 to 5", "rank, 1 to 4", "size, 2 to 8"]
    assert rows[0][2] == 1.0
    (picture,) = (line for line in page_bodies.curves([run]) if line.startswith("!"))
    assert picture.endswith("(../images/curves.png)")


def test_without_threadpoolctl_a_run_has_no_kernels(monkeypatch):
    monkeypatch.setitem(sys.modules, "doraxp.bench", None)
    assert "blas" not in dated.conditions()


@pytest.fixture
def curves_script(monkeypatch, tmp_path):
    """Return docs/figures/curves.py as a module whose docs are in `tmp_path`."""
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location(
        "curves_figure", ROOT / "docs" / "figures" / "curves.py"
    )
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for folder in ("benchmarks", "images"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(script, "DOCS", tmp_path)
    return script


def test_the_curves_are_drawn_again_from_their_json(curves_script, tmp_path):
    from doraxp.bench import Measured, collect, report
    from doraxp.bench._curves import workloads

    base = curves_script.BASE
    different = dict.fromkeys(workload for _, workload in workloads(base))
    results = [
        Measured(one, "step", name, "numpy", kind, [1e-6 * one.tokens, 2e-6 * one.tokens], 4096)
        for one in different
        for name, kind in (("bare products", "bare"), ("exact", "exact"), ("detached", "detached"))
    ]
    found = report(results, ["numpy"], {}, collect(base, results))
    path = tmp_path / "benchmarks" / "curves.json"
    path.write_text(json.dumps([{"command": "c", "run": {}, **found}]))
    assert curves_script.main() == 0
    for name in ("curves", "curves-dark"):
        assert (tmp_path / "images" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    rows = list(page_bodies.rows_of_curves(json.loads(path.read_text())[0]))
    assert [row[:2] for row in rows[::3]] == [
        ["tokens, 1 to 4096", "bare products"],
        ["rank, 1 to 256", "bare products"],
        ["size, 512 to 8192", "bare products"],
    ]
    assert rows[0][4] == pytest.approx(1)


def test_curves_without_single_points_are_not_drawn(curves_script, tmp_path, capsys):
    (tmp_path / "benchmarks" / "curves.json").write_text('[{"rows": []}]')
    assert curves_script.main() == 1
    assert "python benchmarks/pages.py curves --run" in capsys.readouterr().out
