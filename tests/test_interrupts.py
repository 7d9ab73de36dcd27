"""Ctrl-C in each command: one line, exit status 130, and no file that is written in part."""

from __future__ import annotations

import contextlib
import io
import signal
from pathlib import Path

import numpy as np
import pytest
from checkpoints import draw, write_adapter
from rich.progress import Progress
from safetensors.numpy import save_file

from doraxp._terminal import progress
from doraxp.cli import main

SHAPES = {f"model.layers.{layer}.mlp.{name}_proj": (12, 8) for layer in (0, 1) for name in "ab"}
COMMANDS = {
    "demo": "demo --steps 10 --json new.json --plot new.png",
    "doctor": "doctor base --json new.json",
    "inspect": "inspect adapter --base base --json new.json",
    "inspect alone": "inspect adapter --json new.json",
    "merge": "merge base adapter --out new --json new.json",
    "audit": "audit base adapter base --json new.json",
    "convert": "convert adapter --to lora --base base --rank 2 --out new",
    "extract": "extract base tuned --rank 2 --out new --json new.json",
    "extract --adapter": "extract base --adapter adapter --rank 2 --out new",
    "verify": "verify --backend numpy --json new.json",
    "conform": "conform slow_dora --json new.json --junit new.xml",
    "vectors": "vectors --out new",
    "bench": "bench --backend numpy --tasks norm --shapes 8x8 --rank 2 --rounds 2 --json new.json",
}
MINE = """
import numpy as np

def merge(weight, lora_a, lora_b, magnitude, scaling):
    v = weight + scaling * lora_b @ lora_a
    return (magnitude / np.linalg.norm(v, axis=1))[:, None] * v
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(3)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("base", "tuned"):
        Path(name).mkdir()
        weights = {f"{path}.weight": draw(rng, *shape) for path, shape in SHAPES.items()}
        save_file(weights, f"{name}/model.safetensors")
    write_adapter(tmp_path / "adapter", SHAPES)
    Path("slow_dora.py").write_text(MINE)
    return tmp_path


@pytest.fixture(autouse=True)
def ctrl_c_raises():
    """A job in the background of a shell ignores SIGINT, and so does the pytest that runs in it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def files(folder):
    """Return the names of all files and folders, except those of Python itself."""
    return {
        path.relative_to(folder) for path in folder.rglob("*") if "__pycache__" not in str(path)
    }


@pytest.fixture
def interrupt():
    """Return a function that raises SIGINT once: two threads that call it are one Ctrl-C."""
    signals = [signal.SIGINT]

    def run(*_args, **_options):
        with contextlib.suppress(IndexError):
            signal.raise_signal(signals.pop())

    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_is_one_line_and_leaves_no_part_of_a_file(
    folder, capsys, monkeypatch, interrupt, command
):
    before = files(folder)
    if command == "vectors":
        monkeypatch.setattr("doraxp.testing._vectors._write_tensors", interrupt)
    for method in ("update", "advance"):
        monkeypatch.setattr(Progress, method, interrupt)
    assert main(COMMANDS[command].split()) == 130
    out, error = capsys.readouterr()
    assert out == ""
    first, *others = error.splitlines()
    assert others == []
    name = command.split()[0]
    advice = "; the same command goes on from the shards that are finished, in .new.partial"
    assert first == f"doraxp {name}: interrupted{advice if name == 'merge' else ''}"
    resumed = {path for path in files(folder) if path.parts[0] == ".new.partial"}
    assert files(folder) - resumed == before
    assert bool(resumed) == (name == "merge")


@pytest.mark.parametrize("name", ["dumb", "xterm-256color"])
def test_a_bar_is_drawn_only_where_the_cursor_can_move(monkeypatch, name):
    """Elsewhere rich would print a blank line in front of an error."""
    stream = io.StringIO()
    monkeypatch.setenv("TERM", name)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr("sys.stderr", stream)
    with progress.progress_by_parts() as bar:
        bar.update(bar.add_task("a [name]", total=3), advance=1)
    assert ("\x1b[?25l" in stream.getvalue()) == (name != "dumb")
    assert ("a [name]" in stream.getvalue()) == (name != "dumb")
    assert bool(stream.getvalue()) == (name != "dumb")


def test_both_bars_have_the_same_columns_except_for_the_unit():
    bars = [bar().columns for bar in (progress.progress_by_parts, progress.progress_by_bytes)]
    parts, sizes = ([type(column).__name__ for column in columns] for columns in bars)
    assert [*parts[:1], *parts[2:]] == [*sizes[:1], *sizes[2:]]
    assert len(parts) == 5
