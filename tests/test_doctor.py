"""`diagnose` and `doraxp doctor`: a base is checked before an adapter is trained on it."""

from __future__ import annotations

import json
import math
import re
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import quantised_bases as bases
from safetensors.numpy import save_file

import doraxp
from doraxp import Config, LayerKind
from doraxp.checkpoint import CheckpointError, RowCounts, diagnose, open_model

F16, BF16, F32, F64 = np.float16, ml_dtypes.bfloat16, np.float32, np.float64
CONFIG = {"model_type": "llama", "tie_word_embeddings": False}


@pytest.fixture
def rng():
    return np.random.default_rng(20)


def write(folder, tensors, **config):
    """Write a model's folder, and open it."""
    path = folder / "base"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG | config))
    save_file({name: np.ascontiguousarray(one) for name, one in tensors.items()},
              path / "model.safetensors")  # fmt: skip
    return open_model(path)


def draw(rng, *shape, dtype=F32):
    return rng.standard_normal(shape).astype(dtype)


def codes(found, level=None):
    return [one.code for one in found.findings if level in (None, one.level)]


def finding(found, code):
    (one,) = (one for one in found.findings if one.code == code)
    return one


def llama(rng, dtype=F32, layers=2):
    tensors = {"model.embed_tokens.weight": draw(rng, 24, 8, dtype=dtype)}
    for layer in range(layers):
        tensors |= {
            f"model.layers.{layer}.self_attn.q_proj.weight": draw(rng, 8, 8, dtype=dtype),
            f"model.layers.{layer}.mlp.up_proj.weight": draw(rng, 16, 8, dtype=dtype),
            f"model.layers.{layer}.input_layernorm.weight": draw(rng, 8, dtype=dtype),
        }
    return tensors | {"lm_head.weight": draw(rng, 24, 8, dtype=dtype)}


Q, UP = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"

# Rows

ROWS = {
    "usual": (1.0, {}),
    "zero": (0.0, {"zero": 1}),
    "nan": (math.nan, {"not_finite": 1}),
    "infinite": (-math.inf, {"not_finite": 1}),
}
OF_DTYPE = {
    "F32-underflow": (F32, 1e-25, {"underflow": 1}),
    "F32-least": (F32, 1e-45, {"underflow": 1}),
    "F32-fragile": (F32, 1e-18, {"fragile": 1, "float16": 1}),
    "F32-small": (F32, 1e-9, {"float16": 1}),
    "F32-large": (F32, 1e6, {"float16": 1}),
    "F32-overflow": (F32, 1e20, {"overflow": 1}),
    "BF16-underflow": (BF16, 1e-25, {"underflow": 1}),
    "BF16-overflow": (BF16, 1e20, {"overflow": 1}),
    "BF16-small": (BF16, 1e-9, {"float16": 1}),
    "F16-least": (F16, 6e-8, {}),
    "F16-overflow": (F16, 6e4, {"overflow": 1}),
    "F16-large": (F16, 1e4, {}),
    "F64-small": (F64, 1e-25, {"float16": 1}),
    "F64-underflow": (F64, 1e-170, {"underflow": 1}),
    "F64-overflow": (F64, 1e160, {"overflow": 1}),
    "F64-fragile": (F64, 1e-150, {"fragile": 1, "float16": 1}),
}
CASES = OF_DTYPE | {
    f"{np.dtype(dtype).name}-{name}": (dtype, value, counts)
    for name, (value, counts) in ROWS.items()
    for dtype in (F16, BF16, F32, F64)
}
KINDS = ("linear", "transposed", "embedding", "conv", "experts", "transposed_experts")
NAMES = {
    "linear": "layers.0.q.weight",
    "transposed": "h.0.attn.c_attn.weight",
    "embedding": "wte.weight",
    "conv": "stem.conv.weight",
    "experts": "layers.0.experts.down_proj",
    "transposed_experts": "layers.0.experts.down_proj",
}
TYPES = {"transposed": "gpt2", "transposed_experts": "gpt_oss"}


