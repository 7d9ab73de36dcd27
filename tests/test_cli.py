"""The command line: the demo's laws on real digits, its files, and the arguments it refuses."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import doraxp
from doraxp._base.extras import install_hint
from doraxp._terminal.runtimes import runtime
from doraxp.cli import _cluster, main
from doraxp.demo import BaseRun, Results, Run, Settings, print_results

SHAPES = {
    "linear": ((128, 64), (128, 128), (10, 128)),
    "convolutional": ((16, 9), (32, 144), (10, 512)),
}
"""(out, in) or (out, in·kernel) of the layers of the demo's networks."""


@pytest.fixture(scope="module", params=SHAPES)
def demo(request, tmp_path_factory):
    """One run of the demo, small."""
    folder = tmp_path_factory.mktemp("demo")
    plot, figures = folder / "demo.png", folder / "demo.json"
    rank = {"linear": "4", "convolutional": "8"}[request.param]
    arguments = ["--network", request.param, "--rank", rank, "--steps", "200", "--plot", str(plot)]
    assert main(["demo", *arguments, "--json", str(figures)]) == 0
    return plot, json.loads(figures.read_text())


def test_the_picture_is_a_png(demo):
    assert demo[0].read_bytes().startswith(b"\x89PNG\r\n")


def test_methods_read_digits_that_the_frozen_base_cannot(demo):
    _, figures = demo
    assert min(figures["base"]["upright_accuracy"]["values"]) > 0.9
    assert max(figures["base"]["turned_accuracy"]["values"]) < 0.4
    least = {"linear": 0.7, "convolutional": 0.4}[figures["arguments"]["network"]]
    for name, method in figures["methods"].items():
        assert min(method["accuracy"]["values"]) > least, name
        assert len(method["accuracy"]["values"]) == 3


def test_merging_changes_no_accuracy(demo):
    _, figures = demo
    adapters = ("LoRA", "DoRA detached", "DoRA exact")
    assert tuple(figures["methods"]) == (*adapters, "full fine-tuning")
    for name in adapters:
        method = figures["methods"][name]
        assert method["merged_accuracy"]["values"] == method["accuracy"]["values"]
        assert 0 < max(method["largest_difference"]["values"]) < 1e-3
    assert figures["methods"]["full fine-tuning"]["merged_accuracy"] is None


def test_trainable_parameters_are_those_of_the_formula(demo):
    _, figures = demo
    shapes = SHAPES[figures["arguments"]["network"]]
    rank = figures["arguments"]["rank"]
    lora = sum(rank * (out + inner) for out, inner in shapes)
    counts = {
        "LoRA": lora,
        "DoRA detached": lora + sum(out for out, _ in shapes),
        "DoRA exact": lora + sum(out for out, _ in shapes),
        "full fine-tuning": sum(out * inner + out for out, inner in shapes),
    }
    for name, count in counts.items():
        assert figures["methods"][name]["trainable_parameters"] == count


def test_the_learning_rates_are_those_of_the_sweep_of_the_network(demo):
    _, figures = demo
    rates = {name: method["learning_rate"] for name, method in figures["methods"].items()}
    chosen = {"linear": (0.03, 0.03, 0.03, 0.02), "convolutional": (0.03, 0.02, 0.02, 0.03)}
    assert tuple(rates.values()) == chosen[figures["arguments"]["network"]]


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"doraxp {doraxp.__version__}\n"


COMMANDS = (
    "demo", "doctor", "inspect", "merge", "audit", "convert", "extract", "verify", "conform",
    "vectors", "bench", "completion",
)  # fmt: skip
"""In the order in which a user meets them."""


def modules_after(code):
    """Return the modules that a fresh Python has imported after some code."""
    code = f"import sys\ntry:\n    {code}\nfinally:\n    print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(ran.stdout.splitlines()[-1].split())


def test_the_package_loads_no_module_that_only_a_command_needs():
    absent = {"doraxp.cli", "doraxp.bench", "doraxp.demo", "doraxp._terminal"}
    assert not modules_after("import doraxp") & absent


