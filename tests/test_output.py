"""The output of `merge`, `inspect` and `convert`: its width, its encoding and its figures."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import draw, factors, peft_config, write_adapter
from checkpoints import write_json as write_config
from safetensors.numpy import load_file, save_file

import doraxp
from doraxp._base.printable import printable
from doraxp._terminal import adapter_picture
from doraxp._terminal.figures import write_json
from doraxp._terminal.module_table import kind_of
from doraxp._terminal.tables import new_console, plain_console, print_table
from doraxp.checkpoint import Change, load_adapters, look_at_base, open_model
from doraxp.cli import main

MODULES = {"self_attn.q_proj": (8, 8), "mlp.down_proj": (8, 12)}
LAYERS = 12


@pytest.fixture
def llama(tmp_path, monkeypatch):
    """A model of 12 layers of two kinds, its adapter, and a terminal of 80 columns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    rng = np.random.default_rng(1)
    shapes = {
        f"model.layers.{layer}.{name}": shape
        for layer in range(LAYERS)
        for name, shape in MODULES.items()
    }
    weights = {f"{path}.weight": draw(rng, *shape) for path, shape in shapes.items()}
    (tmp_path / "base").mkdir()
    save_file(weights, tmp_path / "base" / "model.safetensors")
    write_adapter(
        tmp_path / "adapter", shapes, rank_pattern={}, alpha_pattern={r"layers\.0\..*": 5}
    )
    return tmp_path


def table(text):
    """Return the cells of the rows of a table, by the first one."""
    rows = [line.split() for line in text.splitlines()]
    return {cells[0]: cells[1:] for cells in rows if cells}