def stored(kind, matrix):
    """Return a matrix (7, 12) as a module of a kind stores it; of stacks two of them."""
    if kind in ("transposed", "embedding"):
        return matrix.T
    if kind == "conv":
        return matrix.reshape(7, 4, 3, 1)
    if kind == "experts":
        return np.stack([matrix, np.ones_like(matrix)])
    if kind == "transposed_experts":
        return np.stack([matrix.T, np.ones_like(matrix.T)])
    return matrix


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_a_row_that_dora_cannot_divide_by_is_counted_by_its_kind(tmp_path, kind, case, monkeypatch):
    dtype, value, counts = CASES[case]
    matrix = np.full((7, 12), 0.25, dtype)
    with np.errstate(over="ignore"):
        matrix[3] = np.float64(value) * np.where(np.arange(12) < 6, 1, -1)
    monkeypatch.setattr("doraxp.checkpoint._matrix.BLOCK", 24)  # several blocks
    model = write(tmp_path, {NAMES[kind]: stored(kind, matrix)}, model_type=TYPES.get(kind))
    path = NAMES[kind].removesuffix(".weight")
    one = diagnose(model, [path]).modules[path]
    assert one.kind == kind
    assert one.is_target
    rows = 14 if "experts" in kind else 7
    broken = sum(counts.get(name, 0) for name in RowCounts._fields[1:5])
    if np.dtype(dtype).itemsize == 2:  # the norm 0.87 does not change by 1e-4; a small one does
        counts = counts | {"coarse": rows - 1 + (not broken and abs(value) > 1e-3)}
    assert one.rows == RowCounts(rows, **counts)
    assert one.rows.broken == broken


@pytest.mark.parametrize("row", [0, 6])
@pytest.mark.parametrize("value", [1.0, math.nan])
def test_a_column_counts_the_numbers_of_all_blocks(tmp_path, monkeypatch, row, value):
    monkeypatch.setattr("doraxp.checkpoint._matrix.BLOCK", 10)
    weight = np.ones((7, 5), F32)
    weight[:, 2] = 0
    weight[row, 2] = value
    found = diagnose(write(tmp_path, {"wte.weight": weight}), ["wte"])
    assert found.modules["wte"].rows == RowCounts(5, not_finite=int(math.isnan(value)))


def test_nan_beside_zeros_is_nan_and_not_zero(tmp_path):
    weight = np.ones((4, 6), F32)
    weight[1] = 0
    weight[1, 5] = math.nan
    found = diagnose(write(tmp_path, {"l.0.q.weight": weight}))
    assert found.modules["l.0.q"].rows == RowCounts(4, not_finite=1)


@pytest.mark.parametrize(
    ("code", "value", "words"),
    [
        ("zero-rows", 0, "Rows of zeros: 2 in 2 modules. "),
        ("underflow-rows", 1e-25, "Rows whose squares underflow: 2 in 2 modules. "),
        ("overflow-rows", 1e20, "Rows whose norm overflows: 2 in 2 modules. "),
        ("not-finite", math.nan, "Rows with NaN or infinity: 2 in 2 modules. "),
    ],
)
def test_a_row_of_a_target_that_is_nan_in_peft_is_an_error(tmp_path, rng, code, value, words):
    tensors = llama(rng)
    tensors[f"{Q}.weight"][3] = value
    tensors[f"{UP}.weight"][5] = value
    found = diagnose(write(tmp_path, tensors))
    assert found.breaks
    one = finding(found, code)
    assert one.level == "error"
    assert set(one.modules) == {Q, UP}
    assert one.text.startswith(words)
    assert codes(found, "error") == [code]


@pytest.mark.parametrize(("code", "value"), [("fragile-rows", 1e-18), ("float16-rows", 1e-9)])
def test_a_row_that_peft_can_divide_by_is_a_warning(tmp_path, rng, code, value):
    tensors = llama(rng)
    tensors[f"{Q}.weight"][3] = value
    found = diagnose(write(tmp_path, tensors))
    assert not found.breaks
    assert finding(found, code).level == "warning"
    assert finding(found, code).modules == (Q,)
    assert ": 1 in 1 module. " in finding(found, code).text


