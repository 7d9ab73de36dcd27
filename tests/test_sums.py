"""Strength, and sums of changes: W + Σ t (W'ᵢ − W), whatever the adapters are.

W'ᵢ is the merge of one adapter alone. Two adapters add up in W', and not in V.
"""

from __future__ import annotations

import itertools
import json
import shutil

import ml_dtypes
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

from doraxp.checkpoint import Options, Weighted, audit, plan_merge, run_merge
from doraxp.cli import main

RANK, ALPHA = 2, 3.0
S = ALPHA / RANK
LINEAR, OTHER, ALONE = "block.0.q", "block.0.k", "block.1.q"
EMBED, CONV = "embed", "down"
SHAPES = {LINEAR: (37, 24), OTHER: (18, 24), ALONE: (9, 8), EMBED: (50, 24), CONV: (10, 6, 3, 2)}


def base_of(rng, dtype):
    weights = {f"{path}.weight": draw(rng, *shape) for path, shape in SHAPES.items()}
    weights["block.0.k.bias"] = draw(rng, 18)
    return {name: weight.astype(dtype) for name, weight in weights.items()}


def adapter(rng, path):
    """Return the leaves of an adapter of PEFT, and W' as a function of W."""
    shape = SHAPES[path]
    if path == EMBED:
        a, b, m = draw(rng, RANK, 50), draw(rng, 24, RANK), 1 + rng.random(24, dtype="f4")
        leaves = {"lora_embedding_A": a, "lora_embedding_B": b, "lora_magnitude_vector": m}
        return leaves, lambda w: dense(w.T, a, b, m, S).T
    a, b = draw(rng, RANK, *shape[1:]), draw(rng, shape[0], RANK)
    m = 1 + rng.random(shape[0], dtype="f4")
    ones = [1] * (len(shape) - 2)
    leaves = {
        "lora_A.weight": a,
        "lora_B.weight": b.reshape(*b.shape, *ones),
        "lora_magnitude_vector": m.reshape(1, -1, *ones) if ones else m,
    }
    flat = a.reshape(RANK, -1)
    return leaves, lambda w: dense(w.reshape(len(w), -1), flat, b, m, S).reshape(w.shape)


def write_one(folder, seed, paths, *, whole=None, dora=True, **entries):
    """Write an adapter of PEFT; return its W' by the base's names."""
    rng = np.random.default_rng(seed)
    tensors, merges = {}, {}
    for path in paths:
        leaves, merge = adapter(rng, path)
        if not dora:
            m = leaves.pop("lora_magnitude_vector")
            a, b = leaves.values()
            flat = (b.reshape(len(b), RANK).astype("f8") @ a.reshape(RANK, -1).astype("f8")) * S
            del m
            merge = lambda w, flat=flat: w.astype("f8") + flat.reshape(w.shape)  # noqa: E731
        tensors |= {f"{PREFIX}{path}.{name}": leaf for name, leaf in leaves.items()}
        merges[f"{path}.weight"] = merge
    for name, value in (whole or {}).items():
        tensors[f"{PREFIX}{name}"] = value
        merges[name] = lambda w, value=value: value.astype("f8")
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    write_json(folder / "adapter_config.json", peft_config(use_dora=dora, **entries))
    return merges


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request):
    return request.param


@pytest.fixture
def model(tmp_path, dtype):
    """A base, and three adapters: two share tensors, and one of them is plain LoRA."""
    base = base_of(np.random.default_rng(0), dtype)
    write_base(tmp_path / "base", base)
    merges = [
        write_one(tmp_path / "one", 1, [LINEAR, OTHER, EMBED, CONV]),
        write_one(tmp_path / "two", 2, [LINEAR, EMBED, CONV, ALONE]),
        write_one(tmp_path / "three", 3, [LINEAR, OTHER, CONV], dora=False),
    ]
    return base, merges


def run(folder, *arguments, out="out"):
    return main(["merge", str(folder / "base"), *arguments, "--out", str(folder / out)])


def adapters(folder, *weighted):
    return [part for one in weighted for part in ("--adapter", str(folder / one))]


def summed(base, terms):
    """W + Σ t (W' − W) in float64, by tensor."""
    result = {name: weight.astype("f8") for name, weight in base.items()}
    for merges, strength in terms:
        for name, merge in merges.items():
            w = base[name].astype("f8")
            result[name] = result[name] + strength * (merge(w) - w)
    return result


def assert_close(actual, desired, terms=1):
    epsilon = 2.0**-8 if actual.dtype == ml_dtypes.bfloat16 else 1e-6
    error = np.abs(actual.astype("f8") - desired).max() / np.abs(desired).max()
    assert error <= epsilon * terms


@pytest.mark.parametrize("strength", [0.7, -1.5, 2.0, 1e-3])
def test_a_strength_scales_the_change_of_the_weights(tmp_path, model, strength):
    base, (merges, *_) = model
    assert run(tmp_path, str(tmp_path / "one"), "--scale", str(strength), "--verify") == 0
    out, desired = read_folder(tmp_path / "out"), summed(base, [(merges, strength)])
    for name, weight in base.items():
        if name in merges:
            assert_close(out[name], desired[name])
        else:
            assert out[name].tobytes() == weight.tobytes()


