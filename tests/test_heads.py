"""New heads, and other tensors that an adapter has in full."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from checkpoints import (
    PREFIX,
    check,
    dense,
    draw,
    near,
    peft_config,
    read_folder,
    refused,
    write_base,
    write_json,
    write_peft,
)
from language_model import EMBED, HEAD, QUERY, TIED, TOKENS, WIDTH, config_of, model, query
from safetensors.numpy import load_file, save_file


@pytest.fixture
def rng():
    return np.random.default_rng(11)


# New heads

BERT = {
    "embeddings.word_embeddings.weight": (8, 6),
    "encoder.layer.0.attention.self.query.weight": (6, 6),
    "encoder.layer.0.attention.self.query.bias": (6,),
    "pooler.dense.weight": (6, 6),
}
ATTENTION = "encoder.layer.0.attention.self.query"


def classifier(folder, rng, *, architectures=("BertModel",), size=3, prefix="bert.", **changes):
    """Write a base without a head, and an adapter with one; return tensors and changes."""
    base = {name: draw(rng, *shape) for name, shape in BERT.items()}
    write_base(
        folder / "base", base, architectures=list(architectures), num_labels=2, _num_labels=2
    )
    leaves = {f"{prefix}{ATTENTION}": near(rng, base[f"{ATTENTION}.weight"])}
    head = {"classifier.weight": draw(rng, size, 6), "classifier.bias": draw(rng, size)}
    whole = {f"{PREFIX}{name}": tensor for name, tensor in head.items()}
    config = {"modules_to_save": ["classifier", "score"], "task_type": "SEQ_CLS", **changes}
    write_peft(folder / "adapter", leaves, whole, **config)
    merged = dense(base[f"{ATTENTION}.weight"], *leaves[f"{prefix}{ATTENTION}"])
    changed = {f"{prefix}{ATTENTION}.weight": merged, **head}
    return {f"{prefix}{name}": tensor for name, tensor in base.items()}, changed


@pytest.mark.parametrize(
    ("task", "given", "architecture"),
    [
        ("SEQ_CLS", "BertModel", "BertForSequenceClassification"),
        ("SEQ_CLS", "BertForMaskedLM", "BertForSequenceClassification"),
        ("TOKEN_CLS", "BertPreTrainedModel", "BertForTokenClassification"),
        ("QUESTION_ANS", "GPT2LMHeadModel", "GPT2ForQuestionAnswering"),
        ("SEQ_CLS", "Gemma3ForCausalLM", "Gemma3TextForSequenceClassification"),
    ],
)
def test_a_new_head_gives_the_model_its_class_and_its_labels(
    tmp_path, rng, capsys, task, given, architecture
):
    """All names get the prefix that the class with the head has."""
    base, changed = classifier(tmp_path, rng, architectures=[given], task_type=task)
    check(tmp_path, base, changed)
    config = config_of(tmp_path)
    assert config["architectures"] == [architecture]
    assert config["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    assert config["label2id"] == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
    assert not {"num_labels", "_num_labels"} & config.keys()
    printed = " ".join(capsys.readouterr().out.split())
    names = '"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"'
    assert f"Changed in config.json: id2label: {{{names}}}, label2id: {{" in printed
    assert f'architectures: ["{architecture}"]' in printed


@pytest.mark.parametrize(
    ("task", "given"), [("OTHER", "BertModel"), (None, "BertModel"), ("SEQ_CLS", "bert")]
)
def test_a_new_head_of_a_class_that_no_file_tells_needs_the_option(
    tmp_path, rng, capsys, task, given
):
    base, changed = classifier(tmp_path, rng, architectures=[given], task_type=task)
    assert "name it with --architecture" in refused(tmp_path, capsys)
    check(tmp_path, base, changed, "--architecture", "BertForMine")
    assert config_of(tmp_path)["architectures"] == ["BertForMine"]


@pytest.mark.parametrize(
    ("given", "task", "architecture"),
    [
        ("BertForTokenClassification", "SEQ_CLS", "BertForSequenceClassification"),
        ("BertForSequenceClassification", "SEQ_CLS", "BertForSequenceClassification"),
        ("BertForMultipleChoice", "CAUSAL_LM", "BertForMultipleChoice"),
        ("BertForMultipleChoice", None, "BertForMultipleChoice"),
    ],
)
def test_a_head_of_one_name_for_two_tasks_is_that_of_the_adapters_task(
    tmp_path, rng, given, task, architecture
):
    base = model(rng, **{"classifier.weight": draw(rng, 3, WIDTH)})
    write_base(tmp_path / "base", base, architectures=[given])
    leaves, changed = query(rng, base)
    changed["classifier.weight"] = draw(rng, 3, WIDTH)
    whole = {f"{PREFIX}classifier.weight": changed["classifier.weight"]}
    saved = {"modules_to_save": ["classifier"], "task_type": task}
    write_peft(tmp_path / "adapter", leaves, whole, **saved)
    check(tmp_path, base, changed)
    assert config_of(tmp_path) == {"architectures": [architecture]}
    before, after = ((tmp_path / name / "config.json").read_bytes() for name in ("base", "out"))
    assert (before == after) == (given == architecture)


def test_embeddings_that_were_trained_do_not_change_the_class(tmp_path, rng):
    base = write_base(tmp_path / "base", model(rng), architectures=["BertModel"])
    leaves, changed = query(rng, base)
    changed[EMBED] = draw(rng, TOKENS, WIDTH)
    saved = {"modules_to_save": ["embed_tokens"], "task_type": "SEQ_CLS"}
    write_peft(tmp_path / "adapter", leaves, {f"{PREFIX}{EMBED}": changed[EMBED]}, **saved)
    check(tmp_path, base, changed)
    assert config_of(tmp_path) == {"architectures": ["BertModel"]}


def test_a_module_is_saved_whose_name_ends_with_one_that_peft_was_told(tmp_path, rng):
    """DistilBERT's pre_classifier ends with classifier."""
    base, changed = classifier(tmp_path, rng)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    changed["pre_classifier.weight"] = draw(rng, 6, 6)
    whole = {f"{PREFIX}pre_classifier.weight": changed["pre_classifier.weight"]}
    save_file(load_file(file) | whole, file)
    check(tmp_path, base, changed)
    assert len(config_of(tmp_path)["id2label"]) == 3