def test_all_commands_are_listed_without_what_an_extra_installs():
    loaded = modules_after("import doraxp.cli; doraxp.cli.main(['--help'])")
    assert {f"doraxp.cli.{name}" for name in COMMANDS} <= loaded
    assert not loaded & {"rich", "matplotlib", "ml_dtypes", "safetensors", "torch", "peft"}


def test_a_command_starts_without_the_modules_of_the_others():
    loaded = modules_after("import doraxp.cli; doraxp.cli.main(['merge', '--help'])")
    assert {f"doraxp.cli.{name}" for name in COMMANDS} & loaded == {"doraxp.cli.merge"}
    assert not loaded & {"doraxp.bench", "doraxp.demo", "doraxp.testing"}


def listed(text):
    """Return the commands that a help lists, and the texts beside them."""
    return dict(re.findall(r"^  (\w+) {2,}(\w.*)$", text, re.MULTILINE))


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["help"]])
def test_the_help_lists_all_commands_by_purpose_in_one_line_each(capsys, words):
    with pytest.raises(SystemExit, match="0"):
        main(words)
    text = capsys.readouterr().out
    assert tuple(listed(text)) == COMMANDS
    assert all(summary.endswith(".") for summary in listed(text).values()), "each fits 80 columns"
    purposes = re.findall(r"^(\w[\w ]*):$", text, re.MULTILINE)
    assert purposes == [
        "see it work", "adapters and models on disk", "tests and measurements", "the shell",
        "options",
    ]  # fmt: skip


def test_a_call_without_a_command_prints_the_help_with_status_2_as_ruff_does(capsys):
    """Such a call does nothing, so a script must not take it for success. git has status 1."""
    assert main([]) == 2
    out, help_text = capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["--help"])
    assert (out, help_text) == ("", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (
            ["merg", "a", "b"],
            "doraxp: error: COMMAND must be one that doraxp --help lists, got 'merg': the nearest "
            "is merge",
        ),
        (["xyz"], "doraxp: error: COMMAND must be one that doraxp --help lists, got 'xyz'"),
        (
            ["merge", "a", "b", "--out", "c", "--jbos=3"],
            "doraxp merge: error: an option must be one that doraxp merge --help lists, got "
            "'--jbos=3': the nearest is --jobs",
        ),
        (
            ["merge", "a", "b", "c", "--out", "d"],
            "doraxp merge: error: an argument is left over: c; doraxp merge --help lists all",
        ),
        (
            ["merge", "--base", "a", "--adapter", "b", "--out", "c"],
            "doraxp merge: error: BASE has no name before it, got '--base': write doraxp merge "
            "BASE ADAPTER --out OUT [options]",
        ),
        (
            ["merge", "a", "b", "--out", "c", "--verif"],
            "doraxp merge: error: an option must be one that doraxp merge --help lists, got "
            "'--verif': the nearest is --verify",
        ),
        (
            ["vectors"],
            "doraxp vectors: error: the following arguments are required: --out: doraxp vectors "
            "--help describes them",
        ),
        (
            ["--nothing"],
            "doraxp: error: the following arguments are required: COMMAND: doraxp "
            "--help describes them",
        ),
    ],
)
def test_a_word_that_does_not_fit_is_refused_with_the_nearest(capsys, words, error):
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert capsys.readouterr().err == f"{error}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_has_its_arguments_in_one_line_and_an_example(capsys, name):
    texts = []
    for words in ([name, "--help"], ["help", name]):
        with pytest.raises(SystemExit, match="0"):
            main(words)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    usage, blank = texts[0].splitlines()[:2]
    assert usage.startswith(f"usage: doraxp {name} ")
    assert blank == ""
    assert f"\nexample: doraxp {name}" in texts[0]


def test_python_m_doraxp_is_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["doraxp", "--version"])
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module("doraxp.__main__")
    assert "doraxp" in capsys.readouterr().out