def test_strength_1_is_the_adapter_and_0_the_base_bit_for_bit(tmp_path, model):
    base, _ = model
    assert run(tmp_path, str(tmp_path / "one")) == 0
    assert run(tmp_path, str(tmp_path / "one"), "--scale", "1", out="whole") == 0
    assert run(tmp_path, str(tmp_path / "one"), "--scale", "0", out="nothing") == 0
    alone = adapters(tmp_path, "one", "two:0")
    assert run(tmp_path, *alone, out="alone") == 0
    plain = read_folder(tmp_path / "out")
    for name, weight in plain.items():
        assert read_folder(tmp_path / "whole")[name].tobytes() == weight.tobytes()
        assert read_folder(tmp_path / "alone")[name].tobytes() == weight.tobytes()
    assert {n: x.tobytes() for n, x in read_folder(tmp_path / "nothing").items()} == {
        name: weight.tobytes() for name, weight in base.items()
    }


def test_changes_add_up_in_the_weights(tmp_path, model):
    base, merges = model
    strengths = (0.7, 0.4, -0.3)
    names = ("one:0.7", "two:0.4", "three:-0.3")
    assert run(tmp_path, *adapters(tmp_path, *names), "--verify") == 0
    out = read_folder(tmp_path / "out")
    desired = summed(base, zip(merges, strengths, strict=True))
    for name in base:
        assert_close(out[name], desired[name], 2)


def test_the_order_of_the_adapters_does_not_matter_bit_for_bit(tmp_path, model):
    found = set()
    # In float64 the last rounding of a float32 tensor would hide the order.
    options = ("--force", "--compute", "float32", "--dtype", "float32")
    for order in itertools.permutations(["one:0.7", "two:0.4", "three:-0.3"]):
        assert run(tmp_path, *adapters(tmp_path, *order), *options) == 0
        out = read_folder(tmp_path / "out")
        found.add(tuple(out[name].tobytes() for name in sorted(out)))
    assert len(found) == 1


def test_scale_multiplies_every_strength(tmp_path, model):
    assert run(tmp_path, *adapters(tmp_path, "one:0.5", "two"), "--scale", "0.5") == 0
    assert run(tmp_path, *adapters(tmp_path, "one:0.25", "two:0.5"), out="other") == 0
    one, other = (read_folder(tmp_path / name) for name in ("out", "other"))
    assert all(one[name].tobytes() == other[name].tobytes() for name in one)


def test_an_adapter_whose_name_ends_like_a_strength_is_a_path(tmp_path, model):
    shutil.copytree(tmp_path / "one", tmp_path / "run:2")
    assert run(tmp_path, *adapters(tmp_path, "run:2")) == 0
    assert run(tmp_path, str(tmp_path / "one"), out="other") == 0
    one, other = (read_folder(tmp_path / name) for name in ("out", "other"))
    assert all(one[name].tobytes() == other[name].tobytes() for name in one)


def test_each_block_of_the_base_is_read_once_for_all_adapters(tmp_path, model, monkeypatch):
    from doraxp.checkpoint._safetensors import Reader

    read, seen = Reader.read, []

    def counted(self, name, *arguments, **options):
        if self.path.parent.name == "base":
            seen.append(name)
        return read(self, name, *arguments, **options)

    merge = plan_merge(
        tmp_path / "base", [Weighted(tmp_path / n, 0.5) for n in ("one", "two", "three")], Options()
    )
    monkeypatch.setattr(Reader, "read", counted)
    run_merge(merge, tmp_path / "out")
    # The norms of an embedding's columns need a pass of their own, for all adapters together.
    assert {name: seen.count(name) for name in seen} == {
        "block.0.q.weight": 1,
        "block.0.k.weight": 1,
        "block.1.q.weight": 1,
        "down.weight": 1,
        "embed.weight": 2,
    }


def test_whole_tensors_are_scaled_and_added_too(tmp_path):
    rng = np.random.default_rng(0)
    base = base_of(rng, "float32")
    write_base(tmp_path / "base", base)
    bias, weight = draw(rng, 18), draw(rng, *SHAPES[ALONE])
    one = write_one(
        tmp_path / "one", 1, [OTHER],
        whole={"block.0.k.bias": bias}, bias="lora_only",
    )  # fmt: skip
    two = write_one(
        tmp_path / "two", 2, [LINEAR, ALONE], whole={"block.0.k.bias": 2 * bias}, bias="lora_only"
    )
    three = write_one(
        tmp_path / "three", 3, [LINEAR],
        whole={f"{ALONE}.weight": weight}, modules_to_save=[ALONE],
    )  # fmt: skip
    names = ("one:0.7", "two:0.4", "three:0.5")
    assert run(tmp_path, *adapters(tmp_path, *names), "--verify") == 0
    out = read_folder(tmp_path / "out")
    desired = summed(base, [(one, 0.7), (two, 0.4), (three, 0.5)])
    for name in base:
        assert_close(out[name], desired[name], 2)