@pytest.mark.parametrize(
    ("family", "name", "classes"),
    [
        ("yolos", "class_labels_classifier.layers.1", 6),
        ("conditional_detr", "class_labels_classifier", 7),
        ("mask2former", "class_predictor", 6),
        ("yolos", "other", 7),
    ],
)
def test_a_detector_may_have_a_row_for_no_object(tmp_path, rng, family, name, classes):
    base = write_base(tmp_path / "base", model(rng), architectures=["A"], model_type=family)
    leaves, changed = query(rng, base)
    head = {f"{name}.weight": draw(rng, 7, WIDTH), "box.layers.0.weight": draw(rng, 9, WIDTH)}
    if name != "other":
        head["box.layers.1.weight"] = draw(rng, 4, 9)
    whole = {f"{PREFIX}{own}": tensor for own, tensor in head.items()}
    saved = [name.partition(".")[0], "box"]
    write_peft(tmp_path / "adapter", leaves, whole, modules_to_save=saved)
    check(tmp_path, base, changed | head, "--architecture", "B")
    assert len(config_of(tmp_path)["id2label"]) == classes


def test_a_new_head_of_letters_gives_their_number(tmp_path, rng):
    """Wav2Vec2ForCTC has an lm_head and no embeddings."""
    base = {QUERY: draw(rng, 6, WIDTH)}
    write_base(tmp_path / "base", base, architectures=["XModel"], vocab_size=32)
    leaves, changed = query(rng, base)
    changed[HEAD] = draw(rng, 40, WIDTH)
    mapping = {"base_model_class": "XForCTC"}
    saved = {"modules_to_save": ["lm_head"], "auto_mapping": mapping}
    write_peft(tmp_path / "adapter", leaves, {f"{PREFIX}{HEAD}": changed[HEAD]}, **saved)
    check(tmp_path, base, changed)
    assert config_of(tmp_path) == {"architectures": ["XForCTC"], "vocab_size": 40}


