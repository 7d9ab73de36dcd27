"""Files from strangers: a corpus of malformed files, and random damage to good ones.

Each must be refused in one line and exit status 2, without a traceback, a hang, much memory or an
output.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import time
import tracemalloc

import ml_dtypes  # noqa: F401  the safetensors library needs it for bfloat16
import numpy as np
import pytest
from checkpoints import peft_config, write_adapter, write_json, write_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from doraxp.checkpoint import Options, load_adapters, open_model, plan_merge
from doraxp.checkpoint._errors import CheckpointError
from doraxp.checkpoint._safetensors import Reader
from doraxp.cli import main

MEMORY = 100 << 20


def entry(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def raw(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(number):
    return b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % number


ONE = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
NUMBERS = {
    "float": 2.0,
    "negative": -1,
    "huge": 2**63,
    "beyond": 2**64,
    "true": True,
    "null": None,
    "text": "2",
    "list": [2],
    "dict": {"a": 2},
    "nan": float("nan"),
}
SAFETENSORS = {
    "empty": b"",
    "seven bytes": b"1234567",
    "no header": struct.pack("<Q", 0),
    "length beyond the file": raw(b"{}", length=100),
    "length of 4 EB": raw(b"{}", length=2**62),
    "length of all ones": raw(b"{}", length=2**64 - 1),
    "length above the limit": raw(b"{}", length=(64 << 20) + 1),
    "length inside the header": raw(ONE + b"}", bytes(8), length=20),
    "no JSON": raw(b"hello, world"),
    "JSON cut off": raw(ONE),
    "not UTF-8": raw(b'{"\xff\xfe":1}'),
    "half a surrogate": raw(b'{"\\ud800":1}'),
    "a list": raw(b"[]"),
    "a number": raw(b"1"),
    "null": raw(b"null"),
    "a list that fills the memory": raw(b"[" + b"0," * 10_000_000 + b"0]"),
    "tensors of no adapter": raw(b"{" + b",".join(map(tensor, range(35_000))) + b"}"),
    "too many tensors": raw(b"{" + 430_000 * (tensor(0) + b",") + b'"a":0}'),
    "metadata that fills the memory": raw(b'{"__metadata__":{' + 3_000_000 * b'"a":"",'),
    "one long name": raw(b'{"' + b"x" * ((16 << 20) - 20) + b'":1}'),
    "too many lists": raw(b"[" + b"[]," * 1_500_000 + b"[]]"),
    "deeply nested": raw(b"[" * 200_000),
    "nested dicts": raw(b'{"a":' * 100_000),
    "an entry that is a number": raw({"a": 1}),
    "an entry that is empty": raw({"a": {}}),
    "no dtype": raw({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
    "no shape": raw({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)),
    "no offsets": raw({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "an unknown dtype": raw({"a": entry(dtype="F31")}, bytes(8)),
    "a dtype in lower case": raw({"a": entry(dtype="f32")}, bytes(8)),
    "metadata that is a list": raw({"__metadata__": [1], "a": entry()}, bytes(8)),
    "metadata with a number": raw({"__metadata__": {"a": 1}, "a": entry()}, bytes(8)),
    "a name twice": raw(ONE + b"," + ONE[1:] + b"}", bytes(8)),
    "a field twice": raw(ONE[:-1] + b',"shape":[2]}}', bytes(8)),
    "offsets beyond the file": raw({"a": entry((4,), (0, 16))}, bytes(8)),
    "offsets turned round": raw({"a": entry(offsets=(8, 0))}, bytes(8)),
    "one offset": raw({"a": entry(offsets=(0,))}, bytes(8)),
    "three offsets": raw({"a": entry(offsets=(0, 8, 8))}, bytes(8)),
    "a hole at the start": raw({"a": entry(offsets=(4, 12))}, bytes(12)),
    "a hole between": raw({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)),
    "overlapping": raw({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
    "the same bytes twice": raw({"a": entry(), "b": entry()}, bytes(8)),
    "bytes left over": raw({"a": entry()}, bytes(9)),
    "data cut off": raw({"a": entry()}, bytes(7)),
    "a shape too large for its bytes": raw({"a": entry((3,))}, bytes(8)),
    "a shape that overflows": raw({"a": entry((2**40, 2**40))}, bytes(8)),
    "a shape of zeros and overflow": raw({"a": entry((0, 2**62, 2**62), (0, 8))}, bytes(8)),
    **{
        f"a shape with {name}": raw({"a": entry((value,))}, bytes(8))
        for name, value in NUMBERS.items()
    },
    **{
        f"offsets with {name}": raw({"a": entry(offsets=(0, value))}, bytes(8))
        for name, value in NUMBERS.items()
    },
}
INDEXES = {
    "no JSON": b"{",
    "a list": b"[]",
    "no map": b"{}",
    "an empty map": b'{"weight_map": {}}',
    "a map that is a list": b'{"weight_map": ["a"]}',
    "a name twice": b'{"weight_map": {"a": "x", "a": "y"}}',
    "a file that is a number": b'{"weight_map": {"a": 1}}',
    "a file above": b'{"weight_map": {"a": "../secret.safetensors"}}',
    "an absolute file": b'{"weight_map": {"a": "/etc/passwd"}}',
    "a file below": b'{"weight_map": {"a": "x/../../secret.safetensors"}}',
    "the folder": b'{"weight_map": {"a": "."}}',
    "the folder above": b'{"weight_map": {"a": ".."}}',
    "no name": b'{"weight_map": {"a": ""}}',
    "a zero byte": b'{"weight_map": {"a": "x\\u0000y"}}',
    "a file that is not there": b'{"weight_map": {"a": "none.safetensors"}}',
    "a link out of the folder": b'{"weight_map": {"a": "link.safetensors"}}',
    "a tensor that is not there": b'{"weight_map": {"a": "model-1.safetensors"}}',
    "too many values": b'{"weight_map": {}, "a": [' + b"1," * 3_000_001 + b"1]}",
    "deeply nested": b"[" * 200_000,
}
CONFIGS = {
    "no JSON": b"{'r': 2}",
    "a list": b"[]",
    "empty": b"",
    "deeply nested": b'{"r":' * 100_000,
    "no type": b"{}",
    "rank null": peft_config(r=None),
    "rank negative": peft_config(r=-2),
    "rank huge": peft_config(r=2**70),
    "rank a fraction": peft_config(r=1.5),
    "alpha text": peft_config(lora_alpha="a"),
    "alpha infinite": peft_config(lora_alpha=float("inf")),
    "a pattern that does not compile": peft_config(rank_pattern={"[": 3}),
    "a pattern with a backreference": peft_config(alpha_pattern={r"(.*)\1": 3}),
    "a pattern of too many repeats": peft_config(rank_pattern={"a{99999999999}": 3}),
    "a pattern of deep brackets": peft_config(rank_pattern={"(" * 3000 + "a" + ")" * 3000: 3}),
    "a pattern that Python warns of": peft_config(rank_pattern={"[[a]?q": 3}),
    "a pattern that looks ahead": peft_config(alpha_pattern={"(?=.*)*x": 3}),
    "a pattern of repeated repeats": peft_config(alpha_pattern={"(a{1000}){1000}": 3}),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    write_model(folder / "base")
    write_adapter(folder / "adapter")
    return folder


@pytest.fixture
def files(good, tmp_path):
    """A model, an adapter, and a secret beside them."""
    folder = tmp_path / "work"
    shutil.copytree(good, folder)
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "secret.safetensors")
    (folder / "base" / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    return folder


def assert_refused(files, capsys, base="base"):
    paths = [str(files / name) for name in (base, "adapter", "out")]
    tracemalloc.start()
    try:
        status = main(["merge", *paths[:2], "--out", paths[2]])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    error = capsys.readouterr().err
    assert status == 2
    assert error.startswith("doraxp merge: error: ")
    assert error.count("\n") == 1
    assert len(error) < 2000
    assert peak < MEMORY
    assert sorted(path.name for path in files.iterdir()) == ["adapter", "base"]
    return error


def add_layer(files, name):
    """Add a layer to the model and to the adapter."""
    path = files / "base" / "model-1.safetensors"
    save_file(load_file(path) | {f"{name}.weight": np.ones((7, 5), np.float32)}, path)
    index = files / "base" / "model.safetensors.index.json"
    entries = json.loads(index.read_bytes())
    entries["weight_map"][f"{name}.weight"] = path.name
    write_json(index, entries)
    path = files / "adapter" / "adapter_model.safetensors"
    shapes = {"lora_A.weight": (2, 5), "lora_B.weight": (7, 2), "lora_magnitude_vector": (7,)}
    added = {
        f"base_model.model.{name}.{part}": np.ones(shape, np.float32)
        for part, shape in shapes.items()
    }
    save_file(load_file(path) | added, path)


@pytest.mark.parametrize("name", ["a\nb", "a\rb", "a\x1b[31mb", "a\u202eb"])
def test_a_name_that_a_terminal_would_obey_is_refused(files, capsys, name):
    add_layer(files, name)
    assert_refused(files, capsys)


@pytest.mark.parametrize("name", ["a[red]b", "a[/b]", "a:smile:b"])
def test_markup_in_a_name_is_printed_as_it_is(files, capsys, name):
    add_layer(files, name)
    (files / "base" / "a[red].bin").write_bytes(b"old")
    paths = [str(files / folder) for folder in ("base", "adapter", "out")]
    for command in (
        ["merge", *paths[:2], "--out", paths[2], "--dry-run"],
        ["merge", *paths[:2], "--out", paths[2]],
        ["inspect", paths[1]],
    ):
        assert main(command) == 0
        out = capsys.readouterr().out
        assert name in out
        assert "a[red].bin" in out or command[0] == "inspect"


@pytest.mark.parametrize(
    ("name", "patterns", "message"),
    [
        ("." * 4000, {".*.*.*x": 3}, "the name of a tensor must have at most 500 characters"),
        ("a", {f"{number}": 3 for number in range(200_000)}, "at most 500000 parts"),
    ],
    ids=["a long name", "many patterns"],
)
def test_patterns_that_would_take_hours_are_refused(files, capsys, name, patterns, message):
    shutil.rmtree(files / "adapter")
    shapes = {f"{name}{number}": (7, 5) for number in range(200)}
    write_adapter(files / "adapter", shapes, rank_pattern=patterns)
    assert message in assert_refused(files, capsys)


def test_many_names_that_fit_by_a_leading_part_take_little_memory(files, capsys):
    empty = np.empty(0, np.float32)
    names = [f"{number}.block.0.q.weight" for number in range(30_000)]
    (files / "base" / "model.safetensors.index.json").unlink()
    (files / "base" / "model-2.safetensors").unlink()
    (files / "base" / "link.safetensors").unlink()
    save_file(dict.fromkeys(names, empty), files / "base" / "model-1.safetensors")
    shutil.rmtree(files / "adapter")
    write_adapter(files / "adapter", {f"block.{number}.q": (7, 5) for number in range(3000)})
    start = time.process_time()
    assert_refused(files, capsys)
    assert time.process_time() - start < 20


def test_an_error_about_a_long_value_is_short(files, capsys):
    write_json(files / "adapter" / "adapter_config.json", peft_config(r="9" * 10_000))
    assert_refused(files, capsys)


def test_an_error_about_many_missing_tensors_is_short(files, capsys):
    shutil.rmtree(files / "adapter")
    write_adapter(files / "adapter", {f"layers.{number}.q": (7, 5) for number in range(500)})
    assert_refused(files, capsys)


def test_the_corpus_is_large_enough():
    assert len(SAFETENSORS) + len(INDEXES) + len(CONFIGS) >= 60


LIMITED = """
import resource, sys
import doraxp.checkpoint, rich.console
from doraxp.cli import main
status = open("/proc/self/status").read()
used = int(status.partition("VmData:")[2].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + int(sys.argv[1]), -1))
print([main(["inspect", path]) for path in sys.argv[2:]])
"""


def test_no_malformed_file_takes_much_memory_even_in_the_libraries(tmp_path):
    """The system limits the memory of a process, so allocations of Rust and C count as well."""
    for number, content in enumerate(SAFETENSORS.values()):
        (tmp_path / f"{number}.safetensors").write_bytes(content)
    paths = sorted(str(path) for path in tmp_path.iterdir())
    command = [sys.executable, "-c", LIMITED, str(MEMORY), *paths]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert result.stdout == f"{[2] * len(paths)}\n", result.stderr[-2000:]
    assert result.stderr.count("\n") == len(paths)


def test_a_file_with_as_many_values_as_may_be_takes_less_than_a_gibibyte(tmp_path):
    """Names are the dearest values; a mixture of experts has half as many of cheaper ones."""
    names = b",".join(b'"%d":""' % number for number in range(2_999_990))
    (tmp_path / "a.safetensors").write_bytes(raw(b'{"__metadata__":{' + names + b"}}"))
    command = [sys.executable, "-c", LIMITED, str(1 << 30), str(tmp_path / "a.safetensors")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.stdout == "[2]\n", result.stderr[-2000:]
    assert "no tensor in it has a name of a known adapter format" in result.stderr


@pytest.mark.parametrize("where", ["base/model-1.safetensors", "adapter/adapter_model.safetensors"])
@pytest.mark.parametrize("name", SAFETENSORS)
def test_a_malformed_safetensors_file_is_refused(files, capsys, where, name):
    (files / where).write_bytes(SAFETENSORS[name])
    assert_refused(files, capsys)


@pytest.mark.parametrize("name", INDEXES)
def test_a_malformed_index_is_refused(files, capsys, name):
    (files / "base" / "model.safetensors.index.json").write_bytes(INDEXES[name])
    assert_refused(files, capsys)


@pytest.mark.parametrize("metadata", [[1], "text", 1], ids=str)
def test_an_index_whose_metadata_is_not_an_object_is_refused(files, capsys, metadata):
    path = files / "base" / "model.safetensors.index.json"
    write_json(path, json.loads(path.read_bytes()) | {"metadata": metadata})
    assert_refused(files, capsys)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_malformed_configuration_is_refused(files, capsys, name):
    path, content = files / "adapter" / "adapter_config.json", CONFIGS[name]
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        write_json(path, content)
    assert_refused(files, capsys)


def test_a_large_json_file_is_refused_without_reading_it(files, capsys):
    with (files / "adapter" / "adapter_config.json").open("wb") as file:
        file.truncate(1 << 40)
    assert_refused(files, capsys)


def test_a_models_name_on_a_hub_is_not_a_folder(files, capsys):
    assert_refused(files, capsys, base="meta-llama/Llama-3.1-8B")
    with pytest.raises(FileNotFoundError, match=r"Llama-3\.1-8B: no such file or folder"):
        open_model(files / "meta-llama" / "Llama-3.1-8B")


@pytest.mark.parametrize("name", ["none", "base/config.json", "."])
def test_a_path_without_a_model_is_refused(files, capsys, name):
    assert_refused(files, capsys, base=name)


def test_a_folder_of_several_files_needs_an_index(files, capsys):
    (files / "base" / "model.safetensors.index.json").unlink()
    assert_refused(files, capsys)


def test_a_link_out_of_the_folder_is_refused(files, capsys):
    (files / "base" / "vocab.json").symlink_to("/etc/hostname")
    assert_refused(files, capsys)


@pytest.mark.parametrize("name", ["adapter_model.bin", "x.pt"])
def test_the_error_about_a_pickle_says_how_to_convert_it(files, capsys, name):
    folder = files / "adapter"
    (folder / "adapter_model.safetensors").unlink()
    (folder / name).write_bytes(b"\x80\x04")
    path = folder if name == "adapter_model.bin" else folder / name
    with pytest.raises(CheckpointError, match=r"safetensors\.torch\.save_file"):
        load_adapters(path)


def test_a_pointer_of_git_lfs_is_named_as_one(files, capsys):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 5000000000\n"
    (files / "base" / "model-1.safetensors").write_text(pointer)
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors: .*run `git lfs pull`"):
        open_model(files / "base")
    assert_refused(files, capsys)


@pytest.mark.parametrize("path", ["", "pytorch_model.bin"])
def test_a_base_that_is_a_pickle_is_refused(tmp_path, path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04" + bytes(8))
    with pytest.raises(
        CheckpointError, match=r"pytorch_model\.bin: a pickle file can run any code"
    ):
        open_model(tmp_path / path)


def test_a_missing_configuration_is_named(files, capsys):
    (files / "adapter" / "adapter_config.json").unlink()
    assert main(["inspect", str(files / "adapter")]) == 2
    assert "adapter_config.json: no such file" in capsys.readouterr().err


def test_a_folder_without_an_adapter_is_refused(files, capsys):
    """This happens where BASE and ADAPTER are exchanged."""
    paths = [str(files / name) for name in ("adapter", "base", "out")]
    assert main(["merge", *paths[:2], "--out", paths[2]]) == 2
    error = capsys.readouterr().err
    problem = "base: the folder must contain adapters.safetensors or "
    assert problem in error
    assert error.count("\n") == 1


def test_a_text_file_is_refused(files):
    with pytest.raises(CheckpointError, match=r"config\.json: not a safetensors file: its header"):
        open_model(files / "base" / "config.json")


def test_an_adapter_of_integers_is_refused(files, capsys):
    path = files / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor.astype(np.int32) for name, tensor in tensors.items()}, path)
    assert_refused(files, capsys)


@pytest.mark.parametrize("names", [(), ("a",), ("x.m",), ("lora_A.weight",)])
def test_a_file_without_an_adapter_is_refused(files, capsys, names):
    tensors = {name: np.ones(2, np.float32) for name in names}
    save_file(tensors, files / "adapter" / "adapter_model.safetensors")
    assert_refused(files, capsys)


def test_a_folder_of_links_in_the_hubs_cache_is_read(files, tmp_path):
    blobs = tmp_path / "models--a" / "blobs"
    snapshot = tmp_path / "models--a" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    (files / "base" / "link.safetensors").unlink()
    for path in (files / "base").iterdir():
        if path.is_file():
            shutil.move(path, blobs / path.name)
            (snapshot / path.name).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / path.name).symlink_to(os.path.join("..", "..", "blobs", path.name))
    paths = [str(snapshot), str(files / "adapter"), str(files / "out")]
    assert main(["merge", *paths[:2], "--out", paths[2]]) == 0
    assert not any(path.is_symlink() for path in (files / "out").iterdir())


PIECES = (b"null", b"true", b"{}", b"[]", b"-1", b"1e999", b"NaN", b'""', b"9" * 30, b"../", b'"')


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@pytest.mark.parametrize(
    "where",
    [
        "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json",
        "base/model-1.safetensors",
        "base/model.safetensors.index.json",
    ],
)
@given(data=st.data())
def test_a_file_with_random_damage_is_refused_or_read(good, tmp_path, where, data):
    """Flip, cut, repeat and insert bytes of one file. It must be refused, or give a plan."""
    content = bytearray((good / where).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(len(content), 900)))
        other = data.draw(st.integers(0, min(len(content), 900)))
        pieces = st.sampled_from([*PIECES, bytes(content[other : other + 40])])
        piece = data.draw(st.binary(max_size=4) | pieces)
        cut = data.draw(st.integers(0, 4) | st.just(len(piece)))
        content[at : at + cut] = piece
    folder = tmp_path / "damaged"
    shutil.copytree(good, folder, dirs_exist_ok=True)
    (folder / where).write_bytes(content)
    problem = ""
    try:
        merge = plan_merge(folder / "base", folder / "adapter", Options())
        for reader in (*merge.model.shards.values(), merge.adapters[0].reader):
            assert sum(x.nbytes for x in reader.tensors.values()) < reader.path.stat().st_size
        list(merge.adapters[0].values())
    except (CheckpointError, FileNotFoundError) as error:
        problem = str(error)
    assert "\n" not in problem


def test_a_name_that_occurs_twice_is_named_in_the_error(tmp_path):
    (tmp_path / "a").write_bytes(SAFETENSORS["a name twice"])
    with pytest.raises(CheckpointError, match="the name 'a' occurs twice"):
        Reader(tmp_path / "a")


def test_many_names_of_which_one_occurs_twice_take_linear_time(files, capsys):
    pairs = ",".join(f'"{number}":1' for number in range(150_000))
    path = files / "adapter" / "adapter_config.json"
    path.write_text(f'{{{pairs},"a":1,"a":2}}')
    assert "adapter_config.json: the name 'a' occurs twice" in assert_refused(files, capsys)


def write_sparse(path, **shapes):
    """Write a file of zeros that takes almost no room on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape, dtype=object))
        header[f"base_model.model.block.0.q.{name}"] = entry(shape, (end, end + size))
        end += size
    content = raw(header)
    with path.open("wb") as file:
        file.write(content)
        file.truncate(len(content) + end)


