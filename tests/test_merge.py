"""`doraxp merge`: its result, its errors, and the files that it leaves when it is stopped."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from checkpoints import (
    SHAPES,
    dense,
    draw,
    factors,
    merge,
    peft_config,
    read_folder,
    refused,
    updated,
    write_adapter,
    write_json,
    write_model,
)
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from doraxp import AdaptedLayer, Adapter, Config, LayerKind
from doraxp._base.extras import install_hint
from doraxp.backends import Status
from doraxp.checkpoint import (
    Options,
    _matrix,
    _model,
    _rows,
    _run,
    _shard,
    load_adapters,
    look_at_base,
    open_model,
    plan_merge,
    run_merge,
)
from doraxp.checkpoint._engine import load_engine
from doraxp.checkpoint._errors import CheckpointError
from doraxp.checkpoint._safetensors import Reader
from doraxp.cli import main

# The distance between neighbouring numbers of the result. In float64 the dense merge, with which
# the result is compared, has rounding errors too.
ULP = {"float64": 2**-49, "float32": 2**-23, "float16": 2**-10, "bfloat16": 2**-7}


@pytest.fixture
def folders(tmp_path):
    base = write_model(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter")
    return tmp_path, base, adapter


def assert_merged(merged, base, adapter, dtype=None):
    assert merged.keys() == base.keys()
    for name, tensor in merged.items():
        path = name.removesuffix(".weight")
        if path in adapter and name.endswith(".weight"):
            desired = dense(base[name], *adapter[path])
            assert tensor.dtype == (dtype or base[name].dtype)
            bound = ULP[tensor.dtype.name] * np.abs(desired)
            assert (np.abs(tensor.astype(np.float64) - desired) <= bound).all(), name
        elif dtype is None:
            assert tensor.dtype == base[name].dtype
            assert tensor.tobytes() == base[name].tobytes(), name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_every_tensor_is_merged_or_copied(tmp_path, dtype):
    base = write_model(tmp_path / "base", np.dtype(dtype))
    adapter = write_adapter(tmp_path / "adapter")
    assert merge(tmp_path, "--verify") == 0
    assert_merged(read_folder(tmp_path / "out"), base, adapter)


def test_other_files_of_the_folder_are_copied_but_other_weights_are_not(folders, capsys):
    folder, _, _ = folders
    assert merge(folder) == 0
    out = folder / "out"
    assert (out / "tokenizer" / "vocab.txt").read_text() == "a\nb\n"
    assert (out / "config.json").read_bytes() == (folder / "base" / "config.json").read_bytes()
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == read_folder(out).keys()
    sizes = [tensor.nbytes for tensor in read_folder(out).values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert not (out / "pytorch_model.bin").exists()
    printed = capsys.readouterr().out
    assert "Left out: pytorch_model.bin" in printed
    assert f"{out}: complete\n" in printed
    assert sorted(path.name for path in folder.iterdir()) == ["adapter", "base", "out"]
    with safe_open(out / "model-1.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    ("own", "warned"),
    [({"vocab.txt": "a\nb\n"}, []), ({"vocab.txt": "a\nc\n"}, ["vocab.txt"])],
)
def test_a_tokenizer_beside_the_adapter_that_differs_from_the_bases_is_named(
    folders, capsys, own, warned
):
    """Trainers save one there, and its tokens and its template may be those of the training."""
    folder, _, _ = folders
    shutil.copy(folder / "base" / "tokenizer" / "vocab.txt", folder / "base")
    (folder / "adapter" / "README.md").write_text("about the adapter")
    for name, text in own.items():
        (folder / "adapter" / name).write_text(text)
    for arguments in (["--dry-run"], []):
        assert merge(folder, *arguments) == 0
        expected = "doraxp merge: warning: OUT has BASE's {}, and not the other one of ADAPTER\n"
        assert capsys.readouterr().err == "".join(expected.format(name) for name in warned)
    assert (folder / "out" / "vocab.txt").read_text() == "a\nb\n"
    shutil.rmtree(folder / "out")
    (folder / "adapter" / "chat_template.jinja").write_text("{{ messages }}")
    assert merge(folder, "--dry-run") == 0
    expected = "doraxp merge: warning: OUT has no chat_template.jinja, and ADAPTER has one\n"
    assert capsys.readouterr().err.startswith(expected)


def test_hidden_folders_are_not_copied(folders):
    folder, _, _ = folders
    old = folder / "base" / ".git" / "lfs" / "objects" / "5f3a"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"the old weights")
    (folder / "base" / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    assert merge(folder) == 0
    assert (folder / "out" / ".gitattributes").exists()
    assert not (folder / "out" / ".git").exists()


def test_a_git_file_is_not_copied_as_a_git_folder_is_not(folders):
    """A worktree and a submodule have a file: OUT would be a part of BASE's repository."""
    folder, _, _ = folders
    (folder / "base" / ".git").write_text("gitdir: ../.git/modules/base\n")
    (folder / "base" / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    assert merge(folder) == 0
    names = {path.name for path in (folder / "out").iterdir() if path.name.startswith(".")}
    assert names == {".gitattributes"}


@pytest.mark.parametrize(
    "name",
    [
        *("model.onnx", "model.onnx_data", "model.onnx_data_1", "model.onnx.data"),
        *("weights.npz", "weights.npy", "model.h5", "model.hdf5", "model.keras"),
        *("flax_model.msgpack", "model.ckpt", "model.ckpt-100.data-00000-of-00001"),
        *("model.ckpt-100.index", "model.ckpt-100.meta", "saved_model.pb", "Model-Q4.GGUF"),
        *("model.gguf.part1of2", "ggml-model.ggml", "model.tflite", "rust_model.ot", "a.pkl"),
        *("weights.data-00000-of-00001", "__0_0.distcp", "model.pdparams", "model.engine"),
        *("model.mlmodel", "model.pte", "model.nemo", "model.llamafile", "model.fp16.safetensors"),
        *("openvino_model.xml", "pytorch_model.bin.index.json", "onnx/model_q4.onnx_data"),
        *("model.fp16.safetensors.index.json", "adapter_config.json", "sub/adapter_config.json"),
        "adapter_model.safetensors",
    ],
)
def test_other_forms_of_the_weights_are_left_out_and_named(folders, capsys, name):
    folder, _, _ = folders
    file = folder / "base" / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"of before")
    assert merge(folder) == 0
    assert not (folder / "out" / name).exists()
    assert name in capsys.readouterr().out


@pytest.mark.parametrize(
    "name",
    [
        *("tokenizer.model", "vocab.json", "merges.txt", "spiece.model", "modeling_a.py"),
        *("weights.md", "onnx.md", "data.csv", "model_index.json", "preprocessor_config.json"),
    ],
)
def test_a_file_without_weights_is_copied(folders, name):
    folder, _, _ = folders
    (folder / "base" / name).write_bytes(b"{}")
    assert merge(folder) == 0
    assert (folder / "out" / name).read_bytes() == b"{}"


def test_an_adapter_in_the_bases_folder_is_not_one_of_the_models_files(folders, capsys):
    """Transformers would load it on top of the merged model, or fail for its weights."""
    folder, base, adapter = folders
    tensors = read_folder(folder / "base")
    for path in (folder / "base").glob("model*"):
        path.unlink()
    save_file(tensors, folder / "base" / "model.safetensors", {"format": "pt"})
    for file in (folder / "adapter").iterdir():
        shutil.copy(file, folder / "base")
    assert merge(folder) == 0
    assert_merged(read_folder(folder / "out"), base, adapter)
    left = {path.name for path in (folder / "out").iterdir()}
    assert left == {"model.safetensors", "config.json", "tokenizer"}
    assert "adapter_config.json, adapter_model.safetensors" in capsys.readouterr().out


@pytest.mark.parametrize("is_link", [False, True])
def test_a_second_model_that_transformers_would_load_instead_is_refused(folders, capsys, is_link):
    """Transformers takes model.safetensors before the index, whatever the index lists."""
    folder, _, _ = folders
    other = folder / "base" / "model.safetensors"
    save_file(
        {"block.0.q.weight": np.ones((7, 5), np.float32)}, folder / "base" / "old.safetensors"
    )
    if is_link:
        other.symlink_to("old.safetensors")
    else:
        (folder / "base" / "old.safetensors").rename(other)
    error = refused(folder, capsys)
    assert f"{other}: is not in model.safetensors.index.json" in error
    assert "move the one that is out of date" in error


def test_a_model_that_its_index_lists_as_the_only_file_is_merged(folders):
    folder, base, adapter = folders
    tensors = read_folder(folder / "base")
    for path in (folder / "base").glob("model-*"):
        path.unlink()
    save_file(tensors, folder / "base" / "model.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model.safetensors")}
    write_json(folder / "base" / "model.safetensors.index.json", index)
    assert merge(folder) == 0
    assert_merged(read_folder(folder / "out"), base, adapter)


