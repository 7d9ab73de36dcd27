"""The names of modules and of their tensors: right or refused, never wrong.

`names.json` has a class of transformers or diffusers a line: the shapes of its tensors on disk, and
pairs that were found by value. A tiny model was saved, adapted, merged and saved again; the tensor
that changed is the module's.

::

    [module]                          the tensor is MODULE.weight
    [module, tensor]                  it has another name
    [module, tensor, "rows", size, start, stop, first, last]
                                      rows of a tensor, and those of the module that are for them
    [module, tensor, "permuted", …]   the same rows in another order
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from checkpoints import (
    PREFIX,
    assert_merged,
    dense,
    draw,
    merge,
    near,
    read_folder,
    write_base,
    write_peft,
)
from safetensors.numpy import save_file

from doraxp.checkpoint._names import Place, Wanted, _match, _ways, guess, match, nearest
from doraxp.checkpoint._names._fused import rows_of_modules
from doraxp.checkpoint._names._tables import tables
from doraxp.cli import main

CORPUS = json.loads(Path(__file__).with_name("names.json").read_text("utf-8"))
PERMUTED = [name for name, entry in CORPUS.items() if '"permuted"' in json.dumps(entry)]
ORDERED = [name for name in CORPUS if name not in PERMUTED]
LEAST = 0.97
"""The least part of the classes that are right."""


def shapes_of(name):
    return {tensor: tuple(shape) for tensor, shape in CORPUS[name]["tensors"].items()}


def right_places(name):
    """Return the places of each module, and what an adapter wants of the base."""
    shapes = shapes_of(name)
    places, sizes = {}, {}
    for module, *where in CORPUS[name]["pairs"]:
        tensor, *rows = where or [f"{module}.weight"]
        if not rows:
            places[module], sizes[module] = [Place(tensor)], shapes[tensor]
            continue
        _, size, start, stop, first, last = rows
        part = None if (start, stop) == (0, shapes[tensor][0]) else slice(start, stop)
        own = None if (first, last) == (0, size) else slice(first, last)
        places.setdefault(module, []).append(Place(tensor, part, own))
        sizes[module] = (size, *shapes[tensor][1:])
    return places, [Wanted(module, "weight", shape) for module, shape in sizes.items()]


def verdict(name, model_type, chosen=""):
    """Return "right", "wrong" or "refused", and the reason of a refusal."""
    right, wanted = right_places(name)
    wanted = [one for one in wanted if re.search(chosen, one.path)]
    found = match(wanted, shapes_of(name), model_type)
    if not found.places:
        return "refused", found.problem
    is_right = all(list(found.places[one.name]) == right[one.path] for one in wanted)
    return "right" if is_right and not found.missing else "wrong", None


def without_family(monkeypatch, name):
    """Leave out the tables of the model type of a class."""
    own = CORPUS[name]["model_type"]
    others = tuple(table for table in tables() if own not in table.families)
    for module in (_match, _ways):
        monkeypatch.setattr(module, "tables", lambda: others)


def test_the_corpus_is_right_except_a_few_refusals():
    """Permuted rows count among the refused."""
    verdicts = {name: verdict(name, CORPUS[name]["model_type"])[0] for name in CORPUS}
    refused = [name for name, one in verdicts.items() if one == "refused"]
    assert "wrong" not in verdicts.values()
    assert len(refused) <= (1 - LEAST) * len(CORPUS), refused
    assert len(CORPUS) == 166


@pytest.mark.parametrize("name", PERMUTED)
def test_permuted_rows_are_refused_with_that_reason(name):
    for model_type in (CORPUS[name]["model_type"], None):
        state, problem = verdict(name, model_type)
        assert state == "refused"
    state, problem = verdict(name, CORPUS[name]["model_type"])
    assert re.search(r"stores the rows of \S+ in another order than the module's: merge", problem)


@pytest.mark.parametrize("name", CORPUS)
def test_without_the_table_of_its_own_family_no_class_is_wrong(monkeypatch, name):
    without_family(monkeypatch, name)
    for model_type in (CORPUS[name]["model_type"], None):
        for chosen in ("", r"(q_proj|v_proj|query|value)$"):
            assert verdict(name, model_type, chosen)[0] != "wrong"


@pytest.mark.parametrize(
    "chosen",
    ["", r"(q_proj|v_proj|query|value)$", r"(q_proj|query)$", r"(k_proj|key)$", r"(v_proj|value)$"],
)
@pytest.mark.parametrize("is_known", [True, False])
def test_an_adapter_of_some_modules_is_right_or_refused(chosen, is_known):
    """Without the model type too."""
    verdicts = {
        name: verdict(name, CORPUS[name]["model_type"] if is_known else None, chosen)[0]
        for name in CORPUS
        if any(re.search(chosen, one.path) for one in right_places(name)[1])
    }
    assert [name for name, one in verdicts.items() if one == "wrong"] == []
    assert list(verdicts.values()).count("right") >= (LEAST - 0.01) * len(verdicts)


@pytest.mark.parametrize("lead", [None, "model.", "encoder."])
def test_an_adapter_of_the_model_without_its_head_is_right_or_refused(lead):
    """Its names lack a leading component of those with the head, or have one more."""
    right_ones = 0
    for name in ORDERED:
        right, wanted = right_places(name)
        leads = [one.path.partition(".")[0] for one in wanted]
        most = max(set(leads), key=leads.count)
        changed = {
            one.path: one.path.removeprefix(f"{most}.") if lead is None else f"{lead}{one.path}"
            for one in wanted
        }
        if len(set(changed.values())) < len(changed):
            continue
        moved = [one._replace(path=changed[one.path]) for one in wanted]
        found = match(moved, shapes_of(name), CORPUS[name]["model_type"])
        for one in wanted if found.places else ():
            assert list(found.places[f"{changed[one.path]}.weight"]) == right[one.path], name
        right_ones += bool(found.places)
    assert right_ones > 0.8 * len(ORDERED)


# A match, by hand


def linear(*names, shape=(4, 3)):
    return {f"{name}.weight": shape for name in names}


def wanted_of(*paths, shape=(4, 3)):
    return [Wanted(path, "weight", shape) for path in paths]


def test_two_towers_that_both_fit_are_refused():
    shapes = linear("text.layers.0.q", "vision.layers.0.q")
    found = match(wanted_of("layers.0.q"), shapes)
    assert found.places == {}
    assert found.problem == (
        "layers.0.q.weight may be text.layers.0.q.weight or vision.layers.0.q.weight in the base"
    )


def test_a_shape_decides_between_two_towers():
    shapes = linear("text.layers.0.q") | linear("vision.layers.0.q", shape=(4, 5))
    found = match(wanted_of("layers.0.q"), shapes)
    assert found.places == {"layers.0.q.weight": (Place("text.layers.0.q.weight"),)}


def test_two_modules_do_not_get_one_tensor():
    """Both names become layers.0.q when `model` and `language_model` are left out."""
    shapes = linear("model.layers.0.q")
    assert match(wanted_of("layers.0.q", "language_model.layers.0.q"), shapes).places == {}


def test_one_name_for_two_tensors_is_not_taken():
    shapes = linear("model.layers.0.q", "language_model.layers.0.q")
    assert match(wanted_of("layers.0.q"), shapes).places == {}


def test_a_stage_that_finds_a_part_of_the_modules_finds_none():
    shapes = linear("layers.0.q", "layers.0.k")
    found = match(wanted_of("layers.0.q", "layers.0.k", "layers.0.v"), shapes)
    assert found.places == {}
    assert [one.path for one in found.missing] == ["layers.0.q", "layers.0.k", "layers.0.v"]


@pytest.mark.parametrize("model_type", ["vit", None])
def test_a_table_is_not_used_in_part(model_type):
    """The base lacks one of three tensors that ViT's table names."""
    there, module = "vit.encoder.layer.0.attention", "vit.layers.0.attention"
    names = {
        "q_proj": f"{there}.attention.query",
        "v_proj": f"{there}.attention.value",
        "o_proj": f"{there}.output.dense",
    }
    wanted = wanted_of(*(f"{module}.{name}" for name in names))
    found = match(wanted, linear(*names.values()), model_type)
    assert [places for (places,) in found.places.values()] == [
        Place(f"{name}.weight") for name in names.values()
    ]
    for left_out in names:
        others = linear(*(names[name] for name in names if name != left_out))
        assert match(wanted, others, model_type).places == {}