def test_a_rate_that_is_too_large_is_shown_and_written_as_null(tmp_path, capsys):
    figures = tmp_path / "out.json"
    arguments = ["--learning-rate", "1e9", "--steps", "20", "--plot", str(tmp_path / "a.png")]
    assert main(["demo", *arguments, "--json", str(figures)]) == 0
    lora = json.loads(figures.read_text(), parse_constant=pytest.fail)["methods"]["LoRA"]
    assert lora["largest_difference"]["mean"] is None
    assert "nan" in capsys.readouterr().out


def test_the_table_has_the_figures_of_the_runs(capsys):
    def runs(*accuracies):
        return [Run(accuracy, accuracy - 0.5, 2e-6, 1234, 1.5, [], {}) for accuracy in accuracies]

    methods = {"LoRA": runs(0.9, 0.7), "DoRA exact": runs(0.8, 1.0)}
    methods["full fine-tuning"] = [
        replace(run, merged_accuracy=None, largest_difference=None) for run in runs(1.0, 1.0)
    ]
    base = [BaseRun(0.98, 0.1, 1.0), BaseRun(1.0, 0.3, 1.0)]
    results = Results(Settings(seeds=2, rank=3, steps=7), 5, 6, base, methods)
    print_results(results, Console(width=100))
    lines = capsys.readouterr().out.splitlines()
    cells = {line.split("  ")[0].strip(): " ".join(line.split()) for line in lines}
    assert cells["frozen base"] == "frozen base 20.0 ± 14.1 0 – – –"
    lora = "LoRA 80.0 ± 14.1 1,234 1.50 ± 0.00 30.0 ± 14.1 2.0 ± 0.0"
    assert cells["LoRA"] == lora
    assert cells["DoRA exact"] == lora.replace("LoRA 80", "DoRA exact 90").replace("30.0", "40.0")
    assert cells["full fine-tuning"] == "full fine-tuning 100.0 ± 0.0 1,234 1.50 ± 0.00 – –"
    assert "linear: rank 3, 7 steps, float32 on numpy" in lines[0]
    text = " ".join(" ".join(lines).split())
    assert "standard deviation of 2 seeds, on 6 test digits; upright, the base reads" in text
    assert "99.0 ± 1.4 % of them" in text
    assert text.endswith(
        "No adapter is first: DoRA exact is 10.0 ± 28.3 points ahead of LoRA, which is within the "
        "spread of the seeds."
    )


def test_an_adapter_is_first_only_outside_the_spread_of_the_seeds(capsys):
    def verdict(lora, dora):
        methods = {
            name: [Run(accuracy, accuracy, 2e-6, 1, 1.5, [], {}) for accuracy in accuracies]
            for name, accuracies in (("LoRA", lora), ("DoRA exact", dora))
        }
        base = [BaseRun(0.98, 0.1, 1.0)] * 2
        print_results(Results(Settings(seeds=2), 5, 6, base, methods), Console(width=100))
        return " ".join(capsys.readouterr().out.split("\n\n")[-1].split())

    first = "First of the adapters: DoRA exact, 10.0 ± 1.4 points ahead of LoRA."
    assert verdict([0.8, 0.8], [0.89, 0.91]) == first
    assert verdict([0.8, 0.8], [0.8, 0.82]).startswith("No adapter is first: DoRA exact is 1.0 ±")
    assert verdict([0.8, 0.9], [0.8, 0.9]).startswith("No adapter is first: LoRA is 0.0 ± 0.0")


def test_a_full_disk_and_an_interrupt_end_without_a_traceback(monkeypatch, capsys):
    def fail(_):
        raise OSError(28, "No space left on device", "out.json")

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("doraxp.cli.demo.run", fail)
    assert main(["demo"]) == 2
    expected = "doraxp demo: error: out.json: No space left on device\n"
    assert capsys.readouterr().err == expected
    monkeypatch.setattr("doraxp.cli.demo.run", interrupt)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "doraxp demo: interrupted\n"


