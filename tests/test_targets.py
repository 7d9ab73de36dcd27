"""The modules that `adapt` and `find_targets` select: "all-linear", and the exclusions."""

from __future__ import annotations

import contextlib
import re
from types import SimpleNamespace

import numpy as np
import pytest

import doraxp
from doraxp import Config, LayerKind
from doraxp.layers import find_targets

LINEAR = ("layers.0.q", "layers.0.up")


def shaped(**shapes):
    """Return weights of these shapes beside two linear ones; `__` stands for a dot."""
    every = {"layers.0.q": (8, 8), "layers.0.up": (24, 8)}
    every |= {name.replace("__", "."): shape for name, shape in shapes.items()}
    return {f"{path}.weight": SimpleNamespace(shape=shape) for path, shape in every.items()}


def left_out(weights, **options):
    return find_targets(weights, "all-linear", **options).left_out


@pytest.mark.parametrize(
    "path",
    [
        *("shared", "tok_emb", "tok_embeddings", "model.embed_tokens", "encoder.embed_tokens"),
        *("embeddings.word_embeddings", "embeddings.position_embeddings", "transformer.wte"),
        *("embeddings.token_type_embeddings", "transformer.wpe", "gpt_neox.embed_in", "pos_emb"),
        *("encoder.block.0.layer.0.SelfAttention.relative_attention_bias", "transformer.w"),
        *("layers.0.attention.distance_embedding", "embed_audio_tokens.3", "rel_embeddings"),
        *("model.embed_tokens_per_layer", "box.embeddings.2", "char.HashBucketCodepointEmbedder_7"),
    ],
)
def test_an_embedding_is_not_a_linear_target(path):
    found = find_targets(shaped(**{path: (11, 8)}), "all-linear")
    assert found.left_out == {path: "embedding"}
    assert found.paths == [*LINEAR]


@pytest.mark.parametrize(
    "path",
    [
        *("lm_head", "language_model.lm_head", "embed_out", "output", "decoder.output", "head"),
        *("transformer.output_layer", "cls.predictions.decoder", "lm_head.decoder", "lm_heads.2"),
        *("decoder.output_projection", "generator_lm_head", "vocab_projector", "pred_layer.proj"),
        *("lm_loss", "decoder", "mlm_score.decoder", "lm_head.out_proj", "classifier", "score"),
    ],
)
def test_an_output_head_is_not_a_linear_target(path):
    found = find_targets(shaped(**{path: (11, 8)}), "all-linear")
    assert found.left_out == {path: "output head"}
    assert found.paths == [*LINEAR]


@pytest.mark.parametrize(
    "path",
    [
        *("encoder.layer.0.output.dense", "encoder.layer.0.attention.output.dense"),
        *("layers.0.attn.output", "layers.0.self_attn.output", "layers.1.feed_forward.w1"),
        *("lm_head.dense", "cls.predictions.transform.dense", "classifier.dense", "pooler.dense"),
        *("embeddings_project", "encoder.embedding_hidden_mapping_in", "patch_embedding"),
        *("context_embedder", "time_embed.0", "label_emb.0.0", "x_embedder", "joint.head"),
        *("bert.classifier", "input_ff_layer.output_layer", "mask_decoder.proj_out", "proj_out"),
        *("timestep_embedder.linear_1", "layers.0.mlp.gate", "class_embed.0", "w", "layers.0.w"),
    ],
)
def test_a_linear_module_with_a_name_near_those_is_a_target(path):
    found = find_targets(shaped(**{path: (11, 8)}), "all-linear")
    assert found.left_out == {}
    assert found.paths == [*LINEAR, path]


@pytest.mark.parametrize("path", ["head", "text_model.head", "output", "classifier"])
def test_a_square_matrix_is_not_an_output_head(path):
    assert left_out(shaped(**{path: (8, 8)})) == {}


@pytest.mark.parametrize("path", ["output", "output_layer", "decoder"])
def test_an_output_with_fewer_rows_than_columns_is_a_projection(path):
    assert left_out(shaped(**{path: (4, 8)})) == {}


def test_only_a_target_must_have_a_shape():
    weights = {"q": np.ones((4, 4)), "count": 1}
    assert find_targets(weights, ".*", exclude_modules=["count"]).excluded == ["count"]
    assert find_targets(weights, ["q"]).paths == ["q"]
    for targets in (".*", "all-linear"):
        with pytest.raises(TypeError, match=r"^count: weight must be an array .* got int"):
            find_targets(weights, targets)


def test_a_weight_in_the_memory_of_an_embedding_is_tied_to_it(backend, draw):
    table, other = draw(9, 4), draw(9, 4)
    weights = {
        "wte.weight": table,
        "layers.0.same.weight": table,
        "layers.0.other.weight": other,
        "layers.0.q.weight": draw(4, 4),
    }
    found = find_targets(weights, "all-linear")
    assert found.left_out == {"wte": "embedding", "layers.0.same": "tied to wte"}
    assert found.paths == ["layers.0.other", "layers.0.q"]