def test_names_that_a_class_with_the_new_head_does_not_have_are_refused(tmp_path, rng, capsys):
    """LlamaForQuestionAnswering has `transformer.` for `model.`."""
    base = write_base(tmp_path / "base", model(rng), architectures=["LlamaForCausalLM"])
    leaves, _ = query(rng, base)
    leaves = {f"transformer{path.removeprefix('model')}": own for path, own in leaves.items()}
    head = {f"{PREFIX}qa_outputs.weight": draw(rng, 2, WIDTH)}
    saved = {"modules_to_save": ["qa_outputs"], "task_type": "QUESTION_ANS"}
    write_peft(tmp_path / "adapter", leaves, head, **saved)
    error = refused(tmp_path, capsys)
    assert "a model with qa_outputs.weight has the name transformer.layers.0" in error


@pytest.mark.parametrize("saved", ["experts", "mlp"])
@pytest.mark.parametrize("there", ["mlp.experts.0.up_proj", "block_sparse_moe.experts.0.w1"])
def test_a_module_that_the_base_has_in_another_form_is_not_added(
    tmp_path, rng, capsys, there, saved
):
    there = f"model.layers.0.{there}.weight"
    base = write_base(tmp_path / "base", model(rng, **{there: draw(rng, 4, WIDTH)}))
    leaves, _ = query(rng, base)
    whole = {f"{PREFIX}model.layers.0.mlp.experts.gate_up_proj": draw(rng, 2, 8, WIDTH)}
    write_peft(tmp_path / "adapter", leaves, whole, modules_to_save=[saved])
    assert f"the base has {there} and other tensors for" in refused(tmp_path, capsys)


def test_a_module_of_a_block_that_the_base_lacks_is_added(tmp_path, rng):
    base = write_base(tmp_path / "base", model(rng))
    leaves, changed = query(rng, base)
    name = "model.layers.0.gate.weight"
    changed[name] = draw(rng, 2, WIDTH)
    whole = {f"{PREFIX}{name}": changed[name]}
    write_peft(tmp_path / "adapter", leaves, whole, modules_to_save=["gate"])
    check(tmp_path, base, changed)


@pytest.mark.parametrize(("own", "there"), [("weight", "gamma"), ("bias", "beta")])
def test_a_norm_has_other_names_in_old_files(tmp_path, rng, own, there):
    base = write_base(tmp_path / "base", model(rng, **{f"LayerNorm.{there}": draw(rng, 5)}))
    leaves, changed = query(rng, base)
    changed[f"LayerNorm.{there}"] = draw(rng, 5)
    whole = {f"{PREFIX}LayerNorm.{own}": changed[f"LayerNorm.{there}"]}
    write_peft(tmp_path / "adapter", leaves, whole, modules_to_save=["LayerNorm"])
    check(tmp_path, base, changed)


@pytest.mark.parametrize("is_new", [False, True])
def test_the_counter_of_a_batch_norm_is_copied(tmp_path, rng, is_new):
    name = "head.norm.num_batches_tracked"
    counter = {} if is_new else {name: np.array(7)}
    base = write_base(tmp_path / "base", model(rng, **counter))
    leaves, changed = query(rng, base)
    changed[name] = np.array(2**60 + 1)
    whole = {f"{PREFIX}{name}": changed[name]}
    write_peft(tmp_path / "adapter", leaves, whole, modules_to_save=["head"])
    check(tmp_path, base, changed)
    assert read_folder(tmp_path / "out")[name] == 2**60 + 1