def test_the_transposed_shape_fits_too():
    found = match(wanted_of("a", shape=(3, 4)), linear("a"))
    assert found.places == {"a.weight": (Place("a.weight"),)}


def test_a_whole_tensor_that_the_base_lacks_is_missing_and_no_obstacle():
    head = Wanted("classifier", "bias", None)
    found = match([*wanted_of("a"), head], linear("a"))
    assert found.places.keys() == {"a.weight"}
    assert found.missing == [head]


def test_a_guess_names_most_of_the_tensors_whatever_their_shapes():
    shapes = linear("model.a", "model.b", shape=(9, 9))
    found = guess(wanted_of("a", "b", "c"), shapes)
    assert found == {"a.weight": (Place("model.a.weight"),), "b.weight": (Place("model.b.weight"),)}


def test_the_nearest_tensor_ends_alike_and_fits():
    shapes = linear("x.layers.0.q", "y.layers.0.q") | linear("z.mlp.layers.0.q", shape=(9, 9))
    (one,) = wanted_of("mlp.layers.0.q")
    assert nearest(one, shapes) == "x.layers.0.q.weight"
    assert nearest(*wanted_of("other"), shapes) is None
    assert nearest(*wanted_of("layers.0.q", shape=(1, 1)), shapes) is None


# Rows of fused tensors