@pytest.mark.parametrize(
    ("named", "status"),
    [("model.safetensors.index.json", 0), ("old.safetensors", 2), ("model-1.safetensors", 2)],
)
def test_a_configuration_that_names_other_weights_is_refused(folders, capsys, named, status):
    """Transformers loads the file that `transformers_weights` names before all others."""
    folder, _, _ = folders
    write_json(folder / "base" / "config.json", {"transformers_weights": named})
    assert merge(folder) == status
    assert ("transformers_weights" in capsys.readouterr().err) == (status == 2)


def test_a_link_to_a_folder_in_the_model_is_followed(folders):
    folder, _, _ = folders
    base = folder / "base"
    (base / "again").symlink_to("tokenizer")
    (base / "sub").mkdir()
    (base / "sub" / "deep").symlink_to(os.path.join("..", "again"))
    (base / ".old").mkdir()
    (base / ".old" / "x").write_text("x")
    (base / ".hidden").symlink_to("tokenizer")
    assert merge(folder, "--verify") == 0
    for name in ("tokenizer", "again", "sub/deep"):
        assert (folder / "out" / name / "vocab.txt").read_text() == "a\nb\n"
        assert not (folder / "out" / name).is_symlink()
    assert not list((folder / "out").glob(".*"))


def test_a_link_to_a_folder_outside_the_model_is_refused_as_one_to_a_file_is(folders, capsys):
    folder, _, _ = folders
    (folder / "base" / "tok").symlink_to(folder / "adapter")
    error = refused(folder, capsys)
    real = (folder / "adapter").resolve()
    assert f"base/tok: this link leads out of the folder, to {real}" in error
    assert "put a copy there" in error


@pytest.mark.parametrize("target", [".", "..", "../sub", "../tokenizer", "x"])
def test_a_link_to_a_folder_that_contains_it_is_refused(folders, capsys, target):
    folder, _, _ = folders
    base = folder / "base"
    (base / "sub").mkdir()
    (base / "sub" / "x").symlink_to(target)
    if target == "../tokenizer":  # each leads to the folder of the other
        (base / "tokenizer" / "y").symlink_to(os.path.join("..", "sub"))
    error = refused(folder, capsys)
    problem = "no file" if target == "x" else "a folder that contains it"
    assert f"this link leads to {problem}; remove it" in error


def test_the_error_about_a_link_to_a_folder_that_contains_it_names_the_link(folders, capsys):
    """On the way through another link, the folder is first met under a third name."""
    folder, _, _ = folders
    (folder / "base" / "sub" / "deep").mkdir(parents=True)
    (folder / "base" / "sub" / "deep" / "up").symlink_to("..")
    (folder / "base" / "walked-first").symlink_to(os.path.join("sub", "deep"))
    assert f"{folder / 'base' / 'walked-first' / 'up'}: this link" in refused(folder, capsys)


def test_links_that_multiply_the_files_are_refused(folders, capsys, monkeypatch):
    """Twenty folders, each with two links to the next one, would be a million files."""
    folder, _, _ = folders
    for number in range(20):
        (folder / "base" / f"{number}").mkdir()
        for name in "ab":
            (folder / "base" / f"{number}" / name).symlink_to(os.path.join("..", f"{number + 1}"))
    (folder / "base" / "20").mkdir()
    monkeypatch.setattr(_model, "_LIMIT", 1000)
    assert "must have at most 1000 files and folders" in refused(folder, capsys)


def test_a_pipe_in_the_model_is_refused(folders, capsys):
    folder, _, _ = folders
    os.mkfifo(folder / "base" / "pipe")
    assert "base/pipe: is neither a file nor a folder; remove it" in refused(folder, capsys)


def test_a_folder_that_cannot_be_read_is_an_error(folders, capsys, monkeypatch):
    folder, _, _ = folders
    closed, scandir = str(folder / "base" / "tokenizer"), os.scandir

    def deny(path):
        if os.fspath(path) == closed:
            raise PermissionError(errno.EACCES, "Permission denied", closed)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", deny)
    assert closed in refused(folder, capsys)


def test_a_single_file_is_merged_into_a_file(tmp_path):
    rng = np.random.default_rng(1)
    base = {f"{path}.weight": draw(rng, *shape) for path, shape in SHAPES.items()}
    save_file(base, tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter")
    assert merge(tmp_path) == 0
    assert_merged(load_file(tmp_path / "out"), base, adapter)
    assert merge(tmp_path, "--force", "--verify") == 0


def test_a_folder_with_one_file_needs_no_index(folders):
    folder, base, adapter = folders
    shutil.rmtree(folder / "base")
    (folder / "base").mkdir()
    save_file(base, folder / "base" / "model.safetensors")
    assert merge(folder) == 0
    assert_merged(read_folder(folder / "out"), base, adapter)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_option_dtype_converts_every_floating_tensor(folders, dtype):
    folder, base, adapter = folders
    write_json(
        folder / "base" / "config.json",
        {"torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16", "rope": {"theta": 1}}},
    )
    assert merge(folder, "--dtype", dtype, "--verify") == 0
    merged = read_folder(folder / "out")
    assert_merged(merged, base, adapter, dtype=dtype)
    assert merged["steps"].tobytes() == base["steps"].tobytes()
    np.testing.assert_array_equal(merged["block.0.q.bias"], base["block.0.q.bias"].astype(dtype))
    config = {"torch_dtype": dtype, "text_config": {"dtype": dtype, "rope": {"theta": 1}}}
    assert json.loads((folder / "out" / "config.json").read_text()) == config


def test_the_result_does_not_depend_on_the_size_of_blocks(folders, monkeypatch):
    folder, _, _ = folders
    assert merge(folder) == 0
    whole = read_folder(folder / "out")
    monkeypatch.setattr(_matrix, "BLOCK", 11)
    assert merge(folder, "--force") == 0
    for name, tensor in read_folder(folder / "out").items():
        assert tensor.tobytes() == whole[name].tobytes(), name


@pytest.mark.parametrize("kind", ["linear", "transposed"])
def test_a_merged_weight_is_a_stream_of_blocks_with_the_norm_of_each_row_once(monkeypatch, kind):
    monkeypatch.setattr(_matrix, "BLOCK", 11)
    rng = np.random.default_rng(2)
    matrix, adapter = draw(rng, 7, 5, dtype="float64"), Adapter(*factors(rng, (7, 5)))
    stored = matrix.T if kind == "transposed" else matrix
    layer = AdaptedLayer(adapter, Config(2, 3.0), LayerKind(kind), stored.shape)
    tensor = SimpleNamespace(shape=stored.shape)
    source = SimpleNamespace(read=lambda rows, empty: stored[rows], tensor=tensor)
    terms = [_rows.Term(updated(layer))]
    stream = _rows.merged_blocks("w", source, terms, load_engine("numpy"), "float64")
    blocks = [(block.rows, block.merged.copy(), block.norms) for block in stream]
    assert len(blocks) == len(range(0, len(stored), blocks[0][0].stop)) > 1
    merged = np.concatenate([rows for _, rows, _ in blocks])
    np.testing.assert_array_equal(merged[blocks[1][0]], blocks[1][1])
    desired = dense(matrix, *adapter)
    np.testing.assert_allclose(merged, desired.T if kind == "transposed" else desired, rtol=1e-12)
    base, adapted = (
        np.concatenate(sides) for sides in zip(*(x[:2] for *_, x in blocks), strict=True)
    )
    np.testing.assert_allclose(base, np.linalg.norm(matrix, axis=1), rtol=1e-12)
    v = matrix + 1.5 * adapter.lora_b.astype("f8") @ adapter.lora_a
    np.testing.assert_allclose(adapted, np.linalg.norm(v, axis=1), rtol=1e-12)


@pytest.mark.parametrize("command", ["merge", "inspect"])
def test_each_factor_of_an_adapter_is_read_from_disk_once(folders, monkeypatch, command):
    """The plan reads the magnitudes too, to compare them with the base's row norms."""
    folder, _, _ = folders
    read, names = Reader.read, []

    def counted(self, name, *arguments):
        if self.path.parent == folder / "adapter":
            names.append(name)
        return read(self, name, *arguments)

    monkeypatch.setattr(Reader, "read", counted)
    if command == "merge":
        plan = plan_merge(folder / "base", folder / "adapter", Options())
        run_merge(plan, folder / "out")
    else:
        look_at_base(open_model(folder / "base"), load_adapters(folder / "adapter"))
    stored = load_file(folder / "adapter" / "adapter_model.safetensors")
    factors = [name for name in names if "magnitude" not in name]
    assert sorted(factors) == sorted(name for name in stored if "magnitude" not in name)
    assert set(names) == set(stored)