@pytest.mark.parametrize(
    ("rank", "out", "inner", "message"),
    [
        (10_000_000, 7, 5, "rank must be at most 4096 for a weight of shape (7, 5), got 10000000"),
        (
            6000,
            5500,
            5000,
            "must be at most 5000 for a weight of shape (5500, 5000), got 6000",
        ),
        (1, 2**31, 2**32, "at most 1073741824 numbers, got 4294967296 for rank 1 and a weight"),
        (1, 4, 2**31, "numbers, got 2147483648 for rank 1 and a weight of shape (4, 2147483648)"),
        (2, 2**30, 4, "at most 1073741824 numbers, got 2147483648 for rank 2 and a weight"),
    ],
)
def test_factors_that_would_fill_the_memory_are_refused_before_they_are_read(
    files, capsys, rank, out, inner, message
):
    path = files / "adapter" / "adapter_model.safetensors"
    names = {"lora_A": (rank, inner), "lora_B": (out, rank), "lora_magnitude_vector": (out,)}
    write_sparse(path, **names)
    write_json(files / "adapter" / "adapter_config.json", peft_config(r=rank))
    assert message in assert_refused(files, capsys)
    assert main(["inspect", str(files / "adapter")]) == 2


def test_a_rank_above_the_sides_of_a_small_weight_is_read(files):
    shutil.rmtree(files / "adapter")
    rng = np.random.default_rng(0)
    parts = {"lora_A": (64, 5), "lora_B": (7, 64), "lora_magnitude_vector": (7,)}
    (files / "adapter").mkdir()
    save_file(
        {f"base_model.model.block.0.q.{n}": rng.random(s, np.float32) for n, s in parts.items()},
        files / "adapter" / "adapter_model.safetensors",
    )
    write_json(files / "adapter" / "adapter_config.json", peft_config(r=64))
    assert load_adapters(files / "adapter")["block.0.q"].config.rank == 64
