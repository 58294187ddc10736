"""Single files compared with diffusers: the same tensors after its conversion, and the same images."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import TOKENS, error, shake, text_config
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from minidistill import load
from minidistill.conditioning import Conditioning
from minidistill.guidance import guided
from minidistill.samplers import ddim_sample

from .helpers import POCKET, PROMPTS, assert_same, ddim_scheduler, diffusers, randn, single, small_unet, small_vae

UNET, VAE = "model.diffusion_model.", "first_stage_model."
TEXT = {1: "cond_stage_model.transformer.", 2: "cond_stage_model.model."}


def small_text(version: int) -> CLIPTextModel:
    torch.manual_seed(3)
    config = text_config(
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,  # of width 64
        hidden_act={1: "quick_gelu", 2: "gelu"}[version],
    )
    return shake(CLIPTextModel(config).double())


def small_pipe(version: int, prediction: str) -> "diffusers.StableDiffusionPipeline":
    """A model that a single file can hold: group norms of 32 groups; 8 heads, or heads of width 64."""
    style = {
        1: dict(block_out_channels=(32, 64, 64), attention_head_dim=8),
        2: dict(block_out_channels=(64, 128, 128), attention_head_dim=(1, 2, 2), use_linear_projection=True),
    }[version]
    pipe = diffusers.StableDiffusionPipeline(
        unet=small_unet(norm_num_groups=32, cross_attention_dim=128, **style),
        vae=small_vae(block_out_channels=(32, 64, 64), norm_num_groups=32, scaling_factor=0.18215),
        text_encoder=small_text(version),
        tokenizer=CLIPTokenizer.from_pretrained(POCKET / "tokenizer", **({"pad_token": "!"} if version == 2 else {})),
        scheduler=ddim_scheduler(prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def uncut(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """SD 2.x as published: OpenCLIP with its last block and projection, which SD does not use."""
    block = "transformer.resblocks.1."
    last = {n.replace(block, block.replace("1", "2")): t + 1 for n, t in tensors.items() if TEXT[2] + block in n}
    return tensors | last | {TEXT[2] + "text_projection": randn(128, 128), TEXT[2] + "logit_scale": torch.tensor(4.6)}


def with_ema(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add EMA copies of the UNet, under their names without dots, and change the UNet itself."""
    own = {name: tensor for name, tensor in tensors.items() if name.startswith(UNET)}
    copies = {f"model_ema.{name.removeprefix('model.').replace('.', '')}": tensor for name, tensor in own.items()}
    counters = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(5)}
    return tensors | copies | counters | {name: tensor + 1 for name, tensor in own.items()}


def without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace(TEXT[1] + "text_model.", TEXT[1]): tensor for name, tensor in tensors.items()}


class ModelCheckpoint:
    """A callback, as in the official .ckpt files."""


def as_safetensors(tensors: dict[str, Tensor], folder: Path) -> Path:
    save_file(tensors, folder / "model.safetensors")
    return folder / "model.safetensors"


def as_ckpt(tensors: dict[str, Tensor], folder: Path, **how) -> Path:
    extra = {"global_step": 470000, "callbacks": {ModelCheckpoint: {"best": torch.tensor(1.0).numpy()[()]}}}
    torch.save(extra | {"state_dict": tensors}, folder / "model.ckpt", **how)
    return folder / "model.ckpt"


def as_legacy_ckpt(tensors: dict[str, Tensor], folder: Path) -> Path:
    return as_ckpt(tensors, folder, _use_new_zipfile_serialization=False)


def as_flat_ckpt(tensors: dict[str, Tensor], folder: Path) -> Path:
    torch.save({name: torch.nn.Parameter(t, requires_grad=False) for name, t in tensors.items()}, folder / "model.ckpt")
    return folder / "model.ckpt"


EXTRA = {
    "betas": torch.zeros(1000),
    "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(TOKENS)[None],
    "first_stage_model.loss.logvar": torch.zeros(()),
}


def check_parts(sd, pipe: "diffusers.StableDiffusionPipeline", tolerance: float, side: int) -> None:
    """Compare text embeddings, the UNet, the VAE both ways, and the latents of a guided image after seven steps."""
    dtype = sd.dtype
    ids = pipe.tokenizer(PROMPTS, padding="max_length", return_tensors="pt").input_ids
    z = randn(2, 4, side, side).to(dtype)
    factor = sd.vae.config.factor
    x = randn(2, 3, side * factor, side * factor, seed=1).clamp(-1, 1).to(dtype)
    with torch.no_grad():
        context = pipe.text_encoder(ids).last_hidden_state
        assert error(sd.encode_prompt(PROMPTS).tokens, context) <= tolerance
        t = torch.tensor([981, 21])
        assert error(sd.unet(z, t, context), pipe.unet(z, t, context).sample) <= tolerance
        assert error(sd.vae.decode(z), pipe.vae.decode(z / 0.18215).sample) <= tolerance
        assert error(sd.vae.encode(x), pipe.vae.encode(x).latent_dist.mean * 0.18215) <= tolerance
        theirs = pipe(
            PROMPTS,
            latents=z,
            height=side * factor,
            width=side * factor,
            num_inference_steps=7,
            guidance_scale=7.5,
            output_type="latent",
        ).images
        model = guided(sd.unet, Conditioning(context), sd.encode_prompt([""]).expand(2), guidance=7.5)
        *_, ours = ddim_sample(model, sd.schedule, z, 7)
    assert error(ours, theirs) <= tolerance


