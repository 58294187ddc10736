"""SDXL compared with diffusers' StableDiffusionXLPipeline, in float64 at small widths."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from minidistill import StableDiffusion, load
from minidistill.conditioning import Conditioning
from minidistill.guidance import guided
from minidistill.samplers import ddim_sample

from .helpers import PROMPTS, diffusers, error, randn, small_xl


@pytest.fixture(scope="module")
def pipe() -> "diffusers.StableDiffusionXLPipeline":
    return small_xl()


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("xl")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def sd(folder: Path) -> StableDiffusion:
    return load(folder, dtype=torch.float64)


def test_unet(pipe, sd: StableDiffusion) -> None:
    for height, width, length in ((8, 8, 16), (8, 12, 7), (20, 4, 1), (9, 10, 3)):
        z_t, t = randn(2, 4, height, width), torch.tensor([1, 981])
        tokens, pooled = randn(2, length, 192, seed=1), randn(2, 48, seed=2)
        sizes = torch.tensor([[1024, 1024, 0, 0, 1024, 1024], [713, 1500, 5, 64, 768, 1344]])
        with torch.no_grad():
            theirs = pipe.unet(z_t, t, tokens, added_cond_kwargs=dict(text_embeds=pooled, time_ids=sizes)).sample
            assert error(sd.unet(z_t, t, Conditioning(tokens, pooled, sizes)), theirs) <= 1e-9


def test_tokens_and_pooled_vector(pipe, sd: StableDiffusion) -> None:
    prompts = [*PROMPTS, "", "red " * 13 + "apple"]  # the last one fills all 16 tokens
    tokens, _, pooled, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
    cond = sd.encode_prompt(prompts)
    assert cond.tokens.shape == (4, 16, 192) and cond.pooled.shape == (4, 48)
    assert error(cond.tokens, tokens) <= 1e-9 and error(cond.pooled, pooled) <= 1e-9
    assert cond.sizes.tolist() == [[16, 16, 0, 0, 16, 16]] * 4  # the size that it was trained on


@pytest.mark.parametrize(
    "negative_prompt, force_zeros", [(None, True), (None, False), ("", True), ("a green apple", True)]
)
def test_guided_image(negative_prompt: str | None, force_zeros: bool, tmp_path: Path) -> None:
    pipe = small_xl(force_zeros_for_empty_prompt=force_zeros)
    pipe.save_pretrained(tmp_path)
    sd = load(tmp_path, dtype=torch.float64)
    z_T = sd.starting_noise([3, 4], height=16, width=24)
    options = dict(latents=z_T, height=16, width=24, num_inference_steps=20, guidance_scale=7.5)
    options |= dict(negative_prompt=None if negative_prompt is None else [negative_prompt] * 2)
    theirs = pipe(PROMPTS, output_type="latent", **options).images
    cond, uncond = sd.encode_prompt(PROMPTS, 16, 24), sd.encode_negative(negative_prompt, 16, 24).expand(2)
    *_, ours = ddim_sample(guided(sd.unet, cond, uncond, 7.5), sd.schedule, z_T, 20)
    assert error(ours, theirs) <= 1e-9

    options |= dict(num_inference_steps=2)
    images = sd.sample(PROMPTS, 2, 7.5, seed=3, negative_prompt=negative_prompt, height=16, width=24)
    levels = [np.stack([np.asarray(x, dtype=int) for x in some]) for some in (images, pipe(PROMPTS, **options).images)]
    assert np.abs(levels[0] - levels[1]).max() <= 1


def test_other_sizes_than_the_images(pipe, sd: StableDiffusion) -> None:
    z_T = sd.starting_noise([3], height=16, width=24)
    sizes = dict(original_size=(300, 400), crops_coords_top_left=(7, 30), target_size=(128, 256))
    options = dict(latents=z_T, height=16, width=24, num_inference_steps=4, guidance_scale=1, output_type="latent")
    theirs = pipe(PROMPTS[0], **options, **sizes).images
    cond = replace(sd.encode_prompt(PROMPTS[:1]), sizes=torch.tensor([[300, 400, 7, 30, 128, 256]]))
    *_, ours = ddim_sample(lambda z_t, t: sd.unet(z_t, t, cond), sd.schedule, z_T, 4)
    assert error(ours, theirs) <= 1e-9