def test_the_result_does_not_depend_on_the_number_of_jobs(folders):
    folder, _, _ = folders
    assert merge(folder) == 0
    alone = read_folder(folder / "out")
    assert merge(folder, "--jobs", "2", "--force", "--verify") == 0
    assert {name: x.tobytes() for name, x in read_folder(folder / "out").items()} == {
        name: x.tobytes() for name, x in alone.items()
    }


def test_a_plan_can_be_run_in_another_folder(folders, monkeypatch):
    """The workers of a cluster may run in another folder."""
    folder, base, adapter = folders
    monkeypatch.chdir(folder)
    plan = plan_merge("base", "adapter", Options())
    monkeypatch.chdir(folder / "base")
    run_merge(plan, folder / "out", verify=True)
    assert_merged(read_folder(folder / "out"), base, adapter)


def answering(**parts):
    """Return a client of a cluster whose processes are this one."""
    return SimpleNamespace(
        run_on_scheduler=lambda function, *arguments: function(*arguments),
        run=lambda function, *arguments: {"tcp://worker:1": function(*arguments)},
        **parts,
    )


def test_a_scheduler_takes_the_shards(folders, capsys, monkeypatch):
    folder, base, adapter = folders
    seen = []

    @contextlib.contextmanager
    def client(address):
        seen.append(address)
        with ThreadPoolExecutor(2) as pool:
            yield answering(get_executor=lambda: pool)

    library = SimpleNamespace(Client=client, KilledWorker=KeyError)
    monkeypatch.setitem(sys.modules, "distributed", library)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    assert merge(folder, "--scheduler", "tcp://here:8786") == 0
    assert seen == ["tcp://here:8786"]
    assert_merged(read_folder(folder / "out"), base, adapter)
    found = {"distributed": None}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found.get(name, True))
    assert merge(folder, "--scheduler", "tcp://here:8786") == 2
    assert install_hint("distributed") in capsys.readouterr().err


def test_a_shard_that_fails_on_a_cluster_cancels_those_that_wait(folders):
    folder, *_ = folders
    tasks = []

    def submit(function, *arguments):
        tasks.append(Future())
        if len(tasks) == 1:
            tasks[0].set_exception(CheckpointError("NaN"))
        return tasks[-1]

    plan = plan_merge(folder / "base", folder / "adapter", Options())
    with pytest.raises(CheckpointError, match="NaN"):
        run_merge(plan, folder / "out", executor=SimpleNamespace(submit=submit))
    assert [task.cancelled() for task in tasks] == [False, True]


