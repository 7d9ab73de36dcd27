"""Adapters of experts: in PEFT's packing, as mlx-lm has them, and in doraxp's layout."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import (
    ALPHA,
    PREFIX,
    RANK,
    audit,
    check,
    dense,
    draw,
    merge,
    near,
    peft_config,
    read_folder,
    refused,
    write_base,
    write_json,
    write_peft,
)
from safetensors.numpy import load_file, save_file

import doraxp
from doraxp import Config, LayerKind, LowRank, UpdateAdapter
from doraxp.checkpoint import (
    Options,
    UpdatedLayer,
    _matrix,
    load_adapters,
    named_for,
    open_model,
    plan_merge,
    sample_norms,
    save_adapters,
)
from doraxp.checkpoint._expert_names import Stack, _Last
from doraxp.checkpoint._safetensors import Reader
from doraxp.cli import main

E, H, F = 4, 6, 5
"""Experts, the width of the model, the width of an expert."""
S = ALPHA / RANK
BLOCK = "model.layers.0.mlp"
UP, DOWN = f"{BLOCK}.experts.gate_up_proj", f"{BLOCK}.experts.down_proj"
Q = "model.layers.0.self_attn.q_proj"
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
STACKS = {"experts": {UP: (E, 2 * F, H), DOWN: (E, H, F)},
          "transposed_experts": {UP: (E, H, 2 * F), DOWN: (E, F, H)}}  # fmt: skip


@pytest.fixture
def rng():
    return np.random.default_rng(31)


def rows_scaled(rng, *shape):
    """A weight whose rows have unlike norms."""
    return draw(rng, *shape) * (0.5 + rng.random((*shape[:-1], 1))).astype("float32")


def stacks(rng, a_side, b_side, rank=RANK, experts=E):
    """A (experts, rank, in) and B (experts, out, rank)."""
    return 0.2 * draw(rng, experts, rank, a_side), 0.2 * draw(rng, experts, b_side, rank)


def packed(a, b):
    """PEFT's lora_A and lora_B of these stacks."""
    experts, rank, inner = a.shape
    by_rank = b.transpose(1, 2, 0).reshape(b.shape[1], rank * experts)
    return a.reshape(experts * rank, inner), np.ascontiguousarray(by_rank)


def write(folder, tensors, metadata=None, **changes):
    """Write a folder of PEFT without magnitudes; `changes` go into its configuration."""
    folder.mkdir(parents=True)
    whole = {f"{PREFIX}{name}.weight": tensor for name, tensor in tensors.items()}
    save_file(whole, folder / "adapter_model.safetensors", {"format": "pt", **(metadata or {})})
    config = peft_config(**{"use_dora": False, "peft_version": "0.21.2", **changes})
    write_json(folder / "adapter_config.json", config)


def write_parameters(folder, factors, **changes):
    """Write PEFT's target_parameters, the first one of `factors` innermost."""
    names = ["base_layer." * (len(factors) - 1 - place) for place in range(len(factors))]
    tensors = {}
    for nested, (a, b) in zip(names, factors, strict=True):
        tensors |= {f"{BLOCK}.experts.{nested}lora_A": a, f"{BLOCK}.experts.{nested}lora_B": b}
    write(folder, tensors, **{"target_parameters": BOTH, "target_modules": ["q_proj"], **changes})


def fused(rng, folder, kind, model_type="llama4_text", **shapes):
    """Write a base with fused experts and a query."""
    own = {name: rows_scaled(rng, *shape) for name, shape in STACKS[kind].items()}
    return write_base(folder, own | {f"{Q}.weight": draw(rng, H, H + 1)}, model_type=model_type)


def apart(rng, folder, names=("gate_proj", "up_proj", "down_proj"), block=BLOCK, **config):
    """Write a base with a tensor for each expert; return its tensors."""
    gate, up, down = names
    tensors = {}
    for e in range(E):
        lead = f"{block}.experts.{e}."
        tensors |= {
            f"{lead}{gate}.weight": rows_scaled(rng, F, H),
            f"{lead}{up}.weight": rows_scaled(rng, F, H),
            f"{lead}{down}.weight": rows_scaled(rng, H, F),
        }
    return write_base(folder, tensors, **config)


def added(weight, a, b, s=S):
    """W + s B A by experts, or with (B A)ᵀ where only that fits."""
    delta = s * (b.astype(float) @ a.astype(float))
    return weight + (delta if delta.shape == weight.shape else delta.swapaxes(1, 2))


def split(changed_up, changed_down, block=BLOCK, names=("gate_proj", "up_proj", "down_proj")):
    """The tensors of single experts, of fused ones (E, 2 F, H) and (E, H, F)."""
    gate, up, down = names
    found = {}
    for e in range(E):
        lead = f"{block}.experts.{e}."
        found[f"{lead}{gate}.weight"] = changed_up[e, :F]
        found[f"{lead}{up}.weight"] = changed_up[e, F:]
        found[f"{lead}{down}.weight"] = changed_down[e]
    return found


def together(base, block=BLOCK, names=("gate_proj", "up_proj", "down_proj")):
    """The fused tensors of single experts."""
    gate, up, down = names
    of = [
        [base[f"{block}.experts.{e}.{name}.weight"] for e in range(E)] for name in (gate, up, down)
    ]
    return np.concatenate([of[0], of[1]], axis=1), np.stack(of[2])