FUSED = [
    ("attn.qkv", (12, 3), {"q_proj": (4, 0), "k_proj": (4, 4), "v_proj": (4, 8)}),
    ("attn.qkv", (8, 3), {"q_proj": (4, 0), "v_proj": (2, 6)}),
    ("attn.qkv", (8, 3), {"q_proj": (4, 0)}),
    ("attn.qkv", (8, 3), {"k_proj": (2, 4)}),
    ("attn.Wqkv", (8, 3), {"query": (4, 0), "key": (2, 4), "value": (2, 6)}),
    ("mlp.gate_up_proj", (8, 3), {"gate_proj": (4, 0), "up_proj": (4, 4)}),
    ("mlp.gate_up_proj", (8, 3), {"up_proj": (4, 4)}),
    ("mlp.up_gate_proj", (8, 3), {"up_proj": (4, 0), "gate_proj": (4, 4)}),
]
"""The tensor, its shape, and the modules with their number of rows and the first one."""


@pytest.mark.parametrize(("tensor", "shape", "modules"), FUSED)
def test_rows_of_a_fused_tensor_follow_its_order(tensor, shape, modules):
    found = rows_of_modules(tensor, shape[0], {path: size for path, (size, _) in modules.items()})
    assert found == {path: slice(start, start + size) for path, (size, start) in modules.items()}


@pytest.mark.parametrize(
    ("tensor", "size", "modules"),
    [
        ("attn.qkv", 9, {"q_proj": 4}),  # 5 rows are not two equal parts
        ("attn.qkv", 8, {"v_proj": 4}),  # no row would be left for the queries
        ("attn.qkv", 8, {"q_proj": 4, "gate_proj": 2}),
        ("attn.qkv", 8, {"a.q_proj": 2, "b.q_proj": 2}),
        ("attn.other", 8, {"q_proj": 4}),
        ("gqkv_proj", 9, {"q_proj": 3}),  # four parts, of which three are not known
        ("attn.qkv", 8, {"dense": 4}),
    ],
)
def test_rows_that_are_not_known_are_refused(tensor, size, modules):
    assert rows_of_modules(tensor, size, modules) is None


