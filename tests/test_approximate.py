"""One adapter near a merge: a sum as one DoRA adapter, and any adapter as plain LoRA."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from checkpoints import (
    PREFIX,
    dense,
    draw,
    peft_config,
    read_folder,
    write_base,
    write_json,
    write_peft,
)
from safetensors.numpy import load_file, save_file
from test_sums import (
    ALONE,
    CONV,
    EMBED,
    FUSED,
    LINEAR,
    OTHER,
    adapters,
    base_of,
    summed,
    tied,
    write_embedding,
    write_one,
)

from doraxp.checkpoint import (
    CheckpointError,
    Options,
    Weighted,
    approximate,
    load_adapters,
    plan_merge,
)
from doraxp.cli import main

SUM = ("one:0.7", "two:0.4", "three:-0.3")
CHANGED = (LINEAR, OTHER, CONV, ALONE, EMBED)


@pytest.fixture(params=["float32", "bfloat16"])
def model(tmp_path, request):
    base = base_of(np.random.default_rng(0), request.param)
    write_base(tmp_path / "base", base)
    merges = [
        write_one(tmp_path / "one", 1, [LINEAR, OTHER, EMBED, CONV]),
        write_one(tmp_path / "two", 2, [LINEAR, EMBED, CONV, ALONE]),
        write_one(tmp_path / "three", 3, [LINEAR, OTHER, CONV], dora=False),
    ]
    return base, merges


def extract(folder, *arguments, out="dir"):
    return main(["extract", str(folder / "base"), *arguments, "--out", str(folder / out)])


def convert(folder, source, *arguments, out="lora"):
    base = ["--base", str(folder / "base")]
    return main(["convert", str(folder / source), *base, *arguments, "--out", str(folder / out)])


def merged(folder, adapter):
    """W' of an adapter, in float64."""
    out = folder / f"{adapter}-out"
    command = ["merge", str(folder / "base"), str(folder / adapter), "--out", str(out)]
    assert main([*command, "--dtype", "float64"]) == 0
    tensors = {name: weight.astype("f8") for name, weight in read_folder(out).items()}
    shutil.rmtree(out)
    return tensors


def matrix(path, weight):
    return weight.T if path == EMBED else weight.reshape(len(weight), -1)


def svd_error(path, change, rank):
    """The error of the best B A of a rank."""
    values = np.linalg.svd(matrix(path, change), compute_uv=False)
    return np.linalg.norm(values[rank:])


@pytest.mark.parametrize("rank", [1, 3])
def test_a_sum_as_one_adapter_is_not_worse_than_the_truncated_svd(tmp_path, model, rank):
    base, merges = model
    report = tmp_path / "report.json"
    arguments = ("--rank", str(rank), "--json", str(report))
    assert extract(tmp_path, *adapters(tmp_path, *SUM), *arguments) == 0
    wanted = summed(base, zip(merges, (0.7, 0.4, -0.3), strict=True))
    found, figures = merged(tmp_path, "dir"), json.loads(report.read_text())["modules"]
    assert sorted(figures) == sorted(CHANGED)
    for path in CHANGED:
        name = f"{path}.weight"
        change = wanted[name] - base[name].astype("f8")
        error = np.linalg.norm(found[name] - wanted[name])
        slack = 1e-5 * np.linalg.norm(wanted[name])
        assert error <= svd_error(path, change, rank) + slack
        assert figures[path]["error"] == pytest.approx(error, abs=slack)
        assert figures[path]["lora_error"] == pytest.approx(
            svd_error(path, change, rank), abs=slack
        )
        assert figures[path]["update_norm"] == pytest.approx(np.linalg.norm(change), abs=slack)


def test_one_adapter_comes_back(tmp_path, model):
    base, (merges, *_) = model
    assert extract(tmp_path, *adapters(tmp_path, "one"), "--rank", "2") == 0
    found, wanted = merged(tmp_path, "dir"), summed(base, [(merges, 1)])
    for path in (LINEAR, OTHER, CONV):
        name = f"{path}.weight"
        error = np.linalg.norm(found[name] - wanted[name])
        assert error <= 2e-2 * np.linalg.norm(wanted[name] - base[name].astype("f8"))