FUSED = "encoder.layer.0.attention.qkv_proj"
"""A tensor of queries, keys and values of the family gte, whose modules have other names."""


def test_adapters_of_a_fused_tensor_and_of_its_parts_add_up(tmp_path):
    rng = np.random.default_rng(0)
    base = {f"{FUSED}.weight": draw(rng, 30, 8), "encoder.layer.0.mlp.weight": draw(rng, 5, 8)}
    write_base(tmp_path / "base", base, model_type="gte")
    parts = [f"layers.0.self_attn.{name}_proj" for name in "qkv"]
    leaves = {
        path: (draw(rng, RANK, 8), draw(rng, size, RANK), 1 + rng.random(size, dtype="f4"))
        for path, size in ((FUSED, 30), *((path, 10) for path in parts))
    }
    write_peft(tmp_path / "one", {FUSED: leaves[FUSED]})
    write_peft(tmp_path / "two", {path: leaves[path] for path in parts[1:]})
    assert run(tmp_path, *adapters(tmp_path, "one:0.5", "two:0.25"), "--verify") == 0
    w = base[f"{FUSED}.weight"]
    desired = w + 0.5 * (dense(w, *leaves[FUSED]) - w)
    for place, path in enumerate(parts[1:], start=1):
        rows = slice(10 * place, 10 * place + 10)
        desired[rows] += 0.25 * (dense(w[rows], *leaves[path]) - w[rows])
    assert_close(read_folder(tmp_path / "out")[f"{FUSED}.weight"], desired, 2)


def test_a_sum_is_audited(tmp_path, model):
    base, merges = model
    weighted = [Weighted(tmp_path / "one", 0.7), Weighted(tmp_path / "two", 0.4)]
    plan = plan_merge(tmp_path / "base", weighted, Options())
    run_merge(plan, tmp_path / "out")
    verdicts = audit(plan, tmp_path / "out")
    assert all(verdict.right for verdict in verdicts.values())
    assert verdicts[f"{LINEAR}.weight"].verdict == "exact"
    right = read_folder(tmp_path / "out")
    wide = summed(base, [(merges[0], 0.7), (merges[1], 0.4)])[f"{LINEAR}.weight"]
    stored = right[f"{LINEAR}.weight"]
    damaged = stored.copy()
    damaged[3, 4] += damaged.dtype.type(1)
    infinite = stored.copy()
    infinite[3, 4] = np.inf
    one_alone = summed(base, [(merges[0], 0.7)])[f"{LINEAR}.weight"]
    cases = {
        "rounded": wide.astype("float64").astype(stored.dtype),
        "unchanged": base[f"{LINEAR}.weight"],
        "damaged": damaged,
        "another sum": one_alone.astype(stored.dtype),
        "NaN or infinity": infinite,
        "another shape": stored[1:],
    }
    for verdict, weight in cases.items():
        shutil.rmtree(tmp_path / "other", ignore_errors=True)
        write_base(tmp_path / "other", right | {f"{LINEAR}.weight": weight})
        found = audit(plan, tmp_path / "other")[f"{LINEAR}.weight"]
        assert found.verdict in ({verdict, "exact"} if verdict == "rounded" else {verdict})
        assert found.right == (verdict == "rounded")


def test_the_command_audits_a_sum(tmp_path, model, capsys):
    both = adapters(tmp_path, "one:0.7", "two:0.4")
    assert run(tmp_path, *both) == 0
    assert main(["audit", str(tmp_path / "base"), str(tmp_path / "out"), *both]) == 0
    other = adapters(tmp_path, "one:0.4", "two:0.7")
    assert main(["audit", str(tmp_path / "base"), *other, str(tmp_path / "out")]) == 1
    assert "another sum" in capsys.readouterr().out


def test_the_report_of_a_sum_names_its_adapters(tmp_path, model, capsys):
    report = tmp_path / "r.json"
    assert run(tmp_path, *adapters(tmp_path, "one:0.7", "three"), "--json", str(report)) == 0
    text = capsys.readouterr().out
    assert "peft adapter, 0.7 times + peft adapter" in text
    found = json.loads(report.read_text())
    assert [one["strength"] for one in found["adapters"]] == [0.7, 1.0]
    row = found["changed"][f"{LINEAR}.weight"]
    assert (row["kind"], row["strengths"]) == ("sum", [0.7, 1.0])
    assert [term["update"] for term in row["terms"]] == ["DoRA", "LoRA"]
    assert {"magnitude", "direction", "largest", "kept"} <= row.keys()