def test_a_view_of_the_same_memory_counts_as_tied_and_a_part_of_it_does_not():
    table = np.ones((9, 4))
    weights = {
        "layers.0.same.weight": table[:],
        "layers.0.part.weight": table[:4],
        "wte.weight": table,
    }
    assert left_out(weights) == {"wte": "embedding", "layers.0.same": "tied to wte"}


def test_two_arrays_of_a_gpu_at_one_address_are_tied():
    def at(address):
        interface = {"data": (address, False)}
        return SimpleNamespace(shape=(9, 4), __cuda_array_interface__=interface)

    weights = {"wte.weight": at(64), "layers.0.x.weight": at(64), "layers.0.y.weight": at(128)}
    assert left_out(weights) == {"wte": "embedding", "layers.0.x": "tied to wte"}


def test_two_objects_with_one_data_pointer_are_tied():
    def at(address):
        return SimpleNamespace(shape=(9, 4), data_ptr=lambda: address)

    weights = {"wte.weight": at(64), "layers.0.x.weight": at(64), "layers.0.y.weight": at(0)}
    assert left_out(weights) == {"wte": "embedding", "layers.0.x": "tied to wte"}


def test_two_tensors_of_pytorch_with_one_storage_are_tied(torch):
    table = torch.ones(9, 4)
    weights = {"wte.weight": table, "layers.0.x.weight": table.detach()}
    assert left_out(weights) == {"wte": "embedding", "layers.0.x": "tied to wte"}
    empty = {name: torch.empty(9, 4, device="meta") for name in weights}  # all at address 0
    assert left_out(empty) == {"wte": "embedding"}


def test_the_shape_of_the_largest_embedding_outside_of_the_layers_is_a_head():
    weights = shaped(wte=(50, 8), wpe=(16, 8), unknown=(50, 8), fits_wpe=(16, 8))
    weights |= shaped(layers__1__wide=(50, 8))
    assert left_out(weights) == {
        "wte": "embedding",
        "wpe": "embedding",
        "unknown": "rows of a vocabulary",
    }


def test_a_matrix_of_the_shape_of_a_small_embedding_is_a_target():
    assert left_out(shaped(types=(2, 8), type_emb=(2, 8))) == {"type_emb": "embedding"}


@pytest.mark.parametrize(
    ("shapes", "found"),
    [
        ({"vectors": (16384, 8)}, ["vectors"]),
        ({"vectors": (16384, 8), "logits": (16384, 8)}, ["vectors", "logits"]),
        ({"vectors": (16383, 8)}, []),  # as long as a wide layer
        ({"vectors": (16384, 8), "logits": (16384, 16)}, []),  # two shapes
        ({"vectors": (16384, 16384)}, []),
        ({"vectors": (16384, 8), "layers__1__wide": (10923, 8)}, []),  # 1.4999 times
        ({"vectors": (16384, 8), "layers__1__wide": (10922, 8)}, ["vectors"]),
        ({"layers__1__wide": (16384, 8)}, []),
    ],
)
def test_the_rows_of_a_vocabulary_are_found_without_a_name(shapes, found):
    assert left_out(shaped(**shapes)) == dict.fromkeys(found, "rows of a vocabulary")


def test_a_matrix_alone_is_a_target():
    weights = {"vectors.weight": SimpleNamespace(shape=(20_000, 8))}
    assert find_targets(weights, "all-linear").paths == ["vectors"]


def test_a_name_without_weight_is_a_module_where_all_names_are():
    weights = shaped() | {"layers.0.experts.gate_up_proj_bias": SimpleNamespace(shape=(4, 16))}
    found = find_targets(weights, "all-linear")
    assert found.left_out == {"layers.0.experts.gate_up_proj_bias": "parameter"}
    bare = {name.removesuffix(".weight"): weight for name, weight in weights.items()}
    assert find_targets(bare, "all-linear").left_out == {}


def test_a_given_kind_wins_over_names_and_shapes():
    kinds = {"wte": LayerKind(), "layers.0.q": LayerKind("embedding")}
    found = find_targets(shaped(wte=(50, 8)), "all-linear", kinds=kinds)
    assert found.paths == ["layers.0.up", "wte"]
    assert found.left_out == {}


@pytest.mark.parametrize(
    ("exclude", "excluded"),
    [
        (["q"], ["layers.0.q"]),
        (["0.q", "layers.0.up"], ["layers.0.q", "layers.0.up"]),
        (("up",), ["layers.0.up"]),
        (r".*\.q", ["layers.0.q"]),
        ([], []),
        (None, []),
        (["wte"], []),  # a module that is not a target
    ],
)
@pytest.mark.parametrize("targets", ["all-linear", ["q", "up", "x"], r"layers\..*"])
def test_an_exclusion_wins_over_a_target(targets, exclude, excluded):
    weights = shaped(layers__0__x=(8, 8), wte=(9, 8))
    given = iter(exclude) if isinstance(exclude, tuple) else exclude
    found = find_targets(weights, targets, exclude_modules=given)
    every = [*LINEAR, "layers.0.x"]
    assert found.excluded == excluded
    assert found.paths == [path for path in every if path not in excluded]
    assert found.unused == found.unmatched == {}


