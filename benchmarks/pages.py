"""Write the pages of dated runs, docs/benchmarks/*.md, each from the JSON beside it.

    python benchmarks/pages.py                        write all pages
    python benchmarks/pages.py cpu --run              measure, write cpu.json, then cpu.md
    python benchmarks/pages.py merge --run --folder F   keep the models of 4 GB in F

The machine must be idle for `--run`. A JSON has a list of runs, one for each command. A run has its
command, the date and the machine, and the report of the command. docs/benchmarks/h200.md is the
page of one run of `device.sh`; this script does not write it. It needs the standard library alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import page_bodies as bodies
from dated import conditions

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "benchmarks"
Run: TypeAlias = dict[str, Any]
TRANSCRIBED = (
    "The figures were copied from an older page, so [{name}.json]({name}.json) has no more digits."
)


class Page(NamedTuple):
    """A page, and the commands that measure its figures."""

    title: str
    about: str
    commands: tuple[str, ...]
    """{json} is the file for the report, {folder} a folder for large files."""
    body: Callable[[list[Run]], Iterator[str]]
    drawn: str = ""
    """The command that draws pictures from the JSON."""


def main() -> int:
    """Measure if asked to; write the pages."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PAGES)}")
    parser.add_argument("--run", action="store_true", help="measure first")
    parser.add_argument("--folder", type=Path, help="for the models of merge")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(PAGES):
        parser.error(f"NAME must be one of {', '.join(PAGES)}, got {', '.join(sorted(unknown))}")
    if arguments.run and not arguments.names:
        parser.error("--run needs a NAME: each page takes minutes of an idle machine")
    for name in arguments.names or PAGES:
        if arguments.run:
            runs = measured(PAGES[name], arguments.folder)
            (FOLDER / f"{name}.json").write_text(json.dumps(runs, indent=1) + "\n", "utf-8")
            if PAGES[name].drawn:
                shell(PAGES[name].drawn)
        (FOLDER / f"{name}.md").write_text(text_of(name), "utf-8")
    return 0


def measured(page: Page, folder: Path | None) -> list[Run]:
    """Run the commands of a page; return their reports with date and machine.

    A goal that is missed makes a script end with 1, and the page shows it in bold.
    """
    runs = []
    with tempfile.TemporaryDirectory() as work:
        for number, command in enumerate(page.commands):
            file = Path(work) / f"{number}.json"
            shell(command.format(json=file, folder=folder or work), at_most=1)
            report = json.loads(file.read_text("utf-8"))
            report = {"models": report} if isinstance(report, list) else report
            runs.append({"command": shown(command), "run": conditions(), **report})
    return runs


def shell(command: str, at_most: int = 0) -> None:
    """Run a command at the root of the project; an exit status above `at_most` is an error."""
    print("+", command, flush=True)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PYTHONPATH": "src", "PATH": path}
    done = subprocess.run(["bash", "-euc", command], cwd=ROOT, env=environment, check=False)
    if not 0 <= done.returncode <= at_most:
        raise subprocess.CalledProcessError(done.returncode, command)


def shown(command: str) -> str:
    """Return a command as the page has it."""
    return command.format(json="out.json", folder="FOLDER")


def text_of(name: str) -> str:
    """Return a page, from its JSON alone."""
    page, runs = PAGES[name], json.loads((FOLDER / f"{name}.json").read_text("utf-8"))
    lines = [f"# {page.title}", "", page.about, "", "```text"]
    lines += [*dict.fromkeys(run["command"] for run in runs), "```", ""]
    lines += [*conditions_of(name, runs), "", *page.body(runs), ""]
    lines += [
        f"All figures: [{name}.json]({name}.json). `python benchmarks/pages.py {name}` makes this",
        "page of them; with `--run` it measures first.",
    ]
    return "\n".join(lines) + "\n"


def conditions_of(name: str, runs: list[Run]) -> Iterator[str]:
    """Yield a line for each machine and date."""
    made = [run["run"] for run in runs]
    lines = (
        f"- {one['date']}: {machine(one)}{details(run)}"
        for one, run in zip(made, runs, strict=True)
    )
    for line in dict.fromkeys(lines):
        yield from textwrap.wrap(line, 110, subsequent_indent="  ", break_long_words=False)
    if any(one.get("transcribed") for one in made):
        yield from ("", TRANSCRIBED.format(name=name))


def machine(made: Run) -> str:
    """Return the processor and its cores, as far as known."""
    return made["processor"] + (f", {made['cores']} cores" if made.get("cores") else "")


def details(run: Run) -> str:
    """Return the kernels of the BLAS, the versions and the note of a run, as far as known."""
    parts = [f"OpenBLAS's kernels for {run['run']['blas']}"] if run["run"].get("blas") else []
    parts += [f"{key} {value}" for key, value in run.get("versions", {}).items()]
    text = "; " + ", ".join(parts) if parts else ""
    return text + (f". {run['run']['note']}." if run["run"].get("note") else "")