def test_merge_prints_a_row_for_each_kind_of_module_in_80_columns(llama, capsys):
    assert main(["merge", "base", "adapter", "--out", "out", "--json", "m.json"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert max(map(len, lines[: lines.index(next(x for x in lines if "peft adapter" in x))])) <= 80
    changed = json.loads((llama / "m.json").read_text())["changed"]
    rows = table(out)
    for kind in ("q_proj", "down_proj"):
        group = [row for name, row in changed.items() if f".{kind}." in name]
        figures = [
            statistics.median(row["magnitude"] for row in group),
            statistics.median(row["direction"] for row in group),
            max(row["largest"] for row in group),
            *([min(row["kept"] for row in group)] if "kept" in Change._fields else []),
        ]
        assert rows[kind] == [str(LAYERS), "2", *(f"{figure:.3g}" for figure in figures)]
    caption = re.sub(r"\s+", " ", out)
    assert "ΔM: mean change of the norms of the rows. ΔD: mean 1 − cosine of the rows." in caption


def test_the_json_of_a_merge_has_everything(llama):
    paths = ["base", "adapter", "--out", "out"]
    assert main(["merge", *paths, "--json", "m.json", "--dtype", "float16", "--verify"]) == 0
    report = json.loads((llama / "m.json").read_text())
    changed = report.pop("changed")
    assert report["out"] == str(llama / "out")
    assert (report["verified"], report["files"]) == (True, 1)
    (own,) = report["adapters"]
    assert (own["format"], own["strength"]) == ("peft", 1.0)
    assert report["options"]["dtype"] == "F16"
    assert report["tensors"] == len(changed) == 2 * LAYERS
    assert report["bytes"] == sum(row["bytes"] for row in changed.values())
    row = changed["model.layers.0.mlp.down_proj.weight"]
    assert {*Change._fields} < row.keys()
    expected = {"kind": "linear", "rank": 2, "s": 2.5, "dtype": "F16", "shape": [8, 12]}
    assert {key: row[key] for key in expected} == expected
    assert changed["model.layers.1.mlp.down_proj.weight"]["s"] == 1.5
    assert row["bytes"] == 192
    assert main(["merge", "base", "adapter", "--out", "new", "--json", "m.json", "--dry-run"]) == 0
    dry = json.loads((llama / "m.json").read_text())
    assert (dry["out"], dry["verified"]) == (None, False)
    assert "largest" not in dry["changed"]["model.layers.0.mlp.down_proj.weight"]


def test_a_replaced_tensor_is_a_row_without_figures(llama, capsys):
    path = llama / "adapter" / "adapter_model.safetensors"
    name = "model.layers.0.self_attn.q_proj.bias"
    base = llama / "base" / "model.safetensors"
    for file, key in ((path, f"base_model.model.{name}"), (base, name)):
        save_file(load_file(file) | {key: np.ones(8, np.float32)}, file)
    assert main(["merge", "base", "adapter", "--out", "o", "--json", "m.json", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert table(out)["bias"] == ["1", "replaced", "F32"]
    row = json.loads((llama / "m.json").read_text())["changed"][name]
    assert row == {"kind": "replaced", "dtype": "F32", "shape": [8], "bytes": 32}


@pytest.mark.parametrize("command", ["merge", "dry", "inspect", "inspect --base base"])
def test_all_rows_fit_80_columns_where_the_names_share_a_start(llama, capsys, command):
    words = {
        "merge": ["merge", "base", "adapter", "--out", "out"],
        "dry": ["merge", "base", "adapter", "--out", "out", "--dry-run"],
    }.get(command, ["inspect", "adapter", *command.split()[1:]])
    assert main([*words, "--all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if "_proj" in line]
    assert len(rows) == 2 * LAYERS
    assert max(map(len, rows)) <= 80
    if rows[0].startswith("…"):
        assert "… is model.layers." in lines
        rows = [row.replace("…", "model.layers.") for row in rows]
    ends = (".weight", "") if command.startswith("inspect") else ("", ".weight")
    paths = {row.split()[0].removesuffix(ends[0]) for row in rows}
    assert paths == {f"{path}{ends[1]}" for path in load_adapters(llama / "adapter")}


def test_the_last_part_of_a_name_is_never_left_out(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "10")
    print_table(("name", "x"), [("block.a.weight", "1"), ("block.a.weight", "2")], plain_console())
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[-3:-1]] == [["…weight", "1"], ["…weight", "2"]]
    assert lines[-1] == "… is block.a."


@pytest.mark.parametrize(("width", "is_cut"), [(18, False), (17, True)])
def test_the_columns_of_a_table_move_together_before_names_are_cut(
    capsys, monkeypatch, width, is_cut
):
    monkeypatch.setenv("COLUMNS", f"{width}")
    print_table(("name", "x", "y"), [("block.a.weight", "1", "2")], plain_console())
    assert ("… is block.a." in capsys.readouterr().out) == is_cut


@pytest.mark.parametrize("console", [new_console, plain_console])
def test_a_number_has_the_colour_of_the_words_beside_it(console, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    console().print("3 of 4 figures")
    assert capsys.readouterr().out == "3 of 4 figures\n"


def test_json_has_null_for_numbers_that_it_lacks(tmp_path):
    write_json(tmp_path / "f.json", {"a": [np.inf, {"b": (float("nan"), 1.5)}]})
    assert json.loads((tmp_path / "f.json").read_text()) == {"a": [None, {"b": [None, 1.5]}]}


def test_names_without_a_common_start_are_not_cut(llama, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    assert main(["merge", "base", "adapter", "--out", "out", "--all"]) == 0
    out = capsys.readouterr().out
    assert "…10.self_attn.q_proj.weight " in out
    caption = out[out.index("ΔM: mean") : out.index("peft adapter")]
    assert max(map(len, caption.splitlines())) <= 40


def test_inspect_prints_a_row_for_each_kind_in_80_columns(llama, capsys):
    assert main(["inspect", "adapter", "--base", "base", "--json", "i.json"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    modules = json.loads((llama / "i.json").read_text())["modules"]
    for kind in ("q_proj", "down_proj"):
        group = [row for name, row in modules.items() if name.endswith(kind)]
        medians = ("update_norm", "effective_rank", "magnitude_mean", "magnitude_change",
                   "direction_change")  # fmt: skip
        figures = [statistics.median(row[name] for row in group) for name in medians]
        figures.append(min(row["conditioning"] for row in group))
        expected = [str(LAYERS), "2", *(f"{figure:.3g}" for figure in figures), "0"]
        assert table(out)[kind] == expected
    assert main(["inspect", "adapter"]) == 0
    expected = [str(LAYERS), "linear", "DoRA", "2", "3–5"]
    assert table(capsys.readouterr().out)["q_proj"][:5] == expected


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "q_proj"),
        ("lm_head", "lm_head"),
        ("down.attentions.1.to_out.0", "to_out.0"),
        ("0.1", "0.1"),
        ("lora_unet_down_blocks_1_attn_to_q", "lora_unet_down_blocks_*_attn_to_q"),
        ("model.norm.bias", "bias"),
    ],
)
def test_the_kind_of_a_module_is_the_last_part_of_its_path(name, kind):
    assert kind_of(name) == kind


def test_kinds_of_two_forms_are_both_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng, tensors = np.random.default_rng(0), {}
    for path, ones in (("0.proj", ()), ("1.proj", (1, 1))):
        a, b, m = factors(rng, (8, 8))
        tensors |= {
            f"base_model.model.{path}.lora_A.weight": a.reshape(*a.shape, *ones),
            f"base_model.model.{path}.lora_B.weight": b.reshape(*b.shape, *ones),
            f"base_model.model.{path}.lora_magnitude_vector": m,
        }
    (tmp_path / "a").mkdir()
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    write_config(tmp_path / "a" / "adapter_config.json", peft_config())
    assert main(["inspect", "a"]) == 0
    assert "conv, linear" in capsys.readouterr().out


# Encodings

ENCODINGS = ("ascii", "cp1252", "latin-1", "utf-8")
COMMANDS = (
    "merge base adapter --out out",
    "merge base adapter --out out --all --verify",
    "merge base adapter --out out --dry-run",
    "merge base none --out out",
    "inspect adapter --base base",
    "inspect adapter",
    "convert adapter --to peft --out mlx",
    "verify --backend numpy",
    "demo --seeds 3 --steps 10 --plot demo.png",
    "bench --backend numpy --tasks norm --shapes 8x8 --rank 2 --rounds 2",
    "bench --backend numpy --curves --shapes 64x64 --rounds 2",
)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("command", COMMANDS[:7])
def test_a_stream_of_any_encoding_takes_the_output(llama, monkeypatch, encoding, command):
    streams = [io.TextIOWrapper(io.BytesIO(), encoding, errors="strict") for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    assert main(command.split()) == (2 if "none" in command else 0)
    out, err = (stream.seek(0) or stream.read() for stream in streams)
    assert (out == "") == ("none" in command)
    assert "\\u" not in out + err
    if encoding != "utf-8":
        has_changes = command in (*COMMANDS[:2], "inspect adapter --base base")
        assert ("dM: mean change" in out) == has_changes


@pytest.mark.parametrize("command", COMMANDS[7:10])
def test_ascii_takes_the_output_of_the_other_commands(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    stream = io.TextIOWrapper(io.BytesIO(), "ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(command.split()) == 0
    stream.seek(0)
    assert "\\u" not in stream.read()


@contextlib.contextmanager
def unwritable(kind):
    """Yield a stream to which nothing can be written."""
    if kind == "full":
        with open("/dev/full", "w") as stream:
            yield stream
    else:
        reading, writing = os.pipe()
        os.close(reading)
        with open(writing, "w") as stream:
            yield stream


@pytest.mark.parametrize("kind", ["full", "closed"])
@pytest.mark.parametrize(
    ("command", "status"),
    [(("merge", "base", "adapter", "--out", "again", "--json", "f.json"), 0),
     (("audit", "base", "adapter", "out", "--json", "f.json"), 0),
     (("audit", "base", "adapter", "base", "--json", "f.json"), 1),
     (("inspect", "adapter", "--json", "f.json"), 0),
     (("doctor", "base", "--json", "f.json"), 0),
     (("convert", "adapter", "--to", "peft", "--out", "f.json"), 0),
     (("verify", "--backend", "numpy", "--json", "f.json"), 0),
     (("vectors", "--out", "f.json"), 0),
     (("demo", "--steps", "10", "--json", "f.json", "--plot", "f.png"), 0),
     (("bench", "--backend", "numpy", "--tasks", "norm", "--shapes", "8x8", "--rank", "2",
       "--rounds", "2", "--json", "f.json", "--plot", "f.png"), 0)],
)  # fmt: skip
def test_an_output_that_cannot_be_written_changes_no_exit_status(llama, kind, command, status):
    """The status tells what was done or found."""
    main(["merge", "base", "adapter", "--out", "out"])
    path = {"PYTHONPATH": str(Path(doraxp.__file__).parents[1])}
    line = [sys.executable, "-m", "doraxp", *command]
    with unwritable(kind) as stream:
        process = subprocess.run(
            line, env=os.environ | path, stdout=stream, stderr=subprocess.PIPE, check=False
        )
    assert process.returncode == status
    said = process.stderr.decode()
    problem = "warning: what it prints could not be written: No space left on device\n"
    assert said.endswith(f"doraxp {command[0]}: {problem}" if kind == "full" else "")
    assert said.count("could not be") == (kind == "full")
    assert "Error" not in said
    assert (llama / "f.json").exists()
    assert (llama / "again").is_dir() == (command[0] == "merge")
    assert (llama / "f.png").exists() == ("--plot" in command)


@pytest.mark.parametrize("kind", ["full", "closed"])
def test_a_stream_that_cannot_be_written_takes_no_more(llama, monkeypatch, capsys, kind):
    with unwritable(kind) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(["merge", "base", "adapter", "--out", "out"]) == 0
        print("more", file=stream, flush=True)
    problem = "doraxp merge: warning: what it prints could not be written: No space left on device"
    assert capsys.readouterr().err == (f"{problem}\n" if kind == "full" else "")


@pytest.mark.parametrize("command", ["merge", "audit"])
def test_figures_that_cannot_be_written_are_an_error_that_names_their_file(
    llama, capsys, monkeypatch, command
):
    """Its exit status is not that of a wrong merge."""

    def fails(path, *_):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    out = [] if command == "audit" else ["--out"]
    main(["merge", "base", "adapter", "--out", "audit"])
    capsys.readouterr()
    monkeypatch.setattr(Path, "write_text", fails)
    assert main([command, "base", "adapter", *out, command, "--json", "f.json"]) == 2
    said = capsys.readouterr()
    assert f"{command}: {'complete' if out else 'right'}\n" in said.out
    assert said.err == f"doraxp {command}: error: f.json: No space left on device\n"
    assert [path.name for path in llama.iterdir() if "json" in path.name] == []


@pytest.mark.parametrize("folder", ["base", "adapter"])
@pytest.mark.parametrize("command", ["merge", "audit", "inspect"])
def test_figures_never_go_into_the_base_or_the_adapter(llama, capsys, command, folder):
    before = (llama / "adapter" / "adapter_config.json").read_bytes()
    places = {
        "merge": ["base", "adapter", "--out", "out"],
        "audit": ["base", "adapter", "base"],
        "inspect": ["adapter", "--base", "base"],
    }
    file = f"{folder}/adapter_config.json"
    assert main([command, *places[command], "--json", file]) == 2
    said = capsys.readouterr().err
    assert said == f"doraxp {command}: error: --json must not be in {folder}, got {file}\n"
    assert (llama / "adapter" / "adapter_config.json").read_bytes() == before
    assert not (llama / "out").exists()


def test_a_process_in_the_c_locale_ends_well(llama):
    strict = {"PYTHONIOENCODING": "ascii:strict", "PYTHONUTF8": "0", "LC_ALL": "C"}
    strict["PYTHONPATH"] = str(Path(doraxp.__file__).parents[1])
    command = [sys.executable, "-m", "doraxp", "merge", "base", "adapter", "--out", "out"]
    ran = subprocess.run(command, env=os.environ | strict, capture_output=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, b"")
    assert b"dM" in ran.stdout
    assert b"out: complete" in ran.stdout


def test_a_sign_that_no_table_has_is_escaped(llama, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), "ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(["convert", "adapter", "--to", "peft", "--out", "мой"]) == 0
    stream.seek(0)
    assert stream.read().endswith("peft: \\u043c\\u043e\\u0439\n")


def test_an_error_in_ascii_escapes_a_sign_of_a_name(llama, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), "ascii", errors="strict")
    monkeypatch.setattr(sys, "stderr", stream)
    assert main(["inspect", "мой"]) == 2
    stream.seek(0)
    assert "\\u043c\\u043e\\u0439: no such file" in stream.read()


# Names that a terminal would obey

HOSTILE = "\x1b]0;owned\x07\x1b[2J\n\rOUT: complete, and verified\u202e\x9b31m\udcff"


def test_a_file_name_that_a_terminal_would_obey_is_escaped(llama, capsys):
    (llama / "adapter" / f"tokenizer{HOSTILE}.json").write_text("{}")
    (llama / "base" / f"old{HOSTILE}.bin").write_bytes(b"")
    assert main(["merge", "base", "adapter", "--out", "out"]) == 0
    out, err = capsys.readouterr()
    for text in (out, err):
        assert printable(HOSTILE) in text
        assert all(sign.isprintable() or sign == "\n" for sign in text)
    assert not any(line.startswith("OUT: complete") for line in out.splitlines())


@pytest.mark.parametrize(
    "command",
    [
        "merge {} adapter --out out",
        "merge base {} --out out",
        "merge base adapter --out {}",
        "inspect {}",
        "inspect adapter --base {}",
        "doctor {}",
        "convert {} --to peft --out b",
        "convert adapter --to peft --out {}/b",
        "convert adapter --to peft --out {}",
        "vectors --out {}/b",
    ],
)
def test_a_path_that_a_terminal_would_obey_is_escaped(llama, capsys, command):
    name = HOSTILE.replace("\n", "").replace("\r", "").replace(" ", "")
    status = main([word.format(name) for word in command.split()])
    out, err = capsys.readouterr()
    assert status == (0 if command.endswith("--out {}") else 2)
    assert printable(name) in out + err
    assert all(sign.isprintable() or sign == "\n" for sign in out + err)


# Progress, and the picture


def test_inspect_tells_how_much_of_the_base_it_has_read(llama, monkeypatch):
    monkeypatch.setattr("doraxp.checkpoint._matrix.BLOCK", 32)
    told = []
    look_at_base(
        open_model(llama / "base"),
        load_adapters(llama / "adapter"),
        on_bytes=lambda done, total: told.append((done, total)),
    )
    size = LAYERS * (8 * 8 + 8 * 12) * 4
    assert {total for _, total in told} == {size}
    done = [done for done, _ in told]
    assert done == sorted(done)
    assert done[-1] == size
    assert len(set(done)) == LAYERS * (2 + 4)


@pytest.fixture
def pictures(monkeypatch):
    """The pictures that are saved from now on."""
    saved, save = [], adapter_picture.save
    monkeypatch.setattr(
        adapter_picture, "save", lambda picture, path: (saved.append(picture), save(picture, path))
    )
    return saved


def test_the_picture_has_a_panel_and_a_colour_for_each_kind(llama, pictures):
    assert main(["inspect", "adapter", "--base", "base", "--plot", "p.png"]) == 0
    assert main(["inspect", "adapter", "--plot", "p.png"]) == 0
    assert (llama / "p.png").read_bytes().startswith(b"\x89PNG")
    with_base, alone = pictures
    for picture in pictures:
        queries, downs = picture.axes[:2]
        assert [axes.get_title(loc="left") for axes in (queries, downs)] == ["q_proj", "down_proj"]
        assert downs.get_xlabel() == "layer"
        assert queries.lines[0].get_color() != downs.lines[0].get_color()
    assert len(alone.axes) == 2
    *panels, changes = with_base.axes
    for panel in panels:
        (line,) = panel.lines
        points, median = (one for one in changes.lines if one.get_color() == line.get_color())
        assert len(points.get_xdata()) == LAYERS
        assert median.get_xdata() == [np.median(points.get_xdata())]
    names = [text.get_text() for text in changes.get_legend().get_texts()]
    assert names == ["q_proj", "down_proj"]
    (line,) = downs.lines
    assert list(line.get_xdata()) == list(range(LAYERS))
    adapters = load_adapters(llama / "adapter")
    medians = [
        np.median(adapters[path].adapter.magnitude)
        for path in sorted(adapters, key=lambda path: int(re.search(r"\d+", path)[0]))
        if "down" in path
    ]
    np.testing.assert_allclose(line.get_ydata(), medians)


def test_the_picture_of_many_odd_names_is_drawn(tmp_path, monkeypatch, pictures):
    monkeypatch.chdir(tmp_path)
    odd = {f"_{'x' * 60}$\\frac{{{number}$": (4, 4) for number in "abcdefgh"}
    write_adapter(tmp_path / "few", odd)
    for name, kinds in (("many", 40), ("most", 70)):
        names = [f"0.1.m{chr(97 + n // 26)}{chr(97 + n % 26)}" for n in range(kinds)]
        write_adapter(tmp_path / name, dict.fromkeys([*names, f"0.2.{names[0][4:]}"], (4, 4)))
    write_adapter(tmp_path / "shared", {"a.0.0.q": (4, 4), "a.0.1.q": (4, 4)})
    write_adapter(
        tmp_path / "ordered",
        {f"a.0.{name}": (4, 4) for name in ("own", "to_out.0", "to_k", "to_q", "gate_proj")},
    )
    for name in ("few", "many", "most", "shared", "ordered"):
        assert main(["inspect", name, "--plot", f"{name}.png"]) == 0
    few, many, most, shared, ordered = pictures
    titles = [axes.get_title(loc="left") for axes in ordered.axes]
    assert titles == ["to_q", "to_k", "to_out.0", "gate_proj", "own"]
    assert len(few.axes) == len(odd)
    assert max(len(axes.get_title(loc="left")) for axes in few.axes) < 40
    assert shared.axes[0].get_xlabel() == "module, in the order of the file"
    rows = [[text.get_text() for text in one.axes[0].get_yticklabels()] for one in (many, most)]
    assert list(map(len, rows)) == [40, 60]
    assert [row[0] for row in rows] == ["maa (2)"] * 2
    assert rows[1][-1] == "11 other kinds (11)"


@pytest.mark.parametrize(("kinds", "panels"), [(14, 14), (15, 1)])
def test_up_to_14_kinds_have_a_panel_each(tmp_path, monkeypatch, pictures, kinds, panels):
    monkeypatch.chdir(tmp_path)
    write_adapter(tmp_path / "adapter", {f"0.{chr(97 + n)}": (5, 4) for n in range(kinds)})
    assert main(["inspect", "adapter", "--plot", "p.png"]) == 0
    assert len(pictures[0].axes) == panels


def test_an_adapter_with_more_kinds_than_panels_has_a_column_for_each_change(
    tmp_path, monkeypatch, pictures
):
    monkeypatch.chdir(tmp_path)
    shapes = {f"0.{chr(97 + n)}": (5, 4) for n in range(20)}
    write_adapter(tmp_path / "adapter", shapes)
    (tmp_path / "base").mkdir()
    rng = np.random.default_rng(8)
    weights = {f"{path}.weight": draw(rng, *shape) for path, shape in shapes.items()}
    save_file(weights, tmp_path / "base" / "model.safetensors")
    words = ["--base", "base", "--plot", "p.png", "--json", "f.json"]
    assert main(["inspect", "adapter", *words]) == 0
    (picture,) = pictures
    labels = [axes.get_xlabel()[:2] for axes in picture.axes]
    assert labels == ["m:", "ΔD", "ΔM"]
    modules = json.loads(Path("f.json").read_text())["modules"].values()
    for axes, name in zip(picture.axes[1:], ("direction_change", "magnitude_change"), strict=True):
        marks = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o"]
        np.testing.assert_allclose(sorted(marks), sorted(module[name] for module in modules))
    assert len(picture.axes[0].get_yticks()) == len(shapes)


def test_the_picture_of_plain_lora_has_the_sizes_of_the_updates(tmp_path, monkeypatch, pictures):
    monkeypatch.chdir(tmp_path)
    write_adapter(tmp_path / "adapter", {"0.q": (5, 4), "1.q": (5, 4)}, use_dora=False)
    tensors = load_file("adapter/adapter_model.safetensors")
    kept = {name: leaf for name, leaf in tensors.items() if "magnitude" not in name}
    save_file(kept, "adapter/adapter_model.safetensors")
    assert main(["inspect", "adapter", "--plot", "p.png", "--json", "f.json"]) == 0
    (picture,) = pictures
    (axes,) = picture.axes
    modules = json.loads(Path("f.json").read_text())["modules"]
    norms = [module["update_norm"] for module in modules.values()]
    np.testing.assert_allclose(axes.lines[0].get_ydata(), norms)
    assert picture.get_supylabel().startswith("‖s ΔW‖")
