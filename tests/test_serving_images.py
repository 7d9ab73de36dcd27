"""The commands of docs/howto/image-models.md, run on models of diffusers and adapters of PEFT.

`nox -s serving` runs this file.
"""

from __future__ import annotations

import string

import pytest
from page_blocks import block, commands, run

PAGE = "howto/image-models.md"
BOUND = 2e-5
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv2"]
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
            kohya[f"{module}.{leaves[f'lora_{leaf[0]}']}"] = tensor.contiguous()
    return kohya


def distance(got, right):
    """Return the largest difference as a part of the largest number."""
    return float(abs(got - right).max() / abs(right).max())


def make_pipeline():
    """Return a whole pipeline with random weights and a tokenizer of single letters."""
    import diffusers
    import transformers
    from writers.images import image_model, text_encoder

    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters]
    tokenizer = transformers.CLIPTokenizer(
        vocab={token: place for place, token in enumerate(tokens)},
        merges=[],
        pad_token="<|endoftext|>",
        model_max_length=16,
    )
    return diffusers.StableDiffusionPipeline(
        unet=image_model("UNet"),
        text_encoder=text_encoder(),
        vae=image_model("VAE"),
        tokenizer=tokenizer,
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
    )


def outputs(pipe):
    """Return the outputs of the parts, and an image."""
    import torch
    from writers.images import image_outputs, text_outputs

    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    latents = pipe(
        "a cat", num_inference_steps=2, generator=generator, height=16, width=16,
        output_type="latent",
    ).images  # fmt: skip
    return image_outputs(pipe.unet, "UNet"), text_outputs(pipe.text_encoder), latents


@pytest.fixture
def trained(torch, peft, transformers, diffusers, tmp_path):
    """A pipeline and its adapters, named as on the page; return the outputs with and without."""
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file
    from writers.peft_common import adapt

    torch.manual_seed(0)
    pipe = make_pipeline()
    pipe.save_pretrained(tmp_path / "pipeline")
    before, kohya = outputs(pipe), {}
    for part, targets in {"unet": TARGETS, "text_encoder": ["q_proj", "v_proj"]}.items():
        tuned = adapt(getattr(pipe, part), target_modules=targets)
        tuned.save_pretrained(tmp_path / "peft" / part)
        kohya |= as_kohya(part, tuned, get_peft_model_state_dict(tuned))
    save_file(kohya, tmp_path / "kohya.safetensors")
    right = outputs(pipe)
    for one, other in zip(before, right, strict=True):
        assert distance(one, other) > 0.1
    return right, before


def test_the_commands_of_the_page_give_the_images_of_pefts_adapters(trained, tmp_path, monkeypatch):
    right, before = trained
    run(tmp_path, *commands(PAGE, "sh", "doraxp "))
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(block(PAGE, "from diffusers import StableDiffusionPipeline"), names)
    load = names["StableDiffusionPipeline"].from_pretrained
    loaded = {folder: load(folder) for folder in ("both", "from-diffusers")}
    for folder, pipe in {"merged": names["pipe"], **loaded}.items():
        for got, wanted in zip(outputs(pipe), right, strict=True):
            assert distance(got, wanted) < BOUND, folder
    for got, wanted, base in zip(outputs(load("weaker")), right, before, strict=True):
        assert min(distance(got, wanted), distance(got, base)) > 1e-3
    unet = type(names["pipe"].unet).from_pretrained
    for folder in ("unet-merged", "unet-of-peft"):
        pipe = load("pipeline", unet=unet(folder))
        got, text, _ = outputs(pipe)
        assert distance(got, right[0]) < BOUND, folder
        assert distance(text, before[1]) == 0
    applied = {"pipe": load("pipeline")}  # the base and the converted adapter
    exec(block(PAGE, "pipe.load_lora_weights"), applied)
    got, text, _ = outputs(applied["pipe"])
    assert distance(got, right[0]) < BOUND
    # The page says that diffusers loses the magnitudes of text encoders. Where this is mended,
    # change the page.
    assert distance(text, right[1]) > 1e-2