# PEFT's target_parameters


@pytest.mark.parametrize(
    ("kind", "sides", "model_type"),
    [
        ("transposed_experts", ((H, 2 * F), (F, H)), "gpt_oss"),
        ("transposed_experts", ((2 * F, H), (H, F)), "llama4_text"),
        ("experts", ((H, 2 * F), (F, H)), "mixtral"),
    ],
)
def test_parameters_of_fused_experts_are_merged(tmp_path, rng, kind, sides, model_type):
    base = fused(rng, tmp_path / "base", kind, model_type)
    up, down = (stacks(rng, *side) for side in sides)
    write_parameters(tmp_path / "adapter", [packed(*up), packed(*down)])
    check(tmp_path, base, {UP: added(base[UP], *up), DOWN: added(base[DOWN], *down)})


@pytest.mark.parametrize("names", [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")])
@pytest.mark.parametrize("version", ["0.21.2", "0.18.1"])
def test_parameters_are_merged_into_a_tensor_for_each_expert(tmp_path, rng, names, version):
    """In the older version the sides of A and B are exchanged."""
    block = BLOCK if names[0] == "gate_proj" else BLOCK.replace("mlp", "block_sparse_moe")
    base = apart(rng, tmp_path / "base", names, block, model_type="mixtral")
    sides = [(H, 2 * F), (F, H)]
    up, down = (stacks(rng, *(side if version == "0.21.2" else side[::-1])) for side in sides)
    both = [packed(*up), packed(*down)]
    write_parameters(tmp_path / "adapter", both, peft_version=version)
    whole = together(base, block, names)
    changed = split(added(whole[0], *up), added(whole[1], *down), block, names)
    check(tmp_path, base, changed)


def test_ranks_and_alphas_are_those_of_the_parameter(tmp_path, rng):
    base = fused(rng, tmp_path / "base", "experts")
    up, down = stacks(rng, H, 2 * F, rank=3), stacks(rng, F, H)
    patterns = {"rank_pattern": {"experts.gate_up_proj": 3, "experts": 7},
                "alpha_pattern": {".*\\.down_proj": 5, "mlp.experts": 9}}  # fmt: skip
    write_parameters(tmp_path / "adapter", [packed(*up), packed(*down)], **patterns)
    changed = {UP: added(base[UP], *up, ALPHA / 3), DOWN: added(base[DOWN], *down, 5 / RANK)}
    check(tmp_path, base, changed)


def test_biases_and_the_weights_of_plain_modules_are_matrices(tmp_path, rng):
    """The weight of the router, that of a query, and the biases of all experts."""
    own = {UP: rows_scaled(rng, *STACKS["experts"][UP]), f"{DOWN}_bias": draw(rng, E, H)}
    own |= {f"{BLOCK}.gate.weight": draw(rng, E, H), f"{Q}.weight": draw(rng, 7, H)}
    base = write_base(tmp_path / "base", own, model_type="qwen3_moe")
    up, matrices = stacks(rng, H, 2 * F), {}
    for name in list(own)[1:]:
        matrices[name] = 0.2 * draw(rng, RANK, H), 0.2 * draw(rng, len(own[name]), RANK)
    inner, outer = packed(*up), matrices[f"{DOWN}_bias"]
    lead = f"{BLOCK}.experts."
    tensors = {f"{lead}base_layer.lora_A": inner[0], f"{lead}base_layer.lora_B": inner[1]}
    tensors |= {f"{lead}lora_A": outer[0], f"{lead}lora_B": outer[1]}
    for name in (f"{BLOCK}.gate.weight", f"{Q}.weight"):
        path = name.removesuffix(".weight")
        tensors |= {f"{path}.lora_A": matrices[name][0], f"{path}.lora_B": matrices[name][1]}
    targets = ["gate_up_proj", "down_proj_bias", "gate.weight", "q_proj.weight"]
    write(tmp_path / "adapter", tensors, target_parameters=targets, target_modules=[])
    changed = {name: own[name] + S * b @ a for name, (a, b) in matrices.items()}
    check(tmp_path, base, changed | {UP: added(own[UP], *up)})


@pytest.mark.parametrize("modules", [["q_proj"], r".*\.q_proj"])
def test_a_short_entry_is_not_for_a_module_of_target_modules(tmp_path, rng, modules):
    base = fused(rng, tmp_path / "base", "experts")
    down = stacks(rng, F, H)
    a, b = packed(*down)
    query = 0.2 * draw(rng, RANK, H + 1), 0.2 * draw(rng, H, RANK)
    tensors = {f"{BLOCK}.experts.lora_A": a, f"{BLOCK}.experts.lora_B": b,
               f"{Q}.lora_A": query[0], f"{Q}.lora_B": query[1]}  # fmt: skip
    write(tmp_path / "adapter", tensors, target_parameters=["down_proj"], target_modules=modules)
    changed = {DOWN: added(base[DOWN], *down)}
    changed[f"{Q}.weight"] = base[f"{Q}.weight"] + S * query[1] @ query[0]
    check(tmp_path, base, changed)


def test_dora_of_other_modules_stands_beside_lora_of_experts(tmp_path, rng):
    base = fused(rng, tmp_path / "base", "experts")
    down, query = stacks(rng, F, H), near(rng, base[f"{Q}.weight"])
    a, b = packed(*down)
    whole = {f"{PREFIX}{BLOCK}.experts.lora_A.weight": a,
             f"{PREFIX}{BLOCK}.experts.lora_B.weight": b}  # fmt: skip
    targets = {"target_parameters": BOTH[1:], "target_modules": ["q_proj"]}
    write_peft(tmp_path / "adapter", {Q: query}, whole, **targets)
    changed = {DOWN: added(base[DOWN], *down)}
    check(tmp_path, base, changed | {f"{Q}.weight": dense(base[f"{Q}.weight"], *query)})


def square(rng, folder, **config):
    return write_base(folder, {DOWN: rows_scaled(rng, E, H, H)}, **config)


@pytest.mark.parametrize(
    ("version", "config", "is_transposed"),
    [
        ("0.21.2", {"model_type": "gpt_oss"}, True),
        ("0.21.2", {"model_type": "aria", "text_config": {"model_type": "aria_text"}}, True),
        ("0.21.2", {"model_type": "llama4_text"}, False),
        ("0.18.1", {"model_type": "llama4_text"}, True),
        ("0.17.0", {}, True),
        (None, {"model_type": "gpt_oss"}, True),
    ],
)
def test_version_and_family_tell_the_axes_of_square_experts(
    tmp_path, rng, version, config, is_transposed
):
    base = square(rng, tmp_path / "base", **config)
    a, b = stacks(rng, H, H)
    write_parameters(
        tmp_path / "adapter", [packed(a, b)], target_parameters=BOTH[1:], peft_version=version
    )
    delta = b @ a
    changed = base[DOWN] + S * (delta.swapaxes(1, 2) if is_transposed else delta)
    check(tmp_path, base, {DOWN: changed})


@pytest.mark.parametrize(
    ("version", "config", "advice"),
    [
        (None, {"model_type": "llama4_text"}, "add to adapter_config.json peft_version"),
        ("0.21.2", {}, "put the model's config.json beside BASE"),
    ],
)
def test_square_experts_that_nothing_tells_are_refused(
    tmp_path, rng, capsys, version, config, advice
):
    square(rng, tmp_path / "base", **config)
    factors = [packed(*stacks(rng, H, H))]
    write_parameters(
        tmp_path / "adapter", factors, target_parameters=BOTH[1:], peft_version=version
    )
    error = refused(tmp_path, capsys)
    assert f"the experts of {DOWN} are square" in error
    assert advice in error


BROKEN = {
    "rank does not divide": ({"r": 3}, "gate_up_proj: lora_A must have shape (experts * rank, in)"),
    "an entry for nothing": (
        {"target_parameters": [*BOTH, "mlp.experts.up_proj"]},
        "has down_proj, gate_up_proj, up_proj for model.layers.0.mlp.experts, but the file has 2",
    ),
    "an entry of another module": (
        {"target_parameters": [*BOTH, "moe.experts.up_proj"]},
        "target_parameters has moe.experts.up_proj, and the file has no adapter for it",
    ),
    "an unknown parameter": (
        {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.inner"]},
        "does not tell which adapter of model.layers.0.mlp.experts is for inner",
    ),
    "a target with lookaround": (
        {"target_parameters": ["gate_up_proj"], "target_modules": "(?!x).*"},
        "target_modules: the pattern",
    ),
    "no list": ({"target_parameters": "gate_up_proj"}, "target_parameters must be a list of names"),
}


@pytest.mark.parametrize("title", BROKEN)
def test_a_wrong_configuration_of_parameters_is_refused(tmp_path, rng, capsys, title):
    fused(rng, tmp_path / "base", "experts")
    changes, message = BROKEN[title]
    factors = [packed(*stacks(rng, H, 2 * F)), packed(*stacks(rng, F, H))]
    is_short = changes.get("target_parameters") == ["gate_up_proj"]
    write_parameters(tmp_path / "adapter", factors[:1] if is_short else factors, **changes)
    assert message in refused(tmp_path, capsys)


@pytest.mark.parametrize(
    ("experts", "base", "message"),
    [
        (3, "fused", f"{UP} has shape (4, 10, 6), but its adapter is for experts (3, 10, 6)"),
        (3, "apart", f"the base has no {UP} for an adapter of shape (3, 10, 6)"),
        (5, "apart", f"the base has no {UP} for an adapter of shape (5, 10, 6)"),
    ],
)
def test_another_number_of_experts_is_refused(tmp_path, rng, capsys, experts, base, message):
    if base == "fused":
        fused(rng, tmp_path / "base", "experts")
    else:
        apart(rng, tmp_path / "base", model_type="qwen3_moe")
    factors = [packed(*stacks(rng, H, 2 * F, experts=experts))]
    write_parameters(tmp_path / "adapter", factors, target_parameters=BOTH[:1])
    assert message in refused(tmp_path, capsys)


def test_experts_in_blocks_are_named_as_quantised(tmp_path, rng, capsys):
    tensors = {f"{UP}_blocks": np.zeros((E, 2 * F, 1, 16), np.uint8)}
    write_base(tmp_path / "base", tensors, model_type="gpt_oss")
    factors = [packed(*stacks(rng, H, 2 * F))]
    write_parameters(tmp_path / "adapter", factors, target_parameters=BOTH[:1])
    assert f"{UP} is quantised (MXFP4), but {UP}_scales is missing" in refused(tmp_path, capsys)


@pytest.mark.parametrize("shape", [(F,), (F, H + 1), (F + 1, H)])
def test_a_tensor_of_an_expert_of_another_shape_is_refused(tmp_path, rng, capsys, shape):
    base = apart(rng, tmp_path / "base", model_type="qwen3_moe")
    base[f"{BLOCK}.experts.1.up_proj.weight"] = draw(rng, *shape)
    save_file(base, tmp_path / "base" / "model.safetensors")
    factors = [packed(*stacks(rng, H, 2 * F))]
    write_parameters(tmp_path / "adapter", factors, target_parameters=BOTH[:1])
    assert f"the base has no {UP}" in refused(tmp_path, capsys)


def test_a_magnitude_in_the_packing_of_peft_is_refused(tmp_path, rng, capsys):
    fused(rng, tmp_path / "base", "experts")
    (a, b), m = packed(*stacks(rng, F, H)), np.ones((E, H), np.float32)
    whole = {f"{BLOCK}.experts.lora_A": a, f"{BLOCK}.experts.lora_B": b,
             f"{BLOCK}.experts.lora_magnitude_vector": m}  # fmt: skip
    write(tmp_path / "adapter", whole, target_parameters=BOTH[1:], use_dora=True)
    assert "PEFT has no DoRA of target_parameters" in refused(tmp_path, capsys)


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_nan_in_one_expert_is_named(tmp_path, rng, capsys, factor):
    fused(rng, tmp_path / "base", "experts")
    a, b = stacks(rng, F, H)
    (a if factor == "lora_A" else b)[2, 1, 1] = np.nan
    write_parameters(tmp_path / "adapter", [packed(a, b)], target_parameters=BOTH[1:])
    assert merge(tmp_path) == 2
    error = capsys.readouterr().err
    assert f"{BLOCK}.experts.{factor}.weight contains NaN or infinity in expert 2\n" in error


def test_each_factor_is_read_once_for_all_experts(tmp_path, rng, monkeypatch):
    fused(rng, tmp_path / "base", "experts")
    write_parameters(tmp_path / "adapter", [packed(*stacks(rng, F, H))], target_parameters=BOTH[1:])
    sizes, read = {"lora_A": 0, "lora_B": 0}, Reader.read

    def counted(self, name, *arguments, **options):
        array = read(self, name, *arguments, **options)
        for factor in sizes:
            sizes[factor] += array.size * (factor in name)
        return array

    monkeypatch.setattr(Reader, "read", counted)
    assert merge(tmp_path) == 0
    assert sizes == {"lora_A": E * RANK * F, "lora_B": E * RANK * H}


def test_each_packed_factor_is_read_once_where_experts_are_apart(tmp_path, rng, monkeypatch):
    """The parts of gate, up and down of an expert take turns."""
    apart(rng, tmp_path / "base")
    both = [packed(*stacks(rng, H, 2 * F)), packed(*stacks(rng, F, H))]
    write_parameters(tmp_path / "adapter", both)
    read, seen = Reader.read, []

    def counted(self, name, *arguments, **options):
        seen.append(name)
        return read(self, name, *arguments, **options)

    monkeypatch.setattr(Reader, "read", counted)
    assert merge(tmp_path, "--jobs", "1") == 0
    factors = [name for name in seen if "lora_B" in name]
    assert len(factors) == len(set(factors)) == 2


def test_few_packed_factors_stay_in_memory(tmp_path, rng):
    tensors = {f"b{place}": draw(rng, 5, 6) for place in range(9)}
    save_file(tensors, tmp_path / "b.safetensors")
    reader, last = Reader(tmp_path / "b.safetensors"), _Last()
    for name, packed_b in tensors.items():
        wanted = packed_b.reshape(5, 2, 3).transpose(2, 0, 1)
        np.testing.assert_array_equal(last.by_expert(reader, name, 2, 3), wanted)
    assert len(last) == 8
    assert last.by_expert(reader, "b8", 2, 3) is last.by_expert(reader, "b8", 2, 3)


def test_a_fused_tensor_is_merged_block_by_block(tmp_path, rng, monkeypatch):
    base = fused(rng, tmp_path / "base", "transposed_experts", "gpt_oss")
    adapters = drawn(rng, base, "transposed_experts")
    save_adapters(tmp_path / "adapter", adapters)
    monkeypatch.setattr(_matrix, "BLOCK", 4 * F)  # two rows of (H, 2 F)
    largest, read = [0], Reader.read

    def measured(self, name, *arguments, **options):
        array = read(self, name, *arguments, **options)
        if name in (UP, DOWN):
            largest[0] = max(largest[0], array.size)
        return array

    monkeypatch.setattr(Reader, "read", measured)
    check(tmp_path, base, merged_by_formula(base, adapters))
    assert largest[0] == 4 * F


# mlx-lm


def write_mlx(folder, tensors, **parameters):
    folder.mkdir()
    save_file(tensors, folder / "adapters.safetensors")
    own = {"rank": RANK, "scale": S, **parameters}
    write_json(folder / "adapter_config.json", {"fine_tune_type": "lora", "lora_parameters": own})


def mlx_stack(rng, name="gate_proj", a_side=H, b_side=F):
    a, b = stacks(rng, a_side, b_side)
    lead = f"{BLOCK}.switch_mlp.{name}"
    return (a, b), {f"{lead}.lora_a": a, f"{lead}.lora_b": b}


def test_experts_of_mlx_are_merged_into_stacks(tmp_path, rng):
    base = write_base(
        tmp_path / "base", {f"{BLOCK}.switch_mlp.gate_proj.weight": rows_scaled(rng, E, F, H)}
    )
    (a, b), tensors = mlx_stack(rng)
    write_mlx(tmp_path / "adapter", tensors)
    ((name, weight),) = base.items()
    check(tmp_path, base, {name: added(weight, a, b)})


def test_experts_of_mlx_are_merged_into_a_tensor_for_each(tmp_path, rng):
    base = apart(rng, tmp_path / "base", model_type="qwen3_moe")
    (a, b), tensors = mlx_stack(rng, "up_proj")
    write_mlx(tmp_path / "adapter", tensors)
    names = [f"{BLOCK}.experts.{e}.up_proj.weight" for e in range(E)]
    changed = added(np.stack([base[name] for name in names]), a, b)
    check(tmp_path, base, dict(zip(names, changed, strict=True)))


@pytest.mark.parametrize(
    ("change", "parameters", "message"),
    [
        ({"lora_b": (E + 1, F, RANK)}, {}, "gate_proj: lora_a of experts must have shape"),
        ({}, {"rank": 3}, "gate_proj: adapter_config.json says rank 3, but lora_a has shape"),
    ],
)
def test_malformed_experts_of_mlx_are_refused(tmp_path, rng, capsys, change, parameters, message):
    write_base(tmp_path / "base", {f"{BLOCK}.switch_mlp.gate_proj.weight": draw(rng, E, F, H)})
    _, tensors = mlx_stack(rng)
    lead = f"{BLOCK}.switch_mlp.gate_proj."
    tensors |= {f"{lead}{name}": draw(rng, *shape) for name, shape in change.items()}
    write_mlx(tmp_path / "adapter", tensors, **parameters)
    assert message in refused(tmp_path, capsys)


def test_known_axes_are_not_exchanged(tmp_path, rng, capsys):
    """Only PEFT's file may mean either axis."""
    write_base(tmp_path / "base", {f"{BLOCK}.switch_mlp.gate_proj.weight": draw(rng, E, H, F)})
    _, tensors = mlx_stack(rng)
    write_mlx(tmp_path / "adapter", tensors)
    assert "but its adapter is for experts (4, 5, 6)" in refused(tmp_path, capsys)


# The layout of doraxp


def drawn(rng, base, kind, names=(UP, DOWN)):
    """Adapters of fused experts, made by `adapt` and trained a little."""
    weights = {name: base[name] for name in names}
    adapters = doraxp.adapt(
        weights,
        list(names),
        Config(RANK, ALPHA),
        seed=3,
        kinds=dict.fromkeys(names, LayerKind(kind)),
    )
    for path, layer in adapters.items():
        a, b, m = layer.adapter
        m = m * (1 + 0.1 * draw(rng, *m.shape))
        adapter = layer.adapter._replace(lora_b=b + 0.2 * draw(rng, *b.shape), magnitude=m)
        adapters[path] = layer._replace(adapter=adapter, shape=tuple(base[path].shape))
        assert a.shape == (E, RANK, layer.kind.matrix_shape(layer.shape)[2])
    return adapters


def merged_by_formula(base, adapters):
    """W' of each expert in float64."""
    changed = {}
    for path, layer in adapters.items():
        matrices = layer.kind.matrix(base[path])
        own = [dense(w, *leaves) for w, *leaves in zip(matrices, *layer.adapter, strict=True)]
        changed[path] = layer.kind.restore(np.stack(own), layer.shape)
    return changed


@pytest.mark.parametrize("kind", STACKS)
def test_dora_of_experts_is_merged_and_comes_back_bit_for_bit(tmp_path, rng, kind):
    base = fused(rng, tmp_path / "base", kind, "gpt_oss")
    adapters = drawn(rng, base, kind)
    save_adapters(tmp_path / "adapter", adapters)
    found = load_adapters(tmp_path / "adapter")
    for path, layer in adapters.items():
        assert found[path][1:] == layer[1:]
        for one, other in zip(found[path].adapter, layer.adapter, strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)
    check(tmp_path, base, merged_by_formula(base, adapters))
    in_memory = {
        path: layer.kind.restore(
            doraxp.merge(layer.kind.matrix(base[path]), layer.adapter, layer.config), layer.shape
        )
        for path, layer in adapters.items()
    }
    for path, weight in in_memory.items():
        np.testing.assert_allclose(read_folder(tmp_path / "out")[path], weight, rtol=2e-6)


def test_the_files_are_those_that_the_page_describes(tmp_path, rng):
    base = fused(rng, tmp_path / "base", "experts")
    adapters = drawn(rng, base, "experts", [UP])
    query = doraxp.adapt(
        {f"{Q}.weight": base[f"{Q}.weight"]}, [Q], Config(3, dropout="input"), seed=1
    )
    save_adapters(tmp_path / "adapter", adapters | query)
    reader = Reader(tmp_path / "adapter" / "adapter_model.safetensors")
    shapes = {name: tensor.shape for name, tensor in reader.tensors.items() if UP in name}
    assert shapes == {
        f"{PREFIX}{UP}.lora_A.weight": (E, RANK, H),
        f"{PREFIX}{UP}.lora_B.weight": (E, 2 * F, RANK),
        f"{PREFIX}{UP}.lora_magnitude_vector": (E, 2 * F),
    }
    assert json.loads(reader.metadata["doraxp"])["experts"] == {
        "version": 1,
        "modules": {UP: "experts"},
    }
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["use_dora"], config["target_parameters"], config["target_modules"]) == (
        True, [UP], [Q],
    )  # fmt: skip
    save_adapters(tmp_path / "again", load_adapters(tmp_path / "adapter"))
    again = Reader(tmp_path / "again" / "adapter_model.safetensors")
    assert (again.tensors, again.metadata) == (reader.tensors, reader.metadata)
    for name in reader.tensors:
        np.testing.assert_array_equal(again.read(name), reader.read(name))
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text()) == config


def test_dora_of_experts_is_merged_into_a_tensor_for_each(tmp_path, rng):
    base = apart(rng, tmp_path / "base", model_type="qwen3_moe")
    whole = dict(zip((UP, DOWN), together(base), strict=True))
    adapters = drawn(rng, whole, "experts")
    save_adapters(tmp_path / "adapter", adapters)
    check(tmp_path, base, split(*merged_by_formula(whole, adapters).values()))


def test_transposed_experts_are_not_merged_into_a_tensor_for_each(tmp_path, rng, capsys):
    """The norms are those of columns, and the tensors have rows of them only."""
    base = apart(rng, tmp_path / "base", model_type="qwen3_moe")
    whole = dict(zip((UP, DOWN), together(base), strict=True))
    adapters = drawn(rng, whole, "transposed_experts", [DOWN])
    save_adapters(tmp_path / "adapter", adapters)
    assert "merge it into a base that has them as one tensor" in refused(tmp_path, capsys)


def test_a_wrong_expert_is_named_by_the_audit(tmp_path, rng, capsys):
    base = fused(rng, tmp_path / "base", "transposed_experts", "gpt_oss")
    save_adapters(tmp_path / "adapter", drawn(rng, base, "transposed_experts"))
    assert merge(tmp_path, "--json", str(tmp_path / "report.json")) == 0
    assert f"{UP} (expert 3)" in (tmp_path / "report.json").read_text()
    merged = load_file(tmp_path / "out" / "model.safetensors")
    merged[UP][2] = base[UP][2]
    save_file(merged, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    assert audit(tmp_path) == 1
    assert f"rows {2 * H} to {3 * H - 1}" in capsys.readouterr().out
    save_file({**merged, UP: merged[UP][:2]}, tmp_path / "out" / "model.safetensors")
    assert audit(tmp_path) == 1
    assert "another shape" in capsys.readouterr().out


def test_inspect_looks_at_experts(tmp_path, rng, capsys):
    base = fused(rng, tmp_path / "base", "experts")
    write_parameters(
        tmp_path / "lora", [packed(*(own := stacks(rng, F, H)))], target_parameters=BOTH[1:]
    )
    save_adapters(tmp_path / "dora", drawn(rng, base, "experts"))
    for name in ("lora", "dora"):
        paths = [str(tmp_path / name), "--base", str(tmp_path / "base")]
        assert main(["inspect", *paths, "--json", str(tmp_path / f"{name}.json")]) == 0
    update = load_adapters(tmp_path / "lora")[DOWN].adapter.update
    assert isinstance(update, Stack)
    assert update.shape == (E * H, F)
    delta = (own[1] @ own[0]).reshape(E * H, F)
    for rows in (slice(2, 5), slice(0, E * H)):
        np.testing.assert_allclose(update.rows(rows), delta[rows], rtol=1e-5, atol=1e-7)
    (norm,) = re.findall(r'"update_norm": ([\d.]+)', (tmp_path / "lora.json").read_text())
    assert float(norm) == pytest.approx(S * np.linalg.norm(delta), rel=1e-3)
    layer = load_adapters(tmp_path / "lora")[DOWN]
    np.testing.assert_allclose(
        doraxp.merge(base[DOWN], layer.adapter, layer.config, kind=layer.kind),
        base[DOWN] + S * delta.reshape(E, H, F),
        rtol=1e-5,
        atol=1e-6,
    )
    np.testing.assert_allclose(update.scaled(2.0).rows(slice(0, 3)), 2 * delta[:3], rtol=1e-5)
    capsys.readouterr()


def test_changes_of_experts_are_added(tmp_path, rng):
    base = fused(rng, tmp_path / "base", "transposed_experts", "gpt_oss")
    one, other = (drawn(rng, base, "transposed_experts", [UP]) for _ in range(2))
    save_adapters(tmp_path / "one", one)
    save_adapters(tmp_path / "other", other)
    given = [f"--adapter={tmp_path / 'one'}:0.5", f"--adapter={tmp_path / 'other'}:2"]
    paths = [str(tmp_path / "base"), "--out", str(tmp_path / "out"), "--jobs", "1", "--verify"]
    assert main(["merge", *paths, *given]) == 0
    (first,), (second,) = (merged_by_formula(base, own).values() for own in (one, other))
    wanted = base[UP] + 0.5 * (first - base[UP]) + 2 * (second - base[UP])
    np.testing.assert_allclose(read_folder(tmp_path / "out")[UP], wanted, rtol=2e-5, atol=1e-5)
    assert main(["audit", str(tmp_path / "base"), *given, str(tmp_path / "out")]) == 0


ENTRIES = {
    "another version": ({"version": 2, "modules": {UP: "experts"}}, "must have version 1, got"),
    "no object": ([1], "must have version 1, got [1]: update doraxp"),
    "an unknown kind": ({"version": 1, "modules": {UP: "rows"}}, "by parameter, got"),
    "no modules": ({"version": 1}, "must have modules, an object of the kinds experts, transposed"),
    "a parameter without tensors": (
        {"version": 1, "modules": {UP: "experts", DOWN: "experts"}},
        f"has {DOWN}, and the file has no adapter of that name",
    ),
}


@pytest.mark.parametrize("title", ENTRIES)
def test_a_wrong_entry_of_the_header_is_refused(tmp_path, rng, capsys, title):
    base = fused(rng, tmp_path / "base", "experts")
    save_adapters(tmp_path / "adapter", drawn(rng, base, "experts", [UP]))
    entry, message = ENTRIES[title]
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(load_file(file), file, {"doraxp": json.dumps({"experts": entry})})
    assert message in refused(tmp_path, capsys)


TENSORS = {
    "a matrix": ("lora_A.weight", lambda x: x[0], "lora_A must have shape (experts, rank, in)"),
    "fewer experts": ("lora_B.weight", lambda x: x[1:], "gate_up_proj: lora_A must have shape"),
    "another m": ("lora_magnitude_vector", lambda x: x[:, 1:], "with the rank 2 of"),
    "without m": ("lora_magnitude_vector", lambda x: None, "must have lora_A, lora_B and lora_mag"),
}


@pytest.mark.parametrize("title", TENSORS)
def test_malformed_stacks_are_refused(tmp_path, rng, capsys, title):
    base = fused(rng, tmp_path / "base", "experts")
    save_adapters(tmp_path / "adapter", drawn(rng, base, "experts", [UP]))
    name, change, message = TENSORS[title]
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors, metadata = load_file(file), Reader(file).metadata
    changed = change(tensors.pop(f"{PREFIX}{UP}.{name}"))
    if changed is not None:
        tensors[f"{PREFIX}{UP}.{name}"] = np.ascontiguousarray(changed)
    save_file(tensors, file, metadata)
    assert message in refused(tmp_path, capsys)


def test_nan_in_the_magnitude_of_one_expert_is_named(tmp_path, rng, capsys):
    base = fused(rng, tmp_path / "base", "experts")
    adapters = drawn(rng, base, "experts", [UP])
    adapters[UP].adapter.magnitude[1, 3] = np.inf
    save_adapters(tmp_path / "adapter", adapters)
    assert "lora_magnitude_vector contains NaN or infinity in expert 1" in refused(tmp_path, capsys)


def test_other_conversions_of_experts_are_refused(tmp_path, rng):
    base = fused(rng, tmp_path / "base", "experts")
    adapters = drawn(rng, base, "experts", [UP])
    with pytest.raises(ValueError, match="mlx-lm has no adapter of kind 'experts'"):
        save_adapters(tmp_path / "new", adapters, "mlx")
    with pytest.raises(ValueError, match="diffusers has no adapter of experts"):
        save_adapters(tmp_path / "new", adapters, "diffusers")
    a, b = stacks(rng, F, H)
    lora = UpdatedLayer(
        UpdateAdapter(Stack(a, b)), Config(RANK), LayerKind("experts"), base[DOWN].shape
    )
    with pytest.raises(ValueError, match="LoRA of fused experts is not converted"):
        save_adapters(tmp_path / "new", {DOWN: lora})
    _, tensors = mlx_stack(rng)
    write_mlx(tmp_path / "adapter", tensors)
    apart(rng, tmp_path / "apart", model_type="qwen3_moe")
    with pytest.raises(doraxp.checkpoint.CheckpointError, match="BASE has a tensor for each"):
        named_for(open_model(tmp_path / "apart"), load_adapters(tmp_path / "adapter"))
    assert LowRank(a[0], b[0]).shape == (H, F)


# Adapters of single experts, by their names in the file


@pytest.mark.parametrize("names", [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")])
def test_dora_of_single_experts_is_merged(tmp_path, rng, names):
    base = apart(rng, tmp_path / "base", names, model_type="mixtral")
    leaves = {name.removesuffix(".weight"): near(rng, base[name]) for name in list(base)[:7]}
    write_peft(tmp_path / "adapter", leaves)
    check(
        tmp_path,
        base,
        {f"{path}.weight": dense(base[f"{path}.weight"], *own) for path, own in leaves.items()},
    )


def test_two_adapters_of_one_expert_are_refused(tmp_path, rng, capsys):
    base = apart(rng, tmp_path / "base", model_type="qwen3_moe")
    a, b = packed(*stacks(rng, F, H))
    one = f"{BLOCK}.experts.1.down_proj"
    own = near(rng, base[f"{one}.weight"])
    tensors = {f"{BLOCK}.experts.lora_A": a, f"{BLOCK}.experts.lora_B": b,
               f"{one}.lora_A": own[0], f"{one}.lora_B": own[1]}  # fmt: skip
    modules = [f"experts.{e}.down_proj" for e in range(E)]
    write(tmp_path / "adapter", tensors, target_parameters=BOTH[1:], target_modules=modules)
    assert f"the base has no {DOWN} for an adapter of shape" in refused(tmp_path, capsys)


# The golden files

GOLDEN = Path(__file__).parents[1] / "examples" / "experts"


def golden_status(*arguments):
    """Return the exit status of the check, which needs NumPy alone."""
    spec = importlib.util.spec_from_file_location("experts_check", GOLDEN / "check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["check.py", *map(str, arguments)])
        return module.main()


def test_the_golden_files_are_right_by_the_formula_and_by_the_merge(tmp_path):
    assert golden_status() == 0
    base, adapter, out = (
        GOLDEN / "base.safetensors",
        GOLDEN / "adapter",
        tmp_path / "out.safetensors",
    )
    assert main(["merge", *map(str, (base, adapter)), "--out", str(out), "--verify"]) == 0
    assert golden_status(out) == 0
    assert main(["audit", *map(str, (base, adapter, GOLDEN / "merged.safetensors"))]) == 0


def test_the_check_of_the_golden_files_sees_one_wrong_expert(tmp_path):
    tensors = load_file(GOLDEN / "merged.safetensors")
    name = "model.layers.0.mlp.experts.down_proj"
    tensors[name][1] = load_file(GOLDEN / "base.safetensors")[name][1]
    save_file(tensors, tmp_path / "wrong.safetensors")
    assert golden_status(tmp_path / "wrong.safetensors") == 1


def test_the_golden_adapter_is_saved_again_as_it_is(tmp_path):
    save_adapters(tmp_path / "again", load_adapters(GOLDEN / "adapter"))
    folders = tmp_path / "again", GOLDEN / "adapter"
    configs = [(folder / "adapter_config.json").read_text() for folder in folders]
    assert configs[0] == configs[1]
    again, golden = (Reader(folder / "adapter_model.safetensors") for folder in folders)
    assert again.metadata == golden.metadata
    for name in golden.tensors:
        np.testing.assert_array_equal(again.read(name), golden.read(name))


def test_a_change_of_experts_is_added_to_one_in_full(tmp_path, rng):
    """The first adapter has the tensor of all experts in full, as `modules_to_save` writes it."""
    base = fused(rng, tmp_path / "base", "experts")
    query = near(rng, base[f"{Q}.weight"])
    trained = rows_scaled(rng, *base[UP].shape)
    write_peft(
        tmp_path / "one", {Q: query}, {f"{PREFIX}{UP}": trained}, modules_to_save=["experts"]
    )
    save_adapters(tmp_path / "other", other := drawn(rng, base, "experts", [UP]))
    given = [f"--adapter={tmp_path / 'one'}:0.5", f"--adapter={tmp_path / 'other'}"]
    paths = [str(tmp_path / "base"), "--out", str(tmp_path / "out"), "--jobs", "1", "--verify"]
    assert main(["merge", *paths, *given]) == 0
    wanted = 0.5 * (trained - base[UP]) + merged_by_formula(base, other)[UP]
    np.testing.assert_allclose(read_folder(tmp_path / "out")[UP], wanted, rtol=2e-5, atol=1e-5)


def test_changes_of_one_expert_in_all_are_added(tmp_path, rng):
    base = write_base(tmp_path / "base", {DOWN: rows_scaled(rng, 1, H, F)}, model_type="gpt_oss")
    layers = {}
    for name in ("one", "other"):
        adapters = doraxp.adapt(
            {DOWN: base[DOWN]},
            [DOWN],
            Config(RANK, ALPHA),
            seed=2,
            kinds={DOWN: LayerKind("experts")},
        )
        leaves = adapters[DOWN].adapter
        own = leaves._replace(lora_b=draw(rng, *leaves.lora_b.shape))
        layers[name] = {DOWN: adapters[DOWN]._replace(adapter=own)}
        save_adapters(tmp_path / name, layers[name])
    given = [f"--adapter={tmp_path / name}" for name in layers]
    paths = [str(tmp_path / "base"), "--out", str(tmp_path / "out"), "--jobs", "1", "--verify"]
    assert main(["merge", *paths, *given]) == 0
    changes = [merged_by_formula(base, own)[DOWN] - base[DOWN] for own in layers.values()]
    wanted = base[DOWN] + changes[0] + changes[1]
    np.testing.assert_allclose(read_folder(tmp_path / "out")[DOWN], wanted, rtol=2e-5, atol=1e-5)
    assert main(["audit", str(tmp_path / "base"), *given, str(tmp_path / "out")]) == 0


def test_the_norms_of_each_expert_are_compared_with_its_own_magnitude(tmp_path, rng):
    """A fresh m is the norm of its own base."""
    base = fused(rng, tmp_path / "base", "transposed_experts", "gpt_oss")
    kinds = dict.fromkeys((UP, DOWN), LayerKind("transposed_experts"))
    weights = {name: base[name] for name in kinds}
    adapters = doraxp.adapt(weights, list(kinds), Config(RANK), seed=4, kinds=kinds)
    save_adapters(tmp_path / "adapter", adapters)
    found = sample_norms(plan_merge(tmp_path / "base", tmp_path / "adapter", Options()))
    assert found == (2 * E, [], [])