def test_a_head_of_classes_needs_no_head_of_new_tokens(tmp_path, rng):
    base = model(rng, **{HEAD: draw(rng, TOKENS, WIDTH)})
    write_base(tmp_path / "base", base, architectures=["LlamaForCausalLM"])
    leaves, changed = query(rng, base)
    changed |= {"score.weight": draw(rng, 3, WIDTH), EMBED: draw(rng, TOKENS + 2, WIDTH)}
    whole = {f"{PREFIX}{name}": changed[name] for name in ("score.weight", EMBED)}
    saved = {"modules_to_save": ["score"], "task_type": "SEQ_CLS"}
    write_peft(tmp_path / "adapter", leaves, whole, **saved)
    check(tmp_path, base, changed)
    assert config_of(tmp_path)["architectures"] == ["LlamaForSequenceClassification"]


@pytest.mark.parametrize("rows", [TOKENS, TOKENS + 2])
def test_a_classifier_has_no_head_that_is_tied(tmp_path, rng, rows):
    base = write_base(tmp_path / "base", model(rng), **TIED)
    leaves, changed = query(rng, base)
    changed |= {"score.weight": draw(rng, 3, WIDTH), EMBED: draw(rng, rows, WIDTH)}
    whole = {f"{PREFIX}{name}": changed[name] for name in ("score.weight", EMBED)}
    saved = {"modules_to_save": ["score", "embed_tokens"], "task_type": "SEQ_CLS"}
    write_peft(tmp_path / "adapter", leaves, whole, **saved)
    check(tmp_path, base, changed)
    assert config_of(tmp_path)["tie_word_embeddings"]


def test_biases_of_tokens_that_did_not_grow_are_refused(tmp_path, rng, capsys):
    """BART has one number for each token in final_logits_bias."""
    bias = np.zeros((1, TOKENS), np.float32)
    base = write_base(tmp_path / "base", model(rng, final_logits_bias=bias))
    leaves, changed = query(rng, base)
    changed[EMBED] = draw(rng, TOKENS + 2, WIDTH)
    write_peft(tmp_path / "adapter", leaves, {f"{PREFIX}{EMBED}": changed[EMBED]})
    error = refused(tmp_path, capsys)
    assert f"final_logits_bias has {TOKENS}: give the BASE whose embeddings" in error
    base["final_logits_bias"] = np.zeros((1, TOKENS + 2), np.float32)
    save_file(base, tmp_path / "base" / "model.safetensors")
    check(tmp_path, base, changed)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save lm_head"),
        ({"modules_to_save": ["score", "head"]}, "modules_to_save head"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ],
)
def test_a_file_without_what_the_configuration_names_is_refused(
    tmp_path, rng, capsys, entries, message
):
    base = write_base(tmp_path / "base", model(rng))
    write_peft(tmp_path / "adapter", query(rng, base)[0], **entries)
    error = refused(tmp_path, capsys)
    assert f"adapter_config.json says {message}, but the file has no tensors of them" in error