# By values


@pytest.fixture
def rng():
    return np.random.default_rng(8)


def check(folder, rng, tensors, modules, *arguments, config=None, prefix=PREFIX):
    """Merge an adapter of `modules`: their names, and those of their tensors and rows."""
    base = write_base(folder / "base", tensors, **(config or {}))
    leaves, changed = {}, {name: base[name].astype(float) for name in modules.values()}
    for path, name in modules.items():
        leaves[path] = near(rng, base[name])
        changed[name] = dense(base[name], *leaves[path])
    write_peft(folder / "adapter", leaves, prefix=prefix)
    assert merge(folder, "--verify", *arguments) == 0
    assert_merged(read_folder(folder / "out"), base, changed)
    paths = [str(folder / name) for name in ("base", "adapter", "out")]
    assert main(["audit", *paths, *arguments]) == 0


QV = ("q_proj", "v_proj")
TEXT, VISION, OLD = (
    "model.layers.0.self_attn",
    "model.language_model.layers.0.self_attn",
    "language_model.model.layers.0.self_attn",
)


@pytest.mark.parametrize("adapter", [TEXT, VISION, OLD])
@pytest.mark.parametrize("base", [TEXT, VISION, OLD])
def test_a_text_adapter_merges_into_a_vision_language_base_and_back(tmp_path, rng, adapter, base):
    tensors = {f"{base}.{name}.weight": draw(rng, 6, 5) for name in QV}
    tensors["vision_tower.layers.0.self_attn.q_proj.weight"] = draw(rng, 6, 5)
    modules = {f"{adapter}.{name}": f"{base}.{name}.weight" for name in QV}
    check(tmp_path, rng, tensors, modules)


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "base_model.model.base_model.model.",
        "module.base_model.model.",
        "base_model.model._orig_mod.",
        "_orig_mod.module.base_model.model.",
        "base_model.model._fsdp_wrapped_module.model._checkpoint_wrapped_module.",
        "base_model.model.module._fsdp_wrapped_module.",
    ],
)
def test_components_that_wrappers_add_are_left_out(tmp_path, rng, prefix):
    tensors = {f"{TEXT}.{name}.weight": draw(rng, 6, 5) for name in QV}
    modules = {name.removesuffix(".weight"): name for name in tensors}
    check(tmp_path, rng, tensors, modules, prefix=prefix)


@pytest.mark.parametrize(("adapter", "base"), [("bert.", ""), ("", "bert."), ("bert.", "bert.")])
def test_a_model_and_the_same_with_a_head_differ_by_a_leading_component(
    tmp_path, rng, adapter, base
):
    names = [f"encoder.layer.0.attention.self.{name}" for name in ("query", "value")]
    tensors = {f"{base}{name}.weight": draw(rng, 6, 5) for name in names}
    if base:
        tensors["classifier.weight"] = draw(rng, 3, 6)
    check(tmp_path, rng, tensors, {f"{adapter}{name}": f"{base}{name}.weight" for name in names})


def test_a_family_renames_the_modules(tmp_path, rng):
    lead = "vit.encoder.layer.0"
    names = {
        "vit.layers.0.attention.q_proj": f"{lead}.attention.attention.query.weight",
        "vit.layers.0.attention.o_proj": f"{lead}.attention.output.dense.weight",
        "vit.layers.0.mlp.fc1": f"{lead}.intermediate.dense.weight",
    }
    tensors = {name: draw(rng, 6, 5) for name in names.values()}
    check(tmp_path, rng, tensors, names, config={"model_type": "vit"})