def test_a_row_is_fragile_up_to_the_bound_of_the_page(tmp_path):
    info = np.finfo(F32)
    bound = 8 * float(info.smallest_normal) / float(info.eps)
    weight = np.ones((4, 8), F32)
    weight[1], weight[2] = 0, 0
    weight[1, 0], weight[2, 0] = np.sqrt(0.9 * bound), np.sqrt(1.1 * bound)
    found = diagnose(write(tmp_path, {"layers.0.q.weight": weight}), ["q"])
    assert found.modules["layers.0.q"].rows.fragile == 1


@pytest.mark.parametrize("kernel", [(2,), (2, 3), (2, 3, 2)])
def test_a_convolution_of_one_to_three_dimensions_is_a_module(tmp_path, rng, kernel):
    found = diagnose(write(tmp_path, {"stem.weight": draw(rng, 5, 4, *kernel)}), ["stem"])
    assert (found.modules["stem"].kind, found.modules["stem"].rows.rows) == ("conv", 5)


def test_a_zero_row_without_an_adapter_is_a_note(tmp_path, rng):
    tensors = llama(rng)
    tensors[f"{Q}.weight"][3] = 0
    tensors[f"{UP}.weight"][3] = 1e-25
    found = diagnose(
        write(tmp_path, tensors), exclude_modules=["1.self_attn.q_proj", "0.mlp.up_proj"]
    )
    assert not found.breaks
    assert finding(found, "zero-rows-elsewhere").modules == (UP, Q)
    assert "without an adapter: 2 in 2 modules. " in finding(found, "zero-rows-elsewhere").text


def test_a_padding_row_of_an_embedding_is_harmless_and_a_zero_column_is_not(tmp_path, rng):
    tensors = llama(rng)
    tensors["model.embed_tokens.weight"][0] = 0
    model = write(tmp_path, tensors)
    assert diagnose(model, ["embed_tokens"]).modules["model.embed_tokens"].rows.zero == 0
    tensors["model.embed_tokens.weight"][:, 2] = 0
    (tmp_path / "other").mkdir()
    model = write(tmp_path / "other", tensors)
    assert finding(diagnose(model, ["embed_tokens"]), "zero-rows").modules == (
        "model.embed_tokens",
    )


@pytest.mark.parametrize("name", ["model.norm.weight", "model.norm.bias", "lm_head.weight"])
def test_nan_is_an_error_wherever_it_is(tmp_path, rng, name):
    tensors = llama(rng)
    tensors[name] = tensors.get(name, np.ones(8, F32))
    tensors[name].flat[-1] = math.nan
    found = diagnose(write(tmp_path, tensors))
    code = "not-finite" if name.startswith("lm") else "not-finite-tensors"
    assert codes(found, "error") == [code]
    expected = "lm_head" if name.startswith("lm") else name
    assert finding(found, code).modules == (expected,)


# Targets


def test_the_targets_are_those_of_adapt(tmp_path, rng):
    tensors = llama(rng)
    found = diagnose(write(tmp_path, tensors))
    layers = doraxp.adapt(tensors, "all-linear", Config(2), seed=0)
    assert set(found.targets.paths) == set(layers)
    assert {path for path, one in found.modules.items() if one.is_target} == set(layers)
    assert found.modules["lm_head"].left_out == "output head"
    assert found.modules["model.embed_tokens"].left_out == "embedding"
    assert codes(found) == ["rank"]


def test_a_target_without_a_module_is_an_error_with_near_names(tmp_path, rng):
    found = diagnose(write(tmp_path, llama(rng)), ["q_proj", "up_porj"], exclude_modules=["zz"])
    assert codes(found, "error") == ["unmatched-target", "unmatched-exclude"]
    assert "target_modules 'up_porj' matches no module; the nearest are up_proj" in (
        finding(found, "unmatched-target").text
    )
    assert found.breaks


def test_without_any_target_training_breaks(tmp_path, rng):
    model = write(tmp_path, llama(rng))
    found = diagnose(model, ["q_proj"], exclude_modules=["q_proj"])
    assert codes(found, "error") == ["no-target"]
    assert len(finding(found, "no-target").modules) == 2
    assert found.costs[0].parameters == 0