class KilledWorker(Exception):  # noqa: N818  as the library calls it
    pass


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("missing port number"), "--scheduler 'here': missing port number"),
        (OSError("Timed out"), "Timed out"),
        (KilledWorker("shard-1"), "the cluster lost the merge: shard-1; the same merge goes on"),
        (CancelledError("shard-1"), "the cluster lost the merge: shard-1; the same merge goes on"),
    ],
)
def test_an_error_of_a_cluster_is_one_line(folders, capsys, monkeypatch, error, message):
    folder, _, _ = folders

    def fail(*_):
        raise error

    @contextlib.contextmanager
    def client(address):
        if not isinstance(error, KilledWorker | CancelledError):
            raise error
        yield answering(get_executor=lambda: SimpleNamespace(submit=fail))

    library = SimpleNamespace(Client=client, KilledWorker=KilledWorker)
    monkeypatch.setitem(sys.modules, "distributed", library)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    assert merge(folder, "--scheduler", "here") == 2
    problem = capsys.readouterr().err
    assert message in problem
    assert problem.count("\n") == 1
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("where", "module", "version", "message"),
    [
        ("run_on_scheduler", "doraxp", None, "the scheduler has no doraxp: install doraxp[distri"),
        ("run", "ml_dtypes", None, "the worker tcp://worker:1 has no ml_dtypes: install doraxp["),
        ("run", "torch", None, "the worker tcp://worker:1 has no torch: install"),
        ("run", "numpy", "1.26.4", "has numpy 1.26.4, but here it is 2"),
        ("run", "doraxp", "0.1", "has doraxp 0.1, but here it is "),
        ("run", "ml_dtypes", "0.1", "has ml_dtypes 0.1, but here it is "),
        ("run", "threadpoolctl", "0.1", None),
        ("run", OSError("gone"), None, "the cluster cannot say what is installed there: gone"),
    ],
)
def test_a_worker_that_lacks_something_is_named_before_anything_is_written(
    folders, capsys, monkeypatch, where, module, version, message
):
    folder, _, _ = folders
    client = answering(get_executor=lambda: ThreadPoolExecutor(1))
    ask = getattr(client, where)

    def change(found):
        return found | {module: version} if version else {k: found[k] for k in found if k != module}

    def answer(*question):
        if isinstance(module, OSError):
            raise module
        found = ask(*question)
        return change(found) if where != "run" else {key: change(found[key]) for key in found}

    setattr(client, where, answer)
    library = SimpleNamespace(
        Client=lambda address: contextlib.nullcontext(client), KilledWorker=KilledWorker
    )
    monkeypatch.setitem(sys.modules, "distributed", library)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    options = []
    if module == "torch":
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(__version__="2.13.0"))
        monkeypatch.setattr(
            "doraxp.backends.available",
            lambda: [Status("torch", True, "2.13.0")],
        )
        options = ["--backend", "torch"]
    status = merge(folder, "--scheduler", "here", *options)
    problem = capsys.readouterr().err
    if message is None:
        assert status == 0
        return
    assert status == 2
    assert message in problem
    assert problem.startswith("doraxp merge: error: --scheduler 'here': ")
    assert problem.count("\n") == 1
    assert sorted(path.name for path in folder.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize("block", [1 << 19, 9])
@pytest.mark.parametrize("kind", ["transposed", "embedding", "conv", "columns"])
def test_every_kind_is_merged_as_it_is_stored(tmp_path, monkeypatch, kind, block):
    monkeypatch.setattr(_matrix, "BLOCK", block)
    rng = np.random.default_rng(3)
    shape = (6, 3, 3, 2) if kind == "conv" else (9, 6)
    weight = draw(rng, *shape)
    matrix = weight.reshape(6, -1) if kind == "conv" else weight.T
    a, b, m = factors(rng, matrix.shape)
    ones = (1,) * (len(shape) - 2)
    (tmp_path / "adapter").mkdir()
    save_file({"x.y.weight": weight}, tmp_path / "base")
    prefix, config = "base_model.model.x.y", peft_config(fan_in_fan_out=kind == "transposed")
    if kind == "columns":
        tensors = {
            "lora_unet_x_y.lora_up.weight": np.ascontiguousarray(a.T),
            "lora_unet_x_y.lora_down.weight": np.ascontiguousarray(b.T),
            "lora_unet_x_y.dora_scale": m.reshape(1, -1),
            "lora_unet_x_y.alpha": np.array(3, np.float32),
        }
    elif kind == "embedding":
        names = ("lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
        tensors = {f"{prefix}.{name}": x for name, x in zip(names, (a, b, m), strict=True)}
    else:
        tensors = {
            f"{prefix}.lora_A.weight": a.reshape(2, *shape[1:]) if kind == "conv" else a,
            f"{prefix}.lora_B.weight": b.reshape(*b.shape, *ones),
            f"{prefix}.lora_magnitude_vector.weight": m,
        }
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    write_json(tmp_path / "adapter" / "adapter_config.json", config)
    assert merge(tmp_path, "--verify") == 0
    desired = dense(matrix, a, b, m)
    desired = desired.reshape(shape) if kind == "conv" else desired.T
    merged = load_file(tmp_path / "out")["x.y.weight"]
    np.testing.assert_allclose(merged, desired, rtol=2**-22, atol=0)


def test_changes_agree_with_a_dense_merge(folders):
    folder, base, adapter = folders
    changes = run_merge(plan_merge(folder / "base", folder / "adapter", Options()), folder / "out")
    assert changes.keys() == {f"{path}.weight" for path in SHAPES}
    for name, change in changes.items():
        before = base[name].astype(np.float64)
        after = dense(before, *adapter[name.removesuffix(".weight")])
        norms = [np.linalg.norm(w, axis=1) for w in (before, after)]
        cosine = np.sum(before * after, axis=1) / (norms[0] * norms[1])
        moved = np.linalg.norm(after - before, axis=1) / norms[0]
        assert change.magnitude == pytest.approx(np.mean(np.abs(norms[1] - norms[0])), rel=1e-5)
        assert change.direction == pytest.approx(np.mean(1 - cosine), rel=1e-5)
        assert change.largest == pytest.approx(moved.max(), rel=1e-5)


def test_the_direction_turns_with_the_sign_of_m(folders):
    folder, base, adapter = folders
    path = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = "base_model.model.block.0.q.lora_magnitude_vector"
    tensors[key] *= np.where(np.arange(7) % 2, -1, 1).astype("f4")
    save_file(tensors, path)
    changes = run_merge(plan_merge(folder / "base", folder / "adapter", Options()), folder / "out")
    before = base["block.0.q.weight"].astype(np.float64)
    after = dense(before, *adapter["block.0.q"][:2], tensors[key])
    lengths = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
    direction = np.mean(1 - np.sum(before * after, axis=1) / lengths)
    assert changes["block.0.q.weight"].direction == pytest.approx(direction, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_squares_of_a_transposed_weight_are_summed_in_float64(tmp_path, scale):
    rng = np.random.default_rng(3)
    a, b, m = factors(rng, (7, 5))
    weight = np.float32(scale) * draw(rng, 7, 5)
    b, m = np.float32(scale) * b, np.float32(scale) * m
    (tmp_path / "base").mkdir()
    save_file({"x.y.weight": weight.T.copy()}, tmp_path / "base" / "model.safetensors")
    write_adapter(tmp_path / "adapter", {"x.y": (7, 5)}, fan_in_fan_out=True)
    names = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    leaves = zip(names, (a, b, m), strict=True)
    edit_adapter(
        tmp_path,
        add={f"base_model.model.x.y.{name}": leaf for name, leaf in leaves},
        fan_in_fan_out=True,
    )
    assert merge(tmp_path, "--compute", "float32", "--verify") == 0
    merged = load_file(tmp_path / "out" / "model.safetensors")["x.y.weight"]
    np.testing.assert_allclose(merged.T, dense(weight, a, b, m), rtol=1e-5)


@pytest.mark.parametrize("rounding", [1.0, 1 + 2**-22])
def test_an_adapter_that_changes_only_the_rounding_is_warned_of(folders, capsys, rounding):
    folder, base, _ = folders
    path = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    prefix = "base_model.model.block.0.q."
    tensors[f"{prefix}lora_B.weight"] *= 0
    norm = np.linalg.norm(base["block.0.q.weight"].astype(np.float32), axis=1)
    tensors[f"{prefix}lora_magnitude_vector"] = np.float32(rounding) * norm
    save_file(tensors, path)
    assert merge(folder, "--compute", "float32") == 0
    warning = "doraxp merge: warning: the adapter changes nothing in block.0.q.weight\n"
    assert capsys.readouterr().err.endswith(warning)
    merged = read_folder(folder / "out")["block.0.q.weight"]
    assert merged.tobytes() == base["block.0.q.weight"].tobytes()


EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("config", "head", "shared"),
    [
        ({"tie_word_embeddings": True}, False, True),
        ({"text_config": {"tie_word_embeddings": True}}, False, True),
        ({"architectures": ["GemmaForCausalLM"]}, False, True),  # its default, so not written
        ({"architectures": ["BertModel"]}, False, False),
        ({"architectures": ["AForCausalLM"], "tie_word_embeddings": False}, False, False),
        ({"tie_word_embeddings": True}, True, False),
    ],
)
@pytest.mark.parametrize("way", ["adapted", "replaced"])
def test_a_changed_embedding_leaves_the_output_head_as_it_was(
    tmp_path, capsys, config, head, shared, way
):
    untouched = config.get("tie_word_embeddings")
    rng = np.random.default_rng(1)
    base = {"model.layers.0.q.weight": draw(rng, 7, 5), EMBEDDING: draw(rng, 9, 5)}
    (tmp_path / "base").mkdir()
    heads = {"lm_head.weight": draw(rng, 9, 5)} if head else {}
    save_file(base | heads, tmp_path / "base" / "model.safetensors")
    write_json(tmp_path / "base" / "config.json", config)
    write_adapter(tmp_path / "adapter", {"model.layers.0.q": (7, 5)})
    prefix = "base_model.model.model.embed_tokens"
    if way == "replaced":
        added = {f"{prefix}.modules_to_save.weight": draw(rng, 9, 5)}
    else:
        names = ("lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
        leaves = factors(rng, (5, 9))
        added = {f"{prefix}.{name}": leaf for name, leaf in zip(names, leaves, strict=True)}
    edit_adapter(tmp_path, add=added)
    assert merge(tmp_path, "--dry-run") == 0
    assert ("New in OUT: lm_head.weight" in capsys.readouterr().out) == shared
    assert merge(tmp_path, "--verify") == 0
    assert capsys.readouterr().err == ""
    result = load_file(tmp_path / "out" / "model.safetensors")
    assert (result[EMBEDDING] != base[EMBEDDING]).any()
    if shared or head:
        old = heads.get("lm_head.weight", base[EMBEDDING])
        np.testing.assert_array_equal(result["lm_head.weight"], old)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("tie_word_embeddings") is (False if shared or head else untouched)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_verify_accepts_the_rounding_of_subnormal_numbers(tmp_path, dtype):
    rng = np.random.default_rng(1)
    scale = 2.0 * float(ml_dtypes.finfo(dtype).smallest_normal)
    shape = (40, 30)
    weight = (scale * draw(rng, *shape)).astype(dtype)
    save_file({"block.0.q.weight": weight}, tmp_path / "base")
    write_adapter(tmp_path / "adapter", {"block.0.q": shape})
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    small = {name: x * scale for name, x in tensors.items() if "lora_A" not in name}
    edit_adapter(tmp_path, add=small)
    assert merge(tmp_path, "--verify") == 0


def test_a_tensor_without_elements_is_verified_in_another_dtype(tmp_path):
    base = {f"{path}.weight": draw(np.random.default_rng(1), *s) for path, s in SHAPES.items()}
    save_file(base | {"none": np.empty((5, 0), np.float32)}, tmp_path / "base")
    write_adapter(tmp_path / "adapter")
    assert merge(tmp_path, "--verify", "--dtype", "float16") == 0
    assert load_file(tmp_path / "out")["none"].shape == (5, 0)


def test_a_zero_row_stays_zero(tmp_path):
    rng = np.random.default_rng(1)
    base = {f"{path}.weight": draw(rng, *shape) for path, shape in SHAPES.items()}
    base["block.0.q.weight"][2] = 0
    save_file(base, tmp_path / "base")
    write_adapter(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.block.0.q.lora_B.weight"][2] = 0
    save_file(tensors, path)
    assert merge(tmp_path, "--verify") == 0
    assert not load_file(tmp_path / "out")["block.0.q.weight"][2].any()


def test_full_tensors_in_the_adapter_replace_the_bases(folders):
    folder, base, adapter = folders
    path = folder / "adapter" / "adapter_model.safetensors"
    rng = np.random.default_rng(9)
    changed = draw(rng, 7, 5)
    bias = draw(rng, 6)
    tensors = load_file(path) | {
        "base_model.model.block.1.q.base_layer.weight": changed,
        "base_model.model.block.0.k.bias": bias,
    }
    save_file(tensors, path)
    assert merge(folder, "--verify") == 0
    merged = read_folder(folder / "out")
    dtype = ml_dtypes.bfloat16
    desired = dense(changed, *adapter["block.1.q"])
    np.testing.assert_allclose(merged["block.1.q.weight"].astype("f8"), desired, rtol=2**-7)
    assert merged["block.0.k.bias"].tobytes() == bias.astype(dtype).tobytes()
    assert merged["block.0.q.bias"].tobytes() == base["block.0.q.bias"].tobytes()


@pytest.mark.parametrize("way", ["dropped", "added"])
def test_names_may_differ_by_one_leading_part(tmp_path, way):
    rng = np.random.default_rng(1)
    lead = {"dropped": ("", "model."), "added": ("bert.", "")}[way]
    base = {f"{lead[0]}{path}.weight": draw(rng, *shape) for path, shape in SHAPES.items()}
    save_file(base, tmp_path / "base")
    shapes = {f"{lead[1]}{path}": shape for path, shape in SHAPES.items()}
    adapter = write_adapter(tmp_path / "adapter", shapes)
    assert merge(tmp_path) == 0
    renamed = {lead[0] + path.removeprefix(lead[1]): leaves for path, leaves in adapter.items()}
    assert_merged(load_file(tmp_path / "out"), base, renamed)


def test_a_missing_tensor_does_not_hide_a_different_leading_part(tmp_path, capsys):
    rng = np.random.default_rng(1)
    save_file({f"{path}.weight": draw(rng, *s) for path, s in SHAPES.items()}, tmp_path / "base")
    write_adapter(tmp_path / "adapter", {f"bert.{path}": shape for path, shape in SHAPES.items()})
    edit_adapter(tmp_path, add={"base_model.model.classifier.weight": np.ones((2, 5), "f4")})
    error = refused(tmp_path, capsys)
    missing = "classifier.weight"
    assert error.endswith(f"has no tensor {missing} for base_model.model.{missing} to replace\n")
    assert "block" not in error


def test_two_leading_parts_that_both_fit_are_refused(tmp_path, capsys):
    rng = np.random.default_rng(1)
    sides = [f"{side}.{path}.weight" for side in ("decoder", "encoder") for path in SHAPES]
    base = {name: draw(rng, *SHAPES[name.split(".", 1)[1][:-7]]) for name in sides}
    save_file(base, tmp_path / "base")
    write_adapter(tmp_path / "adapter")
    assert (
        "block.0.k.weight may be decoder.block.0.k.weight or encoder.block.0.k.weight in the base"
        in refused(tmp_path, capsys)
    )


def test_a_dry_run_writes_nothing(folders, capsys):
    folder, _, _ = folders
    edit_adapter(folder, add={"base_model.model.block.0.q.bias": np.ones(7, np.float32)})
    assert merge(folder, "--dry-run", "--all") == 0
    out = capsys.readouterr().out
    assert all(f"{path}.weight" in out for path in SHAPES)
    assert re.search(r"block\.0\.q\.bias +replaced", out)
    assert "peft adapter: 3 of 9 tensors merged, 1 replaced" in out
    assert "complete" not in out
    assert sorted(path.name for path in folder.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize("library", ["torch", "cupy"])
def test_torch_and_cupy_compute_the_merge(folders, monkeypatch, library):
    folder, base, adapter = folders
    seen = []

    class Host(np.ndarray):
        def cpu(self):
            return self

        def numpy(self):
            seen.append(self.shape)
            return np.asarray(self)

    fakes = {
        "torch": SimpleNamespace(
            asarray=lambda x, device: x.view(Host),
            cuda=SimpleNamespace(is_available=lambda: False),
        ),
        "cupy": SimpleNamespace(asarray=lambda x: x.view(Host), asnumpy=lambda x: Host.numpy(x)),
    }
    monkeypatch.setitem(sys.modules, library, fakes[library])
    plan = plan_merge(folder / "base", folder / "adapter", Options(library))
    run_merge(plan, folder / "out")
    assert seen
    assert_merged(read_folder(folder / "out"), base, adapter)


class Quiet(np.ndarray):
    """An array of another library: NumPy's `errstate` does not reach its arithmetic."""

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        def plain(x):
            if isinstance(x, tuple):
                return tuple(map(plain, x))
            return np.asarray(x) if isinstance(x, Quiet) else x

        kwargs = {name: plain(x) for name, x in kwargs.items()}
        with np.errstate(all="ignore"):
            result = getattr(ufunc, method)(*plain(inputs), **kwargs)
        return result.view(Quiet) if isinstance(result, np.ndarray) else result

    def cpu(self):
        return self

    def numpy(self):
        return np.asarray(self)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("weight", "magnitude", "alpha"),
    [(1e-20, 1e30, 3.0), (1e-30, 3e38, 3.0), (1.0, 1.0, 1e39), (np.nan, 1.0, 3.0)],
    ids=["m / n", "a gain", "s", "NaN"],
)
@pytest.mark.parametrize("library", ["numpy", "torch", "cupy"])
def test_no_library_writes_an_infinity(
    tmp_path, monkeypatch, library, weight, magnitude, alpha, transposed
):
    """NumPy raises where a number overflows; the other libraries go on with infinity."""
    fakes = {
        "torch": SimpleNamespace(
            asarray=lambda x, device: x.view(Quiet),
            cuda=SimpleNamespace(is_available=lambda: False),
        ),
        "cupy": SimpleNamespace(asarray=lambda x: x.view(Quiet), asnumpy=Quiet.numpy),
    }
    if library in fakes:
        monkeypatch.setitem(sys.modules, library, fakes[library])
    (tmp_path / "base").mkdir()
    shape = (5, 7) if transposed else (7, 5)
    base = {"block.0.q.weight": np.full(shape, weight, np.float32)}
    save_file(base, tmp_path / "base" / "model.safetensors")
    changes = {"fan_in_fan_out": transposed, "lora_alpha": alpha}
    write_adapter(tmp_path / "adapter", {"block.0.q": (7, 5)}, **changes)
    prefix = "base_model.model.block.0.q"
    added = {f"{prefix}.lora_magnitude_vector": np.full(7, magnitude)}
    if alpha == 3.0:
        added[f"{prefix}.lora_B.weight"] = np.zeros((7, 2))
    edit_adapter(tmp_path, add=added, **changes)
    plan = plan_merge(tmp_path / "base", tmp_path / "adapter", Options(library, compute="float32"))
    problem = "contains NaN" if weight != weight else "has values too large for float32"
    with pytest.raises(CheckpointError, match=f"block.0.q.weight {problem}"):
        run_merge(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_an_infinity_in_a_copied_tensor_is_kept(folders, dtype):
    folder, _, _ = folders
    bias = np.array([np.inf, -np.inf, np.nan, 0, 1, 2, 3], np.float32)
    edit_base(folder, **{"block.0.q.bias": bias})
    assert merge(folder, "--dtype", dtype) == 0
    copied = read_folder(folder / "out")["block.0.q.bias"].astype(np.float32)
    np.testing.assert_array_equal(copied, bias)


def test_values_too_large_for_a_dtype_are_refused(folders, capsys):
    folder, _, _ = folders
    edit_base(folder, **{"block.0.q.bias": np.full(7, 1e6, np.float32)})
    assert merge(folder, "--dtype", "float16") == 2
    assert "block.0.q.bias has values too large for float16" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["block.0.q.weight", "block.0.q.bias"])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_number_that_bfloat16_rounds_to_infinity_is_refused(folders, capsys, name, sign):
    """The largest bfloat16 is below the largest float32, and the cast does not report overflow."""
    folder, _, _ = folders
    least = np.float32(float.fromhex("0x1.FFp127"))
    below = np.nextafter(least, np.float32(0))
    for largest, status in (below, 0), (least, 2):
        if name.endswith("bias"):
            edit_base(folder, **{name: np.full(7, sign * largest, np.float32)})
        else:  # W' = m⊙w, where w has one number in a row
            prefix = "base_model.model.block.0.q"
            edit_base(folder, **{name: sign * np.eye(7, 5, dtype=np.float32)})
            b, m = np.zeros((7, 2), np.float32), np.full(7, largest)
            edit_adapter(
                folder,
                add={f"{prefix}.lora_B.weight": b, f"{prefix}.lora_magnitude_vector": m},
            )
        assert merge(folder, "--dtype", "bfloat16", "--force") == status
        problem = f"{name} has values too large for bfloat16" if status else ""
        assert problem in capsys.readouterr().err


@pytest.mark.parametrize(
    ("weight", "magnitude", "arguments", "dtype"),
    [
        (1e300, 1.0, ["--compute", "float32"], "float32"),
        (1.0, 1e300, ["--compute", "float32"], "float32"),
        (1.0, 1e300, ["--dtype", "bfloat16"], "bfloat16"),
        (1e-30, 3e38, ["--compute", "float32"], "float32"),
    ],
)
def test_values_too_large_to_compute_with_are_refused(
    tmp_path, capsys, weight, magnitude, arguments, dtype
):
    (tmp_path / "base").mkdir()
    base = {"block.0.q.weight": np.full((7, 5), weight)}
    save_file(base, tmp_path / "base" / "model.safetensors")
    write_adapter(tmp_path / "adapter", {"block.0.q": (7, 5)})
    prefix = "base_model.model.block.0.q"
    small = {f"{prefix}.lora_B.weight": np.zeros((7, 2))}
    edit_adapter(tmp_path, add=small | {f"{prefix}.lora_magnitude_vector": np.full(7, magnitude)})
    error = refused(tmp_path, capsys, *arguments)
    assert f"block.0.q.weight has values too large for {dtype}" in error


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_an_adapter_whose_init_did_not_change_the_base_is_merged(folders, init):
    folder, _, _ = folders
    edit_adapter(folder, init_lora_weights=init)
    assert merge(folder, "--dry-run") == 0


def test_a_scale_too_large_to_compute_with_is_refused(folders, capsys):
    folder, _, _ = folders
    edit_adapter(folder, lora_alpha=1e39)
    assert "weight has values too large for float32" in refused(folder, capsys)


def test_the_change_of_huge_weights_is_computed_without_a_warning(tmp_path):
    save_file({"block.0.q.weight": np.full((7, 5), 1e200)}, tmp_path / "base")
    write_adapter(tmp_path / "adapter", {"block.0.q": (7, 5)})
    assert merge(tmp_path) == 0


# Interrupted merges, and targets that cannot be written


def test_a_stopped_merge_goes_on_from_its_finished_shards(folders, monkeypatch):
    folder, base, adapter = folders
    written = []

    def stop_at_the_second(merge, shard, *args):
        written.append(shard)
        if len(written) == 2:
            raise KeyboardInterrupt
        return _shard.merge_shard(merge, shard, *args)

    monkeypatch.setattr(_run, "merge_shard", stop_at_the_second)
    assert merge(folder) == 130
    assert not (folder / "out").exists()
    assert merge(folder, "--verify") == 0
    assert written == ["model-1.safetensors", "model-2.safetensors", "model-2.safetensors"]
    assert_merged(read_folder(folder / "out"), base, adapter)
    assert not (folder / ".out.partial").exists()


def test_an_interrupt_says_how_to_go_on(folders, capsys, monkeypatch):
    folder, base, adapter = folders

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_run, "merge_shard", interrupt)
        assert merge(folder) == 130
    expected = (
        "doraxp merge: interrupted; the same command goes on from the shards that are finished, in "
        ".out.partial\n"
    )
    assert capsys.readouterr().err == expected
    assert merge(folder) == 0
    assert_merged(read_folder(folder / "out"), base, adapter)


@pytest.mark.parametrize("force", [False, True])
def test_after_a_kill_at_the_very_end_the_next_merge_starts_anew(folders, monkeypatch, force):
    folder, base, adapter = folders

    def killed(*_):
        raise KeyboardInterrupt

    if force:
        (folder / "out").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        assert merge(folder, "--force") == 130
    assert_merged(read_folder(folder / "out"), base, adapter)
    assert (folder / ".out.partial").exists()
    assert merge(folder, "--force") == 0
    assert_merged(read_folder(folder / "out"), base, adapter)
    assert not (folder / ".out.partial").exists()


@pytest.mark.parametrize("left", ["file", "link"])
def test_a_file_or_link_at_the_work_folder_is_kept(folders, capsys, left):
    folder, _, _ = folders
    mine, work = folder / "mine", folder / ".out.partial"
    mine.mkdir()
    (mine / "kept").write_text("kept")
    if left == "link":
        work.symlink_to(mine)
    else:
        work.write_text("kept")
    assert merge(folder) == 2
    assert f"{work}: must be a folder of an earlier merge, or not exist" in capsys.readouterr().err
    assert (mine / "kept").read_text() == "kept"
    assert work.is_symlink() or work.read_text() == "kept"


def test_a_link_at_out_is_replaced_only_by_force(folders, capsys):
    folder, base, adapter = folders
    (folder / "out").symlink_to(folder / "nowhere")
    assert merge(folder) == 2
    assert "already exists; --force replaces it" in capsys.readouterr().err
    assert merge(folder, "--force") == 0
    assert not (folder / "out").is_symlink()
    assert_merged(read_folder(folder / "out"), base, adapter)


def test_an_error_in_one_shard_stops_the_others(folders, monkeypatch):
    folder, _, _ = folders
    begun, stopped = threading.Barrier(2), []

    def one_is_bad(merge, work, name, verify, on_bytes):
        begun.wait()
        if name == "model-1.safetensors":
            raise CheckpointError("bad")
        try:
            while True:
                on_bytes(1)
        finally:
            stopped.append(name)

    monkeypatch.setattr(_run, "finish_shard", one_is_bad)
    assert merge(folder, "--jobs", "2") == 2
    assert stopped == ["model-2.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == ["adapter", "base"]


def test_a_result_is_sent_to_the_disk_as_it_grows(folders, monkeypatch):
    folder, base, adapter = folders
    asked = []
    monkeypatch.setattr(_shard, "WINDOW", 8)
    monkeypatch.setattr(os, "posix_fadvise", lambda *args: asked.append(args), raising=False)
    monkeypatch.setattr(os, "POSIX_FADV_DONTNEED", 4, raising=False)
    assert merge(folder) == 0
    assert len(asked) > 4
    assert_merged(read_folder(folder / "out"), base, adapter)


def test_finished_shards_of_another_merge_are_not_used(folders, monkeypatch):
    folder, base, adapter = folders

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(_run, "copy_others", stop)
    assert merge(folder, "--dtype", "float16") == 130
    monkeypatch.undo()
    assert merge(folder) == 0
    assert_merged(read_folder(folder / "out"), base, adapter)


KILLED = """
import os, sys, time
from doraxp.checkpoint import _shard
from doraxp.cli import main
write = _shard._Output.write_array
def slow(*args):
    time.sleep(0.005)
    write(*args)
_shard._Output.write_array = slow
sys.exit(main(sys.argv[1:]))
"""


def test_a_merge_killed_at_any_moment_leaves_no_out_or_a_complete_one(folders):
    folder, base, adapter = folders
    command = [sys.executable, "-c", KILLED, "merge"]
    command += [str(folder / name) for name in ("base", "adapter")] + ["--out", str(folder / "out")]
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    rng = np.random.default_rng(0)
    for delay in 0.2 + 0.5 * rng.random(6):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (folder / "out").exists():
            assert_merged(read_folder(folder / "out"), base, adapter)
            shutil.rmtree(folder / "out")
    assert merge(folder, "--verify") == 0
    assert_merged(read_folder(folder / "out"), base, adapter)
    assert all(path.read_bytes() == content for path, content in before.items())


def test_out_is_replaced_only_by_force(folders, capsys):
    folder, base, adapter = folders
    (folder / "out").mkdir()
    save_file({"old": base["steps"]}, folder / "out" / "old.safetensors")
    assert merge(folder) == 2
    assert "already exists; --force replaces it" in capsys.readouterr().err
    assert (folder / "out" / "old.safetensors").exists()
    assert merge(folder, "--force") == 0
    assert_merged(read_folder(folder / "out"), base, adapter)
    assert not (folder / "out" / "old.safetensors").exists()


def test_a_merge_killed_between_its_two_renames_is_finished(folders, monkeypatch):
    """The next merge finishes it even if someone has put a folder at OUT since."""
    folder, base, adapter = folders
    (folder / "out").mkdir()
    save_file({"old": base["steps"]}, folder / "out" / "old.safetensors")
    kind = type(folder)
    rename = kind.rename

    def killed(self, target):
        if target == folder / "out":
            raise KeyboardInterrupt
        return rename(self, target)

    plan = plan_merge(folder / "base", folder / "adapter", Options())
    with monkeypatch.context() as patch:
        patch.setattr(kind, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            run_merge(plan, folder / "out", force=True)
    (folder / "out").mkdir()
    assert merge(folder, "--force") == 0
    assert_merged(read_folder(folder / "out"), base, adapter)
    assert sorted(path.name for path in folder.iterdir()) == ["adapter", "base", "out"]


def test_a_merged_file_does_not_replace_a_folder(tmp_path, capsys):
    rng = np.random.default_rng(1)
    base = {f"{path}.weight": draw(rng, *shape) for path, shape in SHAPES.items()}
    save_file(base, tmp_path / "base")
    write_adapter(tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    assert merge(tmp_path, "--force") == 2
    error = "OUT must be a file, as BASE is, but is a folder"
    assert error in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out"]


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("base", "OUT must not be in BASE"),
        ("base/out", "OUT must not be in BASE"),
        ("adapter", "OUT and its work folder must not contain BASE or ADAPTER"),
        (".", "OUT and its work folder must not contain BASE or ADAPTER"),
        ("none/out", "no such folder"),
        ("out.safetensors", "OUT must be a folder, as BASE is"),
    ],
)
def test_a_target_in_a_wrong_place_is_refused(folders, capsys, out, message):
    folder, _, _ = folders
    paths = [str(folder / name) for name in ("base", "adapter")]
    before = sorted(folder.rglob("*"))
    assert main(["merge", *paths, "--out", str(folder / out), "--force"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(folder.rglob("*")) == before


def test_a_full_disk_is_reported_before_anything_is_written(folders, capsys, monkeypatch):
    folder, _, _ = folders
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    assert merge(folder) == 2
    assert "bytes are needed, 100 are free" in capsys.readouterr().err
    assert not (folder / ".out.partial").exists()


def test_the_room_that_an_earlier_merge_fills_counts_as_free(folders, monkeypatch):
    folder, _, _ = folders
    size = plan_merge(folder / "base", folder / "adapter", Options()).size
    run = folder / ".out.partial" / ("0" * 32) / "model"
    run.mkdir(parents=True)
    (run / "model.safetensors").write_bytes(bytes(1000))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=size - 1000))
    assert merge(folder) == 0


def test_finished_shards_survive_a_disk_that_fills_up(folders, capsys, monkeypatch):
    folder, _, _ = folders

    sync, synced = os.fsync, []

    def full(file):
        synced.append(file)
        if len(synced) > 1:  # the first is that of the file that says what merge it is
            raise OSError(28, "No space left on device")
        sync(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert merge(folder) == 2
    error = capsys.readouterr().err
    assert re.search(r"unfinished/model-1\.safetensors\.\w+: No space left on device; the", error)
    assert not (folder / "out").exists()
    assert merge(folder) == 0


def test_a_read_only_folder_is_refused(folders, capsys, monkeypatch):
    folder, _, _ = folders
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert merge(folder) == 2
    assert "not writable" in capsys.readouterr().err


# Verification


@pytest.mark.parametrize("name", ["block.0.q.weight", "block.0.q.bias", "steps"])
def test_verify_finds_one_wrong_byte(folders, capsys, monkeypatch, name):
    folder, _, _ = folders

    def spoil(merge, shard, target, *args):
        yield from _shard.merge_shard(merge, shard, target, *args)
        if name in merge.model.shards[shard].tensors:
            raw = bytearray(target.read_bytes())
            length = int.from_bytes(raw[:8], "little")
            offsets = json.loads(raw[8 : 8 + length])[name]["data_offsets"]
            raw[8 + length + offsets[0] + 1] ^= 0x41
            target.write_bytes(raw)

    monkeypatch.setattr(_run, "merge_shard", spoil)
    assert merge(folder, "--verify") == 2
    assert f"{name} is not" in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == ["adapter", "base"]


def test_verify_finds_a_missing_tensor(folders, capsys, monkeypatch):
    folder, base, _ = folders

    def spoil(merge, shard, target, *_):
        save_file({"steps": base["steps"]}, target)
        return []

    monkeypatch.setattr(_run, "merge_shard", spoil)
    assert merge(folder, "--verify") == 2
    assert "the tensors are not those of" in capsys.readouterr().err


# Adapters and bases that do not fit, and malformed ones


def edit_adapter(folder, remove=(), add=None, **config):
    path = folder / "adapter" / "adapter_model.safetensors"
    tensors = {name: x for name, x in load_file(path).items() if not name.endswith(tuple(remove))}
    save_file(tensors | (add or {}), path)
    write_json(folder / "adapter" / "adapter_config.json", peft_config(**config))


def edit_base(folder, **changes):
    path = folder / "base" / "model-1.safetensors"
    save_file(load_file(path) | changes, path)


def extend_base(folder, **tensors):
    """Add tensors to the first shard and to the index."""
    edit_base(folder, **tensors)
    path = folder / "base" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= dict.fromkeys(tensors, "model-1.safetensors")
    write_json(path, index)


def test_every_adapter_without_a_weight_is_named(folders, capsys):
    folder, _, _ = folders
    shutil.rmtree(folder / "adapter")
    write_adapter(folder / "adapter", {**SHAPES, "lm_head": (7, 5), "block.9.q": (7, 5)})
    error = refused(folder, capsys)
    assert "--rename" not in error  # each tensor has a module
    assert "the base has no lm_head.weight" in error
    assert "the base has no block.9.q.weight" in error


def test_a_shape_that_does_not_fit_is_named(folders, capsys):
    folder, _, _ = folders
    edit_base(folder, **{"block.0.q.weight": np.ones((7, 6), np.float32)})
    problem = "block.0.q.weight has shape (7, 6), but its adapter is for (7, 5)"
    assert problem in refused(folder, capsys)


def test_a_quantised_weight_is_named(folders, capsys):
    folder, _, _ = folders
    edit_base(folder, **{"block.0.q.weight": np.ones((7, 5), np.int8)})
    problem = "block.0.q.weight is quantised (I8), but its scales are missing: block.0.q.SCB or "
    assert problem in refused(folder, capsys)


def test_a_weight_without_fractions_is_named(folders, capsys):
    folder, _, _ = folders
    edit_base(folder, **{"block.0.q.weight": np.ones((7, 5), np.int64)})
    assert "block.0.q.weight has dtype I64, without fractions" in refused(folder, capsys)


def test_the_weights_that_are_not_quantised_are_merged_into(folders):
    folder, base, adapter = folders
    config = {"quantization_config": {"quant_method": "mxfp4"}}
    write_json(folder / "base" / "config.json", config)
    extend_base(folder, experts_blocks=np.ones((3, 4), np.uint8))
    assert merge(folder, "--verify") == 0
    result = read_folder(folder / "out")
    np.testing.assert_array_equal(result.pop("experts_blocks"), np.ones((3, 4), np.uint8))
    assert_merged(result, base, adapter)
    assert json.loads((folder / "out" / "config.json").read_text()) == config


@pytest.mark.parametrize("scales", ["weight_scale", "weight_scale_inv", "scales"])
def test_scales_beside_a_weight_show_that_it_is_quantised(folders, capsys, scales):
    folder, _, _ = folders
    extend_base(folder, **{f"block.0.q.{scales}": np.ones(1, np.float32)})
    assert "block.0.q.weight is quantised" in refused(folder, capsys)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "OLoRA", "loftq", "corda", "lora_ga"])
def test_an_init_that_changed_the_base_needs_the_changed_weights(folders, capsys, init):
    folder, _, _ = folders
    edit_adapter(folder, init_lora_weights=init)
    assert f"initialised by {init}, which changed the base" in refused(folder, capsys)
    changed = {
        f"base_model.model.{path}.base_layer.weight": np.ones(shape, np.float32)
        for path, shape in SHAPES.items()
    }
    edit_adapter(folder, init_lora_weights=init, add=changed)
    assert merge(folder) == 0


@pytest.mark.parametrize(
    ("remove", "config", "message"),
    [
        ((), {"use_dora": False}, "has 3 magnitudes, but adapter_config.json says use_dora"),
        (
            ("0.k.lora_magnitude_vector",),
            {},
            "use_dora true, but the magnitude is missing of block.0.k",
        ),
        (("0.k.lora_B.weight",), {}, "block.0.k must have lora_A and lora_B"),
        ((), {"use_dora": "false"}, "use_dora must be true or false, got 'false'"),
        ((), {"peft_type": "IA3"}, "peft_type must be LORA, DORA, LOHA or LOKR, got 'IA3'"),
        ((), {"peft_type": "LOHA"}, "says peft_type LOHA, but no tensor has a name of it"),
        ((), {"layer_replication": [[0, 4]]}, "layer_replication cannot be merged"),
        ((), {"r": 3}, "adapter_config.json says rank 3, but lora_A has shape (2, 5)"),
        ((), {"r": "8"}, "rank must be an integer, got '8'"),
        ((), {"lora_alpha": 0}, "lora_alpha must be above 0 and finite, got 0.0"),
        ((), {"lora_alpha": -16}, "lora_alpha must be above 0 and finite, got -16.0"),
        ((), {"lora_alpha": None}, "lora_alpha must be a number, got None"),
        ((), {"alpha_pattern": {"q": -3}}, "lora_alpha must be above 0 and finite, got -3.0"),
        ((), {"bias": "some"}, "bias must be 'none', 'all' or 'lora_only', got 'some'"),
        ((), {"init_lora_weights": "new"}, "init_lora_weights 'new' is unknown: it may have"),
        ((), {"init_lora_weights": ["eva"]}, "is unknown: it may have changed the base"),
        ((), {"use_rslora": "false"}, "use_rslora must be true or false, got 'false'"),
        ((), {"fan_in_fan_out": "false"}, "fan_in_fan_out must be true or false, got 'false'"),
        ((), {"kasa_config": {"beta": 1}}, "kasa_config cannot be merged"),
        (
            (),
            {"bias": "lora_only"},
            "bias lora_only, but the file lacks block.0.k.bias, block.0.q.bias, block.1.q.bias",
        ),
        ((), {"rank_pattern": {"(": 2}}, "missing ), unterminated subpattern"),
        ((), {"rank_pattern": {r"(a)\1": 2}}, "it has a backreference, which needs more"),
        ((), {"rank_pattern": [1]}, "rank_pattern must be an object of patterns and numbers, got"),
    ],
)
def test_a_configuration_that_contradicts_the_file(folders, capsys, remove, config, message):
    folder, _, _ = folders
    edit_adapter(folder, remove, **config)
    assert message in refused(folder, capsys)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_replace_the_bases(folders, bias):
    folder, base, adapter = folders
    rng = np.random.default_rng(9)
    trained = {f"{path}.bias": draw(rng, shape[0]) for path, shape in SHAPES.items()}
    layers = {name.replace(".bias", ".base_layer.bias"): leaf for name, leaf in trained.items()}
    added = {f"base_model.model.{name}": leaf for name, leaf in layers.items()}
    edit_adapter(folder, add=added, bias=bias)
    assert merge(folder, "--verify") == 0
    merged = read_folder(folder / "out")
    assert_merged(merged, base | {name: merged[name] for name in trained}, adapter)
    for name, leaf in trained.items():
        assert merged[name].tobytes() == leaf.astype(ml_dtypes.bfloat16).tobytes()


def test_layers_without_a_bias_need_no_trained_bias(tmp_path):
    rng = np.random.default_rng(1)
    base = {f"{path}.weight": draw(rng, *shape) for path, shape in SHAPES.items()}
    save_file(base, tmp_path / "base")
    write_adapter(tmp_path / "adapter", bias="lora_only")
    assert merge(tmp_path) == 0


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("block.0.z.weight", np.ones((2, 2), "f4"), "the base has no tensor block.0.z.weight for"),
        ("block.0.q.bias", np.ones(9, "f4"), "(9,) does not fit block.0.q.bias (7,)"),
        ("block.0.q.bias", np.ones(7, "i4"), "block.0.q.bias must be of dtype"),
        ("block.0.q.lora_A.default.weight", np.ones((2, 5), "f4"), "name the same tensor"),
        ("c.lora_A.weight", np.ones(5, "f4"), "the magnitude is missing of c"),
    ],
)
def test_an_adapters_tensor_that_does_not_fit(folders, capsys, name, tensor, message):
    folder, _, _ = folders
    edit_adapter(folder, add={f"base_model.model.{name}": tensor})
    assert message in refused(folder, capsys)


def test_a_floating_tensor_for_one_of_integers_is_refused(folders, capsys):
    folder, _, _ = folders
    edit_adapter(folder, add={"base_model.model.steps": np.ones(3, np.float32)})
    assert "base_model.model.steps of dtype F32 cannot replace steps of dtype I64" in refused(
        folder, capsys
    )
    assert main(["audit", *(str(folder / name) for name in ("base", "adapter", "base"))]) == 2


@pytest.mark.parametrize("other", ["block.0.q.modules_to_save", "block.0.q.base_layer"])
def test_two_tensors_for_one_of_the_base_are_refused(folders, capsys, other):
    folder, _, _ = folders
    names = [f"base_model.model.{path}.bias" for path in ("block.0.q", other)]
    edit_adapter(folder, add={names[0]: np.ones(7, "f4"), names[1]: np.zeros(7, "f4")})
    error = refused(folder, capsys)
    assert all(name in error for name in names)
    assert "are both for block.0.q.bias, and differ" in error


@pytest.mark.parametrize(
    "bits",
    [np.ones(7, "f2"), np.array([0.0, 1, 1, 1, 1, 1, 1], "f4"), np.ones(7, "f4").view("i4")],
    ids=["dtype", "number", "dtype of the same bytes"],
)
def test_tensors_for_one_of_the_base_differ_in_dtype_or_in_one_number(folders, capsys, bits):
    folder, _, _ = folders
    one, other = (f"base_model.model.block.0.q.{x}bias" for x in ("", "modules_to_save."))
    edit_adapter(folder, add={one: np.ones(7, "f4"), other: bits})
    assert "are both for block.0.q.bias" in refused(folder, capsys)


def test_two_tensors_that_a_leading_name_makes_the_same_are_refused(tmp_path, capsys):
    """The base has no `model.`: both names lose it, or have none."""
    rng = np.random.default_rng(0)
    (tmp_path / "base").mkdir()
    base = {"block.0.q.weight": draw(rng, 7, 5), "s.weight": draw(rng, 3, 3)}
    save_file(base, tmp_path / "base" / "model.safetensors")
    write_adapter(tmp_path / "adapter", {"model.block.0.q": (7, 5)})
    names = ("base_model.model.s.weight", "base_model.model.model.s.weight")
    edit_adapter(tmp_path, add={name: draw(rng, 3, 3) for name in names})
    error = refused(tmp_path, capsys)
    assert f"{names[1]} and {names[0]} are both for s.weight, and differ" in error


def test_the_copies_that_peft_saves_of_an_embedding_are_one_tensor(folders):
    """PEFT saves three tensors of one that is in modules_to_save, with save_embedding_layers."""
    folder, _, _ = folders
    rng = np.random.default_rng(1)
    new, before = draw(rng, 7), draw(rng, 7)
    parts = {"": new, "modules_to_save.": new, "original_module.": before}
    added = {f"base_model.model.block.0.q.{part}bias": leaf for part, leaf in parts.items()}
    edit_adapter(folder, add=added)
    assert merge(folder, "--verify", "--dtype", "float32") == 0
    merged = read_folder(folder / "out")
    assert merged["block.0.q.bias"].tobytes() == new.tobytes()


def test_the_tensor_of_before_alone_is_not_dropped(folders, capsys):
    folder, _, _ = folders
    name = "block.0.q.original_module.bias"
    edit_adapter(folder, add={f"base_model.model.{name}": np.ones(7, "f4")})
    assert f"the base has no tensor {name}" in refused(folder, capsys)


def test_factors_of_one_axis_are_refused(folders, capsys):
    folder, _, _ = folders
    names = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    edit_adapter(
        folder, add={f"base_model.model.c.{name}": np.ones(4, np.float32) for name in names}
    )
    problem = "c: lora_A must have shape (rank, in, ...) and lora_B (out, rank, ...), got (4,) and"
    assert problem in refused(folder, capsys)


def test_a_grouped_convolution_in_pefts_format_is_refused(folders, capsys):
    folder, _, _ = folders
    prefix = "base_model.model.block.0.conv"
    edit_adapter(
        folder,
        add={
            f"{prefix}.lora_A.weight": np.ones((2, 4, 3, 3), "f4"),
            f"{prefix}.lora_B.weight": np.ones((6, 1, 1, 1), "f4"),
            f"{prefix}.lora_magnitude_vector": np.ones((1, 6, 1, 1), "f4"),
        },
    )
    assert "is a grouped convolution" in refused(folder, capsys)


def test_shapes_correct_a_wrong_flag_except_for_a_square_weight(tmp_path, capsys):
    rng = np.random.default_rng(1)
    base = {"x.a.weight": draw(rng, 5, 7), "x.b.weight": draw(rng, 6, 6)}  # (in, out)
    save_file(base, tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", {"x.a": (7, 5)})
    assert merge(tmp_path, "--verify") == 0
    merged = load_file(tmp_path / "out")["x.a.weight"]
    np.testing.assert_allclose(merged, dense(base["x.a.weight"].T, *adapter["x.a"]).T, rtol=1e-6)
    (tmp_path / "out").unlink()
    shutil.rmtree(tmp_path / "adapter")
    write_adapter(tmp_path / "adapter", {"x.a": (7, 5), "x.b": (6, 6)})
    assert "x.b.weight is square, and fan_in_fan_out is that of the last" in refused(
        tmp_path, capsys
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["base", "adapter", "bias"])
def test_nan_and_infinity_are_refused(folders, capsys, where, value):
    folder, base, _ = folders
    if where == "bias":
        added = {"base_model.model.block.0.q.bias": np.full(7, value, np.float32)}
        edit_adapter(folder, add=added)
    elif where == "base":
        weight = base["block.0.q.weight"]
        weight[3, 2] = value
        edit_base(folder, **{"block.0.q.weight": weight})
    else:
        edit_adapter(
            folder,
            add={"base_model.model.block.0.q.lora_A.weight": np.full((2, 5), value, np.float32)},
        )
    assert "contains NaN or infinity" in refused(folder, capsys)


def test_the_error_without_the_extra_says_how_to_install_it(folders, capsys, monkeypatch):
    folder, _, _ = folders
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert merge(folder) == 2
    assert install_hint("checkpoint") in capsys.readouterr().err


def test_a_file_that_becomes_shorter_is_an_error(folders):
    folder, _, _ = folders
    plan = plan_merge(folder / "base", folder / "adapter", Options())
    path = folder / "base" / "model-1.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors: changed since it was first"):
        run_merge(plan, folder / "out")
    assert not (folder / "out").exists()


def test_two_adapters_for_one_weight_are_refused(tmp_path, capsys):
    rng = np.random.default_rng(1)
    save_file({"block.q.weight": draw(rng, 7, 5)}, tmp_path / "base")
    tensors = {}
    for prefix in ("lora_unet", "lycoris"):
        down, up, scale = factors(rng, (7, 5))
        parts = {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": scale[:, None]}
        tensors |= {f"{prefix}_block_q.{part}": leaf for part, leaf in parts.items()}
    save_file(tensors, tmp_path / "adapter")
    message = "lora_unet_block_q and lycoris_block_q are both for block.q.weight"
    assert message in refused(tmp_path, capsys)


def test_a_square_weight_is_read_as_the_flag_says(tmp_path):
    base = {"x.b.weight": draw(np.random.default_rng(1), 6, 6)}
    save_file(base, tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", {"x.b": (6, 6)})
    assert merge(tmp_path) == 0
    assert_merged(load_file(tmp_path / "out"), base, adapter)