def test_a_reader_that_goes_away_is_not_an_error(monkeypatch, capsys):
    def fail(_):
        raise BrokenPipeError(32, "Broken pipe")

    dropped = []
    monkeypatch.setattr("doraxp.cli.demo.run", fail)
    monkeypatch.setattr("doraxp.cli.drop_output", lambda: dropped.append("all"))
    assert main(["demo"]) == 0
    assert (dropped, capsys.readouterr()) == (["all"], ("", ""))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "0"], "argument --rank: must be an integer, in 1..10, got '0'"),
        (["--rank", "99"], "argument --rank: must be an integer, in 1..10, got '99'"),
        (["--network", "deep"], "argument --network: invalid choice: 'deep' (choose from"),
        (["--seeds", "2"], "argument --seeds: must be an integer, at least 3, got '2'"),
        (["--seed", "x"], "argument --seed: must be an integer, at least 0, got 'x'"),
        (["--backend", "abacus"], "must be one of numpy, torch, jax, cupy, got 'abacus'"),
        (["--backend", "cupy"], "cupy cannot run here: "),
        (["--learning-rate", "x"], "must be a number, finite and above 0, got 'x'"),
        (["--learning-rate", "-1"], "must be a number, finite and above 0, got '-1'"),
        (["--plot", "a.jpg"], "argument --plot: must end in .png, got 'a.jpg'"),
        (["--json", "none/a.json"], "must be a file in a folder that exists, got 'none/a.json'"),
    ],
)
def test_bad_arguments_are_refused_before_any_training(capsys, monkeypatch, arguments, message):
    nothing = [doraxp.backends.Status("cupy", False, "no device")]
    monkeypatch.setattr("doraxp.backends.available", lambda: nothing)
    with pytest.raises(SystemExit, match="2"):
        main(["demo", *arguments])
    assert message in capsys.readouterr().err


def test_a_rank_above_that_of_the_network_is_refused_before_any_training(capsys, monkeypatch):
    monkeypatch.setattr("doraxp.cli.demo.experiment", pytest.fail)
    assert main(["demo", "--network", "convolutional", "--rank", "10"]) == 2
    assert capsys.readouterr().err == (
        "doraxp demo: error: --rank must be in 1..9 for --network convolutional, got 10\n"
    )