def test_a_tie_is_to_the_first_of_the_embeddings_in_one_memory():
    table = np.ones((9, 4))
    names = ("shared", "encoder.embed_tokens", "decoder.other")
    found = find_targets({f"{name}.weight": table for name in names}, "all-linear")
    assert found.left_out["decoder.other"] == "tied to shared"


WEIGHTS = {"layers.0.q.weight": np.eye(4), "layers.0.k.weight": np.eye(4)}


@pytest.mark.parametrize(
    ("exclude", "message"),
    [
        (["p"], "exclude_modules 'p' must match one of 2 modules; the nearest are layers.0.q"),
        ("k", "exclude_modules 'k' must match one of 2 modules; the nearest is"),
        (
            ["q", "k"],
            "exclude_modules must leave at least one target, got ['q', 'k'], which excludes all 2",
        ),
    ],
)
def test_an_exclusion_that_takes_all_or_nothing_is_refused(exclude, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        doraxp.adapt(WEIGHTS, "all-linear", Config(2), seed=0, exclude_modules=exclude)


@pytest.mark.parametrize("argument", ["target_modules", "exclude_modules"])
def test_a_string_must_be_a_regular_expression(argument):
    arguments = {"target_modules": ["q"], argument: "q["}
    message = rf"{argument} must be a regular expression or a list, got 'q\[': unterminated"
    with pytest.raises(ValueError, match=message):
        find_targets(WEIGHTS, **arguments)


def test_adapt_leaves_out_what_is_excluded():
    layers = doraxp.adapt(WEIGHTS, "all-linear", Config(2), seed=0, exclude_modules=["q"])
    assert list(layers) == ["layers.0.k"]


def test_a_target_without_a_module_has_near_names():
    found = find_targets(shaped(), ["q", "upp"])
    assert found.unmatched == {"upp": ["up"]}
    assert found.paths == ["layers.0.q"]


FAMILIES = (
    *("Bert", "Roberta", "Albert", "DistilBert", "Electra", "DebertaV2", "XLNet", "MobileBert"),
    *("GPT2", "GPTNeo", "GPTNeoX", "GPTJ", "OPT", "Bloom", "Falcon", "Llama", "Mistral", "Qwen2"),
    *("Qwen3", "Gemma", "Gemma2", "Phi", "Phi3", "StableLm", "CTRL", "Cohere", "Mamba", "Mixtral"),
    *("T5", "MT5", "UMT5", "LongT5", "Bart", "MBart", "Pegasus", "Marian", "M2M100", "ProphetNet"),
    *("FNet", "Funnel", "BigBird", "Longformer", "LED", "Whisper", "Canine", "XLM", "Flaubert"),
    *("Olmo", "Olmoe", "Qwen2Moe", "DeepseekV3", "Ernie", "Nystromformer", "ModernBert"),
)
HEADS = (
    *("Model", "ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration"),
    *("ForSequenceClassification", "ForTokenClassification", "WithLMHeadModel"),
)


@pytest.mark.filterwarnings("ignore")
def test_all_linear_is_that_of_peft(peft, torch):
    """PEFT knows the classes of modules; here names and shapes alone are given."""
    import transformers  # PEFT needs it

    from_peft = peft.tuners.tuners_utils._maybe_include_all_linear_layers
    seen, wrong = 0, {}
    for family in FAMILIES:
        for head in HEADS:
            one = getattr(transformers, family + head, None)
            if one is None:
                continue
            config = one.config_class()
            if not getattr(config, "layer_types", None):
                with contextlib.suppress(NotImplementedError):
                    config.num_hidden_layers = 2
            with torch.device("meta"):
                model = one(config)
            is_classifier = head == "ForSequenceClassification"
            task = "SEQ_CLS" if is_classifier else None
            lora = peft.LoraConfig(target_modules="all-linear", task_type=task)
            wanted = set(from_peft(lora, model).target_modules) - {"classifier", "score"}
            weights = dict(model.named_parameters(remove_duplicate=False))
            found = set(find_targets(weights, "all-linear").paths)
            modules = dict(model.named_modules())
            known = {  # PEFT does not see the matrices of routers
                path
                for path in found
                if isinstance(modules[path], (torch.nn.Linear, torch.nn.Embedding))
                or type(modules[path]).__name__ == "Conv1D"
            }
            seen += 1
            if known != wanted:
                wrong[one.__name__] = sorted(known ^ wanted)
    assert wrong == {}
    assert seen > 120