def test_the_changes_of_a_sum_are_those_of_the_weights(tmp_path):
    base = base_of(np.random.default_rng(0), "float32")
    write_base(tmp_path / "base", base)
    merges = write_one(tmp_path / "one", 1, [LINEAR])
    plan = plan_merge(tmp_path / "base", [Weighted(tmp_path / "one", 0.5)], Options())
    change = run_merge(plan, tmp_path / "out")[f"{LINEAR}.weight"]
    w = base[f"{LINEAR}.weight"].astype("f8")
    new = summed(base, [(merges, 0.5)])[f"{LINEAR}.weight"]
    before, after = np.linalg.norm(w, axis=1), np.linalg.norm(new, axis=1)
    cosines = np.sum(w * new, axis=1) / (before * after)
    assert change.magnitude == pytest.approx(np.mean(np.abs(after - before)), rel=1e-5)
    assert change.direction == pytest.approx(np.mean(1 - cosines), rel=1e-5)
    moved = np.linalg.norm(new - w, axis=1) / before
    assert change.largest == pytest.approx(moved.max(), rel=1e-5)


BAD = {
    "not a number": (["--scale", "much"], "must be a finite number, got 'much'"),
    "nan": (["--scale", "nan"], "must be a finite number, got 'nan'"),
    "infinity": (["--adapter", "one:inf"], "must be a finite number, got 'inf'"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_strength_must_be_a_finite_number(tmp_path, capsys, case):
    arguments, message = BAD[case]
    with pytest.raises(SystemExit) as error:
        run(tmp_path, *arguments)
    assert error.value.code == 2
    text = capsys.readouterr().err
    assert message in text
    assert text.count("\n") == 1


@pytest.mark.parametrize("strength", [np.nan, np.inf])
def test_a_strength_of_the_library_must_be_finite(tmp_path, model, strength):
    with pytest.raises(ValueError, match="strength must be finite"):
        plan_merge(tmp_path / "base", [Weighted(tmp_path / "one", strength)], Options())
    with pytest.raises(ValueError, match="at least one Weighted"):
        plan_merge(tmp_path / "base", [], Options())


def test_adapter_and_option_are_not_both_given(tmp_path, model, capsys):
    one = str(tmp_path / "one")
    assert run(tmp_path, one, "--adapter", one) == 2
    assert "give ADAPTER or --adapter, not both" in capsys.readouterr().err
    with pytest.raises(SystemExit) as error:
        run(tmp_path)
    assert error.value.code == 2
    assert "ADAPTER" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["audit", str(tmp_path / "base"), one])
    assert "MERGED" in capsys.readouterr().err


def test_options_may_stand_between_base_and_adapter(tmp_path, model):
    one = str(tmp_path / "one")
    out = str(tmp_path / "out")
    assert main(["merge", str(tmp_path / "base"), "--jobs", "1", one, "--out", out]) == 0


def test_a_new_tensor_cannot_be_scaled(tmp_path, capsys):
    rng = np.random.default_rng(0)
    write_base(tmp_path / "base", base_of(rng, "float32"), architectures=["LlamaForCausalLM"])
    write_one(
        tmp_path / "one", 1, [LINEAR],
        whole={"score.weight": draw(rng, 3, 24)},
        modules_to_save=["score"], task_type="SEQ_CLS",
    )  # fmt: skip
    assert run(tmp_path, str(tmp_path / "one"), "--scale", "0.5", "--architecture", "X") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "cannot be scaled or added: merge that adapter alone first, with strength 1" in error


def test_a_module_in_full_with_an_adapter_cannot_be_scaled(tmp_path, capsys):
    rng = np.random.default_rng(0)
    write_base(tmp_path / "base", base_of(rng, "float32"))
    write_one(
        tmp_path / "one", 1, [ALONE, LINEAR],
        whole={f"{ALONE}.weight": draw(rng, *SHAPES[ALONE])}, modules_to_save=[ALONE],
    )  # fmt: skip
    assert run(tmp_path, str(tmp_path / "one")) == 0
    assert run(tmp_path, str(tmp_path / "one"), "--scale", "0.5", out="other") == 2
    assert (
        f"has {ALONE}.weight in full, other than BASE's, and an adapter" in capsys.readouterr().err
    )


def test_nan_in_a_whole_tensor_is_refused_in_a_sum(tmp_path, capsys):
    rng = np.random.default_rng(0)
    write_base(tmp_path / "base", base_of(rng, "float32"))
    weight = draw(rng, *SHAPES[ALONE])
    weight[2, 3] = np.nan
    write_one(
        tmp_path / "one", 1, [LINEAR],
        whole={f"{ALONE}.weight": weight}, modules_to_save=[ALONE],
    )  # fmt: skip
    assert run(tmp_path, str(tmp_path / "one"), "--scale", "0.5") == 2
    assert f"{ALONE}.weight contains NaN or infinity" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_sum_that_overflows_is_refused(tmp_path, capsys):
    base = base_of(np.random.default_rng(0), "float32")
    write_base(tmp_path / "base", base)
    write_one(tmp_path / "one", 1, [LINEAR])
    arguments = [str(tmp_path / "one"), "--scale", "1e39", "--compute", "float32"]
    assert run(tmp_path, *arguments) == 2
    assert f"{LINEAR}.weight has values too large for float32" in capsys.readouterr().err


def test_two_merges_one_after_the_other_are_not_the_sum(tmp_path, model):
    """The second adapter was trained on the base: its magnitudes undo the first one's."""
    base, merges = model
    assert run(tmp_path, str(tmp_path / "one")) == 0
    command = ["merge", str(tmp_path / "out"), str(tmp_path / "two")]
    assert main([*command, "--out", str(tmp_path / "chained")]) == 0
    assert run(tmp_path, *adapters(tmp_path, "one", "two"), out="sum") == 0
    chained, right = (read_folder(tmp_path / name) for name in ("chained", "sum"))
    name = f"{LINEAR}.weight"
    wanted = summed(base, [(merges[0], 1), (merges[1], 1)])[name]
    change = np.linalg.norm(wanted - base[name].astype("f8"))
    assert np.linalg.norm(right[name].astype("f8") - wanted) < 0.02 * change
    assert np.linalg.norm(chained[name].astype("f8") - wanted) > 0.2 * change


def test_a_whole_tensor_that_is_bases_own_may_be_scaled(tmp_path):
    """PEFT saves the embeddings and the head beside an adapter of them."""
    base = base_of(np.random.default_rng(0), "bfloat16")
    write_base(tmp_path / "base", base)
    name = f"{ALONE}.weight"
    merges = write_one(tmp_path / "plain", 1, [ALONE, LINEAR])
    same = {name: base[name].astype("f4")}
    write_one(tmp_path / "one", 1, [ALONE, LINEAR], whole=same, modules_to_save=[ALONE])
    assert run(tmp_path, str(tmp_path / "one"), "--scale", "0.5", "--verify") == 0
    desired = summed(base, [(merges, 0.5)])
    out = read_folder(tmp_path / "out")
    for path in (ALONE, LINEAR):
        assert_close(out[f"{path}.weight"], desired[f"{path}.weight"], 2)


def sharded(folder):
    """A base of three files, and plain LoRA of it; two adapters are in one file."""
    rng = np.random.default_rng(0)
    names = [f"block.{place}.q.weight" for place in range(3)]
    (folder / "base").mkdir()
    files = {name: f"model-{place}.safetensors" for place, name in enumerate(names)}
    for name, file in files.items():
        save_file({name: draw(rng, 8, 8)}, folder / "base" / file)
    index = {"metadata": {}, "weight_map": files}
    write_json(folder / "base" / "model.safetensors.index.json", index)
    write_json(folder / "base" / "config.json", {})
    for one in ("a", "b"):
        (folder / one).mkdir()
        leaves = {"lora_A": (RANK, 8), "lora_B": (8, RANK)}
        tensors = {
            f"{PREFIX}block.{place}.q.{leaf}.{own}.weight": draw(rng, *shape)
            for place in range(3)
            for own in ("x", "y")
            for leaf, shape in leaves.items()
        }
        save_file(tensors, folder / one / "adapter_model.safetensors")
        write_json(folder / one / "adapter_config.json", peft_config(use_dora=False))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([("a", 0.1), ("a", 0.2), ("b", 0.3)], [("a", 0.1), ("b", 0.2), ("b", 0.3)]),
        ([("a", 0.7), ("b", 0.4)], [("a", 0.4), ("b", 0.7)]),
        ([("a", 1.0, None, "x")], [("a", 1.0, None, "y")]),
        ([("a", 1.0)], [("a", 0.5)]),
    ],
)
def test_shards_of_another_sum_are_not_taken(tmp_path, first, second):
    sharded(tmp_path)
    plans = [
        plan_merge(
            tmp_path / "base",
            [Weighted(tmp_path / path, *rest) for path, *rest in given],
            Options(),
            adapter_name="x",
        )
        for given in (first, second)
    ]

    def stop(count, seen=[]):  # noqa: B006
        seen.append(count)
        if len(seen) == 2:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        run_merge(plans[0], tmp_path / "out", on_bytes=stop)
    run_merge(plans[1], tmp_path / "out")
    run_merge(plans[1], tmp_path / "fresh")
    out, fresh = (read_folder(tmp_path / name) for name in ("out", "fresh"))
    assert all(out[name].tobytes() == fresh[name].tobytes() for name in fresh)