def test_a_file_that_cannot_be_written(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(SystemExit, match="2"):
        main(["demo", "--plot", str(tmp_path / "a.png")])
    assert "argument --plot: must be writable" in capsys.readouterr().err


def test_without_the_extra_it_says_how_to_get_it(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["demo"]) == 2
    assert install_hint("demo") in capsys.readouterr().err


def test_good_arguments_reach_the_run(monkeypatch):
    usable = [doraxp.backends.Status("torch", True, "2.13.0")]
    monkeypatch.setattr("doraxp.backends.available", lambda: usable)
    seen = []
    monkeypatch.setattr("doraxp.cli.demo.run", lambda arguments: seen.append(arguments) or 0)
    assert main(["demo", "--backend", "torch", "--learning-rate", "0.5", "--rank", "2"]) == 0
    (arguments,) = seen
    assert (arguments.backend, arguments.learning_rate, arguments.rank) == ("torch", 0.5, 2)
    assert (arguments.seed, arguments.seeds, arguments.json) == (0, 3, None)


def test_jax_compiles_and_every_runtime_waits_for_its_results(monkeypatch):
    registered, synchronised = [], []
    stream = types.SimpleNamespace(synchronize=lambda: synchronised.append("cupy"))
    modules = {
        "jax": types.SimpleNamespace(
            jit="jit",
            block_until_ready="wait",
            tree_util=types.SimpleNamespace(register_static=registered.append),
        ),
        "jax.numpy": types.SimpleNamespace(asarray="jax's"),
        "cupy": types.SimpleNamespace(
            asarray="cupy's", cuda=types.SimpleNamespace(get_current_stream=lambda: stream)
        ),
        "numpy": np,
    }
    monkeypatch.setattr("importlib.import_module", modules.__getitem__)
    assert runtime("jax") == ("jax", "jax's", "jit", "wait")
    assert registered == [doraxp.Config]
    cupy, numpy = runtime("cupy"), runtime("numpy")
    assert (cupy.asarray, numpy.asarray) == ("cupy's", np.asarray)
    assert cupy.compiled(len) is numpy.compiled(len) is len
    assert numpy.wait(1) == 1
    assert synchronised == []
    assert cupy.wait(2) == 2
    assert synchronised == ["cupy"]


@pytest.mark.parametrize(
    "command",
    [
        "verify --backend numpy",
        "demo --seeds 3 --steps 10 --plot {}.png",
        "bench --backend numpy --tasks norm --shapes 8x8 --rank 2 --rounds 2 --plot {}.png",
    ],
)
def test_a_file_is_named_as_it_is(tmp_path, capsys, monkeypatch, command):
    """Brackets in a name are not markup and cause no error after the work is done."""
    monkeypatch.chdir(tmp_path)
    name = "run[red][bold] :smile:"
    words = [word.format(name) for word in command.split()]
    assert main([*words, "--json", f"{name}.json"]) == 0
    printed = capsys.readouterr().out
    assert f"Figures: {name}.json" in printed
    assert ".png" not in command or f"Picture: {name}.png" in printed


class ClusterOf:
    """A Dask client whose processes have these versions of modules."""

    def __init__(self, scheduler, worker):
        self._scheduler, self._worker = scheduler, worker

    def run_on_scheduler(self, *_):
        return self._scheduler

    def run(self, *_):
        return {"tcp://1": self._worker}


VERSIONS = {name: importlib.import_module(name).__version__ for name in _cluster.NEEDED}


@pytest.mark.parametrize("process", ["the scheduler", "the worker tcp://1"])
@pytest.mark.parametrize("name", _cluster.NEEDED)
def test_each_process_of_a_cluster_needs_each_module_in_the_same_version(process, name):
    def problem(found):
        lacking = VERSIONS | found if found else {k: VERSIONS[k] for k in VERSIONS if k != name}
        is_worker = process != "the scheduler"
        client = ClusterOf(*((VERSIONS, lacking) if is_worker else (lacking, VERSIONS)))
        return _cluster._problem(client, _cluster.NEEDED)

    assert problem({}) == (
        f"{process} has no {name}: install doraxp[distributed]=={doraxp.__version__} there"
    )
    assert problem(VERSIONS) is None
    another = f"{process} has {name} 0, but here it is {VERSIONS[name]}: make them the same"
    decides = name in ("numpy", "ml_dtypes", "doraxp")
    assert problem({name: "0"}) == (another if decides else None)


COMPLETED = """
source "$1"
COMP_WORDS=(doraxp "${@:2}"); COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 ))
_shtab_doraxp
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        (["me"], {"merge"}),
        (["ver"], {"verify"}),
        (["con"], {"conform", "convert"}),
        (["merge", "--verif"], {"--verify"}),
        (["merge", "--rounding", ""], {"nearest", "stochastic"}),
        (["merge", "mod"], {"model"}),
        (["merge", "model", "adapter", "--out", "mod"], {"model"}),
        (["convert", "--to", "ml"], {"mlx"}),
        (["completion", "ba"], {"bash"}),
    ],
)
def test_bash_completes_commands_options_choices_and_files(tmp_path, capsys, words, completed):
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "doraxp.bash"
    script.write_text(capsys.readouterr().out, "utf-8")
    (tmp_path / "model").mkdir()
    ran = subprocess.run(
        ["bash", "-c", COMPLETED, "bash", str(script), *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(ran.stdout.split()) == completed
    assert ran.stderr == ""


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_script_for_another_shell_has_all_commands(capsys, shell):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in COMMANDS)


def test_completion_without_its_library_says_how_to_get_it(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["completion", "bash"]) == 2
    assert install_hint("completion") in capsys.readouterr().err


def test_the_page_on_the_command_line_is_that_of_the_parser():
    path = Path(__file__).parents[1] / "docs" / "command_line.py"
    spec = importlib.util.spec_from_file_location("command_line", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PAGE.read_text("utf-8") == script.page(), "run python docs/command_line.py"


def test_an_error_of_the_system_names_the_file_first(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["conform", "json", "--expected", "nofile"]) == 2
    error = "doraxp conform: error: json: nofile: No such file or directory\n"
    assert capsys.readouterr().err == error