@pytest.mark.parametrize("rank", [1, 4])
def test_lora_is_the_truncated_svd_of_the_change(tmp_path, model, rank, capsys):
    base, (merges, *_) = model
    assert convert(tmp_path, "one", "--to", "lora", "--rank", str(rank), "--all") == 0
    text = capsys.readouterr().out
    assert all(path in text for path in (LINEAR, OTHER, EMBED, CONV))
    assert "error of" in text
    assert "SVD LoRA, the adapter in DST: the truncated SVD of W* − W at" in " ".join(text.split())
    assert "DoRA" not in text
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["use_dora"], config["r"], config["lora_alpha"]) == (False, rank, rank)
    names = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert not [name for name in names if "magnitude" in name]
    found, wanted = merged(tmp_path, "lora"), summed(base, [(merges, 1)])
    for path in (LINEAR, OTHER, EMBED, CONV):
        name = f"{path}.weight"
        change = wanted[name] - base[name].astype("f8")
        error = np.linalg.norm(found[name] - wanted[name])
        assert error == pytest.approx(
            svd_error(path, change, rank), abs=1e-5 * np.linalg.norm(wanted[name])
        )


ADVICE = re.compile(
    r"The error is above 0\.1 in (\d) of 4 modules\. --rank (\d+) brings it to 0\.1 or below in "
    r"all modules(; a merge of SRC into BASE has no such error)?\."
)


def test_the_last_lines_name_the_rank_that_brings_each_error_to_a_tenth(tmp_path, model, capsys):
    base, (merges, *_) = model
    wanted = summed(base, [(merges, 1)])
    changes = {
        path: wanted[f"{path}.weight"] - base[f"{path}.weight"].astype("f8")
        for path in (LINEAR, OTHER, EMBED, CONV)
    }

    def above(rank):
        return sum(
            svd_error(path, change, rank) > 0.1 * np.linalg.norm(change)
            for path, change in changes.items()
        )

    assert convert(tmp_path, "one", "--to", "lora", "--rank", "1") == 0
    found = ADVICE.search(" ".join(capsys.readouterr().out.split()))
    count, rank, merge = int(found[1]), int(found[2]), found[3]
    assert merge
    assert (count, above(rank - 1) > 0, above(rank)) == (above(1), True, 0)
    arguments = ("--to", "lora", "--rank", str(rank), "--force")
    assert convert(tmp_path, "one", *arguments) == 0
    assert "above 0.1" not in capsys.readouterr().out

    assert extract(tmp_path, *adapters(tmp_path, "one"), "--rank", "1") == 0
    found = ADVICE.search(" ".join(capsys.readouterr().out.split()))
    assert (int(found[2]), found[3]) == (rank, None)
    assert extract(tmp_path, *adapters(tmp_path, "one"), "--rank", str(rank), "--force") == 0
    assert "above 0.1" not in capsys.readouterr().out


def test_a_rank_that_the_search_did_not_meet_is_not_named(tmp_path, capsys):
    """A large weight whose rows have new lengths: no low rank is near the change."""
    rng = np.random.default_rng(0)
    path, shape = "block.0.q", (700, 600)
    base = {f"{path}.weight": draw(rng, *shape)}
    write_base(tmp_path / "base", base)
    a, b, m = draw(rng, 2, 600), draw(rng, 700, 2), 30 * (1 + rng.random(700, dtype="f4"))
    (tmp_path / "one").mkdir()
    leaves = {"lora_A.weight": a, "lora_B.weight": b, "lora_magnitude_vector": m}
    tensors = {f"{PREFIX}{path}.{name}": leaf for name, leaf in leaves.items()}
    save_file(tensors, tmp_path / "one" / "adapter_model.safetensors", {"format": "pt"})
    write_json(tmp_path / "one" / "adapter_config.json", peft_config())
    assert convert(tmp_path, "one", "--to", "lora", "--rank", "2") == 0
    text = " ".join(capsys.readouterr().out.split())
    advice = (
        "The error is above 0.1 in 1 of 1 module. A larger --rank lowers it; a merge of SRC into"
    )
    assert advice in text


def test_lora_has_the_names_of_the_modules_in_memory(tmp_path):
    """PEFT's adapter of a vision-language model names them otherwise than the base's file."""
    rng = np.random.default_rng(0)
    base = {"language_model.model.layers.0.q.weight": draw(rng, 6, 8)}
    write_base(tmp_path / "base", base)
    a, b, m = draw(rng, 2, 8), draw(rng, 6, 2), 1 + rng.random(6, dtype="f4")
    path = "model.language_model.layers.0.q"
    (tmp_path / "one").mkdir()
    leaves = {"lora_A.weight": a, "lora_B.weight": b, "lora_magnitude_vector": m}
    tensors = {f"{PREFIX}{path}.{name}": leaf for name, leaf in leaves.items()}
    save_file(tensors, tmp_path / "one" / "adapter_model.safetensors", {"format": "pt"})
    write_json(tmp_path / "one" / "adapter_config.json", peft_config())
    assert convert(tmp_path, "one", "--to", "lora", "--rank", "6") == 0
    assert list(load_adapters(tmp_path / "lora")) == [path]
    name = "language_model.model.layers.0.q.weight"
    wanted = dense(base[name], a, b, m)
    assert np.abs(merged(tmp_path, "lora")[name] - wanted).max() <= 1e-5