def test_a_strength_of_0_beside_a_grown_vocabulary_is_left_out(tmp_path):
    rng = np.random.default_rng(0)
    base = {"model.embed_tokens.weight": draw(rng, 9, 8), "lm_head.weight": draw(rng, 9, 8)}
    base[f"{LINEAR}.weight"] = draw(rng, *SHAPES[LINEAR])
    write_base(tmp_path / "base", base, vocab_size=9)
    grown = {name: draw(rng, 11, 8) for name in list(base)[:2]}
    modules = ["embed_tokens", "lm_head"]
    write_one(tmp_path / "one", 1, [LINEAR], whole=grown, modules_to_save=modules)
    write_one(tmp_path / "two", 2, [LINEAR])
    (tmp_path / "one" / "tokenizer.json").write_text("{}")
    assert run(tmp_path, *adapters(tmp_path, "one", "two:0")) == 0
    assert read_folder(tmp_path / "out")["lm_head.weight"].shape == (11, 8)
    assert (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize("strength", [1, 5])
def test_a_sum_in_float32_of_changes_that_cancel_is_right(tmp_path, strength):
    rng = np.random.default_rng(0)
    base = base_of(rng, "float32")
    write_base(tmp_path / "base", base)
    one = write_one(tmp_path / "one", 1, [LINEAR])
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    path = tmp_path / "two" / "adapter_model.safetensors"
    tensors = load_file(path)
    near = 1 + 1e-5 * rng.standard_normal(SHAPES[LINEAR][0], dtype="f4")
    tensors[f"{PREFIX}{LINEAR}.lora_magnitude_vector"] *= near
    save_file(tensors, path)
    given = [Weighted(tmp_path / "one", strength), Weighted(tmp_path / "two", -strength)]
    plan = plan_merge(tmp_path / "base", given, Options())
    name = f"{LINEAR}.weight"
    w = base[name]
    first = one[name](w).astype("f4")
    second = near[:, None] * first
    theirs = w + np.float32(strength) * (first - w) - np.float32(strength) * (second - w)
    write_base(tmp_path / "theirs", base | {name: theirs})
    assert audit(plan, tmp_path / "theirs")[name].right
    write_base(tmp_path / "wrong", base | {name: w + 1e-3 * first})
    assert not audit(plan, tmp_path / "wrong")[name].right


def test_a_path_is_needed_and_a_subfolder_is_part_of_it(tmp_path, model, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, "--adapter", ":0.5")
    assert "must be PATH or PATH:T, got ':0.5'" in capsys.readouterr().err
    assert run(tmp_path, *adapters(tmp_path, "one"), "--subfolder", "x") == 2
    assert "with --adapter give PATH/NAME in place of PATH" in capsys.readouterr().err


def tied(folder):
    """A language model whose embeddings are its head too, and a folder for adapters."""
    rng = np.random.default_rng(0)
    base = {"model.embed_tokens.weight": draw(rng, 20, 8), f"{ALONE}.weight": draw(rng, 9, 8)}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 20}
    write_base(folder / "base", base, tie_word_embeddings=True, **config)
    return base, rng


