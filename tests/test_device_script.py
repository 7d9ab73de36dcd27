"""benchmarks/device.sh without a GPU: its clock, the figures that it keeps, and the goals."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "device.sh"
STUB = """#!/bin/bash
case "$*" in
    *device_report.py*) exec {python} "$@" ;;
    *why*) echo "$WHY"; exit ;;
    *array_api_compat*) exit "${{LACKS:-0}}" ;;
    *"import xdist"*) exit 0 ;;
esac
[[ $1 != -c ]] || exit 3
printf '%s PATH %s\\n' "$*" "$PYTHONPATH" >> "$CALLS"
printf '{{"part": "probe", "name": "%s"}}\\n' "$2" >> "$DEVICE_FOLDER/figures.jsonl"
for word in "$@"; do
    case $before in
        --json) echo '{{"results": [], "threads": {{"a": 1}}}}' > "$word" ;;
        --plot) echo picture > "$word" ;;
    esac
    before=$word
done
if [[ $* == *machine* ]]; then
    echo '{{"part": "machine", "device": {{"name": "NVIDIA H200"}}, "versions": {{}}}}' \\
        >> "$DEVICE_FOLDER/figures.jsonl"
fi
[[ -z ${{NAP:-}} ]] || exec sleep "$NAP"
exit "${{CODE:-0}}"
"""
TOOL = """#!/bin/bash
while [[ $# -gt 0 ]]; do
    [[ $1 != --log-file ]] || log=$2
    [[ $1 != --seconds ]] || seconds=$2
    shift
done
printf 'tool %s%s\\n' "${0##*/}" "${seconds:+ for $seconds}" >> "$CALLS"
if [[ $0 == *ncu ]]; then cp "$COUNTERS" "$log"; else echo '= ERROR SUMMARY: 2 errors' > "$log"; fi
"""
COUNTERS = """==PROF== Connected to process 42 (/usr/bin/python3)
"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","42","merge","Command line profiler metrics","dram__bytes_read.sum","byte","33,554,432"
"0","42","merge","Command line profiler metrics","gpu__time_duration.sum","nsecond","25,600"
"0","42","merge","Command line profiler metrics","launch__grid_size","","2048"
"1","42","token(const void*, int)","Command line","dram__bytes_read.sum","Mbyte","33.5"
"1","42","token(const void*, int)","Command line","gpu__time_duration.sum","us","9.5"
"1","42","token(const void*, int)","Command line","LOADS.ratio","sector/request","15.75"
"1","42","token(const void*, int)","Command line","STORES.ratio","sector/request","n/a"
""".replace("LOADS", "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_ld").replace(
    "STORES", "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_st"
)


@pytest.fixture
def scripts(monkeypatch):
    """Return the modules of the report by name."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    names = ("device_figures", "device_goals", "device_report")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield types.SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def run(tmp_path):
    """Return a function that starts the script with a stub for Python and for NVIDIA's tools."""

    def write(name, text):
        path = tmp_path / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    python = write("python", STUB.format(python=sys.executable))
    for name in ("ncu", "compute-sanitizer"):
        write(name, TOOL)

    def start(**settings):
        env = {
            **os.environ,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "PYTHON": str(python),
            "OUT": str(tmp_path / "out"),
            "CALLS": str(tmp_path / "calls"),
            "COUNTERS": str(write("recorded.csv", COUNTERS)),
            "WHY": "",
            **settings,
        }
        return subprocess.Popen(
            ["bash", str(SCRIPT)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, encoding="utf-8",
        )  # fmt: skip

    start.out = tmp_path / "out"
    start.calls = tmp_path / "calls"
    return start


def figures(folder):
    return [json.loads(line) for line in (folder / "figures.jsonl").read_text().splitlines()]


# The script


def test_the_script_has_no_error_of_syntax():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def test_without_a_device_each_part_says_why_in_one_line(run):
    process = run(WHY="no NVIDIA device was found")
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    lines = [line for line in text.splitlines() if "could not run" in line]
    parts = re.findall(r"^== \d+ s: (?!the goals)(.*)$", text, re.MULTILINE)
    assert lines == [f"{part}: could not run: no NVIDIA device was found" for part in parts]
    assert [one["name"] for one in figures(run.out)] == parts
    assert len(parts) == 18
    assert text.count("not measured") == 17
    assert not run.calls.exists()
    assert (run.out / "log.txt").read_text("utf-8") == text


def test_parts_run_in_order_and_leave_at_most_eight_files(run):
    process = run()
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 0, text
    calls = [line.partition(" PATH ")[0] for line in run.calls.read_text().splitlines()]
    begins = [
        "benchmarks/probe.py machine", "-m pytest", "-m pytest",
        "-m doraxp verify --device cuda --backend cupy --backend torch --json",
        "benchmarks/probe.py variants",
        *["-m doraxp bench"] * 8, "benchmarks/gpu_kernels.py --folder",
        "benchmarks/quantised_step.py --library cupy", "tool ncu",
        "tool compute-sanitizer for 30", "tool compute-sanitizer for 20",
    ]  # fmt: skip
    assert [call[: len(begin)] for call, begin in zip(calls, begins, strict=True)] == begins
    assert "tests/test_cupy_device.py" in calls[1]
    assert "-p xdist -n 8" in calls[2]
    assert "--backend cupy --shapes 4096x4096 --rank 16 --dtype bfloat16 --tokens" in calls[5]
    assert all("--backend torch --device cuda --shapes" in call for call in calls[6:8])
    assert sum("--backend cupy" in call for call in calls[5:13]) == 6
    names = {path.name for path in run.out.iterdir()}
    assert names == {"figures.jsonl", "log.txt", "h200.json", "h200.png"}
    assert all(re.fullmatch(r"[\w.-]+", name) for name in names)
    kept = figures(run.out)
    assert sum(one["part"] == "bench" for one in kept) == 8
    assert [one["kernel"] for one in kept if one["part"] == "counters"] == ["merge", "token"]
    tools = [(one["tool"], one["errors"]) for one in kept if one["part"] == "sanitizer"]
    assert tools == [("racecheck", 2), ("memcheck", 2)]
    report = json.loads((run.out / "h200.json").read_text())
    assert report["threads"] == {"a": 1}
    assert len(report["counters"]) == 2


def test_a_part_that_fails_does_not_stop_the_others(run):
    process = run(CODE="2")
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "variants: failed with exit status 2" in text
    assert len(run.calls.read_text().splitlines()) == 18


def test_a_part_ends_at_its_time_and_no_part_begins_when_the_time_is_up(run):
    process = run(NAP="60", LIMIT="6", KILL="1", LEAST="3")
    text, _ = process.communicate(timeout=50)  # one nap takes longer
    assert process.returncode == 1
    assert len(run.calls.read_text().splitlines()) == 1
    assert re.search(r"the device: stopped after [3-9] s", text)
    assert re.search(r"variants: could not run: no time is left: \d+ of 6 s are used", text)
    assert text.count("not measured") == 17


def test_a_run_that_is_stopped_leaves_its_figures_and_prints_the_goals(run):
    process = run(NAP="60")
    until = time.monotonic() + 30
    while not run.calls.exists() and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert text.count("not measured") == 17
    assert figures(run.out)[0] == {"part": "probe", "name": "machine"}
    assert (run.out / "h200.json").exists()


def test_wheels_are_installed_into_a_folder_that_goes_afterwards(run, tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "one.whl").touch()
    process = run(WHEELS=str(wheels), LACKS="1")
    process.communicate(timeout=60)
    install, machine, *_ = run.calls.read_text().splitlines()
    found = re.match(r"-m pip install .*--no-index .*--target (\S+) (\S+) PATH ", install)
    assert found[2] == str(wheels / "one.whl")
    assert machine.endswith(f":{found[1]}")
    assert not Path(found[1]).exists()


# The figures


def test_a_half_written_line_is_passed_over_and_spoils_no_other(scripts, tmp_path, capsys):
    keep = scripts.device_figures
    keep.append(tmp_path, "probe", name="one")
    with (tmp_path / "figures.jsonl").open("a") as file:
        file.write('{"part": "probe", "na')
    keep.append(tmp_path, "probe", name="two")
    assert [one["name"] for one in keep.read(tmp_path)] == ["one", "two"]
    assert "an unfinished line was passed over" in capsys.readouterr().err


def test_counters_are_read_in_any_unit(scripts, tmp_path):
    path = tmp_path / "counters.csv"
    path.write_text(COUNTERS)
    merge, token = scripts.device_figures.of_counters(path)
    assert merge == {"kernel": "merge", "bytes_read": 33554432, "microseconds": 25.6}
    assert token == {
        "kernel": "token", "bytes_read": 33.5e6, "microseconds": 9.5, "sectors_per_load": 15.75,
        "sectors_per_store": None,
    }  # fmt: skip
    path.write_text("==ERROR== no permission\n")
    assert list(scripts.device_figures.of_counters(path)) == []


def test_a_comparison_of_libraries_is_a_figure_for_each_library_and_dtype(scripts, tmp_path):
    one = {"backend": "cupy on cuda", "case": "tall", "dtype": "float32", "quantity": "y"}
    right = one | {"share": 0.5, "failure": None, "ok": True}
    wrong = one | {"share": 3.0, "failure": None, "ok": False, "quantity": "dx"}
    failed = one | {"share": None, "failure": "raises", "ok": False, "dtype": "float16"}
    path = tmp_path / "verify.json"
    path.write_text(json.dumps({"figures": [right, wrong, failed]}))
    assert list(scripts.device_figures.of_comparison(path)) == [
        {
            "library": "cupy on cuda", "dtype": "float32", "figures": 2, "worst_share": 3.0,
            "wrong": ["tall, dx: 3.0"],
        },
        {
            "library": "cupy on cuda", "dtype": "float16", "figures": 1, "worst_share": None,
            "wrong": ["tall, y: raises"],
        },
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "errors"),
    [
        ("========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)\n", 3),
        ("========= ERROR SUMMARY: 0 errors\n", 0),
        ("========= COMPUTE-SANITIZER\n", None),
    ],
)
def test_the_errors_of_a_sanitizer_are_those_of_its_summary(scripts, tmp_path, text, errors):
    path = tmp_path / "racecheck.log"
    path.write_text(text)
    assert list(scripts.device_figures.of_sanitizer(path)) == [
        {"tool": "racecheck", "errors": errors}
    ]


def test_a_file_that_a_stopped_part_left_is_in_the_report(scripts, tmp_path, capsys):
    keep = scripts.device_figures
    keep.append(tmp_path, "machine", device={"name": "NVIDIA A100-SXM4-80GB"}, versions={})
    (tmp_path / "bench.json").write_text(json.dumps({"results": [], "threads": {"a": 2}}))
    (tmp_path / "bench.png").touch()
    assert scripts.device_report.main([str(tmp_path)]) == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"figures.jsonl", "a100-sxm4-80gb.json", "a100-sxm4-80gb.png"}
    report = json.loads((tmp_path / "a100-sxm4-80gb.json").read_text())
    assert report["threads"] == {"a": 2}
    assert scripts.device_report.main([str(tmp_path), "nothing"]) == 2


# The goals


def result(task, contestant, sizes, *, median=None, **more):
    ratios = {"over_own_bare": None, "peft_over_it": None}
    ratios |= {key: [0, value, 9] for key, value in more.items() if key in ratios}
    rest = {key: value for key, value in more.items() if key not in ratios}
    case = {"tokens": 4096, **sizes}
    times = {"seconds_quartiles": [0, median, 9], "host_seconds": rest.pop("host", None)}
    return {"task": task, "contestant": contestant, "case": case, **ratios, **times, **rest}


SQUARE = {"out": 4096, "inner": 4096, "rank": 16, "dtype": "bfloat16"}
PYTORCH = {**SQUARE, "autocast": False, "device": "cuda"}
LARGE = {**SQUARE, "out": 8192, "inner": 28672, "rank": 64}


def bench(*results):
    return {"part": "bench", "report": {"results": list(results)}}


def kernels(call, sizes, microseconds, launches=1):
    figure = {"case": sizes, "call": call, "microseconds": microseconds, "launches": launches}
    return {"part": "kernels", **figure}


def quantised(dtype, ratio):
    case = {**SQUARE, "dtype": dtype, "tokens": 512}
    return {"part": "quantised", "call": "step", "case": case, "ratio": ratio}


def test_goals_are_those_of_the_project_and_each_finds_its_figure(scripts):
    token = {"tokens": 1}
    found = [
        bench(
            result("step", "exact", SQUARE, over_own_bare=9.0, peft_over_it=9.0, host=9.0),
            result("step", "exact, exact products", SQUARE, over_own_bare=8.0),
            result("step", "detached", SQUARE, errors={"dA": 1e-6, "dB": 4e-3}),
            result("step", "DoRA", SQUARE, errors={"dA": 1e-2, "dB": 1e-3}),
            result("norm", "‖w‖² reused", SQUARE, median=17e-6),
            result("norm", "from nothing", SQUARE, median=99e-6),
            result("merge", "norm reused", SQUARE, over_own_bare=1.5),
            result("merge", "from nothing", SQUARE, over_own_bare=2.0),
            result("adamw", "adamw_step", SQUARE, host=1e-4),
        ),
        bench(result("step", "exact", {**SQUARE, "inner": 11008}, over_own_bare=1.2)),
        bench(
            result("step", "exact", SQUARE, over_own_bare=1.36, peft_over_it=2.4, host=2e-4),
            result("step", "exact", {**SQUARE, "dtype": "float32"}, over_own_bare=1.05),
            result("evaluation", "norm reused", {**SQUARE, **token}, over_own_bare=1.1),
        ),
        bench(
            result("step", "accelerated, exact", PYTORCH, peft_over_it=2.2),
            result("step", "accelerated, exact", {**PYTORCH, "autocast": True}, peft_over_it=1.9),
            result("step", "DoRA", PYTORCH, errors={"dA": 9.0, "dB": 9.0}),
        ),
        kernels("step", {**SQUARE, "tokens": 128}, 7.0, 99),
        kernels("step", {**SQUARE, "tokens": 4096}, 450.0, 13),
        kernels("bare products", {**SQUARE, "tokens": 4096}, 360.0, 2),
        kernels("step", {**LARGE, "tokens": 4096}, 5000.0, 13),
        quantised("float32", 1.2),
        quantised("bfloat16", 1.9),
        kernels("forward", {**LARGE, **token}, 120.0),
        kernels("bare product", {**LARGE, **token}, 100.0),
    ]
    heading, *lines = scripts.device_goals.table(found)
    assert "4096×4096 of rank 16 in bfloat16, 4096 tokens" in heading
    assert [re.sub("  +", "|", line.strip()) for line in lines] == [
        "exact step ÷ bare, 4096×4096 r16|≤ 1.35|1.36|missed|kernels alone 1.25",
        "exact step ÷ bare, 4096×11008 r16|≤ 1.2|1.2|met",
        "exact step ÷ bare, 8192×28672 r64|≤ 1.12|not measured",
        "PEFT's detached step ÷ our exact step|≥ 2.3|2.4|met",
        "PyTorch alone: PEFT's step ÷ it accelerated, exact|≥ 2|2.2|met",
        "exact step ÷ bare, 4096×4096 float32|≤ 1.08|1.05|met",
        "norm, ‖w‖² known, µs|≤ 18|17|met",
        "merge ÷ copy, n known|≤ 1.4|1.5|missed",
        "merge ÷ copy, from nothing|≤ 2.1|2|met",
        "one token ÷ bare, 4096×4096|≤ 1.1|1.1|met",
        "one token ÷ bare, 8192×28672|≤ 1.15|not measured|kernels alone 1.2",
        "launches of a step|≤ 14|13|met",
        "host time of a step, ms|≤ 0.3|0.2|met",
        "AdamW of 24 leaves, host, ms|≤ 0.15|0.1|met",
        "step on 4 bits ÷ on float32, 512 tokens|≤ 1.3|1.2|met",
        "error of dA ÷ PEFT's, both detached|≤ 1|0.0001|met",
        "error of dB ÷ PEFT's, both detached|≤ 1|4|missed",
    ]


def test_the_goals_find_their_figures_in_a_report_of_the_benchmark(scripts, monkeypatch):
    """The tasks, contestants and keys of the goals are those of `doraxp bench`."""
    from dataclasses import replace

    from doraxp.bench import Measured, Workload
    from doraxp.bench._report import report

    of = Workload(4096, 4096, 4096, 16, "bfloat16")
    one, on_cuda = replace(of, tokens=1), replace(of, device="cuda")
    named = [
        ("step", "bare products", "cupy", "bare", of), ("step", "exact", "cupy", "exact", of),
        ("step", "detached", "cupy", "detached", of), ("step", "DoRA", "PEFT", "detached", of),
        ("norm", "‖w‖² reused", "cupy", "exact", of), ("merge", "bare copy", "cupy", "bare", of),
        ("merge", "norm reused", "cupy", "exact", of),
        ("merge", "from nothing", "cupy", "exact", of),
        ("adamw", "adamw_step", "cupy", "exact", of),
        ("evaluation", "bare product", "cupy", "bare", one),
        ("evaluation", "norm reused", "cupy", "exact", one),
        ("step", "DoRA", "PEFT", "detached", on_cuda),
        ("step", "accelerated, exact", "PEFT", "exact", on_cuda),
    ]  # fmt: skip
    measured = [
        Measured(workload, task, name, library, kind, [1.0], 0, 1.0, {"dA": 1.0, "dB": 1.0})
        for task, name, library, kind, workload in named
    ]
    monkeypatch.setattr("doraxp.bench._report.versions", lambda *_: {})
    monkeypatch.setattr("doraxp.bench._report.device_of", lambda results: None)
    found = [{"part": "bench", "report": report(measured, ["numpy"], {}, {})}]
    lines = scripts.device_goals.table(json.loads(json.dumps(found)))
    missing = [line.split("  ")[1] for line in lines if "not measured" in line]
    assert missing == [
        "exact step ÷ bare, 4096×11008 r16", "exact step ÷ bare, 8192×28672 r64",
        "exact step ÷ bare, 4096×4096 float32", "one token ÷ bare, 8192×28672",
        "launches of a step", "step on 4 bits ÷ on float32, 512 tokens",
    ]  # fmt: skip


# The plugin of pytest


@pytest.mark.parametrize(
    ("options", "seconds", "expected"),
    [
        ((), 60, (2, 1, 1, 0)),
        ((), -1, (0, 0, 0, 4)),
        (("-p", "xdist", "-n", "2"), 60, (2, 1, 1, 0)),
    ],
    ids=["in time", "too late", "two workers"],
)
def test_tests_for_which_no_time_is_left_are_counted(tmp_path, options, seconds, expected):
    if options:
        pytest.importorskip("xdist")
    (tmp_path / "test_another.py").write_text("def test_z(): pass\n")
    (tmp_path / "test_operations.py").write_text(
        "import pytest\n"
        "def test_a(): pass\n"
        "def test_b(): assert 1 == 2, 'the reason'\n"
        "def test_c(): pytest.skip('another reason')\n"
    )
    env = {
        **os.environ, "PYTHONPATH": str(SCRIPT.parent), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "DEVICE_UNTIL": str(time.time() + seconds), "DEVICE_FOLDER": str(tmp_path / "out"),
    }  # fmt: skip
    command = ["-m", "pytest", "-v", "-p", "device_tests", "-p", "no:cacheprovider", *options]
    done = subprocess.run(
        [sys.executable, *command, "."], env=env, capture_output=True, text=True, check=False,
        cwd=tmp_path,
    )  # fmt: skip
    (figure,) = figures(tmp_path / "out")
    names = ("passed", "failed", "skipped", "left")
    assert tuple(figure[name] for name in names) == expected, done.stdout
    assert "{} passed, {} failed, {} skipped, {} left".format(*expected) in done.stdout
    if not options:
        assert done.stdout.index("test_operations.py::") < done.stdout.index("test_another.py::")
    if expected[1]:  # a failure is printed before the summary
        assert done.stdout.index("the reason") < done.stdout.index("= FAILURES =")


def test_the_parts_fit_into_the_time_and_the_page_names_it():
    script = SCRIPT.read_text("utf-8")
    parts = [
        int(each) for each in re.findall(r"^(?:part '[^']*'|sanitize \w+) (\d+)", script, re.M)
    ]
    (benchmark,) = map(int, re.findall(r"benched \+ (\d+)", script))
    (limit,) = map(int, re.findall(r"LIMIT:-(\d+)", script))
    (kill,) = map(int, re.findall(r"KILL:-(\d+)", script))
    page = (ROOT / "docs" / "howto" / "backends" / "cupy-kernels.md").read_text("utf-8")
    table = page.partition("seconds at most")[2].partition("\n\n")[0]
    named = [int(each) for each in re.findall(r"\| (\d+) \|", table)]
    goals = named.pop()
    assert sum(named) == sum(map(int, parts)) + benchmark
    assert sum(named) + goals + kill <= limit == int(*re.findall(r"`LIMIT=(\d+)`", page))