def test_whole_tensors_are_left_out_with_a_warning(tmp_path, capsys):
    rng = np.random.default_rng(0)
    write_base(tmp_path / "base", base_of(rng, "float32"))
    bias = {"block.0.k.bias": draw(rng, 18)}
    write_one(tmp_path / "one", 1, [OTHER], whole=bias, bias="lora_only")
    assert convert(tmp_path, "one", "--to", "lora", "--rank", "2") == 0
    error = capsys.readouterr().err
    assert "1 tensor of SRC differs and is not in DST: block.0.k.bias" in error


def test_the_result_does_not_depend_on_the_number_of_jobs(tmp_path, model):
    for jobs in ("1", "3"):
        arguments = ("--rank", "2", "--jobs", jobs)
        assert extract(tmp_path, *adapters(tmp_path, *SUM), *arguments, out=f"out{jobs}") == 0
    one, other = (
        (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("out1", "out3")
    )
    assert one == other


def test_a_sum_that_changes_no_matrix_is_refused(tmp_path):
    write_base(tmp_path / "base", base_of(np.random.default_rng(0), "float32"))
    write_one(tmp_path / "one", 1, [LINEAR])
    merge = plan_merge(tmp_path / "base", [Weighted(tmp_path / "one", 0)], Options())
    with pytest.raises(CheckpointError, match="the change by them is 0 in each matrix"):
        approximate(merge, 2)
    merge = plan_merge(tmp_path / "base", tmp_path / "one", Options())
    with pytest.raises(ValueError, match="rank must be at least 1"):
        approximate(merge, 0)


def test_values_that_cannot_be_squared_are_refused(tmp_path, capsys):
    base = base_of(np.random.default_rng(0), "float64")
    base[f"{LINEAR}.weight"] *= 1e200
    write_base(tmp_path / "base", base)
    write_one(tmp_path / "one", 1, [LINEAR], dora=False)
    assert convert(tmp_path, "one", "--to", "lora", "--rank", "2") == 2
    error = capsys.readouterr().err
    assert f"{LINEAR}.weight has values too large to square" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "lora").exists()