def write_embedding(folder, rng, path, size, **entries):
    """Write DoRA of embeddings or of a head; return W' as a function of W."""
    rows, columns = size
    names = (
        ("lora_embedding_A", "lora_embedding_B")
        if "embed" in path
        else ("lora_A.weight", "lora_B.weight")
    )
    a, b = draw(rng, RANK, columns), draw(rng, rows, RANK)
    m = 1 + rng.random(rows, dtype="f4")
    folder.mkdir()
    leaves = dict(zip((*names, "lora_magnitude_vector"), (a, b, m), strict=True))
    tensors = {f"{PREFIX}{path}.{name}": leaf for name, leaf in leaves.items()}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    write_json(folder / "adapter_config.json", peft_config(**entries))
    return lambda w: dense(w, a, b, m, S)


def test_adapters_of_tied_embeddings_and_of_the_head_add_up(tmp_path):
    base, rng = tied(tmp_path)
    embed = write_embedding(tmp_path / "one", rng, "model.embed_tokens", (8, 20))
    head = write_embedding(tmp_path / "two", rng, "lm_head", (20, 8))
    assert run(tmp_path, *adapters(tmp_path, "one:0.5", "two:0.25"), "--verify") == 0
    w = base["model.embed_tokens.weight"].astype("f8")
    out = read_folder(tmp_path / "out")
    assert_close(out["model.embed_tokens.weight"], w + 0.5 * (embed(w.T).T - w))
    assert_close(out["lm_head.weight"], w + 0.25 * (head(w) - w))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False


def test_an_adapter_of_both_and_one_of_the_head_are_not_added(tmp_path, capsys):
    base, rng = tied(tmp_path)
    w = base["model.embed_tokens.weight"]
    write_embedding(tmp_path / "one", rng, "lm_head", (20, 8))
    tensors = {
        "model.embed_tokens.lora_a": draw(rng, 20, RANK),
        "model.embed_tokens.lora_b": draw(rng, RANK, 8),
        "model.embed_tokens.m": 1 + rng.random(20, dtype="f4"),
    }
    (tmp_path / "two").mkdir()
    save_file(tensors, tmp_path / "two" / "adapters.safetensors")
    parameters = {"rank": RANK, "scale": 1.0}
    config = {"fine_tune_type": "dora", "lora_parameters": parameters}
    write_json(tmp_path / "two" / "adapter_config.json", config)
    assert run(tmp_path, *adapters(tmp_path, "one", "two")) == 2
    error = capsys.readouterr().err
    assert "changes lm_head.weight and the embeddings as one tensor" in error
    assert "they cannot be added" in error
    assert w.shape == (20, 8)