def test_a_matrix_that_no_pattern_takes_is_noted(tmp_path, rng):
    found = diagnose(write(tmp_path, llama(rng)), ["q_proj"])
    one = finding(found, "not-targets")
    assert (one.level, one.modules) == ("note", (UP, "model.layers.1.mlp.up_proj"))


def test_a_bad_regular_expression_is_refused(tmp_path, rng):
    with pytest.raises(ValueError, match="target_modules must be a regular expression"):
        diagnose(write(tmp_path, llama(rng)), "q[")


# Costs


def test_the_cost_is_that_of_the_adapters(tmp_path, rng):
    tensors = llama(rng)
    found = diagnose(write(tmp_path, tensors), ranks=(1, 3))
    for cost in found.costs:
        layers = doraxp.adapt(tensors, "all-linear", Config(cost.rank), seed=0)
        size = sum(leaf.size for layer in layers.values() for leaf in layer.adapter)
        assert cost.parameters == size
        assert cost.adapter_bytes == 4 * size
        assert cost.adamw_bytes == 8 * size
        assert cost.percent == pytest.approx(100 * size / sum(map(np.size, tensors.values())))
        assert cost.too_small == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_cost_is_that_of_the_kind(tmp_path, kind):
    weight = stored(kind, np.ones((7, 12), F32))
    path = NAMES[kind].removesuffix(".weight")
    model = write(tmp_path, {NAMES[kind]: weight}, model_type=TYPES.get(kind))
    layers = doraxp.adapt({path: weight}, [path], Config(3), seed=0, kinds={path: LayerKind(kind)})
    (cost,) = diagnose(model, [path], ranks=[3]).costs
    assert cost.parameters == sum(leaf.size for leaf in layers[path].adapter)


def test_a_rank_above_the_rows_or_columns_is_a_warning(tmp_path, rng):
    found = diagnose(write(tmp_path, llama(rng)), ranks=[8, 9])
    assert [cost.too_small for cost in found.costs] == [0, 4]
    assert "Rank 9: above the rows or columns of up to 4 targets" in finding(found, "rank").text
    assert finding(found, "rank").level == "warning"
    assert finding(diagnose(open_model(tmp_path / "base")), "rank").level == "note"
    with pytest.raises(ValueError, match="ranks must be at least 1, got 0"):
        diagnose(open_model(tmp_path / "base"), ranks=[4, 0])


# Dtypes


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_a_step_that_16_bits_cannot_show_is_a_note(tmp_path, rng, dtype):
    found = diagnose(write(tmp_path, llama(rng, dtype)))
    one = finding(found, "coarse-rows")
    assert "Rows whose norm a step with learning rate 0.0001 does not change: " in one.text
    weight = llama(np.random.default_rng(20), dtype)[f"{Q}.weight"]
    norms = np.linalg.norm(weight.astype(F32), axis=1).astype(dtype)
    same = (norms.astype(F32) + F32(1e-4)).astype(dtype) == norms
    assert found.modules[Q].rows.coarse == same.sum() == 8
    assert one.level == "note"
    assert not found.breaks


def test_float64_is_a_note(tmp_path, rng):
    found = diagnose(write(tmp_path, llama(rng, F64)))
    assert codes(found) == ["float64", "rank"]
    assert len(finding(found, "float64").modules) == 4


def test_a_target_of_whole_numbers_is_an_error(tmp_path, rng):
    tensors = llama(rng) | {"model.layers.0.mlp.odd.weight": np.ones((4, 4), np.int64)}
    model = write(tmp_path, tensors)
    one = finding(diagnose(model, ["odd"]), "unreadable")
    assert (one.level, one.modules) == ("error", ("model.layers.0.mlp.odd",))
    assert "has dtype I64, not a float" in one.text
    found = diagnose(model, ["q_proj"])
    assert found.modules["model.layers.0.mlp.odd"].rows is None
    assert not found.breaks


# Quantised weights