def test_a_new_head_is_in_the_index_and_all_names_get_the_prefix(tmp_path, rng):
    base, changed = classifier(tmp_path, rng)
    (tmp_path / "base" / "model.safetensors").rename(tmp_path / "base" / "a.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(BERT, "a.safetensors")}
    write_json(tmp_path / "base" / "model.safetensors.index.json", index)
    check(tmp_path, base, changed)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == dict.fromkeys([*base, *changed], "a.safetensors")


def test_without_a_new_tensor_the_names_of_the_base_stay(tmp_path, rng):
    base, changed = classifier(tmp_path, rng)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({n: x for n, x in load_file(file).items() if "classifier" not in n}, file)
    (name,) = {name for name in changed if ATTENTION in name}
    own = {n.removeprefix("bert."): x for n, x in base.items()}
    check(tmp_path, own, {name.removeprefix("bert."): changed[name]})
    assert config_of(tmp_path) == {
        "architectures": ["BertModel"],
        "num_labels": 2,
        "_num_labels": 2,
    }


@pytest.mark.parametrize("source", ["options", "config.json", "auto_mapping"])
def test_a_class_that_is_given_is_that_of_the_result(tmp_path, rng, source):
    changes = {}
    if source == "auto_mapping":
        changes["auto_mapping"] = {"base_model_class": "BertForTokenClassification"}
    base, changed = classifier(tmp_path, rng, **changes)
    beside = {"architectures": ["BertForOther"], "id2label": {"0": "a", "1": "b", "2": "c"}}
    arguments = []
    if source == "config.json":
        write_json(tmp_path / "adapter" / "config.json", beside)
    if source == "options":
        write_json(tmp_path / "adapter" / "config.json", beside)
        arguments = ["--architecture", "BertForMine", "--labels", "no,maybe,yes"]
    check(tmp_path, base, changed, *arguments)
    config = config_of(tmp_path)
    expected = {
        "options": ("BertForMine", ["no", "maybe", "yes"]),
        "config.json": ("BertForOther", ["a", "b", "c"]),
        "auto_mapping": ("BertForTokenClassification", ["LABEL_0", "LABEL_1", "LABEL_2"]),
    }
    assert (config["architectures"], [*config["id2label"].values()]) == (
        [expected[source][0]],
        expected[source][1],
    )


def test_labels_of_another_number_than_the_rows_are_refused(tmp_path, rng, capsys):
    """The advice is followed: a name for each row."""
    base, changed = classifier(tmp_path, rng)
    error = refused(tmp_path, capsys, "--labels", "no,yes")
    assert "labels must have a name for each of the 3 classes of classifier.weight, got 2" in error
    check(tmp_path, base, changed, "--labels", "no,maybe,yes")


def test_options_change_the_configuration_without_a_new_head(tmp_path, rng):
    base = write_base(tmp_path / "base", model(rng), architectures=["A"])
    leaves, changed = query(rng, base)
    write_peft(tmp_path / "adapter", leaves)
    check(tmp_path, base, changed, "--architecture", "B", "--labels", "x,y")
    config = config_of(tmp_path)
    assert (config["architectures"], config["id2label"]) == (["B"], {"0": "x", "1": "y"})


def test_a_head_of_another_size_replaces_that_of_the_base(tmp_path, rng):
    base = {"classifier.weight": draw(rng, 2, WIDTH), "classifier.bias": draw(rng, 2)}
    base = write_base(tmp_path / "base", model(rng, **base), architectures=["BertForOther"])
    leaves, changed = query(rng, base)
    changed |= {"classifier.weight": draw(rng, 3, WIDTH), "classifier.bias": draw(rng, 3)}
    whole = {f"{PREFIX}{name}": tensor for name, tensor in changed.items() if "classifier" in name}
    write_peft(tmp_path / "adapter", leaves, whole, modules_to_save=["classifier"])
    check(tmp_path, base, changed)
    config = config_of(tmp_path)
    assert config["architectures"] == ["BertForOther"]
    assert len(config["id2label"]) == 3


def test_the_last_layer_of_a_head_gives_the_number_of_labels(tmp_path, rng):
    base, changed = classifier(tmp_path, rng, modules_to_save=["classifier"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    head = {"dense.weight": draw(rng, 2, 6), "out_proj.weight": draw(rng, 4, 2)}
    for name in ("weight", "bias"):
        tensors.pop(f"{PREFIX}classifier.{name}")
        changed.pop(f"classifier.{name}")
    save_file(tensors | {f"{PREFIX}classifier.{n}": x for n, x in head.items()}, file)
    changed |= {f"classifier.{name}": tensor for name, tensor in head.items()}
    check(tmp_path, base, changed)
    assert len(config_of(tmp_path)["id2label"]) == 4


@pytest.mark.parametrize(
    ("name", "modules", "message"),
    [
        ("classifier.weight", None, "the base has no tensor classifier.weight"),
        ("other.weight", ["classifier"], "the base has no tensor other.weight"),
        ("deep.dense.weight", ["dense"], "the base has no tensor deep.dense.weight"),
    ],
)
def test_a_tensor_that_is_not_of_a_new_head_is_not_added(
    tmp_path, rng, capsys, name, modules, message
):
    """`pooler.dense` of the base may be the tensor that `deep.dense` means."""
    classifier(tmp_path, rng, modules_to_save=modules)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {n: x for n, x in load_file(file).items() if "classifier" not in n}
    save_file(tensors | {f"{PREFIX}{name}": draw(rng, 6, 6)}, file)
    assert message in refused(tmp_path, capsys)


@pytest.mark.parametrize("entries", [{"layer_replication": [[0, 1]]}, {"lora_bias": True}])
def test_entries_that_change_the_layers_are_refused_by_name(tmp_path, rng, capsys, entries):
    base = write_base(tmp_path / "base", model(rng))
    leaves, _ = query(rng, base)
    write_peft(tmp_path / "adapter", leaves, **entries)
    (name,) = entries
    assert f"{name} cannot be merged" in refused(tmp_path, capsys)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (
            np.ones((TOKENS, 4), np.float32),
            "(10, 4) does not fit model.embed_tokens.weight (10, 5)",
        ),
        (np.ones((TOKENS, WIDTH), np.int32), "must be of dtype F64, F32, F16, BF16, got I32"),
    ],
)
def test_a_whole_tensor_that_does_not_fit_is_refused(tmp_path, rng, capsys, tensor, message):
    base = write_base(tmp_path / "base", model(rng))
    leaves, _ = query(rng, base)
    write_peft(tmp_path / "adapter", leaves, {f"{PREFIX}{EMBED}": tensor})
    assert message in refused(tmp_path, capsys)


def test_a_layer_of_another_size_must_be_one_that_peft_saves_in_full(tmp_path, rng, capsys):
    base = write_base(tmp_path / "base", model(rng, **{"score.weight": draw(rng, 3, WIDTH)}))
    leaves, changed = query(rng, base)
    changed["score.weight"] = draw(rng, 4, WIDTH)
    whole = {f"{PREFIX}score.weight": changed["score.weight"]}
    write_peft(tmp_path / "adapter", leaves, whole)
    assert "(4, 5) does not fit score.weight (3, 5)" in refused(tmp_path, capsys)
    write_json(tmp_path / "adapter" / "adapter_config.json", peft_config(modules_to_save=["score"]))
    check(tmp_path, base, changed)


def test_a_whole_tensor_for_one_that_is_not_floating_is_refused(tmp_path, rng, capsys):
    base = write_base(tmp_path / "base", model(rng, ids=np.arange(4)))
    leaves, _ = query(rng, base)
    write_peft(tmp_path / "adapter", leaves, {f"{PREFIX}ids": draw(rng, 4)})
    assert "cannot replace ids of dtype I64: remove it from the adapter" in refused(
        tmp_path, capsys
    )
    shutil.rmtree(tmp_path / "adapter")
    leaves, changed = query(rng, base)
    write_peft(tmp_path / "adapter", leaves)
    check(tmp_path, base, changed)


@pytest.mark.parametrize("are_equal", [True, False])
def test_two_whole_tensors_for_one_of_the_base_must_be_equal(tmp_path, rng, capsys, are_equal):
    base = write_base(tmp_path / "base", model(rng) | {"x.weight": draw(rng, 4, 3)})
    leaves, changed = query(rng, base)
    one = draw(rng, 4, 3)
    other = one if are_equal else np.nextafter(one, np.float32(9))
    write_peft(tmp_path / "adapter", leaves, {f"{PREFIX}x.weight": one, f"{PREFIX}y.weight": other})
    rename = ("--rename", r"^y(?=\.|$)=x")
    if are_equal:
        check(tmp_path, base, {**changed, "x.weight": one}, *rename)
    else:
        assert "are both for x.weight, and differ" in refused(tmp_path, capsys, *rename)