CPU = """A layer of 4096×4096, rank 16 in float32, unless the row names another. A value in
bold misses its goal. [Cost in time and memory](../explanation/cost.md) says what bounds them."""
CURVES = """A float32 step on NumPy around 4096×4096, 512 tokens, rank 16.
[Cost in time and memory](../explanation/cost.md) reads the curves."""
DEMO = """[The demo](../tutorials/demo.md) reads the table. The script draws the pictures too, for
light and for dark pages. Its figures are those of `doraxp demo`."""
MERGE = """Merges of a model of 4 GB. [Merge an adapter into a model](../howto/merge.md) and
[Merge into a quantised model](../howto/quantised.md) say how they work."""
OPERATORS = """A step of a DoRA layer of PEFT, accelerated, ÷ that of PEFT's own layer: a
convolution of 64 to 64 channels, 3×3, with x of 16×64×32×32, and an embedding of
30,000×384 with 512 ids.
[Accelerate PEFT's DoRA](../howto/backends/peft.md) says how a layer is accelerated."""
LAYERS = """One layer of rank 16, beside PEFT's own layer in the same process. Below 1 doraxp is
faster, or needs less memory.
[Accelerate PEFT's DoRA](../howto/backends/peft.md) reads the tables."""
AUDIT = """Faults are planted in small models, and right merges by doraxp and PEFT are audited too.
Time and memory are those of a bfloat16 model. [Audit a merge](../howto/audit.md) has the rules."""
EXTRACT = """Adapters of a full fine-tune of all-MiniLM-L6-v2. Errors are medians over its matrices,
as parts of ‖W* − W‖. The accuracy is that on 500 unseen pairs.
[Extract an adapter from a full fine-tune](../howto/extract.md) says how."""
QDORA = """The step of a 4-bit weight, 4096×4096, beside that of the float32 array of its rows, in
turns, on NumPy. [Train on a quantised base (QDoRA)](../howto/qdora.md) says how."""
BENCH = "python -m doraxp bench"
SWEEP = f"{BENCH} --backend torch --tasks step evaluation"
PAGES = {
    "audit": Page(
        "Auditing a merge",
        AUDIT,
        ("python benchmarks/audit.py {folder} --gigabytes 0.5 --json {json}",),
        bodies.goals,
    ),
    "cpu": Page(
        "NumPy and PEFT on a CPU, beside the goals",
        CPU,
        (
            "python benchmarks/check.py --json {json}",
            "OPENBLAS_CORETYPE=Haswell python benchmarks/check.py --json {json}",
        ),
        bodies.goals,
    ),
    "curves": Page(
        "How time and memory grow",
        CURVES,
        (f"{BENCH} --curves --backend numpy --json {{json}}",),
        bodies.curves,
        "python docs/figures/curves.py",
    ),
    "demo": Page(
        "The demo's figures",
        DEMO,
        (
            "python docs/figures/demo.py --json {json}",
            "python docs/figures/demo.py --network convolutional --json {json}",
        ),
        bodies.demo,
    ),
    "extract": Page(
        "Extracting adapters",
        EXTRACT,
        ("python benchmarks/extract.py --json {json}",),
        bodies.wide,
    ),
    "merge": Page(
        "Merging a checkpoint",
        MERGE,
        (
            "python benchmarks/checkpoint.py {folder} --json {json}",
            "python benchmarks/quantised.py {folder} --json {json}",
        ),
        bodies.goals,
    ),
    "operators": Page(
        "Convolutions and embeddings of PEFT",
        OPERATORS,
        (
            "OMP_NUM_THREADS=2 OPENBLAS_NUM_THREADS=2 python benchmarks/operators.py \\\n"
            "    --rounds 11 --threads 1 2 --json {json}",
        ),
        bodies.goals,
    ),
    "peft": Page(
        "PEFT's layers and models, accelerated",
        LAYERS,
        (
            f"{SWEEP} --rounds 5 --json {{json}} \\\n"
            "    --shapes 64x64 256x256 512x512 1024x1024 2048x2048 --tokens 1 64 512",
            f"{SWEEP} --rounds 3 --json {{json}} \\\n"
            "    --dtype bfloat16 --shapes 64x64 256x256 512x512 1024x1024 --tokens 1 64",
            "python benchmarks/models.py --json {json}",
        ),
        bodies.layers,
    ),
    "qdora": Page(
        "A step on a 4-bit weight",
        QDORA,
        (
            "OMP_NUM_THREADS=2 OPENBLAS_NUM_THREADS=2 python benchmarks/quantised_step.py "
            "--json {json}",
        ),
        bodies.wide,
    ),
}

if __name__ == "__main__":
    sys.exit(main())
