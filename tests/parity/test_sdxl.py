"""SDXL compared with diffusers' StableDiffusionXLPipeline, in float64 at small widths."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import TOKENS, error, levels

from minidistill import CheckpointError, StableDiffusion, load
from minidistill.bench.workloads import SIZES, Setup
from minidistill.conditioning import Conditioning
from minidistill.config import SDXL_UNET, SDXL_VAE
from minidistill.formats.files import write_json
from minidistill.formats.model_configs import published_unet, read_unet_config, read_vae_config
from minidistill.guidance import guided
from minidistill.samplers import ddim_sample
from minidistill.unet import UNet

from .helpers import PROMPTS, diffusers, randn, small_xl


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
    prompts = [*PROMPTS, "", "red " * (TOKENS - 3) + "apple"]  # the last one fills all tokens
    tokens, _, pooled, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
    cond = sd.encode_prompt(prompts)
    assert cond.tokens.shape == (4, TOKENS, 192) and cond.pooled.shape == (4, 48)
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
    options = dict(latents=z_T, height=16, width=24, num_inference_steps=7, guidance_scale=7.5)
    options |= dict(negative_prompt=None if negative_prompt is None else [negative_prompt] * 2)
    theirs = pipe(PROMPTS, output_type="latent", **options).images
    cond, uncond = sd.encode_prompt(PROMPTS, 16, 24), sd.encode_negative(negative_prompt, 16, 24).expand(2)
    *_, ours = ddim_sample(guided(sd.unet, cond, uncond, 7.5), sd.schedule, z_T, 7)
    assert error(ours, theirs) <= 1e-9

    options |= dict(num_inference_steps=2)
    images = sd.sample(PROMPTS, 2, 7.5, seed=3, negative_prompt=negative_prompt, height=16, width=24)
    assert np.abs(levels(images) - levels(pipe(PROMPTS, **options).images)).max() <= 1


@pytest.mark.parametrize("offset", [dict(), dict(steps_offset=0), dict(steps_offset=2)], ids=str)
def test_time_steps_begin_where_the_scheduler_says(offset: dict, tmp_path: Path) -> None:
    """diffusers' pipeline of SDXL keeps the offset, where that of SD 1.x and 2.x makes it 1."""
    pipe = small_xl()
    settings = {name: value for name, value in pipe.scheduler.config.items() if name != "steps_offset"}
    pipe.scheduler = diffusers.DDIMScheduler.from_config(settings | offset)
    pipe.save_pretrained(tmp_path)
    sd = load(tmp_path, dtype=torch.float64)
    options = dict(latents=sd.starting_noise([3], height=16, width=24), height=16, width=24, num_inference_steps=4)
    theirs = pipe(PROMPTS[0], guidance_scale=1, output_type="latent", **options).images
    cond = sd.encode_prompt(PROMPTS[:1], 16, 24)
    *_, ours = ddim_sample(lambda z_t, t: sd.unet(z_t, t, cond), sd.schedule, options["latents"], 4)
    assert error(ours, theirs) <= 1e-9


@pytest.mark.parametrize("clip_sample", [dict(clip_sample=True), dict()], ids=["stated", "default"])
@pytest.mark.parametrize("kind", ["DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler"])
def test_a_sampler_that_clips_is_refused(kind: str, clip_sample: dict, pipe, folder: Path, tmp_path: Path) -> None:
    """diffusers' pipeline of SDXL obeys clip_sample, where that of SD 1.x and 2.x turns it off; Euler has no such."""
    copy = Path(shutil.copytree(folder, tmp_path / "xl"))
    config = {name: value for name, value in pipe.scheduler.config.items() if name != "clip_sample"} | clip_sample
    write_json(copy / "scheduler/scheduler_config.json", config | {"_class_name": kind})
    scheduler = getattr(diffusers, kind).from_pretrained(copy / "scheduler")
    assert kind == "EulerDiscreteScheduler" or scheduler.config.clip_sample is True
    if kind == "EulerDiscreteScheduler":
        assert load(copy).schedule.timesteps(4) == load(folder).schedule.timesteps(4)
    else:
        with pytest.raises(CheckpointError, match="clip_sample is True"):
            load(copy)


def test_other_sizes_than_the_images(pipe, sd: StableDiffusion) -> None:
    z_T = sd.starting_noise([3], height=16, width=24)
    sizes = dict(original_size=(300, 400), crops_coords_top_left=(7, 30), target_size=(128, 256))
    options = dict(latents=z_T, height=16, width=24, num_inference_steps=4, guidance_scale=1, output_type="latent")
    theirs = pipe(PROMPTS[0], **options, **sizes).images
    cond = replace(sd.encode_prompt(PROMPTS[:1]), sizes=torch.tensor([[300, 400, 7, 30, 128, 256]]))
    *_, ours = ddim_sample(lambda z_t, t: sd.unet(z_t, t, cond), sd.schedule, z_T, 4)
    assert error(ours, theirs) <= 1e-9


PUBLISHED = dict(
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    attention_head_dim=[5, 10, 20],
    block_out_channels=[320, 640, 1280],
    cross_attention_dim=2048,
    down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    layers_per_block=2,
    projection_class_embeddings_input_dim=2816,
    sample_size=128,
    transformer_layers_per_block=[1, 2, 10],
    up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    use_linear_projection=True,
)


def test_presets_are_as_published(tmp_path: Path) -> None:
    write_json(tmp_path / "unet.json", PUBLISHED)
    write_json(tmp_path / "vae.json", dict(scaling_factor=0.13025, force_upcast=True))
    assert read_unet_config(tmp_path / "unet.json") == SDXL_UNET
    assert read_vae_config(tmp_path / "vae.json") == SDXL_VAE
    write_json(tmp_path / "written.json", published_unet(SDXL_UNET))
    assert read_unet_config(tmp_path / "written.json") == SDXL_UNET
    with torch.device("meta"):
        ours, theirs = UNet(SDXL_UNET), diffusers.UNet2DConditionModel(**PUBLISHED)
    shapes = [{name: x.shape for name, x in unet.state_dict().items()} for unet in (ours, theirs)]
    assert shapes[0] == shapes[1] and sum(p.numel() for p in ours.parameters()) == 2_567_463_684


@pytest.mark.slow
def test_full_size_unet() -> None:
    """In float32, both on one copy of the weights, which takes 10.3 GB."""
    setup = Setup(SIZES["sdxl"], torch.device("cpu"), torch.float32, rank=1)
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel(**PUBLISHED)
    ours = setup.unet().eval()
    theirs.load_state_dict(setup.weights, assign=True)
    z_t, t, cond = randn(1, 4, 16, 24).float(), torch.tensor([621]), setup.contexts(1)[0]
    added = dict(text_embeds=cond.pooled, time_ids=cond.sizes)
    with torch.no_grad():
        expected = theirs.eval()(z_t, t, cond.tokens, added_cond_kwargs=added).sample
        assert error(ours(z_t, t, cond), expected) <= 1e-4
