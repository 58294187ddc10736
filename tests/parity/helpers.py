"""Small random models that diffusers writes, and the measure of difference."""

from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from tiny import END, TOKENS, VOCABULARY, shake, text_config
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from minidistill.formats.model_configs import read_unet_config, read_vae_config
from minidistill.formats.single_file import to_single_file

diffusers = pytest.importorskip("diffusers", reason="the parity tests compare with diffusers")

POCKET = Path(__file__).parents[2] / "weights/pocket-emoji"
PROMPTS = ["a rocket on a purple background", "a red apple"]

SD1 = dict(attention_head_dim=2, cross_attention_dim=24)  # the name says width, but it is the number of heads
SD2 = dict(attention_head_dim=(2, 4, 4), cross_attention_dim=40, use_linear_projection=True, upcast_attention=True)


randn = partial(tiny.randn, dtype=torch.float64)


def small_unet(**changes) -> nn.Module:
    torch.manual_seed(1)
    settings = dict(
        sample_size=8,
        block_out_channels=(32, 64, 64),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=16,
    )
    return shake(diffusers.UNet2DConditionModel(**(settings | changes)).double())


def small_vae(**changes) -> nn.Module:
    torch.manual_seed(2)
    settings = dict(
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        scaling_factor=0.3,
    )
    return shake(diffusers.AutoencoderKL(**(settings | changes)).double())


def small_text_encoder(width: int, activation: str = "quick_gelu") -> CLIPTextModel:
    torch.manual_seed(3)
    config = text_config(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_act=activation,
        pad_token_id=END,
    )
    return shake(CLIPTextModel(config).double())


def ddim_scheduler(prediction: str = "eps", set_alpha_to_one: bool = False, spacing: str = "leading"):
    """The scheduler Stable Diffusion was trained with."""
    return diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=set_alpha_to_one,
        steps_offset=1,
        timestep_spacing=spacing,
        prediction_type={"eps": "epsilon", "v": "v_prediction"}[prediction],
    )


def write_small(folder: Path, *, style: dict = SD1, prediction: str = "eps", vae: dict | None = None, **unet):
    """A whole small model in the official layout, written by diffusers; returns the pipeline that wrote it."""
    width = style["cross_attention_dim"]
    pipe = diffusers.StableDiffusionPipeline(
        unet=small_unet(**(style | unet)),
        vae=small_vae(**(vae or {})),
        text_encoder=small_text_encoder(width, "gelu" if style is SD2 else "quick_gelu"),
        tokenizer=CLIPTokenizer.from_pretrained(POCKET / "tokenizer"),
        scheduler=ddim_scheduler(prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same tensors, bit for bit; transformers' names have a prefix or not."""
    found, expected = ({n.removeprefix("text_model."): x for n, x in part.items()} for part in (found, expected))
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


XL_UNET = dict(
    block_out_channels=(32, 64),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    layers_per_block=2,
    transformer_layers_per_block=[1, 2],
    attention_head_dim=(1, 1),
    cross_attention_dim=192,
    use_linear_projection=True,
    norm_num_groups=32,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=48 + 6 * 256,
)


def single(pipe: "diffusers.DiffusionPipeline", folder: Path) -> dict[str, Tensor]:
    """The pipeline's tensors under the names of a single file; ``folder`` takes its configurations."""
    for part in ("unet", "vae"):
        getattr(pipe, part).save_config(folder / part)
    encoders = [pipe.text_encoder, *([pipe.text_encoder_2] if hasattr(pipe, "text_encoder_2") else [])]
    tensors = to_single_file(
        pipe.unet.state_dict(),
        read_unet_config(folder / "unet/config.json"),
        pipe.vae.state_dict(),
        read_vae_config(folder / "vae/config.json"),
        *((encoder.state_dict(), encoder.config) for encoder in encoders),
    )
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def small_xl(prediction: str = "eps", **index) -> "diffusers.StableDiffusionXLPipeline":
    """A small SDXL that a single file can hold: heads of width 64, group norms of 32 groups."""
    sizes = dict(vocab_size=VOCABULARY, max_position_embeddings=TOKENS, num_hidden_layers=3, eos_token_id=2)
    torch.manual_seed(4)
    first = CLIPTextConfig(hidden_size=64, intermediate_size=96, num_attention_heads=1, **sizes)
    second = CLIPTextConfig(
        hidden_size=128, intermediate_size=96, num_attention_heads=2, hidden_act="gelu", projection_dim=48, **sizes
    )
    tokenizer = POCKET / "tokenizer"
    pipe = diffusers.StableDiffusionXLPipeline(
        unet=small_unet(**XL_UNET),
        vae=small_vae(block_out_channels=(32, 64), norm_num_groups=32, scaling_factor=0.13025, **TWO_LEVELS),
        text_encoder=shake(CLIPTextModel(first).double()),
        text_encoder_2=shake(CLIPTextModelWithProjection(second).double(), seed=1),
        tokenizer=CLIPTokenizer.from_pretrained(tokenizer),
        tokenizer_2=CLIPTokenizer.from_pretrained(tokenizer, pad_token="!"),
        scheduler=ddim_scheduler(prediction),
        add_watermarker=False,
        **index,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


TWO_LEVELS = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