def same(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors


@pytest.mark.parametrize(
    "version, prediction, change, write, ema",
    [
        (1, "eps", same, as_safetensors, False),
        (1, "eps", without_prefix, as_ckpt, False),
        (1, "eps", with_ema, as_flat_ckpt, True),
        (1, "v", same, as_legacy_ckpt, False),
        (2, "v", uncut, as_safetensors, False),
        (2, "v", same, as_ckpt, False),
        (2, "eps", uncut, as_legacy_ckpt, False),
    ],
)
def test_small(version: int, prediction: str, change: Callable, write: Callable, ema: bool, tmp_path: Path) -> None:
    pipe = small_pipe(version, prediction)
    file = write(change(single(pipe, tmp_path)) | (EXTRA if version == 1 else {}), tmp_path)
    sd = load(file, dtype=torch.float64, tokenizer=POCKET / "tokenizer", prediction=prediction, ema=ema)
    check_parts(sd, pipe, tolerance=1e-9, side=8)


@pytest.mark.parametrize("version", [1, 2])
def test_names_are_those_that_diffusers_converts(version: int, tmp_path: Path) -> None:
    """diffusers converts what we write back to its own tensors, bit for bit."""
    from diffusers.loaders import single_file_utils as theirs

    pipe = small_pipe(version, "eps")
    tensors = single(pipe, tmp_path)
    assert_same(theirs.convert_ldm_unet_checkpoint(dict(tensors), dict(pipe.unet.config)), pipe.unet.state_dict())
    assert_same(theirs.convert_ldm_vae_checkpoint(dict(tensors), dict(pipe.vae.config)), pipe.vae.state_dict())
    if version == 1:
        found = theirs.convert_ldm_clip_checkpoint(dict(tensors))
    else:
        found = theirs.convert_open_clip_checkpoint(pipe.text_encoder, dict(tensors))
    assert_same(found, pipe.text_encoder.state_dict())


@pytest.mark.parametrize("version, guess", [(1, "eps"), (2, "v")])
def test_prediction(version: int, guess: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Guessed from the version, stated by the file, or given."""
    tensors = single(small_pipe(version, "eps"), tmp_path)
    file = as_safetensors(tensors, tmp_path)
    assert load(file).schedule.prediction == guess
    warned = [str(w.message) for w in recwarn if "--prediction" in str(w.message)]
    assert len(warned) == (guess == "v")
    for stated, expected in (("epsilon", "eps"), ("v", "v")):
        save_file(tensors, file, {"modelspec.prediction_type": stated})
        assert load(file).schedule.prediction == expected
        assert load(file, prediction="v").schedule.prediction == "v"
    assert len([w for w in recwarn if "--prediction" in str(w.message)]) == len(warned)


@pytest.mark.slow
@pytest.mark.parametrize("version, prediction", [(1, "eps"), (2, "eps"), (2, "v")])
def test_full_size(version: int, prediction: str, tmp_path: Path) -> None:
    """Random float32 weights in the official shapes."""
    pipe = full_pipe(version, prediction)
    tensors = single(pipe, tmp_path)
    file = as_ckpt(tensors, tmp_path) if version == 1 else as_safetensors(tensors, tmp_path)
    del tensors
    pipe.tokenizer.save_pretrained(tmp_path / "tokenizer")
    sd = load(file, tokenizer=tmp_path / "tokenizer", prediction=prediction)
    check_parts(sd, pipe, tolerance=1e-4, side=16)
    file.unlink()  # up to 5 GB


def full_pipe(version: int, prediction: str) -> "diffusers.StableDiffusionPipeline":
    torch.manual_seed(0)
    style = {
        1: dict(cross_attention_dim=768),
        2: dict(cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True),
    }[version]
    sizes = {
        1: dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12),
        2: dict(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, hidden_act="gelu"
        ),
    }[version]
    pad = {"pad_token": "!"} if version == 2 else {}
    tokenizer = CLIPTokenizer.from_pretrained(POCKET / "tokenizer", model_max_length=77, **pad)
    pipe = diffusers.StableDiffusionPipeline(
        unet=shake(diffusers.UNet2DConditionModel(sample_size=64, **style)),
        vae=shake(
            diffusers.AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
            )
        ),
        text_encoder=shake(CLIPTextModel(CLIPTextConfig(vocab_size=49408, max_position_embeddings=77, **sizes))),
        tokenizer=tokenizer,
        scheduler=ddim_scheduler(prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
