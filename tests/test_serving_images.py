"""The commands of docs/howto/image-models.md, run on models of diffusers and adapters of PEFT.

`nox -s serving` runs this file.
"""

from __future__ import annotations

import pytest
from pages import block, commands, run

PAGE = "howto/image-models.md"
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv2"]
PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te"}

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers and transformers


def as_kohya(part, tuned, tensors):
    """Return PEFT's tensors of a part under kohya's names and in kohya's shapes."""
    import torch

    leaves = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight"}
    modules = dict(tuned.base_model.model.named_modules())
    kohya = {}
    for name, tensor in tensors.items():
        path, leaf = name.removeprefix("base_model.model.").split(".lora_")
        module = f"{PREFIXES[part]}_{path.replace('.', '_')}"
        kohya[f"{module}.alpha"] = torch.tensor(6.0)
        if leaf == "magnitude_vector":
            ones = [1] * (modules[f"{path}.base_layer"].weight.ndim - 1)
            kohya[f"{module}.dora_scale"] = tensor.reshape(-1, *ones)
        else:
            kohya[f"{module}.{leaves[f'lora_{leaf[0]}']}"] = tensor
    return kohya


@pytest.fixture
def trained(torch, peft, transformers, diffusers, tmp_path):
    """A pipeline and its adapters, named as on the page; return the right outputs by part."""
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file
    from writers.diffusers_peft import pipeline
    from writers.images import image_outputs, text_outputs
    from writers.peft_common import adapt

    torch.manual_seed(0)
    pipe = pipeline("UNet")
    pipe.save_pretrained(tmp_path / "pipeline")
    before = {"unet": image_outputs(pipe.unet, "UNet")}
    before["text_encoder"] = text_outputs(pipe.text_encoder)
    kohya = {}
    for part, targets in {"unet": ATTENTION, "text_encoder": ["q_proj", "v_proj"]}.items():
        tuned = adapt(getattr(pipe, part), target_modules=targets)
        tuned.save_pretrained(tmp_path / "peft" / part)
        tensors = get_peft_model_state_dict(tuned)
        kohya |= {k: x.contiguous() for k, x in as_kohya(part, tuned, tensors).items()}
    save_file(kohya, tmp_path / "kohya.safetensors")
    right = {"unet": image_outputs(pipe.unet, "UNet")}
    right["text_encoder"] = text_outputs(pipe.text_encoder)
    for part, outputs in right.items():
        assert distance(before[part], outputs) > 0.1
    return right, before


def distance(got, right):
    """Return the largest difference as a part of the largest number."""
    return float((got - right).abs().max() / right.abs().max())


def outputs_of(pipe):
    from writers.images import image_outputs, text_outputs

    return {
        "unet": image_outputs(pipe.unet, "UNet"),
        "text_encoder": text_outputs(pipe.text_encoder),
    }


def test_a_merged_pipeline_computes_as_pefts_adapters(trained, tmp_path, monkeypatch):
    right, before = trained
    run(tmp_path, *commands(PAGE, "sh", "doraxp "))
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(block(PAGE, "from diffusers import StableDiffusionPipeline"), names)
    load = names["StableDiffusionPipeline"].from_pretrained
    for folder in ("merged", "both", "from-diffusers"):
        for part, outputs in outputs_of(load(folder)).items():
            assert distance(outputs, right[part]) < 1e-5, (folder, part)
    weaker = outputs_of(load("weaker"))
    for part, outputs in weaker.items():
        assert distance(outputs, right[part]) > 1e-3 < distance(outputs, before[part]), part


def test_one_part_is_loaded_as_a_model(trained, tmp_path, monkeypatch, diffusers):
    from writers.images import image_outputs

    right, _ = trained
    run(tmp_path, *commands(PAGE, "sh", "doraxp "))
    monkeypatch.chdir(tmp_path)
    for folder in ("unet-merged", "unet-of-peft"):
        model = diffusers.UNet2DConditionModel.from_pretrained(folder)
        assert distance(image_outputs(model, "UNet"), right["unet"]) < 1e-5, folder


def test_diffusers_loads_the_converted_adapter(trained, tmp_path, monkeypatch, diffusers):
    """The base and the adapter, apart, compute as the two merged."""
    right, _ = trained
    run(tmp_path, *commands(PAGE, "sh", "doraxp "))
    monkeypatch.chdir(tmp_path)
    names = {"pipe": diffusers.StableDiffusionPipeline.from_pretrained("pipeline")}
    exec(block(PAGE, "pipe.load_lora_weights"), names)
    for part, outputs in outputs_of(names["pipe"]).items():
        assert distance(outputs, right[part]) < 1e-5, part