DOWN = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize("name", bases.MATRICES)
def test_a_quantised_weight_is_read_in_its_format(tmp_path, rng, name):
    tensors, weight = bases.MATRICES[name](rng, f"{DOWN}.weight", 32, 64)
    bases.write(tmp_path / "base", llama(rng, BF16) | tensors, **bases.CONFIGS[name])
    one = diagnose(open_model(tmp_path / "base"), ["down_proj"])
    module = one.modules[DOWN]
    assert module.quantised is not None
    assert (module.kind, module.shape, module.is_target) == ("linear", (32, 64), True)
    assert module.rows.rows == 32
    assert module.rows.broken == np.count_nonzero(np.linalg.norm(weight.astype(F32), axis=1) == 0)
    found = finding(one, "quantised")
    assert module.quantised in found.text
    assert "load_quantised (QDoRA)" in found.text
    assert found.modules == (DOWN,)


def test_a_zero_row_of_a_quantised_weight_is_found(tmp_path, rng):
    tensors, _ = bases.int8(rng, f"{DOWN}.weight", 32, 64)
    tensors[f"{DOWN}.weight"][5] = 0
    bases.write(tmp_path / "base", tensors, **bases.CONFIGS["int8"])
    found = diagnose(open_model(tmp_path / "base"))
    assert found.modules[DOWN].rows.zero == 1
    assert finding(found, "zero-rows").modules == (DOWN,)


def test_a_quantised_weight_that_breaks_its_format_is_refused(tmp_path, rng):
    tensors, _ = bases.int8(rng, f"{DOWN}.weight", 32, 64)
    tensors[f"{DOWN}.SCB"][5] = math.nan
    bases.write(tmp_path / "base", tensors, **bases.CONFIGS["int8"])
    with pytest.raises(CheckpointError, match="SCB"):
        diagnose(open_model(tmp_path / "base"))


def test_a_weight_in_a_format_without_a_reader_is_a_warning(tmp_path, rng):
    tensors = llama(rng) | {
        "decoder.lm_head.qweight": np.ones((8, 32), np.int32),
        "decoder.lm_head.g_idx": np.ones(64, np.int32),
        f"{DOWN}.qweight": np.ones((8, 32), np.int32),
        f"{DOWN}.g_idx": np.ones(64, np.int32),
        f"{DOWN}.scales": np.ones((2, 32), F16),
        f"{DOWN}.qzeros": np.ones((2, 4), np.int32),
    }
    model = write(tmp_path, tensors, quantization_config={"quant_method": "gptq"})
    found = diagnose(model, ["down_proj", "q_proj"])
    one = finding(found, "unreadable")
    assert (one.level, one.modules) == ("warning", (DOWN,))
    assert "GPTQ" in one.text
    assert found.modules[DOWN].rows is found.modules[DOWN].shape is None
    assert found.modules[DOWN].is_target
    assert not found.breaks
    assert found.modules["decoder.lm_head"].left_out == "output head"
    alone = diagnose(model, ["q_proj"])
    assert alone.costs == found.costs
    assert "unreadable" not in codes(alone)


# Experts, and projections in one matrix


def test_experts_in_one_tensor_are_a_note_and_no_target_of_all_linear(tmp_path, rng):
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = llama(rng) | {name: draw(rng, 3, 8, 6), f"{name}_bias": draw(rng, 3, 8)}
    found = diagnose(write(tmp_path, tensors))
    assert finding(found, "fused-experts").modules == (name,)
    assert not found.modules[name].is_target
    assert f"{name}_bias" not in found.modules


