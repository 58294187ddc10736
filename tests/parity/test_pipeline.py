"""Prompt to image compared with diffusers' StableDiffusionPipeline, and the text encoder with transformers."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TOKENS, error, levels, shake
from transformers import CLIPTextConfig, CLIPTextModel

from minidistill import load
from minidistill.formats.files import read_json
from minidistill.formats.load_model import build, fill_positions
from minidistill.formats.model_folder import match_text_names, read_weights
from minidistill.guidance import guided
from minidistill.samplers import ddim_sample
from minidistill.text import encode_tokens

from .helpers import POCKET, PROMPTS, SD1, SD2, diffusers, write_small


@pytest.mark.parametrize("negative_prompt", ["", "a green apple"])
@pytest.mark.parametrize("style, prediction", [(SD1, "eps"), (SD2, "v")], ids=["sd1", "sd2"])
def test_guided_image(style: dict, prediction: str, negative_prompt: str, tmp_path: Path) -> None:
    pipe = write_small(tmp_path, style=style, prediction=prediction)
    sd = load(tmp_path, dtype=torch.float64)
    z_T = sd.starting_noise([3, 4], height=32, width=48)
    reference = []  # the latents after each step
    theirs = pipe(
        PROMPTS,
        negative_prompt=[negative_prompt] * 2,
        latents=z_T,
        height=32,
        width=48,
        num_inference_steps=7,
        guidance_scale=7.5,
        callback_on_step_end=lambda pipe, i, t, state: reference.append(state["latents"]) or {},
    ).images

    uncond = sd.encode_prompt([negative_prompt]).expand(2)
    model = guided(sd.unet, sd.encode_prompt(PROMPTS), uncond, 7.5)
    for step, (z_t, expected) in enumerate(zip(ddim_sample(model, sd.schedule, z_T, 7), reference, strict=True)):
        assert error(z_t, expected) <= 1e-9, f"after step {step}"
    with torch.no_grad():
        assert error(sd.vae.decode(z_t), pipe.vae.decode(expected / pipe.vae.config.scaling_factor).sample) <= 1e-9

    ours = sd.sample(PROMPTS, steps=7, guidance=7.5, seed=3, negative_prompt=negative_prompt, height=32, width=48)
    assert np.abs(levels(ours) - levels(theirs)).max() <= 1


@pytest.mark.parametrize("prefix", ["", "text_model."])
@pytest.mark.parametrize("style", [SD1, SD2], ids=["sd1", "sd2"])
def test_text_encoder(style: dict, prefix: str, tmp_path: Path) -> None:
    """Tensor names have a prefix or not, in checkpoints as in versions of transformers."""
    pipe = write_small(tmp_path, style=style)
    file = tmp_path / "text_encoder/model.safetensors"
    tensors = {prefix + name.removeprefix("text_model."): tensor for name, tensor in load_file(file).items()}
    save_file(tensors | {f"{prefix}embeddings.position_ids": torch.arange(TOKENS)[None]}, file)
    sd = load(tmp_path, dtype=torch.float64, tokenizer=POCKET / "tokenizer")
    ids = pipe.tokenizer(PROMPTS + [""], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        reference = pipe.text_encoder(ids).last_hidden_state
    assert ids.shape == (3, TOKENS)
    assert error(sd.encode_prompt(PROMPTS + [""]).tokens, reference) <= 1e-9
    assert error(sd.encode_tokens(ids).tokens, reference) <= 1e-9


@pytest.mark.slow
@pytest.mark.parametrize(
    "version",
    {
        "sd15": dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12),
        "sd21": dict(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=23,  # without the last, whose output SD 2 does not use
            num_attention_heads=16,
            hidden_act="gelu",
            projection_dim=512,
        ),
    }.items(),
    ids=lambda item: item[0],
)
def test_full_size_text_encoder(version: tuple[str, dict], tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = shake(CLIPTextModel(CLIPTextConfig(vocab_size=49408, max_position_embeddings=77, **version[1])))
    theirs.save_pretrained(tmp_path)
    ids = torch.randint(0, 49408, (2, 77))
    with torch.no_grad():
        reference = theirs(ids).last_hidden_state

    config = CLIPTextConfig.from_dict(read_json(tmp_path / "config.json"))
    network = read_weights(tmp_path, "model")
    network = network._replace(tensors=match_text_names(network.tensors))
    ours = build(lambda: CLIPTextModel(config), network, torch.float32)
    fill_positions(ours)
    shutil.rmtree(tmp_path)  # up to 1.4 GB
    assert error(encode_tokens(ours, ids).tokens, reference) <= 1e-4


@pytest.mark.skipif(not (POCKET / "unet").is_dir(), reason="weights/pocket-emoji has no unet yet")
def test_pocket_emoji_gives_the_same_image() -> None:
    """diffusers loads the folder as it is, without a dtype; no pixel differs by more than one level of 255."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(POCKET, safety_checker=None, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    theirs = pipe(PROMPTS, generator=generators, num_inference_steps=25, guidance_scale=5.0).images
    ours = load(POCKET).sample(PROMPTS, steps=25, guidance=5.0, seed=0)
    assert np.abs(levels(ours) - levels(theirs)).max() <= 1