def test_norms_of_rows_and_of_columns_of_one_weight_add_up(tmp_path):
    """mlx-lm has a norm for each token of an embedding, PEFT one for each dimension."""
    rng = np.random.default_rng(0)
    base = {"model.embed_tokens.weight": draw(rng, 20, 8), "lm_head.weight": draw(rng, 20, 8)}
    write_base(tmp_path / "base", base)
    columns = write_embedding(tmp_path / "one", rng, "model.embed_tokens", (8, 20))
    a, b, m = draw(rng, RANK, 8), draw(rng, 20, RANK), 1 + rng.random(20, dtype="f4")
    names = ("lora_a", "lora_b", "m")
    leaves = zip(names, (b, a, m), strict=True)
    (tmp_path / "two").mkdir()
    tensors = {f"model.embed_tokens.{name}": leaf for name, leaf in leaves}
    save_file(tensors, tmp_path / "two" / "adapters.safetensors")
    config = {"fine_tune_type": "dora", "lora_parameters": {"rank": RANK, "scale": S}}
    write_json(tmp_path / "two" / "adapter_config.json", config)
    assert run(tmp_path, *adapters(tmp_path, "one:0.5", "two:0.25"), "--verify") == 0
    w = base["model.embed_tokens.weight"].astype("f8")
    wanted = w + 0.5 * (columns(w.T).T - w) + 0.25 * (dense(w, a, b, m, S) - w)
    assert_close(read_folder(tmp_path / "out")["model.embed_tokens.weight"], wanted)
    given = [Weighted(tmp_path / "one", 0.5), Weighted(tmp_path / "two", 0.25)]
    plan = plan_merge(tmp_path / "base", given, Options())
    assert all(verdict.right for verdict in audit(plan, tmp_path / "out").values())


def test_a_part_of_a_fused_tensor_beside_rows_that_are_kept(tmp_path):
    rng = np.random.default_rng(0)
    base = {f"{FUSED}.weight": draw(rng, 30, 8)}
    write_base(tmp_path / "base", base, model_type="gte")
    sizes = {"layers.0.self_attn.q_proj": 10, "layers.0.self_attn.k_proj": 10}
    leaves = {
        path: (draw(rng, RANK, 8), draw(rng, size, RANK), 1 + rng.random(size, dtype="f4"))
        for path, size in sizes.items()
    }
    write_peft(tmp_path / "one", leaves)
    paths = [str(tmp_path / "one"), "--scale", "0.5", "--verify"]
    assert run(tmp_path, *paths, "--all", "--json", str(tmp_path / "r.json")) == 0
    w = base[f"{FUSED}.weight"].astype("f8")
    wanted = w.copy()
    for place, own in enumerate(leaves.values()):
        rows = slice(10 * place, 10 * place + 10)
        wanted[rows] += 0.5 * (dense(w[rows], *own) - w[rows])
    assert_close(read_folder(tmp_path / "out")[f"{FUSED}.weight"], wanted)
    changed = json.loads((tmp_path / "r.json").read_text())["changed"]
    assert sorted(changed) == [f"{FUSED}.weight ({path})" for path in sorted(leaves)]


def test_a_number_cannot_be_scaled(tmp_path, capsys):
    base = base_of(np.random.default_rng(0), "float32")
    scale = {"logit_scale": np.float32(2.5)}
    write_base(tmp_path / "base", base | {"logit_scale": np.array(1.5, "f4")})
    write_one(
        tmp_path / "one", 1, [LINEAR],
        whole={name: np.array(x) for name, x in scale.items()}, modules_to_save=["logit_scale"],
    )  # fmt: skip
    assert run(tmp_path, str(tmp_path / "one")) == 0
    assert run(tmp_path, str(tmp_path / "one"), "--scale", "0.5", out="other") == 2
    assert "logit_scale is one number, so it cannot be scaled" in capsys.readouterr().err


def test_a_whole_tensor_and_an_adapter_of_some_of_its_rows_add_up(tmp_path, capsys):
    rng = np.random.default_rng(0)
    base = {f"{FUSED}.weight": draw(rng, 30, 8)}
    write_base(tmp_path / "base", base, model_type="gte")
    path = "layers.0.self_attn.k_proj"
    leaves = (draw(rng, RANK, 8), draw(rng, 10, RANK), 1 + rng.random(10, dtype="f4"))
    write_peft(tmp_path / "one", {path: leaves})
    whole = draw(rng, 30, 8)
    other = (draw(rng, RANK, 8), draw(rng, 10, RANK), 1 + rng.random(10, dtype="f4"))
    write_peft(
        tmp_path / "two", {"layers.0.self_attn.q_proj": other},
        {f"{PREFIX}{FUSED}.weight": whole}, modules_to_save=[FUSED],
    )  # fmt: skip
    assert run(tmp_path, *adapters(tmp_path, "one:0.5", "two:0.25")) == 2
    assert "in full, other than BASE's, and an adapter of it too" in capsys.readouterr().err
    write_peft(
        tmp_path / "three", {"layers.1.self_attn.q_proj": other},
        {f"{PREFIX}{FUSED}.weight": whole}, modules_to_save=[FUSED],
    )  # fmt: skip
    second = {f"{FUSED.replace('.0.', '.1.')}.weight": draw(rng, 30, 8)}
    shutil.rmtree(tmp_path / "base")
    write_base(tmp_path / "base", base | second, model_type="gte")
    assert run(tmp_path, *adapters(tmp_path, "one:0.5", "three:0.25"), "--verify") == 0
    w = base[f"{FUSED}.weight"].astype("f8")
    wanted = w + 0.25 * (whole - w)
    rows = slice(10, 20)
    wanted[rows] += 0.5 * (dense(w[rows], *leaves) - w[rows])
    assert_close(read_folder(tmp_path / "out")[f"{FUSED}.weight"], wanted)