@pytest.mark.parametrize("chosen", ["q", "k", "v", "qv", "qkv"])
def test_modules_are_merged_into_their_rows_of_a_fused_tensor(tmp_path, rng, chosen):
    """The rows of the others are copied bit for bit, and the audit takes each part by itself."""
    lead, sizes = "layers.0.self_attn", {"q": (0, 8), "k": (8, 12), "v": (12, 16)}
    name = f"{lead}.att_proj.weight"  # of Molmo 2
    base = write_base(tmp_path / "base", {name: draw(rng, 16, 5), "other": draw(rng, 3)})
    weight, leaves = base[name].astype(float), {}
    for part in chosen:
        rows = slice(*sizes[part])
        leaves[f"{lead}.{part}_proj"] = near(rng, base[name][rows])
        weight[rows] = dense(base[name][rows], *leaves[f"{lead}.{part}_proj"])
    write_peft(tmp_path / "adapter", leaves)
    assert merge(tmp_path, "--verify", "--json", str(tmp_path / "report.json")) == 0
    merged = read_folder(tmp_path / "out")
    assert_merged(merged, base, {name: weight})
    for part in "qkv":
        if part not in chosen:
            rows = slice(*sizes[part])
            np.testing.assert_array_equal(merged[name][rows], base[name][rows])
    labels = [f"{name} ({path})" for path in leaves]
    assert sorted(json.loads((tmp_path / "report.json").read_text())["changed"]) == sorted(labels)
    paths = [str(tmp_path / folder) for folder in ("base", "adapter", "out")]
    assert main(["audit", *paths]) == 0
    merged[name][sizes[chosen[0]][0], 0] += 1
    save_file(merged, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    assert main(["audit", *paths]) == 1


def test_a_fused_module_is_merged_into_tensors_of_its_parts(tmp_path, rng):
    lead = "model.layers.0.mlp"
    names = [f"{lead}.gate_proj.weight", f"{lead}.up_proj.weight"]
    base = write_base(tmp_path / "base", {name: draw(rng, 4, 5) for name in names})
    both = np.concatenate([base[name] for name in names])
    leaves = near(rng, both)
    write_peft(tmp_path / "adapter", {f"{lead}.gate_up_proj": leaves})
    assert merge(tmp_path, "--verify") == 0
    merged = np.split(dense(both, *leaves), 2)
    assert_merged(read_folder(tmp_path / "out"), base, dict(zip(names, merged, strict=True)))


@pytest.mark.parametrize("sizes", [[(4, 5)], [(4, 5), (3, 5)], [(4, 5), (4, 6)]])
def test_a_fused_module_that_its_parts_do_not_fit_is_refused(tmp_path, rng, capsys, sizes):
    lead = "model.layers.0.mlp"
    names = [f"{lead}.gate_proj.weight", f"{lead}.up_proj.weight"]
    write_base(
        tmp_path / "base",
        {name: draw(rng, *size) for name, size in zip(names, sizes, strict=False)},
    )
    write_peft(tmp_path / "adapter", {f"{lead}.gate_up_proj": near(rng, draw(rng, 8, 5))})
    assert merge(tmp_path) == 2
    assert "the base has no model.layers.0.mlp.gate_up_proj.weight" in capsys.readouterr().err


def test_a_square_and_a_fused_module_cannot_share_a_tensor(tmp_path, rng, capsys):
    """`qkv` is an adapter of all rows, `q_proj` one of some of them."""
    base = write_base(tmp_path / "base", {"attn.qkv.weight": draw(rng, 12, 5)})
    leaves = {
        "attn.qkv": near(rng, base["attn.qkv.weight"]),
        "attn.q_proj": near(rng, base["attn.qkv.weight"][:4]),
    }
    write_peft(tmp_path / "adapter", leaves)
    assert merge(tmp_path) == 2
    assert "attn.q_proj" in capsys.readouterr().err