@pytest.mark.parametrize("part", ["up_proj", "down_proj"])
@pytest.mark.parametrize("is_flipped", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_the_axis_of_experts_is_told_by_the_hidden_size(tmp_path, part, is_flipped, nested):
    matrix = np.ones((8, 6) if part == "down_proj" else (6, 8), F32)  # (out, in), 8 is hidden
    matrix[3] = 0
    config = {"hidden_size": 8}
    name = f"model.layers.0.experts.{part}"
    weight = np.stack([matrix.T if is_flipped else matrix] * 2)
    model = write(tmp_path, {name: weight}, **({"text_config": config} if nested else config))
    one = diagnose(model, [part]).modules[name]
    assert one.kind == ("transposed_experts" if is_flipped else "experts")
    assert one.rows.zero == 2


def test_the_rows_of_each_expert_are_counted(tmp_path, rng):
    tensors = llama(rng)
    for expert in range(31):
        weight = draw(rng, 20, 8)
        weight[expert % 7 : expert % 7 + 14] = 0
        tensors[f"model.layers.0.mlp.experts.{expert}.gate_proj.weight"] = weight
    found = diagnose(write(tmp_path, tensors))
    one = finding(found, "zero-rows")
    assert one.text.startswith("Rows of zeros: 434 in 31 modules. ")
    assert len(one.modules) == 31


@pytest.mark.parametrize("name", ["qkv_proj", "gate_up_proj", "c_attn"])
def test_projections_in_one_matrix_are_a_note(tmp_path, rng, name):
    path = f"model.layers.0.{name}"
    found = diagnose(write(tmp_path, llama(rng) | {f"{path}.weight": draw(rng, 12, 8)}))
    assert finding(found, "fused-projections").modules == (path,)


# Ties


def test_a_head_that_the_configuration_ties_is_a_note(tmp_path, rng):
    tensors = llama(rng)
    del tensors["lm_head.weight"]
    kind = {"tie_word_embeddings": True, "architectures": ["LlamaForCausalLM"]}
    found = diagnose(write(tmp_path, tensors, **kind))
    assert found.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    one = finding(found, "tied")
    assert one.level == "note"
    assert one.modules == ("model.embed_tokens", "lm_head")
    assert "lm_head, which is not in the file, is tied to model.embed_tokens" in one.text


def test_equal_tensors_are_tied(tmp_path, rng):
    tensors = llama(rng)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.other.embed_tokens.weight"] = draw(rng, 24, 8)
    found = diagnose(write(tmp_path, tensors))
    assert found.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert finding(found, "tied").text == "lm_head is tied to model.embed_tokens"


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_adapter_of_a_tied_module_is_a_warning(tmp_path, rng, target):
    tensors = llama(rng)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    one = finding(diagnose(write(tmp_path, tensors), [target]), "tied")
    assert one.level == "warning"
    assert re.search(rf"the adapter of (model\.)?{target} unties them", one.text)


# The reading


def test_the_progress_ends_with_all_numbers_of_the_base(tmp_path, rng, monkeypatch):
    monkeypatch.setattr("doraxp.checkpoint._matrix.BLOCK", 24)
    tensors, told = llama(rng), []
    diagnose(write(tmp_path, tensors), on_bytes=lambda *pair: told.append(pair))
    total = sum(one.nbytes for one in tensors.values())
    assert {one[1] for one in told} == {total}
    assert [one[0] for one in told] == sorted({one[0] for one in told})
    assert told[-1][0] == total
    assert len(told) > 2 * len(tensors)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.0.q.weight", (8192, 2048)),
        ("model.embed_tokens.weight", (65536, 256)),
        ("model.layers.0.mlp.experts.up_proj", (2, 4096, 2048)),
        ("model.conv.weight", (64, 4096, 8, 8)),
    ],
)
def test_a_base_is_read_in_a_few_blocks_of_memory(tmp_path, name, shape):
    model = write(tmp_path, {name: np.broadcast_to(F32(1), shape)})
    tracemalloc.start()
    try:
        found = diagnose(model)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found.bytes == 2**26
    assert peak < 2**24


@pytest.mark.parametrize("name", ["q.lora_A.weight", "q.lora_a", "lora_unet_q.lora_up.weight"])
def test_an_adapter_is_refused_as_a_base(tmp_path, rng, name):
    model = write(tmp_path, {name: draw(rng, 4, 6), "q.weight": draw(rng, 4, 6)})
    with pytest.raises(CheckpointError, match=rf"must be a model, but {name} is a tensor of an ad"):
        diagnose(model)


def test_a_tensor_without_numbers_is_not_a_module(tmp_path, rng):
    found = diagnose(write(tmp_path, llama(rng) | {"model.empty.weight": np.ones((0, 4), F32)}))
    assert "model.empty" not in found.modules
    assert not found.breaks


def test_figures_count_all_numbers_and_bytes(tmp_path, rng):
    tensors = llama(rng, BF16) | {"model.steps": np.ones(3, np.int64)}
    found = diagnose(write(tmp_path, tensors))
    assert found.parameters == sum(one.size for one in tensors.values()) - 3
    assert found.bytes == sum(one.nbytes for one in tensors.values())