def write_rows(folder, rng, **whole):
    """Write an adapter of PEFT that has rows of two tokens, and one of a matrix."""
    write_one(folder, 3, [LINEAR], whole=whole, trainable_token_indices={EMBED: [3, 7]})
    path = folder / "adapter_model.safetensors"
    rows = draw(rng, 2, 24)
    name = f"{PREFIX}{EMBED}.token_adapter.trainable_tokens_delta"
    save_file(load_file(path) | {name: rows}, path)
    return rows


def test_single_rows_are_scaled_and_added(tmp_path):
    rng = np.random.default_rng(0)
    base = base_of(rng, "float32")
    write_base(tmp_path / "base", base)
    rows = write_rows(tmp_path / "one", rng)
    write_one(tmp_path / "two", 2, [OTHER])
    assert run(tmp_path, *adapters(tmp_path, "one:0.5", "two"), "--verify") == 0
    wanted = base[f"{EMBED}.weight"].astype("f8")
    wanted[[3, 7]] += 0.5 * (rows - wanted[[3, 7]])
    assert_close(read_folder(tmp_path / "out")[f"{EMBED}.weight"], wanted)


def test_norms_over_all_rows_and_single_rows_of_another_adapter_are_not_added(tmp_path, capsys):
    rng = np.random.default_rng(0)
    write_base(tmp_path / "base", base_of(rng, "float32"))
    write_rows(tmp_path / "one", rng)
    write_one(tmp_path / "two", 2, [EMBED])
    assert run(tmp_path, *adapters(tmp_path, "one", "two")) == 2
    error = capsys.readouterr().err
    assert f"needs all rows of {EMBED}.weight, of which another adapter changes some" in error


def test_a_counter_cannot_be_scaled(tmp_path, capsys):
    base = base_of(np.random.default_rng(0), "float32")
    write_base(tmp_path / "base", base | {"norm.count": np.array([3], "i8")})
    whole = {"norm.count": np.array([5], "i8")}
    write_one(tmp_path / "one", 1, [LINEAR], whole=whole, modules_to_save=["norm"])
    assert run(tmp_path, str(tmp_path / "one"), "--scale", "0.5") == 2
    assert "norm.count has dtype I64, without fractions" in capsys.readouterr().err


def test_a_sum_of_whole_tensors_is_audited(tmp_path):
    rng = np.random.default_rng(0)
    base = base_of(rng, "float32")
    write_base(tmp_path / "base", base)
    whole = {"block.0.k.bias": draw(rng, 18)}
    write_one(tmp_path / "one", 1, [OTHER], whole=whole, bias="lora_only")
    plan = plan_merge(tmp_path / "base", [Weighted(tmp_path / "one", 0.5)], Options())
    run_merge(plan, tmp_path / "out")
    assert all(verdict.right for verdict in audit(plan, tmp_path / "out").values())
    wrong = {"block.0.k.bias": base["block.0.k.bias"] + 1}
    write_base(tmp_path / "wrong", read_folder(tmp_path / "out") | wrong)
    assert audit(plan, tmp_path / "wrong")["block.0.k.bias"].verdict == "another sum"


def test_a_part_that_one_adapter_alone_changes_is_that_adapter_bit_for_bit(tmp_path):
    rng = np.random.default_rng(0)
    base = {f"{FUSED}.weight": draw(rng, 30, 8)}
    write_base(tmp_path / "base", base, model_type="gte")
    for name, part in (("one", "k"), ("two", "q")):
        leaves = (draw(rng, RANK, 8), draw(rng, 10, RANK), 1 + rng.random(10, dtype="f4"))
        write_peft(tmp_path / name, {f"layers.0.self_attn.{part}_proj": leaves})
    assert run(tmp_path, *adapters(tmp_path, "one", "two:0.5")) == 0
    assert run(tmp_path, str(tmp_path / "one"), out="alone") == 0
    both, alone = (read_folder(tmp_path / name)[f"{FUSED}.weight"] for name in ("out", "alone"))
    assert both[10:20].tobytes() == alone[10:20].tobytes()
    assert both[:10].tobytes() != alone[:10].tobytes()