WRONG = {
    "no rank": (["--to", "lora"], "give both, with --base BASE --rank R"),
    "a rank of another format": (["--to", "mlx", "--rank", "2"], "--rank is for --to lora"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_of_convert_are_refused(tmp_path, model, capsys, case):
    arguments, message = WRONG[case]
    assert convert(tmp_path, "one", *arguments) == 2
    assert message in capsys.readouterr().err


def test_wrong_arguments_of_extract_are_refused(tmp_path, model, capsys):
    one = adapters(tmp_path, "one")
    base = str(tmp_path / "base")
    for arguments, message in (
        ([base, *one], "give TUNED or --adapter, not both"),
        ([*one, "--modules", "q"], "--modules is for TUNED"),
        ([base, "--scale", "2"], "--scale is for --adapter"),
        ([base, "--rename", "a=b"], "--rename is for --adapter"),
    ):
        assert extract(tmp_path, *arguments, "--rank", "2") == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        extract(tmp_path, "--rank", "2")
    assert "TUNED" in capsys.readouterr().err


def test_an_existing_folder_is_not_replaced(tmp_path, model, capsys):
    arguments = ("--to", "lora", "--rank", "2")
    assert convert(tmp_path, "one", *arguments) == 0
    assert convert(tmp_path, "one", *arguments) == 2
    assert convert(tmp_path, "one", *arguments, "--force") == 0


def test_the_warning_has_the_change_of_tensors_that_are_summed_or_joined(tmp_path, capsys):
    rng = np.random.default_rng(0)
    base = base_of(rng, "float32") | {"norm.weight": draw(rng, 24)}
    write_base(tmp_path / "base", base)
    bias, norm = draw(rng, 18), base["norm.weight"]
    whole = {"block.0.k.bias": bias, "norm.weight": norm}
    write_one(tmp_path / "one", 1, [OTHER], whole=whole, bias="lora_only")
    report = tmp_path / "r.json"
    command = [*adapters(tmp_path, "one:0.5"), "--rank", "2", "--json", str(report)]
    assert extract(tmp_path, *command, "--scale", "3") == 0
    found = json.loads(report.read_text())
    assert found["adapters"] == [{"path": str(tmp_path / "one"), "strength": 1.5}]
    before = base["block.0.k.bias"].astype("f8")
    change = np.linalg.norm(1.5 * (bias - before)) / np.linalg.norm(before)
    assert found["left_out"] == {"block.0.k.bias": pytest.approx(change, rel=1e-5)}
    assert f"the largest relative change is {change:.2g}" in capsys.readouterr().err


def test_single_rows_that_were_trained_are_measured(tmp_path):
    rng = np.random.default_rng(0)
    base = base_of(rng, "float32")
    write_base(tmp_path / "base", base)
    write_one(tmp_path / "one", 1, [LINEAR], trainable_token_indices={EMBED: [3, 7]})
    path = tmp_path / "one" / "adapter_model.safetensors"
    rows = draw(rng, 2, 24)
    name = f"{PREFIX}{EMBED}.token_adapter.trainable_tokens_delta"
    save_file(load_file(path) | {name: rows}, path)
    merge = plan_merge(tmp_path / "base", tmp_path / "one", Options())
    w = base[f"{EMBED}.weight"].astype("f8")
    change = np.linalg.norm(rows - w[[3, 7]]) / np.linalg.norm(w)
    left_out = approximate(merge, 2, method="lora").left_out
    assert left_out == {f"{EMBED}.weight": pytest.approx(change, rel=1e-6)}


def test_a_residual_base_is_converted_with_its_option(tmp_path, capsys):
    write_base(tmp_path / "base", base_of(np.random.default_rng(0), "float32"))
    write_one(tmp_path / "one", 1, [LINEAR], init_lora_weights="pissa")
    assert convert(tmp_path, "one", "--to", "lora", "--rank", "2") == 2
    assert "--base-is-residual" in capsys.readouterr().err
    arguments = ("--to", "lora", "--rank", "2", "--base-is-residual")
    assert convert(tmp_path, "one", *arguments) == 0
    assert extract(tmp_path, *adapters(tmp_path, "one"), "--rank", "2", "--base-is-residual") == 0


def test_rows_of_a_fused_tensor_that_no_adapter_changes_stay(tmp_path):
    rng = np.random.default_rng(0)
    base = {f"{FUSED}.weight": draw(rng, 30, 8)}
    write_base(tmp_path / "base", base, model_type="gte")
    leaves = (draw(rng, 2, 8), draw(rng, 10, 2), 1 + rng.random(10, dtype="f4"))
    write_peft(tmp_path / "one", {"layers.0.self_attn.k_proj": leaves})
    assert convert(tmp_path, "one", "--to", "lora", "--rank", "8") == 0
    wanted = base[f"{FUSED}.weight"].astype("f8")
    wanted[10:20] = dense(wanted[10:20], *leaves)
    assert np.abs(merged(tmp_path, "lora")[f"{FUSED}.weight"] - wanted).max() <= 1e-5


def test_a_separate_head_and_a_new_one_are_measured(tmp_path):
    base, rng = tied(tmp_path)
    write_embedding(tmp_path / "one", rng, "model.embed_tokens", (8, 20))
    path = tmp_path / "one" / "adapter_model.safetensors"
    for more in ({}, {"model.embed_tokens.base_layer.weight": base["model.embed_tokens.weight"]}):
        whole = {f"{PREFIX}{name}": weight for name, weight in more.items()}
        save_file(load_file(path) | whole, path)
        merge = plan_merge(tmp_path / "base", tmp_path / "one", Options())
        found = approximate(merge, 2)
        assert list(found.adapters) == ["model.embed_tokens"]
        assert found.left_out == {}  # the head of its own has the numbers of the embeddings
    head = {f"{PREFIX}score.weight": draw(rng, 3, 8)}
    save_file(load_file(path) | head, path)
    config = peft_config(modules_to_save=["score"], task_type="SEQ_CLS")
    write_json(tmp_path / "one" / "adapter_config.json", config)
    merge = plan_merge(tmp_path / "base", tmp_path / "one", Options())
    assert approximate(merge, 2).left_out == {"score.weight": np.inf}
    assert base.keys() == {"model.embed_tokens.weight", f"{ALONE}.weight"}
